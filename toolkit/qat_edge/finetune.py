"""Train LoRA adapters, first plainly, then with the deployed rounding in the forward pass.

Phase 1 is ordinary LoRA; its adapters are kept as `reference/`, the FP32 fine-tune everything is measured against.
Phase 2 goes on from there with `quant.fake` switched on, and ends in `adapter/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from qat_edge import config, data, models
from qat_edge.config import FinetuneOptions
from qat_edge.console import bar
from qat_edge.errors import RunError, UsageError
from qat_edge.quant import fake, scheme
from qat_edge.rows import load_rows
from qat_edge.run import Run, disk_errors, replace_folder, write_manifest, write_text
from qat_edge.training import ShowProgress, TwoPhases, curve, peak_memory_bytes

TRAINING_LOG = "training.json"


@dataclass(frozen=True)
class Finetuned:
    """What finetune leaves. loss: of the last step, nats per token."""

    run: Path
    steps: int
    qat_start_step: int
    loss: float
    wall_s: float
    peak_memory_bytes: int


def finetune(
    options: FinetuneOptions, out: Path, say: Callable[[str], None], resume: bool = False, force: bool = False
) -> Finetuned:
    """Train into the run folder `out`.

    Raises:
        RunError: `out` exists (without `force` or `resume`), or cannot be resumed.
        UsageError, ModelError, DataError: what was asked for cannot be trained.
    """
    run = _check_folder(options, out, resume, force)
    began = time.monotonic()
    job = _prepare(options, say)
    switch = fake.insert(job.model, job.plan)
    torch.manual_seed(options.seed)
    adapted = fake.add_adapters(job.model, _lora_config(options))
    if not resume:
        # Not before: whatever was asked wrongly has been found by now, and has cost nobody a run.
        shutil.rmtree(out, ignore_errors=True)
        config.save(run.config, "finetune", options)
    _same_inputs(run, job.facts, resume)
    start = qat_start_step(options)
    phases = TwoPhases(switch, start, lambda: _save_adapter(adapted, run.reference, "reference", job.facts))
    trainer = _trainer(adapted, job, options, run, phases)
    say(f"{start} steps of LoRA, then {options.steps - start} with fake quantization")
    with bar("training", options.steps) as progress, disk_errors(run.path):
        trainer.add_callback(ShowProgress(progress, phases))
        trainer.train(resume_from_checkpoint=resume or None)
    _save_adapter(adapted, run.adapter, "adapter", job.facts)
    steps = curve(trainer.state.log_history, start)
    result = Finetuned(
        run=out,
        steps=options.steps,
        qat_start_step=start,
        loss=[row["loss"] for row in steps if "loss" in row][-1],
        wall_s=time.monotonic() - began,
        peak_memory_bytes=peak_memory_bytes(),
    )
    log = dataclasses.asdict(result) | {"device": describe_device(job.device), "truncated_rows": job.rows.truncated}
    write_text(run.path / TRAINING_LOG, json.dumps({**log, "curve": steps}, indent=1, default=str))
    return result


@dataclass(frozen=True)
class _Job:
    """Everything that is loaded before training. facts: what the manifests record of it."""

    model: Any
    tokenizer: Any
    plan: scheme.Scheme
    rows: data.TokenizedRows
    eval_rows: data.TokenizedRows | None
    device: str
    precision: str
    facts: dict[str, Any]


def _prepare(options: FinetuneOptions, say: Callable[[str], None]) -> _Job:
    """Load model and data, and say aloud what was found and chosen."""
    device = choose_device(options.device)
    _check_trackers(options.track)
    precision = choose_precision(options.precision, device)
    say(f"Training on {describe_device(device)}, matrix products in {precision}, rounding in fp32")
    model, tokenizer, identity = models.load_model(options.model, options.trust_remote_code)
    say(f"Model: {identity.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    plan = scheme.choose(model, options.group_size)
    say(f"Quantization: {plan.summary()}{', embedding and head share a table' if plan.tied else ''}")
    for name, reason in plan.exceptions.items():
        say(f"  {name}: {reason}")
    rows = _tokenize(options.data, "train", options, tokenizer, say)
    eval_rows = _tokenize(options.eval_data, "eval", options, tokenizer, say) if options.eval_data else None
    origin = {"source": options.model, "trust_remote_code": options.trust_remote_code}
    facts = {
        "model": {**origin, "identity": dataclasses.asdict(identity)},
        "data": {"source": options.data, "sha256": _fingerprint(rows)},
        "eval_data": eval_rows and {"source": options.eval_data, "sha256": _fingerprint(eval_rows)},
        "seed": options.seed,
        "device": device,
        "group_size": options.group_size,
    }
    return _Job(model, tokenizer, plan, rows, eval_rows, device, precision, facts)


def _trainer(adapted: Any, job: _Job, options: FinetuneOptions, run: Run, phases: TwoPhases) -> Trainer:
    trainer = Trainer(
        model=adapted,
        args=_arguments(options, run, job),
        data_collator=data.Collator(job.tokenizer),
        train_dataset=job.rows.rows,
        eval_dataset=None if job.eval_rows is None else job.eval_rows.rows[: options.eval_rows],
        callbacks=[phases],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def qat_start_step(options: FinetuneOptions) -> int:
    """Last step of phase 1: `qat_start` is a share of the steps below 1, a step from 1 on."""
    start = options.qat_start * options.steps if options.qat_start < 1 else options.qat_start
    return min(round(start), options.steps)


def choose_device(asked: str) -> str:
    """`cuda` or `cpu`.

    Raises:
        UsageError: CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA GPU here. Use --device auto or --device cpu.")
    return "cuda" if asked != "cpu" and available else "cpu"


def choose_precision(asked: str, device: str) -> str:
    """`bf16` or `fp32`.

    Raises:
        UsageError: bfloat16 was asked for and the GPU has none.
    """
    supported = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and not supported:
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name()} has no bfloat16. Use --precision auto or fp32."
        )
    return "bf16" if asked != "fp32" and supported else "fp32"


def _check_trackers(names: Sequence[str]) -> None:
    """Before anything is loaded, not after.

    Raises:
        UsageError: a tracker that the trainer does not know, or whose package is not installed.
    """
    available = get_available_reporting_integrations()
    unknown = [name for name in names if name not in (*available, "none")]
    if unknown:
        raise UsageError(
            f"--track {unknown[0]}: not known to the trainer, or its package is not installed "
            f"(`pip install {unknown[0]}`). Installed: {', '.join(available)}; 'none' logs nowhere."
        )


def describe_device(device: str) -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _check_folder(options: FinetuneOptions, out: Path, resume: bool, force: bool) -> Run:
    run = Run(out)
    if resume:
        if not run.config.is_file():
            raise RunError(
                f"--resume: {out} holds no config.yaml, so there is nothing to resume. Train without --resume."
            )
        if not any(run.checkpoints.glob("checkpoint-*")):
            raise RunError(f"--resume: {run.checkpoints} holds no checkpoint. Train with --force instead of --resume.")
        saved = config.load(FinetuneOptions, "finetune", run.config, {})
        changed = [k for k, v in dataclasses.asdict(saved).items() if getattr(options, k) != v]
        if changed:
            raise UsageError(
                f"--resume: {', '.join(config.flag_name(k) for k in changed)} differ from {run.config}; "
                "a resumed run goes on exactly as it began."
            )
        return run
    if out.exists():
        if not force:
            raise RunError(f"{out} exists already. Give --force to replace it, or --resume to go on with it.")
        Run.open(out)  # --force replaces a run folder, never a folder that is something else
        for name in ("model", "data", "eval_data"):
            if Path(str(getattr(options, name))).resolve().is_relative_to(out.resolve()):
                raise UsageError(
                    f"{config.flag_name(name)} {getattr(options, name)} lies inside {out}, which --force would "
                    "remove. Move it, or choose another --out."
                )
    return run


def _tokenize(
    source: str, split: str, options: FinetuneOptions, tokenizer: Any, say: Callable[[str], None]
) -> data.TokenizedRows:
    rows = data.tokenize(load_rows(source, split), tokenizer, options.max_length)
    say(f"{split}: {rows.summary()}")
    return rows


def _fingerprint(rows: data.TokenizedRows) -> str:
    """sha256 of the token ids and labels: the same text under another tokenizer is other data."""
    digest = hashlib.sha256()
    for row in rows.rows:
        digest.update(json.dumps([list(row["input_ids"]), list(row["labels"])]).encode())
    return digest.hexdigest()


def _same_inputs(run: Run, facts: dict[str, Any], resume: bool) -> None:
    """Keep model and data identity with the checkpoints, and refuse to resume on others."""
    path = run.checkpoints / "inputs.json"
    current = json.loads(json.dumps({k: facts[k] for k in ("model", "data", "eval_data")}, default=str))
    if not resume:
        write_text(path, json.dumps(current, indent=1))
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    changed = [k for k in current if current[k] != saved.get(k)]
    if changed:
        raise RunError(f"--resume: {', '.join(changed)} changed since {run.path} was begun. Train anew with --force.")


def _lora_config(options: FinetuneOptions) -> LoraConfig:
    targets = list(options.target_modules)
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )


def _arguments(options: FinetuneOptions, run: Run, job: _Job) -> TrainingArguments:
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.path / "logs")
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=options.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(options.lr_schedule, options.lr_schedule),
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        seed=options.seed,
        # Evaluation at the end of each phase is asked for by TwoPhases; "steps" only opens the door.
        eval_strategy="no" if job.eval_rows is None else "steps",
        eval_steps=options.eval_every or options.steps + 1,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=2,
        logging_steps=1,
        include_num_input_tokens_seen="all",
        report_to=list(options.track),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


def _save_adapter(model: Any, folder: Path, kind: str, facts: dict[str, Any]) -> None:
    with replace_folder(folder, force=True) as work:
        model.save_pretrained(work, save_embedding_layers=False)
        write_manifest(work, kind, **facts)
