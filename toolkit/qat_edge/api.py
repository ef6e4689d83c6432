"""The public Python API: the main commands as functions, with their flags as keyword arguments.

    from qat_edge import export, finetune, validate, verify

    run = finetune("HuggingFaceTB/SmolLM2-135M-Instruct", "train.jsonl", "runs/mine", eval_data="eval.jsonl").run
    export(run, target=["executorch"])
    verify(run)
    report, = validate(run, max_kl=0.1)

Every function raises the errors of `qat_edge.errors`, with the same messages as the command line. Messages and progress
go to the `qat_edge` logger; `qat_edge.progress.report_to` sends them elsewhere. Nothing heavy is imported before a
function is called. An argument that is left out may be set by a device profile.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from qat_edge import config, remote_code
from qat_edge.errors import UsageError
from qat_edge.options import (
    CHAT_TOKENS,
    MOST_PROMPT,
    MOST_TOKENS,
    TRAINER_ROWS,
    ExportOptions,
    FinetuneOptions,
    PlanOptions,
    QuantizeOptions,
    SweepOptions,
    ValidateOptions,
)
from qat_edge.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge.evaluate.encoder_results import EncoderReport
    from qat_edge.evaluate.results import Report
    from qat_edge.report.sweep_results import SweepResult
    from qat_edge.train.training_log import Finetuned
    from qat_edge.verbs.chat import Conversation
    from qat_edge.verbs.export import Exported
    from qat_edge.verbs.prediction import Plan
    from qat_edge.verbs.prepare import PreparedTraining
    from qat_edge.verbs.quantize import Quantized
    from qat_edge.verbs.verify import Verified

__all__ = [
    "chat",
    "export",
    "finetune",
    "generate",
    "load_frozen",
    "plan",
    "prepare",
    "quantize",
    "quantize_model",
    "sweep",
    "validate",
    "verify",
]


# --- steps they share --------------------------------------------------------------------------------------

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_given: ContextVar[frozenset[str]] = ContextVar("given_arguments", default=frozenset())


def _notes_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorate a function so that `_named` knows which arguments its caller has written, defaults among them."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        token = _given.set(frozenset(signature.bind(*args, **kwargs).arguments))
        try:
            return function(*args, **kwargs)
        finally:
            _given.reset(token)

    return call


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the caller has written, as a configuration file has them.

    Raises:
        UsageError: A loaded model is given in the place of its files.
    """
    model = arguments.get("model", "")
    if not isinstance(model, str | Path):
        raise UsageError(
            f"model: a {type(model).__name__}, expected a Hub id or a path: later commands read the base model again. "
            "Save it with its tokenizer (`model.save_pretrained(FOLDER)`, `tokenizer.save_pretrained(FOLDER)`) and "
            "give FOLDER."
        )
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
    return {
        name: tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in plain.items()
        if name in _given.get()
    }


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else Run.open(Path(run))


# --- written by tools/write_api.py: do not edit up to the end of this part ---------------------------------


@_notes_arguments
def plan(
    model: str | Path,
    *,
    max_length: int = 512,
    trust_remote_code: bool = False,
    method: str = "lora",
    steps: int = 200,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    lora_rank: int = 16,
    target_modules: Sequence[str] = ("all-linear",),
    keep_layers: int | None = None,
    distill_weight: float = 0.0,
    distill_top_k: int = 0,
    qat_start: float | None = None,
    weight_bits: int = 4,
    weight_levels: str | None = None,
    group_size: int = 32,
    bits: str | Path | None = None,
    embedding_bits: int = 8,
    head_bits: int = 8,
    ptq_init: str = "coordinate-descent",
    rotate: str = "auto",
    calibration_tokens: int | None = None,
    scales: str = "learned",
    codes: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    base: str = "checkpoint",
    gradient_checkpointing: bool = False,
    target: Sequence[str] = ("executorch", "onnx", "gguf", "hf"),
    context_length: int | None = None,
    kv_cache: str = "float32",
    profile: Sequence[str] = (),
    bandwidth: float | None = None,
) -> Plan:
    """Predict parameters, bits, training memory, file sizes and device fit, without loading weights.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model, or the folder of a run.
        max_length: Longest row; longer rows are truncated, counted and reported.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.
        method: Train LoRA adapters, or all weights. One of lora, full.
        steps: Optimizer steps of both phases together; 0 quantizes the model as it is.
        batch_size: Rows per device and batch; sequences with --packing.
        gradient_accumulation: Batches per optimizer step.
        lora_rank: Rank of the adapters.
        target_modules: Linear layers that get adapters.
        keep_layers: Decoder layers to keep; all by default.
        distill_weight: Share of the loss that is KL divergence from the model at the end of phase 1, 0 to 1.
        distill_top_k: Tokens per position of the teacher's prediction to precompute; 0 runs the teacher at every
            step.
        qat_start: Start of QAT (phase 2): a fraction of the steps (< 1), or a step; 0.9 by default, 0.5 with
            --weight-bits 2 or --frozen-base.
        weight_bits: Bits of linear layers; 2 bits run in ONNX folders only. One of 2, 4.
        weight_levels: Levels of 2-bit weights: -1.5 -0.5 0.5 1.5 times the scale (seq), or -2 to 1 (integer); by
            default those of the file of --bits, or seq. One of seq, integer.
        group_size: Weights in groups, of fewer than 8 bits, that share one scale. One of 32, 64, 128.
        bits: Bits by layer: a file written by `qat-edge sensitivity`.
        embedding_bits: Bits of the token embedding, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        head_bits: Bits of the output head, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        ptq_init: PTQ method that initializes weights and scales at the start of QAT. One of none, hqq, gptq, gptaq,
            coordinate-descent, awq, stored.
        rotate: Rotate the hidden states before PTQ initialization, which removes outlier channels; auto rotates
            where the model and the method allow it. One of auto, on, off.
        calibration_tokens: Tokens of the training rows for PTQ initialization; by default 49152, or all if there
            are fewer.
        scales: Group scales during QAT: learned, fixed as initialized, or the largest weight at each step. One of
            absmax, fixed, learned.
        codes: Codes of weights in groups during QAT: trained, or fixed as initialized, which trains their scales
            alone. Trained by default; fixed with --weight-bits 2, unless another option excludes it. One of
            trained, fixed.
        device: Where to train. One of auto, cpu, cuda.
        precision: Autocast of matrix products; weights and rounding stay float32. 'auto' is bf16 where the GPU or
            CPU has instructions for it. One of auto, bf16, fp32.
        base: Storage of the frozen base weights under the adapters: in 16 bits where the values allow it
            (checkpoint), as float32, rounded to bfloat16, or in few bits (QLoRA). One of checkpoint, fp32, bf16,
            int8, nf4.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        target: Formats to predict the files of. One of executorch, onnx, gguf, hf.
        context_length: Tokens in the KV cache, prompt and answer together; by default 1024, or the model's
            positions if it has fewer.
        kv_cache: Storage of keys and values in a .pte; int8 takes about a quarter of the memory. One of float32,
            int8.
        profile: Classes of devices to compare with: laptop, minimal, phone-flagship, phone-midrange, pi5, or a
            FILE.toml; all of the former by default.
        bandwidth: Memory bandwidth of a device, GB/s (10^9 bytes): gives an upper bound of the decode speed.

    Returns:
        Every prediction, with its unit in the documentation of its class.

    Raises:
        UsageError: an impossible value or combination of options, or one that a plan cannot be made for.
        ModelError: the model cannot be read, trained or exported.
        ExportError: the model has fewer positions than `context_length`.
    """
    given = _named(
        {
            "max_length": max_length,
            "trust_remote_code": trust_remote_code,
            "method": method,
            "steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "lora_rank": lora_rank,
            "target_modules": target_modules,
            "keep_layers": keep_layers,
            "distill_weight": distill_weight,
            "distill_top_k": distill_top_k,
            "qat_start": qat_start,
            "weight_bits": weight_bits,
            "weight_levels": weight_levels,
            "group_size": group_size,
            "bits": bits,
            "embedding_bits": embedding_bits,
            "head_bits": head_bits,
            "ptq_init": ptq_init,
            "rotate": rotate,
            "calibration_tokens": calibration_tokens,
            "scales": scales,
            "codes": codes,
            "device": device,
            "precision": precision,
            "base": base,
            "gradient_checkpointing": gradient_checkpointing,
            "target": target,
            "context_length": context_length,
            "kv_cache": kv_cache,
            "profile": profile,
            "bandwidth": bandwidth,
        }
    )
    options = config.load(PlanOptions, "plan", None, given)
    from qat_edge.verbs.plan import plan as verb
    from qat_edge.verbs.plan import resolve

    with remote_code.permit(options.trust_remote_code):
        return verb(resolve(str(model), options, given))


@_notes_arguments
def finetune(
    model: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    eval_data: str | Path | None = None,
    streaming: bool = False,
    max_length: int = 512,
    trust_remote_code: bool = False,
    packing: bool = False,
    method: str = "lora",
    steps: int = 200,
    batch_size: int = 8,
    gradient_accumulation: int = 1,
    learning_rate: float = 0.001,
    lr_schedule: str = "cosine",
    warmup_steps: int = 5,
    weight_decay: float = 0.0,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    keep_layers: int | None = None,
    prune: str = "least-harmful",
    distill_weight: float = 0.0,
    distill_temperature: float = 1.0,
    distill_top_k: int = 0,
    eval_every: int = 0,
    eval_rows: int = 128,
    seed: int = 0,
    qat_start: float | None = None,
    weight_bits: int = 4,
    weight_levels: str | None = None,
    group_size: int = 32,
    bits: str | Path | None = None,
    embedding_bits: int = 8,
    head_bits: int = 8,
    ptq_init: str = "coordinate-descent",
    rotate: str = "auto",
    frozen_base: str | None = None,
    calibration_tokens: int | None = None,
    scales: str = "learned",
    codes: str | None = None,
    scale_learning_rate: float = 0.001,
    qat_learning_rate: float | None = None,
    lr_restart: bool = True,
    clip_gradients: str = "together",
    device: str = "auto",
    precision: str = "auto",
    base: str = "checkpoint",
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    shard_base: bool = False,
    save_every: int = 50,
    track: Sequence[str] = ("tensorboard",),
    resume: bool = False,
    force: bool = False,
) -> Finetuned:
    """Train LoRA adapters, then continue with fake quantization in the forward pass (QAT).

    Args:
        model: Hub id, local folder or .gguf file of a causal language model or an encoder.
        data: Training rows: a .jsonl file, or anything datasets.load_dataset reads.
        out: run folder to write.
        eval_data: Held-out rows for validate and the loss curve; NAME:PART picks a split.
        streaming: Read training rows as they are needed, in shuffled blocks of 10,000, instead of all of them
            before the first step.
        max_length: Longest row; longer rows are truncated, counted and reported.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.
        packing: Put several rows into one sequence of --max-length, without attention from one row to another; a
            batch then has so many sequences.
        method: Train LoRA adapters, or all weights. One of lora, full.
        steps: Optimizer steps of both phases together; 0 quantizes the model as it is.
        batch_size: Rows per device and batch; sequences with --packing.
        gradient_accumulation: Batches per optimizer step.
        learning_rate: Peak learning rate of AdamW; with --method full, try about a twentieth of the default.
        lr_schedule: Learning rate after warm-up. One of cosine, constant, linear.
        warmup_steps: Steps to reach the peak learning rate; at most a fifth of a phase.
        weight_decay: AdamW weight decay.
        lora_rank: Rank of the adapters.
        lora_alpha: Adapters are scaled by alpha / rank.
        lora_dropout: Dropout on the adapters' input.
        target_modules: Linear layers that get adapters.
        keep_layers: Decoder layers to keep; all by default.
        prune: Which layers --keep-layers keeps: the first, or those whose removal raises the loss most. One of
            least-harmful, first.
        distill_weight: Share of the loss that is KL divergence from the model at the end of phase 1, 0 to 1.
        distill_temperature: Temperature of that divergence.
        distill_top_k: Tokens per position of the teacher's prediction to precompute; 0 runs the teacher at every
            step.
        eval_every: Steps between evaluations on --eval-data; 0 evaluates at the end of each phase only.
        eval_rows: Rows of --eval-data in each of those evaluations.
        seed: Seed of initialization, shuffling and dropout.
        qat_start: Start of QAT (phase 2): a fraction of the steps (< 1), or a step; 0.9 by default, 0.5 with
            --weight-bits 2 or --frozen-base.
        weight_bits: Bits of linear layers; 2 bits run in ONNX folders only. One of 2, 4.
        weight_levels: Levels of 2-bit weights: -1.5 -0.5 0.5 1.5 times the scale (seq), or -2 to 1 (integer); by
            default those of the file of --bits, or seq. One of seq, integer.
        group_size: Weights in groups, of fewer than 8 bits, that share one scale. One of 32, 64, 128.
        bits: Bits by layer: a file written by `qat-edge sensitivity`.
        embedding_bits: Bits of the token embedding, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        head_bits: Bits of the output head, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        ptq_init: PTQ method that initializes weights and scales at the start of QAT. One of none, hqq, gptq, gptaq,
            coordinate-descent, awq, stored.
        rotate: Rotate the hidden states before PTQ initialization, which removes outlier channels; auto rotates
            where the model and the method allow it. One of auto, on, off.
        frozen_base: Run of `quantize MODEL --out` whose quantized weights stay as they are: adapters are trained
            next to them and stay unmerged. It decides model, bits and rotation.
        calibration_tokens: Tokens of the training rows for PTQ initialization; by default 49152, or all if there
            are fewer.
        scales: Group scales during QAT: learned, fixed as initialized, or the largest weight at each step. One of
            absmax, fixed, learned.
        codes: Codes of weights in groups during QAT: trained, or fixed as initialized, which trains their scales
            alone. Trained by default; fixed with --weight-bits 2, unless another option excludes it. One of
            trained, fixed.
        scale_learning_rate: Peak learning rate of learned scales, relative to a scale.
        qat_learning_rate: Peak learning rate of QAT, for all but scales. By default a fraction of --learning-rate:
            0.1 after gptq, gptaq and coordinate-descent, 0.3 after others; all of it with --no-lr-restart.
        lr_restart: Give QAT a warm-up and schedule of its own; otherwise one schedule spans both phases.
        clip_gradients: Clip the gradients of weights and learned scales by their common norm, or each by its own,
            with those of scales reduced as in LSQ. One of together, apart.
        device: Where to train. One of auto, cpu, cuda.
        precision: Autocast of matrix products; weights and rounding stay float32. 'auto' is bf16 where the GPU or
            CPU has instructions for it. One of auto, bf16, fp32.
        base: Storage of the frozen base weights under the adapters: in 16 bits where the values allow it
            (checkpoint), as float32, rounded to bfloat16, or in few bits (QLoRA). One of checkpoint, fp32, bf16,
            int8, nf4.
        optimizer: AdamW with a state of 32 bits, or of 8 bits: 2 instead of 8 bytes for each trained weight. One of
            adamw, adamw-8bit.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        shard_base: Hold a share of the frozen base weights in each of several processes (FSDP2).
        save_every: Steps between checkpoints for --resume.
        track: Experiment trackers, by the Trainer's names.
        resume: continue from the run folder's last checkpoint, bit for bit.
        force: replace what exists already.

    Returns:
        The run folder, steps, last loss, time and memory.

    Raises:
        UsageError: an impossible value or combination of options.
        ModelError: the model cannot be loaded or trained.
        DataError: the rows cannot be used.
        RunError: `out` exists (without `force` or `resume`), or cannot be resumed.
    """
    given = _named(
        {
            "model": model,
            "data": data,
            "eval_data": eval_data,
            "streaming": streaming,
            "max_length": max_length,
            "trust_remote_code": trust_remote_code,
            "packing": packing,
            "method": method,
            "steps": steps,
            "batch_size": batch_size,
            "gradient_accumulation": gradient_accumulation,
            "learning_rate": learning_rate,
            "lr_schedule": lr_schedule,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
            "keep_layers": keep_layers,
            "prune": prune,
            "distill_weight": distill_weight,
            "distill_temperature": distill_temperature,
            "distill_top_k": distill_top_k,
            "eval_every": eval_every,
            "eval_rows": eval_rows,
            "seed": seed,
            "qat_start": qat_start,
            "weight_bits": weight_bits,
            "weight_levels": weight_levels,
            "group_size": group_size,
            "bits": bits,
            "embedding_bits": embedding_bits,
            "head_bits": head_bits,
            "ptq_init": ptq_init,
            "rotate": rotate,
            "frozen_base": frozen_base,
            "calibration_tokens": calibration_tokens,
            "scales": scales,
            "codes": codes,
            "scale_learning_rate": scale_learning_rate,
            "qat_learning_rate": qat_learning_rate,
            "lr_restart": lr_restart,
            "clip_gradients": clip_gradients,
            "device": device,
            "precision": precision,
            "base": base,
            "optimizer": optimizer,
            "gradient_checkpointing": gradient_checkpointing,
            "shard_base": shard_base,
            "save_every": save_every,
            "track": track,
        }
    )
    options = config.load(FinetuneOptions, "finetune", Run.open(Path(out)).config if resume else None, given)
    from qat_edge.verbs.finetune import finetune as verb

    config.require_output(Path(out), "out")
    with remote_code.permit(options.trust_remote_code):
        return verb(options, Path(out), resume=resume, force=force)


@_notes_arguments
def prepare(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    eval_data: str | Path | None = None,
    trust_remote_code: bool = False,
    lora_rank: int = 16,
    lora_alpha: int = 32,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    seed: int = 0,
    qat_start: float | None = None,
    weight_bits: int = 4,
    weight_levels: str | None = None,
    group_size: int = 32,
    bits: str | Path | None = None,
    embedding_bits: int = 8,
    head_bits: int = 8,
    ptq_init: str = "coordinate-descent",
    rotate: str = "auto",
    calibration_tokens: int | None = None,
    scales: str = "learned",
    codes: str | None = None,
    scale_learning_rate: float = 0.001,
    qat_learning_rate: float | None = None,
    lr_restart: bool = True,
    base: str = "checkpoint",
    resume: bool = False,
    force: bool = False,
) -> PreparedTraining:
    """Prepare a model for a trainer of transformers or TRL, which then trains LoRA adapters and QAT.

    Args:
        model: Hub id, local folder or .gguf file of a causal language model.
        out: run folder that the training writes.
        data: Rows for calibration, as for finetune; by default those that the trainer has tokenized.
        eval_data: Held-out rows for validate; NAME:PART picks a split.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.
        lora_rank: Rank of the adapters.
        lora_alpha: Adapters are scaled by alpha / rank.
        lora_dropout: Dropout on the adapters' input.
        target_modules: Linear layers that get adapters.
        seed: Seed of adapters, rotation and the choice of rows for calibration.
        qat_start: Start of QAT (phase 2): a fraction of the trainer's steps (< 1), or a step; 0.9 by default, 0.5
            with weight_bits=2.
        weight_bits: Bits of linear layers; 2 bits run in ONNX folders only. One of 2, 4.
        weight_levels: Levels of 2-bit weights: -1.5 -0.5 0.5 1.5 times the scale (seq), or -2 to 1 (integer); by
            default those of the file of --bits, or seq. One of seq, integer.
        group_size: Weights in groups, of fewer than 8 bits, that share one scale. One of 32, 64, 128.
        bits: Bits by layer: a file written by `qat-edge sensitivity`.
        embedding_bits: Bits of the token embedding, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        head_bits: Bits of the output head, whatever --bits says: 8, or 4 in groups. One of 4, 8.
        ptq_init: PTQ method that initializes weights and scales at the start of QAT. One of none, hqq, gptq, gptaq,
            coordinate-descent, awq, stored.
        rotate: Rotate the hidden states before PTQ initialization, which removes outlier channels; auto rotates
            where the model and the method allow it. One of auto, on, off.
        calibration_tokens: Tokens of the training rows for PTQ initialization; by default 49152, or all if there
            are fewer.
        scales: Group scales during QAT: learned, fixed as initialized, or the largest weight at each step. One of
            absmax, fixed, learned.
        codes: Codes of weights in groups during QAT: trained, or fixed as initialized, which trains their scales
            alone. Trained by default; fixed with --weight-bits 2, unless another option excludes it. One of
            trained, fixed.
        scale_learning_rate: Peak learning rate of learned scales, relative to a scale.
        qat_learning_rate: Peak learning rate of QAT, for all but scales. By default a fraction of --learning-rate:
            0.1 after gptq, gptaq and coordinate-descent, 0.3 after others; all of it with --no-lr-restart.
        lr_restart: Give QAT a warm-up and schedule of its own; otherwise one schedule spans both phases.
        base: Storage of the frozen base weights under the adapters: in 16 bits where the values allow it
            (checkpoint), as float32, rounded to bfloat16, or in few bits (QLoRA). One of checkpoint, fp32, bf16,
            int8, nf4.
        resume: the trainer continues from a checkpoint: train(resume_from_checkpoint=True).
        force: replace what exists already.

    Returns:
        The model, its tokenizer, and the callback for the trainer.

    Raises:
        UsageError: an impossible value or combination of options.
        ModelError: the model cannot be loaded or trained.
        RunError: `out` exists (without `force` or `resume`), or cannot be resumed.
    """
    given = _named(
        {
            "model": model,
            "eval_data": eval_data,
            "trust_remote_code": trust_remote_code,
            "lora_rank": lora_rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "target_modules": target_modules,
            "seed": seed,
            "qat_start": qat_start,
            "weight_bits": weight_bits,
            "weight_levels": weight_levels,
            "group_size": group_size,
            "bits": bits,
            "embedding_bits": embedding_bits,
            "head_bits": head_bits,
            "ptq_init": ptq_init,
            "rotate": rotate,
            "calibration_tokens": calibration_tokens,
            "scales": scales,
            "codes": codes,
            "scale_learning_rate": scale_learning_rate,
            "qat_learning_rate": qat_learning_rate,
            "lr_restart": lr_restart,
            "base": base,
        }
    ) | {"data": TRAINER_ROWS if data is None else str(data)}
    options = config.load(FinetuneOptions, "prepare", None, given)
    from qat_edge.verbs.prepare import prepare as verb

    config.require_output(Path(out), "out")
    with remote_code.permit(options.trust_remote_code):
        return verb(options, Path(out), resume=resume, force=force)


@_notes_arguments
def quantize(
    run: Run | str | Path,
    *,
    method: str = "qat",
    bits: str | Path | None = None,
    weight_bits: int | None = None,
    weight_levels: str | None = None,
    rotate: bool = False,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    calibration_data: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Quantized:
    """Freeze the trained weights, or quantize the FP32 fine-tune without training (PTQ).

    Args:
        run: a finished run, or its folder.
        method: qat freezes the trained adapters; stored, with --out, keeps the codes of a model that torchao
            quantized; the others quantize the FP32 fine-tune without training (PTQ). One of qat, rtn, hqq, gptq,
            gptaq, coordinate-descent, awq, stored.
        bits: Bits by layer, instead of those of finetune; not with --method qat.
        weight_bits: Bits of linear layers, instead of those of finetune; not with --method qat. One of 2, 4.
        weight_levels: Levels of 2-bit weights; by default those of the file of --bits, or of finetune. Not with
            --method qat. One of seq, integer.
        rotate: Rotate the hidden states first, as finetune --rotate does; not with --method qat.
        group_size: With --out: weights in groups, of fewer than 8 bits, that share one scale; 32 by default. One of
            32, 64, 128.
        embedding_bits: With --out: bits of the token embedding, 8 by default. One of 4, 8.
        head_bits: With --out: bits of the output head, 8 by default. One of 4, 8.
        calibration_data: Calibration rows for gptq, gptaq, coordinate-descent and awq, instead of the training
            rows.
        calibration_tokens: Tokens of those rows; by default 49152, or all if there are fewer.
        seed: Seed for choosing the rows.
        force: replace what exists already.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.

    Returns:
        The frozen checkpoint and how it was made.

    Raises:
        UsageError: an impossible value or combination of options.
        RunError: another checkpoint exists (without `force`), or training is not finished.
        DataError: too little calibration data.
        ModelError: a model that the method cannot process.
    """
    given = _named(
        {
            "method": method,
            "bits": bits,
            "weight_bits": weight_bits,
            "weight_levels": weight_levels,
            "rotate": rotate,
            "group_size": group_size,
            "embedding_bits": embedding_bits,
            "head_bits": head_bits,
            "calibration_data": calibration_data,
            "calibration_tokens": calibration_tokens,
            "seed": seed,
        }
    )
    options = config.load(QuantizeOptions, "quantize", None, given)
    from qat_edge.verbs.quantize import quantize as verb

    with remote_code.permit(trust_remote_code):
        return verb(_opened(run), options, force=force)


@_notes_arguments
def quantize_model(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "qat",
    bits: str | Path | None = None,
    weight_bits: int | None = None,
    weight_levels: str | None = None,
    rotate: bool = False,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    head_bits: int | None = None,
    calibration_data: str | Path | None = None,
    calibration_tokens: int | None = None,
    seed: int = 0,
    force: bool = False,
    trust_remote_code: bool = False,
) -> Quantized:
    """Quantize a model that was not trained here by a PTQ method; the result is a run like any other.

    Args:
        model: Hub id, local folder or .gguf file of a model.
        out: run folder to write.
        method: qat freezes the trained adapters; stored, with --out, keeps the codes of a model that torchao
            quantized; the others quantize the FP32 fine-tune without training (PTQ). One of qat, rtn, hqq, gptq,
            gptaq, coordinate-descent, awq, stored.
        bits: Bits by layer, instead of those of finetune; not with --method qat.
        weight_bits: Bits of linear layers, instead of those of finetune; not with --method qat. One of 2, 4.
        weight_levels: Levels of 2-bit weights; by default those of the file of --bits, or of finetune. Not with
            --method qat. One of seq, integer.
        rotate: Rotate the hidden states first, as finetune --rotate does; not with --method qat.
        group_size: With --out: weights in groups, of fewer than 8 bits, that share one scale; 32 by default. One of
            32, 64, 128.
        embedding_bits: With --out: bits of the token embedding, 8 by default. One of 4, 8.
        head_bits: With --out: bits of the output head, 8 by default. One of 4, 8.
        calibration_data: Calibration rows for gptq, gptaq, coordinate-descent and awq, instead of the training
            rows.
        calibration_tokens: Tokens of those rows; by default 49152, or all if there are fewer.
        seed: Seed for choosing the rows.
        force: replace what exists already.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.

    Returns:
        The frozen checkpoint and how it was made.

    Raises:
        UsageError: no method or rows; an impossible value or combination of options.
        RunError: `out` exists, and `force` is not set.
        ModelError: the model cannot be loaded, or the method cannot process it.
        DataError: the rows cannot be used, or are too few.
    """
    given = _named(
        {
            "method": method,
            "bits": bits,
            "weight_bits": weight_bits,
            "weight_levels": weight_levels,
            "rotate": rotate,
            "group_size": group_size,
            "embedding_bits": embedding_bits,
            "head_bits": head_bits,
            "calibration_data": calibration_data,
            "calibration_tokens": calibration_tokens,
            "seed": seed,
        }
    )
    options = config.load(QuantizeOptions, "quantize_model", None, given)
    from qat_edge.verbs.quantize_model import quantize_model as verb

    config.require_output(Path(out), "out")
    with remote_code.permit(trust_remote_code):
        return verb(str(model), Path(out), options, force=force)


@_notes_arguments
def export(
    run: Run | str | Path,
    *,
    target: Sequence[str] = ("executorch", "onnx"),
    context_length: int | None = None,
    ptq: Sequence[str] = ("rtn",),
    portable: bool = False,
    backend: str = "xnnpack",
    kv_cache: str = "float32",
    schema: str | Path | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> list[Exported]:
    """Merge the adapters and freeze the codes once, then write .pte and ONNX artifacts from them.

    Args:
        run: a finished run, or its folder.
        target: Format to write. One of executorch, onnx, gguf, hf.
        context_length: Tokens in the KV cache, prompt and answer together; by default 1024, or the model's
            positions if it has fewer.
        ptq: PTQ methods to export next to QAT, for comparison; none for no comparison. One of rtn, hqq, gptq,
            gptaq, coordinate-descent, awq, none.
        portable: Write a .pte of ATen operators only, for a runtime without ExecuTorch's LLM and quantized
            operators.
        backend: Backend that a .pte is lowered to; others than xnnpack go to exports/executorch-BACKEND. One of
            xnnpack, vulkan, coreml.
        kv_cache: Storage of keys and values in a .pte; int8 takes about a quarter of the memory. One of float32,
            int8.
        schema: JSON schema of the answers, shipped with the artifacts and as the grammar that their runtimes take:
            a file, or tools for calls of the tools in the training rows.
        force: replace what exists already.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.

    Returns:
        One entry per artifact that was written.

    Raises:
        UsageError: an impossible value or combination of options.
        RunError: the artifacts exist and `force` is not set, or training is not finished.
        ExportError: a target cannot express the model, or a compiler failed.
    """
    given = _named(
        {
            "target": target,
            "context_length": context_length,
            "ptq": ptq,
            "portable": portable,
            "backend": backend,
            "kv_cache": kv_cache,
            "schema": schema,
        }
    )
    options = config.load(ExportOptions, "export", None, given)
    from qat_edge.verbs.export import export as verb

    with remote_code.permit(trust_remote_code):
        return verb(_opened(run), options, force=force)


@_notes_arguments
def validate(
    run: Run | str | Path,
    *,
    target: Sequence[str] = (),
    eval_data: str | Path | None = None,
    text: str | Path | None = None,
    tokens: int = 2048,
    window: int = 128,
    prompts: int = 64,
    max_new_tokens: int = 96,
    prefill: int = 128,
    decode: int = 64,
    repeats: int = 5,
    error_budget: bool = False,
    device: Sequence[str] = ("local",),
    device_python: str | None = None,
    device_folder: str | None = None,
    ssh_config: str | Path | None = None,
    runner_binary: str | Path | None = None,
    profile: str | Path | None = None,
    device_profile: Sequence[str] = (),
    threads: int = 2,
    max_kl: float | None = None,
    min_top1: float | None = None,
    max_perplexity_ratio: float | None = None,
    min_exact_match: float | None = None,
    max_size_mb: float | None = None,
    max_memory_mb: float | None = None,
    min_prefill: float | None = None,
    min_decode: float | None = None,
    max_fault_chance: float | None = None,
    min_quality: float | None = None,
    min_cosine: float | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
) -> list[Report | EncoderReport]:
    """Run every artifact in its own runtime and compare it with the FP32 fine-tune.

    Args:
        run: a run with exports, or its folder.
        target: Artifacts to measure; by default all that run here. One of executorch, onnx, gguf, hf, executorch-
            vulkan, executorch-coreml.
        eval_data: Evaluation rows, instead of finetune's --eval-data.
        text: Rows or a .txt file for perplexity, instead of the evaluation rows.
        tokens: Tokens compared with the reference.
        window: Tokens of context in each compared sequence.
        prompts: Evaluation rows to generate answers for, for exact match; 0 for none.
        max_new_tokens: Longest generated answer.
        prefill: Prompt tokens of the speed measurement.
        decode: Generated tokens of the speed measurement.
        repeats: Timed repeats after the warm-up.
        error_budget: Measure the loss of each step and of each part of the rounding, and tell a fault from rounding
            noise; takes many more passes.
        device: Where the artifacts run: local, browser, ssh:USER@HOST, adb:SERIAL; several run at the same time.
        device_python: Python with numpy and the runtimes on ssh and adb devices; python3 by default.
        device_folder: Folder on those devices for artifacts and results; by default a cache folder of the user.
        ssh_config: OpenSSH configuration file to use instead of your own.
        runner_binary: executor_runner or llama_main built for the device, to run the .pte instead of Python.
        profile: Gates and timing for a class of device: laptop, minimal, phone-flagship, phone-midrange, pi5, or a
            FILE.toml; flags override it.
        device_profile: DEVICE=PROFILE: profile of one of several devices, instead of --profile; repeat for each.
        threads: CPU threads each runtime may use.
        max_kl: Largest mean KL divergence from the FP32 reference, nats per token.
        min_top1: Least share of tokens (encoders: texts) with the reference's first choice, 0 to 1.
        max_perplexity_ratio: Largest ratio of perplexity to the reference's.
        min_exact_match: Least share of prompts answered exactly, 0 to 1.
        max_size_mb: Largest artifact, in megabytes (10^6 bytes).
        max_memory_mb: Most memory above the runtime's own, in megabytes (10^6 bytes).
        min_prefill: Least prefill speed, tokens per second.
        min_decode: Least decode speed, tokens per second.
        max_fault_chance: With --error-budget: largest probability that a token's error exceeds rounding noise; a
            fault is above 0.75.
        min_quality: Encoders: least accuracy, retrieval or rank correlation, whichever the rows allow; 0 to 1.
        min_cosine: Encoders: least mean cosine with the FP32 reference's outputs, 0 to 1.
        force: replace what exists already.
        trust_remote_code: Run Python code that comes with the model. No file can give this permission, only this
            flag.

    Returns:
        One report per device; for an encoder, one `EncoderReport`.

    Raises:
        UsageError: an impossible value or combination of options.
        RunError: nothing was exported, or a report exists and `force` is not set.
        DataError: there are no evaluation rows.
        DeviceError: a device cannot be reached, or a runtime failed there.
        GateError: a gate was missed; the reports are in RUN/reports.
    """
    given = _named(
        {
            "target": target,
            "eval_data": eval_data,
            "text": text,
            "tokens": tokens,
            "window": window,
            "prompts": prompts,
            "max_new_tokens": max_new_tokens,
            "prefill": prefill,
            "decode": decode,
            "repeats": repeats,
            "error_budget": error_budget,
            "device": device,
            "device_python": device_python,
            "device_folder": device_folder,
            "ssh_config": ssh_config,
            "runner_binary": runner_binary,
            "profile": profile,
            "device_profile": device_profile,
            "threads": threads,
            "max_kl": max_kl,
            "min_top1": min_top1,
            "max_perplexity_ratio": max_perplexity_ratio,
            "min_exact_match": min_exact_match,
            "max_size_mb": max_size_mb,
            "max_memory_mb": max_memory_mb,
            "min_prefill": min_prefill,
            "min_decode": min_decode,
            "max_fault_chance": max_fault_chance,
            "min_quality": min_quality,
            "min_cosine": min_cosine,
        }
    )
    options = config.load(ValidateOptions, "validate", None, given)
    from qat_edge.verbs.validate import require_success, validate_run

    opened = _opened(run)
    by_device = config.for_devices(options, None, given)
    with remote_code.permit(trust_remote_code):
        result = validate_run(opened, options, force=force, by_device=by_device)
    require_success(result)
    return list(result.reports)


# --- end of the written part --------------------------------------------------------------------------------


@_notes_arguments
def sweep(
    options: Mapping[str, Any],
    out: str | Path,
    *,
    search: Sequence[str] = (),
    trials: int = 20,
    pruner: str | None = None,
    score_rows: int | None = None,
    workers: int = 1,
    keep_all: bool = False,
    resume: bool = False,
) -> SweepResult:
    """Train with different options and compare the losses of the frozen checkpoints on `eval_data`.

    Args:
        options: options of `finetune` by name, for every trial: at least model, data and eval_data. With `resume`,
            those that the sweep began with, or none.
        out: folder of the sweep to write.
        search: options to search over, each "NAME=LOW:HIGH", "NAME=LOW:HIGH:log" or "NAME=A,B,C"; by default learning
            rates, rank, alpha and the start of QAT.
        trials: trials of the sweep, those before `resume` included.
        pruner: ends trials whose loss in phase 1 is high, at each eval_every: "median", "halving" or "none"; by default
            median with eval_every, none without.
        score_rows: rows of eval_data that score a trial, from the first on; all by default.
        workers: trials at the same time, each in a process of its own.
        keep_all: keep the weights of all trials, instead of those of the best one.
        resume: go on with the sweep, or help another process with it.

    Returns:
        Every trial with its loss, and which differences the evaluation rows show.

    Raises:
        UsageError: the extra `sweep` is missing, or an impossible value, combination or search space.
        RunError: `out` exists (without `resume`), or is no sweep.
        ModelError: the model cannot be loaded.
        DataError: the rows cannot be used.
    """
    given = {"search": search, "trials": trials, "pruner": pruner, "score_rows": score_rows, "workers": workers}
    path = config.of_sweep(Path(out)) if resume else None
    own = config.load(SweepOptions, "sweep", path, _named(given | {"keep_all": keep_all}))
    known = {field.name for field in dataclasses.fields(FinetuneOptions)}
    for name in options:
        config.require_key(name, known, "options")
    texts = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
    trained = config.load(FinetuneOptions, "finetune", path, texts)
    from qat_edge.verbs.sweep import sweep as verb

    config.require_output(Path(out), "out")
    with remote_code.permit(trained.trust_remote_code):
        return verb(trained, own, Path(out), resume=resume)


def verify(run: Run | str | Path, *, target: Sequence[str] = (), trust_remote_code: bool = False) -> list[Verified]:
    """Read every artifact back, run it on a few prompts, and compare both with the frozen checkpoint.

    Args:
        run: a run with exports, or its folder.
        target: artifacts to verify; all by default.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        One result per artifact.

    Raises:
        RunError: nothing was exported.
        ArtifactError: an artifact is damaged or differs from the checkpoint.
    """
    from qat_edge.verbs.verify import require_equal
    from qat_edge.verbs.verify import verify as verb

    with remote_code.permit(trust_remote_code):
        results = verb(_opened(run), [target] if isinstance(target, str) else list(target))
    require_equal(results)
    return results


def generate(
    run: Run | str | Path,
    prompt: str,
    *,
    source: str = "torch",
    raw: bool = False,
    system: str | None = None,
    max_new_tokens: int = 128,
    constrained: bool = False,
    trust_remote_code: bool = False,
    emit: Callable[[str], None] | None = None,
) -> str:
    """Generate an answer to `prompt` greedily.

    Args:
        run: a finished run, or its folder.
        prompt: the user's message; with `raw`, the text to continue.
        source: "torch" for the frozen checkpoint, or an exported target such as "executorch" or "onnx".
        raw: continue the text as it is, without the chat template.
        system: system message before the prompt.
        max_new_tokens: longest answer, in tokens.
        constrained: permit only answers by the artifact's schema, of `export(schema=...)`.
        trust_remote_code: run Python code that comes with the model.
        emit: called with each piece of text as it comes.

    Returns:
        The whole answer.

    Raises:
        RunError: there is nothing to generate with.
        UsageError: the tokenizer has no chat template, the prompt fills the artifact's context, or a value is
            impossible.
    """
    config.require_between(max_new_tokens, 1, MOST_TOKENS, "max_new_tokens")
    for name, text in (("prompt", prompt), ("system", system or "")):
        config.require_text(text, name, MOST_PROMPT)
    from qat_edge.verbs.generate import generate as verb

    pieces: list[str] = []

    def collect(piece: str) -> None:
        pieces.append(piece)
        if emit is not None:
            emit(piece)

    with remote_code.permit(trust_remote_code):
        verb(
            _opened(run), prompt, source, collect,
            raw=raw, system=system, max_new_tokens=max_new_tokens, constrained=constrained,
        )  # fmt: skip
    return "".join(pieces)


@contextmanager
def chat(
    run: Run | str | Path,
    *,
    source: str = "torch",
    system: str | None = None,
    max_new_tokens: int = CHAT_TOKENS,
    constrained: bool = False,
    trust_remote_code: bool = False,
) -> Iterator[Conversation]:
    """Load a model for a conversation, until the end of the `with` block.

        with chat("runs/mine", source="executorch") as conversation:
            print(conversation.send("Set an alarm for seven"))
            print(conversation.send("Make it eight"))

    Args:
        run: a finished run, or its folder.
        source: "torch" for the frozen checkpoint, or an exported target such as "executorch" or "onnx".
        system: system message before the conversation.
        max_new_tokens: longest answer, in tokens.
        constrained: permit only answers by the artifact's schema, of `export(schema=...)`.
        trust_remote_code: run Python code that comes with the model.

    Yields:
        The conversation, whose `send` answers a message.

    Raises:
        RunError: there is no such model.
        UsageError: the tokenizer has no chat template, the template refuses the system message, or a value is
            impossible.
        ArtifactError: the runtime refused the artifact.
    """
    config.require_between(max_new_tokens, 1, MOST_TOKENS, "max_new_tokens")
    config.require_text(system or "", "system", MOST_PROMPT)
    from qat_edge.verbs.chat import open_conversation

    with (
        remote_code.permit(trust_remote_code),
        open_conversation(
            _opened(run), source, system=system, max_new_tokens=max_new_tokens, constrained=constrained
        ) as conversation,
    ):
        yield conversation


def load_frozen(run: Run | str | Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a frozen checkpoint: the model whose logits every artifact reproduces.

    Args:
        run: a run, its folder, or the folder of a frozen checkpoint, such as RUN/ptq/gptq/quantized.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        RunError: there is no frozen checkpoint, or its files are not those that were written.
    """
    from qat_edge.errors import RunError
    from qat_edge.manifest import check_files
    from qat_edge.quant import frozen

    folder = run.quantized if isinstance(run, Run) else Path(run)
    folder = folder / "quantized" if (folder / "quantized").is_dir() else folder
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no frozen checkpoint here. `qat-edge quantize` or `qat-edge export` makes one.")
    check_files(folder)
    with remote_code.permit(trust_remote_code):
        model: PreTrainedModel = frozen.load(folder)
    return model
