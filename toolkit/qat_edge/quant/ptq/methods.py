"""Post-training quantization of a float model: how int4 codes are found without training them.

    rtn   each weight to the nearest code, under the scales of the groups' largest weights
    hqq   the same, under scales of least squared weight error (torchao's scale-only HQQ [1])
    gptq  columns one after another, each rounding error made up for by the columns to come [2]
    gptaq the same towards the float model's outputs, so that errors of earlier layers are made up for too [3]
    cd    the codes and scales of that, each set to what is best while the others stay, over and over [4]
    awq   columns whose inputs are large are scaled up before they are rounded, their inputs down [5]

All end in the layout of `numerics`: symmetric codes under bfloat16 group scales. GPTQ and AWQ are our own because
torchao 0.18's are not of that layout: its GPTQ needs CUDA and chooses zero points, its AWQ keeps the factors as a
multiplication at run time, which no exporter here has an operator for.

int8 weights (embedding, head, layers that no group size divides or that `--bits` names) are rounded to nearest under
every method; those inside the blocks have been moved by gptaq and cd to make up for what lies before them.

[1] https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/quant_primitives.py
[2] https://arxiv.org/abs/2210.17323
[3] https://arxiv.org/abs/2504.02692
[4] https://arxiv.org/abs/2309.01885
[5] https://arxiv.org/abs/2306.00978
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq

from qat_edge import progress
from qat_edge.errors import UsageError
from qat_edge.quant import numerics
from qat_edge.quant.ptq.awq import Balancer
from qat_edge.quant.ptq.blockwise import Calibration, walk
from qat_edge.quant.ptq.coordinate_descent import Descender
from qat_edge.quant.ptq.gptaq import Aligner
from qat_edge.quant.ptq.gptq import Compensator
from qat_edge.quant.scheme import Scheme
from qat_edge.run import PTQ_METHODS

COMPENSATED = ("gptq", "gptaq", "coordinate-descent")  # weights make up for each other's rounding errors
CALIBRATED = (*COMPENSATED, "awq")  # methods that look at data, and change weights beside choosing scales
Scales = Callable[[Tensor, int, int], Tensor]


def apply(model: Any, scheme: Scheme, method: str, calibration: Sequence[Calibration]) -> dict[str, Tensor]:
    """Make a float model's weights, in place, those that rounding turns into the method's codes.

    model: its `get_submodule(name)` has a `.weight` (out, in) in float32 for each name of the scheme.
    calibration: batches of "input_ids" and "attention_mask" (rows, length), padded on the right; only
    `CALIBRATED` methods look at them.

    Returns the scales of every linear layer by module name: (out, in // group), float32, bfloat16-representable;
    `numerics.quantize(weight, scales, bits)` gives the method's codes.

    Raises:
        UsageError: an unknown method.
        ModelError: a model in which no repeated blocks are found.
        DataError: no calibration data, or too little to say which weights matter.
    """
    if method not in PTQ_METHODS:
        raise UsageError(f"Quantization method '{method}' is not known. Known: {', '.join(PTQ_METHODS)}.")
    if method not in CALIBRATED:
        return _without_data(model, scheme, hqq_scales if method == "hqq" else numerics.choose_scales)
    treatment = {"gptq": Compensator, "gptaq": Aligner, "coordinate-descent": Descender, "awq": Balancer}[method]()
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scales = walk(model, scheme, calibration, treatment.treat, method.upper())
    finally:
        model.train(training)
    for line in treatment.summary():
        progress.info(line)
    outside = [n for n, spec in scheme.linears.items() if spec.bits == 4 and n not in scales]
    if outside:
        progress.info(f"{len(outside)} layers outside the blocks are rounded to nearest: {', '.join(outside[:5])}")
    return _without_data(model, scheme, numerics.choose_scales) | scales


def hqq_scales(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Scales (out, in // group) of least squared weight error, rounded to bfloat16 before any code is chosen.

    torchao's function also chooses codes, under scales that no runtime stores; they are not used.
    """
    low, high = numerics.code_range(bits)
    scales = _choose_qparams_and_quantize_scale_only_hqq(weight, [1, group_size], low, high)[1]
    return numerics.representable(scales.float())


def _without_data(model: Any, scheme: Scheme, choose: Scales) -> dict[str, Tensor]:
    """Scales of every linear layer, each looked at alone: int4 by `choose`, int8 by the largest weights."""
    return {
        name: (choose if spec.bits == 4 else numerics.choose_scales)(
            model.get_submodule(name).weight.detach().float(), spec.bits, spec.group_size
        )
        for name, spec in scheme.linears.items()
    }
