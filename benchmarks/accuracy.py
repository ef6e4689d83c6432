"""What 4 bits cost and QAT-LoRA wins back: `python -m benchmarks.accuracy` measures it and writes docs/accuracy.md.

Each finished cell is a JSON file in the work folder; a run that was stopped goes on where it was, and a changed
setting is measured as another cell. The cells of the report itself lie beside it, and are not measured again either.
`settings.py` holds recipes and amounts; `plan.py` lists the cells, `lab.py` trains and measures with the product's own
commands, `document.py` writes the report from the JSON alone.
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
    from benchmarks.lab import Lab

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the benchmark and write the report."""
    given = _parser().parse_args()
    quiet_libraries(verbose=False)
    from benchmarks import document, plan  # they import torch

    try:
        settings.check_recipes()
        lab = _lab(given)
        parts = given.only or PARTS
        if given.jobs > 1 and not given.document:
            plan.run_side_by_side(lab, parts, given.seeds, given.jobs)
        elif not given.document:
            plan.run(lab, plan.plan(lab, parts, given.seeds))
        # Of all parts and recipes, whatever was run now: what is missing stands there as not measured.
        whole = replace(lab, setting=replace(lab.setting, ablation_rows=len(settings.ABLATION)))
        path = document.write(whole, plan.plan(whole, PARTS, given.seeds), given.seeds, given.out)
        progress.info(f"Wrote {path}")
    except QatEdgeError as error:
        raise SystemExit(f"Error: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("Interrupted: what is finished is kept. Run it again to go on.") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=main.__doc__)
    parser.add_argument("--setting", choices=SETTINGS, help="how much is run; reduced on a CPU, full on CUDA")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part to run; all where not given")
    parser.add_argument("--recipes", type=int, help="of the ablation, the first so many; the setting's where not given")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="seeds, 0 1 2 by default")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes side by side, each with one thread; 1 by default"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--model", help="base model; SmolLM2-135M-Instruct where not given")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "accuracy", help="work folder")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy.md", help="report to write")
    parser.add_argument("--document", action="store_true", help="measure nothing, write the report of what is there")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and artifacts, about 20 GB")
    return parser


def _lab(given: argparse.Namespace) -> Lab:
    """The lab that the flags ask for.

    Raises:
        UsageError: a seed twice, or below zero; more recipes than there are, or less than none; no process.
    """
    if given.jobs < 1:
        raise UsageError(f"--jobs {given.jobs}: give 1 or more.")
    if len(set(given.seeds)) != len(given.seeds) or min(given.seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, given.seeds))}: give each once, from 0 on.")
    if given.recipes is not None and not 0 <= given.recipes <= len(settings.ABLATION):
        raise UsageError(f"--recipes {given.recipes}: there are {len(settings.ABLATION)}.")
    from benchmarks.lab import Lab
    from qat_edge.models import load
    from qat_edge.train.setup import choose_device

    device = choose_device(given.device)
    setting = SETTINGS[given.setting or ("full" if device == "cuda" else "reduced")]
    if given.recipes is not None:
        setting = replace(setting, ablation_rows=given.recipes)
    model = given.model or load.demo_model(ROOT / ".cache" / "qat-edge")
    if Path(model).exists():
        model = str(Path(model).resolve())
    progress.info(f"Setting {setting.name} on {device}: {setting.steps} steps, seeds {' '.join(map(str, given.seeds))}")
    return Lab(given.work, model, device, setting, keep=given.keep, published=given.out.with_suffix(".json"))


if __name__ == "__main__":
    progress.use(ConsoleReporter())
    main()
