"""Depth pruning: the choice of layers, and the remaining model, which is an ordinary one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conftest import make_model, plain_rows
from qat_edge.errors import ModelError, UsageError
from qat_edge.manifest import read_manifest
from qat_edge.models.layer_removal import keep_layers
from qat_edge.models.merge import base_model, merged_model
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge.train import prune
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize

IDS = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(1))
LAYERS = 4
HARMLESS = (0, 2)  # layers that add nothing to the residual stream


def four_layers(tokenizer: Any) -> LlamaForCausalLM:
    config = make_model(tokenizer).config
    config.num_hidden_layers = LAYERS
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for i in HARMLESS:
        model.model.layers[i].self_attn.o_proj.weight.data.mul_(1e-6)
        model.model.layers[i].mlp.down_proj.weight.data.mul_(1e-6)
    return model


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    four_layers(tokenizer).save_pretrained(tmp_path / "four")
    tokenizer.save_pretrained(tmp_path / "four")
    return tmp_path / "four"


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> FinetuneOptions:
    rows = plain_rows(40)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneOptions(
        model=str(folder), data=str(tmp_path / "train.jsonl"), keep_layers=2,
        steps=6, qat_start=0.5, batch_size=4, lora_rank=4, save_every=2, track=(),
    )  # fmt: skip


def batch(pad: int = 0) -> list[dict[str, torch.Tensor]]:
    mask = torch.ones_like(IDS)
    if pad:
        mask[0, -pad:] = 0
    return [{"input_ids": IDS, "attention_mask": mask}]


def test_the_cost_of_a_layer_is_the_divergence_without_it(tokenizer: Any) -> None:
    model = four_layers(tokenizer)
    found = prune.layer_costs(model, batch())
    with torch.no_grad():
        log_p = model(IDS).logits.log_softmax(-1)
        for i in range(LAYERS):
            other = four_layers(tokenizer)
            keep_layers(other, [j for j in range(LAYERS) if j != i])
            log_q = other(IDS, use_cache=False).logits.log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert found[i] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert max(found[i] for i in HARMLESS) < min(found[i] for i in range(LAYERS) if i not in HARMLESS)


def test_padding_does_not_count_towards_the_cost(tokenizer: Any) -> None:
    model = four_layers(tokenizer)
    changed = batch(pad=8)
    changed[0]["input_ids"] = IDS.clone()
    changed[0]["input_ids"][0, -8:] = 5
    assert prune.layer_costs(model, batch(pad=8)) == pytest.approx(prune.layer_costs(model, changed))


def test_layers_that_add_nothing_can_be_removed(tokenizer: Any) -> None:
    """The remaining model has the same outputs, with a KV cache and without."""
    model, whole = four_layers(tokenizer), four_layers(tokenizer)
    kept = [i for i in range(LAYERS) if i not in HARMLESS]
    keep_layers(model, kept)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-3, atol=1e-4)
        past = model(IDS[:, :12], use_cache=True).past_key_values
        rest = model(IDS[:, 12:], past_key_values=past).logits
        torch.testing.assert_close(rest, model(IDS, use_cache=False).logits[:, 12:], rtol=1e-4, atol=1e-5)
    assert len(past.layers) == 2


def test_per_layer_settings_follow_their_layer(tmp_path: Path) -> None:
    layer_types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, layer_types=layer_types, use_sliding_window=True, sliding_window=4,
        eos_token_id=[1, 2, 3, 4],
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    keep_layers(model, [1, 2])
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.eos_token_id == [1, 2, 3, 4]
    model.save_pretrained(tmp_path / "pruned")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_layers_that_the_configuration_cannot_describe_are_refused(tokenizer: Any) -> None:
    model = four_layers(tokenizer)
    wide = torch.nn.Linear(64, 96, bias=False)
    model.model.layers[3].mlp.up_proj = wide
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        keep_layers(model, [0, 3])


@pytest.mark.parametrize("count", [0, 5])
def test_a_number_of_layers_that_the_model_does_not_have_is_refused(
    options: FinetuneOptions, tmp_path: Path, count: int
) -> None:
    with pytest.raises(UsageError, match=f"--keep-layers {count}: the model has 4 layers"):
        finetune(replace(options, keep_layers=count), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("how", "kept"), [("least-harmful", [1, 3]), ("first", [0, 1])])
def test_a_run_keeps_its_layers(
    options: FinetuneOptions, folder: Path, tmp_path: Path, how: str, kept: list[int]
) -> None:
    out = tmp_path / "run"
    finetune(replace(options, prune=how), out)
    assert all(read_manifest(out / part)["kept_layers"] == kept for part in ("adapter", "reference"))
    original, base = AutoModelForCausalLM.from_pretrained(folder), base_model(out / "reference")
    for position, i in enumerate(kept):
        weights = (m.model.layers[at].mlp.up_proj.weight for m, at in ((base, position), (original, i)))
        assert torch.equal(*weights)
    assert len(merged_model(out / "reference").scheme.linears) == 2 * 7
    quantize(Run(out), QuantizeOptions())
    quantized = frozen.load(out / "quantized")
    assert quantized.config.num_hidden_layers == 2
    assert quantized.generate(IDS[:1], max_new_tokens=4, do_sample=False).shape[1] > IDS.shape[1]


def test_a_resumed_run_keeps_its_layers(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(options, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    monkeypatch.setattr(prune, "choose_layers", lambda *given: pytest.fail("measured again"))
    finetune(options, tmp_path / "cut", resume=True)
    ends = [read_manifest(tmp_path / run / "adapter")["files"] for run in ("whole", "cut")]
    assert ends[0]["adapter_model.safetensors"] == ends[1]["adapter_model.safetensors"]


def test_a_pruned_model_is_fine_tuned_in_full(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(replace(options, method="full", lora_rank=16, learning_rate=1e-4), tmp_path / "run")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "reference", dtype=torch.float32).eval()
    ours = merged_model(tmp_path / "run" / "reference").model
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
