"""Accuracy of PTQ and QAT at 4 bits: `python -m benchmarks.accuracy` measures it and writes docs/accuracy.md.

A cell is one measurement. Each finished cell is a JSON file in the work folder, so an interrupted benchmark resumes
where it stopped, and a changed setting is measured as another cell. The cells of the report are stored next to it, in
docs/accuracy.json, and are not measured again either.

    settings.py       tasks, recipes and amounts
    schedule.py       lists the cells and measures the missing ones
    runner.py         trains and measures with the product's own commands
    accuracy_page.py  writes the report from the cells
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import settings
from benchmarks.settings import PARTS, SETTINGS
from qat_edge import progress
from qat_edge.cli.console import ConsoleReporter
from qat_edge.errors import QatEdgeError, UsageError
from qat_edge.logs import quiet_libraries

if TYPE_CHECKING:
    from benchmarks.runner import BenchmarkRunner

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the benchmark and write the report."""
    given = _parser().parse_args()
    quiet_libraries(verbose=False)
    from benchmarks import accuracy_page, schedule  # they import torch

    try:
        settings.check_recipes()
        runner = _runner(given)
        parts = given.only or PARTS
        if given.jobs > 1 and not given.page_only:
            schedule.run_in_parallel(runner, parts, given.seeds, given.jobs)
        elif not given.page_only:
            schedule.run(runner, schedule.make_jobs(runner, parts, given.seeds))

        # The report covers all parts, recipes and seeds, whichever ran now; missing cells show as not measured.
        every = replace(runner.setting, ablation_rows=len(settings.ABLATION), side_seeds=len(given.seeds))
        jobs = schedule.make_jobs(replace(runner, setting=every), PARTS, given.seeds)
        path = accuracy_page.write(runner, jobs, given.seeds, given.out)
        progress.info(f"Wrote {path}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: finished cells are kept. Run it again to resume.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=main.__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="amounts; by default reduced on a CPU, full on CUDA")
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="run this part; repeat for several; all by default"
    )
    parser.add_argument(
        "--recipes", type=int, help="run the first N recipes of the ablation; by default as many as the setting has"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="random seeds; 0 1 2 by default")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes to run at once, each with one thread; 1 by default"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device to train on")
    parser.add_argument("--model", help="base model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "accuracy", help="work folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md", help="report to write")
    parser.add_argument(
        "--page-only", "--document", action="store_true", help="measure nothing, write the report of the finished cells"
    )
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and artifacts, about 20 GB")
    return parser


def _runner(given: argparse.Namespace) -> BenchmarkRunner:
    """Return the runner that the flags describe.

    Raises:
        UsageError: a repeated or negative seed, a number of recipes out of range, or fewer than one process.
    """
    if given.jobs < 1:
        raise UsageError(f"--jobs {given.jobs}: give 1 or more.")
    if len(set(given.seeds)) != len(given.seeds) or min(given.seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, given.seeds))}: give each seed once, 0 or larger.")
    if given.recipes is not None and not 0 <= given.recipes <= len(settings.ABLATION):
        raise UsageError(f"--recipes {given.recipes}: give 0 to {len(settings.ABLATION)}.")

    # Imported now: they take seconds, which --help and wrong flags should not cost.
    from benchmarks.runner import BenchmarkRunner
    from qat_edge.models.demo_model import fetch_demo_model
    from qat_edge.train.setup import choose_device

    device = choose_device(given.device)
    setting = SETTINGS[given.setting or ("full" if device == "cuda" else "reduced")]
    if given.recipes is not None:
        setting = replace(setting, ablation_rows=given.recipes)

    # Commands run with the repository as their folder, so a relative path of a model must not depend on ours.
    model = given.model or fetch_demo_model(ROOT / ".cache" / "qat-edge")
    if Path(model).exists():
        model = str(Path(model).resolve())
    progress.info(f"Setting {setting.name} on {device}: {setting.steps} steps, seeds {' '.join(map(str, given.seeds))}")
    return BenchmarkRunner(
        given.work, model, device, setting, keep=given.keep, published=given.out.with_suffix(".json")
    )


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
