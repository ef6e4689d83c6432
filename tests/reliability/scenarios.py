"""The verbs under trial: the folder before each, the command that a user repeats, and what may never be found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qat_edge import config
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.options import (
    CompareOptions,
    ExportOptions,
    FinetuneOptions,
    QuantizeOptions,
    SensitivityOptions,
    ValidateOptions,
)
from qat_edge.run import Run
from qat_edge.train.trainer import QatTrainer
from qat_edge.verbs.compare import compare
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.sensitivity import sensitivity
from qat_edge.verbs.validate import validate_run
from qat_edge.verbs.verify import require_equal, verify
from tests.conftest import make_model, make_tokenizer
from tests.reliability.harness import Scenario, digest, fork

EXPORTING = ExportOptions(target=("onnx",), ptq=("none",), context_length=64)
VALIDATING = ValidateOptions(
    target=("onnx",), tokens=64, window=32, prompts=1, max_new_tokens=4, prefill=8, decode=2, repeats=1, threads=1
)
PARTS = ("adapter", "reference", "start", "quantized", "exports/onnx")


def make_inputs(root: Path) -> FinetuneOptions:
    """Write a tiny model and rows, and return the options of a training with every step that can be cut short."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i}"} for i in range(24)]
    for part in ("train", "eval"):
        (root / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneOptions(
        model=str(root / "model"), data=str(root / "train.jsonl"), eval_data=str(root / "eval.jsonl"),
        steps=6, qat_start=0.5, batch_size=4, lora_rank=4, lora_dropout=0.1, save_every=2, track=(), eval_rows=4,
        calibration_tokens=256, device="cpu",
    )  # fmt: skip


@dataclass
class Scenarios:
    """All scenarios. Runs that a scenario begins with are made once, in children, when it is first used."""

    root: Path
    options: FinetuneOptions

    def named(self, name: str) -> Scenario:
        """Return a scenario."""
        made: Scenario = getattr(self, f"_{name.replace('-', '_')}")()
        return made

    def _finetune(self) -> Scenario:
        def again(folder: Path) -> object:
            return finetune(self.options, folder, resume=(folder / "config.yaml").is_file())

        return Scenario(
            "finetune", lambda folder: None, lambda folder: finetune(self.options, folder), again, half_written
        )

    def _finetune_again(self) -> Scenario:
        """A training whose phase 2 diverges and starts again, and whose result is not its last state."""
        options = replace(self.options, steps=12, qat_start=3.0)
        losses = {3: 0.5, 6: 0.9, 9: 0.9, 10: 0.4, 11: 0.3, 12: 0.45}

        def run(folder: Path) -> object:
            # In a child, which ends with the trial.
            QatTrainer.mean_loss = lambda trainer, rows: losses[trainer.state.global_step]  # type: ignore[method-assign]
            return finetune(options, folder, resume=(folder / "config.yaml").is_file())

        return Scenario("finetune-again", lambda folder: None, run, run, half_written)

    def _finetune_force(self) -> Scenario:
        other, artifacts = replace(self.options, seed=1), digest(self._trained()).keys()

        def run(folder: Path) -> object:
            return finetune(other, folder, force=True)

        def intact(folder: Path) -> str | None:
            # A reader finishes what a killed process left half done; a new run without options cannot be opened yet.
            with suppress(RunError):
                Run.open(folder)
            # A kill in the repetition may find the new run finished, and set aside in turn.
            places = [place for place in (folder, folder / ".previous") if (place / "training.json").is_file()]
            kept = any(digest(place).keys() == artifacts and half_written(place) is None for place in places)
            return half_written(folder) or (None if kept else "the earlier run is lost")

        return Scenario("finetune-force", self._copy(self._trained()), run, run, intact)

    def _quantize(self) -> Scenario:
        def run(folder: Path) -> object:
            return quantize(Run.open(folder), QuantizeOptions())

        return Scenario("quantize", self._copy(self._trained()), run, run, half_written)

    def _quantize_force(self) -> Scenario:
        def run(folder: Path) -> object:
            return quantize(Run.open(folder), QuantizeOptions(), force=True)

        return Scenario("quantize-force", self._copy(self._frozen()), run, run, lost_or_half_written("quantized"))

    def _export(self) -> Scenario:
        return self._exporting("export", EXPORTING)

    def _export_pte(self) -> Scenario:
        return self._exporting("export-pte", replace(EXPORTING, target=("executorch",)))

    def _exporting(self, name: str, options: ExportOptions) -> Scenario:
        def run(folder: Path) -> object:
            return export(Run.open(folder), options)

        return Scenario(name, self._copy(self._trained()), run, run, half_written)

    def _verify(self) -> Scenario:
        def run(folder: Path) -> None:
            require_equal(verify(Run.open(folder), ()))

        return Scenario("verify", self._copy(self._exported()), run, run, lost_or_half_written("exports/onnx"))

    def _sensitivity(self) -> Scenario:
        options = SensitivityOptions(tokens=64, max_kl=0.05)

        def run(folder: Path) -> object:
            return sensitivity(Run.open(folder), options)

        return Scenario("sensitivity", self._copy(self._trained()), run, run, half_written)

    def _compare(self) -> Scenario:
        settings = self.root / "compare.yaml"
        export_section, validate_section = config.plain(EXPORTING), config.plain(VALIDATING)
        settings.write_text(json.dumps({"export": export_section, "validate": validate_section}))
        options = CompareOptions(target=("onnx",), deployment=("qat", "ptq"), method=("rtn",))

        def run(folder: Path) -> None:
            table = compare(Run.open(folder), options, settings)
            assert all(row.measured for row in table.deployments), "no figures in the table"

        return Scenario("compare", self._copy(self._frozen()), run, run, lost_or_half_written("quantized"))

    def _validate(self) -> Scenario:
        def run(folder: Path) -> None:
            validate_run(Run.open(folder), VALIDATING, force=True)
            report = json.loads((folder / "reports" / "local.json").read_text())
            assert report["measured"], "no figures in the report"

        return Scenario("validate", self._copy(self._exported()), run, run, lost_or_half_written("exports/onnx"))

    # --- runs to begin with --------------------------------------------------------------------------------

    def _trained(self) -> Path:
        return self._made("trained", None, lambda folder: finetune(self.options, folder))

    def _frozen(self) -> Path:
        return self._made("frozen", self._trained, lambda folder: quantize(Run.open(folder), QuantizeOptions()))

    def _exported(self) -> Path:
        return self._made("exported", self._frozen, lambda folder: export(Run.open(folder), EXPORTING))

    def _made(self, name: str, source: Callable[[], Path] | None, action: Callable[[Path], object]) -> Path:
        folder = self.root / name
        if not folder.is_dir():
            if source is not None:
                shutil.copytree(source(), folder)
            child = fork(lambda: action(folder), folder).wait()
            if child.code != 0:
                raise SystemExit(f"{name} cannot be made:\n{child.output}")
        return folder

    def _copy(self, source: Path) -> Callable[[Path], None]:
        def copy(folder: Path) -> None:
            shutil.copytree(source, folder)

        return copy


def half_written(folder: Path) -> str | None:
    """Return which part of a run is not whole, None if all that are there are."""
    for path in folder.rglob("*.json"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return f"{path} is half written"
        for name, entry in read_manifest(path.parent)["files"].items() if path.name == MANIFEST else ():
            if not (path.parent / name).is_file() or sha256(path.parent / name) != entry["sha256"]:
                return f"{path.parent / name} is half written"
    half = [part for part in PARTS if (folder / part).is_dir() and not (folder / part / MANIFEST).is_file()]
    return f"{half[0]} is half written" if half else None


def lost_or_half_written(part: str) -> Callable[[Path], str | None]:
    """Return the check of a verb that replaces or reads a part: it may never be lost either."""

    def intact(folder: Path) -> str | None:
        Run.open(folder)  # a reader finishes what a killed process left half done
        return half_written(folder) or (None if (folder / part / MANIFEST).is_file() else f"{part} is lost")

    return intact
