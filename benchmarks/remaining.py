"""What the remaining loss is made of: a frozen checkpoint with parts of its rounding switched off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from qat_edge import adapters
from qat_edge.measure import budget, reference
from qat_edge.measure.rounding import Rounding, rounding_as
from qat_edge.quant import frozen

SWITCHED_OFF: Mapping[str, tuple[str, ...]] = {
    "all rounding on": (),
    "weights off": ("weights",),
    "activations off": ("activations",),
    "embedding off": ("embedding",),
    "head off": ("head",),
    "all off": budget.PARTS,
}


@contextmanager
def partly_rounded(snapshot: Path, quantized: Path, off: tuple[str, ...], say: Callable[[str], None]) -> Iterator[Any]:
    """The frozen model of `quantized`, with the parts `off` as they were in `snapshot`, where plain LoRA ended.

    With nothing off it computes what `reference.load_exact(quantized)` does, with all parts what the snapshot does.
    """
    model, names = reference.load_dequantized(quantized)
    plan, floats = frozen.read_scheme(quantized), adapters.float_model(snapshot, quantized, say)
    with ExitStack() as stack:
        for part in off:
            stack.enter_context(budget.part_off(model, floats, plan, part))
            names = budget.rounded_without(names, plan, part)
        stack.enter_context(rounding_as(model, names, Rounding()))
        yield model
