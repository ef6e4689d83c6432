"""What a reader finds in an exported artifact: the common shape that `verify` compares and `validate` sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ArtifactWeight:
    """One quantized matrix as the file holds it, unpacked.

    codes: int8, (out, in). scales: float32, (out, in // group_size); one column where per channel. block: features that
    share a scale where the runtime rounds a layer's input by blocks, those of the file even where scales repeat.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    bits: int
    block: int | None = None


@dataclass(frozen=True)
class Passage:
    """What went into a module and what came out of it, float32 (tokens, features); None where that is not seen."""

    inputs: NDArray[np.float32] | None
    outputs: NDArray[np.float32] | None


@dataclass(frozen=True)
class Exposed:
    """Where a copy of an artifact returns what passes through it.

    places: by module the output that is what goes into it, None where that is not seen, and those that, side by side,
        are what comes out of it.
    """

    places: Mapping[str, tuple[str | None, Sequence[str]]]

    def passages(self, outputs: Mapping[str, NDArray[np.float32]]) -> dict[str, Passage]:
        """By module, out of all that the copy returned for one sequence."""
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

    weights: by module name of the frozen checkpoint ("model.layers.0.self_attn.q_proj", "lm_head", ...).
    faults: what is wrong with the file itself (a constant whose bytes do not match their hash, a missing
        method), one sentence each, naming the layer and the place where known.
    metadata: what a runtime reads: constant methods of a .pte, genai_config.json of an ONNX folder.
    size_bytes: by part: linears, scales, embedding, head, graph, tokenizer; sums to the folder's files,
        manifest and logs aside. A table that embedding and head share is the embedding's, and the head has none.
    floats: sha256 of float32 constants as the checkpoint has them, row by row; None where they were not read.
    """

    weights: dict[str, ArtifactWeight]
    metadata: dict[str, Any]
    size_bytes: dict[str, int]
    faults: list[str] = field(default_factory=list)
    floats: frozenset[str] | None = None
