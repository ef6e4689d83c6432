"""The verbs under trial: the folder before each, the command that a user repeats, and what may never be found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions, ValidateOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.validate import validate_run
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

    def _finetune_force(self) -> Scenario:
        other, earlier = replace(self.options, seed=1), digest(self._trained())

        def run(folder: Path) -> object:
            return finetune(other, folder, force=True)

        def intact(folder: Path) -> str | None:
            kept = any(digest(place) == earlier for place in (folder, folder / ".previous") if place.is_dir())
            finished = (folder / "training.json").is_file() and (folder / "adapter" / MANIFEST).is_file()
            return half_written(folder) or (None if kept or finished else "the earlier run is lost")

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
        def again(folder: Path) -> object:
            # An artifact that is there and current needs --force, and is written again.
            return export(Run.open(folder), EXPORTING, force=(folder / "exports" / "onnx").is_dir())

        return Scenario(
            "export", self._copy(self._trained()), lambda folder: export(Run.open(folder), EXPORTING), again,
            half_written,
        )  # fmt: skip

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
    for path in folder.rglob(MANIFEST) if folder.exists() else ():
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        for name, entry in read_manifest(path.parent)["files"].items():
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
