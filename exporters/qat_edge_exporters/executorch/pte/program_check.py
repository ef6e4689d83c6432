"""Find methods, delegates and calls that the exporter does not write: equal matrices do not show what else is computed.

A run on a few prompts finds another function, but not one that differs for rare inputs alone. So only embeddings may
read token ids, the last call has to be the delegate with the head, nothing may jump, and every operator has to be one
that the export of some architecture has. Those of masks and of some activations compare values, so they stay possible,
and what a delegate of Vulkan or CoreML computes is not looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from qat_edge import readers
from qat_edge_exporters.executorch.compat import DelegateCall, ExecutionPlan, KernelCall
from qat_edge_exporters.executorch.pte import delegates, runner_contract
from qat_edge_exporters.executorch.pte.runner_contract import ENCODER, FORWARD

# Kernels in the exports of the architectures of docs/reference/architectures.md and of encoders, with and without
# --portable, and arithmetic of the same sort that XNNPACK may leave to them.
LOOKUPS = (
    "aten::embedding.out", "aten::gather.out", "aten::index_select.out",
    "quantized_decomposed::embedding_4bit.dtype_out", "quantized_decomposed::embedding_4bit.out",
    "quantized_decomposed::embedding_byte.dtype_out", "quantized_decomposed::embedding_byte.out",
)  # fmt: skip
ATTENTION = (
    "aten::index_put_", "llama::custom_quantized_sdpa.out", "llama::custom_sdpa.out", "llama::update_cache.out",
    "quantized_decomposed::choose_qparams_per_token_asymmetric.out", "quantized_decomposed::quantize_per_token.out",
    "quantized_decomposed::dequantize_per_token.out",
)  # fmt: skip
LAYOUT = (
    "aten::_local_scalar_dense", "aten::_to_copy.out", "aten::alias_copy.out", "aten::arange.start_out",
    "aten::as_strided_copy.out", "aten::cat.out", "aten::clone.out", "aten::copy.out", "aten::empty.out",
    "aten::expand_copy.out", "aten::full.out", "aten::permute_copy.out", "aten::repeat.out",
    "aten::select_copy.int_out", "aten::slice_copy.Tensor_out", "aten::slice_scatter.out",
    "aten::split_copy.Tensor_out", "aten::split_with_sizes_copy.out", "aten::squeeze_copy.dim_out",
    "aten::squeeze_copy.dims_out", "aten::stack.out", "aten::sym_size.int", "aten::t_copy.out",
    "aten::transpose_copy.int_out", "aten::unbind_copy.int_out", "aten::unsqueeze_copy.out", "aten::view_copy.out",
    "executorch_prim::et_view.default",
)  # fmt: skip
ARITHMETIC = (
    "aten::_softmax.out", "aten::abs.out", "aten::add.Scalar_out", "aten::add.out", "aten::addmm.out", "aten::bmm.out",
    "aten::clamp.out", "aten::cos.out", "aten::cumsum.out", "aten::div.Scalar_out", "aten::div.out", "aten::erf.out",
    "aten::exp.out", "aten::expm1.out", "aten::gelu.out", "aten::log.out", "aten::log1p.out", "aten::mean.dim_out",
    "aten::mm.out", "aten::mul.Scalar_out", "aten::mul.out", "aten::native_layer_norm.out", "aten::neg.out",
    "aten::pow.Tensor_Scalar_out", "aten::pow.Tensor_Tensor_out", "aten::reciprocal.out", "aten::relu.out",
    "aten::rsqrt.out", "aten::sigmoid.out", "aten::sin.out", "aten::sqrt.out", "aten::sub.Scalar_out", "aten::sub.out",
    "aten::sum.IntList_out", "aten::tanh.out",
)  # fmt: skip
# Of masks, of positions from a mask, and of activations by cases.
COMPARISONS = (
    "aten::ge.Scalar_out", "aten::gt.Scalar_out", "aten::gt.Tensor_out", "aten::le.Tensor_out", "aten::logical_or.out",
    "aten::lt.Scalar_out", "aten::ne.Scalar_out", "aten::where.self_out",
)  # fmt: skip
KERNELS = frozenset((*LOOKUPS, *ATTENTION, *LAYOUT, *ARITHMETIC, *COMPARISONS))
# Operators inside of XNNPACK's delegates, chosen in the same way.
XNNPACK_NODES = frozenset(
    (
        "XNNAbs", "XNNAdd", "XNNBatchMatrixMultiply", "XNNClamp", "XNNConcatenate2", "XNNConcatenate3",
        "XNNConcatenate4", "XNNConcatenate5", "XNNConvert", "XNNCopy", "XNNDiv", "XNNExp", "XNNFloor",
        "XNNFullyConnected", "XNNGelu", "XNNLog", "XNNMinimum", "XNNMultiply", "XNNNegate",
        "XNNReciprocalSquareRoot", "XNNSigmoid", "XNNSoftmax", "XNNSquare", "XNNSquareRoot", "XNNStaticReshape",
        "XNNStaticSlice", "XNNStaticTranspose", "XNNSubtract", "XNNTanh",
    )
)  # fmt: skip
SIZE, VIEW = "aten::sym_size", "executorch_prim::et_view"  # of token ids


def program_faults(
    plans: Mapping[str, ExecutionPlan], graphs: Sequence[dict[str, Any]], backends: Collection[str]
) -> list[str]:
    """Return a fault for everything that the export of a model does not have, a sentence each.

    Args:
        plans: all methods of the program, by name.
        graphs: of the delegates of XNNPACK and Vulkan in forward.
        backends: names of the delegates that the target has.
    """
    generates = not set(ENCODER) <= plans.keys()
    constants = (*runner_contract.REQUIRED, *runner_contract.OTHER) if generates else ENCODER
    faults = [_unknown("method", name) for name in sorted(plans.keys() - {FORWARD, *constants})]
    faults += [
        f"the method {name} computes, where the exporter writes a constant."
        for name in constants
        if name in plans and (plans[name].inputs or delegates.instructions(plans[name]))
    ]
    if FORWARD not in plans:
        return faults
    faults += _call_faults(plans[FORWARD], backends)
    # Vulkan takes the number of tokens from the ids, and CoreML computes everything.
    if generates and list(backends) == [delegates.XNNPACK]:
        faults += _data_faults(plans[FORWARD])
    nodes = {node["xnode_union_type"] for graph in graphs if "chain" not in graph for node in graph["xnodes"]}
    return faults + [_unknown("operator of XNNPACK", name) for name in sorted(nodes - XNNPACK_NODES)]


def _call_faults(plan: ExecutionPlan, backends: Collection[str]) -> Iterator[str]:
    """Yield a fault for each operator, delegate and kind of instruction that the exporter does not write."""
    for name in sorted({_full_name(operator) for operator in plan.operators} - KERNELS):
        yield _unknown("operator", name)
    for name in sorted({delegate.id for delegate in plan.delegates} - set(backends)):
        yield _unknown("delegate", name)
    kinds = {type(call).__name__ for call in delegates.instructions(plan)}
    for name in sorted(kinds - {KernelCall.__name__, DelegateCall.__name__}):
        yield _unknown("instruction", name)


def _data_faults(plan: ExecutionPlan) -> Iterator[str]:
    """Yield a fault where something else than embeddings reads token ids, or than a delegate writes logits."""
    calls = [call for call in delegates.instructions(plan) if isinstance(call, KernelCall | DelegateCall)]
    ids = {plan.inputs[0]}
    for call in calls:
        name = plan.operators[call.op_index].name if isinstance(call, KernelCall) else "a delegate"
        if not ids & set(call.args):
            continue
        if name == VIEW:
            ids.add(call.args[-1])  # the same ids in another shape
        elif name not in (SIZE, *delegates.EMBEDDINGS):
            yield f"{readers.shorten(name)} reads the token ids, which the exporter does not make."
    writers = [call for call in calls if plan.outputs[0] in call.args]
    if len(plan.outputs) != 1 or not writers or not isinstance(writers[-1], DelegateCall) or writers[-1] != calls[-1]:
        yield "the logits are not the output of the last delegate alone."


def _full_name(operator: Any) -> str:
    return f"{operator.name}.{operator.overload}" if operator.overload else str(operator.name)


def _unknown(kind: str, name: str) -> str:
    return f"the {kind} {readers.shorten(name)} is not one that the exporter writes."
