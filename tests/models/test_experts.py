"""Models whose weights cannot be quantized are refused before training, by the class of the module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from conftest import make_model, make_tokenizer
from qat_edge.errors import ModelError, UsageError
from qat_edge.models import load
from qat_edge.models.experts import refuse_experts
from qat_edge.models.load import load_model
from qat_edge.options import FinetuneOptions
from qat_edge.quant import scheme
from qat_edge.verbs.finetune import finetune

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
SHAPE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def options(model: Path, rows: Path, **changes: Any) -> FinetuneOptions:
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    return FinetuneOptions(
        model=str(model), data=str(rows), steps=2, batch_size=2, lora_rank=4, qat_start=0.5, track=(), **changes
    )


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj")])
def test_a_mixture_of_experts_is_refused_before_training(tmp_path: Path, targets: tuple[str, ...]) -> None:
    folder = save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)), tmp_path / "moe")
    given = options(folder, tmp_path / "rows.jsonl", target_modules=targets)
    with pytest.raises(ModelError, match=r"Qwen3MoeExperts \(model\.layers\.0\.mlp\.experts\) stacks") as caught:
        finetune(given, tmp_path / "run")
    assert "--" not in str(caught.value), "no flag was given"
    assert not (tmp_path / "run").exists()


def test_experts_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    folder = save(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)), tmp_path / "moe")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="Qwen3MoeExperts"):
        load_model(str(folder))


def test_experts_in_a_list_of_linear_layers_are_refused() -> None:
    """A model with code of its own may keep them apart."""
    block = nn.Module()
    block.experts = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
    for expert in block.experts:
        expert.up_proj = nn.Linear(64, 64)
    with pytest.raises(ModelError, match=r"Linear \(experts\.0\.up_proj\) is one of several experts"):
        refuse_experts(block)


def test_a_model_that_is_mostly_of_other_modules_is_refused_by_their_class() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=288, n_embd=64, n_layer=2, n_head=4, n_positions=64))
    with pytest.raises(ModelError, match=r"8\d% of its parameters .* Conv1D 8\d% \(such as transformer\.h\.0"):
        scheme.choose_scheme(model, 32)


class WithParameter(LlamaForCausalLM):
    """Llama with a raw parameter that no layer has."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.zeros(40, 64))


def test_modules_that_stay_float_are_listed_with_their_share() -> None:
    model = WithParameter(make_model(make_tokenizer()).config)
    model.tie_weights()
    left = scheme.float_modules(model, scheme.choose_scheme(model, 32).weights)
    total = sum(p.numel() for p in model.parameters())
    norms = 5 * 64
    assert [(m.module_class, m.parameters) for m in left] == [("WithParameter", 40 * 64), ("LlamaRMSNorm", norms)]
    assert left[0].share == 40 * 64 / total


def test_the_listing_is_printed_where_it_matters(tmp_path: Path, messages: list[str]) -> None:
    config = make_model(make_tokenizer()).config
    config.attention_bias = config.mlp_bias = True
    folder = save(LlamaForCausalLM(config), tmp_path / "model")
    finetune(options(folder, tmp_path / "rows.jsonl"), tmp_path / "run")
    (line,) = [line for line in messages if "stays float32" in line]
    # Two layers of 64 + 32 + 32 + 64 and 128 + 128 + 64 biases.
    assert line.startswith("  stays float32: Linear, 1.") and "such as model.layers.0.self_attn.q_proj" in line


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "k_porj"), r"not in this model: k_porj\. Its linear layers are named .*k_proj, .*q_proj"),
        (("c_attn",), r"not in this model: c_attn\."),
        (("q_proj", "all-linear"), r"not in this model: all-linear\..*'all-linear' stands alone"),
    ],
)
def test_a_target_module_that_hits_nothing_among_several_is_refused(
    tiny_model_folder: Path, tmp_path: Path, targets: tuple[str, ...], message: str
) -> None:
    """peft accepts a list of which one name hits."""
    with pytest.raises(UsageError, match=f"--target-modules: Target modules that are {message}"):
        finetune(options(tiny_model_folder, tmp_path / "rows.jsonl", target_modules=targets), tmp_path / "run")


def test_a_model_without_a_place_for_adapters_is_refused_without_naming_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MambaForCausalLM

    monkeypatch.setattr(load, "export_gaps", lambda config: {})  # no target can express it either
    config = MambaConfig(vocab_size=288, hidden_size=64, num_hidden_layers=2, state_size=4, pad_token_id=2)
    folder = save(MambaForCausalLM(config), tmp_path / "mamba")
    with pytest.raises(ModelError, match=r"MambaForCausalLM: adapters cannot be added") as caught:
        finetune(options(folder, tmp_path / "rows.jsonl"), tmp_path / "run")
    assert "--" not in str(caught.value)


def test_a_misspelled_layer_in_a_bits_file_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    bits = tmp_path / "bits.yaml"
    bits.write_text("bits:\n  model.layers.0.mlp.up_proj: 8\n  model.layers.9.mlp.up_proj: 8\n")
    with pytest.raises(UsageError, match=r"'bits\.model\.layers\.9\.mlp\.up_proj' names no weight of this model"):
        finetune(options(tiny_model_folder, tmp_path / "rows.jsonl", bits=str(bits)), tmp_path / "run")
