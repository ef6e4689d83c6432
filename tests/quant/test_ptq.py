"""Post-training quantization: the properties of each method's weights, of its outputs, and of the float model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from qat_edge.errors import DataError, ModelError, UsageError
from qat_edge.quant import fake, frozen, numerics
from qat_edge.quant.ptq import awq, coordinate_descent, gptaq, gptq, methods
from qat_edge.quant.ptq.activation_cache import ActivationCache
from qat_edge.quant.ptq.blockwise import Block, find_blocks, quantize_blocks, relative_error
from qat_edge.quant.ptq.hqq import hqq_scales, search_scales
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme

SPEC = WeightScheme(bits=4, group_size=32, quantize_input=True)
Batches = list[dict[str, Tensor]]


def load(folder: Path) -> tuple[Any, Scheme]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # norms of all ones would hide a wrong fold
        if parameter.dim() == 1:
            torch.manual_seed(len(name))
            parameter.data.copy_(0.5 + torch.rand_like(parameter))
    return model, choose_scheme(model, 32)


def batches(pad: int = 0) -> Batches:
    """Three batches of two rows, the second shorter, with `pad` more columns of padding than needed."""
    made = []
    for seed in range(3):
        ids = torch.randint(3, 250, (2, 40 + pad), generator=torch.Generator().manual_seed(seed))
        if pad:
            ids[:, :40] = batches()[seed]["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, 40:] = 0
        mask[1, 25:] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def correlated(tokens: int, width: int) -> Tensor:
    """Inputs near a plane of few dimensions, some channels much larger than others."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(tokens, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return (mixed + 0.1 * torch.randn(tokens, width, generator=generator)) * torch.linspace(0.1, 5, width)


def weight(out: int = 48, width: int = 128) -> Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(1))


# --- scales ------------------------------------------------------------------------------------------------


def test_searched_scales_are_never_worse_than_the_largest_weights() -> None:
    w, importance = weight(), torch.linspace(0.1, 5, 128)
    found = search_scales(w, 4, 32, importance)
    assert torch.equal(found, numerics.representable(found))

    def cost(scales: Tensor) -> Tensor:
        error = numerics.dequantize(numerics.quantize(w, scales, 4), scales) - w
        return (error.square() * importance).unflatten(-1, (-1, 32)).sum(-1)

    largest = numerics.choose_scales(w, 4, 32)
    assert bool((cost(found) <= cost(largest)).all())
    assert float(cost(found).sum()) < 0.95 * float(cost(largest).sum())


def test_hqq_scales_are_representable_and_have_less_error() -> None:
    w = weight()
    scales = hqq_scales(w, 4, 32)
    assert scales.shape == (48, 4) and torch.equal(scales, numerics.representable(scales))
    rounded = numerics.dequantize(numerics.quantize(w, scales, 4), scales)
    assert (rounded - w).square().sum() < (numerics.fake_quantize_weight(w, 4, 32) - w).square().sum()


# --- GPTQ --------------------------------------------------------------------------------------------------


def compensated(w: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    return gptq.compensate(w, hessian, gptq.inverse_factor(hessian, "layer"), SPEC)


def test_gptq_has_less_output_error_than_rounding_to_nearest() -> None:
    x, w = correlated(512, 128), weight()
    found, scales = compensated(w, x.T @ x)
    ours = numerics.dequantize(numerics.quantize(found, scales, 4), scales)
    same_scales = numerics.dequantize(numerics.quantize(w, scales, 4), scales)
    nearest = numerics.fake_quantize_weight(w, 4, 32)
    errors = [float((x @ (w - rounded).T).norm()) for rounded in (ours, same_scales, nearest)]
    assert errors[0] < 0.7 * errors[1] and errors[0] < 0.7 * errors[2]
    expected = (errors[0] / float((x @ w.T).norm())) ** 2
    assert relative_error(w, ours, x.T @ x) == pytest.approx(expected, rel=1e-3)


def test_gptq_with_uncorrelated_inputs_rounds_to_nearest() -> None:
    w = weight()
    found, scales = compensated(w, torch.eye(128))
    assert torch.equal(found, w)
    assert torch.equal(scales, search_scales(w, 4, 32, torch.ones(128)))


def test_rounding_the_weights_of_gptq_gives_its_codes() -> None:
    """The paper's recursion in float64 with a full inverse at each step, instead of one factorization."""
    x, w = correlated(512, 64), weight(8, 64)
    hessian = x.T @ x
    found, scales = compensated(w, hessian)
    damped = hessian.double() + gptq.DAMPING * hessian.double().diagonal().mean() * torch.eye(64)
    work, codes = w.double().clone(), torch.zeros(8, 64, dtype=torch.int8)
    for j in range(64):
        inverse = torch.linalg.inv(damped[j:, j:])
        scale = scales[:, j // 32 : j // 32 + 1]
        codes[:, j : j + 1] = numerics.quantize(work[:, j : j + 1].float(), scale, 4)
        error = work[:, j] - (codes[:, j] * scale[:, 0]).double()
        work[:, j:] -= torch.outer(error, inverse[0]) / inverse[0, 0]
    assert torch.equal(numerics.quantize(found, scales, 4), codes)


@pytest.mark.parametrize("hessian", [torch.zeros(64, 64), torch.full((64, 64), torch.nan)])
def test_inputs_that_do_not_determine_the_weights_are_an_error(hessian: Tensor) -> None:
    with pytest.raises(DataError, match=r"model\.layer.*calibration data"):
        gptq.inverse_factor(hessian, "model.layer")


def test_padding_changes_nothing(tiny_model_folder: Path) -> None:
    sums = []
    for pad in (0, 24):
        model, scheme = load(tiny_model_folder)
        found: dict[str, Tensor] = {}

        def collect(block: Block, found: dict[str, Tensor] = found) -> dict[str, Tensor]:
            found.update(gptq.accumulate_hessians(block, list(block.linears)))
            return {}

        with torch.no_grad():
            quantize_blocks(model, scheme, batches(pad), collect, "test")
        sums.append(found)
    assert len(sums[0]) == 14
    for name, plain in sums[0].items():
        # One int8 step of one input may differ: sums of products in another order round differently.
        torch.testing.assert_close(sums[1][name], plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


# --- AWQ ---------------------------------------------------------------------------------------------------


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **{**sizes, "num_key_value_heads": 4, **changes}))


def gemma() -> Gemma2ForCausalLM:
    """Norms that store weight - 1, and a scaled embedding."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "unscaled"),
    [
        (lambda: llama(attention_bias=True, mlp_bias=True), set()),
        (lambda: llama(num_key_value_heads=2), {"o_proj"}),  # v_proj is narrower than o_proj's input
        (gemma, {"o_proj"}),
    ],
)
def test_awq_leaves_the_float_model_as_it_was(make: Callable[[], Any], unscaled: set[str], messages: list[str]) -> None:
    model = make().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.1, 0.9)
        elif "down_proj" in name or "o_proj" in name:
            parameter.data.mul_(torch.logspace(-1, 1, parameter.shape[1]))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        methods.apply(model, choose_scheme(model, 32), "awq", batches())
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    changed = {n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"input_layernorm", "q_proj", "gate_proj", "up_proj", "down_proj"} <= changed
    kinds = {
        word for line in messages if "not scaled" in line for word in ("o_proj", "down_proj", "q_proj") if word in line
    }
    assert kinds == unscaled


def test_factors_of_awq_lower_the_error() -> None:
    x, w = correlated(256, 64), weight(32, 64)
    factors = awq.search_factors(x, [(w, SPEC)])
    assert float(factors.max()) > 1.2
    rounded = numerics.fake_quantize_activation(x / factors) @ numerics.fake_quantize_weight(w * factors, 4, 32).T
    plain = numerics.fake_quantize_activation(x) @ numerics.fake_quantize_weight(w, 4, 32).T
    assert (rounded - x @ w.T).norm() < 0.95 * (plain - x @ w.T).norm()


# --- GPTAQ -------------------------------------------------------------------------------------------------


def blocks_of(model: Any, scheme: Scheme) -> list[Block]:
    found: list[Block] = []
    quantize_blocks(model, scheme, batches(), lambda block: found.append(block) or {}, "test")
    return found


def test_each_block_gets_the_inputs_of_the_whole_model_and_runs_once_per_batch() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    floats: dict[int, list[Tensor]] = {}
    counted: list[int] = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: counted.append(1))

    def record(block: Block) -> dict[str, Tensor]:
        floats[block.index] = [batch.unrounded for batch in block.batches]
        before = len(counted)
        for batch in block.batches:
            batch.unrounded = block.run(batch, batch.unrounded)
        del counted[before:]
        return {}

    with torch.no_grad():
        quantize_blocks(model, choose_scheme(model, 32), batches(), record, "test")
        hook.remove()
        assert len(counted) == 3
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        for i, batch in enumerate(batches()):
            states = model(**batch, output_hidden_states=True).hidden_states
            for block, found in floats.items():
                torch.testing.assert_close(found[i], states[block])


def test_layers_that_end_a_block_or_add_to_the_stream_are_found(tiny_model_folder: Path) -> None:
    model, scheme = load(tiny_model_folder)
    with torch.no_grad():
        block = blocks_of(model, scheme)[1]
        ending = {name.rpartition(".")[2] for name in block.linears if block.is_output_layer(name)}
        adding = {name.rpartition(".")[2] for name in block.linears if block.adds_to_stream(name)}
    assert ending == {"down_proj"} and adding == {"o_proj", "down_proj"}


def test_a_layer_with_a_norm_after_it_is_no_output_layer() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        block = blocks_of(model, choose_scheme(model, 32))[0]
        assert not any(block.is_output_layer(name) for name in block.linears)


def test_gptaq_comes_closer_to_the_float_model_than_gptq(tiny_model_folder: Path) -> None:
    errors = {}
    for method in ("rtn", "gptq", "gptaq", "coordinate-descent"):
        model, scheme = load(tiny_model_folder)
        with torch.no_grad():
            expected = [model(**batch).logits for batch in batches()]
            frozen.freeze(model, scheme, methods.apply(model, scheme, method, batches()))
            found = [model(**batch).logits for batch in batches()]
        masks = [batch["attention_mask"].bool() for batch in batches()]
        errors[method] = sum(float((f - e)[m].square().sum()) for f, e, m in zip(found, expected, masks, strict=True))
    assert (
        errors["gptaq"] < 0.9 * errors["gptq"] < 0.9 * errors["rtn"]
        and errors["coordinate-descent"] < 0.95 * errors["gptaq"]
    )


@pytest.mark.parametrize("method", ["gptaq", "coordinate-descent"])
def test_int8_layers_compensate_for_the_layers_before_them(tiny_model_folder: Path, method: str) -> None:
    model, _ = load(tiny_model_folder)
    wide = {f"model.layers.{i}.{name}": 8 for i in (0, 1) for name in ("self_attn.v_proj", "mlp.down_proj")}
    scheme = choose_scheme(model, 32, wide)
    own = {name: model.get_submodule(name).weight.detach().clone() for name in wide}
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches()]
        scales = methods.apply(model, scheme, method, batches())
        errors = []
        for kept in ({}, own):
            candidate = copy.deepcopy(model)
            for name, weight in kept.items():
                candidate.get_submodule(name).weight.copy_(weight)
            frozen.freeze(candidate, scheme, {name: scale for name, scale in scales.items() if name not in wide})
            found = [candidate(**b).logits[b["attention_mask"].bool()] for b in batches()]
            wanted = [e[b["attention_mask"].bool()] for e, b in zip(expected, batches(), strict=True)]
            errors.append(sum(float((f - w).square().sum()) for f, w in zip(found, wanted, strict=True)))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("make", [llama, gemma])
def test_the_cache_changes_no_code_and_no_scale(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    found = []
    for mark in (ActivationCache.mark_finished, lambda self, names: self.finished.extend(names)):
        monkeypatch.setattr(ActivationCache, "mark_finished", mark)
        model = make().eval()
        with torch.no_grad():
            scales = methods.apply(model, choose_scheme(model, 32), "coordinate-descent", batches())
        found.append((scales, model.state_dict()))
    for cached, computed in zip(found[0], found[1], strict=True):
        assert cached.keys() == computed.keys()
        assert all(torch.equal(cached[name], computed[name]) for name in computed)


def test_no_block_rounds_an_input_whose_output_is_cached(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path
) -> None:
    model, scheme = load(tiny_model_folder)
    rounded: list[int] = []
    real = numerics.fake_quantize_activation
    monkeypatch.setattr(numerics, "fake_quantize_activation", lambda x: rounded.append(x.shape[-1]) or real(x))
    with torch.no_grad():
        methods.apply(model, scheme, "coordinate-descent", batches())
    # Each of four inputs is rounded to be summed, and once more when the layers that read it run with their codes.
    assert len(rounded) == 2 * 4 * 2 * len(batches())


def test_gptaq_aims_at_the_least_squares_weight() -> None:
    """One linear layer given other inputs than the float model's: the target is the ridge regression's solution."""
    torch.manual_seed(0)
    x, given, w = torch.randn(400, 64), torch.randn(400, 64), weight(16, 64)
    hessian = given.T @ given
    factor = gptq.inverse_factor(hessian, "layer", gptaq.TARGET_DAMPING)
    target = gptaq.least_squares(w, w @ (x - given).T @ given, factor)
    ridge = gptaq.TARGET_DAMPING * hessian.diagonal().mean()
    expected = w + torch.linalg.solve(hessian + ridge * torch.eye(64), given.T @ (x - given) @ w.T).T
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=1e-4)


# --- coordinate descent ------------------------------------------------------------------------------------


def refined(sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a target, its Hessian, and the weights and scales that `refine` finds from rounding to nearest."""
    torch.manual_seed(0)
    x, target = torch.randn(300, 64) @ torch.randn(64, 64), weight(16, 64)
    scales = numerics.choose_scales(target, 4, 32)
    found, scales = coordinate_descent.refine(target, x.T @ x, target, scales, SPEC, sweeps)
    return target, x.T @ x, found, scales


def cost(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum(dim=1)  # (out,)


def test_each_sweep_lowers_the_cost() -> None:
    costs = []
    for sweeps in (0, 1, 2, 4):
        target, hessian, found, scales = refined(sweeps)
        costs.append(cost(target - numerics.dequantize(numerics.quantize(found, scales, 4), scales), hessian))
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(costs))
    assert float(costs[-1].sum()) < 0.6 * float(costs[0].sum())


def test_no_single_code_or_scale_could_be_better_after_many_sweeps() -> None:
    target, hessian, found, scales = refined(50)
    codes = numerics.quantize(found, scales, 4).float()
    best = cost(target - numerics.dequantize(codes, scales), hessian)
    for column in range(64):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (other[:, column] + step).clamp(-8, 7)
            assert bool((cost(target - numerics.dequantize(other, scales), hessian) >= best * (1 - 1e-4)).all())
    for group in range(2):
        for factor in (1 - 2**-7, 1 + 2**-7):
            moved = scales.clone()
            moved[:, group] = numerics.representable(moved[:, group] * factor)
            assert bool((cost(target - numerics.dequantize(codes, moved), hessian) >= best * (1 - 1e-4)).all())


def test_weights_keep_their_codes_in_bfloat16() -> None:
    _, _, found, scales = refined(4)
    assert torch.equal(scales, numerics.representable(scales))
    stored = found.to(torch.bfloat16).float()
    assert torch.equal(numerics.quantize(stored, scales, 4), numerics.quantize(found, scales, 4))


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_scales_and_weights_freeze_to_a_model_that_runs(tiny_model_folder: Path, tmp_path: Path, method: str) -> None:
    model, scheme = load(tiny_model_folder)
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
    scales = methods.apply(model, scheme, method, batches())
    assert set(scales) == set(scheme.linears)
    for name, found in scales.items():
        out, width = model.get_submodule(name).weight.shape
        assert found.shape == (out, width // 32)
        assert found.dtype == torch.float32 and torch.equal(found, numerics.representable(found))
    codes = {n: numerics.quantize(model.get_submodule(n).weight, s, 4) for n, s in scales.items()}
    frozen.freeze(model, scheme, scales)
    model.save_pretrained(tmp_path / "quantized")
    read = frozen.read_weights(tmp_path / "quantized")
    assert all(torch.equal(read[name].codes, codes[name]) for name in codes)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.3


@pytest.mark.parametrize("method", CALIBRATED)
def test_adapters_of_zeros_change_nothing(tiny_model_folder: Path, method: str) -> None:
    plain, scheme = load(tiny_model_folder)
    wrapped, _ = load(tiny_model_folder)
    fake.insert(wrapped, scheme)
    fake.add_adapters(wrapped, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = methods.apply(plain, scheme, method, batches())
    found = methods.apply(wrapped, scheme, method, batches())
    for name in scheme.linears:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(wrapped.get_submodule(name).weight, plain.get_submodule(name).weight)


@pytest.mark.parametrize("method", CALIBRATED)
def test_hooks_and_modes_are_as_before(tiny_model_folder: Path, method: str) -> None:
    model, scheme = load(tiny_model_folder)
    model.train()
    methods.apply(model, scheme, method, batches())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_under_autocast_statistics_are_still_float32(tiny_model_folder: Path) -> None:
    model, scheme = load(tiny_model_folder)
    found: dict[str, Tensor] = {}

    def collect(block: Block) -> dict[str, Tensor]:
        found.update(gptq.accumulate_hessians(block, list(block.linears)))
        return {}

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        quantize_blocks(model, scheme, batches(), collect, "test")
        scales = methods.apply(model, scheme, "gptq", batches())
    assert {h.dtype for h in found.values()} == {torch.float32} == {s.dtype for s in scales.values()}


@pytest.mark.parametrize("method", CALIBRATED)
def test_autocast_uses_no_outdated_cast_of_a_weight(tiny_model_folder: Path, method: str) -> None:
    """Autocast caches the casts of trainable parameters: after a weight is rounded, its cast would be outdated."""
    found = []
    for trainable in (False, True):
        model, scheme = load(tiny_model_folder)
        model.requires_grad_(trainable)
        with torch.autocast("cpu", torch.bfloat16):
            scales = methods.apply(model, scheme, method, batches())
        found.append({**scales, **{name: model.get_submodule(name).weight.detach() for name in scheme.linears}})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_int8_layers_keep_the_scales_of_their_largest_weights(tiny_model_folder: Path) -> None:
    model, _ = load(tiny_model_folder)
    name = "model.layers.0.self_attn.k_proj"
    scheme = choose_scheme(model, 32, {name: 8})
    for method in PTQ_METHODS:
        scales = methods.apply(model, scheme, method, batches())
        assert torch.equal(scales[name], numerics.choose_scales(model.get_submodule(name).weight, 8, 64))


def test_unknown_methods_missing_data_and_models_without_blocks_are_errors(tiny_model_folder: Path) -> None:
    model, scheme = load(tiny_model_folder)
    with pytest.raises(UsageError, match="rtn, hqq, gptq, gptaq, coordinate-descent, awq"):
        methods.apply(model, scheme, "magic", [])
    with pytest.raises(DataError, match="No calibration data"):
        methods.apply(model, scheme, "gptq", [])
    flat = nn.ModuleDict({"layer": nn.Linear(32, 32)})
    with pytest.raises(ModelError, match="no list of blocks"):
        find_blocks(Scheme(32, False, "e", "h", {"layer": SPEC}), flat)
