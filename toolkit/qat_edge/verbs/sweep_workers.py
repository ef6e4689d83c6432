"""Worker processes of a sweep, each `qat-edge sweep --resume` with an output of its own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from optuna.trial import TrialState

from qat_edge import progress, remote_code, stop_signals
from qat_edge.errors import QatEdgeError
from qat_edge.python_process import python_command
from qat_edge.train.trial_store import REASON, counts
from qat_edge.verbs.sweep import Sweep

POLL_S = 1.0
KILLED = 128  # exit codes of a process that a signal ended are above it, or below 0
ERROR = "Error: "  # beginning of the message in the output of a command


class Worker(NamedTuple):
    """A worker process and the file with its output."""

    process: subprocess.Popen[bytes]
    output: Path


def run_workers(prepared: Sweep) -> None:
    """Run the workers of a sweep to their end, and report each trial that ends.

    Raises:
        QatEdgeError: A worker ended with an error; the others were stopped.
        KeyboardInterrupt: A signal came; the workers have ended in order.
    """
    folder = prepared.folder / "workers"
    folder.mkdir(exist_ok=True)
    progress.info(f"{prepared.sweep.workers} workers, whose output is in {folder}")
    seen = {trial.number for trial in prepared.store.trials() if trial.state.is_finished()}
    with ExitStack() as stack:
        workers = [_start(prepared, folder, index, stack) for index in range(prepared.sweep.workers)]
        for worker in workers:
            stack.enter_context(stop_signals.passed_on(worker.process))
        while any(worker.process.poll() is None for worker in workers):
            time.sleep(POLL_S)
            _report_new(prepared, seen)
            stop_at_error(workers)
    _report_new(prepared, seen)
    stop_at_error(workers)
    for worker in workers:
        if worker.process.returncode != 0:
            code = worker.process.returncode
            progress.warn(f"A worker was ended by a signal (exit code {code}); its output is in {worker.output}")


def _start(prepared: Sweep, folder: Path, index: int, stack: ExitStack) -> Worker:
    """Start a worker."""
    output = folder / f"{os.getpid()}-{index}.log"
    flags = ["--resume", "--out", str(prepared.folder), "--workers", "1"]
    command = python_command("qat_edge", "sweep", *flags, *([remote_code.FLAG] if remote_code.permitted() else []))
    # Each with its share of the cores, unless the user has chosen.
    threads = max(1, (os.cpu_count() or 1) // prepared.sweep.workers)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    file = stack.enter_context(output.open("wb"))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment
    )
    return Worker(process, output)


def _report_new(prepared: Sweep, seen: set[int]) -> None:
    """Report the trials that ended since the last call."""
    for trial in prepared.store.trials():
        if trial.state.is_finished() and counts(trial) and trial.number not in seen:
            seen.add(trial.number)
            reason = trial.user_attrs.get(REASON, "")
            is_complete = trial.state == TrialState.COMPLETE
            found = f"loss {trial.value:.4f}" if is_complete else f"{trial.state.name.lower()}, {reason}"
            progress.info(f"trial {trial.number}: {found}")


def stop_at_error(workers: Sequence[Worker]) -> None:
    """Stop all workers where one of them ended with an error; one that a signal ended does not stop the others.

    Raises:
        QatEdgeError: Has the worker's message.
    """
    codes = [worker.process.poll() for worker in workers]
    bad = next((index for index, code in enumerate(codes) if code is not None and 0 < code <= KILLED), None)
    if bad is None:
        return
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.wait()
    raise QatEdgeError(f"A worker ended with an error: {_message(workers[bad].output)}")


def _message(output: Path) -> str:
    """Return the message of a worker, or where its output is."""
    text = output.read_text(encoding="utf-8", errors="replace")
    message = " ".join(text.rpartition(ERROR)[2].split()) if ERROR in text else ""
    return message or f"see {output}"
