"""Where `torch.autocast` pays, the dtype that an autograd function computes in under it, and passes without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Instruction sets with which torch multiplies bfloat16 matrices on a CPU, as `torch.cpu.get_capabilities` names them.
# Without them the products of 1024 x 1024 matrices took 50 times as long as in float32 (AMD EPYC, AVX2).
_BFLOAT16_CPUS = ("avx512_bw", "avx_ne_convert", "bf16")


def gains_from_bfloat16(device: str) -> bool:
    """Return whether matrix products in bfloat16 are faster than in float32 on "cpu" or on the current "cuda" device.

    GPUs before Ampere and CPUs without AVX-512 or Arm's BF16 only emulate them.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BFLOAT16_CPUS)


@contextmanager
def trial_pass(model: nn.Module) -> Iterator[torch.device]:
    """Run a model for its outputs alone inside the block: in evaluation mode, without gradients and autocast.

    Yields the device of the model, which is in the mode from before afterwards.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield device
    finally:
        model.train(training)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the autocast dtype of the device of `x` where autocast is on, else the dtype of `x`.

    Autocast does not reach inside a `torch.autograd.Function`, which has to cast its operands itself.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
