"""Post-training quantization of a float model: codes in groups, of 4 or 2 bits, without training.

    rtn                 round to nearest: each weight to the nearest code, under scales of the groups' largest weights
                        (at 2 bits, where those are poor, under the best of a few multiples of them)
    hqq                 the same, under scales of least squared weight error (torchao's scale-only HQQ [1])
    gptq                columns one after another, each rounding error compensated by the columns after it [2]
    gptaq               the same towards the float model's outputs, which compensates errors of earlier layers too [3]
    coordinate-descent  codes and scales of that, each set to its best value while the others stay, over and over [4]
    awq                 columns whose inputs are large are scaled up before they are rounded, their inputs down [5]

All end in the layout of `numerics`: symmetric codes under bfloat16 group scales. GPTQ and AWQ are our own because
torchao 0.18's do not produce that layout: its GPTQ needs CUDA and chooses zero points, its AWQ keeps the factors as a
multiplication at run time, which no exporter here has an operator for.

gptq, gptaq and coordinate-descent choose the codes of a 4-bit head, too (`table_codes`).

int8 weights (embedding, head, layers that no group size divides or that `--bits` names) are rounded to nearest under
every method. Those inside the blocks have been moved by gptaq and coordinate-descent, to compensate for earlier layers.

[1] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_primitives.py
[2] https://arxiv.org/abs/2210.17323
[3] https://arxiv.org/abs/2504.02692
[4] https://arxiv.org/abs/2309.01885
[5] https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from qat_edge import progress
from qat_edge.errors import UsageError
from qat_edge.lazy import load
from qat_edge.quant import numerics
from qat_edge.quant.numerics import Codes
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS
from qat_edge.quant.scheme import Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.quant.fake import MergedWeights
    from qat_edge.quant.ptq.blockwise import Block, Calibration

# Imported when they are used: a method does not need the files of the others.
BLOCK_METHODS = {
    "gptq": "qat_edge.quant.ptq.gptq:GPTQ",
    "gptaq": "qat_edge.quant.ptq.gptaq:GPTAQ",
    "coordinate-descent": "qat_edge.quant.ptq.coordinate_descent:CoordinateDescent",
    "awq": "qat_edge.quant.ptq.awq:AWQ",
}
SCALE_METHODS = {
    "rtn": "qat_edge.quant.numerics:choose_scales",
    "hqq": "qat_edge.quant.ptq.hqq:hqq_scales",
}


class BlockMethod(Protocol):
    """A method that quantizes one block after another."""

    def quantize_block(self, block: Block) -> dict[str, Tensor]:
        """Change the block's weights in place and return scales by module name."""

    def summary(self) -> list[str]:
        """Return lines for people about all blocks."""


class _Layers(Protocol):
    """A model, or a view of one, that finds modules by name."""

    def get_submodule(self, name: str, /) -> nn.Module:
        """Return the module of this name."""


def apply(
    model: PreTrainedModel | MergedWeights, scheme: Scheme, method: str, calibration: Sequence[Calibration]
) -> dict[str, Tensor]:
    """Quantize a float model by `method`: change its weights, in place, so that rounding gives the method's codes.

    Args:
        model: Its `get_submodule(name)` has a `.weight` (out, in) in float32 for each name of the scheme. A view of
            merged weights will do for methods that are not `CALIBRATED`.
        scheme: Bits and group size by module name.
        method: One of `PTQ_METHODS`.
        calibration: Batches of "input_ids" and "attention_mask" (rows, length), padded on the right; only `CALIBRATED`
            methods look at them.

    Returns:
        Scales of every linear layer, and of tables whose codes the method chose, by module name: (out, in // group),
        float32, bfloat16-representable.
        `numerics.quantize(weight, scales, codebook)` gives the method's codes.

    Raises:
        UsageError: The method is unknown.
        ModelError: The model has no repeated blocks.
        DataError: There is no calibration data, or too little to determine the weights.
    """
    if method not in PTQ_METHODS:
        raise UsageError(f"Quantization method '{method}' is not known. Known: {', '.join(PTQ_METHODS)}.")
    if method not in CALIBRATED:
        return _scales_without_data(model, scheme, load(SCALE_METHODS[method]))

    # These methods run the model, so a view of its weights would not do.
    scales = _quantize_with_data(cast("PreTrainedModel", model), scheme, method, calibration)
    outside = [name for name, spec in scheme.linears.items() if spec.has_groups and name not in scales]
    if outside:
        progress.warn(
            f"Layers outside the blocks that are rounded to nearest: {len(outside)} ({', '.join(outside[:5])})"
        )
    # int8 layers inside the blocks get scales of the weights that the method left there.
    return _scales_without_data(model, scheme, numerics.choose_scales) | scales


def _quantize_with_data(
    model: PreTrainedModel, scheme: Scheme, method: str, calibration: Sequence[Calibration]
) -> dict[str, Tensor]:
    """Run a calibrated method on all blocks in evaluation mode; returns scales by module name."""
    from qat_edge.quant.ptq.blockwise import quantize_blocks
    from qat_edge.quant.ptq.gptq import GPTQ
    from qat_edge.quant.ptq.table_codes import quantize_tables

    block_method: BlockMethod = load(BLOCK_METHODS[method])()
    # Dropout would change the inputs that the method measures.
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            tables = (
                partial(quantize_tables, model, scheme, calibration, block_method.choose_codes)
                if isinstance(block_method, GPTQ)
                else dict
            )
            scales = quantize_blocks(
                model, scheme, calibration, block_method.quantize_block, PTQ_METHODS[method], tables
            )
    finally:
        model.train(training)

    for line in block_method.summary():
        progress.info(line)
    return scales


def _scales_without_data(
    model: _Layers, scheme: Scheme, choose: Callable[[Tensor, Codes, int], Tensor]
) -> dict[str, Tensor]:
    """Return the scales of every linear layer from its weight alone: groups by `choose`, int8 by its largest."""
    scales: dict[str, Tensor] = {}
    for name, spec in scheme.linears.items():
        module: Any = model.get_submodule(name)
        chosen = choose if spec.has_groups else numerics.choose_scales
        scales[name] = chosen(module.weight.detach().float(), spec.codebook, spec.group_size)
    return scales
