"""Frozen model -> Vulkan delegate, for Android's GPUs.

Vulkan has one operator for what is trained: int8 inputs per token times int4 weights by group. It has none for int8
weights, so layers and heads of those go to XNNPACK, on the CPU, as does the embedding's own operator. Everything else
of a decoder, its cache included, becomes one delegate. A float32 program stays float32.
"""

from __future__ import annotations

from typing import Any

import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge_exporters.executorch.graph import affine, lowering, tracing
from qat_edge_exporters.executorch.graph.attention import KeyValueCache

ROWS = 4  # a matrix has a multiple of as many, or Vulkan pads it
# Modules that Vulkan must leave alone: it has no operator for int8 weights, and would repack an int4 embedding.
ON_CPU = (tracing.QuantizedLinear.__name__, tracing.QuantizedEmbedding.__name__)


class UnmaskedCache(KeyValueCache):
    """ExecuTorch's cache and attention, as far as Vulkan's operator computes them: all that came before."""

    def _check(self, module: nn.Module, attention_mask: Tensor | None, extras: dict[str, Any]) -> None:
        super()._check(module, attention_mask, extras)
        window = extras.get("sliding_window")
        if window is not None and window < self.length:
            raise ExportError(
                f"--backend vulkan: {type(module).__name__} looks back over {window} tokens, and Vulkan's attention "
                f"operator over all. Give --context-length {window} or less, or --backend xnnpack."
            )


def prepare(model: Any) -> dict[str, str]:
    """Make a frozen `model` exportable in place.

    Returns names of rounded weights: the buffer's -> the module's.

    Raises:
        ExportError: a matrix that Vulkan cannot hold as it was frozen.
    """
    affine.untie(model)
    names = {}
    for name, module in list(model.named_modules()):
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and _is_int4(weight):
            if weight.shape[0] % ROWS:
                raise ExportError(f"--backend vulkan: {name} has {weight.shape[0]} rows, no multiple of {ROWS}.")
            model.set_submodule(name, affine.AffineLinear(weight, module.bias, rounds=True))
            names[f"model.{name}.codes"] = name
    return names | tracing.quantize_modules(model)


def trace(model: Any, context_length: int) -> ExportedProgram:
    """The exported program of what `prepare` made.

    Raises:
        ExportError: attention that Vulkan's operator does not compute, or code that cannot be traced.
    """
    return tracing.trace(affine.PlainDecoder(model, UnmaskedCache(context_length)))


def lower(program: ExportedProgram, methods: dict[str, Any]) -> EdgeProgramManager:
    """`program` with all but int8 weights in Vulkan's delegates, and `methods` as its constant methods.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    progress.info("lowering to Vulkan, and int8 weights to XNNPACK")
    linear = [c for c in ALL_PARTITIONER_CONFIGS if c.__name__ == "LinearConfig"]
    partitioners = [
        Partitioner({"require_dynamic_shapes": True}, nn_module_blocklist=list(ON_CPU)),
        lowering.Partitioner(configs=linear),
    ]
    return lowering.compile_for("Vulkan", program, partitioners, methods)


class Partitioner(VulkanPartitioner):
    """Vulkan's own, which leaves XNNPACK's layers whole and makes no delegate that would only compute a length."""

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], Any]:
        """Also XNNPACK's layers; its own stay products, as its patterns fail on a layer that a view follows."""
        operators, _ = super().ops_to_not_decompose(ep)
        linear = torch.ops.aten.linear.default
        return [*operators, linear], lambda node: node.target is not linear or _on_cpu(node)

    def partition(self, exported_program: ExportedProgram) -> Any:
        """Its memory planning fails on a delegate that returns no tensor."""
        result = super().partition(exported_program)
        tagged = [node for node in exported_program.graph.nodes if "delegation_tag" in node.meta]
        computing = {n.meta["delegation_tag"] for n in tagged if n.op == "call_function" and _is_tensor(n)}
        for node in tagged:
            if node.meta["delegation_tag"] not in computing:
                result.partition_tags.pop(node.meta.pop("delegation_tag"), None)
        return result


def _on_cpu(node: torch.fx.Node) -> bool:
    kinds = [kind for _, kind in node.meta.get("nn_module_stack", {}).values()]
    return any(name in kind for name in ON_CPU for kind in kinds)


def _is_tensor(node: torch.fx.Node) -> bool:
    values = node.meta.get("val")
    return any(isinstance(v, Tensor) for v in (values if isinstance(values, tuple | list) else [values]))


def _is_int4(weight: Any) -> bool:
    return isinstance(weight, IntxUnpackedToInt8Tensor) and str(weight.target_dtype) == "torch.int4"
