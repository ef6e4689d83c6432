"""Kinds of processors for which runtimes have kernels of their own that round inputs differently."""

from __future__ import annotations

import platform
from enum import StrEnum
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
DOT_PRODUCT = "asimddp"  # Linux's name of FEAT_DotProd, products of int8 vectors: optional before ARMv8.4


class Processor(StrEnum):
    """A kind of processor.

    Attributes:
        ARM: 64-bit ARM with FEAT_DotProd.
        ARM_WITHOUT_DOT_PRODUCT: older 64-bit ARM, such as the Cortex-A72 of a Raspberry Pi 4.
        OTHER: everything else, such as a GPU behind WebGPU.
    """

    X86 = "x86"
    ARM = "ARM"
    ARM_WITHOUT_DOT_PRODUCT = "ARM without dot products"
    WASM = "WebAssembly"
    OTHER = "another processor"


_NAMES = {
    "x86_64": Processor.X86,
    "amd64": Processor.X86,
    "aarch64": Processor.ARM,
    "arm64": Processor.ARM,
    "wasm32": Processor.WASM,
}


def processor_of(machine: str, has_dot_product: bool | None) -> Processor:
    """Return the kind of a processor.

    Args:
        machine: architecture, as `uname -m` prints it.
        has_dot_product: True if an ARM processor has FEAT_DotProd; None where the system does not report it. Such
            systems, macOS for one, run only on processors that have it.
    """
    kind = _NAMES.get(machine.lower(), Processor.OTHER)
    return Processor.ARM_WITHOUT_DOT_PRODUCT if kind is Processor.ARM and has_dot_product is False else kind


def this_processor() -> Processor:
    """Return the kind of this machine's processor."""
    features = proc_value(CPUINFO, "Features")
    return processor_of(platform.machine(), None if features is None else DOT_PRODUCT in features.split())


def proc_value(path: Path, key: str) -> str | None:
    """Return the first value of `key` in a "key : value" file of /proc, or None."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
