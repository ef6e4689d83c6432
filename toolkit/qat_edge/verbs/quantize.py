"""Freeze the codes: of the trained adapters, or of the FP32 fine-tune by post-training quantization.

The one moment at which a weight is rounded for good; exporters pack what is written here.
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
from qat_edge.models.merge import WHOLE_MODEL, Merged, adapter_facts, merged_model
from qat_edge.quant import frozen, rotation, scheme
from qat_edge.quant.bit_allocation import load_bits
from qat_edge.quant.ptq import methods
from qat_edge.run import Run, Variant, read_manifest, replace_folder, sha256, write_manifest

ADAPTER_WEIGHTS = "adapter_model.safetensors"
QAT = "qat"


@dataclass(frozen=True)
class Quantized:
    """One frozen checkpoint. weights: how many got which bits. calibration: what was looked at, None for nothing."""

    method: str
    folder: Path
    weights: str
    calibration: dict[str, Any] | None
    wall_s: float


def quantize(run: Run, options: QuantizeOptions, force: bool = False) -> Quantized:
    """Freeze the run's model into RUN/quantized, or one of post-training quantization into RUN/ptq/METHOD/quantized.

    A checkpoint that was made of the same adapter with the same options stays as it is.

    force: make it in any case, and merge although libraries have other versions than in training.

    Raises:
        UsageError: --bits or --rotate for what was trained under other bits, or turned; a file of bits that does not
            fit the model.
        RunError: another checkpoint is there (without `force`), or there is no adapter to make one of.
        DataError: too little calibration data.
        ModelError: a model that the method cannot go through, or whose hidden states cannot be turned.
    """
    began = time.monotonic()
    if options.method == QAT and options.bits is not None:
        raise UsageError("--bits and --method qat: the trained weights have the bits of finetune --bits. Leave it out.")
    if options.method == QAT and options.rotate:
        raise UsageError("--rotate and --method qat: finetune --rotate has decided that. Leave it out.")
    if options.rotate:
        tasks.require_generating(run, "--rotate")
    variant, adapter = checkpoint_of(run, options.method)
    if variant.quantized.exists() and not force:
        return _made_before(variant, adapter, options)
    merged = merged_model(adapter, force)
    if options.bits is not None:
        asked, trained = load_bits(Path(options.bits)), merged.scheme
        plan = scheme.choose(merged.model, trained.group_size, asked, trained.table_bits)
        merged = replace(merged, scheme=plan)
    if options.rotate:
        rotation.rotate(merged.model, merged.scheme, options.seed)
        tied = merged.scheme.tied and scheme.share_table(merged.model)
        merged = replace(merged, scheme=replace(merged.scheme, tied=tied))
    scales, calibrated = _scales(run, merged, options)
    frozen.freeze(merged.model, merged.scheme, scales)
    with replace_folder(variant.quantized, force=True) as work:
        merged.model.save_pretrained(work)
        merged.tokenizer.save_pretrained(work)
        write_manifest(
            work,
            "quantized",
            method=options.method,
            options=config.plain(options),
            calibration=calibrated,
            rotation_seed=_rotation_seed(adapter, options),
            adapter_sha256=_weights_sha256(adapter),
            scheme=frozen.scheme_facts(merged.scheme),
            **{k: v for k, v in adapter_facts(adapter).items() if k in ("model", "data", "seed", "device")},
        )
    progress.info(f"Frozen: {merged.scheme.summary()} -> {variant.quantized}")
    wall_s = time.monotonic() - began
    return Quantized(options.method, variant.quantized, merged.scheme.summary(), calibrated, wall_s)


def quantize_if_missing(run: Run, method: str, force: bool = False) -> Variant:
    """The variant of one method, frozen with the default options unless that was done with whatever options.

    force: freeze again where the checkpoint there was made of another adapter.

    Raises:
        RunError: it was made of another adapter, and `force` is not set.
    """
    variant, adapter = checkpoint_of(run, method)
    if not variant.quantized.exists() or (force and not _is_of(variant, adapter)):
        quantize(run, QuantizeOptions(method=method), force=force)
    elif not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made of another adapter. Give --force to make it again.")
    return variant


def checkpoint_of(run: Run, method: str) -> tuple[Variant, Path]:
    """Where a method's checkpoint and exports lie, and the adapter that it is made of."""
    return (run, run.adapter) if method == QAT else (run.ptq(method), run.reference)


def _made_before(variant: Variant, adapter: Path, options: QuantizeOptions) -> Quantized:
    """The checkpoint that is there.

    Raises:
        RunError: it is not what was asked for.
    """
    facts = read_manifest(variant.quantized)
    if not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made of another adapter. Give --force to make it again.")
    if facts["options"] != config.plain(options):
        before = ", ".join(f"{config.flag_name(k)} {v}" for k, v in facts["options"].items())
        raise RunError(f"{variant.quantized} was made with other options ({before}). Give --force to make it again.")
    progress.info(f"{variant.quantized} is there already, of the same adapter and options")
    summary = frozen.read_scheme(variant.quantized).summary()
    return Quantized(options.method, variant.quantized, summary, facts["calibration"], 0.0)


def _is_of(variant: Variant, adapter: Path) -> bool:
    return bool(read_manifest(variant.quantized)["adapter_sha256"] == _weights_sha256(adapter))


def _scales(run: Run, merged: Merged, options: QuantizeOptions) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Group scales of the merged weights, which GPTQ and AWQ change as well, and what was calibrated on."""
    if options.method == QAT:
        return merged.scales, None
    if options.method not in methods.CALIBRATED:
        return methods.apply(merged.model, merged.scheme, options.method, []), None
    batches, facts = _calibration(run, merged, options)
    # bfloat16 products as in training: four times faster here; statistics and rounding stay float32.
    with torch.autocast("cpu", torch.bfloat16):
        return methods.apply(merged.model, merged.scheme, options.method, batches), facts


def _calibration(run: Run, merged: Merged, options: QuantizeOptions) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Batches for `ptq.apply`, tokenized as for training, and what the manifest records of them."""
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.calibration_data or trained.data
    kind, loaded = tasks.of_run(run), load_rows(source, "train")
    rows = training_examples.tokenize(kind, loaded, merged.model, merged.tokenizer, trained.max_length).rows
    tokens = calibration.tokens_to_take(options.calibration_tokens, rows)
    chosen = calibration.choose_rows(rows, tokens, options.seed, source, "--calibration-tokens")
    progress.info(f"Calibrating on {tokens} tokens in {len(chosen)} of {len(rows)} rows of {source}")
    facts = {"source": source, "rows": len(chosen), "tokens": tokens, "seed": options.seed}
    return calibration.batches(chosen, merged.tokenizer), facts


def _rotation_seed(adapter: Path, options: QuantizeOptions) -> int | None:
    """Of the coordinates the checkpoint is in; None where they are the base model's."""
    if options.method == QAT:
        seed: int | None = (adapter_facts(adapter)["start"] or {}).get("rotation_seed")
        return seed
    return options.seed if options.rotate else None


def _weights_sha256(adapter: Path) -> str | None:
    """Of the adapters or the whole model; None where there is neither: what is asked of it next says so."""
    found = [path for name in (ADAPTER_WEIGHTS, WHOLE_MODEL) if (path := adapter / name).is_file()]
    return sha256(found[0]) if found else None
