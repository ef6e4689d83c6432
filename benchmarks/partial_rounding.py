"""Frozen models with part of their rounding switched off, or with an embedding and head of other bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qat_edge.diagnose import error_budget
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding
from qat_edge.evaluate import reference
from qat_edge.models import merge
from qat_edge.quant import frozen, numerics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Title -> parts of the rounding that are off.
SWITCHED_OFF: Mapping[str, tuple[str, ...]] = {
    "all rounding on": (),
    "weights off": ("weights",),
    "activations off": ("activations",),
    "embedding off": ("embedding",),
    "head off": ("head",),
    "all off": error_budget.PARTS,
}
# Title -> bits of embedding and head.
TABLE_BITS = {f"{embedding} / {head}": (embedding, head) for head in (8, 4) for embedding in (8, 4)}


@contextmanager
def partly_rounded(snapshot: Path, quantized: Path, off: tuple[str, ...]) -> Iterator[PreTrainedModel]:
    """Yield a frozen model in which some parts are not rounded.

    With nothing off it computes exactly what `reference.load_exact(quantized)` does, with all parts off what the
    snapshot does.

    Args:
        snapshot: adapter folder saved at the start of QAT; parts that are off have its float values.
        quantized: frozen checkpoint.
        off: names out of `error_budget.PARTS`.
    """
    model, names = reference.load_dequantized(quantized)
    scheme, floats = frozen.read_scheme(quantized), merge.float_model(snapshot, quantized)
    with ExitStack() as stack:
        for part in off:
            stack.enter_context(error_budget.part_unquantized(model, floats, scheme, part))
            names = error_budget.inputs_rounded_without(names, scheme, part)
        stack.enter_context(emulate_rounding(model, names, Rounding()))
        yield model


@contextmanager
def with_table_bits(snapshot: Path, quantized: Path, bits: tuple[int, int]) -> Iterator[PreTrainedModel]:
    """Yield a frozen model whose embedding and head are rounded to nearest with other bits.

    Args:
        snapshot: adapter folder saved at the start of QAT, which has both tables in float.
        quantized: frozen checkpoint.
        bits: of embedding and head: 8 has one scale a row, 4 one a group, as `finetune --embedding-bits` has.
    """
    model, names = reference.load_dequantized(quantized)
    scheme, floats = frozen.read_scheme(quantized), merge.float_model(snapshot, quantized)
    for name, width in zip((scheme.embedding, scheme.head), bits, strict=True):
        table = floats.get_parameter(f"{name}.weight")  # (vocabulary, hidden)
        group = scheme.group_size if width == 4 else table.shape[1]
        rounded = numerics.fake_quantize_weight(table, width, group)
        model.get_submodule(name).weight = nn.Parameter(rounded, requires_grad=False)
    with emulate_rounding(model, names, Rounding()):
        yield model
