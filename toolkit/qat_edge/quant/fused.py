"""Choose between the kernels of `triton_kernels` and torch's own operations for fake quantization.

On a GPU with Triton, the kernels compute; everywhere else torch does. Before their first use, the kernels round a few
small matrices on that GPU, and their results are compared with those of `numerics` on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from qat_edge import progress
from qat_edge.quant import numerics
from qat_edge.quant.codebook import PER_CHANNEL, SEQ, Codebook, codebook_of

RANK, ROWS = 5, 37  # of the compared matrices: no multiples of what a kernel works on at once
SCALING = 1.7
_is_on = ContextVar("kernels", default=True)


def kernels_for(weight: Tensor, scales: Tensor | None, codebook: Codebook) -> ModuleType | None:
    """Return the kernels where they can round a weight; None where torch has to.

    Args:
        weight: W (out, in), dense.
        scales: Scales of its own; None for those of `numerics.choose_scales`.
        codebook: Codes of the weight.
    """
    # At 2 bits, scales without a PTQ initialization are searched for.
    if scales is None and codebook.searches_scales:
        return None
    return kernels_on(weight.device) if weight.dtype != torch.float64 else None


def kernels_on(device: torch.device) -> ModuleType | None:
    """Return the kernels for tensors of a device; None where torch computes."""
    return _checked_kernels(device) if device.type == "cuda" and _is_on.get() else None


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let torch compute everywhere inside the block, to compare."""
    token = _is_on.set(False)
    try:
        yield
    finally:
        _is_on.reset(token)


@functools.cache
def _checked_kernels(device: torch.device) -> ModuleType | None:
    """Return the kernels if their results on a GPU are right; else warn."""
    try:
        from qat_edge.quant import triton_kernels
    except ImportError:
        progress.info("Triton is not installed, so torch's own operations round: the same numbers in more time")
        return None
    try:
        found = fault(triton_kernels, device)
    except Exception as error:  # of a compiler, a driver or an assembler
        found = f"they ended with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if found is None:
        return triton_kernels
    progress.warn(
        f"The Triton kernels are not used on {device}: {found}. torch's own operations round instead, which takes "
        "longer. Please report it."
    )
    return None


def fault(kernels: ModuleType, device: torch.device) -> str | None:
    """Round small matrices on a device and on the CPU; return what differs, None if all bits are equal."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = random(ROWS, 100)
    for dtype in (torch.float32, torch.bfloat16):
        expected = numerics.fake_quantize_activation(x).to(dtype)
        if not torch.equal(kernels.round_activation(x.to(device), dtype).cpu(), expected):
            return "an input is rounded differently from the CPU"

    for codebook, group_size in ((codebook_of(4), 32), (codebook_of(PER_CHANNEL), 96), (codebook_of(2, SEQ), 32)):
        weight, lora_a, lora_b = random(ROWS, 96).bfloat16(), random(RANK, 96), random(ROWS, RANK)
        merged = numerics.merge(weight, lora_a, lora_b, SCALING)
        scales = numerics.largest_scales(merged, codebook, group_size) * 0.8
        expected = numerics.fake_quantize_weight(merged, codebook, group_size, numerics.representable(scales))
        tensors = [tensor.to(device) for tensor in (weight, lora_a, lora_b, scales)]
        rounded = kernels.round_merged(*tensors, SCALING, codebook, group_size, torch.float32)
        if not torch.equal(rounded.cpu(), expected):
            return f"a weight in {codebook.bits} bits is rounded differently from the CPU"
    return None
