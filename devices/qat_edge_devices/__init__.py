"""Devices: a transport reaches the machine, a runtime runs an artifact on it.

    with contextlib.closing(open_transport("local")) as transport:
        runtime = open_runtime("executorch", transport, threads=2)
        runtime.prepare(Path("runs/demo/exports/executorch"))
        timed = runtime.speed(prefill=128, decode=64, repeats=5)

The modules in the order in which `validate --device ssh:...` goes through them:

    transport.py         interface of a transport (push, run, pull, info, cancel, close) and its data classes
    ssh.py, adb.py       command lines that reach a device's shell, and advice when they fail
    session.py           one connection: create the work folder, reconnect, retry, report what was done
    shell.py             POSIX shell scripts sent to a device, and their encoding
    remote.py            the transport of ssh and adb: send files through a cache by sha256, run programs, pull results
    process.py           start local programs (ssh and adb among them) so that they end with their children
    processor.py         kinds of processors that runtimes treat differently
    local.py             the transport of this machine
    browser_transport.py the transport of headless Chromium on this machine, where a program is a page
    chromium.py          find Chromium, start it with a profile of its own, measure and end its processes
    page_server.py       HTTP server on 127.0.0.1 that gives the page its files and takes its results
    onnxruntime_web.py   download the pinned onnxruntime-web with npm
    mock.py              a transport in memory, for tests
    runtime.py           interface of a runtime (prepare, score, trace, generate, speed) and its results
    runtimes/            the runtimes: send the agent or a native runner, write requests, read results
    agent/               the program that runs the artifact there, in Python, and for browsers in JavaScript
    device_data.py       checks of everything that a device returns
    device_errors.py     the tree of errors
    profiles/            gates and options for types of devices, read by `--device-profile`

Importing this package imports no implementation, and nothing here imports torch, numpy or `qat_edge`. Only the agent
needs more than the standard library, on the device: numpy and a runtime (executorch with torch,
executorch-numpy-runtime, onnxruntime, onnxruntime-genai or xllamacpp). A browser needs onnxruntime-web.
"""

from __future__ import annotations

import re
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
    "browser": "qat_edge_devices.browser_transport:open_browser",
    "browser-webgpu": "qat_edge_devices.browser_transport:open_browser_webgpu",
}
RUNTIMES = {
    "executorch": "qat_edge_devices.runtimes.agent_runtime:ExecuTorchRuntime",
    "onnx": "qat_edge_devices.runtimes.agent_runtime:OnnxRuntime",
    "gguf": "qat_edge_devices.runtimes.agent_runtime:GgufRuntime",
    "hf": "qat_edge_devices.runtimes.agent_runtime:HuggingFaceRuntime",
}
# Runtimes of transports that cannot run Python programs, in place of `RUNTIMES`.
RUNTIMES_OF = {
    "browser": {"onnx": "qat_edge_devices.runtimes.browser_runtime:WasmRuntime"},
    "browser-webgpu": {"onnx": "qat_edge_devices.runtimes.browser_runtime:WebGpuRuntime"},
}
ADDRESSES_ARE_PATHS = frozenset(RUNTIMES_OF)  # of a program on this machine

NOT_IN_ADDRESSES = frozenset("'\"`$\\;&|<>(){}*?!#")  # characters of shells


def open_transport(device: str, access: Access | None = None) -> Transport:
    """Connect to a device.

    Args:
        device: name of a transport, followed by a colon and the address if it takes one: "local"; "ssh:pi@kitchen",
            "ssh://pi@kitchen:2222" or a Host of ~/.ssh/config; "adb", "adb:SERIAL", "adb:192.168.1.20:5555"; "browser",
            "browser:/path/to/chromium".
        access: settings besides the address.

    Raises:
        UnknownNameError: no such transport; the message lists the known ones.
        TransportError: the device cannot be reached or used.
    """
    name, _, address = device.partition(":")
    if name not in ADDRESSES_ARE_PATHS:
        _check_address(address)
    transport: Transport = _resolve("transport", TRANSPORTS, name)(address, access or Access())
    return transport


def _check_address(address: str) -> None:
    """Refuse characters that no host, user or serial number has, and that ssh, its configuration or a shell would read.

    Raises:
        UnknownNameError: names the characters.
    """
    odd = sorted({each for each in address if each in NOT_IN_ADDRESSES or each.isspace() or not each.isprintable()})
    if odd:
        shown = " ".join(ascii(each) for each in odd)
        raise UnknownNameError(f"The address has {shown}, which no host name or serial number has. Check its spelling.")
    if any(part.startswith("-") for part in re.split("[/@]", address)):
        raise UnknownNameError("A name that begins with '-' would be read as an option. Check its spelling.")


def open_runtime(
    target: str, transport: Transport, threads: int, progress: Callable[[int, int], None] | None = None
) -> Runtime:
    """Return the runtime that runs artifacts of `target` on the device behind `transport`.

    Args:
        target: export target, a key of `RUNTIMES`.
        transport: an open connection; it stays the caller's to close.
        threads: CPUs that a process on the device may use.
        progress: called as (done, total) while a request runs.

    Raises:
        UnknownNameError: no runtime runs artifacts of that target; the message lists the known ones.
    """
    table = RUNTIMES_OF.get(transport.name.partition(":")[0], RUNTIMES)
    runtime: Runtime = _resolve("runtime", table, target)(transport, threads, progress=progress)
    return runtime


def _resolve(table_name: str, table: dict[str, str], name: str) -> Any:
    """Import the function or class that `table` lists under `name` as "module:attribute"."""
    if name not in table:
        raise UnknownNameError(f"'{name}' is not a known {table_name}. Known: {', '.join(sorted(table))}.")
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
