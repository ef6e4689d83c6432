"""Fine-tune all weights instead of adapters, or adapters on a base in few bits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from conftest import plain_rows, relist
from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import read_manifest
from qat_edge.models.merge import base_model, merged_model
from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake, frozen, numerics, scheme
from qat_edge.quant.qat_init import QatInit
from qat_edge.train.option_checks import check_combination
from qat_edge.verbs.finetune import finetune

DEFAULT_INIT = FinetuneOptions(model="m", data="d").ptq_init
IDS = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    rows = plain_rows(40)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneOptions(
        model=str(tiny_model_folder), data=str(tmp_path / "train.jsonl"), method="full", learning_rate=1e-4,
        steps=6, qat_start=0.5, batch_size=4, save_every=2, track=(),
    )  # fmt: skip


def tensors(run: Path, part: str = "adapter") -> dict[str, torch.Tensor]:
    return load_file(run / part / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in json.loads((run / "training.json").read_text())["curve"] if "loss" in row]


@pytest.mark.parametrize("learned", [False, True])
def test_the_frozen_model_equals_the_trained_one(tiny_model_folder: Path, tmp_path: Path, learned: bool) -> None:
    """Train all weights for a step, then freeze: plain transformers gives the same logits bit for bit."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    weight_schemes = scheme.choose_scheme(model, 32)
    switch = fake.insert(model, weight_schemes, learned_scales=learned)
    fake.train_weights(model)
    if learned:
        scales = {
            n: numerics.choose_scales(model.get_submodule(n).weight.detach(), 4, 32) for n in weight_schemes.linears
        }
        QatInit(scales, {}).apply(model)

    # One step of quantization-aware training reaches every parameter.
    switch.enabled = True
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    count = 2 * 9 + 2 + (2 * 7 if learned else 0)  # two blocks, embedding and norm; a factor for each linear layer
    assert len(list(model.parameters())) == count
    optimizer.step()
    with torch.no_grad():
        trained = model(IDS).logits

    # Freeze, and load without qat-edge.
    merged, own = fake.merge_adapters(model)
    assert set(own) == (set(weight_schemes.linears) if learned else set())
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    frozen.freeze(merged, weight_schemes, own)
    merged.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(IDS).logits, trained, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes", [{}, {"ptq_init": "awq", "scales": "fixed"}, {"ptq_init": "none", "scales": "absmax"}]
)
def test_a_run_has_whole_models(options: FinetuneOptions, tmp_path: Path, changes: dict[str, Any]) -> None:
    out = tmp_path / "run"
    finetune(replace(options, **changes), out)
    for part in ("adapter", "reference"):
        assert set(read_manifest(out / part)["files"]) == {"model.safetensors", "config.json"}
    factors = {n for n in tensors(out) if "scale_factor" in n}
    assert len(factors) == (0 if changes else 2 * 7) and not any("scale_factor" in n for n in tensors(out, "reference"))
    merged = merged_model(out / "adapter")
    state = merged.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in tensors(out).items() if n not in factors)
    assert set(merged.scales) == (set() if changes.get("scales") == "absmax" else set(merged.scheme.linears))
    plain = AutoModelForCausalLM.from_pretrained(out / "reference", dtype=torch.float32).eval()
    base = base_model(out / "reference")
    with torch.no_grad():
        reference = merged_model(out / "reference").model(IDS).logits
        torch.testing.assert_close(plain(IDS).logits, reference, rtol=0, atol=0)
        assert (base(IDS).logits != reference).any()


def test_a_resumed_run_ends_the_same(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(options, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    finetune(options, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)


def test_all_weights_are_trained_with_a_cached_teacher(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(replace(options, distill_weight=0.5, distill_top_k=8), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 6


def test_missing_weights_are_named(options: FinetuneOptions, tmp_path: Path) -> None:
    out = tmp_path / "run"
    finetune(replace(options, steps=2), out)
    short = {name: tensor for name, tensor in tensors(out, "reference").items() if name != "model.norm.weight"}
    save_file(short, out / "reference" / "model.safetensors")
    relist(out / "reference")
    with pytest.raises(RunError, match=r"1 tensor missing \(model\.norm\.weight\)"):
        merged_model(out / "reference")
    (out / "reference" / "model.safetensors").unlink()
    relist(out / "reference")
    with pytest.raises(RunError, match=r"model\.safetensors is missing"):
        merged_model(out / "reference")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"base": "nf4"}, ("--base nf4", f"--ptq-init {DEFAULT_INIT} (the default)", "Give --ptq-init hqq")),
        ({"base": "int8", "ptq_init": "awq"}, ("--base int8", "--ptq-init awq")),
        ({"base": "nf4", "ptq_init": "hqq", "method": "full"}, ("--base nf4", "--method full")),
        ({"method": "full", "lora_rank": 4, "lora_dropout": 0.5}, ("--method full", "--lora-rank, --lora-dropout")),
        ({"method": "full", "distill_weight": 0.5, "ptq_init": "hqq"}, ("--distill-weight", "--method full")),
    ],
)
def test_options_that_exclude_each_other_are_named(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        check_combination(FinetuneOptions(model="m", data="d", **changes))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("init", ["hqq", "none"])
def test_adapters_are_trained_on_a_base_in_few_bits(
    options: FinetuneOptions, tmp_path: Path, base: str, init: str, messages: list[str]
) -> None:
    out = tmp_path / "run"
    finetune(replace(options, method="lora", base=base, ptq_init=init), out)
    assert any(f"linear layers as {base}, " in line for line in messages)
    stored = base_model(out / "reference")
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    changed = {n for n, p in stored.named_parameters() if not torch.equal(p, original.get_parameter(n))}
    weight_schemes = scheme.choose_scheme(original, 32)
    assert changed == {f"{name}.weight" for name in weight_schemes.linears}
    merged = merged_model(out / "adapter")
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    for name in weight_schemes.linears:
        stem = f"base_model.model.{name}.lora_"
        expected = numerics.merge(
            stored.get_submodule(name).weight, saved[f"{stem}A.weight"], saved[f"{stem}B.weight"], 2.0
        )
        assert torch.equal(merged.model.get_submodule(name).weight, expected)


def test_a_resumed_run_on_a_base_in_few_bits_ends_the_same(options: FinetuneOptions, tmp_path: Path) -> None:
    options = replace(options, method="lora", base="nf4", ptq_init="hqq")
    finetune(options, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    finetune(options, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
