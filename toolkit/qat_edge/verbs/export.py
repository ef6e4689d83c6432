"""Frozen checkpoint -> artifacts. The exporters pack codes; none of them rounds a weight.

`export` checks the options, freezes what is not frozen yet (`verbs.quantize`), and has each `Target` write its folder
(`qat_edge_exporters.targets`): a .pte in `qat_edge_exporters.executorch.export_pte`, an ONNX folder in
`qat_edge_exporters.onnx.export_onnx`. Every artifact is then run on a few prompts (`diagnose.parity`), and takes its
place only if it computes the frozen checkpoint.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge import config, progress
from qat_edge.data.answer_schema import AnswerSchema
from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError, ExportError, RunError, UsageError
from qat_edge.evaluate.results import Parity
from qat_edge.manifest import MANIFEST, check_files, file_faults, read_manifest, sha256, write_manifest
from qat_edge.models import merge, positions, tasks
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.models.generation_settings import describe_left_out
from qat_edge.options import DEFAULT_CONTEXT, ExportOptions
from qat_edge.quant import frozen_config
from qat_edge.quant.ptq.method_names import QAT
from qat_edge.run import Run, Variant
from qat_edge.run_lock import writes_run
from qat_edge.storage import replace_folder
from qat_edge.verbs.exported_schema import save_schema, schema_text, try_schema, wanted_schema
from qat_edge.verbs.quantize import checkpoint_of, quantize_if_missing, widths_of
from qat_edge_exporters.targets import (
    DEFAULT_FORMATS,
    EXECUTORCH,
    FORMATS,
    KV_CACHE_FLOAT,
    KV_CACHE_INT8,
    NEUTRAL,
    USUAL_BACKEND,
    Target,
    require_installed,
    target_for,
    target_named,
)


@dataclass(frozen=True)
class Exported:
    """One artifact folder that was written.

    Attributes:
        target: its format, "executorch" or "onnx".
        folder: where it is.
        size_bytes: of all its files.
        wall_s: time it took to write it.
        parity: what it computes, compared with the frozen checkpoint; its time is not part of `wall_s`.
    """

    target: str
    folder: Path
    size_bytes: int
    wall_s: float
    parity: Parity


@writes_run("export")
def export(run: Run, options: ExportOptions, force: bool = False) -> list[Exported]:
    """Write every target of the run, and of the FP32 fine-tune quantized by each method of `options.ptq`.

    An artifact that exists, of the same checkpoint and options, is kept unless `force` is set, so that methods can be
    added to a run, and an export that was cut short can be repeated.

    Raises:
        UsageError: an unknown target; an option that no chosen target takes; methods together with none.
        DataError: --schema names no valid schema, or the training rows give none.
        RunError: an artifact of another checkpoint or other options exists, and `force` is not set.
        ExportError: a target cannot express the model, its positions are fewer than the context length, a backend's
            compiler is not installed, or an artifact does not compute the frozen checkpoint.
    """
    # Every option is checked first, so that nothing is computed for a combination that cannot be.
    targets = [target_for(name, options.backend) for name in dict.fromkeys(options.target)]
    _check_options(targets, options)
    _check_encoder(run, targets, options)
    options = with_context_length(run, options)
    methods = [QAT, *_ptq_methods(options)]
    _check_widths(run, targets, methods)
    _check_models(run, targets)
    answer = wanted_schema(run, options.schema, targets, force)

    folders = {checkpoint_of(run, m)[0].exports / t.name: (m, t) for m in methods for t in targets}
    pending = list(folders) if force else _pending(folders, options, answer)
    variants = {method: quantize_if_missing(run, method, force) for method in methods}
    _check_checkpoints({folder: folders[folder] for folder in pending}, variants, options)

    left_out = describe_left_out(run.quantized, [target.format for target in targets])
    if left_out and pending:
        progress.warn(left_out)

    # The torch side of the comparison is shared by all artifacts of one checkpoint.
    written: list[Exported] = []
    references: dict[str, FrozenReference] = {}
    for folder, (method, target) in folders.items():
        if folder in pending:
            variant = variants[method]
            reference = references.setdefault(method, FrozenReference(variant.quantized))
            written.append(export_one(variant, target, options, reference, answer))
        else:
            progress.info(f"Kept {folder}: exported before from the same checkpoint")
    if answer is not None:
        save_schema(run, answer)

    config.save(run.config, "export", options)
    return written


def with_context_length(run: Run, options: ExportOptions) -> ExportOptions:
    """Return options whose context length is a number: the given one, or the default that the model has positions for.

    Raises:
        ExportError: the given one is more than the positions of the model.
    """
    # A text of an encoder is as long as its model permits.
    most = None if tasks.task_of_run(run).is_encoder else _positions(run)
    length = options.context_length
    if length is None:
        length = DEFAULT_CONTEXT if most is None else min(DEFAULT_CONTEXT, most)
        if length < DEFAULT_CONTEXT:
            progress.info(f"Context: {length} tokens, because the model has no more positions")
    positions.require_positions(length, most)
    return dataclasses.replace(options, context_length=length)


def _positions(run: Run) -> int | None:
    """Return the positions of a run's model; None where no file of the run has them."""
    for folder in (run.adapter, run.reference):
        if (folder / MANIFEST).is_file():
            most = read_manifest(folder).get("max_position_embeddings")
            if isinstance(most, int):
                return most
    # Runs of earlier versions have them in a whole model alone.
    for folder in (run.quantized, run.adapter, run.reference):
        if (folder / "config.json").is_file():
            return positions.positions_of_folder(folder)
    return None


def _context_length(options: ExportOptions) -> int:
    return options.context_length or DEFAULT_CONTEXT


def export_one(
    variant: Variant,
    target: Target,
    options: ExportOptions,
    reference: FrozenReference | None = None,
    answer: AnswerSchema | None = None,
) -> Exported:
    """Write one artifact of one variant, replacing what is there.

    Args:
        variant: whose checkpoint is exported, and where the artifact goes.
        target: what to write.
        options: of the export.
        reference: torch side of the comparison, if other artifacts of the checkpoint use it as well.
        answer: schema of the answers, to be shipped with it.

    Raises:
        RunError: the checkpoint is not as it was written.
        ExportError: the target cannot express the model, or the artifact does not compute the checkpoint.
    """
    options = dataclasses.replace(options, context_length=_context_length(options))  # for the record
    folder = variant.exports / target.name
    began = time.monotonic()
    progress.info(f"Exporting {folder}")
    check_files(variant.quantized)
    frozen_config.read(variant.quantized)

    with replace_folder(folder, force=True) as work:
        target.export(variant.quantized, work, _context_length(options), **_given(target, options))
        wall_s = time.monotonic() - began

        # Nothing takes the folder's name that does not compute what was frozen.
        found = _measure_parity(variant, target, work, options, reference)
        if found.fault:
            raise ExportError(_refusal(folder, target, found))
        if answer is not None:
            target.write_schema(work, answer)
            try_schema(work, target)
        write_manifest(
            work,
            "export",
            target=target.format,
            options=config.plain(options),
            differences=list(target.differences),
            quantized_sha256=sha256(variant.quantized / MANIFEST),
            conversation=read_manifest(variant.quantized).get("conversation"),
            wall_s=wall_s,
            parity=dataclasses.asdict(found),
        )

    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    for difference in target.differences:
        progress.warn(f"{folder.name} is not exactly what was trained: {difference}")
    # The program is exact, but apps that take text have to give it the ids of training.
    for fault in target.tokenizer_faults(folder):
        progress.warn(f"{folder}: {fault}")
    progress.info(f"Wrote {folder}: {size / 1e6:.1f} MB in {wall_s:.0f} s; {found.describe()}")
    return Exported(target.format, folder, size, wall_s, found)


def _measure_parity(
    variant: Variant, target: Target, folder: Path, options: ExportOptions, reference: FrozenReference | None
) -> Parity:
    """Run the artifact in `folder` on a few prompts, where it can run here and was made of a frozen checkpoint."""
    reason = parity.not_comparable(variant.quantized)
    if reason:
        return Parity(not_measured=reason)
    progress.info("Running the artifact on a few prompts, next to the frozen checkpoint in torch")
    reference = reference or FrozenReference(variant.quantized)
    int8_cache = "kv_cache" in target.options and options.kv_cache == KV_CACHE_INT8
    return parity.measure(folder, target.name, reference, _context_length(options), int8_cache)


def _refusal(folder: Path, target: Target, found: Parity) -> str:
    """Describe why an artifact was not kept, and what to do."""
    other = next((f for f in FORMATS if f != target.format), "")
    return (
        f"{folder} was not written: the artifact does not compute the frozen checkpoint. {found.fault} "
        f"The exporter of {target.format} or its runtime computes another function for this model. Leave it out with "
        f"--target {other}, and please report this message."
    )


def _given(target: Target, options: ExportOptions) -> dict[str, Any]:
    """Return the target's own options that differ from their neutral value."""
    return {name: value for name in target.options if (value := getattr(options, name)) != NEUTRAL[name]}


def _pending(
    folders: dict[Path, tuple[str, Target]], options: ExportOptions, answer: AnswerSchema | None
) -> list[Path]:
    """Return the folders still to be written. Conflicts are detected before any slow step.

    Raises:
        RunError: an artifact is of another checkpoint or other options.
    """
    for folder, (_, target) in folders.items():
        if folder.exists() and not _is_current(folder, target, options, answer):
            found = schema_text(folder)
            reason = "another checkpoint, other options, or files that changed"
            if found != (None if answer is None else answer.text):
                reason = "it has no schema of answers" if found is None else "it was exported with --schema, or another"
            raise RunError(
                f"{folder} exists already, and is not what this command would write: {reason}. Give --force to replace "
                "it."
            )
    return [folder for folder in folders if not folder.exists()]


def _is_current(folder: Path, target: Target, options: ExportOptions, answer: AnswerSchema | None = None) -> bool:
    """Return whether exporting again would write the same artifact."""
    checkpoint = folder.parent.parent / "quantized" / MANIFEST
    if not (folder / MANIFEST).is_file() or not checkpoint.is_file():
        return False

    manifest = read_manifest(folder)
    exported = manifest["options"]
    try:
        same = context_of_artifact(folder) == _context_length(options)
    except ArtifactError:
        return False
    same = same and all(exported.get(name, NEUTRAL[name]) == getattr(options, name) for name in target.options)
    same = same and schema_text(folder) == (None if answer is None else answer.text)
    same = same and not file_faults(folder, manifest)
    return same and manifest["quantized_sha256"] == sha256(checkpoint)


def _check_options(targets: list[Target], options: ExportOptions) -> None:
    """Refuse options that no chosen target takes, or that exclude each other.

    Raises:
        UsageError: names the options, or an extra that is not installed.
        ExportError: the backend's compiler is not installed.
    """
    require_installed(target.name for target in targets)
    _check_backend(targets, options)
    _check_kv_cache(targets, options)
    for name, neutral in NEUTRAL.items():
        flag = _flag(name, options)
        if getattr(options, name) != neutral and not any(name in target.options for target in targets):
            raise UsageError(f"{flag} is for --target {EXECUTORCH}, which was not given. Give both, or neither.")

    for target in targets:
        for (one, other), reason in target.exclusions.items():
            if all(getattr(options, name) != NEUTRAL[name] for name in (one, other)):
                raise UsageError(f"{_flag(one, options)} and {_flag(other, options)}: {reason}. Give one of the two.")


def _check_backend(targets: list[Target], options: ExportOptions) -> None:
    """Refuse a backend without its target, with options that it does not take, or that is not installed."""
    if options.backend == USUAL_BACKEND:
        return
    flag = f"--backend {options.backend}"
    lowered = next((target for target in targets if target.backend is not None), None)
    if lowered is None:
        raise UsageError(f"{flag} is for --target {EXECUTORCH}, which was not given. Give both, or neither.")

    for name, neutral in NEUTRAL.items():
        if getattr(options, name) != neutral and name not in lowered.options:
            other = _flag(name, options)
            raise UsageError(f"{other} is for --backend {USUAL_BACKEND}; {flag} has operators and a cache of its own.")
    lowered.require_compiler()


def _check_kv_cache(targets: list[Target], options: ExportOptions) -> None:
    """Refuse an int8 KV cache together with a target that has none: the artifacts would compute different functions.

    onnxruntime 1.31 quantizes a cache on the CPU by scales calibrated beforehand, none for each token.
    """
    others = [target.format for target in targets if "kv_cache" not in target.options]
    if options.kv_cache != KV_CACHE_FLOAT and others:
        flag = _flag("kv_cache", options)
        raise UsageError(f"{flag} is for --target {EXECUTORCH} alone; {others[0]} has no such cache.")


def _check_encoder(run: Run, targets: list[Target], options: ExportOptions) -> None:
    """Refuse for an encoder what is for models that generate text, before anything is merged.

    Raises:
        UsageError: names the option.
    """
    flags = [f"--target {target.format}" for target in targets if target.backend is None and not target.encoder]
    flags += [_flag("kv_cache", options)] if options.kv_cache != KV_CACHE_FLOAT else []
    flags += [f"--backend {options.backend}"] if options.backend != USUAL_BACKEND else []
    for flag in flags:
        tasks.require_causal_lm(run, flag)


def _check_widths(run: Run, targets: list[Target], methods: list[str]) -> None:
    """Refuse targets that have no operator for the bits of a checkpoint, before anything is merged.

    Raises:
        UsageError: names the target, and one that has it.
    """
    for method in methods:
        widths = widths_of(run, method)
        for target in targets:
            missing = target.missing_widths(widths)
            if missing:
                able = next((name for name in FORMATS if not target_named(name).missing_widths(widths)), FORMATS[0])
                raise UsageError(
                    f"--target {target.format}: {missing.removesuffix('.')}, which {run.path} was {_origin(method)}. "
                    f"Run `qat-edge export {run.path} --target {able}`."
                )


def _check_models(run: Run, targets: list[Target]) -> None:
    """Refuse a format that cannot express the model, before anything is merged.

    `finetune` has warned of the default formats, whose exporters check again: one that is alone is left to them.

    Raises:
        ExportError: names the format and the reason.
    """
    others = [target for target in targets if len(targets) > 1 or target.format not in DEFAULT_FORMATS]
    model = next((f for f in (run.quantized, run.adapter, run.reference) if (f / "config.json").is_file()), None)
    if not others:
        return
    config = frozen_config.read(model) if model is not None else merge.base_config(run.adapter)
    for target in others:
        reason = "" if config is None else target.missing_for(config)
        if reason:
            other = next(name for name in DEFAULT_FORMATS if name != target.format)
            raise ExportError(f"{target.format}: {reason} Leave it out with --target {other}.")


def _check_checkpoints(
    pending: Mapping[Path, tuple[str, Target]], variants: Mapping[str, Variant], options: ExportOptions
) -> None:
    """Refuse checkpoints that a target cannot hold, before anything is built; an exporter checks one alone.

    Args:
        pending: method and target of each artifact to write, by its folder.
        variants: their checkpoints by method.
        options: of the export.

    Raises:
        ExportError: names the format and the reason.
    """
    for method, target in pending.values() if len(pending) > 1 else ():
        check_files(variants[method].quantized)
        target.require_checkpoint(variants[method].quantized, _context_length(options))


def _origin(method: str) -> str:
    """Return how a variant got its bits, for messages."""
    return "trained with" if method == QAT else f"quantized to by --method {method}"


def _ptq_methods(options: ExportOptions) -> list[str]:
    """Return the PTQ methods to export next to the run itself, each once.

    Raises:
        UsageError: none together with a method.
    """
    if "none" in options.ptq and len(set(options.ptq)) > 1:
        raise UsageError(f"--ptq none cannot be combined with --ptq {next(m for m in options.ptq if m != 'none')}.")
    return [method for method in dict.fromkeys(options.ptq) if method != "none"]


def _flag(name: str, options: ExportOptions) -> str:
    """Return an option as the user typed it: "--portable", "--kv-cache int8"."""
    value = getattr(options, name)
    return config.flag_name(name) if value is True else f"{config.flag_name(name)} {value}"
