"""Freeze codes and scales: of the trained model, or of the FP32 fine-tune by post-training quantization (PTQ).

Decide whether a checkpoint must be made; `verbs.freezing` makes it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge import config, progress
from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import MANIFEST, Manifest, read_manifest, sha256
from qat_edge.models import merge
from qat_edge.models.adapter_files import ADAPTER_WEIGHTS
from qat_edge.models.merge import WHOLE_MODEL
from qat_edge.models.tasks import require_causal_lm
from qat_edge.options import QuantizeOptions
from qat_edge.quant import frozen
from qat_edge.quant.bits_file import requested_levels
from qat_edge.quant.ptq.method_names import CALIBRATED, QAT, STORED
from qat_edge.quant.scheme import LinearCodes
from qat_edge.run import Run, Variant
from qat_edge.run_lock import writes_run
from qat_edge_exporters.targets import DEFAULT_FORMATS, target_named

OF_MODELS = ("group_size", "embedding_bits", "head_bits")  # options that a run's training has decided
NEEDED = ("adapter_sha256", "options", "calibration")  # entries of a checkpoint's manifest that are read here


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


@writes_run("quantize")
def quantize(run: Run, options: QuantizeOptions, force: bool = False) -> Quantized:
    """Freeze the run's model into RUN/quantized, or a PTQ variant of it into RUN/ptq/METHOD/quantized.

    A checkpoint of the same adapter, made with the same options, is kept as it is.

    Args:
        run: a run whose training is finished.
        options: method, bits, rotation and calibration data.
        force: replace the checkpoint that exists, and merge even if library versions differ from those in training.

    Raises:
        UsageError: bits, levels or --rotate for the trained model; calibration data for a method that uses none; a file
            of bits that does not fit the model.
        RunError: another checkpoint exists (without `force`), or there is no adapter.
        DataError: too little calibration data.
        ModelError: a model that the method cannot process, or whose hidden states cannot be rotated.
    """
    began = time.monotonic()
    _check_options(run, options)
    variant, adapter = checkpoint_of(run, options.method)
    if os.path.lexists(variant.quantized) and not force:
        return _existing(variant, adapter, options)

    # Imported here, because it needs the whole of models and quant: an existing checkpoint does not.
    from qat_edge.verbs.freezing import freeze

    weights, calibration = freeze(run, variant, adapter, _weights_sha256(adapter), options, force)
    return Quantized(options.method, variant.quantized, weights, calibration, time.monotonic() - began)


def _check_options(run: Run, options: QuantizeOptions) -> None:
    """Refuse options without effect: those of PTQ for the trained model, and calibration data that nothing reads.

    Raises:
        UsageError: names the option.
    """
    if options.method == STORED:
        raise UsageError(
            f"--method {STORED}: keeps the codes of a model that is quantized already, and {run.path} is a run. Give "
            "that model in its place, and --out."
        )
    for name in ("bits", "weight_bits", "weight_levels"):
        if options.method == QAT and getattr(options, name) is not None:
            flag = config.flag_name(name)
            raise UsageError(
                f"{flag} and --method qat: the trained weights have the bits of finetune {flag}. Leave it out."
            )
    for name in OF_MODELS:
        if getattr(options, name) is not None:
            flag = config.flag_name(name)
            raise UsageError(
                f"{flag} {getattr(options, name)}: finetune {flag} has decided that for {run.path}. Leave it out; "
                "--out gives it an effect, with a model in place of the run."
            )
    if options.method == QAT and options.rotate:
        raise UsageError("--rotate and --method qat: finetune --rotate has decided that. Leave it out.")
    for name in ("calibration_data", "calibration_tokens"):
        value = getattr(options, name)
        if options.method not in CALIBRATED and value is not None:
            raise UsageError(
                f"{config.flag_name(name)} {value} and --method {options.method}: it is not calibrated. Give "
                f"--method {'|'.join(CALIBRATED)}, or leave it out."
            )
    # A file of bits that cannot be read is reported before models are loaded.
    requested_levels(options.bits, options.weight_levels)
    if options.rotate:
        require_causal_lm(run, "--rotate")


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
    if not variant.quantized.exists() or (force and not _is_of(variant, adapter, force)):
        quantize(run, QuantizeOptions(method=method), force=force)
    elif not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made from another adapter. Give --force to make it again.")
    return variant


def checkpoint_of(run: Run, method: str) -> tuple[Variant, Path]:
    """Return the variant with a method's checkpoint and exports, and the adapter that it is made from."""
    return (run, run.adapter) if method == QAT else (run.ptq(method), run.reference)


def widths_of(run: Run, method: str) -> set[int]:
    """Return the bits of a variant's linear layers: of its checkpoint, or without one those of the training."""
    variant, adapter = checkpoint_of(run, method)
    if variant.quantized.exists():
        return frozen.read_scheme(variant.quantized).widths
    if not (adapter / MANIFEST).is_file():
        return set()  # freezing reports that there is no adapter
    metadata = read_manifest(adapter)
    return {LinearCodes.of_training(metadata).bits, *metadata["bits"].values()}


def target_flag(run: Run, method: str) -> str:
    """Return the flag that `export` needs for a variant whose bits not every default format can hold; else empty."""
    widths = widths_of(run, method)
    able = [name for name in DEFAULT_FORMATS if not target_named(name).missing_widths(widths)]
    return "" if len(able) == len(DEFAULT_FORMATS) else "".join(f" --target {name}" for name in able)


def _existing(variant: Variant, adapter: Path, options: QuantizeOptions) -> Quantized:
    """Return the checkpoint that exists.

    Raises:
        RunError: it was made from another adapter, or with other options.
    """
    manifest = _manifest_of(variant)
    if not _is_of(variant, adapter):
        raise RunError(f"{variant.quantized} was made from another adapter. Give --force to make it again.")
    # Options that earlier versions did not have were at their defaults.
    before_options = config.plain(QuantizeOptions()) | config.current_values(QuantizeOptions, manifest["options"])
    if before_options != config.plain(options):
        before = ", ".join(f"{config.flag_name(k)} {v}" for k, v in before_options.items())
        raise RunError(f"{variant.quantized} was made with other options ({before}). Give --force to make it again.")
    progress.info(f"{variant.quantized} exists already, from the same adapter and options")
    summary = frozen.read_scheme(variant.quantized).summary()
    return Quantized(options.method, variant.quantized, summary, manifest["calibration"], 0.0)


def _is_of(variant: Variant, adapter: Path, force: bool = False) -> bool:
    """Return whether a variant's checkpoint was made from this adapter. force: One that cannot be read was not.

    Raises:
        RunError: its manifest cannot be read or the adapter is missing, and `force` is not set.
    """
    try:
        if not adapter.is_dir():
            merge.adapter_metadata(adapter)  # raises, and says why there is none
        return bool(_manifest_of(variant)["adapter_sha256"] == _weights_sha256(adapter))
    except RunError:
        if not force:
            raise
        return False


def _manifest_of(variant: Variant) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        RunError: it cannot be read; the message says how the checkpoint is made again.
    """
    try:
        manifest = read_manifest(variant.quantized)
        for entry in NEEDED:
            manifest[entry]  # raises, where it is missing
        return manifest
    except RunError as error:
        raise RunError(f"{error} --force replaces it.") from error


def _weights_sha256(adapter: Path) -> str | None:
    """Return the hash of the adapters, or of the whole model; None where there is neither (loading it reports that)."""
    found = [path for name in (ADAPTER_WEIGHTS, WHOLE_MODEL) if (path := adapter / name).is_file()]
    return sha256(found[0]) if found else None
