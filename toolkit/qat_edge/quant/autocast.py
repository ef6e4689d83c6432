"""The dtype that a custom autograd function computes in under `torch.autocast`."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the autocast dtype of the device of `x` where autocast is on, else the dtype of `x`.

    Autocast does not reach inside a `torch.autograd.Function`, which has to cast its operands itself.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
