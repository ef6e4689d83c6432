"""A norm whose output is rotated, for a head that shares the rotated table of the embedding.

Let embedding and head share a table E. Rotating the hidden states by Q (`rotation`) makes the embedding's table E Q and
the head's E diag(g) Q diag(1/h), where g and h are the last norm's weight before and after. The two stay one table if
the head is given another input:

    E diag(g) Q diag(1/h) y = E Q (T y)        T = Q^T diag(g) Q diag(1/h)

T (width, width) is stored and applied in float32: 1.3 MB of SmolLM2, where a head of its own would be 28 MB in int8.

In a state dict T is stored under NORM.weight, and the norm's own weight (width,) under NORM.gain: a loader that does
not know of rotations finds a weight of another shape and stops, instead of computing something else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers.utils import logging as transformers_logging

from qat_edge.errors import RunError
from qat_edge.manifest import how_to_restore
from qat_edge.quant.module_class import wrap_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROTATION = "turn"  # the buffer's name, which is in saved files
WEIGHT, GAIN = "weight", "gain"  # in a state dict: the rotation of the output, and the norm's own weight


class RotatedNorm(nn.Module):
    """The methods that `rotate_output` puts in front of the class of a norm.

    Attributes:
        turn: The rotation, shape (width, width), float32.
    """

    turn: Tensor

    def forward(self, *args: Any, **keywords: Any) -> Tensor:
        normed: Tensor = super().forward(*args, **keywords)
        device = normed.device.type
        if not torch.is_autocast_enabled(device):
            return functional.linear(normed, self.turn)
        # Exporters apply the rotation in float32, and so does training.
        with torch.autocast(device, enabled=False):
            return functional.linear(normed.float(), self.turn)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # The rotation under the weight's name makes loaders that do not know it fail, see above.
        destination[prefix + GAIN] = destination[prefix + WEIGHT]
        destination[prefix + WEIGHT] = destination.pop(prefix + ROTATION)


class _StoredNorm(NamedTuple):
    """A rotated norm in a checkpoint: its rotation (width, width) and its own weight (width,)."""

    rotation: Tensor
    gain: Tensor


def rotate_output(norm: nn.Module, rotation: Tensor) -> None:
    """Multiply the output y (..., width) of a norm by `rotation` (width, width), in place.

    A norm that is rotated already gets this rotation instead of its former one.
    """
    if not isinstance(norm, RotatedNorm):
        norm.__class__ = wrap_class(type(norm), RotatedNorm, "Rotated")
    norm.register_buffer(ROTATION, rotation.to(next(norm.parameters()).device, torch.float32))


def output_rotations(model: nn.Module) -> dict[str, Tensor]:
    """Return the rotations of a model's rotated norms, by module name."""
    return {name: module.turn for name, module in model.named_modules() if isinstance(module, RotatedNorm)}


def stored_rotations(folder: Path) -> dict[str, Tensor]:
    """Return `output_rotations` of the model that was saved in `folder`, without loading it."""
    return {name: norm.rotation for name, norm in _stored_norms(folder).items()}


def load(read: Callable[..., Any], folder: Path) -> PreTrainedModel:
    """Load a model and rotate its norms as they were when it was saved.

    Args:
        read: A transformers class's `from_pretrained`.
        folder: A saved model, with or without rotated norms.

    Raises:
        RunError: Tensors other than the weights of rotated norms have another shape than in the model.
    """
    stored = _stored_norms(folder)
    # Without rotations a shape that does not fit is transformers' error, as usual.
    if not stored:
        model: PreTrainedModel = read(folder)
        return model
    # transformers would print a report of the mismatch; it is checked below instead.
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, loading = read(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)

    # The weights of rotated norms are expected not to fit; nothing else may be skipped.
    mismatched = {key[0] if isinstance(key, tuple) else key for key in loading["mismatched_keys"]}
    mismatched -= {f"{name}.{WEIGHT}" for name in stored}
    if mismatched:
        names = ", ".join(sorted(mismatched))
        raise RunError(f"{folder}: {names} is of another shape than the model's. {how_to_restore(folder)}")

    # transformers left these norms as they were initialized.
    for name, (rotation, gain) in stored.items():
        norm: Any = model.get_submodule(name)
        norm.weight.data.copy_(gain)
        rotate_output(norm, rotation)
    return model


def _stored_norms(folder: Path) -> dict[str, _StoredNorm]:
    """Read the rotated norms of a folder, by module name."""
    found: dict[str, _StoredNorm] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = [key.removesuffix(f".{GAIN}") for key in file.keys() if key.endswith(f".{GAIN}")]  # noqa: SIM118
            for name in names:
                found[name] = _StoredNorm(file.get_tensor(f"{name}.{WEIGHT}"), file.get_tensor(f"{name}.{GAIN}"))
    return found
