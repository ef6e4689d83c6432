"""A device in memory, for tests of whatever calls a transport: no file is linked, no process started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.transport import Completed, DeviceInfo

Handler = Callable[[Sequence[str], dict[str, bytes]], Completed]


class MockTransport:
    """Keeps pushed files in `files` (name on the device -> bytes) and answers `run` by `handler`.

    The handler is given argv and `files`, where it leaves what the program would have written. `calls` lists
    what was asked, in order: ("push", name), ("run", *argv), ("pull", name), ("cancel",), ("close",). `described`
    is what `info` answers.
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
    ) -> Completed:
        """What the handler says."""
        self.calls.append(("run", *argv))
        completed = self._handler(argv, self.files)
        if on_line is not None:
            for line in completed.stdout.splitlines():
                on_line(line)
        return completed

    def pull(self, remote: str, local: Path) -> None:
        """Write the file `remote`, or every file below it, to `local`."""
        self.calls.append(("pull", remote))
        found = {k: v for k, v in self.files.items() if k == remote or k.startswith(f"{remote}/")}
        if not found:
            raise TransportError(f"{self.name}: there is no {remote} on the device.")
        for name, content in found.items():
            target = local if name == remote else local / name.removeprefix(f"{remote}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def info(self) -> DeviceInfo:
        """What the test said, or a machine that nobody owns."""
        return self.described

    def cancel(self) -> None:
        """Remember that it was asked."""
        self.calls.append(("cancel",))

    def close(self) -> None:
        """Forget the files."""
        self.calls.append(("close",))
        self.files.clear()
