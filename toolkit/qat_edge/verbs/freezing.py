"""Make a frozen checkpoint: merge, rotate, quantize, write.

Weights are rounded for deployment by `quant.frozen.freeze` only, with the formulas of `quant.numerics`. `models.merge`
merges the adapters, `quant.ptq.methods` has the PTQ methods. Exporters pack what the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat_edge import config, option_paths, progress
from qat_edge.data import calibration, training_examples
from qat_edge.data.changed_rows import DATA, warn_of_change
from qat_edge.data.formats import RowStream
from qat_edge.data.streamed_rows import sample_of
from qat_edge.errors import UsageError
from qat_edge.manifest import write_manifest
from qat_edge.models import tasks
from qat_edge.models.merge import MergedModel, adapter_metadata, merged_model
from qat_edge.models.tokenizer import add_end_tokens, trained_end_tokens
from qat_edge.options import QuantizeOptions
from qat_edge.quant import bits_file, frozen, frozen_config, rotation, scheme
from qat_edge.quant.autocast import gains_from_bfloat16
from qat_edge.quant.codebook import FEWEST
from qat_edge.quant.frozen_adapters import copy_adapters
from qat_edge.quant.ptq import methods
from qat_edge.quant.ptq.method_names import CALIBRATED, QAT
from qat_edge.readers import counted
from qat_edge.run import Run, Variant
from qat_edge.storage import replace_folder
from qat_edge.train.option_checks import row_length

CARRIED = ("model", "data", "conversation", "seed", "device")  # entries of the adapter's manifest


def freeze(
    run: Run, variant: Variant, adapter: Path, adapter_sha256: str | None, options: QuantizeOptions, force: bool
) -> tuple[str, dict[str, Any] | None]:
    """Write the frozen checkpoint of one variant, replacing what is there.

    Args:
        run: the run that the variant belongs to.
        variant: where the checkpoint goes.
        adapter: the adapter that is merged.
        adapter_sha256: hash of its weights, for the manifest.
        options: method, bits, rotation and calibration data.
        force: merge even if library versions differ from those in training.

    Returns:
        How many weights have which bits, as text, and a record of the calibration data.

    Raises:
        UsageError: a file of bits that does not fit the model; levels without a weight of 2 bits.
        DataError: too little calibration data.
        ModelError: a model that the method cannot process, or cannot rotate.
    """
    if options.bits is not None:
        metadata = adapter_metadata(adapter)
        bits_file.require_model(options.bits, metadata["model"]["identity"], metadata["kept_layers"])

    # Merge the adapters in float32: W + s B A.
    merged = merged_model(adapter, force)

    # PTQ may choose other bits and another basis than training; QAT has trained with its own.
    if (options.bits, options.weight_bits, options.weight_levels) != (None, None, None):
        merged = replace(merged, scheme=_requested_scheme(merged, adapter, options))
    if options.rotate:
        progress.info(rotation.rotate(merged.model, merged.scheme, options.seed).describe())

    # Scales come first: codes are what rounding by them gives.
    scales, calibration_record = _scales(run, merged, options)
    stored_scheme = frozen.freeze(merged.model, merged.scheme, scales)

    # A run of an earlier version has no record of how its answers end.
    ends = trained_end_tokens(adapter_metadata(adapter)) or []
    with replace_folder(variant.quantized, force=True) as work:
        # Under the names of the loaded model, which torchao's descriptions have, not under those of an older format.
        merged.model.save_pretrained(work, save_original_format=False)
        merged.tokenizer.save_pretrained(work)
        add_end_tokens(work, ends)
        if adapter_metadata(adapter).get("unmerged"):
            copy_adapters(adapter, work)
        write_manifest(
            work,
            "quantized",
            method=options.method,
            options=config.plain(options),
            calibration=calibration_record,
            rotation_seed=_rotation_seed(adapter, options),
            adapter_sha256=adapter_sha256,
            scheme=frozen.scheme_metadata(stored_scheme),
            model_config=frozen_config.settings_of(work),
            **{k: v for k, v in adapter_metadata(adapter).items() if k in CARRIED},
        )
    progress.info(f"Frozen: {merged.scheme.summary()} -> {variant.quantized}")
    return merged.scheme.summary(), calibration_record


def _requested_scheme(merged: MergedModel, adapter: Path, options: QuantizeOptions) -> scheme.Scheme:
    """Return the scheme with the bits that a PTQ method is given instead of those of the training.

    Raises:
        UsageError: a file of bits that does not fit the model; levels without a weight of 2 bits.
    """
    metadata, trained = adapter_metadata(adapter), merged.scheme
    codes = scheme.LinearCodes.of_training(metadata)
    levels = bits_file.requested_levels(options.bits, options.weight_levels) or codes.levels
    codes = scheme.LinearCodes(options.weight_bits or codes.bits, levels)
    # Bits of finetune for single layers hold where neither the file nor the flag says otherwise.
    bits = metadata["bits"] if options.weight_bits is None else {}
    bits = bits_file.load_bits(Path(options.bits)) if options.bits is not None else bits
    found = scheme.choose_scheme(merged.model, trained.group_size, bits, trained.table_bits, codes)
    if options.weight_levels is not None and FEWEST not in found.widths:
        raise UsageError(
            f"--weight-levels {options.weight_levels}: only 2-bit weights have a choice of levels, and all have 4 or 8 "
            "bits here. Add --weight-bits 2, or leave it out."
        )
    return found


def _scales(
    run: Run, merged: MergedModel, options: QuantizeOptions
) -> tuple[Mapping[str, Tensor], dict[str, Any] | None]:
    """Return the group scales by weight, and a record of the calibration data.

    Methods that compensate rounding errors (GPTQ, GPTAQ, coordinate descent, AWQ) also change the merged weights.
    """
    if options.method == QAT:
        return merged.scales, None
    if options.method not in CALIBRATED:
        return methods.apply(merged.model, merged.scheme, options.method, []), None

    batches, record = _calibration(run, merged, options)
    # Matrix products in bfloat16 where that is faster, as in training: four times on CPUs with bfloat16 instructions.
    # Statistics and rounding stay float32.
    with torch.autocast("cpu", torch.bfloat16, enabled=gains_from_bfloat16("cpu")):
        return methods.apply(merged.model, merged.scheme, options.method, batches), record


def _calibration(
    run: Run, merged: MergedModel, options: QuantizeOptions
) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Return calibration batches, tokenized as for training, and what the manifest records about them."""
    trained = config.load_trained(run.config)
    source = options.calibration_data or trained.data
    option_paths.require_data(source, "--calibration-data")
    is_streamed = trained.streaming and options.calibration_data is None
    task, loaded = tasks.task_of_run(run), RowStream(source, "train", streamed=is_streamed)
    # As in training, where an encoder's rows are cut to its positions by `tokenize_for_task`.
    length = trained.max_length if task.is_encoder else row_length(trained, merged.model.config)
    sample = sample_of(loaded)
    rows = training_examples.tokenize_for_task(task, sample, merged.model, merged.tokenizer, length).rows
    warn_of_change(run, DATA, loaded, "--calibration-data", options.calibration_data)
    tokens = calibration.choose_token_count(options.calibration_tokens, rows)
    chosen = calibration.choose_rows(rows, tokens, options.seed, source, "--calibration-tokens")
    progress.info(f"Calibrating on {counted(tokens, 'token')} in {len(chosen)} of {len(rows)} rows of {source}")
    record = {"source": source, "rows": len(chosen), "tokens": tokens, "seed": options.seed}
    return calibration.make_batches(chosen, merged.tokenizer), record


def _rotation_seed(adapter: Path, options: QuantizeOptions) -> int | None:
    """Return the seed of the checkpoint's rotation; None without rotation."""
    if options.method == QAT:
        seed: int | None = (adapter_metadata(adapter)["start"] or {}).get("rotation_seed")
        return seed
    return options.seed if options.rotate else None
