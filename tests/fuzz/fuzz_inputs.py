"""Settings of the fuzz suite, and the valid inputs that it mutates; imported by its tests.

`make test` tries a few mutations of each input, always the same ones. `QAT_EDGE_FUZZ=1000 python -m pytest tests/fuzz`
tries so many new ones of each.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypothesis import HealthCheck, settings

from conftest import make_model, make_tokenizer, train_run
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export

EXAMPLES = os.environ.get("QAT_EDGE_FUZZ")
# Time is limited for each call by `mutations.bounded`, which says what hung.
shared = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("few", max_examples=30, derandomize=True, database=None, **shared)
settings.register_profile("many", max_examples=int(EXAMPLES or 1), **shared)
settings.load_profile("many" if EXAMPLES else "few")


def make_run(folder: Path) -> Run:
    """A tiny run with a .pte and an ONNX folder, and its model in `folder`."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    made = train_run(folder / "model", folder, steps=2)
    export(made, ExportOptions(ptq=("none",), context_length=64))
    return made


def copy_of(folder: Path, target: Path) -> Path:
    """A fresh copy of a folder for one example."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target
