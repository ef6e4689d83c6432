"""What is found in a .pte and around it: plain values, which `qat-edge doctor` judges and prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Port:
    """An input or output. shape: upper bounds where `dynamic`, which then holds for every length above 1."""

    dtype: str
    shape: tuple[int, ...] = ()
    dynamic: bool = False

    def __str__(self) -> str:
        sizes = [f"<={n}" if self.dynamic and n > 1 else str(n) for n in self.shape]
        return f"{self.dtype} [{', '.join(sizes)}]"


@dataclass(frozen=True)
class Method:
    """A method that computes; those that return a constant are in `Program.constants`."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __str__(self) -> str:
        inputs, outputs = (", ".join(map(str, ports)) for ports in (self.inputs, self.outputs))
        return f"{self.name}({inputs}) -> {outputs}"


@dataclass(frozen=True)
class Cache:
    """What a program keeps of earlier tokens. dtype: of keys and values; size_bytes: with their scales, all layers."""

    dtype: str
    size_bytes: int


@dataclass(frozen=True)
class Program:
    """What the bytes of a .pte say.

    constants: what each constant method returns. operators: calls outside delegates, by full name.
    delegates: calls by backend. nodes: operators inside XNNPACK's delegates.
    size_bytes: by part; sums to the file. memory_bytes: planned for activations and cache when it is loaded.
    cache: None where none was found. shared_bytes: of the embedding, which are the head as well.
    """

    methods: list[Method]
    constants: dict[str, Any]
    operators: dict[str, int]
    delegates: dict[str, int]
    nodes: int
    size_bytes: dict[str, int]
    memory_bytes: int
    cache: Cache | None = None
    shared_bytes: int = 0

    @property
    def forward(self) -> Method | None:
        return next((method for method in self.methods if method.name == "forward"), None)

    @property
    def is_language_model(self) -> bool:
        """Whether ExecuTorch's LLM runner is what it was made for: it has the runner's metadata or inputs."""
        inputs = () if self.forward is None else self.forward.inputs
        integers = len(inputs) == 2 and all(port.dtype == "int64" for port in inputs)
        tokens_and_start = integers and len(inputs[1].shape) == 1  # an encoder's mask is shaped like its tokens
        return "get_max_seq_len" in self.constants or tokens_and_start


@dataclass(frozen=True)
class Entry:
    """One constant method against what the LLM runner does with it. problem: empty where all is well."""

    name: str
    value: Any
    use: str
    problem: str = ""


@dataclass(frozen=True)
class Check:
    """Whether one runtime can load the program; `tried` where it was loaded, not only looked up."""

    runtime: str
    title: str
    source: str
    missing_operators: list[str]
    missing_backends: list[str]
    tried: bool = False
    error: str = ""

    @property
    def loads(self) -> bool:
        return not (self.missing_operators or self.missing_backends or self.error)


@dataclass(frozen=True)
class Words:
    """The tokenizer beside the program, as ExecuTorch's own tokenizer library reads it.

    end_tokens: of the model's and the tokenizer's configuration. differing: texts that it splits otherwise than
    the Hugging Face tokenizer does.
    """

    error: str = ""
    size: int = 0
    bos: int | None = None
    eos: int | None = None
    end_tokens: list[int] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
