"""What the remaining loss is made of: a frozen checkpoint with parts of its rounding off, or tables of fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qat_edge.diagnose import error_budget
from qat_edge.diagnose.runtime_rounding import Rounding, rounding_as
from qat_edge.evaluate import reference
from qat_edge.models import merge
from qat_edge.quant import frozen, numerics

SWITCHED_OFF: Mapping[str, tuple[str, ...]] = {
    "all rounding on": (),
    "weights off": ("weights",),
    "activations off": ("activations",),
    "embedding off": ("embedding",),
    "head off": ("head",),
    "all off": error_budget.PARTS,
}
TABLE_BITS = {f"{embedding} / {head}": (embedding, head) for head in (8, 4) for embedding in (8, 4)}


@contextmanager
def partly_rounded(snapshot: Path, quantized: Path, off: tuple[str, ...]) -> Iterator[Any]:
    """The frozen model of `quantized`, with the parts `off` as they were in `snapshot`, where plain LoRA ended.

    With nothing off it computes what `reference.load_exact(quantized)` does, with all parts what the snapshot does.
    """
    model, names = reference.load_dequantized(quantized)
    plan, floats = frozen.read_scheme(quantized), merge.float_model(snapshot, quantized)
    with ExitStack() as stack:
        for part in off:
            stack.enter_context(error_budget.part_off(model, floats, plan, part))
            names = error_budget.rounded_without(names, plan, part)
        stack.enter_context(rounding_as(model, names, Rounding()))
        yield model


@contextmanager
def with_table_bits(snapshot: Path, quantized: Path, bits: tuple[int, int]) -> Iterator[Any]:
    """The frozen model of `quantized` with an embedding and a head of other bits, rounded to nearest.

    bits: of embedding and head; 8 with one scale a row, 4 in groups, as `finetune --embedding-bits` and `--head-bits`.
    snapshot: where plain LoRA ended, which has the tables in float.
    """
    model, names = reference.load_dequantized(quantized)
    plan, floats = frozen.read_scheme(quantized), merge.float_model(snapshot, quantized)
    for name, width in zip((plan.embedding, plan.head), bits, strict=True):
        table = floats.get_parameter(f"{name}.weight")
        group = plan.group_size if width == 4 else table.shape[1]
        rounded = numerics.fake_quantize_weight(table, width, group)
        model.get_submodule(name).weight = nn.Parameter(rounded, requires_grad=False)
    with rounding_as(model, names, Rounding()):
        yield model
