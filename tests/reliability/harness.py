"""Run verbs in forked processes that are killed, interrupted, run out of disk or meet each other.

The libraries are imported once; every trial is a fork, which takes milliseconds instead of seconds to start. The parent
never trains: torch's autograd does not survive a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge.errors import QatEdgeError

# Calls of Python that change a file system, as audit events. Native code (safetensors, torch.save) has none: kills at
# random moments reach it.
OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod")
KILLED = -signal.SIGKILL
FAILED = 7  # exit code of a child that raised a QatEdgeError
BROKEN = 8  # exit code of a child that raised anything else
RESULTS = (".safetensors", ".pte", ".onnx", ".data", "bits.json")  # ends of names


@dataclass
class Child:
    """A finished child process.

    Attributes:
        code: Exit code; negative for a signal.
        output: What it wrote.
        operations: Operations on the folder, counted up to the end or the kill.
        wall_s: How long it ran.
    """

    code: int
    output: str
    operations: int
    wall_s: float


@dataclass(frozen=True)
class Scenario:
    """A verb on a run folder.

    Attributes:
        name: Of the verb.
        prepare: Makes the folder as it is before the verb.
        run: The verb. Called in a child.
        again: The command that a user repeats after a kill. Called in a child.
        intact: Returns why the folder is neither as before nor complete, None if it is.
    """

    name: str
    prepare: Callable[[Path], None]
    run: Callable[[Path], object]
    again: Callable[[Path], object]
    intact: Callable[[Path], str | None]


@dataclass
class Outcome:
    """Trials of one scenario, and those that went wrong."""

    trials: int = 0
    killed: int = 0
    faults: list[str] = field(default_factory=list)


# --- children ----------------------------------------------------------------------------------------------


def fork(action: Callable[[], object], folder: Path, kill_at: int | None = None, name: str = "") -> Running:
    """Start an action in a child.

    Args:
        action: What it does. A QatEdgeError ends it with FAILED.
        folder: Operations on files below it are counted.
        kill_at: The child is killed before this operation, counted from 0.
        name: Of its log, next to the folder; the folder's by default.
    """
    log = folder.parent / f"{name or folder.name}.log"
    count_file = folder.parent / f"{name or folder.name}.count"
    for path in (log, count_file):
        path.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _in_child(action, folder, log, count_file, kill_at)
    return Running(pid, log, count_file, time.monotonic())


@dataclass
class Running:
    """A child that was started."""

    pid: int
    log: Path
    count_file: Path
    began: float

    def wait(self) -> Child:
        """Wait until it ends."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        count = int(self.count_file.read_text() or 0) if self.count_file.is_file() else 0
        return Child(code, self.output(), count, time.monotonic() - self.began)

    def output(self) -> str:
        """Return what it wrote so far; nothing if it was killed before it opened its log."""
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def signal_after(self, seconds: float, signum: int) -> Child:
        """Send a signal after a time, unless it has ended by then."""
        time.sleep(max(0.0, self.began + seconds - time.monotonic()))
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            return Child(os.waitstatus_to_exitcode(status), self.output(), 0, seconds)
        os.kill(self.pid, signum)
        return self.wait()


def _in_child(action: Callable[[], object], folder: Path, log: Path, count_file: Path, kill_at: int | None) -> None:
    """Run an action and end the process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    counter = Counter(folder, kill_at)
    code = BROKEN
    try:
        sys.addaudithook(counter.see)
        action()
        code = 0
    except QatEdgeError as error:
        print(f"Error: {error}", flush=True)
        code = FAILED
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else BROKEN
    except BaseException:
        traceback.print_exc()
    counter.kill_at = None
    sys.stdout.flush()
    sys.stderr.flush()
    count_file.write_text(str(counter.count))
    os._exit(code)


class Counter:
    """Audit hook that counts operations on a folder and kills the process before one of them."""

    def __init__(self, folder: Path, kill_at: int | None) -> None:
        self.prefix, self.kill_at, self.count = str(folder), kill_at, 0

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Count an event."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in OPERATIONS:
            path = arguments[0]
        else:
            return
        # rmtree removes by name below an open folder: its names are relative.
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        if not text.startswith(self.prefix) and (text.startswith("/") or event not in ("os.remove", "os.rmdir")):
            return
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


# --- what a folder holds -----------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    """Return the sha256 of tensors, graphs and bits below a folder, but not those of checkpoints."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            path.is_file()
            and path.name.endswith(RESULTS)
            and not hidden
            and name.parts[0] not in ("checkpoints", "data")
        ):
            found[str(name)] = file_digest(path)
    return found


def file_digest(path: Path) -> str:
    """Return the sha256 of a file; of safetensors without regard to the order of its header."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
        data = header + data[8 + length :]
    return hashlib.sha256(data).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Return hidden names that are no part of a run."""
    return [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name not in (".lock", ".gitattributes")]


# --- trials ------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """A folder for trials."""

    root: Path

    def reference(self, scenario: Scenario) -> tuple[dict[str, str], Child]:
        """Run a scenario undisturbed; return its result and the child."""
        folder = self.fresh(scenario, "whole")
        child = fork(lambda: scenario.run(folder), folder).wait()
        if child.code != 0:
            raise SystemExit(f"{scenario.name}: undisturbed, it ended with {child.code}:\n{child.output}")
        return digest(folder), child

    def fresh(self, scenario: Scenario, name: str) -> Path:
        """Return the folder of a new trial."""
        folder = self.root / f"{scenario.name}-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        scenario.prepare(folder)
        return folder

    def kill_trials(self, scenario: Scenario, trials: int, seed: int) -> Outcome:
        """Kill a verb before operations spread over its whole run, and as often at random moments; then repeat it."""
        expected, whole = self.reference(scenario)
        draws, outcome = random.Random(seed), Outcome()
        by_operation = -(-trials // 2)
        for number in range(trials):
            folder = self.fresh(scenario, "trial")
            if number < by_operation:
                at = number * whole.operations // by_operation
                what = f"before operation {at} of {whole.operations}"
                child = fork(lambda folder=folder: scenario.run(folder), folder, kill_at=at).wait()
            else:
                after = draws.uniform(0, whole.wall_s)
                what = f"after {after:.2f} s of {whole.wall_s:.2f}"
                running = fork(lambda folder=folder: scenario.run(folder), folder)
                child = running.signal_after(after, signal.SIGKILL)
            # One in four is killed a second time while it is repeated.
            if draws.random() < 0.25:
                after = draws.uniform(0, whole.wall_s)
                what += f", and {after:.2f} s into its repetition"
                fork(lambda folder=folder: scenario.again(folder), folder).signal_after(after, signal.SIGKILL)
            outcome.trials += 1
            outcome.killed += child.code == KILLED
            fault = f"ended with {child.code}:\n{child.output}" if child.code not in (0, KILLED) else None
            fault = fault or scenario.intact(folder) or self.repeat(scenario, folder, expected)
            if fault:
                outcome.faults.append(f"{scenario.name}, killed {what}: {fault}")
        return outcome

    def repeat(self, scenario: Scenario, folder: Path, expected: dict[str, str]) -> str | None:
        """Repeat the command; return why it did not end in the undisturbed result, None if it did."""
        child = fork(lambda: scenario.again(folder), folder).wait()
        if child.code != 0:
            return f"its repetition ended with {child.code}:\n{child.output}"
        found = digest(folder)
        if found != expected:
            differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
            return f"another result: {', '.join(differ)}"
        left = leftovers(folder)
        return f"left behind: {', '.join(left)}" if left else None

    def signal_trials(self, scenario: Scenario, trials: int, seed: int) -> Outcome:
        """Interrupt a verb by each of the signals at random moments, then repeat it."""
        expected, whole = self.reference(scenario)
        draws, outcome = random.Random(seed), Outcome()
        for number in range(trials):
            signum = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[number % 3]
            folder, after = self.fresh(scenario, "trial"), draws.uniform(0, whole.wall_s)
            child = fork(lambda folder=folder: scenario.run(folder), folder).signal_after(after, signum)
            outcome.trials += 1
            outcome.killed += child.code == 128 + signum
            left = [name for name in leftovers(folder) if not name.startswith(".previous")] if folder.exists() else []
            fault = None
            # A signal before the command has installed its handlers ends it as it ends any process.
            if child.code not in (0, 128 + signum, -signum):
                fault = f"ended with {child.code}:\n{child.output}"
            elif left and child.code > 0:
                fault = f"left behind: {', '.join(left)}"
            elif child.code > 0 and "Traceback" in child.output:
                fault = f"a traceback:\n{child.output}"
            fault = fault or scenario.intact(folder) or self.repeat(scenario, folder, expected)
            if fault:
                outcome.faults.append(f"{scenario.name}, {signum!r} after {after:.2f} s: {fault}")
        return outcome

    def pair_trials(self, scenario: Scenario, trials: int) -> Outcome:
        """Start a verb twice at the same time: one does its work, the other one is refused."""
        expected, _ = self.reference(scenario)
        outcome = Outcome()
        for _ in range(trials):
            folder = self.fresh(scenario, "trial")
            first = fork(lambda folder=folder: scenario.run(folder), folder)
            second = fork(lambda folder=folder: scenario.run(folder), folder, name="second")
            children = [first.wait(), second.wait()]
            outcome.trials += 1
            codes = sorted(child.code for child in children)
            outcome.killed += codes == [0, FAILED]
            output = "".join(child.output for child in children)
            if codes != [0, FAILED] or "is in use" not in output:
                outcome.faults.append(f"{scenario.name}, twice at once: exit codes {codes}\n{output}")
            elif digest(folder) != expected:
                outcome.faults.append(f"{scenario.name}, twice at once: another result")
        return outcome

    def full_disk_trials(self, scenario: Scenario, trials: int) -> Outcome:
        """Run a verb on file systems of growing size, then make room and repeat it."""
        expected, _ = self.reference(scenario)
        needed = sum(p.stat().st_size for p in (self.root / f"{scenario.name}-whole").rglob("*") if p.is_file())
        disk, outcome = self.root / "disk", Outcome()
        disk.mkdir(exist_ok=True)
        for number in range(trials):
            size = max(64 * 1024, needed * 2 * (number + 1) // trials)
            mount(disk, size)
            try:
                folder = disk / scenario.name
                prepared = fork(lambda folder=folder: scenario.prepare(folder), disk).wait()
                if prepared.code != 0:
                    continue  # too small even for what was there before
                child = fork(lambda folder=folder: scenario.run(folder), disk).wait()
                outcome.trials += 1
                outcome.killed += child.code == FAILED
                fault = None
                if child.code not in (0, FAILED) or (child.code == FAILED and "cannot be written" not in child.output):
                    fault = f"ended with {child.code}:\n{child.output}"
                subprocess.run(["mount", "-o", f"remount,size={16 * needed + (1 << 20)}", str(disk)], check=True)
                # The log lies outside the small disk.
                fault = fault or scenario.intact(folder)
                if fault is None:
                    again = fork(lambda folder=folder: scenario.again(folder), disk).wait()
                    if again.code != 0:
                        fault = f"with room, its repetition ended with {again.code}:\n{again.output}"
                    elif digest(folder) != expected:
                        fault = "another result"
                if fault:
                    outcome.faults.append(f"{scenario.name}, on a disk of {size} bytes: {fault}")
            finally:
                subprocess.run(["umount", "--lazy", str(disk)], check=True)
        return outcome


def mount(folder: Path, size_bytes: int) -> None:
    """Mount an empty file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)], check=True)


def can_mount(root: Path) -> bool:
    """Return whether this process may mount file systems."""
    probe = root / "probe"
    probe.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(probe)], capture_output=True, check=False
    )
    if done.returncode == 0:
        subprocess.run(["umount", str(probe)], check=True)
    return done.returncode == 0
