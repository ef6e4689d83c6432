"""A norm that hands its output on in other coordinates, for a head that shares the embedding's turned table.

Where embedding and head share a table E, turning the hidden states by Q (`rotation`) asks for E Q in the embedding and
for E diag(g) Q diag(1/h) in the head, g and h being the last norm's weight before and after. They stay one table if
the head is given another input:

    E diag(g) Q diag(1/h) y = E Q (T y)        T = Q^T diag(g) Q diag(1/h)

T (width, width) is kept and applied in float32: of SmolLM2 1.3 MB, where a head of its own would be 28 MB in int8.

In a state dict T stands under NORM.weight, and the norm's own weight (width,) under NORM.gain: who does not know of
this finds a weight of another shape and stops, in place of computing something else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.errors import RunError

TURN = "turn"
WEIGHT, GAIN = "weight", "gain"  # in a state dict: what the output is multiplied by, and the norm's own weight


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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + GAIN] = destination[prefix + WEIGHT]
        destination[prefix + WEIGHT] = destination.pop(prefix + TURN)


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
    return {name: turn for name, (turn, _) in _stored(folder).items()}


def load(read: Callable[..., tuple[Any, dict[str, Any]]], folder: Path) -> Any:
    """The model that `read`, a class's from_pretrained, makes of a folder, its norms turned as they were saved.

    Raises:
        RunError: weights of other shapes than the model's, beside those of turned norms.
    """
    stored = _stored(folder)
    if not stored:
        return read(folder)
    model, told = read(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    strange = {key[0] if isinstance(key, tuple) else key for key in told["mismatched_keys"]}
    strange -= {f"{name}.{WEIGHT}" for name in stored}
    if strange:
        raise RunError(f"{folder}: {', '.join(sorted(strange))} is of another shape than the model's. Make it again.")
    for name, (turn, gain) in stored.items():
        norm = model.get_submodule(name)
        norm.weight.data.copy_(gain)
        turn_output(norm, turn)
    return model


def _stored(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Turn and gain of the turned norms in a folder, by name."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key.removesuffix(f".{GAIN}") for key in file.keys() if key.endswith(f".{GAIN}")]  # noqa: SIM118
            found |= {n: (file.get_tensor(f"{n}.{WEIGHT}"), file.get_tensor(f"{n}.{GAIN}")) for n in names}
    return found
