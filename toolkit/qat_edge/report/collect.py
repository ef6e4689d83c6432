"""Read everything recorded in a run folder; a missing part stays None or empty, with the reason in `missing`."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.config import read_sections
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate import encoder_results
from qat_edge.evaluate.encoder_results import EncoderReport
from qat_edge.evaluate.results import Report, load, to_json
from qat_edge.export_command import export_again
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.path_names import short_name
from qat_edge.report.outdated import outdated_note
from qat_edge.report.verdict import Verdict, encoder_verdict, verdict
from qat_edge.run import Run

FORMAT = 1  # of report.json
# Types of the entries of verified.json's rows that the page shows; the last five are newer than the others.
VERIFIED_TYPES: dict[str, tuple[type, ...]] = {
    "folder": (str,),
    "manifest_sha256": (str,),
    "faults": (list,),
    "linears": (int,),
    "linears_equal": (int,),
    "embedding_equal": (bool,),
    "head_equal": (bool, type(None)),
    "floats": (int, type(None)),
    "floats_equal": (int,),
    "parity_line": (str,),
    "adapter": (int,),
    "adapter_equal": (int, type(None)),
}
VERIFIED_NEWER = ("parity_line", "adapter", "adapter_equal")
VERIFIED_OPTIONAL = ("floats", "floats_equal", *VERIFIED_NEWER)
COMMAND = re.compile(r"`[^`]*`")  # in a message
NO_TRAINING = "training.json is missing; `qat-edge finetune` writes it when it finishes"


@dataclass(frozen=True)
class RunResults:
    """Everything that the page of one run shows.

    Attributes:
        reports: One per device that validate ran on, "local" first.
        verdicts: One for each of `measurements`, in that order.
        training: Contents of training.json; None if it is missing or damaged.
        config: Sections of config.yaml by name; empty if it is missing.
        quantized: Manifest of the frozen checkpoint; empty if it is missing.
        exports: Manifests of the artifacts by folder relative to the run, such as "exports/onnx".
        verified: Rows of verified.json whose artifacts have not changed since.
        missing: The reason why a part is missing, by the name of the part.
        encoder: Results of an encoder, which has no `reports`.
        outdated: By device, which of its figures describe artifacts that are no longer there.
    """

    reports: list[Report]
    verdicts: list[Verdict]
    training: dict[str, Any] | None
    config: dict[str, Any]
    quantized: dict[str, Any]
    exports: dict[str, dict[str, Any]]
    verified: list[dict[str, Any]]
    missing: dict[str, str] = field(default_factory=dict)
    encoder: EncoderReport | None = None
    outdated: dict[str, str] = field(default_factory=dict)

    @property
    def measurements(self) -> list[Report | EncoderReport]:
        """Everything that validate measured, in the order of `verdicts`."""
        return [*self.reports, *([self.encoder] if self.encoder else [])]

    @property
    def model(self) -> str:
        """Name of the base model; of a local path only the last part."""
        # The manifest has the resolved name; config.yaml has what the user typed.
        recorded = self.quantized.get("model") or {}
        name = str(
            (recorded.get("identity") or {}).get("name")
            or recorded.get("source")
            or self.options("finetune").get("model")
            or "unnamed model"
        )
        return short_name(name)

    def options(self, section: str) -> dict[str, Any]:
        """Return one section of config.yaml, empty if it is missing."""
        return self.config.get(section) or {}

    def document(self) -> dict[str, Any]:
        """Return the contents of report.json; numbers that are not finite become null."""
        # The keys of a device are the field names of `Report` and `EncoderReport`.
        devices = [
            {**to_json(measured), "verdict": asdict(device_verdict)}
            for measured, device_verdict in zip(self.measurements, self.verdicts, strict=True)
        ]
        # The folder of the run is specific to this machine, so it is left out.
        training = self.training and {key: value for key, value in self.training.items() if key != "run"}
        document: dict[str, Any] = finite(
            {
                "format": FORMAT,
                "model": self.model,
                "devices": devices,
                "training": training,
                "config": self.config,
                "quantized": self.quantized,
                "exports": self.exports,
                "verified": self.verified,
                "missing": self.missing,
            }
        )
        return document


def collect(run: Run) -> RunResults:
    """Read everything in the run folder that the page can show.

    Raises:
        RunError: The run has not been validated yet, or a report is damaged.
    """
    missing: dict[str, str] = {}
    # validate writes one report per device, or the results of an encoder.
    reports = [load(path) for path in sorted(run.reports.glob("*.json"))]
    encoder = encoder_results.load(run.answers) if run.answers.is_file() else None
    if not reports and encoder is None:
        raise RunError(
            f"{run.reports} holds no report, so there is nothing to show. Run `qat-edge validate {run.path}` first."
        )

    # This machine comes first, since readers compare the other devices with it.
    reports.sort(key=lambda report: (report.device != "local", report.device))
    verdicts = [*map(verdict, reports), *([encoder_verdict(encoder)] if encoder else [])]
    measurements: list[Report | EncoderReport] = [*reports, *([encoder] if encoder else [])]
    outdated = {each.device: note for each in measurements if (note := outdated_note(run, each))}
    results = RunResults(
        reports=reports,
        verdicts=[
            replace(one, notes=[outdated[each.device], *one.notes]) if each.device in outdated else one
            for one, each in zip(verdicts, measurements, strict=True)
        ],
        training=_training(run.path / "training.json", missing),
        config=_config(run.config, missing),
        quantized=_manifest(run.quantized, "quantized", missing),
        exports=_exports(run, missing),
        verified=_verified(run, missing),
        missing=missing,
        encoder=encoder,
        outdated=outdated,
    )

    # The page may be shared, so it does not show where this machine stores the run.
    missing.update({part: _without_path(reason, run.path) for part, reason in missing.items()})
    return results


def _without_path(reason: str, run: Path) -> str:
    """Return a reason without the path of the run: RUN in commands, relative paths elsewhere."""
    reason = COMMAND.sub(lambda command: command[0].replace(str(run), "RUN"), reason)
    return reason.replace(f"{run}/", "")


def _training(path: Path, missing: dict[str, str]) -> dict[str, Any] | None:
    try:
        log = readers.read_json(path, RunError, allow_nan=True)
    except RunError as error:
        missing["training"] = f"training.json cannot be read ({error})" if path.exists() else NO_TRAINING
        return None
    # Rows of the curve are checked where they are drawn.
    if not isinstance(log, dict) or not isinstance(log.get("curve", []), list):
        missing["training"] = "training.json does not have the format that `qat-edge finetune` writes"
        return None
    return log


def _config(path: Path, missing: dict[str, str]) -> dict[str, Any]:
    try:
        return read_sections(path)
    except UsageError as error:
        missing["config"] = str(error).removeprefix("--config ")
        return {}


def _manifest(folder: Path, part: str, missing: dict[str, str]) -> dict[str, Any]:
    """Read a manifest, with its list of weights reduced to counts: it has a line per layer of the model."""
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        missing[part] = str(error)
        return {}
    scheme = manifest.get("scheme")
    if isinstance(scheme, dict) and isinstance(scheme.get("weights"), dict):
        manifest["scheme"] = {**scheme, "weights": _weight_summary(scheme["weights"])}
    return manifest


def _weight_summary(weights: dict[str, Any]) -> dict[str, Any]:
    """Return the number of weights per width, and the reason of each weight that did not get the requested width."""
    counts: dict[str, int] = {}
    reasons = {}
    for name, weight in weights.items():
        width = f"int{weight.get('bits')}"
        counts[width] = counts.get(width, 0) + 1
        if weight.get("reason"):
            reasons[name] = weight["reason"]
    return {"counts": dict(sorted(counts.items())), "exceptions": reasons}


def _exports(run: Run, missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Read the manifests of all artifacts: those of the run, and those of its PTQ variants."""
    found = {}
    for variant in run.variants():
        # A PTQ variant is a folder inside the run with exports of its own.
        prefix = "" if variant is run else f"{variant.path.relative_to(run.path).as_posix()}/"
        if not variant.exports.is_dir():
            missing[f"{prefix}exports"] = f"{variant.exports} is missing; `qat-edge export` writes it"
            continue
        for folder in sorted(variant.exports.iterdir()):
            name = f"{prefix}exports/{folder.name}"
            if not (folder / MANIFEST).is_file():
                if folder in variant.damaged_exports():
                    missing[name] = f"{folder} is damaged: it has no {MANIFEST}; `{export_again(folder)}` writes it"
                continue
            manifest = _manifest(folder, name, missing)
            if manifest:
                found[name] = manifest
    return found


def _verified(run: Run, missing: dict[str, str]) -> list[dict[str, Any]]:
    """Read the results of verify, without those of artifacts that were exported again since."""
    try:
        rows = readers.read_json(run.verified, RunError)
        if not isinstance(rows, list):
            raise RunError(f"expected a list, found {readers.show(rows)}")
        for index, row in enumerate(rows):
            _check_verified(row, index)
    except RunError as error:
        absent = "verified.json is missing; `qat-edge verify` writes it"
        missing["verified"] = f"verified.json cannot be read ({error})" if run.verified.exists() else absent
        return []

    # The hash of the manifest changes with every export.
    artifacts = [variant.exports / target for variant in run.variants() for target in variant.targets()]
    hashes = {folder.relative_to(run.path).as_posix(): sha256(folder / MANIFEST) for folder in artifacts}
    # verify records an empty hash for a folder without a manifest.
    damaged = [folder for variant in run.variants() for folder in variant.damaged_exports()]
    hashes |= {folder.relative_to(run.path).as_posix(): "" for folder in damaged}
    current = [row for row in rows if row["manifest_sha256"] == hashes.get(row["folder"])]
    if len(current) < len(rows):
        missing["verified"] = "artifacts were exported again since `qat-edge verify` checked them"
    return current


def _check_verified(row: Any, index: int) -> None:
    """Check one row of verified.json.

    Raises:
        RunError: names the row and the entry that is missing or of another type.
    """
    if not isinstance(row, dict):
        raise RunError(f"row {index} is {readers.show(row)}, expected an object")
    optional = VERIFIED_OPTIONAL if "floats" not in row else VERIFIED_NEWER
    for key, types in VERIFIED_TYPES.items():
        if key not in row and key in optional:
            continue
        if key not in row:
            raise RunError(f"row {index} has no '{key}'")
        if not isinstance(row[key], types) or (isinstance(row[key], bool) and bool not in types):
            raise RunError(f"'{key}' of row {index} is {readers.show(row[key])}")


def finite(value: Any) -> Any:
    """Replace every number that is not finite with None, since JSON cannot represent it."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
