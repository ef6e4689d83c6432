"""Run every step on a real model: the commands that a user would type, each in its own process, timed."""

from __future__ import annotations

import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from qat_edge import config, progress, stop_signals
from qat_edge.demo_data import assistant
from qat_edge.errors import QatEdgeError
from qat_edge.models.demo_model import fetch_demo_model
from qat_edge.models.wheels import cache_folder
from qat_edge.options import ExportOptions, FinetuneOptions
from qat_edge.peak_memory import wait_for
from qat_edge.python_process import python_command
from qat_edge.run import Run
from qat_edge_exporters.targets import EXECUTORCH, require_installed

QUESTION = "Wake me at 7:15 am"
# With these, two cores take ten to twelve minutes for everything.
FINETUNE = [
    "--steps", "45", "--batch-size", "8", "--eval-rows", "32", "--max-length", "192", "--calibration-tokens", "8192",
]  # fmt: skip
VALIDATE = ["--tokens", "512", "--prompts", "32", "--repeats", "2"]


@dataclass(frozen=True)
class Stage:
    """One command of the demo.

    Attributes:
        name: of the command.
        wall_s: time it took.
        peak_memory_bytes: of its largest process.
    """

    name: str
    wall_s: float
    peak_memory_bytes: int


def demo(out: Path, config_path: Path | None) -> list[Stage]:
    """Run finetune, export, verify, validate, report and generate into `out`, replacing an earlier demo.

    Args:
        out: run folder; the data is written next to it.
        config_path: configuration of model, data and steps, in place of the demo's own.

    Raises:
        UsageError: an extra that a stage needs is not installed.
        QatEdgeError: a stage failed; it has printed the reason.
    """
    exporting = config.load(ExportOptions, "export", config_path, {})
    require_installed((EXECUTORCH, *exporting.target))

    # The demo generates its data and fetches its model, unless a configuration names others.
    given = ["--config", str(config_path)] if config_path else []
    if config_path:
        options = config.load(FinetuneOptions, "finetune", config_path, {})
        progress.info(f"qat-edge demo: every step with {config_path}: {options.model}, trained on {options.data}")
        given_finetune = given
    else:
        progress.info("qat-edge demo: SmolLM2-135M-Instruct learns to answer phone requests with JSON tool calls.")
        train, held_out = assistant.write(out.parent / f"{out.name}-data")
        progress.info(
            f"Data: {assistant.TRAIN_ROWS} generated requests in {train}, {assistant.EVAL_ROWS} held out in {held_out}"
        )
        source = fetch_demo_model(cache_folder())
        given_finetune = ["--model", source, "--data", str(train), "--eval-data", str(held_out), *FINETUNE]

    # --force only where an earlier demo is in the way.
    run = str(out)
    replace = ["--force"] if Run(out).config.is_file() else []
    stages = [
        _run_stage(["finetune", *given_finetune, "--out", run, *replace]),
        _run_stage(["export", run, *given]),
        _run_stage(["verify", run]),
        _run_stage(["validate", run, *(given or VALIDATE)]),
        _run_stage(["report", run]),
        _run_stage(["generate", run, "--from", EXECUTORCH, "--system", assistant.SYSTEM, QUESTION]),
    ]
    return stages


def _run_stage(arguments: list[str]) -> Stage:
    """Run one command in its own process, whose output goes to the terminal.

    Raises:
        QatEdgeError: it failed.
    """
    progress.info(f"\n$ qat-edge {shlex.join(arguments)}")
    began = time.monotonic()
    process = subprocess.Popen(python_command("qat_edge", *arguments), stdin=subprocess.DEVNULL)
    with stop_signals.passed_on(process):
        peak_bytes = wait_for(process)
    if process.returncode != 0:
        raise QatEdgeError(f"The demo stops here: `qat-edge {arguments[0]}` ended with exit code {process.returncode}.")
    return Stage(arguments[0], time.monotonic() - began, peak_bytes)
