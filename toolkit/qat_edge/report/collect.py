"""Read everything a run folder knows; what is missing stays None with its reason in `missing`."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qat_edge.config import read_sections
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate import encoder_results
from qat_edge.evaluate.encoder_results import Comparison
from qat_edge.evaluate.results import Report, load
from qat_edge.report.verdict import Verdict, of_encoder, verdict
from qat_edge.run import MANIFEST, Run, read_manifest, sha256

FORMAT = 1
NO_TRAINING = "training.json is missing; `qat-edge finetune` writes it at its end"


@dataclass(frozen=True)
class Story:
    """All that the page shows. answers: of an encoder, in place of reports.

    exports: manifests by folder below the run, "exports/onnx". missing: why a part is absent, by part.
    """

    reports: list[Report]
    verdicts: list[Verdict]
    training: dict[str, Any] | None
    config: dict[str, Any]
    quantized: dict[str, Any]
    exports: dict[str, dict[str, Any]]
    verified: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    answers: Comparison | None = None

    @property
    def measurements(self) -> list[Report | Comparison]:
        """What validate measured, in the order of `verdicts`."""
        return [*self.reports, *([self.answers] if self.answers else [])]

    @property
    def model(self) -> str:
        """Name of the base model; the last part of it where it is a path of some machine."""
        recorded = self.quantized.get("model") or {}
        named = (
            (recorded.get("identity") or {}).get("name")
            or recorded.get("source")
            or self.options("finetune").get("model")
        )
        name = str(named or "unnamed model")
        return Path(name).name if name.count("/") > 1 or name[:1] in "/.~" else name

    def options(self, section: str) -> dict[str, Any]:
        """One section of config.yaml, empty where it is missing."""
        return self.config.get(section) or {}

    def document(self) -> dict[str, Any]:
        """The same as plain values for report.json; a figure that is not finite becomes null."""
        devices = [
            {**asdict(measured), "verdict": asdict(judged)}
            for measured, judged in zip(self.measurements, self.verdicts, strict=True)
        ]
        plain = {
            "format": FORMAT,
            "model": self.model,
            "devices": devices,
            "training": self.training and {k: v for k, v in self.training.items() if k != "run"},
            "config": self.config,
            "quantized": self.quantized,
            "exports": self.exports,
            "verified": self.verified,
            "missing": self.missing,
        }
        document: dict[str, Any] = finite(plain)
        return document


def collect(run: Run) -> Story:
    """Everything in the run folder that the page can show.

    Raises:
        RunError: nothing was validated yet, or a report is damaged.
    """
    missing: dict[str, str] = {}
    reports = [load(path) for path in sorted(run.reports.glob("*.json"))]
    answered = encoder_results.load(run.answers) if run.answers.is_file() else None
    if not reports and answered is None:
        raise RunError(
            f"{run.reports} holds no report, so there is nothing to show. Run `qat-edge validate {run.path}` first."
        )
    # This machine first: it is the one every other device is held against.
    reports.sort(key=lambda report: (report.device != "local", report.device))
    story = Story(
        reports=reports,
        verdicts=[*map(verdict, reports), *([of_encoder(answered)] if answered else [])],
        training=_training(run.path / "training.json", missing),
        config=_config(run.config, missing),
        quantized=_manifest(run.quantized, "quantized", missing),
        exports=_exports(run, missing),
        verified=_verified(run, missing),
        missing=missing,
        answers=answered,
    )
    # The page is shown to others: where this machine keeps the run is none of its content.
    missing.update({part: reason.replace(f"{run.path}/", "") for part, reason in missing.items()})
    return story


def _training(path: Path, missing: dict[str, str]) -> dict[str, Any] | None:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing["training"] = NO_TRAINING
        return None
    except (OSError, ValueError) as error:
        missing["training"] = f"training.json cannot be read ({error})"
        return None
    if not isinstance(log, dict) or not isinstance(log.get("curve", []), list):
        missing["training"] = "training.json is not what `qat-edge finetune` writes"
        return None
    return log


def _config(path: Path, missing: dict[str, str]) -> dict[str, Any]:
    try:
        return read_sections(path)
    except UsageError as error:
        missing["config"] = str(error).removeprefix("--config ")
        return {}


def _manifest(folder: Path, part: str, missing: dict[str, str]) -> dict[str, Any]:
    """The manifest without its list of weights, which is as long as the model is deep."""
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        missing[part] = str(error)
        return {}
    scheme = manifest.get("scheme")
    if isinstance(scheme, dict) and isinstance(scheme.get("weights"), dict):
        manifest["scheme"] = {**scheme, "weights": _by_kind(scheme["weights"])}
    return manifest


def _by_kind(weights: dict[str, Any]) -> dict[str, Any]:
    """How many weights got how many bits, and each one that got something else than asked, with the reason."""
    counts: dict[str, int] = {}
    reasons = {}
    for name, weight in weights.items():
        kind = f"int{weight.get('bits')}"
        counts[kind] = counts.get(kind, 0) + 1
        if weight.get("reason"):
            reasons[name] = weight["reason"]
    return {"counts": dict(sorted(counts.items())), "exceptions": reasons}


def _exports(run: Run, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    found = {}
    for variant in run.variants():
        prefix = "" if variant is run else f"{variant.path.relative_to(run.path)}/"
        if not variant.exports.is_dir():
            missing[f"{prefix}exports"] = f"{variant.exports} is missing; `qat-edge export` writes it"
            continue
        for folder in sorted(variant.exports.iterdir()):
            name = f"{prefix}exports/{folder.name}"
            if (folder / MANIFEST).is_file() and (manifest := _manifest(folder, name, missing)):
                found[name] = manifest
    return found


def _verified(run: Run, missing: dict[str, str]) -> list[dict[str, Any]]:
    """What verify found of the artifacts that are still the ones it read."""
    try:
        rows: list[dict[str, Any]] = json.loads(run.verified.read_text(encoding="utf-8"))
        current = [row for row in rows if row["manifest_sha256"] == _manifest_sha256(run.path / row["folder"])]
    except FileNotFoundError:
        missing["verified"] = "verified.json is missing; `qat-edge verify` writes it"
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        missing["verified"] = f"verified.json cannot be read ({error})"
        return []
    if len(current) < len(rows):
        missing["verified"] = "artifacts were exported again since `qat-edge verify` read them"
    return current


def _manifest_sha256(folder: Path) -> str | None:
    return sha256(folder / MANIFEST) if (folder / MANIFEST).is_file() else None


def finite(value: Any) -> Any:
    """Plain values with null for every figure that is not finite, as JSON knows no other."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
