"""Merge the adapters and freeze the codes: the one moment at which a trained weight is rounded for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qat_edge.adapters import adapter_facts, merged_model
from qat_edge.errors import RunError
from qat_edge.quant import frozen, scheme
from qat_edge.run import MANIFEST, Variant, read_manifest, replace_folder, sha256, write_manifest

ADAPTER_WEIGHTS = "adapter_model.safetensors"


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
