"""Backends that a .pte can be lowered to beside XNNPACK, by name. Nothing of them is imported here.

What each computes otherwise than trained stands here too: `qat-edge export` prints and records it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

from qat_edge.errors import ExportError

XNNPACK = "xnnpack"


@dataclass(frozen=True)
class Backend:
    """What is known of one without importing it.

    delegate: its name in a .pte. package, extra: what has to be installed to compile for it, and qat-edge's extra
    that brings it; empty where executorch alone is enough. runs_on: what can load it.
    differences: how what it computes may differ from what was trained, an assertion each.
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
        """Of its artifacts, below exports/."""
        return f"executorch-{self.name}"


class Compiler(Protocol):
    """A module that lowers to one backend."""

    def prepare(self, model: Any) -> dict[str, str]:
        """Make a frozen model exportable in place; names of rounded weights: the buffer's -> the module's."""

    def trace(self, model: Any, context_length: int) -> Any:
        """The exported program of what `prepare` made."""

    def lower(self, program: Any, methods: dict[str, Any]) -> Any:
        """That program in delegates of this backend, `methods` beside it as constant methods."""


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
            "CoreML has weights in int4, and no rounding of each token beside them",
            "keys and values are kept in float16, the only kind of state that CoreML has",
        ),
        package="coremltools",
        extra="coreml",
    ),
}


def runs_elsewhere(artifact: str) -> str:
    """Why an artifact of that name cannot run here or where `validate` reaches, a sentence; empty where it can."""
    found = next((backend for backend in BACKENDS.values() if backend.folder == artifact), None)
    if found is None:
        return ""
    lacking = f"{found.delegate} is not in ExecuTorch's Python package"
    return f"{artifact} cannot run here: {lacking}. It runs on {found.runs_on}."


def compiler(name: str) -> Compiler:
    """What lowers to the backend `name`, once what it needs is there.

    Raises:
        ExportError: a package is missing, which the message names, with the extra that brings it.
    """
    require_package(BACKENDS[name])
    root = logging.getLogger()
    level = root.level
    try:
        return cast(Compiler, import_module(BACKENDS[name].module))
    finally:
        root.setLevel(level)  # ExecuTorch's partitioners would have it tell of every operator


def require_package(backend: Backend) -> None:
    """Check that what the backend's compiler and reader need is installed.

    Raises:
        ExportError: it is not.
    """
    if backend.package and find_spec(backend.package) is None:
        raise ExportError(
            f"--backend {backend.name} needs {backend.package}, which is not installed. "
            f"`pip install 'qat-edge[{backend.extra}]'` brings it (Linux and macOS only)."
        )
