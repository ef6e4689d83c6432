"""Private and undocumented names of ExecuTorch, torch and coremltools, and functions of theirs replaced at run time.

Verified against executorch 1.4.1 and 1.5.1, torch 2.13.0, torchao 0.18.0 and coremltools 9.0. Any of it may change in
the next release: review this file and its two neighbours on every upgrade. They are separate because of what they
import:

    compat.py                the compiler (executorch.exir), its serializer and XNNPACK's passes
    compat_runtime.py        the runtime's Python binding, for processes that only load a program
    ../compat_transformers.py   transformers alone, for checks of a model's configuration before anything is exported
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

# Registers quantized_decomposed, the operators that XNNPACK's patterns are written in. No public module imports it.
import torch.ao.quantization.fx._decomposed

# Schema of XNNPACK's delegates: the header in front of the graph, and the folder of the flatbuffer schemas.
from executorch.backends.xnnpack import serialization, xnnpack_preprocess
from executorch.backends.xnnpack._passes import XNNPACKPassManager

# What serializes an operator for XNNPACK, by its name.
from executorch.backends.xnnpack.operators.node_visitor import _node_visitor_dict

# XNNPACK's patterns by name; the public partitioner only takes a selection of them, and gives no list.
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

# Flatbuffer side of a .pte. `deserialize_pte_binary` and `serialize_pte_binary` have no public counterpart.
from executorch.exir import EdgeCompileConfig
from executorch.exir._serialize._flatbuffer import _run_flatc as run_flatc
from executorch.exir._serialize._flatbuffer_program import _patch_generated_flatbuffer_aliases
from executorch.exir._serialize._program import (
    PTEFile,
    deserialize_pte_binary,
    serialize_pte_binary,
)
from executorch.exir._serialize._program import _ExtendedHeader as PteHeader
from executorch.exir._serialize._program import _get_extended_header as read_pte_header
from executorch.exir._serialize.generated.executorch_flatbuffer.Program import Program as FlatbufferProgram

# The test that the default partitioner applies to the inputs of a partition.
from executorch.exir.backend.canonical_partitioners.config_partitioner import is_constant_data

# The node that stands for a delegate in a lowered graph.
from executorch.exir.delegate import executorch_call_delegate

# `_quant_patterns_and_replacements` registers the embedding operators of quantized_decomposed for tracing; the kernels
# of the runtime come from executorch.kernels.quantized.
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401

# ATen to edge operators: the six passes that graph/passes.py runs in one tracing.
from executorch.exir.passes.normalize_transpose_pass import NormalizeTransposePass
from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators
from executorch.exir.passes.replace_aten_with_edge_pass import OpReplacePass
from executorch.exir.passes.replace_broken_ops_with_function_ops_pass import ReplaceBrokenOpsWithFunctionalOpsPass
from executorch.exir.passes.scalar_to_tensor_pass import ScalarToTensorPass
from executorch.exir.passes.sym_to_tensor_pass import SymToTensorPass
from executorch.exir.program import _program

# Dataclasses of a parsed .pte.
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import DelegateCall, ExecutionPlan, KernelCall
from executorch.exir.schema import Tensor as SchemaTensor
from executorch.exir.tensor import ALIGNMENT, TensorShapeDynamism
from torch import Tensor
from torch.export import ExportedProgram

# The value that a partitioner's `generate_partitions` returns.
from torch.fx.passes.infra.partitioner import Partition

__all__ = [
    "ALIGNMENT",
    "ALL_PARTITIONER_CONFIGS",
    "BACKENDS_FOLDER",
    "DelegateCall",
    "ExecutionPlan",
    "FlatbufferProgram",
    "KernelCall",
    "NormalizeTransposePass",
    "OpReplacePass",
    "PTEFile",
    "Partition",
    "PteHeader",
    "RemoveMixedTypeOperators",
    "ReplaceBrokenOpsWithFunctionalOpsPass",
    "ScalarToTensorPass",
    "ScalarType",
    "SchemaTensor",
    "SymToTensorPass",
    "TensorShapeDynamism",
    "XNNHeader",
    "XNNPACKPassManager",
    "constrain",
    "delegate_slices_of_any_length",
    "deserialize_pte_binary",
    "edge_compile_config",
    "executorch_call_delegate",
    "is_constant_data",
    "open_coreml_weights",
    "open_program_table",
    "parse_coreml_model",
    "read_coreml_type",
    "read_pte_header",
    "replace_edge_passes",
    "replace_xnnpack_pass_manager",
    "run_flatc",
    "serialize_pte_binary",
    "set_segment_offset",
    "share_constants",
    "unpack_coreml_package",
]

# Folder of executorch.backends. Found through XNNPACK's package, because importing Vulkan's raises the root logger's
# level, and every library would then report each of its steps.
BACKENDS_FOLDER = Path(str(serialization.__path__[0])).parents[1]

# States a fact about a size that depends on data, so that torch.export need not prove it. Documented by PyTorch for
# this use, in spite of its underscore.
constrain = torch._check

_OFFSET_FIELD = 4  # of a DataSegment: the field's entry in the table of fields, from executorch's program.fbs


# --- the compiler ------------------------------------------------------------------------------------------------


def edge_compile_config() -> EdgeCompileConfig:
    """Return the settings of `to_edge_transform_and_lower`.

    Two private ones: the verifier rejects the custom operators that attention needs, and dim-order copies would be
    operators that neither XNNPACK nor a portable runtime without them takes.
    """
    return EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


@contextmanager
def replace_edge_passes(keep: Callable[[Any], bool], operators_pass: type) -> Iterator[None]:
    """Inside the block, ATen operators become edge operators by `operators_pass` instead of several passes.

    The passes and their order are fixed inside `to_edge_transform_and_lower`; it takes no list of its own.

    Args:
        keep: whether one of the library's earlier passes, a class or an object, still runs.
        operators_pass: replaces the last of these passes, `OpReplacePass`.
    """
    original = _program._get_aten_to_edge_passes

    def selected(config: EdgeCompileConfig) -> tuple[list[Any], list[Any]]:
        before, after = original(config)
        return [step for step in before if keep(step)], after

    _program._get_aten_to_edge_passes, _program.OpReplacePass = selected, operators_pass
    try:
        yield
    finally:
        _program._get_aten_to_edge_passes, _program.OpReplacePass = original, OpReplacePass


@contextmanager
def replace_xnnpack_pass_manager(manager: type) -> Iterator[None]:
    """Inside the block, XNNPACK's backend runs its passes by `manager`, a subclass of `XNNPACKPassManager`.

    The backend constructs the manager itself, and no option chooses its class.
    """
    xnnpack_preprocess.XNNPACKPassManager = manager
    try:
        yield
    finally:
        xnnpack_preprocess.XNNPACKPassManager = XNNPACKPassManager


@contextmanager
def delegate_slices_of_any_length() -> Iterator[None]:
    """Inside the block, XNNPACK takes slices of a static dimension although another one, the tokens, is dynamic.

    The partitioner refuses them, and the serializer writes the upper bound of a dynamic dimension. XNNPACK itself
    infers a dimension whose size is 0: https://github.com/google/XNNPACK/blob/master/test/static-slice.cc
    """
    visitor = _node_visitor_dict["aten.slice_copy.Tensor"]
    check, define = SliceCopyConfig.check_constraints, visitor.define_node

    def is_static_slice(self: Any, node: Any, program: ExportedProgram) -> bool:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
        sliced = {type(shape[node.args[1]]) for shape in (before, after)}
        has_stride = len(node.args) > 4 and node.args[4] != 1
        return bool(self.check_common_constraints(node, program)) and sliced == {int} and not has_stride

    def define_node(self: Any, node: Any, graph: Any, *rest: Any) -> None:
        define(self, node, graph, *rest)
        sizes = node.meta["val"].shape
        graph.xnodes[-1].xnode_union.sizes = [size if isinstance(size, int) else 0 for size in sizes]

    SliceCopyConfig.check_constraints, visitor.define_node = is_static_slice, define_node
    try:
        yield
    finally:
        SliceCopyConfig.check_constraints, visitor.define_node = check, define


@contextmanager
def share_constants(program: ExportedProgram) -> Iterator[None]:
    """Inside the block, deep copies of parts of `program` share its tensors.

    Lowering copies the program once for each delegate, all of its weights with it. XNNPACK's backend changes none of
    them, so the copies are memory and time for nothing.
    """
    tensors = [t for t in (*program.state_dict.values(), *program.constants.values()) if isinstance(t, Tensor)]
    for tensor in tensors:
        vars(tensor)["__deepcopy__"] = partial(_uncopied, tensor)
    try:
        yield
    finally:
        for tensor in tensors:
            vars(tensor).pop("__deepcopy__", None)  # a tensor may be listed twice


def _uncopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    return tensor


# --- the program's flatbuffer -------------------------------------------------------------------------------------


def open_program_table(head: bytearray) -> FlatbufferProgram:
    """Return the flatbuffer table at the beginning of a .pte, which reads and writes `head` in place."""
    _patch_generated_flatbuffer_aliases()  # without it the generated classes do not find each other
    return FlatbufferProgram.GetRootAs(head)


def set_segment_offset(head: bytearray, segment: Any, offset: int) -> None:
    """Overwrite the offset of a DataSegment of `head`. The generated classes only read."""
    struct.pack_into("<Q", head, segment._tab.Pos + segment._tab.Offset(_OFFSET_FIELD), offset)


# --- CoreML packages, for whose contents coremltools has no public reader -------------------------------------------


def unpack_coreml_package(package: bytes, folder: Path) -> bool:
    """Unpack the bytes of a CoreML delegate into `folder`; False if they hold no package."""
    from executorch.backends.apple.coreml import executorchcoreml

    return bool(executorchcoreml.unflatten_directory_contents(package, str(folder)))


def parse_coreml_model(data: bytes) -> Any:
    """Return the protobuf message Model of a .mlmodel file."""
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString(data)
    return model


def read_coreml_type(number: int) -> str:
    """Return the name of a data type in a model's protobuf, such as "INT4"."""
    from coremltools.proto import MIL_pb2

    return str(MIL_pb2.DataType.Name(number))


def open_coreml_weights(path: Path) -> Any:
    """Return coremltools' reader of a weight.bin."""
    from coremltools.libmilstoragepython import _BlobStorageReader

    return _BlobStorageReader(str(path))
