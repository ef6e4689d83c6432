"""Export one fine-tune in every way of shipping it, run each artifact in its own runtime and compare the figures.

RUN/compare/NAME/checkpoint/        input of the exporters: float or frozen, with unmerged adapters in its adapter/
RUN/compare/NAME/exports/TARGET/    the artifact; those of `qat` and of merged PTQ stay where export writes them
RUN/compare/NAME/TARGET.json        the measurement, and a key of the artifact and the evaluation data it was made with
RUN/compare/compare.json, compare.html
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from qat_edge import config, progress, readers, remote_code, stop_signals
from qat_edge.errors import (
    ArtifactError,
    DataError,
    DeviceError,
    ExportError,
    ModelError,
    QatEdgeError,
    RunError,
    UsageError,
)
from qat_edge.evaluate import reference
from qat_edge.evaluate.deployments import PTQ, TITLES, Deployment, DeploymentTable, row_names, save
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.evaluator import Evaluator, device_errors, load_eval_set, scratch_folder
from qat_edge.evaluate.prompts import Context
from qat_edge.evaluate.results import FINE_TUNED, Measurement, read_measurement, to_json
from qat_edge.export_command import export_again
from qat_edge.manifest import MANIFEST, read_manifest, sha256, write_manifest
from qat_edge.models import merge, tasks, tokenizer
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.options import EXPORT_BACKENDS, CompareOptions, ExportOptions, FinetuneOptions, ValidateOptions
from qat_edge.path_names import short_name
from qat_edge.python_process import python_command
from qat_edge.quant import frozen
from qat_edge.quant.frozen_adapters import CONFIG, copy_adapters
from qat_edge.quant.ptq.method_names import QAT
from qat_edge.report.comparison_page import render
from qat_edge.run import Run, Variant
from qat_edge.run_lock import writes_run
from qat_edge.storage import replace_folder, write_text
from qat_edge.verbs.export import export_one, with_context_length
from qat_edge.verbs.quantize import quantize_if_missing
from qat_edge_devices import open_transport
from qat_edge_devices.transport import Transport
from qat_edge_exporters.targets import require_installed, target_named

FOLDER = "compare"
WITH_ADAPTERS = ("lora", "naive")  # deployments that ship unmerged adapters
TRAINING = ("model", "data", "eval_data")  # options that are passed on to finetune
ROW_FORMAT = 1
# Errors that become the reason in a row of the table; any other ends the command.
ROW_ERRORS = (ExportError, ArtifactError, DataError, DeviceError, ModelError)


class RowKey(NamedTuple):
    """A row of the table: deployment and target."""

    name: str
    target: str

    @property
    def title(self) -> str:
        """Name for messages."""
        return f"{TITLES[self.name]}, {self.target}"


@dataclass(frozen=True)
class DeploymentVariant(Variant):
    """A deployment that only compare makes, in a folder of its own."""

    @property
    def name(self) -> str:
        """Title of its row."""
        return TITLES[self.path.name]

    @property
    def quantized(self) -> Path:
        """The checkpoint, which may be float."""
        return self.path / "checkpoint"


@dataclass(frozen=True)
class CompareJob:
    """Settings that all rows share.

    Attributes:
        run: whose fine-tune is shipped.
        exporting: options of export.
        force: make and measure again what exists already.
    """

    run: Run
    exporting: ExportOptions
    force: bool

    @property
    def folder(self) -> Path:
        """Folder that compare writes to."""
        return self.run.path / FOLDER

    def variant(self, name: str) -> DeploymentVariant:
        """Return the folder of a deployment that only compare makes."""
        return DeploymentVariant(self.folder / name)

    def measurement_path(self, row: RowKey) -> Path:
        """Return the path of a row's measurement."""
        return self.folder / row.name / f"{row.target}.json"


def train(options: CompareOptions, out: Path, config_path: Path | None, force: bool = False) -> Run:
    """Run `finetune` into `out` in a process of its own, with compare's model and data and the rest of --config.

    Raises:
        UsageError: an extra that a target needs is not installed.
        RunError: `out` exists and `force` is not set.
        QatEdgeError: finetune failed; its message is on stderr.
    """
    require_installed(options.target)
    # Validate the options first, so that a bad one is an error of this command.
    given = {k: v for k, v in config.plain(options).items() if k in TRAINING and v is not None}
    config.load(FinetuneOptions, "finetune", config_path, given)
    if out.exists() and not force:
        raise RunError(f"{out} exists already. `qat-edge compare {out}` continues with it; --force trains it again.")

    flags = [text for key, value in given.items() for text in (config.flag_name(key), value)]
    if config_path:
        flags += ["--config", str(config_path)]
    if Run(out).config.is_file():
        flags += ["--force"]
    if remote_code.permitted():
        flags += [remote_code.FLAG]
    progress.info(f"Training {out}")
    command = python_command("qat_edge", "finetune", "--out", str(out), *flags)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    with stop_signals.passed_on(process):
        code = process.wait()
    if code != 0:
        raise QatEdgeError(f"`qat-edge finetune` ended with exit code {code}, so there is nothing to compare.")
    return Run.open(out)


def _require_trained(run: Run, options: CompareOptions) -> None:
    """Refuse a run without what the rows are named after.

    Raises:
        RunError: nothing was trained.
        UsageError: the row of QAT, for a run without a step of it.
    """
    trained = config.load_trained(run.config)
    if not trained.steps:
        raise RunError(
            f"{run.path}: nothing was trained, so there is no fine-tune to deploy. `qat-edge validate {run.path}` "
            "compares its artifacts."
        )
    if trained.frozen_base is not None:
        raise RunError(
            f"{run.path}: its adapters belong to the frozen weights of {trained.frozen_base}, and compare deploys "
            f"adapters that can be merged. `qat-edge validate {run.path}` compares its artifacts."
        )
    if QAT in options.deployment and not trained.has_qat:
        others = " ".join(f"--deployment {name}" for name in options.deployment if name != QAT)
        raise UsageError(f"--deployment qat: no step of {run.path} was QAT. Leave it out: {others or 'name another'}.")


@writes_run("compare")
def compare(run: Run, options: CompareOptions, config_path: Path | None, force: bool = False) -> DeploymentTable:
    """Export, run and measure every deployment; write RUN/compare/compare.json and compare.html.

    A measurement of the same artifact on the same evaluation data is reused unless `force` is set.

    Raises:
        UsageError: an extra that a target needs is not installed.
        RunError: no finished training, or an artifact of the run is out of date.
        DataError: no evaluation rows.
    """
    require_installed(options.target)
    tasks.require_causal_lm(run, "compare")
    source = config_path or run.config
    measuring = config.load(ValidateOptions, "validate", source, {})
    merge.adapter_metadata(run.reference)  # every row is compared with it
    _require_trained(run, options)
    # Artifacts of other backends than the first cannot run on this machine.
    exporting = config.load(ExportOptions, "export", source, {"backend": EXPORT_BACKENDS[0]})
    job = CompareJob(run, with_context_length(run, exporting), force)

    # The quantized run has the tokenizer, so it is needed even if no row ships it.
    quantize_if_missing(run, QAT)
    length = job.exporting.context_length
    assert length is not None
    eval_set = load_eval_set(run, measuring, Context(length, "each artifact"))

    rows = [RowKey(n, t) for n in row_names(options.deployment, options.method) for t in options.target]
    made = {row: _make(job, row) for row in rows}
    _checkpoint(job, "merged")  # the FP32 reference, whether or not it is a row

    # Run them one after the other, then write the table.
    with scratch_folder(run) as scratch, device_errors(), closing(open_transport(LOCAL)) as transport:
        tuned, deployments = _measure(job, Evaluator(eval_set, measuring, scratch), transport, made)
        machine = dataclasses.asdict(transport.info())

    table = DeploymentTable(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_model_name(run),
        device=LOCAL,
        machine=machine,
        options={**config.plain(measuring), "context_length": job.exporting.context_length},
        tokens=eval_set.tokens,
        steps=_steps(run),
        reference=tuned,
        deployments=deployments,
    )
    _save(table, job.folder)
    return table


def _save(table: DeploymentTable, folder: Path) -> None:
    save(table, folder / "compare.json")
    write_text(folder / "compare.html", render(table))


def _model_name(run: Run) -> str:
    """Return the base model's name on the Hub; of a local path only the last part."""
    return short_name(str(read_manifest(run.quantized)["model"]["identity"]["name"]))


def _steps(run: Run) -> dict[str, int]:
    """Return the optimizer steps of the FP32 fine-tune and of the run; empty without a training log."""
    try:
        log = readers.read_object(run.path / "training.json", RunError, allow_nan=True)
        return {"reference": int(log["qat_start_step"]), "qat": int(log["steps"])}
    except (RunError, ValueError, KeyError, TypeError):
        return {}


# --- making ------------------------------------------------------------------------------------------------


def _make(job: CompareJob, row: RowKey) -> Variant | str:
    """Make the checkpoint and the artifact of one row where they are missing.

    Returns:
        The variant, or the reason why it cannot be made.
    """
    try:
        variant = _checkpoint(job, row.name)
        _export(job, variant, row.target)
    except ROW_ERRORS as error:
        progress.warn(f"{row.title}: {error}")
        return f"not expressible: {error}" if isinstance(error, ExportError) else str(error)
    return variant


def _export(job: CompareJob, variant: Variant, target: str) -> None:
    """Export an artifact that is missing, or that is compare's own and out of date.

    Raises:
        RunError: an artifact of the run itself is out of date, and `force` is not set.
    """
    folder = variant.exports / target
    is_current = folder.is_dir() and _is_current(variant, folder, job.exporting.context_length)
    belongs_to_run = not isinstance(variant, DeploymentVariant)

    # --force makes compare's own artifacts again, but not a current one that the user exported.
    if is_current and (belongs_to_run or not job.force):
        return
    if folder.is_dir() and belongs_to_run and not job.force:
        raise RunError(
            f"{folder} was exported from another checkpoint, or for another --context-length than "
            f"{job.exporting.context_length}. Export again: `{export_again(folder, job.exporting.context_length)}`."
        )
    export_one(variant, target_named(target), job.exporting)


def _is_current(variant: Variant, folder: Path, context_length: int | None) -> bool:
    manifest = read_manifest(folder)
    same_length = context_of_artifact(folder) == context_length
    return same_length and manifest["quantized_sha256"] == sha256(variant.quantized / MANIFEST)


def _checkpoint(job: CompareJob, name: str) -> Variant:
    """Return the variant of a deployment, whose checkpoint is made if it is missing or of another training.

    Raises:
        ExportError: the deployment needs adapters, and the run has none.
    """
    # These are made by quantize, in the run's own folders.
    run = job.run
    if name == QAT:
        return run
    if name.startswith(PTQ):
        return quantize_if_missing(run, name.removeprefix(PTQ))

    if name in WITH_ADAPTERS and not (run.reference / CONFIG).is_file():
        raise ExportError("this run trained the weights themselves, so it has no adapters to ship")
    if name == "lora":
        _checkpoint(job, "base")  # whose files it shares

    # The manifest records which fine-tune the checkpoint was made of: a new training makes it again.
    variant = job.variant(name)
    made_of = sha256(run.reference / MANIFEST)
    if (variant.quantized / MANIFEST).is_file() and read_manifest(variant.quantized)["made_of"] == made_of:
        return variant
    progress.info(f"Writing the checkpoint of {TITLES[name]}: {variant.quantized}")
    with replace_folder(variant.quantized, force=True) as work:
        extra = _write_checkpoint(job, name, work)
        write_manifest(work, "checkpoint", made_of=made_of, **extra)
    return variant


def _write_checkpoint(job: CompareJob, name: str, work: Path) -> dict[str, Any]:
    """Write a deployment's checkpoint into the empty folder `work`; return what its manifest records in addition."""
    run = job.run
    extra: dict[str, Any] = {}
    # Weights: the base for lora and base, merged for merged, the base rounded to nearest for naive.
    if name == "lora":
        for path in job.variant("base").quantized.iterdir():
            if path.is_file() and path.name != MANIFEST:
                _link_or_copy(path, work / path.name)
    elif name == "merged":
        merge.merged_model(run.reference).model.save_pretrained(work)
    else:
        model = merge.base_model(run.reference)
        if name == "naive":
            # Training may have separated tables that the base model ties.
            scheme = frozen.freeze(model, frozen.read_scheme(run.quantized))
            extra["scheme"] = frozen.scheme_metadata(scheme)
        model.save_pretrained(work, save_original_format=name != "naive")  # as in freezing

    if name in WITH_ADAPTERS:
        copy_adapters(run.reference, work)
    tokenizer.copy_tokenizer_files(run.quantized, work)
    tokenizer.add_end_tokens(work, tokenizer.trained_end_tokens(merge.adapter_metadata(run.reference)) or [])
    return extra


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


# --- measuring ---------------------------------------------------------------------------------------------


def _measure(
    job: CompareJob, evaluator: Evaluator, transport: Transport, made: Mapping[RowKey, Variant | str]
) -> tuple[Measurement, list[Deployment]]:
    """Measure the FP32 fine-tune in torch, and every row in the order of `made`."""
    # Earlier measurements, where they have the same key.
    shared_key = _evaluation_key(evaluator)
    keys = {
        row: {**shared_key, "artifact": sha256(variant.exports / row.target / MANIFEST)}
        for row, variant in made.items()
        if isinstance(variant, Variant)
    }
    known = {row: None if job.force else _read_measurement(job.measurement_path(row), key) for row, key in keys.items()}

    tuned = _measure_reference(job, evaluator, shared_key, needs_logits=None in known.values())

    deployments = []
    for row, variant in made.items():
        if isinstance(variant, str):
            deployments.append(Deployment(*row, reason=variant))
            continue
        measured = known[row]
        if measured is not None:
            progress.info(f"{row.title}: reusing the earlier measurement of this artifact")
            deployments.append(Deployment(*row, measured=measured))
            continue
        result = _measure_row(evaluator, transport, variant, row)
        if isinstance(result, Measurement):
            _write_measurement(job.measurement_path(row), keys[row], result)
            deployments.append(Deployment(*row, measured=result))
        else:
            deployments.append(Deployment(*row, reason=result))
    return tuned, deployments


def _measure_row(evaluator: Evaluator, transport: Transport, variant: Variant, row: RowKey) -> Measurement | str:
    """Measure one artifact; return the reason where it cannot be measured."""
    try:
        with device_errors():
            return evaluator.measure_artifact(variant, row.target, transport, own=False)
    except ROW_ERRORS as error:
        progress.warn(f"{row.title}: {error}")
        return f"not measured: {error}"


def _measure_reference(
    job: CompareJob, evaluator: Evaluator, shared_key: dict[str, Any], needs_logits: bool
) -> Measurement:
    """Measure the FP32 fine-tune in torch, or reuse its earlier measurement.

    needs_logits: True if rows are still to be measured, which are compared with its logits.
    """
    path, checkpoint = job.folder / "reference.json", job.variant("merged").quantized
    key = {**shared_key, "artifact": sha256(checkpoint / MANIFEST)}
    known = None if job.force else _read_measurement(path, key)
    if known is not None and not needs_logits:
        return known

    # `frozen.load` reads float checkpoints as well. A full measurement leaves its logits in the evaluator's store.
    model = frozen.load(checkpoint)
    if known is None:
        measured = evaluator.measure_reference(model, FINE_TUNED)
        _write_measurement(path, key, measured)
        return measured

    sequences = evaluator.eval_set.sequences
    with progress.bar("FP32 fine-tune, logits in torch", len(sequences)) as bar:
        reference.score(model, sequences, evaluator.fp32_logits, bar.update)
    return known


def _evaluation_key(evaluator: Evaluator) -> dict[str, Any]:
    """Return everything besides the artifact that figures depend on: tokens, prompts, and how speed is timed."""
    eval_set, options = evaluator.eval_set, evaluator.options
    ids = [[s.ids, list(s.positions)] for s in eval_set.sequences], eval_set.identity, eval_set.eos_ids
    tokens = hashlib.sha256(json.dumps(ids, default=int).encode()).hexdigest()
    timing = ("threads", "prefill", "decode", "repeats", "max_new_tokens")
    return {"format": ROW_FORMAT, "tokens": tokens, **{name: getattr(options, name) for name in timing}}


def _read_measurement(path: Path, key: dict[str, Any]) -> Measurement | None:
    """Read an earlier measurement; None if there is none with this key."""
    try:
        document = readers.read_object(path, RunError, allow_nan=True)
        return read_measurement(document["measured"]) if document["key"] == key else None
    except (RunError, AttributeError, ValueError, KeyError, TypeError):
        return None


def _write_measurement(path: Path, key: dict[str, Any], measured: Measurement) -> None:
    write_text(path, json.dumps({"key": key, "measured": to_json(measured)}, indent=1) + "\n")
