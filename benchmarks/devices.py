"""What devices at once cost beside one alone: `python -m benchmarks.devices RUN` validates 1, then 8.

The devices are folders of this machine, and their runtimes mocks: a first validation runs every program and keeps its
results and its time, which are then answered after sleeping as long. So a device takes the time that it took, and no
core; what is seen is this machine's side, which sends, brings back and compares for all of them. `--real` runs the
programs each time instead, on as many devices as there are cores.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qat_edge.config import ValidateOptions
from qat_edge.logs import quiet_libraries
from qat_edge.run import Run
from qat_edge.verbs.validate import require_success, validate_devices
from qat_edge_devices import TRANSPORTS
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.transport import Access, Completed

COUNT = 8
KIND = "replayed"


@dataclass
class Recording:
    """What programs did, by what they were given; and when devices were at work, by time.perf_counter."""

    folder: Path
    answers: dict[str, tuple[Completed, float]] = field(default_factory=dict)
    at_work: list[float] = field(default_factory=list)
    is_replayed: bool = True


def main() -> None:
    """Validate on one device and on several at once, and print seconds and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run with exports, such as runs/demo")
    parser.add_argument("--real", action="store_true", help="run the programs, on as many devices as there are cores")
    parser.add_argument("--target", default="executorch", help="which export, executorch by default")
    for name, default in (("tokens", 512), ("prompts", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"of each validation, {default} by default")
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    count = os.cpu_count() or 1 if given.real else COUNT
    asked = ValidateOptions(
        target=(given.target,), tokens=given.tokens, prompts=given.prompts, threads=1, prefill=32, decode=32, repeats=2
    )
    # Beside the run, so that nothing but links is made.
    with tempfile.TemporaryDirectory(dir=given.run.parent, prefix=".devices-") as name:
        run = Run(Path(name) / "run")
        shutil.copytree(given.run, run.path, copy_function=os.link, ignore=shutil.ignore_patterns("reports"))
        recording = Recording(Path(name), is_replayed=not given.real)
        TRANSPORTS[KIND] = f"{__name__}:open_replayed"
        ReplayedTransport.recording = recording
        if not given.real:
            timed(run, asked, 1, recording)
        one, many = (timed(run, asked, n, recording) for n in (1, count))
    for what, alone, together in zip(("validate", "of it on devices"), one, many, strict=True):
        print(f"{what}: 1 device {alone:.2f} s, {count} at once {together:.2f} s, ratio {together / alone:.2f}")
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")


def timed(run: Run, asked: ValidateOptions, count: int, recording: Recording) -> tuple[float, float]:
    """Seconds of a validation on `count` devices, in all and from the first file sent to the last result."""
    recording.at_work.clear()
    options = replace(asked, device=tuple(f"{KIND}:{n}" for n in range(count)))
    began = time.perf_counter()
    require_success(validate_devices(run, options, force=True))
    return time.perf_counter() - began, max(recording.at_work) - min(recording.at_work)


def open_replayed(address: str, access: Access) -> ReplayedTransport:
    """A device of that name, in a folder of this machine."""
    return ReplayedTransport(address)


class ReplayedTransport(LocalTransport):
    """Runs a program once, and answers the second time what it answered then, after as long."""

    recording: Recording

    def __init__(self, name: str) -> None:
        super().__init__(root=self.recording.folder)
        self.name = f"{KIND}:{name}"
        self._given: dict[str, int] = {}

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """As this machine does."""
        self.recording.at_work.append(time.perf_counter())
        super().push(files, keep)
        self._given |= {remote: local.stat().st_ino for remote, local in files.items() if keep}

    def pull(self, remote: str, local: Path) -> None:
        """As this machine does."""
        super().pull(remote, local)
        self.recording.at_work.append(time.perf_counter())

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """See the class."""
        key = self._key(argv)
        results, kept = self.folder / "results", self.recording.folder / f"results-{key}"
        if key in self.recording.answers:
            completed, seconds = self.recording.answers[key]
            time.sleep(seconds)
            shutil.rmtree(results, ignore_errors=True)
            shutil.copytree(kept, results, copy_function=os.link)
            return completed
        began = time.perf_counter()
        completed = super().run(argv, timeout_s, env, on_line)
        if self.recording.is_replayed and completed.returncode == 0:
            shutil.copytree(results, kept, copy_function=os.link)
            self.recording.answers[key] = completed, time.perf_counter() - began
        return completed

    def _key(self, argv: Sequence[str]) -> str:
        """Of the program, its request and the files that it was sent, which are links to the same for all."""
        request = (self.folder / "request.json").read_bytes()
        given = (tuple(argv), request, tuple(sorted(self._given.items())))
        return hashlib.sha256(repr(given).encode()).hexdigest()


if __name__ == "__main__":
    from benchmarks import devices  # the transport is found by this name, and shares what it finds there

    devices.main()
