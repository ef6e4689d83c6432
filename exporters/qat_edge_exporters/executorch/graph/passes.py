"""The libraries' graph passes, run only where they change something, and several of them in one tracing.

ExecuTorch traces a graph again for every pass, under fake tensors, and that is most of the time of an export. By
default the libraries trace a decoder twice to decompose it, seven times to turn it into edge operators, and then each
delegate up to seventeen times. The resulting program is identical, byte for byte.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch.export import ExportedProgram

from qat_edge_exporters.executorch import compat

# Passes of XNNPACK's backend by name, and the operators without which each changes nothing.
ACTS_ON = {
    "XNNPACKRemoveCloneOpsTransform": ("clone",),
    "DimOrderOpsRevertPass": ("dim_order",),
    "ConvertToUpsampleBilinear2d": ("index", "upsample"),
    "ConvertToLinearPass": (".mm.", ".addmm.", ".bmm."),
    "PropagateCustomMetaPass": (),  # tags for constants in a separate file, and there are none
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
    compat.NormalizeTransposePass,
    compat.ReplaceBrokenOpsWithFunctionalOpsPass,
    compat.ScalarToTensorPass,
    compat.SymToTensorPass,
    compat.RemoveMixedTypeOperators,
    compat.OpReplacePass,
):
    """Six passes of ExecuTorch in one tracing: each rewrites a call and passes it on to the next base class."""


class DecomposedOnce(ExportedProgram):
    """Exported program that ignores a request to be made functional only.

    `to_edge_transform_and_lower` first decomposes by an empty table, which costs one tracing and makes the program
    functional. The decomposition by the full table that follows does that as well.
    """

    @classmethod
    def of(cls, program: ExportedProgram) -> DecomposedOnce:
        """Return the same program as an instance of this class; nothing is copied."""
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
        """Return this program for an empty table, and a decomposed, functional one for any other."""
        if decomp_table is not None and not decomp_table:
            return self
        return super().run_decompositions(decomp_table, decompose_custom_triton_ops)


def edge_operators_at_once() -> AbstractContextManager[None]:
    """Inside the block, ATen operators become edge operators in one tracing."""
    merged = {base.__name__ for base in EdgeOperators.__bases__}

    def keep(step: Any) -> bool:
        name = getattr(step, "__name__", type(step).__name__)  # the library lists classes and objects
        return name not in merged

    return compat.replace_edge_passes(keep, EdgeOperators)


def xnnpack_where_they_act(on_delegate: Callable[[], None]) -> AbstractContextManager[None]:
    """Inside the block, XNNPACK's passes run only where they have something to act on.

    Args:
        on_delegate: called before each delegate is lowered.
    """

    class SelectivePassManager(compat.XNNPACKPassManager):
        def transform(self) -> ExportedProgram:
            on_delegate()
            program = self.exported_program
            for step in self.passes:
                if _acts(step, program):
                    # One manager a pass: each pass checks the operators that the ones before it left.
                    program = compat.XNNPACKPassManager(program, [step]).transform()
            return program

    return compat.replace_xnnpack_pass_manager(SelectivePassManager)


def _acts(step: type, program: ExportedProgram) -> bool:
    """Return whether a pass may change `program`; True for a pass that `ACTS_ON` does not list."""
    if step.__name__ not in ACTS_ON:
        return True
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    # Names between dots, so that ".mm." is not found in ".bmm.".
    names = {f".{target.__name__}." for target in calls if target is not operator.getitem}
    return any(part in name for part in ACTS_ON[step.__name__] for name in names)
