"""Tables of a frozen checkpoint that a Hugging Face folder holds in float32.

embedding       codes times scales. transformers 5.23 cannot load packed codes of an embedding: it initializes the
                module's weight before loading, and a packed module has none.
rotated head    E T, where embedding and head share the table E and the head's input is multiplied by T
                (`quant.rotated_norm`). No module of transformers does that, and y T^T E^T = y (E T)^T. The head's input
                is then not rounded, as a rounding of y would be one in another basis.

A code times its bfloat16 scale has at most 16 significant bits, which float32 holds and bfloat16 does not. E T is
computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qat_edge.quant import frozen, numerics
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.rotated_norm import ROTATION, stored_rotations
from qat_edge_exporters.artifact import Artifact, FloatConstant

ROWS = 8192  # multiplied at once, in float64


@dataclass(frozen=True)
class FloatTable:
    """One table.

    Attributes:
        module: that it is the weight of.
        values: float32, shape (out, in).
        replaces: names of the checkpoint's matrices and float tensors that it stands for.
        is_folded: True if it is a product of two matrices.
    """

    module: str
    values: Tensor
    replaces: tuple[str, ...]
    is_folded: bool = False


def float_tables(checkpoint: Path, weights: Mapping[str, FrozenWeight] | None = None) -> list[FloatTable]:
    """Compute the tables of a checkpoint, the embedding first.

    Args:
        checkpoint: frozen.
        weights: its matrices, where they have been read before.
    """
    scheme, weights = frozen.read_scheme(checkpoint), weights or frozen.read_weights(checkpoint)
    found = []
    for name in scheme.embeddings:
        found.append(FloatTable(name, _values(weights[name]), (name,)))
    # Only the norm before a head that shares the embedding's table has a rotation.
    for norm, rotation in stored_rotations(checkpoint).items():
        product = _product(weights[scheme.head], rotation)
        found.append(FloatTable(scheme.head, product, (scheme.head, f"{norm}.{ROTATION}"), is_folded=True))
    return found


def float_table_names(checkpoint: Path) -> list[str]:
    """Return the modules of `float_tables` without computing them."""
    scheme = frozen.read_scheme(checkpoint)
    return [*scheme.embeddings, *(scheme.head for _ in stored_rotations(checkpoint))]


def computed_constants(checkpoint: Path, artifact: Artifact) -> Iterable[FloatConstant]:
    """Return the tables as constants of a folder, which stand for tensors of the checkpoint."""
    return [
        FloatConstant(
            f"{table.module}.weight", table.values.numpy(), replaces=table.replaces, is_product=table.is_folded
        )
        for table in float_tables(checkpoint)
    ]


def _values(weight: FrozenWeight) -> Tensor:
    return numerics.dequantize(weight.codes, weight.scales.float()).contiguous()


def _product(weight: FrozenWeight, rotation: Tensor) -> Tensor:
    """Return the table (out, in) times a rotation (in, in), computed in float64."""
    factor = rotation.double()
    parts = zip(weight.codes.split(ROWS), weight.scales.split(ROWS), strict=True)
    return torch.cat([(numerics.dequantize(codes, scales.double()) @ factor).float() for codes, scales in parts])
