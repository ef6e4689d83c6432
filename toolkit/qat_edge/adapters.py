"""Adapters on disk and the models they belong to: what was trained, on what, merged in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from qat_edge import models
from qat_edge.errors import RunError
from qat_edge.quant import fake, scheme
from qat_edge.run import read_manifest


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What an adapter folder was trained on.

    Raises:
        RunError: the folder holds no finished adapter.
    """
    if not folder.is_dir():
        raise RunError(
            f"{folder} is missing: the training has not come that far. `qat-edge finetune --resume` goes on."
        )
    return read_manifest(folder)


def merged_model(adapter: Path, say: Callable[[str], None]) -> tuple[Any, Any, scheme.Scheme]:
    """Base model with the adapters of one folder merged in float32, its tokenizer, and its scheme.

    Raises:
        RunError: no adapter there, or the base model is not the one that was trained.
    """
    facts = adapter_facts(adapter)
    model, tokenizer, plan = _base_model(facts)
    fake.insert(model, plan)
    config = fake.register(LoraConfig.from_pretrained(str(adapter)))
    device = _merge_device(facts["device"], say)
    adapted = PeftModel.from_pretrained(model, str(adapter), config=config).to(device)
    return fake.merge_adapters(adapted).to("cpu").eval(), tokenizer, plan


def base_model(adapter: Path) -> Any:
    """The base model that the adapters of one folder were trained on, in float32, without them."""
    return _base_model(adapter_facts(adapter))[0].eval()


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
