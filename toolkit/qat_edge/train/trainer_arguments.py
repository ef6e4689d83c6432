"""Arguments of a trainer of transformers or TRL: those that a prepared model refuses, and the options they stand for.

An argument is refused where the result would be wrong without a message, or is not tested. Everything else is up to the
trainer: batches, optimizer, schedule, loss, logging, evaluation and checkpoints.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers import TrainingArguments

from qat_edge import environment, readers
from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions

TRL_CONFIGS = ("SFTConfig", "DPOConfig")  # arguments of the trainers of TRL that are tested
SCHEDULES = ("cosine", "constant", "linear")  # of finetune; the trainer knows more
DEVICES = ("cpu", "cuda")

ONE_PROCESS = "a prepared model trains in one process, on one device. Leave it out."
EVALUATION = "the evaluation would convert the weights to 16 bits, and codes taken from those are others. Leave it out."
# Arguments that are refused where they are given, each with the reason and the remedy. Some are TRL's alone.
REFUSED = {
    "fp16": "training is in float32, or with autocast to bfloat16. Give bf16=True or bf16=False.",
    "fp16_full_eval": EVALUATION,
    "bf16_full_eval": EVALUATION,
    "tf32": "adapters are merged in float32, and TF32 would change codes. Leave it out.",
    "deepspeed": ONE_PROCESS,
    "fsdp": ONE_PROCESS,
    "parallelism_config": ONE_PROCESS,
    "torch_compile": "fake quantization is not tested under torch.compile. Leave it out.",
    "use_liger_kernel": "Liger's functions replace layers, and no artifact computes those. Leave it out.",
    "activation_offloading": "it is not tested with fake quantization. Give gradient_checkpointing=True in its place.",
    "auto_find_batch_size": "training would begin again with weights that QAT has changed. Give the batch size.",
    "load_best_model_at_end": "a checkpoint of plain LoRA has a lower loss than those of QAT, and its adapters do not "
    "fit the weights that QAT began from. Leave it out.",
    "restore_callback_states_from_checkpoint": "the callback of prepare() has a record of its own. Leave it out.",
    "push_to_hub": "the trainer would upload adapters that fit the weights in RUN/start, and not the base model. Leave "
    "it out, and upload artifacts with `qat-edge push`.",
}


def check_arguments(args: TrainingArguments) -> None:
    """Refuse arguments with which the exported model would be another function than the trained one, or untested ones.

    Raises:
        UsageError: Names the argument and what to change.
    """
    _check_trainer(args)
    for name, reason in REFUSED.items():
        given = getattr(args, name, None)
        if given:
            raise UsageError(f"{name}={readers.shorten(str(given))}: {reason}")
    if max(args.world_size, args.n_gpu) > 1:
        raise UsageError(
            f"{args.world_size} processes with {args.n_gpu} GPUs: a prepared model trains in one process, on one "
            "device. Start it without torchrun or accelerate, with CUDA_VISIBLE_DEVICES set to one GPU."
        )
    if args.device.type not in DEVICES:
        raise UsageError(f"device {args.device.type}: a prepared model trains on {' or '.join(DEVICES)}.")
    environment.require_plain_training(args.device.type, precision_of(args))
    if torch.get_float32_matmul_precision() != "highest":
        raise UsageError(
            f"torch.set_float32_matmul_precision('{torch.get_float32_matmul_precision()}'): adapters are merged into "
            "weights in float32, in training as in export, and another precision would change codes. Set 'highest'."
        )


def _check_trainer(args: TrainingArguments) -> None:
    """Refuse trainers of TRL that are not tested, which their arguments tell apart.

    Raises:
        UsageError: Names the class of the arguments.
    """
    of_trl = [cls.__name__ for cls in type(args).__mro__ if cls.__module__.startswith("trl.")]
    if of_trl and not any(name in TRL_CONFIGS for name in of_trl):
        raise UsageError(
            f"{of_trl[0]}: prepared models are tested with SFTTrainer and DPOTrainer of TRL, and with the Trainer of "
            "transformers. Other trainers may sample from weights that are not rounded. Use one of the three."
        )


def precision_of(args: TrainingArguments) -> str:
    """Return "bf16" or "fp32", the precision of the matrix products."""
    return "bf16" if args.bf16 else "fp32"


def options_of(
    prepared: FinetuneOptions, args: TrainingArguments, steps: int, data: str, longest: int
) -> FinetuneOptions:
    """Return the options of finetune with which it would train like this trainer, for config.yaml.

    Args:
        prepared: The options of `prepare`.
        args: The trainer's arguments.
        steps: Optimizer steps of the training.
        data: Rows that later commands read.
        longest: Tokens of the longest of them.

    Raises:
        UsageError: QAT would start after the last step.
    """
    start = prepared.start_of_qat
    if start > steps:
        raise UsageError(
            f"qat_start={start:g}: the trainer does {steps} steps (max_steps, or num_train_epochs), so training would "
            f"end before QAT starts. Give a fraction below 1 or a step up to {steps}."
        )
    lr_schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return dataclasses.replace(
        prepared,
        data=data,
        max_length=max(longest, 8),
        steps=steps,
        batch_size=args.per_device_train_batch_size,
        gradient_accumulation=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_schedule=lr_schedule if lr_schedule in SCHEDULES else prepared.lr_schedule,
        warmup_steps=args.get_warmup_steps(steps),
        weight_decay=args.weight_decay,
        device=args.device.type,
        precision=precision_of(args),
        gradient_checkpointing=bool(args.activation_checkpointing),
        track=(),
    )
