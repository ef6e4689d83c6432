"""Decoding speed of ONNX folders by scheme of the weights, for the page of `benchmarks.frontier`.

Speed depends on the scheme alone, so the models are trained for one step. A round times all schemes once, one after the
other with one thread, and begins with another one than the round before. Ratios compare figures of the same round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import page
from benchmarks.cells import Cell, in_turn, slug
from benchmarks.runner import BenchmarkRunner, Figures
from benchmarks.settings import SCHEMES
from qat_edge import progress
from qat_edge.config import flag_name

TASK = "assistant"
BASELINE = next(iter(SCHEMES))
ROUNDS, PREFILL, DECODE, REPEATS = 7, 128, 64, 3


def cell(runner: BenchmarkRunner) -> Cell:
    """Return the identity of the figures of all schemes."""
    schemes = {name: dict(changes) for name, changes in SCHEMES.items()}
    amounts = {"rounds": ROUNDS, "prefill": PREFILL, "decode": DECODE, "repeats": REPEATS}
    return Cell("scheme-speed", TASK, 0, "decode", {"model": runner.fingerprint, "schemes": schemes, **amounts})


def measure(runner: BenchmarkRunner) -> Figures:
    """Train, export and time a model of each scheme.

    Returns:
        "decode": scheme -> tokens per second of each round.
    """
    from benchmarks import engines  # it needs gguf and the runtimes

    amounts = engines.Amounts(PREFILL, DECODE, REPEATS)
    models = [engines.onnx_engine(name, _exported(runner, name)) for name in SCHEMES]
    found: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for index in range(ROUNDS):
        progress.info(f"  speed, round {index + 1} of {ROUNDS}")
        for model in in_turn(models, index):
            found[model.name].append(model.timed(1, amounts)["decode"])
    return {"decode": found}


def _exported(runner: BenchmarkRunner, scheme: str) -> Path:
    """Return the ONNX folder of a model that trained for one step; make it where it is missing."""
    out = runner.work / "speed" / slug(scheme)
    folder = out / "exports" / "onnx"
    if not (folder / "manifest.json").is_file():
        changes = [word for name, value in SCHEMES[scheme].items() for word in (flag_name(name), str(value))]
        data = ["--data", str(runner.data(TASK).train), "--max-length", "128"]
        steps = ["--steps", "1", "--qat-start", "1", "--ptq-init", "gptq", "--calibration-tokens", "1024"]
        log = f"speed-{slug(scheme)}"
        train = ["qat_edge", "finetune", "--model", runner.model, *data, *steps, *changes, "--out", str(out), "--force"]
        runner.command([*train, "--track", "none"], log)
        runner.command(["qat_edge", "export", str(out), "--target", "onnx", "--ptq", "none"], log)
    return folder


def section(figures: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """Return the paragraphs of the page about speed."""
    decode = figures["decode"]
    rows = []
    for scheme, rates in ((name, decode[name]) for name in SCHEMES if name in decode):
        ratios = [own / base for own, base in zip(rates, decode[BASELINE], strict=True)]
        rows.append([scheme, page.median_of(rates), page.median_of(ratios)])
    return [
        "## Decoding speed",
        f"ONNX folders of each scheme in onnxruntime-genai, one thread: {DECODE} tokens after a prompt of {PREFILL}. "
        f"Each figure is the median of {ROUNDS} rounds, each of which times all schemes in turn, with minimum and "
        "maximum. Ratios compare figures of the same round. The models trained for one step, because speed does not "
        "depend on the values of the weights.",
        page.table(("scheme", "tokens per second", f"of {BASELINE}"), rows),
    ]
