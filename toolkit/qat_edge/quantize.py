"""Merge the adapters and freeze the codes: the one moment at which a trained weight is rounded for good."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from qat_edge import models
from qat_edge.errors import RunError
from qat_edge.finetune import adapter_facts
from qat_edge.quant import fake, frozen, scheme
from qat_edge.run import MANIFEST, Variant, read_manifest, replace_folder, sha256, write_manifest

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def merged_model(adapter: Path, say: Callable[[str], None]) -> tuple[Any, Any, scheme.Scheme]:
    """Base model with the adapters of one folder merged in float32, its tokenizer, and its scheme.

    Raises:
        RunError: no adapter there, or the base model is not the one that was trained.
    """
    facts = adapter_facts(adapter)
    model, tokenizer, plan = _base_model(facts)
    switch = fake.insert(model, plan)
    config = fake.register(LoraConfig.from_pretrained(str(adapter)))
    device = _merge_device(facts["device"], say)
    adapted = PeftModel.from_pretrained(model, str(adapter), config=config).to(device)
    switch.enabled = False
    return fake.merge_adapters(adapted).to("cpu").eval(), tokenizer, plan


def base_model(adapter: Path) -> Any:
    """The base model that the adapters of one folder were trained on, in float32, without them."""
    return _base_model(adapter_facts(adapter))[0].eval()


def quantize(variant: Variant, adapter: Path, say: Callable[[str], None], force: bool = False) -> scheme.Scheme:
    """Freeze `adapter` into `variant.quantized`, unless the checkpoint there was made of the same adapter.

    Raises:
        RunError: the checkpoint there was made of another adapter, and `force` is not set.
    """
    made_of = sha256(adapter / ADAPTER_WEIGHTS) if (adapter / ADAPTER_WEIGHTS).is_file() else None
    if (variant.quantized / MANIFEST).is_file() and not force:
        if read_manifest(variant.quantized)["adapter_sha256"] != made_of:
            raise RunError(f"{variant.quantized} was made of another adapter. Give --force to make it again.")
        return frozen.read_scheme(variant.quantized)
    model, tokenizer, plan = merged_model(adapter, say)
    frozen.freeze(model, plan)
    with replace_folder(variant.quantized, force=True) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        facts = {k: v for k, v in adapter_facts(adapter).items() if k in ("model", "data", "seed", "device")}
        write_manifest(work, "quantized", adapter_sha256=made_of, scheme=frozen.scheme_facts(plan), **facts)
    say(f"Frozen: {plan.summary()} -> {variant.quantized}")
    return plan


def _base_model(facts: dict[str, Any]) -> tuple[Any, Any, scheme.Scheme]:
    recorded = facts["model"]
    model, tokenizer, identity = models.load_model(recorded["source"], recorded["trust_remote_code"])
    found, trained = dataclasses.asdict(identity), recorded["identity"]
    changed = [k for k in ("revision", "files") if found[k] != trained[k]]
    if changed:
        raise RunError(
            f"{recorded['source']} is not the model that was trained: {changed[0]} is {found[changed[0]]}, the run "
            f"was trained on {trained[changed[0]]}. Restore that model, or run finetune again."
        )
    return model, tokenizer, scheme.choose(model, facts["group_size"])


def _merge_device(trained_on: str, say: Callable[[str], None]) -> str:
    """Merge where it was trained: the last bit of B A, and with it a code at a tie, depends on the device."""
    if trained_on == "cuda" and not torch.cuda.is_available():
        say("Trained on CUDA, merged on this CPU: a few codes at rounding ties may differ from those in training.")
        return "cpu"
    return trained_on
