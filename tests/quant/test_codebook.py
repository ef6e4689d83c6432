"""Codes of 2 bits: levels, scales, gradients, and every PTQ method with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import write_manifest
from qat_edge.quant import fake, frozen, numerics
from qat_edge.quant.codebook import INTEGER, SEQ, codebook_of
from qat_edge.quant.ptq import methods
from qat_edge.quant.ptq.gptq import relative_error
from qat_edge.quant.ptq.hqq import hqq_scales, search_scales
from qat_edge.quant.ptq.method_names import PTQ_METHODS
from qat_edge.quant.scheme import LinearCodes, WeightScheme, choose_scheme

LEVELS = {SEQ: (-1.5, -0.5, 0.5, 1.5), INTEGER: (-2.0, -1.0, 0.0, 1.0)}
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def weights(rows: int = 24, width: int = 128) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def error(weight: Tensor, scales: Tensor, levels: str) -> float:
    codebook = codebook_of(2, levels)
    return float((numerics.dequantize(numerics.quantize(weight, scales, codebook), scales) - weight).square().mean())


@pytest.mark.parametrize("levels", LEVELS)
def test_each_weight_gets_the_nearest_level(levels: str) -> None:
    weight, codebook = weights(), codebook_of(2, levels)
    scales = numerics.choose_scales(weight, codebook, 32)
    found = numerics.fake_quantize_weight(weight, codebook, 32, scales)
    # A code of `seq` levels is two of the stored scale's units: the scale of its levels is twice the stored one.
    distance = scales.repeat_interleave(32, dim=1) * codebook.step
    grid = torch.tensor(LEVELS[levels]) * distance.unsqueeze(-1)
    nearest = grid.gather(-1, (grid - weight.unsqueeze(-1)).abs().argmin(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(found, nearest, rtol=0, atol=0)
    assert set(numerics.quantize(weight, scales, codebook).unique().tolist()) == set(
        range(codebook.low, codebook.high + 1, codebook.step)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_more_than_two_bits_have_all_signed_integers(bits: int) -> None:
    weight = weights()
    scales = numerics.largest_scales(weight, bits, 32)
    assert codebook_of(bits, SEQ) == codebook_of(bits)
    assert torch.equal(numerics.choose_scales(weight, bits, 32), scales)
    plain = (weight.unflatten(-1, (-1, 32)) * (1 / scales).unsqueeze(-1)).round()
    expected = plain.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(-2).to(torch.int8)
    assert torch.equal(numerics.quantize(weight, scales, bits), expected)


@pytest.mark.parametrize("levels", LEVELS)
def test_searched_scales_lose_less_than_those_of_the_largest_weights_and_refitted_ones_less_still(levels: str) -> None:
    weight, codebook = weights(), codebook_of(2, levels)
    largest, chosen, fitted = (
        error(weight, choose(weight, codebook, 32), levels)
        for choose in (numerics.largest_scales, numerics.choose_scales, hqq_scales)
    )
    # Four equidistant levels around 0 lose 0.1188 of a normal distribution at best, and less where scales fit groups.
    most = {SEQ: 0.1188, INTEGER: 0.15}[levels]
    assert fitted < chosen < most < 0.9 * largest


@pytest.mark.parametrize("levels", LEVELS)
def test_a_weight_on_its_levels_is_exact(levels: str) -> None:
    steps = torch.tensor(LEVELS[levels])[torch.randint(0, 4, (8, 64), generator=torch.Generator().manual_seed(1))]
    steps[:, ::32] = LEVELS[levels][0]  # of the largest size, from which the search starts
    codebook, scale = codebook_of(2, levels), 0.125 / codebook_of(2, levels).step
    codes = numerics.quantize(steps * 0.125, torch.full((8, 2), scale), codebook)
    assert torch.equal(numerics.dequantize(codes, torch.full((8, 2), scale)), steps * 0.125)


def test_a_group_of_zeros_stays_next_to_zero() -> None:
    for levels in LEVELS:
        found = numerics.fake_quantize_weight(torch.zeros(2, 64), codebook_of(2, levels), 32)
        assert float(found.abs().max()) < 1e-6


def test_important_columns_decide_the_scale() -> None:
    weight, codebook = weights(8, 32), codebook_of(2, SEQ)
    importance = torch.ones(32)
    importance[5] = 1e6
    scales = search_scales(weight, codebook, 32, importance)
    plain = numerics.choose_scales(weight, codebook, 32)
    lost = [
        (numerics.fake_quantize_weight(weight, codebook, 32, s) - weight)[:, 5].abs().mean() for s in (scales, plain)
    ]
    assert lost[0] < lost[1]


def test_the_gradient_of_half_steps_is_that_of_learned_step_sizes() -> None:
    codebook, scales = codebook_of(2, SEQ), torch.full((1, 1), 0.5)
    weight = torch.tensor([[0.1, 0.9, -1.2, 4.0]])  # ratios 0.2, 1.8, -2.4, and 8, which is clamped
    codes = numerics.round_codes(weight, scales, codebook)
    assert codes.tolist() == [[1.0, 1.0, -3.0, 3.0]]
    grad, grad_scales = numerics.straight_through(weight, scales, codes, torch.ones(1, 4), codebook.step)
    assert grad.tolist() == [[1.0, 1.0, 1.0, 0.0]]
    torch.testing.assert_close(grad_scales, torch.tensor([[0.8 - 0.8 - 0.6 + 3.0]]))


def tiny_model() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return model


def calibration() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 288, (4, 40), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("method", PTQ_METHODS)
def test_every_method_chooses_codes_of_two_bits(method: str, levels: str) -> None:
    """Two, four and eight bits under one input: each layer gets the codes of its own width."""
    model = tiny_model()
    scheme = choose_scheme(model, 32, {K: 4, V: 8}, default=LinearCodes(2, levels))
    scales = methods.apply(model, scheme, method, calibration())
    frozen.freeze(model, scheme, scales)
    for name, spec in scheme.linears.items():
        codes = model.get_submodule(name).weight.qdata
        codebook = spec.codebook
        assert set(codes.unique().tolist()) <= set(range(codebook.low, codebook.high + 1, codebook.step)), name
    assert len(model.get_submodule(Q).weight.qdata.unique()) == 4
    assert 8 < len(model.get_submodule(K).weight.qdata.unique()) <= 16
    assert len(model.get_submodule(V).weight.qdata.unique()) > 16


def test_compensating_methods_beat_rounding_to_nearest_at_two_bits() -> None:
    """The errors of outputs of the first block, on its own inputs."""
    inputs: list[Tensor] = []
    plain = tiny_model()
    plain.get_submodule(Q).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        plain(**calibration()[0])
    hessian, weight = inputs[0].T @ inputs[0], plain.get_submodule(Q).weight.detach()
    errors = {}
    for method in ("rtn", "gptq", "coordinate-descent"):
        model = tiny_model()
        scheme = choose_scheme(model, 32, default=LinearCodes(2, SEQ))
        scales = methods.apply(model, scheme, method, calibration())[Q]
        rounded = numerics.fake_quantize_weight(
            model.get_submodule(Q).weight.detach(), scheme.weights[Q].codebook, 32, scales
        )
        errors[method] = relative_error(weight, rounded, hessian)
    assert errors["coordinate-descent"] < errors["gptq"] < errors["rtn"]


@pytest.mark.parametrize("levels", LEVELS)
def test_a_checkpoint_gives_back_its_codes_and_runs_in_plain_transformers(levels: str, tmp_path: Path) -> None:
    model = tiny_model()
    scheme = choose_scheme(model, 32, {K: 4, V: 8}, default=LinearCodes(2, levels))
    frozen.freeze(model, scheme)
    model.save_pretrained(tmp_path)
    weights_of = frozen.read_weights(tmp_path)
    assert {name: (w.bits, w.levels) for name, w in weights_of.items()} == {
        name: (spec.bits, spec.levels) for name, spec in scheme.weights.items()
    }
    assert torch.equal(weights_of[Q].codes, model.get_submodule(Q).weight.qdata)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = (one(calibration()[0]["input_ids"]).logits for one in (model, loaded))
    assert torch.equal(expected, found)


@pytest.mark.parametrize("levels", LEVELS)
def test_the_manifest_gives_back_the_scheme_and_names_levels_of_two_bits_only(levels: str) -> None:
    scheme = choose_scheme(tiny_model(), 32, {K: 4, V: 8}, default=LinearCodes(2, levels))
    named = {name for name, weight in frozen.scheme_metadata(scheme)["weights"].items() if "levels" in weight}
    assert named == ({name for name, spec in scheme.linears.items() if spec.bits == 2} if levels == SEQ else set())
    assert "int2 (group 32, " + levels in scheme.summary()


def test_training_rounds_to_the_levels_and_learns_their_scales() -> None:
    model = tiny_model()
    scheme = choose_scheme(model, 32, default=LinearCodes(2, SEQ))
    switch = fake.insert(model, scheme, learned_scales=True)
    fake.train_weights(model)
    fake.set_scales(model, methods.apply(model, scheme, "hqq", []))
    switch.enabled = True
    model(**calibration()[0], labels=calibration()[0]["input_ids"]).loss.backward()
    layer = fake.linear(model, Q)
    assert layer.scale_factor is not None and layer.scale_factor.grad is not None
    assert float(layer.scale_factor.grad.abs().sum()) > 0
    # The forward pass is the frozen one.
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    codebook, scales = scheme.weights[Q].codebook, numerics.representable(layer.trained_scales)
    rounded = numerics.fake_quantize_weight(layer.weight, codebook, 32, scales)
    torch.testing.assert_close(layer(x), numerics.fake_quantize_activation(x) @ rounded.T)


@pytest.mark.parametrize(
    ("bits", "group_size", "message"),
    [
        ({"model.embed_tokens": 2}, 32, "'bits.model.embed_tokens' is 2; embedding and head have 8 or 4 bits"),
        ({"lm_head": 2}, 32, "'bits.lm_head' is 2; embedding and head have 8 or 4 bits"),
        ({"model.layers.0.mlp.down_proj": 2}, 32, "is 2, which needs groups of 32, 64, 128, .* its width of 80"),
        ({}, 128, "--group-size 128 divides no layer"),
    ],
)
def test_what_two_bits_cannot_have_is_refused_by_name(bits: dict[str, int], group_size: int, message: str) -> None:
    model = AutoModelForCausalLM.from_config(llama(intermediate_size=80))
    with pytest.raises(UsageError, match=message):
        choose_scheme(model, group_size, bits, default=LinearCodes(2, SEQ))


def test_a_layer_that_no_group_divides_gets_int8_with_the_reason() -> None:
    model = AutoModelForCausalLM.from_config(llama(intermediate_size=80))
    found = choose_scheme(model, 64, default=LinearCodes(2, SEQ)).weights["model.layers.0.mlp.down_proj"]
    assert found == WeightScheme(8, 80, True, "width 80 is no multiple of 64: int8 per channel instead")


def test_an_encoder_cannot_have_two_bits() -> None:
    config = BertConfig(
        vocab_size=288, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    bert = AutoModelForSequenceClassification.from_config(config)
    layer = "bert.encoder.layer.1.output.dense"
    for bits, default in (({}, LinearCodes(2, SEQ)), ({layer: 2}, LinearCodes())):
        with pytest.raises(UsageError, match="in 2 bits: BertForSequenceClassification is an encoder"):
            choose_scheme(bert, 32, bits, default=default)


@pytest.mark.parametrize("entries", [{"weight_bits": 3}, {"weight_levels": "odd"}])
def test_a_manifest_with_other_codes_is_damaged(entries: dict[str, Any]) -> None:
    assert LinearCodes.of_training({}) == LinearCodes(4, SEQ)
    with pytest.raises(RunError, match="The manifest of the adapter is damaged"):
        LinearCodes.of_training(entries)


def test_levels_that_nobody_knows_make_a_checkpoint_damaged(tmp_path: Path) -> None:
    metadata = frozen.scheme_metadata(choose_scheme(tiny_model(), 32, default=LinearCodes(2, SEQ)))
    write_manifest(tmp_path, "quantized", scheme=metadata)
    assert frozen.read_scheme(tmp_path).widths == {2, 8}
    metadata["weights"][Q]["levels"] = "odd"
    write_manifest(tmp_path, "quantized", scheme=metadata)
    with pytest.raises(RunError, match=r"its scheme cannot be read .levels odd"):
        frozen.read_scheme(tmp_path)
