"""Every way of shipping one fine-tune, each exported, run in its own runtime and measured like the others.

RUN/compare/NAME/checkpoint/        what the exporters read: float or frozen, unmerged adapters in its adapter/
RUN/compare/NAME/exports/TARGET/    the artifact; those of `qat` and of merged PTQ stay where export puts them
RUN/compare/NAME/TARGET.json        what was measured of it, and of which artifact on which tokens
RUN/compare/compare.json, compare.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qat_edge import config, progress
from qat_edge.config import CompareOptions, ExportOptions, FinetuneOptions, ValidateOptions
from qat_edge.errors import ArtifactError, DataError, DeviceError, ExportError, ModelError, QatEdgeError, RunError
from qat_edge.evaluate import reference, results
from qat_edge.evaluate.deployments import PTQ, TITLES, Deployment, DeploymentTable, row_names, save
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.evaluator import Bench, device_errors, gather_material, scratch_folder
from qat_edge.evaluate.results import Measured
from qat_edge.models import merge, tasks, tokenizer
from qat_edge.quant import frozen
from qat_edge.report.comparison_page import render
from qat_edge.run import MANIFEST, Run, Variant, read_manifest, replace_folder, sha256, write_manifest, write_text
from qat_edge.verbs.export import export_one
from qat_edge.verbs.quantize import QAT, quantize_if_missing
from qat_edge_devices import open_transport
from qat_edge_devices.transport import Transport
from qat_edge_exporters.checkpoint import ADAPTER
from qat_edge_exporters.targets import target_named

Say = Callable[[str], None]
FOLDER = "compare"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
TRAINING = ("model", "data", "eval_data")  # options that finetune is given
ROW_FORMAT = 1
# A row that ends in one of these is shown with the reason; anything else ends the command.
SHOWN = (ExportError, ArtifactError, DataError, DeviceError, ModelError)


@dataclass(frozen=True)
class Shipped(Variant):
    """A deployment that only compare makes."""

    @property
    def name(self) -> str:
        """What its row is called."""
        return TITLES[self.path.name]

    @property
    def quantized(self) -> Path:
        """The checkpoint, which may be float."""
        return self.path / "checkpoint"


@dataclass(frozen=True)
class Job:
    """What all rows share. force: make and measure again what is there already."""

    run: Run
    exporting: ExportOptions
    force: bool

    @property
    def folder(self) -> Path:
        """Where compare writes."""
        return self.run.path / FOLDER

    def shipped(self, name: str) -> Shipped:
        """The place of a deployment that only compare makes."""
        return Shipped(self.folder / name)


def train(options: CompareOptions, out: Path, config_path: Path | None, force: bool = False) -> Run:
    """Run `finetune` into `out` in a process of its own, with compare's model and data and the rest of --config.

    Raises:
        RunError: `out` exists and `force` is not set.
        QatEdgeError: finetune failed; it has said why.
    """
    given = {k: v for k, v in config.plain(options).items() if k in TRAINING and v is not None}
    config.load(FinetuneOptions, "finetune", config_path, given)
    if out.exists() and not force:
        raise RunError(f"{out} exists already. `qat-edge compare {out}` goes on with it; --force trains it again.")
    flags = [text for key, value in given.items() for text in (config.flag_name(key), value)]
    flags += ["--config", str(config_path)] if config_path else []
    flags += ["--force"] if Run(out).config.is_file() else []
    progress.info(f"Training {out}")
    command = [sys.executable, "-m", "qat_edge", "finetune", "--out", str(out), *flags]
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        raise QatEdgeError(f"compare stops here: `qat-edge finetune` ended with exit code {code}.")
    return Run.open(out)


def compare(run: Run, options: CompareOptions, config_path: Path | None, force: bool = False) -> DeploymentTable:
    """Make, run and measure every deployment; write RUN/compare/compare.json and compare.html.

    What was measured before, of the same artifact on the same tokens, is taken over unless `force` is set.

    Raises:
        RunError: no finished training, or an artifact of the run is out of date.
        DataError: no evaluation rows.
    """
    tasks.require_generating(run, "compare")
    source = config_path or run.config
    measuring = config.load(ValidateOptions, "validate", source, {})
    exporting = config.load(
        ExportOptions, "export", source, {"backend": config.EXPORT_BACKENDS[0]}
    )  # others cannot run here
    job = Job(run, exporting, force)
    quantize_if_missing(run, QAT)
    material = gather_material(run, measuring)
    made = {(n, t): _make(job, n, t) for n in row_names(options.deployment, options.method) for t in options.target}
    _checkpoint(job, "merged")
    with scratch_folder(run) as scratch, device_errors(), closing(open_transport(LOCAL)) as transport:
        tuned, measured = _measure(job, Bench(material, measuring, scratch), transport, made)
        machine = dataclasses.asdict(transport.info())
    table = DeploymentTable(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_model_name(run),
        device=LOCAL,
        machine=machine,
        options={**config.plain(measuring), "context_length": job.exporting.context_length},
        tokens=material.tokens,
        steps=_steps(run),
        reference=tuned,
        deployments=measured,
    )
    save(table, job.folder / "compare.json")
    write_text(job.folder / "compare.html", render(table))
    return table


def _model_name(run: Run) -> str:
    """The base model's name, without the path of some machine."""
    name = str(read_manifest(run.quantized)["model"]["identity"]["name"])
    return Path(name).name if name.count("/") > 1 or name[:1] in "/.~" else name


def _steps(run: Run) -> dict[str, int]:
    """Optimizer steps of the FP32 fine-tune and of the run, as far as its training log says."""
    try:
        log = json.loads((run.path / "training.json").read_text(encoding="utf-8"))
        return {"reference": int(log["qat_start_step"]), "qat": int(log["steps"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# --- making ------------------------------------------------------------------------------------------------


def _make(job: Job, name: str, target: str) -> Variant | str:
    """Checkpoint and artifact of one row, made where they are missing; or why they cannot be."""
    try:
        variant = _checkpoint(job, name)
        _export(job, variant, target)
    except SHOWN as error:
        progress.info(f"{TITLES[name]}, {target}: {error}")
        return f"not expressible: {error}" if isinstance(error, ExportError) else str(error)
    return variant


def _export(job: Job, variant: Variant, target: str) -> None:
    """Export what is missing, or is compare's own and out of date.

    Raises:
        RunError: an artifact of the run itself is out of date, and `force` is not set.
    """
    folder = variant.exports / target
    current = folder.is_dir() and _is_current(variant, folder, job.exporting.context_length)
    own = isinstance(variant, Shipped)
    if current and not (own and job.force):
        return
    if folder.is_dir() and not own and not job.force:
        raise RunError(
            f"{folder} is of another checkpoint, or for another --context-length than {job.exporting.context_length}. "
            f"Export again: `qat-edge export {job.run.path} --force`."
        )
    export_one(variant, target_named(target), job.exporting)


def _is_current(variant: Variant, folder: Path, context_length: int) -> bool:
    manifest = read_manifest(folder)
    same_length = manifest["options"]["context_length"] == context_length
    return same_length and manifest["quantized_sha256"] == sha256(variant.quantized / MANIFEST)


def _checkpoint(job: Job, name: str) -> Variant:
    """Where a deployment's checkpoint lies; made where it is missing or of another training.

    Raises:
        ExportError: the deployment needs adapters, and the run has none.
    """
    run = job.run
    if name == QAT:
        return run
    if name.startswith(PTQ):
        return quantize_if_missing(run, name.removeprefix(PTQ))
    if name in ("lora", "naive") and not (run.reference / ADAPTER_FILES[0]).is_file():
        raise ExportError("this run trained the weights themselves, so it has no adapters to ship")
    if name == "lora":
        _checkpoint(job, "base")
    shipped = job.shipped(name)
    made_of = sha256(run.reference / MANIFEST)
    if (shipped.quantized / MANIFEST).is_file() and read_manifest(shipped.quantized)["made_of"] == made_of:
        return shipped
    progress.info(f"Making {shipped.quantized}")
    with replace_folder(shipped.quantized, force=True) as work:
        facts = _write_checkpoint(job, name, work)
        write_manifest(work, "checkpoint", made_of=made_of, **facts)
    return shipped


def _write_checkpoint(job: Job, name: str, work: Path) -> dict[str, Any]:
    """Fill the empty folder; returns what its manifest holds beside the rest."""
    run, facts = job.run, {}
    if name == "lora":
        for path in job.shipped("base").quantized.iterdir():
            if path.name != MANIFEST:
                _share(path, work / path.name)
    elif name == "merged":
        merge.merged_model(run.reference).model.save_pretrained(work)
    else:
        model = merge.base_model(run.reference)
        if name == "naive":
            plan = frozen.read_scheme(run.quantized)
            frozen.freeze(model, plan)
            facts["scheme"] = frozen.scheme_facts(plan)
        model.save_pretrained(work)
    if name in ("lora", "naive"):
        (work / ADAPTER).mkdir()
        for file in ADAPTER_FILES:
            shutil.copyfile(run.reference / file, work / ADAPTER / file)
    tokenizer.copy_files(run.quantized, work)
    return facts


def _share(source: Path, target: Path) -> None:
    """One file under two names, or a copy of it where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


# --- measuring ---------------------------------------------------------------------------------------------


def _measure(
    job: Job, bench: Bench, transport: Transport, made: Mapping[tuple[str, str], Variant | str]
) -> tuple[Measured, list[Deployment]]:
    """The FP32 fine-tune in torch, and every row in the order of `made`."""
    asked = _asked(bench)
    keys = {
        row: {**asked, "artifact": sha256(variant.exports / row[1] / MANIFEST)}
        for row, variant in made.items()
        if isinstance(variant, Variant)
    }
    known = {row: None if job.force else _read(_row_path(job, *row), key) for row, key in keys.items()}
    tuned = _reference(job, bench, asked, needed=None in known.values())
    rows = []
    for row, variant in made.items():
        measured: Measured | str | None = variant if isinstance(variant, str) else known[row]
        if measured is None and isinstance(variant, Variant):
            measured = _measure_row(job, bench, transport, variant, row)
            if isinstance(measured, Measured):
                _write(_row_path(job, *row), keys[row], measured)
        elif isinstance(measured, Measured):
            progress.info(f"{TITLES[row[0]]}, {row[1]}: measured before")
        found = measured if isinstance(measured, Measured) else None
        rows.append(Deployment(*row, measured=found, reason=measured if isinstance(measured, str) else ""))
    return tuned, rows


def _measure_row(
    job: Job, bench: Bench, transport: Transport, variant: Variant, row: tuple[str, str]
) -> Measured | str:
    """What was measured, or why it could not be."""
    try:
        with device_errors():
            return bench.artifact(variant, row[1], transport, own=False)
    except SHOWN as error:
        progress.info(f"{TITLES[row[0]]}, {row[1]}: {error}")
        return f"not measured: {error}"


def _reference(job: Job, bench: Bench, asked: dict[str, Any], needed: bool) -> Measured:
    """The FP32 fine-tune in torch; its logits for the rows still to be measured, where any are `needed`."""
    path, checkpoint = job.folder / "reference.json", job.shipped("merged").quantized
    key = {**asked, "artifact": sha256(checkpoint / MANIFEST)}
    known = None if job.force else _read(path, key)
    if known is not None and not needed:
        return known
    model = frozen.load(checkpoint)
    if known is None:
        known = bench.fine_tuned(model)
        _write(path, key, known)
        return known
    sequences = bench.material.sequences
    with progress.bar("FP32 fine-tune", len(sequences)) as shown:
        reference.score(model, sequences, bench.fp32, shown.update)
    return known


def _asked(bench: Bench) -> dict[str, Any]:
    """What decides the figures beside the artifact: tokens, prompts, and how speed is timed."""
    material, options = bench.material, bench.options
    ids = [[s.ids, list(s.positions)] for s in material.sequences], material.prompts, material.eos_ids
    timed = ("threads", "prefill", "decode", "repeats", "max_new_tokens")
    tokens = hashlib.sha256(json.dumps(ids, default=int).encode()).hexdigest()
    return {"format": ROW_FORMAT, "tokens": tokens, **{name: getattr(options, name) for name in timed}}


def _row_path(job: Job, name: str, target: str) -> Path:
    return job.folder / name / f"{target}.json"


def _read(path: Path, key: dict[str, Any]) -> Measured | None:
    """What was measured before under the same key; None where there is nothing of the kind."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return results.measured(document["measured"]) if document["key"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, key: dict[str, Any], measured: Measured) -> None:
    write_text(path, json.dumps({"key": key, "measured": dataclasses.asdict(measured)}, indent=1) + "\n")
