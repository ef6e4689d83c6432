"""Frozen base weights in shards (FSDP2): each of n processes holds an n-th of those of every decoder layer.

A layer's weights are gathered before its forward pass and again before its backward pass, and freed after each. All
that is trained stays whole in every process, and DistributedDataParallel averages its gradients.

FSDP2 cannot be taken off a module. So each layer is sharded as a copy of its modules, which shares their parameters
and buffers with the layer itself; the copy takes the place of the layer until the weights are whole again.

Reference: torch 2.13, distributed/fsdp/_fully_shard
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, share_comm_ctx
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.models.decoder import decoder_layers
from qat_edge.quant import fake


class ShardedBase:
    """Frozen weights of the decoder layers of a model, whole or in shards.

    Attributes:
        model: The model with its adapters.
        layers: Its decoder layers; while the weights are in shards, copies of them.
        is_sharded: Whether the weights are in shards.
    """

    def __init__(self, model: nn.Module) -> None:
        base = fake.base_of(model)
        self.model, self.is_sharded = model, False
        self._whole = decoder_layers(base)
        self.layers = cast(nn.ModuleList, base.base_model.layers)
        # What is trained in either phase, and scalars, which cannot be cut.
        self._kept = {p for p in model.parameters() if p.requires_grad or not p.dim()}
        self._require_own_weights()
        # A group of its own: the gradients of adapters are averaged at the same time.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        self._mesh = DeviceMesh.from_group(dist.new_group(), device)

    def exclude_from_ddp(self) -> None:
        """Let DistributedDataParallel keep no reference to the weights that will be in shards."""
        names = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, names)

    def shard(self) -> None:
        """Keep the share of this process of every weight, and free the rest."""
        sharded = [
            fully_shard(_sharing_copy(layer), mesh=self._mesh, reshard_after_forward=True, ignored_params=self._kept)
            for layer in self._whole
        ]
        # One layer's weights are gathered while another one computes, and their memory is used again.
        share_comm_ctx(sharded)
        for i, layer in enumerate(sharded):
            self.layers[i] = cast(nn.Module, layer)
        self.is_sharded = True
        held, total = held_bytes(self.model)
        progress.info(
            f"Base: each process holds {held / 1e6:.1f} of the {total / 1e6:.1f} MB of frozen weights; decoder layers "
            "are in shards"
        )

    def gather(self) -> None:
        """Make all weights whole in every process."""
        for i, layer in enumerate(self._whole):
            self._gather_into(layer, self.layers[i])
            self.layers[i] = layer
        self.is_sharded = False
        gc.collect()  # a sharded layer and its hooks refer to each other

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Make all weights whole inside the block, where they may be changed or replaced."""
        if not self.is_sharded:
            yield
            return
        self.gather()
        yield
        self.shard()

    def _gather_into(self, layer: nn.Module, sharded: nn.Module) -> None:
        """Give a layer the weights of its copy in shards."""
        assert isinstance(sharded, FSDPModule)
        sharded.unshard()
        whole = _frozen_copies(layer, self._kept)
        sharded.reshard()  # frees what was gathered
        for module, name, parameter in whole:
            setattr(module, name, parameter)
        layer.train(sharded.training)

    def _require_own_weights(self) -> None:
        """Refuse decoder layers that share a frozen weight.

        Raises:
            ModelError: Names the weight.
        """
        seen: set[nn.Parameter] = set()
        for i, layer in enumerate(self._whole):
            own = {name: p for name, p in layer.named_parameters() if p not in self._kept}
            shared = [name for name, parameter in own.items() if parameter in seen]
            if shared:
                raise ModelError(
                    f"--shard-base: decoder layer {i} shares {shared[0]} with another layer, and each layer is cut "
                    "into shards alone. Leave it out."
                )
            seen.update(own.values())


def held_bytes(model: nn.Module) -> tuple[int, int]:
    """Return the bytes of a model's frozen weights that this process holds, and those of all of them."""
    frozen = [p.detach() for p in model.parameters() if not p.requires_grad]
    held = [p.to_local() if isinstance(p, DTensor) else p for p in frozen]
    return sum(map(_bytes, held)), sum(map(_bytes, frozen))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sharing_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module and of those in it, with hooks of their own and the same parameters and buffers."""
    twin = copy.copy(module)
    state = vars(twin)
    # Parameters and buffers are in dictionaries, which stay shared.
    for name in state:
        if "hooks" in name:
            state[name] = copy.copy(state[name])
    state["_modules"] = {name: child and _sharing_copy(child) for name, child in module._modules.items()}
    return twin


def _frozen_copies(layer: nn.Module, kept: set[nn.Parameter]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return copies of a layer's frozen weights, with the module and the name of each."""
    copies: dict[nn.Parameter, nn.Parameter] = {}
    found = []
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in kept:
                continue
            if parameter not in copies:
                copies[parameter] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            found.append((module, name, copies[parameter]))
    return found
