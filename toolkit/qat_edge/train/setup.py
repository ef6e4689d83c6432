"""Everything before the first step: device, model, data, which weights get which bits, what is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers.integrations import get_available_reporting_integrations

from qat_edge import progress
from qat_edge.config import FinetuneOptions
from qat_edge.data import tokenization, training_examples
from qat_edge.data.formats import load_rows
from qat_edge.errors import ModelError, UsageError
from qat_edge.models import load
from qat_edge.models.tasks import CAUSAL_LM, Kind
from qat_edge.quant import fake, numerics, qlora_base, rotation, scheme
from qat_edge.quant.bit_allocation import load_bits
from qat_edge.quant.ptq import methods
from qat_edge.train import prune


@dataclass(frozen=True)
class Job:
    """Everything that is loaded before training. facts: what the manifests record of it.

    rotation_seed: None where the hidden states are not to be turned.
    """

    kind: Kind
    model: Any
    tokenizer: Any
    plan: scheme.Scheme
    rows: tokenization.TokenizedRows
    eval_rows: tokenization.TokenizedRows | None
    device: str
    precision: str
    rotation_seed: int | None
    facts: dict[str, Any]


def prepare(options: FinetuneOptions, kept_layers: list[int] | None = None) -> Job:
    """Load model and data, and say aloud what was found and chosen.

    kept_layers: those that a resumed run kept, where it was pruned.
    """
    device = choose_device(options.device)
    _check_trackers(options.track)
    precision = choose_precision(options.precision, device)
    progress.info(f"Training on {describe_device(device)}, matrix products in {precision}, rounding in fp32")
    kind = _kind(options)
    model, tokenizer, identity = load.load_model(options.model, options.trust_remote_code, kind=kind)
    progress.info(f"Model: {identity.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters")
    for target, why in load.export_gaps(model.config).items():
        progress.info(f"Warning: what is trained here cannot be exported to {target}: {why}")
    bits = load_bits(Path(options.bits)) if options.bits else {}
    read = partial(_tokenize, options=options, kind=kind, model=model, tokenizer=tokenizer)
    rows = read(options.data, "train")
    eval_rows = read(options.eval_data, "eval") if options.eval_data else None
    if options.keep_layers is not None:
        kept_layers = kept_layers or prune.choose_layers(
            model, options.keep_layers, options.prune, rows, tokenizer, options.seed, device
        )
        load.keep_layers(model, kept_layers)
        progress.info(
            f"Pruned to {len(kept_layers)} layers, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
        )
    plan = scheme.choose(model, options.group_size, bits, (options.embedding_bits, options.head_bits))
    progress.info(f"Quantization: {plan.summary()}; {plan.tables()}")
    for name, reason in plan.exceptions.items():
        progress.info(f"  {name}: {reason}")
    facts = _facts(options, kind, identity, rows, eval_rows) | {
        "device": device,
        "bits": bits,
        "kept_layers": kept_layers,
    }
    rotation_seed = None if kind.encodes else _rotation_seed(model, plan, options)
    return Job(kind, model, tokenizer, plan, rows, eval_rows, device, precision, rotation_seed, facts)


def _kind(options: FinetuneOptions) -> Kind:
    """What the model is trained for: an encoder for what its rows say, any other to generate text.

    Raises:
        UsageError: an option that is for models that generate text, given for an encoder.
        ModelError: an encoder that no target takes.
        DataError: rows that no encoder learns from.
    """
    config = load.encoder_config(options.model, options.trust_remote_code)
    if config is None:
        return CAUSAL_LM
    gap = load.export_gaps(config).get("executorch")
    if gap:
        raise ModelError(f"{options.model}: an encoder that could not be exported: {gap}")
    refused = {
        "--keep-layers": options.keep_layers is not None,
        "--distill-weight": options.distill_weight > 0,
        "--rotate on": options.rotate == "on",
    }
    for flag, given in refused.items():
        if given:
            raise UsageError(f"{flag} is for models that generate text; {options.model} is an encoder. Leave it out.")
    kind = training_examples.kind_for(config, load_rows(options.data), options.data)
    progress.info(f"{config.model_type} is an encoder, and these rows make it {kind.title}")
    return kind


def _rotation_seed(model: Any, plan: scheme.Scheme, options: FinetuneOptions) -> int | None:
    """The seed where the start is to turn the hidden states, None where they stay.

    Raises:
        UsageError: they are to be turned, and cannot be.
    """
    suits = options.method == "lora" and options.ptq_init in methods.COMPENSATED
    if options.rotate == "off" or (options.rotate == "auto" and not suits):
        return None
    obstacle = rotation.obstacle(model, plan)
    if obstacle and options.rotate == "on":
        raise UsageError(f"--rotate on: {obstacle} Take --rotate auto.")
    if obstacle:
        progress.info(f"The hidden states stay in their coordinates: {obstacle}")
        return None
    progress.info("The hidden states will be turned before the start")
    return options.seed


def _facts(
    options: FinetuneOptions,
    kind: Kind,
    identity: load.ModelIdentity,
    rows: tokenization.TokenizedRows,
    eval_rows: tokenization.TokenizedRows | None,
) -> dict[str, Any]:
    origin = {"source": options.model, "trust_remote_code": options.trust_remote_code}
    return {
        "model": {**origin, "identity": dataclasses.asdict(identity), **kind.facts()},
        "data": {"source": options.data, "sha256": _fingerprint(rows)},
        "eval_data": eval_rows and {"source": options.eval_data, "sha256": _fingerprint(eval_rows)},
        "seed": options.seed,
        "quantizer": numerics.QUANTIZER,
        "group_size": options.group_size,
        "table_bits": [options.embedding_bits, options.head_bits],
        "method": options.method,
        "base": options.base,
        "learned_scales": False,
        "start": None,
    }


def trainable(job: Job, options: FinetuneOptions) -> tuple[Any, fake.Switch]:
    """The model ready to be trained, fake quantization inserted and off: with adapters, or all of it.

    Raises:
        UsageError: the target modules are none that adapters can be merged into before they are rounded.
    """
    if options.base != "fp32":
        before, after = qlora_base.store(job.model, job.plan.linears, options.base)
        progress.info(f"Base: linear layers as {options.base}, {after / 1e6:.0f} MB instead of {before / 1e6:.0f} MB")
    switch = fake.insert(job.model, job.plan, options.scales == "learned")
    torch.manual_seed(options.seed)
    if options.method == "full":
        trained = sum(p.numel() for p in job.model.parameters()) / 1e6
        progress.info(
            f"Training all {trained:.0f} M weights at a learning rate of {options.learning_rate:g}, without adapters"
        )
        return fake.train_weights(job.model), switch
    return fake.add_adapters(job.model, _lora_config(options, job)), switch


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


def _tokenize(
    source: str,
    split: str,
    options: FinetuneOptions,
    kind: Kind,
    model: Any,
    tokenizer: Any,
) -> tokenization.TokenizedRows:
    rows = training_examples.tokenize(kind, load_rows(source, split), model, tokenizer, options.max_length)
    progress.info(f"{split}: {rows.summary()}")
    return rows


def _fingerprint(rows: tokenization.TokenizedRows) -> str:
    """sha256 of the token ids and labels: the same text under another tokenizer is other data."""
    digest = hashlib.sha256()
    for row in rows.rows:
        digest.update(json.dumps([list(values) for values in row.values()]).encode())
    return digest.hexdigest()


def _lora_config(options: FinetuneOptions, job: Job) -> LoraConfig:
    """Adapters; what an encoder has after its blocks, which may be new, is trained itself."""
    targets = list(options.target_modules)
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type=None if job.kind.encodes else "CAUSAL_LM",
        modules_to_save=job.plan.heads if job.kind.encodes else None,
    )
