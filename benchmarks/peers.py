"""Build the engines and models that our files are compared with, as a user would, in a folder of their own.

llama.cpp: the source is part of llama-cpp-python on PyPI. It is built with cmake and ninja from PyPI and this machine's
    compiler, about 10 minutes on two cores. Its own programs convert the model and quantize it.
AutoRound: installed from PyPI into a folder of its own.
onnxruntime-genai: already a dependency. Its own model builder quantizes the model to int4, embedding and head included.
.pte with int4 tables: for a fair comparison with the int4 embedding and head of onnxruntime-genai, the same model is
    exported once more with an int4 embedding and head.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_edge import progress
from qat_edge.errors import QatEdgeError
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.models import merge
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.storage import replace_folder, work_folder, write_text
from qat_edge.verbs.export import export

LLAMA_CPP_PACKAGE = ("llama-cpp-python", "0.3.36")
BUILD_OPTIONS = (
    "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)  # fmt: skip
X86 = ("x86_64", "AMD64")
# GCC optimizes the tile configuration of llama.cpp's AMX kernels away, so that the first prompt crashes:
# https://github.com/ggml-org/llama.cpp/pull/26954
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
TOOLS = ("llama-bench", "llama-quantize", "llama-imatrix")
AUTO_ROUND_PACKAGES = ("auto-round==0.16.1", "py-cpuinfo==9.0.0")
AUTO_ROUND_SCRIPT = Path(__file__).with_name("auto_round_script.py")
PTE_TARGET = "executorch"
GENAI_OPTIONS = ("accuracy_level=4", "block_size=32")  # int8 activations; the group size of Q4_0 and of our files
LOG_LINES = 6


class PeerError(QatEdgeError):
    """An engine is not available on this machine; the message gives the reason."""


@dataclass(frozen=True)
class PeerBuilder:
    """Builds the other engines and their models. Everything is made once and found again.

    Attributes:
        work: folder for engines and models.
        run: finished run whose FP32 fine-tune is quantized.
    """

    work: Path
    run: Run

    def llama_bench(self) -> Path:
        """Return llama.cpp's own benchmark program; build it where it is missing.

        Raises:
            PeerError: there is no compiler, or the source cannot be downloaded or built.
        """
        return self._llama_tools() / "llama-bench"

    def gguf(self, kind: str, calibration: Path | None = None) -> Path:
        """Return the fine-tune as a GGUF file of one of llama.cpp's types; make it where it is missing.

        Args:
            kind: type as llama-quantize has it, such as "Q4_K_M".
            calibration: text for the importance matrix; None for none.

        Raises:
            PeerError: llama.cpp cannot be built, or one of its programs failed.
        """
        made = self._models / (f"{kind}.gguf" if calibration is None else f"{kind}-imatrix.gguf")
        if not made.is_file():
            tools, part = self._llama_tools(), made.with_suffix(".part")
            matrix = [] if calibration is None else ["--imatrix", str(self._importance_matrix(calibration))]
            self._run([str(tools / "llama-quantize"), *matrix, str(self._full()), str(part), kind], "quantize")
            part.rename(made)
        return made

    def auto_round(self, bits: int, calibration: Path) -> Path:
        """Return a folder with AutoRound's result for the fine-tune; make it where it is missing.

        Args:
            bits: of the weights, in symmetric groups of 32.
            calibration: token ids, one JSON list of equal length a line.

        Returns:
            float/: a Hugging Face folder of the rounded weights; size.json: bytes of AutoRound's own files.

        Raises:
            PeerError: AutoRound cannot be installed, or failed.
        """
        made = self._models / f"auto-round-{bits}"
        if not made.is_dir():
            packages = self.work / "peers" / "auto-round"
            if not packages.is_dir():
                progress.info(f"Installing {' '.join(AUTO_ROUND_PACKAGES)}")
                with replace_folder(packages, force=False) as folder:
                    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
                    self._run([*install, *AUTO_ROUND_PACKAGES], "auto-round-install")
            progress.info(f"Quantizing with AutoRound to {bits} bits")
            with replace_folder(made, force=False) as folder:
                path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
                command = [sys.executable, str(AUTO_ROUND_SCRIPT), str(self._float()), str(calibration)]
                self._run([*command, str(bits), str(folder)], f"auto-round-{bits}", {"PYTHONPATH": path})
        return made

    def genai_int4(self) -> Path:
        """Return the fine-tune in onnxruntime-genai's own int4 format; make it where it is missing."""
        made = self._models / "genai"
        if not made.is_dir():
            source = self._float()
            progress.info("Building the model with onnxruntime-genai's builder")
            with replace_folder(made, force=False) as folder:
                command = [
                    sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder),
                    "-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *GENAI_OPTIONS,
                ]  # fmt: skip
                self._run(command, "genai")
                shutil.rmtree(folder / "cache", ignore_errors=True)
        return made

    def int4_tables(self) -> Path:
        """Return the fine-tune as a .pte with an int4 embedding and head; make it where it is missing.

        It is otherwise exported like the run's own .pte, but rounded to nearest and without rotation: the speed of a
        file does not depend on its codes.

        Raises:
            RunError: the run has no .pte.
        """
        like = self.run.exports / PTE_TARGET
        options = ExportOptions(**{**read_manifest(like)["options"], "target": (PTE_TARGET,), "ptq": ("none",)})
        export_id = sha256(like / MANIFEST)[:12]  # another export of the run needs another file
        made = self._models / f"int4-tables-{export_id}"
        if not made.is_dir():
            progress.info("Exporting the model with int4 tables: a minute or more")
            with work_folder(self._models, made.name) as folder:
                # A run whose adapter is the FP32 reference is frozen by rounding to nearest when it is exported.
                rounded = Run(folder)
                shutil.copytree(self.run.reference, rounded.adapter)
                manifest = {**read_manifest(rounded.adapter), "kind": "adapter", "table_bits": [4, 4]}
                write_text(rounded.adapter / MANIFEST, json.dumps(manifest, indent=2) + "\n")
                export(rounded, options)
                (rounded.exports / PTE_TARGET).rename(made)
        return made

    @property
    def _models(self) -> Path:
        return self.work / "models" / sha256(self.run.reference / MANIFEST)[:12]

    @property
    def _llama(self) -> Path:
        return self.work / "peers" / "llama.cpp"

    def _full(self) -> Path:
        """Return the fine-tune as a GGUF file in float32."""
        made = self._models / "F32.gguf"
        if not made.is_file():
            progress.info("Converting the model for llama.cpp")
            script, part = self._llama_source() / "convert_hf_to_gguf.py", made.with_suffix(".part")
            command = [sys.executable, str(script), str(self._float()), "--outtype", "f32", "--outfile", str(part)]
            self._run(command, "convert")
            part.rename(made)
        return made

    def _importance_matrix(self, calibration: Path) -> Path:
        """Return llama.cpp's importance matrix of the fine-tune on a text."""
        made = self._models / "imatrix.gguf"
        if not made.is_file():
            progress.info("Measuring llama.cpp's importance matrix")
            program, part = str(self._llama_tools() / "llama-imatrix"), made.with_suffix(".part.gguf")
            flags = ["-m", str(self._full()), "-f", str(calibration), "-o", str(part), "--parse-special"]
            self._run([program, *flags], "imatrix")
            part.rename(made)
        return made

    def _float(self) -> Path:
        """Return the FP32 fine-tune as a Hugging Face folder."""
        folder = self._models / "float"
        if not folder.is_dir():
            progress.info("Merging the FP32 fine-tune")
            merged = merge.merged_model(self.run.reference)
            with replace_folder(folder, force=False) as made:
                merged.model.save_pretrained(made)
                merged.tokenizer.save_pretrained(made)
        return folder

    def _llama_tools(self) -> Path:
        """Return the folder of llama.cpp's programs; compile them where they are missing."""
        folder = self._llama / "build" / "bin"
        if all((folder / tool).is_file() for tool in TOOLS):
            return folder
        if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            raise PeerError("llama.cpp has to be compiled, and this machine has no C++ compiler")

        source, build = self._llama_source(), self._llama / "build"
        tools = self._build_tools()
        env = {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
        progress.info("Compiling llama.cpp: 10 minutes or more")
        cmake = str(tools / "cmake")
        flags = [f"-DCMAKE_{each}_FLAGS={NO_AMX}" for each in ("C", "CXX") if platform.machine() in X86]
        self._run([cmake, "-S", str(source), "-B", str(build), *BUILD_OPTIONS, *flags], "configure", env)
        self._run([cmake, "--build", str(build), "--target", *TOOLS], "compile", env)
        return folder

    def _llama_source(self) -> Path:
        """Return the source folder of llama.cpp; download it where it is missing."""
        source = self._llama / "source"
        if source.is_dir():
            return source
        package, version = LLAMA_CPP_PACKAGE
        progress.info(f"Downloading the source of llama.cpp, part of {package} {version}")
        with replace_folder(source, force=False) as folder:
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "-d", str(folder)]
            self._run([*download, f"{package}=={version}"], "fetch")

            archive = next(folder.glob("*.tar.gz"))
            with tarfile.open(archive) as packed:
                packed.extractall(folder, _below("vendor/llama.cpp", packed), filter="data")
            archive.unlink()

            # The archive nests the source in the package's folder: move it up.
            inner = next(folder.glob("*/vendor/llama.cpp"))
            for part in inner.iterdir():
                part.rename(folder / part.name)
            shutil.rmtree(inner.parents[1])
        return source

    def _build_tools(self) -> Path:
        """Return the programs of a virtual environment with cmake and ninja."""
        folder = self.work / "peers" / "build-tools"
        if not (folder / "bin" / "ninja").is_file():
            venv.create(folder, with_pip=True, clear=True)
            self._run([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "cmake", "ninja"], "tools")
        return folder / "bin"

    def _run(self, command: Sequence[str], log: str, env: Mapping[str, str] | None = None) -> None:
        """Run a program with its output in a log file.

        Args:
            command: program and arguments.
            log: name of the file below WORK/logs, without its suffix.
            env: environment variables that differ from this process's.

        Raises:
            PeerError: the program failed; its last lines are quoted.
        """
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        with path.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            last = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            raise PeerError(f"`{Path(command[0]).name}` failed ({log}): {' | '.join(last)}. Full output: {path}")


def _below(folder: str, packed: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """Members of an archive below `folder` of its only top-level folder."""
    return [member for member in packed if member.name.partition("/")[2].startswith(f"{folder}/")]
