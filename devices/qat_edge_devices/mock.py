"""Transport to a device in memory, for tests: no file is linked and no process started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.transport import CompletedProgram, DeviceInfo

Handler = Callable[[Sequence[str], dict[str, bytes]], CompletedProgram]


class MockTransport:
    """Keeps pushed files in memory and runs programs by calling a function.

    Attributes:
        files: pushed files, name on the device -> bytes.
        calls: the calls it received, in order: ("push", name), ("run", *argv), ("pull", name), ("cancel",), ("close",).
        described: the return value of `info`.

    Args:
        handler: called by `run` with argv and `files`; it adds the files that the program would write.
        name: name of the device.
        python: Python interpreter of the device.
    """

    def __init__(self, handler: Handler, *, name: str = "mock", python: str = "python3") -> None:
        self.name = name
        self.python = python
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, ...]] = []
        self.described = DeviceInfo(machine="x86_64", cpu_model="none", cores=1, memory_bytes=0, os="none")
        self._handler = handler

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Read each file, or every file below a folder, into `files`."""
        for remote, local in files.items():
            self.calls.append(("push", remote))
            # A folder becomes one entry per file, named relative to it.
            sources = sorted(p for p in local.rglob("*") if p.is_file()) if local.is_dir() else [local]
            for source in sources:
                below = source.relative_to(local).as_posix()
                self.files[remote if below == "." else f"{remote}/{below}"] = source.read_bytes()

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Return the result of the handler, and pass its stdout to `on_line`."""
        self.calls.append(("run", *argv))
        completed = self._handler(argv, self.files)
        # A real transport calls it while the program runs; here the program has ended already.
        if on_line is not None:
            for line in completed.stdout.splitlines():
                on_line(line)
        return completed

    def pull(self, remote: str, local: Path) -> None:
        """Write the file `remote`, or every file below it, to `local`."""
        self.calls.append(("pull", remote))
        found = {
            name: content for name, content in self.files.items() if name == remote or name.startswith(f"{remote}/")
        }
        if not found:
            raise TransportError(f"{self.name}: there is no {remote} on the device.")
        # A file keeps the name that the caller chose; files of a folder keep their paths below it.
        for name, content in found.items():
            target = local if name == remote else local / name.removeprefix(f"{remote}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def info(self) -> DeviceInfo:
        """Return `described`."""
        return self.described

    def cancel(self) -> None:
        """Record the call."""
        self.calls.append(("cancel",))

    def close(self) -> None:
        """Record the call and drop the files."""
        self.calls.append(("close",))
        self.files.clear()
