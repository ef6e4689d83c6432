"""Arguments of the Hugging Face Trainer for the options of finetune."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from qat_edge.models.tasks import ModelTask
from qat_edge.options import FinetuneOptions


def training_arguments(
    options: FinetuneOptions, folder: Path, device: str, precision: str, task: ModelTask, evaluates: bool
) -> TrainingArguments:
    """Translate options into those of the Hugging Face Trainer.

    Args:
        options: Of finetune.
        folder: Folder of its checkpoints.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the matrix products.
        task: The task the model is trained for.
        evaluates: There are rows to evaluate on.
    """
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        seed=options.seed,
        # TwoPhases requests the evaluation at the end of each phase; "steps" makes the Trainer able to evaluate.
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_every or options.steps + 1,
        prediction_loss_only=True,
        label_names=["labels"] if task.is_encoder else None,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=None,  # `checkpoints.save` removes older ones
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log the mean of earlier losses in place of one that is not finite
        include_num_input_tokens_seen="all",
        report_to=list(options.track),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        ignore_data_skip=options.streaming,  # a stream begins at its position
        # Several processes: learned scales have no gradient in phase 1, and with fixed codes adapters have none. The
        # buffers of layers are computed alike everywhere.
        ddp_find_unused_parameters=True,
        ddp_broadcast_buffers=False,
        use_cache=False,  # with a cache, attention would look across the borders of packed rows
    )
