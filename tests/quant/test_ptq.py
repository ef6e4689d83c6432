"""Codes found without training: what each method promises of weights, outputs and the float model."""

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
from qat_edge.quant import fake, frozen, numerics, scheme
from qat_edge.quant.ptq import awq, coordinate_descent, gptaq, gptq, methods
from qat_edge.quant.ptq.activation_cache import Replay
from qat_edge.quant.ptq.blockwise import Block, find_blocks, relative_error, walk
from qat_edge.quant.ptq.hqq import search_scales
from qat_edge.quant.scheme import Scheme, WeightScheme
from qat_edge.run import PTQ_METHODS

SPEC = WeightScheme(bits=4, group_size=32, quantize_input=True)
Batches = list[dict[str, Tensor]]


def silent(text: str) -> None:
    pass


def load(folder: Path) -> tuple[Any, Scheme]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():  # norms that are all one would hide a wrong fold
        if parameter.dim() == 1:
            torch.manual_seed(len(name))
            parameter.data.copy_(0.5 + torch.rand_like(parameter))
    return model, scheme.choose(model, 32)


def batches(pad: int = 0) -> Batches:
    """Three batches of two rows, the second shorter, `pad` more columns of padding than needed."""
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
    """Inputs that lie near a plane of few dimensions, some channels much larger than others."""
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


def test_hqq_scales_are_representable_and_of_less_error() -> None:
    w = weight()
    scales = methods.hqq_scales(w, 4, 32)
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


def test_rounding_what_gptq_leaves_gives_its_codes() -> None:
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
def test_inputs_that_determine_nothing_are_an_error(hessian: Tensor) -> None:
    with pytest.raises(DataError, match=r"model\.layer.*calibration data"):
        gptq.inverse_factor(hessian, "model.layer")


def test_padding_changes_nothing(tiny_model_folder: Path) -> None:
    sums = []
    for pad in (0, 24):
        model, plan = load(tiny_model_folder)
        found: dict[str, Tensor] = {}

        def treat(block: Block, found: dict[str, Tensor] = found) -> dict[str, Tensor]:
            found.update(gptq.accumulate(block, list(block.linears)))
            return {}

        with torch.no_grad():
            walk(model, plan, batches(pad), treat, "test")
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
        methods.apply(model, scheme.choose(model, 32), "awq", batches())
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
    changed = {n.split(".")[-2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {"input_layernorm", "q_proj", "gate_proj", "up_proj", "down_proj"} <= changed
    kinds = {
        word for line in messages if "not scaled" in line for word in ("o_proj", "down_proj", "q_proj") if word in line
    }
    assert kinds == unscaled


def test_awq_searches_what_lowers_the_error() -> None:
    x, w = correlated(256, 64), weight(32, 64)
    factors = awq.search_factors(x, [(w, SPEC)])
    assert float(factors.max()) > 1.2
    rounded = numerics.fake_quantize_activation(x / factors) @ numerics.fake_quantize_weight(w * factors, 4, 32).T
    plain = numerics.fake_quantize_activation(x) @ numerics.fake_quantize_weight(w, 4, 32).T
    assert (rounded - x @ w.T).norm() < 0.95 * (plain - x @ w.T).norm()


# --- GPTAQ -------------------------------------------------------------------------------------------------


def blocks_of(model: Any, plan: Scheme) -> list[Block]:
    found: list[Block] = []
    walk(model, plan, batches(), lambda block: found.append(block) or {}, "test")
    return found


def test_each_block_is_given_what_the_model_gives_it_and_run_once_a_batch() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    floats: dict[int, list[Tensor]] = {}
    counted: list[int] = []
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: counted.append(1))

    def follow(block: Block) -> dict[str, Tensor]:
        floats[block.index] = [batch.unrounded for batch in block.batches]
        before = len(counted)
        for batch in block.batches:
            batch.unrounded = block.run(batch, batch.unrounded)
        del counted[before:]
        return {}

    with torch.no_grad():
        walk(model, scheme.choose(model, 32), batches(), follow, "test")
        hook.remove()
        assert len(counted) == 3
        assert all("forward" not in vars(layer) for layer in model.model.layers)
        for i, batch in enumerate(batches()):
            states = model(**batch, output_hidden_states=True).hidden_states
            for block, found in floats.items():
                torch.testing.assert_close(found[i], states[block])


def test_only_what_ends_a_block_is_seen_to_end_it(tiny_model_folder: Path) -> None:
    model, plan = load(tiny_model_folder)
    with torch.no_grad():
        block = blocks_of(model, plan)[1]
        ending = {name.rpartition(".")[2] for name in block.linears if block.ends_with(name)}
        adding = {name.rpartition(".")[2] for name in block.linears if block.adds_to_stream(name)}
    assert ending == {"down_proj"} and adding == {"o_proj", "down_proj"}


def test_a_norm_after_the_last_layer_forbids_to_correct_all_of_it() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    with torch.no_grad():
        block = blocks_of(model, scheme.choose(model, 32))[0]
        assert not any(block.ends_with(name) for name in block.linears)


def test_gptaq_comes_closer_to_the_float_model_than_gptq(tiny_model_folder: Path) -> None:
    errors = {}
    for method in ("rtn", "gptq", "gptaq", "coordinate-descent"):
        model, plan = load(tiny_model_folder)
        with torch.no_grad():
            expected = [model(**batch).logits for batch in batches()]
            frozen.freeze(model, plan, methods.apply(model, plan, method, batches()))
            found = [model(**batch).logits for batch in batches()]
        masks = [batch["attention_mask"].bool() for batch in batches()]
        errors[method] = sum(float((f - e)[m].square().sum()) for f, e, m in zip(found, expected, masks, strict=True))
    assert (
        errors["gptaq"] < 0.9 * errors["gptq"] < 0.9 * errors["rtn"]
        and errors["coordinate-descent"] < 0.95 * errors["gptaq"]
    )


@pytest.mark.parametrize("method", ["gptaq", "coordinate-descent"])
def test_int8_layers_make_up_for_what_lies_before_them(tiny_model_folder: Path, method: str) -> None:
    model, _ = load(tiny_model_folder)
    wide = {f"model.layers.{i}.{name}": 8 for i in (0, 1) for name in ("self_attn.v_proj", "mlp.down_proj")}
    plan = scheme.choose(model, 32, wide)
    own = {name: model.get_submodule(name).weight.detach().clone() for name in wide}
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches()]
        scales = methods.apply(model, plan, method, batches())
        errors = []
        for kept in ({}, own):
            judged = copy.deepcopy(model)
            for name, weight in kept.items():
                judged.get_submodule(name).weight.copy_(weight)
            frozen.freeze(judged, plan, {name: scale for name, scale in scales.items() if name not in wide})
            found = [judged(**b).logits[b["attention_mask"].bool()] for b in batches()]
            wanted = [e[b["attention_mask"].bool()] for e, b in zip(expected, batches(), strict=True)]
            errors.append(sum(float((f - w).square().sum()) for f, w in zip(found, wanted, strict=True)))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("make", [llama, gemma])
def test_codes_and_scales_are_those_of_passes_that_compute_everything(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    found = []
    for finish in (Replay.finish, lambda self, names: self.finished.extend(names)):
        monkeypatch.setattr(Replay, "finish", finish)
        model = make().eval()
        with torch.no_grad():
            scales = methods.apply(model, scheme.choose(model, 32), "coordinate-descent", batches())
        found.append((scales, model.state_dict()))
    for replayed, computed in zip(found[0], found[1], strict=True):
        assert replayed.keys() == computed.keys()
        assert all(torch.equal(replayed[name], computed[name]) for name in computed)


def test_gptaq_aims_at_the_least_squares_weight() -> None:
    """One linear layer given other inputs than the float model's: the target is numpy's least-squares answer."""
    torch.manual_seed(0)
    x, given, w = torch.randn(400, 64), torch.randn(400, 64), weight(16, 64)
    hessian = given.T @ given
    factor = gptq.inverse_factor(hessian, "layer", gptaq.TARGET_DAMPING)
    target = gptaq.least_squares(w, w @ (x - given).T @ given, factor)
    ridge = gptaq.TARGET_DAMPING * hessian.diagonal().mean()
    expected = w + torch.linalg.solve(hessian + ridge * torch.eye(64), given.T @ (x - given) @ w.T).T
    torch.testing.assert_close(target, expected, rtol=1e-3, atol=1e-4)


# --- coordinate descent ------------------------------------------------------------------------------------


def descended(sweeps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A target, its Hessian, and what `refine` makes of the target rounded to nearest."""
    torch.manual_seed(0)
    x, target = torch.randn(300, 64) @ torch.randn(64, 64), weight(16, 64)
    scales = numerics.choose_scales(target, 4, 32)
    found, scales = coordinate_descent.refine(target, x.T @ x, target, scales, SPEC, sweeps)
    return target, x.T @ x, found, scales


def cost(error: Tensor, hessian: Tensor) -> Tensor:
    return ((error @ hessian) * error).sum(dim=1)  # (out,)


def test_each_sweep_costs_less() -> None:
    costs = []
    for sweeps in (0, 1, 2, 4):
        target, hessian, found, scales = descended(sweeps)
        costs.append(cost(target - numerics.dequantize(numerics.quantize(found, scales, 4), scales), hessian))
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(costs))
    assert float(costs[-1].sum()) < 0.6 * float(costs[0].sum())


def test_no_single_code_or_scale_could_be_better_after_many_sweeps() -> None:
    target, hessian, found, scales = descended(50)
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
    _, _, found, scales = descended(4)
    assert torch.equal(scales, numerics.representable(scales))
    stored = found.to(torch.bfloat16).float()
    assert torch.equal(numerics.quantize(stored, scales, 4), numerics.quantize(found, scales, 4))


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_scales_and_weights_freeze_to_a_model_that_runs(tiny_model_folder: Path, tmp_path: Path, method: str) -> None:
    model, plan = load(tiny_model_folder)
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
    scales = methods.apply(model, plan, method, batches())
    assert set(scales) == set(plan.linears)
    for name, found in scales.items():
        out, width = model.get_submodule(name).weight.shape
        assert found.shape == (out, width // 32)
        assert found.dtype == torch.float32 and torch.equal(found, numerics.representable(found))
    codes = {n: numerics.quantize(model.get_submodule(n).weight, s, 4) for n, s in scales.items()}
    frozen.freeze(model, plan, scales)
    model.save_pretrained(tmp_path / "quantized")
    read = frozen.read_weights(tmp_path / "quantized")
    assert all(torch.equal(read[name].codes, codes[name]) for name in codes)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")(ids).logits
    assert float((logits - expected).norm() / expected.norm()) < 0.3


@pytest.mark.parametrize("method", methods.CALIBRATED)
def test_adapters_that_add_nothing_change_nothing(tiny_model_folder: Path, method: str) -> None:
    plain, plan = load(tiny_model_folder)
    wrapped, _ = load(tiny_model_folder)
    fake.insert(wrapped, plan)
    fake.add_adapters(wrapped, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = methods.apply(plain, plan, method, batches())
    found = methods.apply(wrapped, plan, method, batches())
    for name in plan.linears:
        assert torch.equal(found[name], expected[name])
        assert torch.equal(wrapped.get_submodule(name).weight, plain.get_submodule(name).weight)


@pytest.mark.parametrize("method", methods.CALIBRATED)
def test_hooks_and_modes_are_as_before(tiny_model_folder: Path, method: str) -> None:
    model, plan = load(tiny_model_folder)
    model.train()
    methods.apply(model, plan, method, batches())
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_under_autocast_statistics_are_still_float32(tiny_model_folder: Path) -> None:
    model, plan = load(tiny_model_folder)
    found: dict[str, Tensor] = {}

    def treat(block: Block) -> dict[str, Tensor]:
        found.update(gptq.accumulate(block, list(block.linears)))
        return {}

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        walk(model, plan, batches(), treat, "test")
        scales = methods.apply(model, plan, "gptq", batches())
    assert {h.dtype for h in found.values()} == {torch.float32} == {s.dtype for s in scales.values()}


@pytest.mark.parametrize("method", methods.CALIBRATED)
def test_autocast_sees_every_change_of_a_weight(tiny_model_folder: Path, method: str) -> None:
    """Autocast keeps the casts of parameters that may be trained; a weight rounded in between would go unseen."""
    found = []
    for trainable in (False, True):
        model, plan = load(tiny_model_folder)
        model.requires_grad_(trainable)
        with torch.autocast("cpu", torch.bfloat16):
            scales = methods.apply(model, plan, method, batches())
        found.append({**scales, **{name: model.get_submodule(name).weight.detach() for name in plan.linears}})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_int8_layers_keep_the_scales_of_their_largest_weights(tiny_model_folder: Path) -> None:
    model, _ = load(tiny_model_folder)
    name = "model.layers.0.self_attn.k_proj"
    plan = scheme.choose(model, 32, {name: 8})
    for method in PTQ_METHODS:
        scales = methods.apply(model, plan, method, batches())
        assert torch.equal(scales[name], numerics.choose_scales(model.get_submodule(name).weight, 8, 64))


def test_what_cannot_be_is_said(tiny_model_folder: Path) -> None:
    model, plan = load(tiny_model_folder)
    with pytest.raises(UsageError, match="rtn, hqq, gptq, gptaq, coordinate-descent, awq"):
        methods.apply(model, plan, "magic", [])
    with pytest.raises(DataError, match="No calibration data"):
        methods.apply(model, plan, "gptq", [])
    flat = nn.ModuleDict({"layer": nn.Linear(32, 32)})
    with pytest.raises(ModelError, match="no list of blocks"):
        find_blocks(Scheme(32, False, "e", "h", {"layer": SPEC}), flat)
