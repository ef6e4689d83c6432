"""Frozen model -> CoreML delegate, for Apple's devices.

The whole program becomes one package with int4 and int8 weights as they were frozen, and the cache as its state. It
computes in float32: scales that are bfloat16 numbers stay what they are, and float16 has no room for masked scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import coremltools
import torch
from executorch.backends.apple.coreml.compiler import CoreMLBackend
from executorch.backends.apple.coreml.partition import CoreMLPartitioner
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge import progress
from qat_edge_exporters.executorch.graph import affine, lowering, tracing
from qat_edge_exporters.executorch.graph.portable_attention import PortableCache, rows_of


class StateCache(PortableCache):
    """Attention in ATen's operators over keys and values (L, heads, D): CoreML writes by the first dimension only."""

    def _answer(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        kept: Sequence[Tensor],
        scaling: float | None,
        extras: dict[str, Any],
    ) -> Tensor:
        for cache, added in zip(kept, new[1:], strict=True):
            torch.ops.aten.index_put_(cache, [self.positions], rows_of(added).transpose(0, 1))
        keys, values = kept
        return self._attend(new[0], keys.permute(1, 2, 0), values.transpose(0, 1), scaling, extras)

    def _make_buffers(self, layer: int, key: Tensor, value: Tensor) -> None:
        for name, new in (("keys", key), ("values", value)):
            empty = torch.zeros(self.length, new.shape[1], new.shape[3])
            self.register_buffer(f"{name}_{layer}", empty, persistent=False)
        self.layers.add(layer)


class CoreMLDecoder(affine.PlainDecoder):
    """A decoder whose cache is written by positions alone."""

    def start(self, input_pos: Tensor, length: Any) -> int:
        """Not read out of its tensor: that would be an operator outside of CoreML."""
        return 0


def prepare(model: Any) -> dict[str, str]:
    """Make a frozen `model` exportable in place.

    Returns names of rounded weights: the buffer's -> the module's.
    """
    affine.untie(model)
    names = {}
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        if isinstance(module, nn.Embedding):
            table = affine.AffineEmbedding(weight)
            table.register_forward_hook(tracing.scaled_rows(module))
            model.set_submodule(name, table)
        else:
            model.set_submodule(name, affine.AffineLinear(weight, module.bias, rounds=False))
        names[f"model.{name}.codes"] = name
    return names


def trace(model: Any, context_length: int) -> ExportedProgram:
    """The exported program of what `prepare` made.

    Raises:
        ExportError: attention that cannot be put through the cache, or code that cannot be traced.
    """
    return tracing.trace(CoreMLDecoder(model, StateCache(context_length)))


def lower(program: ExportedProgram, methods: dict[str, Any]) -> EdgeProgramManager:
    """`program` as one CoreML delegate, and `methods` as its constant methods.

    Raises:
        ExportError: ExecuTorch's or CoreML's compiler failed.
    """
    progress.info(f"lowering to CoreML with coremltools {coremltools.__version__}")
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=coremltools.precision.FLOAT32, minimum_deployment_target=coremltools.target.iOS18
    )
    methods = methods | {"use_sdpa_with_kv_cache": False}
    return lowering.compile_for("CoreML", program, [CoreMLPartitioner(compile_specs=specs)], methods)
