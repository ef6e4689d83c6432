"""Table of the backends other than XNNPACK that a .pte can be lowered to. Importing this imports none of them.

The table also lists how each backend's results differ from what was trained: `qat-edge export` prints and records it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol, cast

from qat_edge.errors import ExportError

if TYPE_CHECKING:
    from executorch.exir import EdgeProgramManager
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

XNNPACK = "xnnpack"


@dataclass(frozen=True)
class Backend:
    """Properties of a backend that are known without importing it.

    Attributes:
        name: value of --backend.
        delegate: the backend's name in a .pte.
        module: a `Compiler`.
        runs_on: systems and packages that can load it.
        differences: ways in which its results may differ from what was trained, one sentence each.
        package: Python package that its compiler needs; empty if executorch alone is enough.
        extra: the extra of qat-edge that installs `package`.
    """

    name: str
    delegate: str
    module: str
    runs_on: str
    differences: tuple[str, ...]
    package: str = ""
    extra: str = ""

    @property
    def folder(self) -> str:
        """Name of its artifact's folder, below exports/."""
        return f"executorch-{self.name}"


class Compiler(Protocol):
    """A module that lowers to one backend."""

    def prepare(self, model: PreTrainedModel) -> dict[str, str]:
        """Make a frozen model exportable in place; return names of frozen weights: the buffer's -> the module's."""

    def trace(self, model: PreTrainedModel, context_length: int) -> ExportedProgram:
        """Trace a model that `prepare` changed."""

    def lower(self, program: ExportedProgram, methods: Mapping[str, Any]) -> EdgeProgramManager:
        """Lower a traced program into delegates of this backend, and add `methods` as constant methods."""


BACKENDS = {
    "vulkan": Backend(
        name="vulkan",
        delegate="VulkanBackend",
        module="qat_edge_exporters.executorch.backends.vulkan",
        runs_on="Android GPUs, in org.pytorch:executorch-android-vulkan or a runtime built with it",
        # https://github.com/pytorch/executorch/tree/v1.4.1/backends/vulkan/runtime/graph/ops/impl
        differences=(
            "inputs of linear layers stay in float, where training rounds them to int8, "
            "on a GPU without int8 dot products: ExecuTorch's kernels leave that step out there",
        ),
    ),
    "coreml": Backend(
        name="coreml",
        delegate="CoreMLBackend",
        module="qat_edge_exporters.executorch.backends.coreml",
        runs_on="iOS 18, macOS 15 and later, in the Swift package's backend_coreml",
        differences=(
            "inputs of linear layers stay in float, where training rounds them to int8: "
            "CoreML has weights in int4, but does not round the inputs of each token",
            "keys and values are kept in float16, the only kind of state that CoreML has",
        ),
        package="coremltools",
        extra="coreml",
    ),
}


def compiler(name: str) -> Compiler:
    """Import the compiler of the backend `name`.

    Raises:
        ExportError: a package is missing; the message names it, and the extra that installs it.
    """
    require_package(BACKENDS[name])
    root = logging.getLogger()
    level = root.level
    try:
        return cast(Compiler, import_module(BACKENDS[name].module))
    finally:
        root.setLevel(level)  # ExecuTorch's partitioners change it, and would log every operator


def require_package(backend: Backend) -> None:
    """Check that the package of the backend's compiler and reader is installed.

    Raises:
        ExportError: it is not.
    """
    if backend.package and find_spec(backend.package) is None:
        raise ExportError(
            f"--backend {backend.name} needs {backend.package}, which is not installed. "
            f"`pip install 'qat-edge[{backend.extra}]'` installs it (Linux and macOS only)."
        )
