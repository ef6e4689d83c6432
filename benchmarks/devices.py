"""Cost of validating on several devices at once: `python -m benchmarks.devices RUN` validates on 1, then on 8.

The devices are folders on this machine with replayed runtimes: a first validation runs every program and records its
results and duration; later ones sleep for that long and return the recorded results. A device then takes its time
without using a core, so the benchmark measures the work of this machine, which sends, fetches and compares for all
devices. `--real` runs the programs every time instead, on as many devices as there are cores.
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

import psutil

from qat_edge.logs import quiet_libraries
from qat_edge.options import ValidateOptions
from qat_edge.run import Run
from qat_edge.verbs.validate import require_success, validate_devices
from qat_edge_devices import TRANSPORTS
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.transport import Access, CompletedProgram

COUNT = 8
KIND = "replayed"


@dataclass
class Recording:
    """Recorded runs of programs, shared by all devices.

    Attributes:
        folder: where the results are kept.
        runs: key of a program with its inputs -> how it ended, and after how many seconds.
        at_work: times at which a file was sent or fetched, by time.perf_counter.
        is_replayed: return recorded results; False runs the programs every time.
    """

    folder: Path
    runs: dict[str, tuple[CompletedProgram, float]] = field(default_factory=dict)
    at_work: list[float] = field(default_factory=list)
    is_replayed: bool = True


def main() -> None:
    """Validate on one device and on several at once, and print seconds and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.devices", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run with exports, such as runs/demo")
    parser.add_argument("--real", action="store_true", help="run the programs, on as many devices as there are cores")
    parser.add_argument("--target", default="executorch", help="which export, executorch by default")
    for name, default in (("tokens", 512), ("prompts", 4)):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{name} of each validation, {default} by default"
        )
    given = parser.parse_args()
    quiet_libraries(verbose=False)
    count = os.cpu_count() or 1 if given.real else COUNT
    options = ValidateOptions(
        target=(given.target,), tokens=given.tokens, prompts=given.prompts, threads=1, prefill=32, decode=32, repeats=2
    )
    # Next to the run, on the same file system: the copy then consists of links.
    with tempfile.TemporaryDirectory(dir=given.run.parent, prefix=".devices-") as name:
        run = Run(Path(name) / "run")
        shutil.copytree(given.run, run.path, copy_function=os.link, ignore=shutil.ignore_patterns("reports"))
        recording = Recording(Path(name), is_replayed=not given.real)
        TRANSPORTS[KIND] = f"{__name__}:open_replayed"
        ReplayedTransport.recording = recording
        if not given.real:
            timed(run, options, 1, recording)  # makes the recording
        one, many = (timed(run, options, n, recording) for n in (1, count))
    for title, alone, together in zip(("validate", "part of it on devices"), one, many, strict=True):
        print(f"{title}: 1 device {alone:.2f} s, {count} at once {together:.2f} s, ratio {together / alone:.2f}")
    print(f"{os.cpu_count()} cores, load average {psutil.getloadavg()[0]:.1f}")


def timed(run: Run, options: ValidateOptions, count: int, recording: Recording) -> tuple[float, float]:
    """Return seconds of a validation on `count` devices: in all, and from the first file sent to the last result."""
    recording.at_work.clear()
    options = replace(options, device=tuple(f"{KIND}:{n}" for n in range(count)))
    began = time.perf_counter()
    require_success(validate_devices(run, options, force=True))
    return time.perf_counter() - began, max(recording.at_work) - min(recording.at_work)


def open_replayed(address: str, access: Access) -> ReplayedTransport:
    """Open a device: a folder on this machine. Registered in TRANSPORTS."""
    return ReplayedTransport(address)


class ReplayedTransport(LocalTransport):
    """Transport that runs a program once, and later sleeps as long and returns the recorded results."""

    recording: Recording

    def __init__(self, name: str) -> None:
        super().__init__(root=self.recording.folder)
        self.name = f"{KIND}:{name}"
        self._given: dict[str, int] = {}

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Send files as the local transport does, and note the time."""
        self.recording.at_work.append(time.perf_counter())
        super().push(files, keep)
        self._given |= {remote: local.stat().st_ino for remote, local in files.items() if keep}

    def pull(self, remote: str, local: Path) -> None:
        """Fetch a file as the local transport does, and note the time."""
        super().pull(remote, local)
        self.recording.at_work.append(time.perf_counter())

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Run a program, or replay its recorded run."""
        key = self._key(argv)
        results, kept = self.folder / "results", self.recording.folder / f"results-{key}"
        if key in self.recording.runs:
            # Take as long as the recorded run did, without using a core.
            completed, seconds = self.recording.runs[key]
            time.sleep(seconds)
            shutil.rmtree(results, ignore_errors=True)
            shutil.copytree(kept, results, copy_function=os.link)
            return completed

        began = time.perf_counter()
        completed = super().run(argv, timeout_s, env, on_line)
        # A failed program is not recorded: it runs again, and reports its failure again.
        if self.recording.is_replayed and completed.returncode == 0:
            shutil.copytree(results, kept, copy_function=os.link)
            self.recording.runs[key] = completed, time.perf_counter() - began
        return completed

    def _key(self, argv: Sequence[str]) -> str:
        """Key of a program, its request and its files, which are links to the same files for all devices."""
        request = (self.folder / "request.json").read_bytes()
        given = (tuple(argv), request, tuple(sorted(self._given.items())))
        return hashlib.sha256(repr(given).encode()).hexdigest()


if __name__ == "__main__":
    # The transport is resolved as `benchmarks.devices`, so main() must set the recording of that module, not __main__.
    from benchmarks import devices

    devices.main()
