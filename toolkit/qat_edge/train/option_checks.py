"""Combinations of finetune's options that exclude each other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from qat_edge import option_paths
from qat_edge.config import flag_name, load_frozen_base
from qat_edge.errors import UsageError
from qat_edge.models.positions import max_positions
from qat_edge.options import EXACT_BASES, QLORA_BASES, TRAINING, WIDTHS, ExportOptions, FinetuneOptions
from qat_edge.quant.bits_file import load_bits, requested_levels
from qat_edge.quant.codebook import FEWEST
from qat_edge.quant.ptq.method_names import CALIBRATED, STORED
from qat_edge_exporters.targets import target_for

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Options that a model is quantized by even if nothing is trained, among those of training.
WITHOUT_STEPS = ("steps", "keep_layers", "prune", "seed")
# Options of QAT among those of quantization, and of the trainer among the others.
OF_STEPS = (
    "qat_start", "scale_learning_rate", "codes", "qat_learning_rate", "lr_restart", "clip_gradients", "base",
    "optimizer", "gradient_checkpointing", "shard_base", "save_every", "streaming",
)  # fmt: skip
# Options that change or calibrate weights.
WITHOUT_FROZEN_BASE = ("method", "base", "codes", "scale_learning_rate", "clip_gradients", "calibration_tokens")
SCHEME = ("bits", "weight_bits", "weight_levels", "group_size", "embedding_bits", "head_bits")  # of weights
LORA_OPTIONS = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")


class _Check(NamedTuple):
    """A combination of options and the message that refuses it."""

    found: bool
    message: str


def check_combination(options: FinetuneOptions) -> None:
    """Refuse options that exclude each other, before anything is loaded.

    Raises:
        UsageError: Names the options and what to change.
    """
    requested_levels(options.bits, options.weight_levels)  # refuses a file of bits with other levels
    _check_frozen_base(options)
    _check_stored_codes(options)
    for checks in (_step_checks, _phase_2_checks, _base_checks, _width_checks, _effect_checks):
        for check in checks(options):
            if check.found:
                raise UsageError(check.message)


def _is_given(options: FinetuneOptions, name: str) -> bool:
    """Return whether an option differs from its default: a configuration file lists them all."""
    if name == "base":
        return options.base not in EXACT_BASES
    return bool(getattr(options, name) != getattr(FinetuneOptions, name))


def row_length(options: FinetuneOptions, config: PretrainedConfig) -> int:
    """Return the longest training row, in tokens: --max-length, whose default is at most the model's positions.

    Raises:
        UsageError: --max-length is beyond the model's positions.
    """
    limit = max_positions(config)
    if limit is None or options.max_length <= limit:
        return options.max_length
    if options.max_length == FinetuneOptions.max_length:
        return limit
    raise UsageError(
        f"--max-length {options.max_length}: this model has {limit} positions (max_position_embeddings). Longer rows "
        f"would train positions that it never saw, and no artifact could read them. Give at most {limit}."
    )


def requested_widths(options: FinetuneOptions) -> set[int]:
    """Return the bits that the options request for linear layers.

    Raises:
        UsageError: The file of --bits cannot be read.
    """
    bits = load_bits(Path(options.bits)) if options.bits else {}
    return {options.weight_bits, *bits.values()}


def check_export_section(options: FinetuneOptions, export: ExportOptions, path: Path | None) -> None:
    """Refuse bits that none of the targets in the configuration file's section 'export' can hold.

    Args:
        options: Of finetune.
        export: Section 'export' of the file.
        path: The configuration file; None without one.

    Raises:
        UsageError: Names the option and the file.
    """
    if path is None:
        return
    widths = requested_widths(options)
    reasons = [target_for(name, export.backend).missing_widths(widths) for name in export.target]
    if all(reasons):
        flag = "--weight-bits 2" if options.weight_bits not in WIDTHS else f"--bits {options.bits}"
        raise UsageError(
            f"{flag} and 'export.target' of {path}, {', '.join(export.target)}: {reasons[0]} The trained model could "
            "not be exported. Add onnx to the targets, or train with 4 or 8 bits."
        )


def _step_checks(options: FinetuneOptions) -> tuple[_Check, ...]:
    """Return the check of options that have no effect where nothing is trained."""
    of_training = [field.name for field in fields(options) if field.metadata["group"] == TRAINING]
    names = [*(name for name in of_training if name not in WITHOUT_STEPS), *OF_STEPS]
    given = [flag_name(name) for name in names if _is_given(options, name)]
    return (
        _Check(
            options.steps == 0 and bool(given),
            f"{', '.join(given)} and --steps 0: nothing is trained. Leave it out, or give steps.",
        ),
    )


def _check_frozen_base(options: FinetuneOptions) -> None:
    """Refuse options that a frozen base decides otherwise, and those that would change it.

    Raises:
        UsageError: Names the option.
    """
    if options.frozen_base is None:
        return
    base = load_frozen_base(options.frozen_base)
    if base.steps:
        raise UsageError(
            f"--frozen-base {options.frozen_base}: this run was trained, and a base has no adapters of its own. Give a "
            "run of `qat-edge quantize MODEL --out RUN`."
        )
    for name, value in base.on_frozen_base.items():
        given = getattr(options, name)
        # A model may have moved: its files are compared once it is loaded.
        if name != "model" and not option_paths.same(given, value):
            raise UsageError(
                f"{flag_name(name)} {given} and --frozen-base {options.frozen_base}: its weights were quantized with "
                f"{value}, and stay as they are. Leave it out; to resume a run, restore the base that it began with."
            )
    if not options.steps:
        raise UsageError("--frozen-base and --steps 0: no adapter would be trained. Give steps.")
    for name in WITHOUT_FROZEN_BASE:
        if _is_given(options, name):
            raise UsageError(
                f"{flag_name(name)} {getattr(options, name)} and --frozen-base: adapters alone are trained, next to "
                "weights that stay as they are. Leave it out."
            )


def _check_stored_codes(options: FinetuneOptions) -> None:
    """Refuse options that change codes, or choose others, where those of a quantized model are kept.

    Raises:
        UsageError: Names the option.
    """
    if options.ptq_init != STORED or options.frozen_base is not None:
        return
    if options.steps:
        raise UsageError(
            f"--ptq-init {STORED} and --steps {options.steps}: its codes stay as they are, so nothing can be trained "
            f"into them. Train adapters next to them: `qat-edge quantize MODEL --method {STORED} --out BASE`, then "
            "`qat-edge finetune --frozen-base BASE`."
        )
    for name in (*SCHEME, "keep_layers"):
        if _is_given(options, name):
            raise UsageError(
                f"{flag_name(name)} {getattr(options, name)}: codes that a model is stored with stay as they are. "
                "Leave it out, or choose another method."
            )


def _phase_2_checks(options: FinetuneOptions) -> tuple[_Check, ...]:
    """Return the checks of PTQ initialization, scales and teacher."""
    # Calibrated methods write weights whose rounding is compensated into the base; the others choose scales alone.
    changes_base, fixed = options.ptq_init in CALIBRATED, options.codes == "fixed"
    start = options.start_of_qat
    return (
        # The start of phase 2: a fraction of the steps, or a step.
        _Check(
            0 < options.steps < start,
            f"--qat-start {start:g} and --steps {options.steps}: training ends before QAT starts. Give a "
            f"fraction below 1 or a step up to {options.steps}; --qat-start {options.steps} trains without QAT.",
        ),
        _Check(
            start >= 1 and start % 1 != 0,
            f"--qat-start {start:g}: from 1 on it is a step, which is a whole number. Give one, or a fraction below 1.",
        ),
        # PTQ initialization and scales.
        _Check(
            options.ptq_init != "none" and options.scales == "absmax",
            f"--ptq-init {options.ptq_init} and --scales absmax: the scales it chooses would be discarded. "
            "Give --scales learned or fixed.",
        ),
        _Check(
            options.clip_gradients == "apart" and options.scales != "learned",
            f"--clip-gradients apart and --scales {options.scales}: no scales are learned whose gradients could be "
            "clipped. Give --scales learned, or leave it out.",
        ),
        _Check(
            fixed and options.scales != "learned",
            f"--codes fixed and --scales {options.scales}: nothing would be left to train. Give --scales learned.",
        ),
        _Check(
            fixed and options.method != "lora",
            f"--codes fixed and --method {options.method}: codes are fixed under adapters alone. Give --method lora.",
        ),
        _Check(
            fixed and options.qat_learning_rate is not None,
            f"--codes fixed and --qat-learning-rate {options.qat_learning_rate}: it trains scales alone, at "
            "--scale-learning-rate. Leave it out.",
        ),
        _Check(
            fixed and options.scale_learning_rate == 0,
            "--codes fixed and --scale-learning-rate 0: nothing would be left to train. Give a rate above 0.",
        ),
        # The teacher: its weight, and a moment at which it can be run.
        _Check(
            options.distill_weight > 1,
            f"--distill-weight {options.distill_weight:g}: it is a share of the loss, 1 at most.",
        ),
        _Check(
            options.distill_top_k > 0 and options.distill_weight == 0,
            f"--distill-top-k {options.distill_top_k} and --distill-weight 0: the teacher would have no effect. "
            "Give it a weight.",
        ),
        _Check(
            options.distill_top_k > 0 and options.streaming,
            f"--distill-top-k {options.distill_top_k} and --streaming: the teacher would have to be run on all rows "
            "beforehand. Leave out one of them; a teacher without it needs --ptq-init hqq or none.",
        ),
        _Check(
            options.distill_weight > 0 and start == 0,
            "--distill-weight and --qat-start 0: the teacher is the model at the end of plain LoRA, which this skips. "
            "Start later.",
        ),
        _Check(
            options.distill_weight > 0 and options.distill_top_k == 0 and changes_base,
            f"--distill-weight and --ptq-init {options.ptq_init}: it changes the base weights that the teacher "
            "needs. Add --distill-top-k 64, which runs the teacher beforehand.",
        ),
    )


def _effect_checks(options: FinetuneOptions) -> tuple[_Check, ...]:
    """Return the checks of options that only act together with another one."""
    for_data = [name for name in ("eval_every", "eval_rows") if _is_given(options, name)]
    given = " and ".join(f"{flag_name(name)} {getattr(options, name)}" for name in for_data)
    return (
        _Check(
            _is_given(options, "prune") and options.keep_layers is None,
            f"--prune {options.prune}: chooses layers for --keep-layers, which is not given. Give it, or leave it out.",
        ),
        _Check(
            bool(for_data) and options.eval_data is None,
            f"{given}: there are no rows to evaluate on. Give --eval-data, or leave it out.",
        ),
        _Check(
            options.calibration_tokens is not None and options.ptq_init not in CALIBRATED,
            f"--calibration-tokens {options.calibration_tokens} and --ptq-init {options.ptq_init}: it is not "
            f"calibrated. Give --ptq-init {'|'.join(CALIBRATED)}, or leave it out.",
        ),
        _Check(
            _is_given(options, "scale_learning_rate") and options.scales != "learned",
            f"--scale-learning-rate {options.scale_learning_rate:g} and --scales {options.scales}: no scales are "
            "learned. Give --scales learned, or leave it out.",
        ),
        _Check(
            _is_given(options, "distill_temperature") and options.distill_weight == 0,
            f"--distill-temperature {options.distill_temperature:g} and --distill-weight 0: there is no teacher. Give "
            "it a weight, or leave it out.",
        ),
    )


def _width_checks(options: FinetuneOptions) -> tuple[_Check, ...]:
    """Return the checks of the bits of weights."""
    return (
        _Check(
            options.weight_levels is not None and FEWEST not in requested_widths(options),
            f"--weight-levels {options.weight_levels}: only 2-bit weights have a choice of levels, and all layers have "
            "4 or 8 bits here. Add --weight-bits 2, or leave it out.",
        ),
    )


def _base_checks(options: FinetuneOptions) -> tuple[_Check, ...]:
    """Return the checks of the weights that are trained, and of the base they are trained on."""
    rounded, full = options.base not in EXACT_BASES, options.method == "full"
    lora_flags = [flag_name(name) for name in LORA_OPTIONS if _is_given(options, name)]
    by_default = "" if _is_given(options, "ptq_init") else " (the default)"
    return (
        # A base in few bits cannot be changed by the initialization, and none in 16 bits by training.
        _Check(
            rounded and full,
            f"--base {options.base} and --method full: weights that are trained are stored in float32. "
            "Leave --base out, or give --method lora.",
        ),
        _Check(
            options.base in QLORA_BASES and options.ptq_init in CALIBRATED,
            f"--base {options.base} and --ptq-init {options.ptq_init}{by_default}: it changes the base weights, which "
            f"are stored as {options.base}. Give --ptq-init hqq, which chooses scales alone, or none.",
        ),
        # A rotation changes base weights under adapters, at the start of QAT.
        _Check(
            options.rotate == "on" and (full or options.ptq_init not in CALIBRATED),
            f"--rotate on and {'--method full' if full else f'--ptq-init {options.ptq_init}'}: a rotation needs "
            "adapters, and a PTQ initialization that changes the weights under them. "
            f"Give --method lora, --ptq-init {'|'.join(CALIBRATED)}.",
        ),
        # Shards are of parameters that stay as they are, and all processes have to gather them at the same moments.
        _Check(
            options.shard_base and full,
            "--shard-base and --method full: all weights are trained, and none is frozen. Leave --shard-base out, or "
            "give --method lora.",
        ),
        _Check(
            options.shard_base and options.base in QLORA_BASES,
            f"--shard-base and --base {options.base}: its codes and scales are no parameters, and FSDP2 cuts those "
            "alone into shards. Give another --base, or leave --shard-base out.",
        ),
        _Check(
            options.shard_base and options.distill_weight > 0 and options.distill_top_k == 0,
            "--shard-base and --distill-weight: a process without a target in its rows does not run the teacher, and "
            "the others would wait for its shards. Add --distill-top-k 64, which runs the teacher beforehand.",
        ),
        # Full fine-tuning has no adapters, and no base that stays as it is for a live teacher.
        _Check(
            full and bool(lora_flags),
            f"--method full and {', '.join(lora_flags)}: there are no adapters. Leave it out.",
        ),
        _Check(
            full and options.distill_weight > 0 and options.distill_top_k == 0,
            "--distill-weight and --method full: training changes the weights that the teacher needs. Add "
            "--distill-top-k 64, which runs the teacher beforehand.",
        ),
    )
