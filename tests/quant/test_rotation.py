"""Rotated hidden states: the same function for every family that allows it, with less loss in rounded inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from conftest import fill_adapters
from qat_edge.errors import ModelError
from qat_edge.quant import fake, numerics, qat_init, rotated_norm, rotation
from qat_edge.quant.scheme import Scheme, choose_scheme, shares_table

SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ROTATABLE: dict[str, Callable[[], PretrainedConfig]] = {
    "one table": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "two tables": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "biases": lambda: Qwen2Config(**SIZES),
    "biases of layers that write": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "norms of queries and keys": lambda: Qwen3Config(**SIZES, head_dim=24),
    "fused projections": lambda: Phi3Config(**SIZES),
}
# A rotation of the hidden states cannot be folded into their weights, that of the values of attention can.
HEADS_ALONE: dict[str, Callable[[], PretrainedConfig]] = {
    "norms around the layers": lambda: Gemma3TextConfig(**SIZES, head_dim=24),
    "norms after the layers": lambda: Olmo2Config(**SIZES),
    "biases of the values": lambda: Glm4Config(**SIZES, head_dim=24, attention_bias=True),
    "norms that subtract the mean": lambda: StableLmConfig(**SIZES),
}
IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def make_model(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("width", [64, 96, 576, 30])
def test_the_rotation_is_orthogonal_and_spreads_every_channel(width: int) -> None:
    matrix = rotation.random_hadamard(width, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-12, rtol=0)
    even = width & -width
    assert matrix.abs().max() <= even**-0.5 + 1e-12
    assert not torch.equal(matrix, rotation.random_hadamard(width, 1))


@pytest.mark.parametrize("family", ROTATABLE)
def test_rotation_leaves_the_function_unchanged_with_adapters(family: str) -> None:
    model = make_model(ROTATABLE[family]())
    scheme = choose_scheme(model, 32)
    fake.insert(model, scheme)
    adapted = fake.add_adapters(model, LORA).eval()
    fill_adapters(adapted, 0.1)
    before = logits(adapted)
    weights = {name: model.get_submodule(name).weight.clone() for name in scheme.weights}
    rotation.rotate(adapted, scheme, 0)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-4)
    assert all((model.get_submodule(n).weight - w).abs().mean() > 0.05 for n, w in weights.items())
    assert shares_table(model) == scheme.tied == (family == "one table")
    first = model.get_parameter("model.layers.0.input_layernorm.weight")
    assert first.unique().numel() > 90 and 0 < (first - 1).abs().max() < 0.1
    others = [
        model.get_parameter(name) for name in ("model.layers.0.post_attention_layernorm.weight", "model.norm.weight")
    ]
    assert all(bool((weight == 1).all()) for weight in others)
    merged, _ = fake.merge_adapters(adapted)
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("difference", ["adapter", "bits"])
def test_a_shared_table_becomes_two_where_its_users_differ(difference: str) -> None:
    model = make_model(ROTATABLE["one table"]())
    scheme = choose_scheme(model, 32, table_bits=(4, 8) if difference == "bits" else (8, 8))
    fake.insert(model, scheme)
    if difference == "adapter":
        model = fake.add_adapters(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"])).eval()
    before = logits(model)
    rotation.rotate(model, scheme, 0)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert not rotated_norm.output_rotations(model) and not fake.base_of(model).config.tie_word_embeddings


def test_a_rotated_norm_stays_float32_under_autocast() -> None:
    norm = nn.RMSNorm(8)
    rotated_norm.rotate_output(norm, rotation.random_hadamard(8, 0))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(nn.functional.rms_norm(x, (8,)), rotated_norm.output_rotations(norm)[""])
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(norm(x), expected)
    rotated_norm.rotate_output(norm, torch.eye(8))
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (8,)))
    assert type(norm).__name__ == "RotatedRMSNorm"


@pytest.mark.parametrize("family", ROTATABLE)
def test_heads_are_found_where_a_layer_makes_values_alone(family: str) -> None:
    model = make_model(ROTATABLE[family]())
    heads = rotation.find_heads(model, choose_scheme(model, 32))
    if family == "fused projections":
        assert heads is None
    else:
        assert heads is not None and heads.width == 24
        assert [*heads.values.values()] == [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
        assert [*heads.outputs.values()] == [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]


def test_an_outlier_channel_of_the_values_is_spread_over_its_head() -> None:
    model = make_model(ROTATABLE["one table"]())
    scheme = choose_scheme(model, 32)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[5] *= 50
    given: dict[str, Tensor] = {}

    def prominence() -> list[float]:
        """Return the largest channel of each output projection's input over the median one of its head."""
        outputs = [(n, model.get_submodule(n)) for n in scheme.linears if n.endswith("o_proj")]
        hooks = [m.register_forward_pre_hook(lambda _, x, n=n: given.update({n: x[0]})) for n, m in outputs]
        logits(model)
        for hook in hooks:
            hook.remove()
        heads = [x.abs().mean(dim=(0, 1))[:24] for x in given.values()]
        return [float(head.max() / head.median()) for head in heads]

    before = prominence()
    rotation.rotate(model, scheme, 0)
    assert min(before) > 20 and max(prominence()) < 5


@pytest.mark.parametrize("family", HEADS_ALONE)
def test_values_of_attention_are_rotated_alone_where_the_hidden_states_cannot_be(family: str) -> None:
    model = make_model(HEADS_ALONE[family]())
    scheme = choose_scheme(model, 32)
    fake.insert(model, scheme)
    adapted = fake.add_adapters(model, LORA).eval()
    fill_adapters(adapted, 0.1)
    before, expected = {name: p.clone() for name, p in adapted.named_parameters()}, logits(adapted)
    found = rotation.rotate(adapted, scheme, 0)
    assert found.stream is None and found.obstacle and found.obstacle in found.describe()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)

    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(".v_proj." in name or ".o_proj." in name for name in changed)
    assert any(name.endswith("v_proj.base_layer.bias") for name in changed) == (family == "biases of the values")
    assert shares_table(model) == scheme.tied


def test_a_model_that_cannot_be_rotated_is_reported_and_left_unchanged() -> None:
    model = make_model(GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}))
    scheme = choose_scheme(model, 32)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ModelError, match="no root-mean-square norm"):
        rotation.rotate(model, scheme, 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_rotation_lowers_the_cost_of_an_outlier_channel_in_int8_inputs() -> None:
    model = make_model(ROTATABLE["one table"]())
    scheme = choose_scheme(model, 32)
    for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
        norm.weight[5] = 60.0
    model.model.embed_tokens.weight[:, 5] = 0.3

    reading = [n for n in scheme.linears if n.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))]

    def error() -> float:
        hooks = [model.get_submodule(n).register_forward_pre_hook(numerics.round_input) for n in reading]
        rounded = logits(model)
        for hook in hooks:
            hook.remove()
        return float((rounded - logits(model)).square().mean())

    before = error()
    rotation.rotate(model, scheme, 0)
    assert error() < before / 10


@pytest.mark.parametrize("family", ["hidden states", *HEADS_ALONE])
def test_a_rotated_initialization_is_restored_bit_for_bit(family: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    def prepared() -> tuple[Any, fake.Switch, Scheme]:
        if family in HEADS_ALONE:
            model = make_model(HEADS_ALONE[family]())
        else:
            model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        scheme = choose_scheme(model, 32)
        switch = fake.insert(model, scheme, learned_scales=True)
        torch.manual_seed(0)
        return fake.add_adapters(model, LORA).eval(), switch, scheme

    model, switch, scheme = prepared()
    float_logits = logits(model)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    made = qat_init.prepare(model, scheme, "gptq", [batch], rotation_seed=0)
    digest = made.save(tmp_path / "start", method="gptq")
    assert (f"{scheme.embedding}.weight" in made.changed) == (family == "hidden states")
    # Only the change by GPTQ; a wrong rotation changes the logits by more than their standard deviation.
    assert 0 < (logits(model) - float_logits).abs().mean() < 0.3 * float_logits.std()
    other, other_switch, _ = prepared()
    qat_init.QatInit.load(tmp_path / "start", digest).apply(other.get_base_model())
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    switch.enabled = other_switch.enabled = True
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=0)
