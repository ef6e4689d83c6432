"""Frozen model -> Vulkan delegate, for Android's GPUs.

Vulkan has one operator for what is trained: int8 inputs per token times int4 weights by group. It has none for int8
weights, so int8 layers and heads go to XNNPACK, on the CPU, and the embedding to its own operator. Everything else of a
decoder, its cache included, becomes one delegate. A float32 program stays float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
from executorch.exir import EdgeProgramManager
from torch import Tensor, nn
from torch.export import ExportedProgram

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.graph import affine, lowering, tracing
from qat_edge_exporters.executorch.graph.attention import KeyValueCache
from qat_edge_exporters.executorch.graph.quantized_modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    bits_of,
    frozen_layers,
    quantize_modules,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 4  # Vulkan pads a matrix whose number of rows is not a multiple of this
# Modules that Vulkan must leave alone: it has no operator for int8 weights, and would repack an int4 embedding.
ON_CPU = (QuantizedLinear.__name__, QuantizedEmbedding.__name__)


class UnmaskedCache(KeyValueCache):
    """ExecuTorch's cache and attention as Vulkan's operator computes them: over all earlier tokens."""

    def _check_arguments(self, module: nn.Module, attention_mask: Tensor | None, extras: dict[str, Any]) -> None:
        super()._check_arguments(module, attention_mask, extras)
        window = extras.get("sliding_window")
        if window is not None and window < self.length:
            raise ExportError(
                f"--backend vulkan: {type(module).__name__} has a sliding window of {window} tokens, and Vulkan's "
                f"attention operator has none. Give --context-length {window} or less, or --backend xnnpack."
            )


def prepare(model: PreTrainedModel) -> dict[str, str]:
    """Make a frozen `model` exportable in place.

    Returns:
        Names of the frozen weights: the buffer's -> the module's.

    Raises:
        ExportError: a matrix that Vulkan cannot hold as it was frozen, or an embedding that does more than look up
            rows.
    """
    affine.untie(model)

    # int4 layers by the operator that Vulkan looks for.
    names = {}
    for layer in frozen_layers(model):
        if not isinstance(layer.module, nn.Linear) or bits_of(layer.weight) != 4:
            continue
        # Padded rows would be other bytes than those of the checkpoint.
        rows = layer.weight.shape[0]
        if rows % ROWS:
            raise ExportError(f"--backend vulkan: {layer.name} has {rows} rows, not a multiple of {ROWS}.")
        model.set_submodule(layer.name, affine.AffineLinear(layer.weight, layer.module.bias, rounds=True))
        names[f"model.{layer.name}.codes"] = layer.name

    # The rest runs on the CPU, in the form that XNNPACK and the quantized kernels know.
    return names | quantize_modules(model)


def trace(model: PreTrainedModel, context_length: int) -> ExportedProgram:
    """Trace a model that `prepare` changed.

    Raises:
        ExportError: attention that Vulkan's operator does not compute, or code that cannot be traced.
    """
    return tracing.trace(affine.PlainDecoder(model, UnmaskedCache(context_length)))


def lower(program: ExportedProgram, methods: Mapping[str, Any]) -> EdgeProgramManager:
    """Lower `program` into delegates of Vulkan, with int8 weights in XNNPACK's, and add `methods` as constant methods.

    Raises:
        ExportError: ExecuTorch's compiler failed.
    """
    progress.info("lowering to Vulkan, and int8 weights to XNNPACK")
    # XNNPACK takes its linear layers only: everything else stays in one delegate of Vulkan.
    linear = [c for c in compat.ALL_PARTITIONER_CONFIGS if c.__name__ == "LinearConfig"]
    partitioners = [
        ComputingDelegates({"require_dynamic_shapes": True}, nn_module_blocklist=list(ON_CPU)),
        lowering.FewestDelegates(configs=linear),
    ]
    return lowering.compile_for("Vulkan", program, partitioners, methods)


class ComputingDelegates(VulkanPartitioner):
    """Vulkan's partitioner, which keeps XNNPACK's layers whole and makes no delegate that only computes a length."""

    def ops_to_not_decompose(self, ep: ExportedProgram) -> tuple[list[Any], Any]:
        """Keep XNNPACK's layers whole as well.

        Vulkan's own layers are decomposed into products: its pattern for a whole layer fails if a view follows.
        """
        # The condition is evaluated for each node: only its module shows whether a layer is XNNPACK's.
        operators, _ = super().ops_to_not_decompose(ep)
        linear = torch.ops.aten.linear.default
        return [*operators, linear], lambda node: node.target is not linear or _on_cpu(node)

    def partition(self, exported_program: ExportedProgram) -> Any:
        """Partition as Vulkan does, and drop delegates that return no tensor, on which its memory planning fails."""
        result = super().partition(exported_program)

        # A delegate is the set of nodes with one tag; without a tag, a node stays with the portable kernels.
        tagged = [node for node in exported_program.graph.nodes if "delegation_tag" in node.meta]
        computing = {n.meta["delegation_tag"] for n in tagged if n.op == "call_function" and _returns_tensor(n)}
        for node in tagged:
            if node.meta["delegation_tag"] not in computing:
                result.partition_tags.pop(node.meta.pop("delegation_tag"), None)
        return result


def _on_cpu(node: torch.fx.Node) -> bool:
    """Return whether a node was traced inside one of the modules that Vulkan leaves alone."""
    classes = [name for _, name in node.meta.get("nn_module_stack", {}).values()]
    return any(module in name for module in ON_CPU for name in classes)


def _returns_tensor(node: torch.fx.Node) -> bool:
    values = node.meta.get("val")
    return any(isinstance(v, Tensor) for v in (values if isinstance(values, tuple | list) else [values]))
