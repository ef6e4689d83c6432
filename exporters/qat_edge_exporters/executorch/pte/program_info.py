"""Plain values that describe a .pte, for `qat-edge doctor`. Their field names are the keys of its --json output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a method.

    Attributes:
        dtype: torch's name of its type, or the schema's name of a value that is no tensor.
        shape: sizes; upper bounds if `dynamic`.
        dynamic: whether every size above 1 may also be smaller.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    dynamic: bool = False

    def __str__(self) -> str:
        sizes = [f"<={n}" if self.dynamic and n > 1 else str(n) for n in self.shape]
        return f"{self.dtype} [{', '.join(sizes)}]"


@dataclass(frozen=True)
class MethodInfo:
    """A method that computes; those that return a constant are in `ProgramInfo.constants`."""

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(str, tensors)) for tensors in (self.inputs, self.outputs))
        return f"{self.name}({inputs}) -> {outputs}"


@dataclass(frozen=True)
class CacheInfo:
    """Key-value cache of a program.

    Attributes:
        dtype: of keys and values.
        size_bytes: of all layers, with scales and zero points.
        tokens: that the shortest of its tensors holds.
    """

    dtype: str
    size_bytes: int
    tokens: int


@dataclass(frozen=True)
class ProgramInfo:
    """Contents of a .pte, from its bytes.

    Attributes:
        methods: methods that compute.
        constants: values of the constant methods, by name.
        operators: number of calls outside delegates, by the operator's full name.
        delegates: number of calls, by backend.
        nodes: operators inside XNNPACK's and Vulkan's delegates.
        size_bytes: by part; sums to the size of the file.
        memory_bytes: planned for activations and cache when the program is loaded.
        cache: None if none was found.
        shared_bytes: part of the embedding that the head uses as well.
    """

    methods: list[MethodInfo]
    constants: dict[str, Any]
    operators: dict[str, int]
    delegates: dict[str, int]
    nodes: int
    size_bytes: dict[str, int]
    memory_bytes: int
    cache: CacheInfo | None = None
    shared_bytes: int = 0

    @property
    def forward(self) -> MethodInfo | None:
        """The method that the LLM runner calls; None if there is none."""
        return next((method for method in self.methods if method.name == "forward"), None)

    @property
    def is_language_model(self) -> bool:
        """True if it has the metadata or the inputs of a program for ExecuTorch's LLM runner."""
        inputs = () if self.forward is None else self.forward.inputs
        integers = len(inputs) == 2 and all(tensor.dtype == "int64" for tensor in inputs)
        tokens_and_start = integers and len(inputs[1].shape) == 1  # an encoder's mask has the shape of its tokens
        return "get_max_seq_len" in self.constants or tokens_and_start


@dataclass(frozen=True)
class ContractEntry:
    """One constant method, checked against its use in the LLM runner.

    Attributes:
        name: of the method.
        value: None if the program lacks it.
        use: the runner's use of the value.
        problem: a sentence without its subject; empty if nothing is wrong.
    """

    name: str
    value: Any
    use: str
    problem: str = ""


@dataclass(frozen=True)
class RuntimeCheck:
    """Result of one runtime for one program, graph or GGUF file.

    Attributes:
        runtime: its name, as in --runtime.
        title: for people.
        source: where its operators and backends are listed.
        missing_operators: operators of the program that it lacks.
        missing_backends: backends of the program that it lacks.
        tried: whether the program was loaded, not only looked up.
        error: why loading failed; empty if it did not, or was not tried.
        untried: why it is not known whether the runtime loads it; empty if it is.
    """

    runtime: str
    title: str
    source: str
    missing_operators: list[str]
    missing_backends: list[str]
    tried: bool = False
    error: str = ""
    untried: str = ""

    @property
    def loads(self) -> bool:
        """True if nothing is missing and loading did not fail."""
        return not (self.missing_operators or self.missing_backends or self.error or self.untried)

    @property
    def reason(self) -> str:
        """Explanation, as one line, of what keeps the runtime from loading the program; empty if nothing does."""
        lacks = [*self.missing_operators, *(f"backend {name}" for name in self.missing_backends)]
        parts = [f"it lacks {', '.join(lacks)}"] if lacks else []
        parts += [text for text in (self.error, self.untried) if text]

        # A portable program helps only if custom operators are all that is missing.
        custom = [name for name in self.missing_operators if name.startswith(("llama::", "quantized_decomposed::"))]
        if custom and custom == self.missing_operators and not self.missing_backends:
            parts.append("`qat-edge export --portable` writes a program without these")
        return "; ".join(parts)


@dataclass(frozen=True)
class TokenizerCheck:
    """The tokenizer next to a program, as ExecuTorch's own tokenizer library reads it.

    Attributes:
        error: why it cannot be used; the other fields then have no meaning.
        size: number of tokens.
        bos: id of the token that begins a text.
        eos: id of the token that ends one.
        end_tokens: ids from the configurations of the model and the tokenizer.
        differing: texts that it splits differently than the Hugging Face tokenizer.
        difference: how it splits the first of them.
    """

    error: str = ""
    size: int = 0
    bos: int | None = None
    eos: int | None = None
    end_tokens: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    difference: str = ""
