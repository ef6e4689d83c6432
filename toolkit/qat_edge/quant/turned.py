"""A norm that hands its output on in other coordinates, for a head that shares the embedding's turned table.

Where embedding and head share a table E, turning the hidden states by Q (`rotation`) asks for E Q in the embedding and
for E diag(g) Q diag(1/h) in the head, g and h being the last norm's weight before and after. They stay one table if
the head is given another input:

    E diag(g) Q diag(1/h) y = E Q (T y)        T = Q^T diag(g) Q diag(1/h)

T (width, width) is kept and applied in float32: of SmolLM2 1.3 MB, where a head of its own would be 28 MB in int8. In a
state dict it is NORM.turn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

TURN = "turn"


class TurnedNorm(nn.Module):
    """What `turn_output` adds to the class of a norm. turn: (width, width), float32."""

    turn: Tensor

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        normed: Tensor = super().forward(*args, **keywords)
        device = normed.device.type
        if not torch.is_autocast_enabled(device):
            return functional.linear(normed, self.turn)
        with torch.autocast(device, enabled=False):
            return functional.linear(normed.float(), self.turn)


def turn_output(norm: nn.Module, turn: Tensor) -> None:
    """Let a norm's output y (..., width) be turn y from now on. In place; a norm that was turned gets this turn."""
    theirs = type(norm)
    if not isinstance(norm, TurnedNorm):
        norm.__class__ = type(f"Turned{theirs.__name__}", (TurnedNorm, theirs), {})
    norm.register_buffer(TURN, turn.to(next(norm.parameters()).device, torch.float32))


def turns_of(model: nn.Module) -> dict[str, Tensor]:
    """What each turned norm multiplies its output by, by its name."""
    return {name: module.turn for name, module in model.named_modules() if isinstance(module, TurnedNorm)}


def stored_turns(folder: Path) -> dict[str, Tensor]:
    """`turns_of` the model that was saved in `folder`."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key.removesuffix(f".{TURN}") for key in file.keys() if key.endswith(f".{TURN}")]  # noqa: SIM118
            found |= {name: file.get_tensor(f"{name}.{TURN}") for name in names}
    return found
