"""Transport to headless Chromium on this machine: a served work folder, and one browser per program.

A program is a page: `run(("agent/agent.html", "request.json", "results"), ...)` opens it with the names in its address.
The page reports its exit code and its lines to the server, so callers see what they see of a program anywhere.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty
from typing import IO, Any
from urllib.parse import urlencode

from qat_edge_devices import chromium
from qat_edge_devices.agent import machine
from qat_edge_devices.device_errors import (
    CancelledError,
    DeviceTimeoutError,
    KilledError,
    TransportError,
    tail,
)
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.onnxruntime_web import cache_folder, fetch_archive
from qat_edge_devices.page_server import PageEnd, PageServer
from qat_edge_devices.processor import Processor
from qat_edge_devices.transport import Access, CompletedProgram, DeviceInfo, work_path

OPENS_S = 60.0  # from the start of Chromium to the page's first sign of life
SILENT_S = 30.0  # without a sign of life, which a page gives every two seconds
STILL_S = 600.0  # without a step: loading gigabytes and compiling shaders take minutes
ADDRESS_SPACE_BYTES = 4 * 1024**3  # of WebAssembly with 32-bit addresses
DESKTOP = re.compile(
    "dbus|idle_linux|vaapi|sandbox_linux", re.IGNORECASE
)  # in messages that every headless start writes
MOST_STDERR_BYTES = 1024**2
CRASHED = (
    "The page crashed: memory ran out, in most cases. Export a smaller model or a shorter context, or free memory."
)


def open_browser(address: str, access: Access) -> BrowserTransport:
    """Return a transport to Chromium that computes with WebAssembly; `address` is its path, or empty."""
    return BrowserTransport("browser", address, access)


def open_browser_webgpu(address: str, access: Access) -> BrowserTransport:
    """Return a transport to Chromium that computes with WebGPU."""
    return BrowserTransport("browser-webgpu", address, access)


class BrowserTransport:
    """Headless Chromium on this machine.

    Attributes:
        archive: onnxruntime-web as npm packs it.
        folder: files that the page reads and writes; `close` removes it.
        profiles: everything that Chromium writes; `close` removes it.

    Args:
        kind: "browser" or "browser-webgpu".
        address: path of Chromium; empty to look in PATH.
        access: `folder` names the place of work folder and downloads.
    """

    def __init__(self, kind: str, address: str, access: Access) -> None:
        self.name = f"{kind}:{address}" if address else kind
        self._has_gpu = kind == "browser-webgpu"
        chromium.require_proc(self.name)
        self.python = chromium.find_chromium(kind, address)
        self.version = chromium.read_version(self.name, self.python)
        root = None if access.folder is None else Path(access.folder)
        self.archive = fetch_archive(self.name, cache_folder() if root is None else root)
        self._cancelled = threading.Event()
        self._temporary = tempfile.TemporaryDirectory(prefix="qat-edge-browser-", dir=root, ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        self._served = LocalTransport(root=self.folder)
        # Not below `folder`: Chromium makes a socket there, whose path may have about 100 characters.
        self._profiles = tempfile.TemporaryDirectory(prefix="qat-edge-chromium-", ignore_cleanup_errors=True)
        self.profiles = Path(self._profiles.name)

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Link files into the served folder."""
        self._served.push(files, keep)

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Open the page argv[0] with the names of a request and a results folder, until it reports its end.

        Raises:
            KilledError: the page or Chromium crashed.
            DeviceTimeoutError: it exceeded `timeout_s`, or `STILL_S` without a step.
        """
        page, request, results = argv
        # Results of an earlier page, whose files this one would append to.
        shutil.rmtree(self._served.folder / work_path(self.name, results), ignore_errors=True)
        profile = Path(tempfile.mkdtemp(dir=self.profiles))
        browser: list[subprocess.Popen[bytes]] = []
        server = PageServer(self._served.folder, lambda forget: self._machine(browser[0].pid, forget))
        url = f"{server.url}{page}?{urlencode({'request': request, 'results': results})}"
        flags = ("--enable-unsafe-webgpu", "--enable-features=Vulkan") if self._has_gpu else ("--disable-gpu",)

        with tempfile.TemporaryFile("w+b") as stderr, server.serving():
            with chromium.started(self.name, self.python, url, profile, flags, stderr) as process:
                browser.append(process)
                lines, end = self._wait(server, process, timeout_s, on_line, stderr)
            return CompletedProgram(end.code, "".join(f"{line}\n" for line in lines), f"{_text(stderr)}\n{end.message}")

    def _wait(
        self,
        server: PageServer,
        process: subprocess.Popen[bytes],
        timeout_s: float,
        on_line: Callable[[str], None] | None,
        stderr: IO[bytes],
    ) -> tuple[list[str], PageEnd]:
        """Return the page's lines and its end, or raise once it cannot be expected any more."""
        lines: list[str] = []
        began = time.monotonic()
        while True:
            if self._cancelled.is_set():
                raise CancelledError(f"{self.name}: cancelled.")
            try:
                event = server.events.get(timeout=0.2)
            except Empty:
                self._require_alive(server, process, began, timeout_s, stderr)
                continue
            if isinstance(event, PageEnd):
                return lines, event
            lines.append(event)
            if on_line is not None:
                on_line(event)

    def _require_alive(
        self, server: PageServer, process: subprocess.Popen[bytes], began: float, timeout_s: float, stderr: IO[bytes]
    ) -> None:
        now, signs = time.monotonic(), server.signs
        last_lines = f"Last lines of Chromium's stderr:{tail(_text(stderr))}"
        if process.poll() is not None:
            raise KilledError(f"{self.name}: {self.python} ended with exit code {process.returncode}. {last_lines}")
        if signs.heard is None and now - began > OPENS_S:
            raise TransportError(f"{self.name}: {self.python} did not open the page within {OPENS_S:g} s. {last_lines}")
        if signs.heard is not None and now - signs.heard > SILENT_S:
            raise KilledError(f"{self.name}: nothing was heard of the page for {SILENT_S:g} s. {CRASHED} {last_lines}")
        if now - signs.moved > STILL_S or now - began > timeout_s:
            limit = f"{timeout_s:g} s" if now - began > timeout_s else f"{STILL_S:g} s without a step"
            raise DeviceTimeoutError(
                f"{self.name}: the page ran past {limit} and was stopped. Request less. {last_lines}"
            )

    def _machine(self, session: int, forget_peaks: bool) -> dict[str, Any]:
        """Return CPU time of all of Chromium, and memory of the page's process and, with WebGPU, of the GPU's."""
        processes = chromium.processes_of(session)
        renderers = [each for each in processes if each.type == "renderer"]
        holding = [max(renderers, key=lambda each: each.peak_bytes)] if renderers else []
        if self._has_gpu:
            holding += [each for each in processes if each.type == "gpu-process"]
        return {
            "cpu_s": sum(each.cpu_s for each in processes),
            "peak_forgotten": forget_peaks and chromium.forget_peaks(holding),
            "resident_bytes": sum(each.resident_bytes for each in holding),
            "peak_bytes": sum(each.peak_bytes for each in holding),
            "state": machine.machine_state(),
        }

    def pull(self, remote: str, local: Path) -> None:
        """Link `remote` to `local`."""
        self._served.pull(remote, local)

    def info(self) -> DeviceInfo:
        """Describe this machine with the browser as its system, and WebAssembly or WebGPU as its architecture."""
        info = self._served.info()
        free = info.free_memory_bytes
        return dataclasses.replace(
            info,
            machine="webgpu" if self._has_gpu else "wasm32",
            processor=Processor.OTHER if self._has_gpu else Processor.WASM,
            bits=32,
            os=f"{self.version} on {info.os}",
            free_memory_bytes=ADDRESS_SPACE_BYTES if free is None else min(free, ADDRESS_SPACE_BYTES),
        )

    def cancel(self) -> None:
        """End the running page; see `Transport.cancel`."""
        self._cancelled.set()

    def close(self) -> None:
        """Remove the work folder with everything that Chromium wrote."""
        self._served.close()
        self._temporary.cleanup()
        self._profiles.cleanup()


def _text(stderr: IO[bytes]) -> str:
    """Return the end of a file that Chromium may still write to, without what it says where there is no desktop."""
    stderr.seek(0, 2)
    stderr.seek(max(0, stderr.tell() - MOST_STDERR_BYTES))
    lines = stderr.read().decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if not DESKTOP.search(line))
