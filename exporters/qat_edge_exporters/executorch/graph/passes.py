"""The libraries' passes over a graph, each only where it changes something, several in one tracing.

ExecuTorch traces a graph anew for every pass, under fake tensors: that is most of the time of an export. Driven as
they are, the libraries trace a decoder twice to decompose it and seven times to make edge operators of it, then
each delegate up to seventeen times. What comes out is the same, byte for byte.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.replace_aten_with_edge_pass import OpReplacePass
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import ReplaceBrokenOpsWithFunctionalOpsPass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.sym_to_tensor_pass import SymToTensorPass
from executorch.exir.program import _program
from torch.export import ExportedProgram

# A pass of XNNPACK's, and the operators without which it changes nothing.
ACTS_ON = {
    "XNNPACKRemoveCloneOpsTransform": ("clone",),
    "DimOrderOpsRevertPass": ("dim_order",),
    "ConvertToUpsampleBilinear2d": ("index", "upsample"),
    "ConvertToLinearPass": (".mm.", ".addmm.", ".bmm."),
    "PropagateCustomMetaPass": (),  # tags for constants in a file of their own; there are none
    "ConvertToSDPAPass": ("softmax",),
    "ConstPropPass": (),  # nothing is left to fold once torch.export has lifted the constants
    "FuseBatchNormPass": ("batch_norm",),
    "DecomposeBatchNorm": ("batch_norm",),
    "FuseActivationPass": ("relu", "hardtanh"),
    "DecomposeConcatenate": (".cat.",),
    "RemoveGetItemPass": (".max",),
    "InsertPadQDQPass": ("pad",),
    "Conv1dUnsqueezePass": ("convolution",),
    "PReLUReshapePass": ("prelu",),
    "ChannelsLastTaggedReshapePass": ("convolution", "upsample", "mean", "max", "pool", "prelu"),
    "RemoveRedundantCopyPass": ("_to_copy",),
}


class EdgeOperators(
    NormalizeTransposePass,
    ReplaceBrokenOpsWithFunctionalOpsPass,
    ScalarToTensorPass,
    SymToTensorPass,
    RemoveMixedTypeOperators,
    OpReplacePass,
):
    """Six passes of ExecuTorch's in one tracing: each rewrites a call and hands it on to the next."""


class Undecomposed(ExportedProgram):
    """A program that is not made functional by a tracing of its own: decomposing it does that as well."""

    @classmethod
    def of(cls, program: ExportedProgram) -> Undecomposed:
        """The same program."""
        return cls(
            root=program.graph_module,
            graph=program.graph,
            graph_signature=program.graph_signature,
            state_dict=program.state_dict,
            range_constraints=program.range_constraints,
            module_call_graph=program.module_call_graph,
            example_inputs=program.example_inputs,
            constants=program.constants,
            verifiers=program.verifiers,
        )

    def run_decompositions(
        self, decomp_table: Mapping[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Itself for an empty table; decomposed, and functional, for any other."""
        if decomp_table is not None and not decomp_table:
            return self
        return super().run_decompositions(decomp_table, decompose_custom_triton_ops)


@contextmanager
def edge_operators_at_once() -> Iterator[None]:
    """Within the block, ATen's operators become edge operators in one tracing."""
    merged = {kind.__name__ for kind in EdgeOperators.__bases__}
    passes = _program._get_aten_to_edge_passes

    def others(config: Any) -> tuple[list[Any], list[Any]]:
        before, after = passes(config)
        return [step for step in before if getattr(step, "__name__", type(step).__name__) not in merged], after

    _program._get_aten_to_edge_passes, _program.OpReplacePass = others, EdgeOperators
    try:
        yield
    finally:
        _program._get_aten_to_edge_passes, _program.OpReplacePass = passes, OpReplacePass


@contextmanager
def xnnpack_where_they_act(lowering: Callable[[], None]) -> Iterator[None]:
    """Within the block, XNNPACK's passes run only where they have something to act on.

    lowering: called before each delegate.
    """

    class Selective(XNNPACKPassManager):
        def transform(self) -> ExportedProgram:
            lowering()
            program = self.exported_program
            for step in self.passes:
                if _acts(step, program):
                    program = XNNPACKPassManager(program, [step]).transform()
            return program

    xnnpack_preprocess.XNNPACKPassManager = Selective
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = XNNPACKPassManager


def _acts(step: type, program: ExportedProgram) -> bool:
    if step.__name__ not in ACTS_ON:
        return True  # a pass that this version of ours does not know
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    names = {f".{target.__name__}." for target in calls if target is not operator.getitem}
    return any(part in name for part in ACTS_ON[step.__name__] for name in names)
