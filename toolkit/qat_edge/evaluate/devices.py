"""Connect to several devices and run work on them in parallel threads; one failure does not stop the others."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import NamedTuple, TypeVar

from qat_edge.errors import QatEdgeError, UsageError
from qat_edge.options import ValidateOptions
from qat_edge_devices import ADDRESSES_ARE_PATHS, RUNTIMES_OF, TRANSPORTS, open_transport
from qat_edge_devices.device_errors import DeviceLayerError, UnknownNameError
from qat_edge_devices.transport import Access, Transport

LOCAL = "local"
ON_THIS_MACHINE = (LOCAL, *RUNTIMES_OF)  # transports; browsers run here, too
FAILURES = (DeviceLayerError, QatEdgeError)
Result = TypeVar("Result")


class Connections(NamedTuple):
    """Devices that could be reached, by name, and the reason for each that could not."""

    transports: dict[str, Transport]
    failures: dict[str, str]


def report_paths(folder: Path, devices: Sequence[str]) -> dict[str, Path]:
    """Return the path of each device's report: "ssh://pi@kitchen:2222" -> folder/ssh-pi@kitchen-2222.json.

    Raises:
        UsageError: a device is named twice, two names differ in punctuation only, or one has no known scheme.
    """
    for device in devices:
        name = transport_name(device)
        if name not in TRANSPORTS:
            known = ", ".join(sorted(TRANSPORTS))
            raise UsageError(f"--device {device}: '{name}' is not a known transport. Known: {known}.")
    paths = {device: folder / f"{file_name(device)}.json" for device in devices}
    if len({str(path).lower() for path in paths.values()}) != len(devices):  # as macOS and Windows compare names
        raise UsageError(f"--device: {', '.join(devices)} name one device more than once. Name each once.")
    return paths


def transport_name(device: str) -> str:
    """Return the transport that a device's name begins with."""
    return device.partition(":")[0]


def require_programs(devices: Sequence[str]) -> None:
    """Require that the programs in the names of devices exist: a mistyped path is no device that failed.

    Raises:
        UsageError: names the device.
    """
    for device in devices:
        name, _, path = device.partition(":")
        if name in ADDRESSES_ARE_PATHS and path and shutil.which(path) is None:
            raise UsageError(f"--device {device}: {path} is not a program. Give the path of Chromium.")


def require_runtimes(
    options_of: Mapping[str, ValidateOptions], targets_of: Callable[[ValidateOptions], set[str]]
) -> None:
    """Require devices that can run the artifacts.

    Args:
        options_of: options by device.
        targets_of: returns the targets that are measured with given options.

    Raises:
        UsageError: a browser would have to run something else than an ONNX folder.
    """
    for device, options in options_of.items():
        known = RUNTIMES_OF.get(transport_name(device))
        if known is None:
            continue
        if options.runner_binary is not None:
            raise UsageError(f"--device {device}: a browser runs pages, no programs. Leave --runner-binary out.")
        others = sorted(targets_of(options) - set(known))
        if others:
            raise UsageError(
                f"--device {device}: a browser runs {', '.join(known)} artifacts, and these are measured as well: "
                f"{', '.join(others)}. Give --target {' '.join(known)}."
            )


def file_name(device: str) -> str:
    """Return a device's name with only the characters that are safe in file names."""
    return re.sub(r"[^A-Za-z0-9@._-]+", "-", device).strip("-")


def connect(options: ValidateOptions, stack: ExitStack) -> Connections:
    """Connect to every device of `options`; `stack` closes the connections.

    Raises:
        UsageError: a device's name has no known scheme.
    """
    access = Access(options.device_python, options.device_folder, options.ssh_config)
    transports: dict[str, Transport] = {}
    failures: dict[str, str] = {}
    for device in options.device:
        try:
            # --device-python and --device-folder are about remote devices; this machine's own are known.
            transport = open_transport(device, Access() if device == LOCAL else access)
        except UnknownNameError as error:
            raise UsageError(f"--device {device}: {error}") from error
        except DeviceLayerError as error:
            failures[device] = str(error)
            continue
        stack.callback(transport.close)
        transports[device] = transport
    return Connections(transports, failures)


def run_on_devices(
    transports: Mapping[str, Transport], work: Callable[[str, Transport], Result]
) -> tuple[dict[str, Result], dict[str, str]]:
    """Call `work` for every device and return the results by device, and the reasons of those that failed.

    This machine and its browsers run first, one at a time: other work would disturb their timing. Ctrl-C cancels the
    work on all of them.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    # In the order given, but for `local`, whose results the others are compared with.
    found = [each for each in transports if transport_name(each) in ON_THIS_MACHINE]
    here = sorted(found, key=lambda device: device != LOCAL)
    others = {device: transport for device, transport in transports.items() if device not in here}
    for group in (*({device: transports[device]} for device in here), others):
        if not group:
            continue
        for device, future in _run_in_threads(group, work).items():
            try:
                results[device] = future.result()
            except FAILURES as error:
                failures[device] = str(error)
    return results, failures


def _run_in_threads(
    transports: Mapping[str, Transport], work: Callable[[str, Transport], Result]
) -> dict[str, Future[Result]]:
    """Return one finished future per device."""
    with ThreadPoolExecutor(len(transports)) as pool:
        # A new thread starts with an empty context: run it in a copy of ours, which holds the current reporter.
        futures = {
            device: pool.submit(copy_context().run, work, device, transport) for device, transport in transports.items()
        }
        try:
            wait(futures.values())
        except BaseException:
            for transport in transports.values():
                transport.cancel()
            raise
    return futures
