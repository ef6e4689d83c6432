"""Validate an encoder: run every text through each artifact, one at a time in its own runtime on this machine.

cosine    cosine similarity of an artifact's outputs (embedding or logits) and the FP32 fine-tune's, over all texts
parity    the same with the frozen checkpoint in torch, whose outputs an exact runtime reproduces
quality   accuracy, retrieval accuracy or rank correlation, depending on the rows: see `encoder_results.MEASURES`
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qat_edge import config, option_paths, progress
from qat_edge.data import training_examples
from qat_edge.data.changed_rows import EVAL_DATA, warn_of_change
from qat_edge.data.formats import RowStream
from qat_edge.errors import DataError, ModelError, RunError, UsageError
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.encoder_results import ACCURACY, CORRELATION, RETRIEVAL, EncoderReport, EncoderResult, save
from qat_edge.evaluate.gates import ENCODER_GATES, check_encoder_gates
from qat_edge.evaluate.metrics import first_not_finite
from qat_edge.evaluate.results import FINE_TUNED, REFERENCES, UNTRAINED
from qat_edge.export_command import export_targets
from qat_edge.manifest import MANIFEST, check_files, sha256
from qat_edge.models import merge, tasks
from qat_edge.models.artifact_options import options_of_artifact
from qat_edge.models.tasks import ModelTask, SentenceEncoder
from qat_edge.options import ValidateOptions
from qat_edge.quant import frozen
from qat_edge.readers import counted
from qat_edge.run import Run, Variant
from qat_edge_devices import open_transport
from qat_edge_exporters.targets import TARGETS, target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 16  # texts that torch computes at once
OPTIONS = ("eval_data", "profile", "target", *ENCODER_GATES)  # the others are for models that generate text
Outputs = NDArray[np.float32]  # (texts, width); for pairs, the first texts of all, then the second ones


def validate_encoder(run: Run, options: ValidateOptions, force: bool = False) -> EncoderReport:
    """Compare the artifacts of the run and of its PTQ variants with the FP32 fine-tune, and write RUN/answers.json.

    Raises:
        UsageError: an option or a gate that is for other models.
        RunError: nothing exported, an artifact of an earlier checkpoint, or measured before and `force` is not set.
        DataError: no evaluation rows.
        ModelError: the outputs of the FP32 fine-tune are not finite.
    """
    task = tasks.task_of_run(run)
    _check_options(run, options, task)
    if run.answers.exists() and not force:
        raise RunError(f"{run.answers} exists already. Give --force to measure again.")
    artifacts = _exported(run, options)

    # The reference: outputs of the FP32 fine-tune for every text.
    name = FINE_TUNED if run.is_trained else UNTRAINED
    progress.info(f"{REFERENCES[name]}: computing outputs in torch, which the artifacts are compared with")
    tuned = merge.merged_model(run.reference)
    rows = _evaluation_rows(run, options, task, tuned)
    # Of pairs, all first texts come before all second ones, as `quality` expects.
    texts = [*(row["input_ids"] for row in rows), *(row["other_ids"] for row in rows if "other_ids" in row)]
    labels = np.array([row["labels"][0] for row in rows])
    reference = _torch_outputs(task, tuned.model, texts)
    if _not_finite(reference):
        raise ModelError(
            f"The {REFERENCES[name]}: {_not_finite(reference)}. Nothing can be compared with it. Train again, with a "
            "lower --learning-rate if the loss was not finite."
        )

    results = [EncoderResult(name, "torch", _size_by_part(tuned.model), quality(task, reference, labels))]
    checkpoints: dict[str, Outputs] = {}  # the torch side is shared by all targets of a variant
    for variant, target in artifacts:
        if variant.name not in checkpoints:
            progress.info(f"{variant.name}: computing outputs of the frozen checkpoint in torch")
            checkpoints[variant.name] = _torch_outputs(task, frozen.load(variant.quantized), texts)
        measured = _Measured(texts, reference, checkpoints[variant.name], labels)
        results.append(_measure(task, variant, target, measured))

    report = EncoderReport(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=LOCAL,
        machine=_machine(),
        options={name: value for name, value in config.plain(options).items() if name in OPTIONS},
        task=task.name,
        measure=_metric(task),
        rows=len(rows),
        texts=len(texts),
        results=results,
        gates=check_encoder_gates(options, results),
    )
    save(report, run.answers)
    config.save(run.config, "validate", options)
    return report


def quality(task: ModelTask, outputs: Outputs, labels: NDArray[Any]) -> float:
    """Return the task's metric: a share from 0 to 1, or a correlation.

    labels: (rows,) labels, or scores of pairs.
    """
    if not isinstance(task, SentenceEncoder):
        return float((outputs.argmax(1) == labels).mean())

    first, second = np.split(outputs, 2)
    if not task.scored:
        # Each anchor's own positive has the same index.
        return float(((first @ second.T).argmax(1) == np.arange(len(first))).mean())

    # Spearman's correlation is Pearson's of the ranks. Embeddings have length 1: the dot product is the cosine.
    return float(np.corrcoef(_ranks((first * second).sum(1)), _ranks(labels))[0, 1])


def cosines(one: Outputs, other: Outputs) -> NDArray[np.float64]:
    """Return the cosine similarity of each text's outputs, (texts,)."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    similarity: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return similarity


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return the rank of each value; equal values share their mean rank."""
    # A value that occurs n times has the n ranks up to its cumulative count; their mean is that minus (n - 1) / 2.
    _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[index]
    return ranks


class _Measured(NamedTuple):
    """Evaluation texts, and the outputs in torch that those of an artifact are compared with.

    Attributes:
        texts: token ids of each text.
        reference: outputs of the FP32 fine-tune.
        checkpoint: outputs of the frozen checkpoint.
        labels: (rows,) labels, or scores of pairs.
    """

    texts: Sequence[list[int]]
    reference: Outputs
    checkpoint: Outputs
    labels: NDArray[Any]


def _measure(task: ModelTask, variant: Variant, target: str, measured: _Measured) -> EncoderResult:
    """Run all texts through a variant's artifact and compare its outputs with FP32's and the checkpoint's."""
    texts, reference, checkpoint, labels = measured
    folder = variant.exports / target
    artifact_sha256 = sha256(folder / MANIFEST)
    progress.info(f"{variant.name}: running {counted(len(texts), 'text')} through {folder}")
    outputs = target_named(target).run_encoder(folder, texts)
    artifact = target_named(target).read(folder)

    # Figures of numbers that are not finite have no meaning: nan fails every gate.
    not_finite = _not_finite(outputs)
    if not_finite:
        progress.warn(f"{variant.name}, {target}: {not_finite}")
        outputs = np.full_like(outputs, np.nan)

    # A classifier is also judged by its labels; an embedding has none.
    similarity = cosines(outputs, reference)
    agreement: float | None = None
    if not isinstance(task, SentenceEncoder):
        agreement = np.nan if not_finite else float((outputs.argmax(1) == reference.argmax(1)).mean())

    return EncoderResult(
        name=variant.name,
        target=target,
        size_bytes=artifact.size_bytes,
        quality=np.nan if not_finite else quality(task, outputs, labels),
        cosine=float(similarity.mean()),
        least_cosine=float(similarity.min()),
        agreement=agreement,
        parity=float(cosines(outputs, checkpoint).mean()),
        not_finite=not_finite,
        artifact_sha256=artifact_sha256,
    )


def _not_finite(outputs: Outputs) -> str:
    """Return which outputs are not finite, as a sentence without a stop; empty where all are."""
    row = first_not_finite(outputs)
    return "" if row is None else f"its outputs are not finite, first for text {row}"


def _metric(task: ModelTask) -> str:
    if not isinstance(task, SentenceEncoder):
        return ACCURACY
    return CORRELATION if task.scored else RETRIEVAL


def _size_by_part(model: nn.Module) -> dict[str, int]:
    """Return the bytes of a torch model's weights, by the parts of an artifact; a head counts as linear layers."""
    linears = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Linear))
    tables = sum(module.weight.nbytes for module in model.modules() if isinstance(module, nn.Embedding))
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return {"linears": linears, "embedding": tables, "float": whole - linears - tables}


def _machine() -> dict[str, Any]:
    with closing(open_transport(LOCAL)) as transport:
        return dataclasses.asdict(transport.info())


def _check_options(run: Run, options: ValidateOptions, task: ModelTask) -> None:
    """Refuse, before anything is loaded, options that have no meaning for an encoder."""
    by_profile = "" if options.profile is None else f" (given, or set by --profile {options.profile})"
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value == field.default or field.name in OPTIONS:
            continue
        flag = config.flag_name(field.name) + (f" {value[0]}" if isinstance(value, tuple) else "")
        tasks.require_causal_lm(run, f"validate {flag}{by_profile}")

    for target in options.target:
        if not target_named(target).encoder:
            tasks.require_causal_lm(run, f"validate --target {target}{by_profile}")
    if options.min_top1 is not None and isinstance(task, SentenceEncoder):
        raise UsageError(
            f"--min-top1{by_profile} is for models that choose tokens or labels; {run.path} holds {task.title}. "
            "Use --min-cosine."
        )


def _exported(run: Run, options: ValidateOptions) -> list[tuple[Variant, str]]:
    """Return the artifacts to measure: those of --target, or all. The run itself must have them, as gates check it.

    Raises:
        RunError: the run has none, or one was exported from an earlier checkpoint.
        ArtifactError: one was exported with other options than its manifest says.
    """
    exported = [target for target in run.targets() if target in TARGETS and target_named(target).encoder]
    wanted = options.target or exported
    missing = [target for target in wanted if target not in exported]
    if missing or not wanted:
        what = f"{', '.join(missing)} not exported yet" if missing else "nothing exported yet"
        raise RunError(f"{run.exports}: {what}. Run `{export_targets(run.path, missing)}`.")

    found = [(variant, target) for variant in run.variants() for target in wanted if target in variant.targets()]
    for variant, target in found:
        check_files(variant.quantized)
        check_files(variant.exports / target)
        options_of_artifact(variant.exports / target)
        variant.require_current(target)
    return found


def _evaluation_rows(
    run: Run, options: ValidateOptions, task: ModelTask, tuned: merge.MergedModel
) -> Sequence[dict[str, Any]]:
    """Tokenize --eval-data of validate, or of finetune."""
    trained = config.load_trained(run.config)
    source = options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: the run was trained without --eval-data. Give --eval-data.")
    if source == trained.eval_data:
        option_paths.require_data(source, "validate --eval-data")
    stream = RowStream(source, "eval")
    rows = training_examples.tokenize_for_task(task, stream, tuned.model, tuned.tokenizer, trained.max_length).rows
    warn_of_change(run, EVAL_DATA, stream, "validate --eval-data", options.eval_data)
    return rows


def _torch_outputs(task: ModelTask, model: PreTrainedModel, texts: Sequence[list[int]]) -> Outputs:
    """Compute the outputs for all texts, a padded batch at a time."""

    def compute(batch: Sequence[list[int]]) -> Tensor:
        ids = pad_sequence([torch.tensor(text) for text in batch], batch_first=True)
        mask = pad_sequence([torch.ones(len(text), dtype=torch.int64) for text in batch], batch_first=True)
        return task.predict(model, ids, mask)

    with torch.no_grad():
        batches = [compute(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        return torch.cat(batches).numpy()
