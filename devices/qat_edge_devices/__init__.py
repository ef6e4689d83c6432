"""Devices: a transport reaches the machine, a runtime runs one kind of artifact there.

No implementation is imported here.

with contextlib.closing(open_transport("local")) as transport:
    runtime = open_runtime("executorch", transport, threads=2)
    runtime.prepare(Path("runs/demo/exports/executorch"))
    speed = runtime.speed(prefill=128, decode=64, repeats=5)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qat_edge_devices.device_errors import UnknownNameError
from qat_edge_devices.transport import Access

if TYPE_CHECKING:
    from qat_edge_devices.runtime import Runtime
    from qat_edge_devices.transport import Transport

TRANSPORTS = {
    "local": "qat_edge_devices.local:open_local",
    "ssh": "qat_edge_devices.ssh:open_ssh",
    "adb": "qat_edge_devices.adb:open_adb",
}
RUNTIMES = {
    "executorch": "qat_edge_devices.runtimes.executorch_runtime:ExecuTorchRuntime",
    "onnx": "qat_edge_devices.runtimes.onnx_runtime:OnnxRuntime",
}


def open_transport(device: str, access: Access | None = None) -> Transport:
    """The device that `device` names, connected: a transport, and after a colon the address it needs.

    "local"; "ssh:pi@kitchen", "ssh://pi@kitchen:2222" or a Host of ~/.ssh/config; "adb", "adb:SERIAL",
    "adb:192.168.1.20:5555".

    Raises:
        UnknownNameError: no such transport; the message lists those there are.
        TransportError: the device cannot be reached or used.
    """
    name, _, address = device.partition(":")
    transport: Transport = _resolve("transport", TRANSPORTS, name)(address, access or Access())
    return transport


def open_runtime(
    target: str, transport: Transport, threads: int, progress: Callable[[int, int], None] | None = None
) -> Runtime:
    """What runs artifacts of `target` on the device behind `transport`; `progress` is called as (done, total).

    Raises:
        UnknownNameError: nothing runs artifacts of that target; the message lists those that can be run.
    """
    runtime: Runtime = _resolve("runtime", RUNTIMES, target)(transport, threads, progress=progress)
    return runtime


def _resolve(kind: str, table: dict[str, str], name: str) -> Any:
    if name not in table:
        raise UnknownNameError(f"'{name}' is no {kind}. Known: {', '.join(sorted(table))}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
