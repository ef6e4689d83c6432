"""Planted faults are detected and located; two correct implementations are never reported as different."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from conftest import make_model, make_tokenizer
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import fault_test
from qat_edge.diagnose.fault_test import Divergence
from qat_edge.evaluate import reference
from qat_edge.evaluate.results import FaultTest
from qat_edge.manifest import write_manifest
from qat_edge.quant import frozen, numerics, scheme

LINEAR = "model.layers.1.mlp.up_proj"
FIRST = "model.layers.0.self_attn.q_proj"
ATTENTION = "model.layers.0.self_attn.o_proj"  # the first layer that reads the result of attention
Implementation = Callable[[Any, list[int]], np.ndarray]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "quantized"
    model = make_model(make_tokenizer())
    chosen = scheme.choose_scheme(model, 32)
    frozen.freeze(model, chosen)
    model.save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(chosen))
    return folder


@pytest.fixture
def exact(quantized: Path) -> Any:
    return reference.load_exact(quantized)


def prompts(seed: int) -> list[ScoredIds]:
    text = np.random.default_rng(seed).integers(3, 250, 4000)
    short = fault_test.short_prompts([ScoredIds(text.tolist(), [])])
    assert len(short) == fault_test.PROMPTS and len({tuple(p.ids) for p in short}) == fault_test.PROMPTS
    return short


def whole(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def by_token(model: Any, ids: list[int], late: bool = False) -> np.ndarray:
    """Decode one token at a time. late: write to the cache one position late, so that position 0 stays empty."""
    cache: Any = DynamicCache(config=model.config)
    if late:
        update_on_time = cache.update

        def update(keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            shape = (keys.shape[0], keys.shape[1], 1, keys.shape[3])
            empty = [torch.zeros(shape)] * 2 if cache.get_seq_length(layer) == 0 else previous[layer]
            previous[layer] = [keys, values]
            return update_on_time(*empty, layer, *args, **kwargs)

        previous: dict[int, list[Any]] = {}
        cache.update = update
    rows = []
    with torch.no_grad():
        for position, token in enumerate(ids):
            step = {"past_key_values": cache, "use_cache": True, "position_ids": torch.tensor([[position]])}
            rows.append(model(torch.tensor([[token]]), **step).logits[0, -1].numpy())
    return np.stack(rows)


def both_ways(model: Any, ids: list[int], ahead: bool = False) -> np.ndarray:
    """Prefill the first tokens, decode the others one at a time. ahead: prefilled tokens see those after them."""
    cache, first = DynamicCache(config=model.config), ids[: fault_test.DECODED_FROM]
    mask = torch.zeros(1, 1, len(first), len(first)) if ahead else None
    with torch.no_grad():
        cached = {"past_key_values": cache, "use_cache": True}
        rows = [model(torch.tensor([first]), attention_mask=mask, **cached).logits[0]]
        rows += [model(torch.tensor([[token]]), **cached).logits[0] for token in ids[len(first) :]]
    return torch.cat(rows).numpy()


def reordered(model: Any, ids: list[int]) -> np.ndarray:
    """Compute every matrix product in two halves: the same function, summed in another order."""

    def halves(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        x, half = args[0], module.weight.shape[1] // 2
        return x[..., half:] @ module.weight[:, half:].T + x[..., :half] @ module.weight[:, :half].T

    hooks = [m.register_forward_hook(halves) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        return whole(model, ids)
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def doubled_scale(model: Any) -> Iterator[None]:
    weight = model.get_submodule(LINEAR).weight.data
    weight[5, 32:64] *= 2
    yield
    weight[5, 32:64] /= 2


@contextmanager
def rotary_angle(model: Any) -> Iterator[None]:
    frequencies = model.model.rotary_emb.inv_freq
    frequencies[1] *= 1.5
    yield
    frequencies[1] /= 1.5


@contextmanager
def truncated_scales(model: Any, quantized: Path) -> Iterator[None]:
    """Truncate, not round, one bit of the mantissa of bfloat16 scales."""
    weights = frozen.read_weights(quantized)
    linears = frozen.read_scheme(quantized).linears
    exact_weights = {name: model.get_submodule(name).weight.data for name in linears}
    for name in linears:
        scales = (weights[name].scales.float().view(torch.int32) & ~0x1FFFF).view(torch.float32)
        model.get_submodule(name).weight.data = numerics.dequantize(weights[name].codes, scales)
    yield
    for name, weight in exact_weights.items():
        model.get_submodule(name).weight.data = weight


def late(model: Any, ids: list[int]) -> np.ndarray:
    return by_token(model, ids, late=True)


def ahead(model: Any, ids: list[int]) -> np.ndarray:
    return both_ways(model, ids, ahead=True)


def run_test(model: Any, implementation: Implementation, fault: Any, seed: int) -> FaultTest:
    """Run the fault test on an implementation of the model, with a fault planted in it."""
    short = prompts(seed)
    expected = list(reference.compared_logits(model, short))
    noise = fault_test.noise_db(model, short, expected)
    with fault:
        found = [implementation(model, p.ids[:-1]) for p in short]
    return fault_test.compare_errors(fault_test.errors_db(expected, found), noise)


def planted(quantized: Path, model: Any) -> dict[str, tuple[Any, Implementation, Divergence]]:
    """Each fault with an implementation that shows it, and the expected first divergence."""
    return {
        "one group's scale doubled": (doubled_scale(model), whole, Divergence(LINEAR, at_input=False)),
        "one rotary angle off": (rotary_angle(model), whole, Divergence(ATTENTION, at_input=True)),
        "a cache written one position late": (nullcontext(), late, Divergence(ATTENTION, at_input=True)),
        "a mask that lets a prompt look ahead": (nullcontext(), ahead, Divergence(ATTENTION, at_input=True)),
        "scales truncated": (truncated_scales(model, quantized), whole, Divergence(FIRST, at_input=False)),
    }


def test_correct_implementations_are_never_flagged(exact: Any) -> None:
    runs = [(how, seed) for how in (by_token, both_ways, reordered) for seed in range(3)]
    alarms = [(how.__name__, seed) for how, seed in runs if run_test(exact, how, nullcontext(), seed).exceeds_noise]
    assert alarms == [], f"{len(alarms)} false alarms in {len(runs)} runs of {fault_test.PROMPTS} prompts"


def test_every_planted_fault_is_flagged(quantized: Path, exact: Any) -> None:
    results = {
        (name, seed): run_test(exact, planted(quantized, exact)[name][1], planted(quantized, exact)[name][0], seed)
        for name in planted(quantized, exact)
        for seed in range(2)
    }
    missed = {key: result.chance for key, result in results.items() if not result.exceeds_noise}
    assert missed == {}, f"{len(missed)} misses in {len(results)}"
    # Rotary embeddings do not change position 0: their fault shows later, a fault of the weights at once.
    assert results["one rotary angle off", 0].position != 0
    assert results["one group's scale doubled", 0].position == 0


def test_a_fault_is_located_at_the_first_layer_that_diverges(quantized: Path, exact: Any) -> None:
    ids, names = prompts(0)[0].ids, frozen.read_scheme(quantized).linears
    for fault, implementation, expected in planted(quantized, exact).values():
        with fault:
            candidate = fault_test.trace(exact, names, partial(implementation, exact, ids))
        assert fault_test.find_divergence(exact, [(ids, candidate)]) == expected
        assert expected.module in str(expected)


@pytest.mark.parametrize("implementation", [whole, by_token, both_ways, reordered])
def test_a_correct_implementation_diverges_nowhere(quantized: Path, exact: Any, implementation: Implementation) -> None:
    ids, names = prompts(0)[0].ids, frozen.read_scheme(quantized).linears
    candidate = fault_test.trace(exact, names, partial(implementation, exact, ids))
    assert fault_test.find_divergence(exact, [(ids, candidate)]) is None


def test_the_chance_is_mann_and_whitneys_u_over_the_number_of_pairs() -> None:
    noise = np.array([[-100.0, -50.0], [-50.0, -40.0]])
    assert fault_test.compare_errors(noise, noise).chance == 0.5, "a copy of the noise is no fault"
    # Ties with one and is smaller than the other; larger than one and smaller than the other.
    larger = fault_test.compare_errors(np.array([[-100.0, -45.0]]), noise)
    assert (larger.chance, larger.exceeds_noise) == (0.5, False)
    largest = fault_test.compare_errors(np.array([[-90.0, -30.0]]), noise)
    assert (largest.chance, largest.exceeds_noise, largest.position) == (1.0, True, 1)


def test_logits_that_are_all_zero_equal_themselves_only() -> None:
    nothing, something = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert fault_test.errors_db([nothing, nothing], [nothing, something]).tolist() == [[fault_test.EQUAL_DB], [0.0]]
