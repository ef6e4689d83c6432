"""GPTAQ (https://arxiv.org/abs/2504.02692): GPTQ towards what the float model computes, not the rounded one.

A layer deep in the model is given inputs X that rounding before it has changed from Xf. GPTQ makes the rounded
weight reproduce W X, errors and all; here it is to reproduce W Xf. Both sums of squares differ by a constant from one
around the least-squares weight

    W* = W + (W Xf - W X) X^T (X X^T + damping)^-1        || W Xf - Q X ||^2 = || (W* - Q) X ||^2 + constant

so it is GPTQ on W*. The layer whose output ends the block stands in for all that came before: its target is what is
missing from the block's output, so that an error in the residual stream is made up for as well. Layers are taken in the
order they run, each with inputs that went through those just rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qat_edge.quant.ptq.blockwise import Batch, Block, gram, summing, tokens_of
from qat_edge.quant.ptq.gptq import Compensator, inverse_factor

# Of the Hessian's mean diagonal, when the target is solved for. Perplexity of SmolLM2 on held-out text after 12288
# tokens of calibration: 16.07 with GPTQ's 0.01, 15.94 with 0.1 (float 15.23).
TARGET_DAMPING = 0.1


@dataclass(frozen=True)
class Pass:
    """One batch through a block: inputs of some linear layers by name, and the hidden states after it."""

    inputs: dict[str, Tensor]
    output: Tensor


@dataclass
class Aligner(Compensator):
    """GPTAQ on one block after another."""

    name: ClassVar[str] = "GPTAQ"

    def treat(self, block: Block) -> dict[str, Tensor]:
        """Compensate every weight of the block in place; scales of the int4 ones by name.

        An int8 weight is left at what is aimed at: its own rounding is small, but not what lies before it.

        Raises:
            DataError: the inputs say too little about the weights.
        """
        groups = block.shared_inputs()
        ending = bool(groups) and len(groups[-1]) == 1 and block.ends_with(groups[-1][0])
        first = [names[0] for names in groups[: len(groups) - ending]]
        floats = [_pass(block, batch, first, batch.unrounded) for batch in block.batches]
        scales: dict[str, Tensor] = {}
        for names in groups:
            last = ending and names is groups[-1]
            relative = self.weigh(block, names[0])
            with block.rounded(scales, finished=True):
                hessian, missing = _moments(block, names[0], floats, last, relative)
            for float_pass in floats:
                float_pass.inputs.pop(names[0], None)
            with torch.autocast(hessian.device.type, enabled=False):
                factor = inverse_factor(hessian, names[0])
                strict = inverse_factor(hessian, names[0], TARGET_DAMPING)
                weight = block.weights(names)
                target = least_squares(weight, missing if last else weight @ missing, strict)
                rows = target.split([block.linears[name].weight.shape[0] for name in names])
                aims = dict(zip(names, rows, strict=True))
                narrow = [name for name in names if block.specs[name].bits == 4]
                for name in names:
                    if name not in narrow:
                        block.linears[name].weight.data.copy_(aims[name])
                if narrow:
                    scales |= self.settle(block, narrow, torch.cat([aims[n] for n in narrow]), hessian, factor)
            block.replay.finish(names)
        for batch, float_pass in zip(block.batches, floats, strict=True):
            batch.unrounded = float_pass.output
        return scales

    def weigh(self, block: Block, name: str) -> bool:
        """Whether an error in the layer's output counts over the size of the hidden states; else all count alike."""
        return False


def least_squares(weight: Tensor, missing: Tensor, factor: Tensor) -> Tensor:
    """The weight (out, in) that also gives what is missing: sum of missing output times x^T (out, in), over the inputs.

    factor: upper Cholesky factor of the damped inverse of sum x x^T (in, in).
    """
    return weight + (missing @ factor.T) @ factor


def _pass(block: Block, batch: Batch, names: list[str], hidden: Tensor | None = None) -> Pass:
    inputs: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        if name in names:
            inputs[name] = x

    return Pass(inputs, block.observe(batch, see, hidden))


def _moments(block: Block, name: str, floats: list[Pass], last: bool, relative: bool) -> tuple[Tensor, Tensor]:
    """Sum of x x^T (in, in), and of (xf - x) x^T (in, in) or, of the last layer, of what is missing from the
    block's output, times x^T (out, in). x: inputs rounded as in deployment, xf: the float model's. float32.

    relative: each token counts over the mean square of its hidden states, as the norms that read them see it.
    """
    hessian = missing = torch.zeros(())
    for batch, float_pass in zip(block.batches, floats, strict=True):
        outputs = tokens_of(float_pass.output, batch.keep)
        if last:
            found = _pass(block, batch, [name])
            rows = tokens_of(found.inputs[name], batch.keep)
            lacking = outputs - tokens_of(found.output, batch.keep)
        else:
            rows = tokens_of(block.input_of(batch, name), batch.keep)
            lacking = tokens_of(float_pass.inputs[name], batch.keep) - rows
        if relative:
            size = outputs.square().mean(dim=1, keepdim=True).sqrt()
            rows, lacking = rows / size, lacking / size
        hessian = hessian.to(rows.device) + gram(rows)
        with summing(rows.device):
            missing = missing.to(rows.device) + lacking.T @ rows
    return hessian, missing
