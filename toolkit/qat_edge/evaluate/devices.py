"""Devices reached and worked on side by side: each in a thread of its own, none stopped by another's failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from typing import TypeVar

from qat_edge.config import ValidateOptions
from qat_edge.errors import QatEdgeError, UsageError
from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import DeviceError as TransportLevelError
from qat_edge_devices.device_errors import UnknownNameError
from qat_edge_devices.transport import Access, Transport

LOCAL = "local"
FAILURES = (TransportLevelError, QatEdgeError)
Result = TypeVar("Result")


def report_paths(folder: Path, devices: Sequence[str]) -> dict[str, Path]:
    """The file of each device's report: "ssh://pi@kitchen:2222" -> folder/ssh-pi@kitchen-2222.json.

    Raises:
        UsageError: a device is named twice, or two have names that differ in punctuation only.
    """
    paths = {device: folder / f"{file_name(device)}.json" for device in devices}
    if len(set(paths.values())) != len(devices):
        raise UsageError(f"--device: {', '.join(devices)} name one device more than once. Name each once.")
    return paths


def file_name(device: str) -> str:
    """A device's name as files have it, without suffix."""
    return re.sub(r"[^A-Za-z0-9@._-]+", "-", device).strip("-")


def connect(options: ValidateOptions, stack: ExitStack) -> tuple[dict[str, Transport], dict[str, str]]:
    """Devices that can be reached, closed with `stack`; and why the others cannot.

    Raises:
        UsageError: there is no such kind of device.
    """
    there = Access(options.device_python, options.device_folder, options.ssh_config)
    reached: dict[str, Transport] = {}
    failures: dict[str, str] = {}
    for device in options.device:
        try:
            # This machine's Python and folders are known; the options are about the others.
            transport = open_transport(device, Access() if device == LOCAL else there)
        except UnknownNameError as error:
            raise UsageError(f"--device {device}: {error}") from error
        except TransportLevelError as error:
            failures[device] = str(error)
            continue
        stack.callback(transport.close)
        reached[device] = transport
    return reached, failures


def side_by_side(
    transports: Mapping[str, Transport], work: Callable[[str, Transport], Result]
) -> tuple[dict[str, Result], dict[str, str]]:
    """What `work` gives for each device, and why it failed on others. Ctrl-C ends what runs on all of them.

    This machine comes first and alone: serving the others would disturb what is timed here.
    """
    results: dict[str, Result] = {}
    failures: dict[str, str] = {}
    here = {device: transport for device, transport in transports.items() if device == LOCAL}
    others = {device: transport for device, transport in transports.items() if device != LOCAL}
    for group in filter(None, (here, others)):
        for device, future in _started(group, work).items():
            try:
                results[device] = future.result()
            except FAILURES as error:
                failures[device] = str(error)
    return results, failures


def _started(
    transports: Mapping[str, Transport], work: Callable[[str, Transport], Result]
) -> dict[str, Future[Result]]:
    """One finished future a device."""
    with ThreadPoolExecutor(len(transports)) as pool:
        # A new thread has an empty context: hand it ours, with the reporter in force.
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
