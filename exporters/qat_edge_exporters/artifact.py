"""Contents of an exported artifact, as every target's reader returns them. `verify` compares them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ArtifactWeight:
    """One quantized matrix as the file holds it, unpacked.

    Attributes:
        codes: int8, shape (out, in).
        scales: float32, shape (out, in // group_size); one column where per channel.
        bits: 2, 4 or 8.
        block: input features that share a scale, in a runtime that rounds a layer's input by blocks; else None.
        levels: "seq" for 2-bit weights whose codes are -3 -1 1 3; else "integer".
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    bits: int
    block: int | None = None
    levels: str = "integer"


@dataclass(frozen=True)
class ArtifactAdapter:
    """LoRA adapter of one layer as a file holds it.

    Attributes:
        down: A, float32 (rank, in).
        up: s B, float32 (out, rank).
    """

    down: NDArray[np.float32]
    up: NDArray[np.float32]


@dataclass(frozen=True)
class FloatConstant:
    """One float32 constant of the file that is no matrix of codes and no scales: a norm, a bias, a rotary table.

    Attributes:
        name: in the file.
        values: of any shape; a rotation as the checkpoint stores it.
        tensor: name of the checkpoint's tensor that it should be ("model.norm.weight"); empty where the file's names do
            not tell.
        replaces: names of matrices and float tensors of the checkpoint that a computed constant stands for, where the
            file has no codes of them.
        is_product: True for sums of products, whose last bit depends on the machine that computes them.
    """

    name: str
    values: NDArray[np.float32]
    tensor: str = ""
    replaces: tuple[str, ...] = ()
    is_product: bool = False


@dataclass(frozen=True)
class HeldOption:
    """An option of `export` as the files of an artifact hold it, whatever their manifest records.

    Attributes:
        name: of the option.
        where: a noun phrase for the entry that holds it, with its file.
        value: of the option.
        is_least: the recorded value may be larger, as where a model has fewer positions.
    """

    name: str
    where: str
    value: int | str | bool
    is_least: bool = False


@dataclass(frozen=True)
class Passage:
    """Input and output of one module, for one sequence.

    Attributes:
        inputs: float32, shape (tokens, in); None where the artifact does not return it.
        outputs: float32, shape (tokens, out); None where the artifact does not return it.
    """

    inputs: NDArray[np.float32] | None
    outputs: NDArray[np.float32] | None


@dataclass(frozen=True)
class Exposed:
    """Outputs of a copy of an artifact that also returns what its modules compute.

    Attributes:
        places: by module, the name of the output that is the module's input (or None), and the names of those that,
            concatenated, are its output.
    """

    places: Mapping[str, tuple[str | None, Sequence[str]]]

    def passages(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, Passage]:
        """Return each module's input and output, from all outputs of the copy for one sequence."""
        return {
            module: Passage(
                None if before is None else outputs[before],
                np.concatenate([outputs[name] for name in after], axis=-1) if after else None,
            )
            for module, (before, after) in self.places.items()
        }


@dataclass(frozen=True)
class Artifact:
    """Everything read back out of one export folder.

    Attributes:
        weights: by module name of the frozen checkpoint ("model.layers.0.self_attn.q_proj", "lm_head", ...).
        metadata: what a runtime reads: constant methods of a .pte, genai_config.json of an ONNX folder.
        size_bytes: by part (linears, scales, embedding, head, graph, tokenizer, adapter); the sum is that of the
            folder's files, without manifest and logs. A table shared by embedding and head counts as the embedding's.
        faults: one sentence for each fault of the file itself (a constant whose bytes do not match their hash, a
            missing method), naming the layer and the position where known.
        floats: every other float32 constant; None where the backend stores them in a layout of its own.
        adapter: LoRA adapter by module name, where the format has a place of its own for it; empty where that place
            is empty, None where there is none.
    """

    weights: dict[str, ArtifactWeight]
    metadata: dict[str, Any]
    size_bytes: dict[str, int]
    faults: list[str] = field(default_factory=list)
    floats: Sequence[FloatConstant] | None = None
    adapter: Mapping[str, ArtifactAdapter] | None = None

    @property
    def end_tokens(self) -> list[int] | None:
        """Return the ids that end a generation; None for an artifact that generates no text."""
        found = self.metadata.get("end_tokens", self.metadata.get("get_eos_ids"))
        return [found] if isinstance(found, int) else found
