"""LoRA adapters that stay unmerged next to a checkpoint's weights: its folder `adapter/`, as peft saves it.

The model computes W x + s B (A x), with W rounded or in float, and A, B and their input in float.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from qat_edge import readers
from qat_edge.errors import ExportError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every tensor that peft saves
# Settings of peft with which a layer computes something other than W x + s B (A x).
OTHER_FORMS = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias")


@dataclass(frozen=True)
class Adapter:
    """Adapter of one layer, in float32.

    Attributes:
        down: A, shape (rank, in).
        up: s B, shape (out, rank).
    """

    down: Tensor
    up: Tensor

    @property
    def size_bytes(self) -> int:
        """Size of both matrices."""
        return self.down.nbytes + self.up.nbytes


def read_adapters(checkpoint: Path) -> dict[str, Adapter]:
    """Read the adapters by module name; empty where the folder has none.

    Raises:
        ExportError: adapters that are damaged, or that do not compute W x + s B (A x).
    """
    folder = checkpoint / ADAPTER
    if not folder.is_dir():
        return {}
    settings = readers.read_object(folder / CONFIG, ExportError)
    scaling = _scaling(folder, settings)

    # Every tensor must belong to a pair of matrices A and B.
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = readers.shorten(str(error), 200)
        raise ExportError(
            f"{path}: cannot be read ({reason}). Write the checkpoint's adapter again, or remove the folder to export "
            "the base alone."
        ) from error
    modules = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    found = {}
    for module in sorted(modules):
        down = tensors.pop(f"{PREFIX}{module}.lora_A.weight", None)
        up = tensors.pop(f"{PREFIX}{module}.lora_B.weight", None)
        if down is None or up is None:
            raise ExportError(f"{folder}: {module or 'a tensor'} has no pair of matrices A and B of a linear layer.")
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise ExportError(
                f"{folder}: the adapter of {module} has numbers that are not finite. Train it again, with a lower "
                "--learning-rate if the loss was not finite."
            )
        found[module] = Adapter(down.float(), up.float() * scaling)
    if tensors:
        raise ExportError(
            f"{folder}: {next(iter(tensors))} does not belong to an adapter that can be exported unmerged."
        )
    return found


def copy_adapters(trained: Path, checkpoint: Path) -> None:
    """Copy the adapters of a folder that peft wrote into a checkpoint, next to whose weights they stay unmerged."""
    (checkpoint / ADAPTER).mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(trained / name, checkpoint / ADAPTER / name)


def add_adapters(model: PreTrainedModel, checkpoint: Path) -> None:
    """Make the layers of a model add the adapters of its checkpoint to their outputs; without adapters, do nothing.

    Layers and their names stay as they are: hooks compute the adapters, which get the input before it is rounded.

    Raises:
        ExportError: adapters that are damaged, or that belong to no linear layer of the model.
    """
    adapters = read_adapters(checkpoint)
    modules = dict(model.named_modules()) if adapters else {}
    for name, adapter in adapters.items():
        layer = modules.get(name)
        shape = (adapter.up.shape[0], adapter.down.shape[1])
        if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != shape:
            raise ExportError(
                f"{checkpoint / ADAPTER}: the model has no linear layer {name} of shape {list(shape)}, so the adapter "
                "is of another model. Freeze again."
            )
        hooks = _AdapterHooks(adapter)
        layer.register_forward_pre_hook(hooks.keep_input, prepend=True)
        layer.register_forward_hook(hooks.add)


class _AdapterHooks:
    """Forward hooks of one layer: the first keeps the input as it comes, the second adds the adapter's product."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.input: Tensor | None = None

    def keep_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the input, which a later hook may round."""
        self.input = args[0]

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return the layer's output with s B (A x) added."""
        assert self.input is not None
        product = functional.linear(functional.linear(self.input, self.adapter.down), self.adapter.up)
        self.input = None
        return output + product


def _scaling(folder: Path, settings: dict[str, Any]) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rank-stabilized scaling (https://arxiv.org/abs/2312.03732)."""
    other = [name for name in OTHER_FORMS if settings.get(name)]
    if settings.get("peft_type") != "LORA" or other:
        raise ExportError(
            f"{folder}: adapters with {', '.join(other) or settings.get('peft_type')} cannot be exported unmerged; "
            "merge them first."
        )
    rank = settings["r"]
    return float(settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank))
