"""Freeze codes and scales: of the trained model, or of the FP32 fine-tune by post-training quantization (PTQ).

This is the only place where a deployed weight is rounded. `models.merge` merges the adapters, `quant.frozen` computes
codes and scales and writes the frozen checkpoint; exporters pack what it holds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_edge import config, progress
from qat_edge.config import FinetuneOptions, QuantizeOptions
from qat_edge.data import calibration, training_examples
from qat_edge.data.formats import load_rows
from qat_edge.errors import RunError, UsageError
from qat_edge.models import tasks
from qat_edge.models.merge import WHOLE_MODEL, MergedModel, adapter_metadata, merged_model
from qat_edge.quant import frozen, rotation, scheme
from qat_edge.quant.bit_allocation import load_bits
from qat_edge.quant.ptq import methods
from qat_edge.run import Run, Variant, read_manifest, replace_folder, sha256, write_manifest

ADAPTER_WEIGHTS = "adapter_model.safetensors"
QAT = "qat"


@dataclass(frozen=True)
class Quantized:
    """Result: one frozen checkpoint.

    Attributes:
        method: "qat", or the PTQ method.
        folder: the checkpoint.
        weights: how many weights have which bits, as text.
        calibration: source, rows, tokens and seed of the calibration data; None where the method uses none.
        wall_s: time it took; 0 where the checkpoint existed.
    """

    method: str
    folder: Path
    weights: str
    calibration: dict[str, Any] | None
    wall_s: float


def quantize(run: Run, options: QuantizeOptions, force: bool = False) -> Quantized:
    """Freeze the run's model into RUN/quantized, or a PTQ variant of it into RUN/ptq/METHOD/quantized.

    A checkpoint of the same adapter, made with the same options, is kept as it is.

    Args:
        run: a run whose training is finished.
        options: method, bits, rotation and calibration data.
        force: replace the checkpoint that exists, and merge even if library versions differ from those in training.

    Raises:
        UsageError: --bits or --rotate for the trained model; a file of bits that does not fit the model.
        RunError: another checkpoint exists (without `force`), or there is no adapter.
        DataError: too little calibration data.
        ModelError: a model that the method cannot process, or whose hidden states cannot be rotated.
    """
    began = time.monotonic()
    _check_options(run, options)
    variant, adapter = checkpoint_of(run, options.method)
    if variant.quantized.exists() and not force:
        return _existing(variant, adapter, options)

    # Merge the adapters in float32: W + s B A.
    merged = merged_model(adapter, force)

    # PTQ may choose other bits and another basis than training; QAT has trained with its own.
    if options.bits is not None:
        bits, trained = load_bits(Path(options.bits)), merged.scheme
        new_scheme = scheme.choose_scheme(merged.model, trained.group_size, bits, trained.table_bits)
        merged = replace(merged, scheme=new_scheme)
    if options.rotate:
        rotation.rotate(merged.model, merged.scheme, options.seed)
        tied = merged.scheme.tied and scheme.shares_table(merged.model)
        merged = replace(merged, scheme=replace(merged.scheme, tied=tied))

    # Scales come first: codes are what rounding by them gives.
    scales, calibration_record = _scales(run, merged, options)
    frozen.freeze(merged.model, merged.scheme, scales)

    with replace_folder(variant.quantized, force=True) as work:
        merged.model.save_pretrained(work)
        merged.tokenizer.save_pretrained(work)
        write_manifest(
            work,
            "quantized",
            method=options.method,
            options=config.plain(options),
            calibration=calibration_record,
            rotation_seed=_rotation_seed(adapter, options),
            adapter_sha256=_weights_sha256(adapter),
            scheme=frozen.scheme_metadata(merged.scheme),
            **{k: v for k, v in adapter_metadata(adapter).items() if k in ("model", "data", "seed", "device")},
        )
    progress.info(f"Frozen: {merged.scheme.summary()} -> {variant.quantized}")
    wall_s = time.monotonic() - began
    return Quantized(options.method, variant.quantized, merged.scheme.summary(), calibration_record, wall_s)


def _check_options(run: Run, options: QuantizeOptions) -> None:
    """Refuse options that only PTQ has, for the trained model.

    Raises:
        UsageError: names the option.
    """
    if options.method == QAT and options.bits is not None:
        raise UsageError("--bits and --method qat: the trained weights have the bits of finetune --bits. Leave it out.")
    if options.method == QAT and options.rotate:
        raise UsageError("--rotate and --method qat: finetune --rotate has decided that. Leave it out.")
    if options.rotate:
        tasks.require_causal_lm(run, "--rotate")


def quantize_if_missing(run: Run, method: str, force: bool = False) -> Variant:
    """Return the variant of one method; it is frozen with the default options where it does not exist.

    Args:
        run: a run whose training is finished.
        method: "qat", or a PTQ method.
        force: freeze again where the existing checkpoint was made from another adapter.

    Raises:
        RunError: it was made from another adapter, and `force` is not set.
    """
    variant, adapter = checkpoint_of(run, method)
    if not variant.quantized.exists() or (force and not _is_of(variant, adapter)):
        quantize(run, QuantizeOptions(method=method), force=force)
    elif not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made from another adapter. Give --force to make it again.")
    return variant


def checkpoint_of(run: Run, method: str) -> tuple[Variant, Path]:
    """Return the variant with a method's checkpoint and exports, and the adapter that it is made from."""
    return (run, run.adapter) if method == QAT else (run.ptq(method), run.reference)


def _existing(variant: Variant, adapter: Path, options: QuantizeOptions) -> Quantized:
    """Return the checkpoint that exists.

    Raises:
        RunError: it was made from another adapter, or with other options.
    """
    manifest = read_manifest(variant.quantized)
    if not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made from another adapter. Give --force to make it again.")
    before_options = config.current_values(QuantizeOptions, manifest["options"])
    if before_options != config.plain(options):
        before = ", ".join(f"{config.flag_name(k)} {v}" for k, v in before_options.items())
        raise RunError(f"{variant.quantized} was made with other options ({before}). Give --force to make it again.")
    progress.info(f"{variant.quantized} exists already, from the same adapter and options")
    summary = frozen.read_scheme(variant.quantized).summary()
    return Quantized(options.method, variant.quantized, summary, manifest["calibration"], 0.0)


def _is_of(variant: Variant, adapter: Path) -> bool:
    """Return whether a variant's checkpoint was made from this adapter."""
    return bool(read_manifest(variant.quantized)["adapter_sha256"] == _weights_sha256(adapter))


def _scales(
    run: Run, merged: MergedModel, options: QuantizeOptions
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Return the group scales by weight, and a record of the calibration data.

    Methods that compensate rounding errors (GPTQ, GPTAQ, coordinate descent, AWQ) also change the merged weights.
    """
    if options.method == QAT:
        return merged.scales, None
    if options.method not in methods.CALIBRATED:
        return methods.apply(merged.model, merged.scheme, options.method, []), None

    batches, record = _calibration(run, merged, options)
    # Matrix products in bfloat16, as in training: four times faster on this CPU. Statistics and rounding stay float32.
    with torch.autocast("cpu", torch.bfloat16):
        return methods.apply(merged.model, merged.scheme, options.method, batches), record


def _calibration(
    run: Run, merged: MergedModel, options: QuantizeOptions
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Return calibration batches, tokenized as for training, and what the manifest records about them."""
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.calibration_data or trained.data
    task, loaded = tasks.task_of_run(run), load_rows(source, "train")
    rows = training_examples.tokenize_for_task(task, loaded, merged.model, merged.tokenizer, trained.max_length).rows
    tokens = calibration.choose_token_count(options.calibration_tokens, rows)
    chosen = calibration.choose_rows(rows, tokens, options.seed, source, "--calibration-tokens")
    progress.info(f"Calibrating on {tokens} tokens in {len(chosen)} of {len(rows)} rows of {source}")
    record = {"source": source, "rows": len(chosen), "tokens": tokens, "seed": options.seed}
    return calibration.make_batches(chosen, merged.tokenizer), record


def _rotation_seed(adapter: Path, options: QuantizeOptions) -> int | None:
    """Return the seed of the checkpoint's rotation; None without rotation."""
    if options.method == QAT:
        seed: int | None = (adapter_metadata(adapter)["start"] or {}).get("rotation_seed")
        return seed
    return options.seed if options.rotate else None


def _weights_sha256(adapter: Path) -> str | None:
    """Return the hash of the adapters, or of the whole model; None where there is neither (loading it reports that)."""
    found = [path for name in (ADAPTER_WEIGHTS, WHOLE_MODEL) if (path := adapter / name).is_file()]
    return sha256(found[0]) if found else None
