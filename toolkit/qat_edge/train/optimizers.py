"""Optimizers of finetune: AdamW of torch, and AdamW of torchao, whose averages have 8 bits.

torchao stores averages in blocks of 256 with one scale each (https://arxiv.org/abs/2110.02861), 2 bytes for each weight
instead of 8; a tensor below 4096 elements keeps 32 bits. It compiles a step for every shape of a parameter, with a C++
compiler on a CPU and with Triton on a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from qat_edge.errors import UsageError
from qat_edge.options import ADAMW_8BIT


def make_optimizer(groups: list[dict[str, Any]], name: str, device: str) -> Optimizer:
    """Return an optimizer.

    Args:
        groups: Parameters with their learning rates and weight decay.
        name: One of `options.OPTIMIZERS`.
        device: "cpu" or "cuda".

    Raises:
        UsageError: What compiles its step is not installed.
    """
    if name != ADAMW_8BIT:
        # One kernel for all parameters, where there are kernels to launch.
        return torch.optim.AdamW(groups, fused=True if device == "cuda" else None)
    require_compiler(device)
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups)
    return optimizer


def require_compiler(device: str) -> None:
    """Refuse an optimizer in 8 bits where its step cannot be compiled.

    Raises:
        UsageError: Names what is missing.
    """
    if device == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "Triton. Install it with `pip install triton`"
    else:
        from torch._inductor import cpp_builder
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            cpp_builder.get_cpp_compiler()
            missing = ""
        except InvalidCxxCompiler:
            missing = "a C++ compiler. Install one, such as g++"
    if missing:
        raise UsageError(
            f"--optimizer {ADAMW_8BIT}: torchao compiles its step for this device, and there is not {missing}; or "
            "leave the flag out."
        )


def set_learning_rate(group: dict[str, Any], rate: float | Tensor) -> None:
    """Set the learning rate of a group of parameters."""
    # torchao's optimizer has it as a tensor, so that its compiled step need not be compiled again.
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
