"""Frozen model -> CoreML delegate, for Apple's devices.

The whole program becomes one package with the int4 and int8 weights as they were frozen, and the cache as its state. It
computes in float32: scales, which are bfloat16 numbers, stay exact, and float16 has no room for masked scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import coremltools
import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import ExportedProgram

from qat_edge import progress
from qat_edge_exporters.executorch.graph import affine, lowering, tracing
from qat_edge_exporters.executorch.graph.attention import Position, QueryKeyValue
from qat_edge_exporters.executorch.graph.portable_attention import PortableCache, rows_of
from qat_edge_exporters.executorch.graph.quantized_modules import frozen_layers, scaled_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StateCache(PortableCache):
    """Portable cache of keys and values (L, heads, D): CoreML writes into the first dimension only."""

    def _update_and_attend(
        self, new: QueryKeyValue, buffers: Sequence[Tensor], scaling: float | None, extras: dict[str, Any]
    ) -> Tensor:
        for buffer, added in zip(buffers, (new.key, new.value), strict=True):
            torch.ops.aten.index_put_(buffer, [self.positions], rows_of(added).transpose(0, 1))
        keys, values = buffers
        # (L, heads, D) -> keys (heads, D, L), values (heads, L, D)
        return self._attend(new.query, keys.permute(1, 2, 0), values.transpose(0, 1), scaling, extras)

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        for name, new in (("keys", key), ("values", value)):
            empty = torch.zeros(self.length, new.shape[1], new.shape[3])
            self.register_buffer(f"{name}_{layer}", empty, persistent=False)
        self.layers.add(layer)


class CoreMLDecoder(affine.PlainDecoder):
    """Decoder whose cache is written by positions alone."""

    def start(self, input_pos: Tensor, length: Position) -> int:
        """Return 0 without reading the tensor, which would be an operator outside of CoreML."""
        return 0


def prepare(model: PreTrainedModel) -> dict[str, str]:
    """Make a frozen `model` exportable in place.

    Returns:
        Names of the frozen weights: the buffer's -> the module's.

    Raises:
        ExportError: an embedding does more than look up rows.
    """
    affine.untie(model)  # CoreML stores equal tables once again

    # Inputs are not rounded: CoreML has no operator for that.
    names = {}
    for layer in frozen_layers(model):
        if isinstance(layer.module, nn.Embedding):
            table = affine.AffineEmbedding(layer.weight)
            table.register_forward_hook(scaled_rows(layer.module))
            model.set_submodule(layer.name, table)
        else:
            model.set_submodule(layer.name, affine.AffineLinear(layer.weight, layer.module.bias, rounds=False))
        names[f"model.{layer.name}.codes"] = layer.name
    return names


def trace(model: PreTrainedModel, context_length: int) -> ExportedProgram:
    """Trace a model that `prepare` changed.

    Raises:
        ExportError: attention that the cache cannot replace, or code that cannot be traced.
    """
    return tracing.trace(CoreMLDecoder(model, StateCache(context_length)))


def lower(program: ExportedProgram, methods: Mapping[str, Any]) -> EdgeProgramManager:
    """Lower `program` into one CoreML delegate, and add `methods` as constant methods.

    Raises:
        ExportError: ExecuTorch's or CoreML's compiler failed.
    """
    progress.info(f"lowering to CoreML with coremltools {coremltools.__version__}")
    # iOS 18 is the first version with int4 weights by group, and with state.
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=coremltools.precision.FLOAT32, minimum_deployment_target=coremltools.target.iOS18
    )
    # The whole program is one delegate, attention included.
    methods = {**methods, "use_sdpa_with_kv_cache": False}
    return lowering.compile_for("CoreML", program, [CoreMLPartitioner(compile_specs=specs)], methods)
