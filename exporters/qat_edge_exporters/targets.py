"""Every kind of artifact, one `Target` record each: who writes it, who reads it back, where it runs.

Nothing heavy is imported here: a record names functions as "module:function", and its methods import them when they
are called. A new kind of artifact is one more record in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qat_edge.errors import ArtifactError, RunError, UsageError
from qat_edge.lazy import load
from qat_edge_exporters import answer_grammar
from qat_edge_exporters.answer_grammar import AnswerGrammar
from qat_edge_exporters.executorch.backends.registry import BACKENDS, XNNPACK, Backend, require_package

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from qat_edge.data.answer_schema import AnswerSchema
    from qat_edge.data.conversation import Prompt
    from qat_edge_exporters.artifact import Artifact, ArtifactAdapter, Exposed, FloatConstant, HeldOption
    from qat_edge_exporters.executorch.diagnosis import Diagnosis
    from qat_edge_exporters.file_diagnosis import FileDiagnosis, SchemaCheck
    from qat_edge_exporters.planned_size import FrozenOutline, PlannedFiles

EXECUTORCH, ONNX, GGUF, HF = "executorch", "onnx", "gguf", "hf"
# Runtimes that `doctor` examines a file for, besides those of apps with ExecuTorch.
ONNXRUNTIME, GENAI, LLAMA_CPP = "onnxruntime", "onnxruntime-genai", "llama.cpp"
KV_CACHE_FLOAT = "float32"  # the KV cache that every target has
KV_CACHE_INT8 = "int8"

# Options of `export` that only some targets take: name -> the value that changes nothing.
NEUTRAL = {"portable": False, "kv_cache": KV_CACHE_FLOAT}


class TextGenerator(Protocol):
    """A loaded model that answers one prompt after another."""

    def generate(self, prompt: Prompt, emit: Callable[[str], None], max_new_tokens: int) -> bool:
        """Continue `prompt` greedily; each piece of text goes to `emit` as it comes.

        Returns:
            Whether the text ended by itself; False where `max_new_tokens` cut it.

        Raises:
            ArtifactError: the runtime refused the artifact, or crashed.
        """

    def stop(self) -> None:
        """End the text in progress, of which the tokens so far are kept; callable from a signal handler."""


@dataclass(frozen=True)
class Target:
    """One kind of artifact.

    Attributes:
        name: of its folder below RUN/exports, and what `verify`, `validate` and `generate` call it.
        format: what `export --target` calls it; several targets may share a format and differ in the backend.
        title: how reports write it.
        file: name of the file with its graph.
        marker: shape of its points in plots.
        exporter: writes it: (checkpoint, empty folder, context_length, **options).
        reader: reads codes, scales and sizes back: (folder) -> Artifact.
        options_reader: reads the options of its export from the files: (folder) -> list of `HeldOption`.
        constants: computes the float constants that are no tensors of the checkpoint: (checkpoint, Artifact) ->
            constants. Empty: float constants are not read.
        support: tells from a model's configuration what the target lacks for it: (config) -> sentence, or "".
        requirements: refuses a checkpoint that the format cannot hold, before anything is built: (checkpoint,
            context_length). Empty: its configuration tells everything.
        expose: writes a copy whose matrices are observable: (folder, empty folder) -> Exposed. Empty: not possible.
        generator: loads it on this machine to generate text: (folder, tokenizer) -> context of a `TextGenerator`.
        encoder: runs an encoder on this machine: (folder, token ids of each text) -> outputs. Empty: no encoders.
        checker: refuses a folder that asks a runtime to load anything but the artifact: (folder). Empty: it cannot.
        settings: names what differs in a runtime's settings: (folder, checkpoint) -> sentences. Empty: it has none.
        sizes: predicts its files from the outline of a checkpoint: (outline, context_length, **options) ->
            PlannedFiles. Empty: not known.
        copied: names of files of the checkpoint that an artifact has a copy of, besides the tokenizer's.
        doctor: finds out where a file of the format loads: (file, runtimes) -> Diagnosis or FileDiagnosis; no runtimes
            are those that the file is made for. Empty: not known.
        runtimes: that `doctor` examines such a file for.
        tokenizer_check: names prompts that apps would read differently than training: (folder) -> sentences. Empty:
            its runtime takes token ids.
        options: names of `export` options that it takes beyond the context length.
        widths: bits of weights that it has operators for.
        backend: compiler other than the format's usual one; None for the usual one.
        other_rounding: how a runtime rounds otherwise than training did, a sentence each.
        grammar: of answers that its runtime takes; None if it takes none.
        without_grammar: why answers are not constrained, as a sentence; empty where `grammar` is set.
        packages: Python packages that write, read and run it; the first one reads its file.
        extra: the extra of qat-edge that installs `packages`.
        packages_only_run: it is written and read without `packages`.
    """

    name: str
    format: str
    title: str
    file: str
    marker: str
    exporter: str
    reader: str
    options_reader: str
    support: str
    constants: str = ""
    requirements: str = ""
    generator: str = ""
    expose: str = ""
    encoder: str = ""
    checker: str = ""
    settings: str = ""
    sizes: str = ""
    copied: tuple[str, ...] = ()
    doctor: str = ""
    runtimes: tuple[str, ...] = ()
    tokenizer_check: str = ""
    options: tuple[str, ...] = ()
    widths: tuple[int, ...] = (4, 8)
    backend: Backend | None = None
    other_rounding: tuple[str, ...] = ()
    grammar: AnswerGrammar | None = None
    without_grammar: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""
    packages_only_run: bool = False
    # Sentences that say why two options exclude each other, by the names of both.
    exclusions: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def runs_elsewhere(self) -> str:
        """Return why the artifact cannot run on this machine, as a sentence; empty where it can."""
        if missing := self._missing_package(self.packages):
            return f"{self.name} cannot run here: {missing}"
        if self.backend is None:
            return ""
        lacking = f"{self.backend.delegate} is not in ExecuTorch's Python package"
        return f"{self.name} cannot run here: {lacking}. It runs on {self.backend.runs_on}."

    @property
    def differences(self) -> tuple[str, ...]:
        """Return how what it computes may differ from what was trained, a sentence each."""
        return self.backend.differences if self.backend else self.other_rounding

    def _missing_package(self, packages: Sequence[str]) -> str:
        """Return which of these packages is not installed, and how to install it; empty where all are."""
        missing = next((name for name in packages if find_spec(name) is None), None)
        if missing is None:
            return ""
        return f"the package {missing} is not installed. `pip install 'qat-edge[{self.extra}]'` installs it."

    def require_installed(self, packages: Sequence[str] | None = None) -> None:
        """Require the packages that write and read the artifact, or these of them.

        Raises:
            UsageError: one is not installed; the message names the extra.
        """
        packages = self.packages if packages is None else packages
        if not self.packages_only_run and (missing := self._missing_package(packages)):
            raise UsageError(f"{self.name} cannot be written or read here: {missing}")

    def _load(self, entry: str) -> Any:
        """Import one of its functions, which needs its packages.

        Raises:
            UsageError: one is not installed.
        """
        self.require_installed()
        return load(entry)

    def require_compiler(self) -> None:
        """Check that the backend's compiler is installed.

        Raises:
            ExportError: it is not; the message says how to install it.
        """
        if self.backend is not None:
            require_package(self.backend)

    def export(self, checkpoint: Path, out: Path, context_length: int, **options: Any) -> None:
        """Write the artifact of a checkpoint into the empty folder `out`.

        Raises:
            ExportError: the target cannot express the model, or its compiler failed.
        """
        given = {"backend": self.backend.name} if self.backend else {}
        self._load(self.exporter)(checkpoint, out, context_length, **given, **options)

    def check(self, folder: Path) -> None:
        """Check a folder before a runtime gets it, on this machine or on a device.

        Raises:
            ArtifactError: a file in it makes the runtime load a library, run other code or read another file.
        """
        if self.checker:
            self._load(self.checker)(folder)

    def read(self, folder: Path) -> Artifact:
        """Read codes, scales, metadata and sizes back out of an exported folder.

        Raises:
            ArtifactError: the files cannot be read.
        """
        artifact: Artifact = self._load(self.reader)(folder)
        return artifact

    def held_options(self, folder: Path) -> list[HeldOption]:
        """Return the options of `export` as the files of a folder hold them, without its manifest.

        Raises:
            ArtifactError: a file cannot be read, or does not fit another one.
        """
        held: list[HeldOption] = self._load(self.options_reader)(folder)
        return held

    def setting_faults(self, folder: Path, checkpoint: Path) -> list[str]:
        """Return how the settings of an artifact's runtime differ from what the export writes, a sentence each."""
        return list(self._load(self.settings)(folder, checkpoint)) if self.settings else []

    def computed_constants(self, checkpoint: Path, artifact: Artifact) -> Sequence[FloatConstant]:
        """Compute again the float constants of an artifact that are no tensors of its frozen checkpoint."""
        constants: Sequence[FloatConstant] = self._load(self.constants)(checkpoint, artifact) if self.constants else ()
        return constants

    def missing_for(self, config: PretrainedConfig) -> str:
        """Return what the target lacks for a model of this configuration, as a sentence; empty where nothing."""
        return str(load(self.support)(config))

    def require_checkpoint(self, checkpoint: Path, context_length: int) -> None:
        """Require that the format can hold a checkpoint, without building anything.

        Raises:
            ExportError: names what it cannot hold.
        """
        if self.requirements:
            self._load(self.requirements)(checkpoint, context_length)

    def expose_outputs(self, folder: Path, out: Path) -> Exposed:
        """Write a copy of the artifact that also returns the inputs and outputs of its matrices.

        Raises:
            ArtifactError: no runtime of the target returns them.
        """
        if not self.expose:
            raise ArtifactError(f"{self.title} has no outputs besides the logits.")
        self.check(folder)
        exposed: Exposed = self._load(self.expose)(folder, out)
        return exposed

    def planned_files(self, outline: FrozenOutline, context_length: int, **options: Any) -> PlannedFiles:
        """Predict the files of an export, before its checkpoint exists.

        Raises:
            ExportError: the target cannot express the model.
        """
        planned: PlannedFiles = load(self.sizes)(outline, context_length, **options)
        return planned

    def missing_widths(self, widths: Iterable[int]) -> str:
        """Return which of these bits of weights the target has no operator for, as a sentence; empty where none."""
        missing = sorted(set(widths) - set(self.widths))
        if not missing:
            return ""
        return f"{self.title} has no operator for {' or '.join(map(str, missing))}-bit weights."

    def require_grammar(self, answer: AnswerSchema) -> None:
        """Require that the grammar of the target's runtime, where it takes one, can express a schema.

        Raises:
            ExportError: names the part of the schema.
        """
        if self.grammar is not None:
            self.grammar.text(answer)

    def write_schema(self, folder: Path, answer: AnswerSchema) -> None:
        """Write schema.json and the runtime's grammar into the folder of an artifact."""
        answer_grammar.write_schema(folder, answer, self.grammar)

    def schema_faults(self, folder: Path) -> list[str]:
        """Return what is wrong with schema.json of a folder and with the grammar next to it, a sentence each."""
        return answer_grammar.grammar_faults(folder, self.grammar)

    def check_schema_files(self, path: Path, loading: Collection[str]) -> SchemaCheck:
        """Examine schema.json next to a file of the target's format. loading: runtimes that load the file."""
        loads = self.grammar is not None and self.grammar.runtime in loading
        return answer_grammar.check_schema_files(path, self.grammar, self.without_grammar, loads)

    @contextmanager
    def open_generator(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, constrained: bool = False
    ) -> Iterator[TextGenerator]:
        """Load the artifact in its own runtime, until the end of the block.

        constrained: all answers follow the grammar next to the artifact.

        Raises:
            ArtifactError: the runtime refused the folder, or there is no such grammar.
        """
        self.check(folder)
        grammar = {}
        if constrained:
            if self.grammar is None:
                raise ArtifactError(f"{folder}: {self.without_grammar}")
            grammar = {"grammar": answer_grammar.read_grammar(folder, self.grammar)}
        opened: AbstractContextManager[TextGenerator] = self._load(self.generator)(folder, tokenizer, **grammar)
        with opened as generator:
            yield generator

    def run_encoder(self, folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
        """Return an encoder's output for each text's token ids, shape (texts, width)."""
        self.check(folder)
        outputs: NDArray[np.float32] = self._load(self.encoder)(folder, texts)
        return outputs

    def tokenizer_faults(self, folder: Path) -> list[str]:
        """Return how apps would read other prompts than training did, one sentence each."""
        faults: list[str] = self._load(self.tokenizer_check)(folder) if self.tokenizer_check else []
        return faults

    def diagnose(self, path: Path, runtimes: Sequence[str]) -> Diagnosis | FileDiagnosis:
        """Find out in which of the named runtimes a file of the format loads; without any, in the usual ones.

        Raises:
            ArtifactError: the file cannot be read at all.
        """
        self.require_installed(self.packages[:1])  # which one reads the file; it may load in a runtime or not
        diagnosis: Diagnosis | FileDiagnosis = load(self.doctor)(path, runtimes)
        return diagnosis


_NO_PTE_GRAMMAR = (
    "ExecuTorch's LLM runner takes no grammar, so that it constrains no answer. schema.json is for the app, which can "
    "check answers by it."
)
_PTE = "qat_edge_exporters.executorch"
COPIED = ("config.json", "generation_config.json")  # into the folder of a .pte
_ONNX = "qat_edge_exporters.onnx"
_GGUF = "qat_edge_exporters.gguf"
_HF = "qat_edge_exporters.huggingface"


def _other_backend(name: str, reader: str) -> Target:
    """A .pte lowered to another backend than XNNPACK: it takes no options and runs on other machines only."""
    backend = BACKENDS[name]
    return Target(
        name=backend.folder,
        format=EXECUTORCH,
        title=f"ExecuTorch, {name}",
        file="model.pte",
        marker="diamond",
        packages=("executorch",),
        extra="executorch",
        exporter=f"{_PTE}.export_pte:export",
        reader=f"{_PTE}.pte.backend_readers:{reader}",
        options_reader=f"{_PTE}.pte.pte_options:held_options",
        support=f"{_PTE}.pte_support:missing",
        backend=backend,
        without_grammar=_NO_PTE_GRAMMAR,
        tokenizer_check=f"{_PTE}.runner_tokenizer:tokenizer_faults",
        copied=COPIED,
    )


_ALL = (
    Target(
        name=EXECUTORCH,
        format=EXECUTORCH,
        title="ExecuTorch",
        file="model.pte",
        marker="circle",
        packages=("executorch",),
        extra="executorch",
        exporter=f"{_PTE}.export_pte:export",
        reader=f"{_PTE}.pte.pte_reader:read",
        options_reader=f"{_PTE}.pte.pte_options:held_options",
        constants=f"{_PTE}.pte.rotary_constants:rotary_frequencies",
        support=f"{_PTE}.pte_support:missing",
        generator=f"{_PTE}.generate_text:open_generator",
        expose=f"{_PTE}.pte.intermediate_outputs:expose",
        encoder=f"{_PTE}.encoder_runtime:run_encoder",
        sizes=f"{_PTE}.pte_size:planned",
        doctor=f"{_PTE}.diagnosis:diagnose_pte",
        runtimes=("python-wheel", "android-app", "android-vulkan-app", "ios-app", "minimal"),
        tokenizer_check=f"{_PTE}.runner_tokenizer:tokenizer_faults",
        copied=COPIED,
        options=("portable", "kv_cache"),
        without_grammar=_NO_PTE_GRAMMAR,
        exclusions={("kv_cache", "portable"): "no operator of ATen reads such a cache"},
    ),
    Target(
        name=ONNX,
        format=ONNX,
        title="ONNX",
        file="model.onnx",
        marker="square",
        packages=("onnx", "onnxruntime", "onnxruntime_genai"),
        extra="onnx",
        exporter=f"{_ONNX}.onnx_target:export",
        reader=f"{_ONNX}.onnx_target:read",
        options_reader=f"{_ONNX}.onnx_target:held_options",
        constants=f"{_ONNX}.onnx_target:computed_constants",
        support=f"{_ONNX}.onnx_target:missing",
        generator=f"{_ONNX}.genai_text:open_generator",
        expose=f"{_ONNX}.matrix_outputs:expose",
        doctor=f"{_ONNX}.onnx_diagnosis:diagnose_onnx",
        runtimes=(ONNXRUNTIME, GENAI),
        encoder=f"{_ONNX}.encoder_session:run_encoder",
        checker=f"{_ONNX}.onnx_target:check_folder",
        settings=f"{_ONNX}.onnx_target:setting_faults",
        sizes=f"{_ONNX}.onnx_size:planned",
        widths=(2, 4, 8),
        grammar=AnswerGrammar(
            file="grammar.lark",
            writer=f"{_ONNX}.lark_grammar:grammar",
            runtime=GENAI,
            package="onnxruntime-genai",
            call='GeneratorParams.set_guidance("lark_grammar", TEXT)',
            probe=f"{_ONNX}.onnxruntime_probe:try_grammar",
        ),
    ),
    Target(
        name=GGUF,
        format=GGUF,
        title="GGUF",
        file="model.gguf",
        marker="triangle",
        exporter=f"{_GGUF}.export_gguf:export",
        reader=f"{_GGUF}.gguf_reader:read",
        options_reader=f"{_GGUF}.gguf_reader:held_options",
        constants=f"{_GGUF}.gguf_settings:computed_constants",
        support=f"{_GGUF}.gguf_support:missing",
        requirements=f"{_GGUF}.export_gguf:require_expressible",
        generator=f"{_GGUF}.llama_text:open_generator",
        checker=f"{_GGUF}.gguf_reader:check_folder",
        settings=f"{_GGUF}.gguf_settings:setting_faults",
        sizes=f"{_GGUF}.gguf_size:planned",
        doctor=f"{_GGUF}.gguf_diagnosis:diagnose_gguf",
        runtimes=(LLAMA_CPP,),
        tokenizer_check=f"{_GGUF}.vocabulary:tokenizer_faults",
        # https://github.com/ggml-org/llama.cpp/tree/master/ggml/src/ggml-cpu
        other_rounding=(
            "llama.cpp rounds the inputs of linear layers to int8 per block of 32 (Q8_0), where training rounds them "
            "per token",
            "llama.cpp keeps keys and values in float16, and its fused attention reads them so, unless it is started "
            "with --flash-attn off --cache-type-k f32 --cache-type-v f32",
        ),
        grammar=AnswerGrammar(
            file="grammar.gbnf",
            writer=f"{_GGUF}.gbnf:grammar",
            runtime=LLAMA_CPP,
            package="xllamacpp",
            call='--grammar-file FILE, or llama_sampler_init_grammar(VOCABULARY, TEXT, "root")',
            probe=f"{_GGUF}.llama_probe:try_grammar",
        ),
        packages=("xllamacpp",),
        extra="gguf",
        packages_only_run=True,
    ),
    Target(
        name=HF,
        format=HF,
        title="Hugging Face",
        file="model.safetensors",
        marker="star",
        exporter=f"{_HF}.export_hf:export",
        reader=f"{_HF}.hf_reader:read",
        options_reader=f"{_HF}.hf_settings:held_options",
        constants=f"{_HF}.float_tables:computed_constants",
        support=f"{_HF}.hf_support:missing",
        requirements=f"{_HF}.export_hf:require_expressible",
        generator=f"{_HF}.hf_text:open_generator",
        checker=f"{_HF}.hf_settings:check_folder",
        settings=f"{_HF}.hf_settings:setting_faults",
        sizes=f"{_HF}.hf_size:planned",
        without_grammar=(
            "transformers takes no grammar, so that it constrains no answer. schema.json is for servers that take a "
            "JSON schema with a request, which was not measured, and for the app."
        ),
        packages=("compressed_tensors",),
        extra="hf",
        packages_only_run=True,
    ),
    _other_backend("vulkan", "read_vulkan"),
    _other_backend("coreml", "read_coreml"),
)
TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
FORMATS = tuple(dict.fromkeys(target.format for target in _ALL))
DEFAULT_FORMATS = (EXECUTORCH, ONNX)  # what `export` writes where no format is named, and what `compare` compares
USUAL_BACKEND = XNNPACK  # of a .pte
EXPORT_BACKENDS = (USUAL_BACKEND, *BACKENDS)  # values of `export --backend`


def target_named(name: str) -> Target:
    """Return the record of one kind of artifact.

    Raises:
        UsageError: there is none of that name; the known ones are listed.
    """
    if name not in TARGETS:
        raise UsageError(f"target '{name}' is not known. Known: {', '.join(sorted(TARGETS))}.")
    return TARGETS[name]


def require_installed(names: Iterable[str]) -> None:
    """Require the packages that write and read artifacts of the named targets.

    Raises:
        UsageError: one is not installed, or a target is not known.
    """
    for name in names:
        target_named(name).require_installed()


def unmerged_adapter(checkpoint: Path) -> dict[str, ArtifactAdapter]:
    """Return the adapter of a checkpoint that exporters leave unmerged, by module name; empty where it has none.

    Raises:
        ExportError: it does not compute W x + s B (A x), or cannot be read.
    """
    found: dict[str, ArtifactAdapter] = load("qat_edge_exporters.checkpoint:adapter_arrays")(checkpoint)
    return found


def require_known(folder: Path) -> None:
    """Require that the folder of an artifact is named after a target.

    Raises:
        RunError: it is not, so nothing can read it.
    """
    if folder.name not in TARGETS:
        raise RunError(
            f"{folder}: '{folder.name}' is not the name of a target. Known: {', '.join(sorted(TARGETS))}. Move it out "
            "of the run, or name the targets with --target."
        )


def target_for(format: str, backend: str) -> Target:
    """Return the target of `export --target FORMAT --backend BACKEND`; a format without that backend ignores it.

    Raises:
        UsageError: no such format.
    """
    found = [target for target in _ALL if target.format == format]
    if not found:
        raise UsageError(f"--target '{format}' is not known. Known: {', '.join(sorted(FORMATS))}.")
    return next((t for t in found if t.backend is not None and t.backend.name == backend), found[0])
