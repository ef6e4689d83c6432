"""Planted faults are told from rounding and found, and two correct implementations never are told apart."""

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
from qat_edge.diagnose.fault_test import Parting
from qat_edge.evaluate import reference
from qat_edge.evaluate.results import Judgement
from qat_edge.quant import frozen, numerics, scheme
from qat_edge.run import write_manifest

LINEAR = "model.layers.1.mlp.up_proj"
FIRST = "model.layers.0.self_attn.q_proj"
ATTENTION = "model.layers.0.self_attn.o_proj"  # what reads attention's result first
Implementation = Callable[[Any, list[int]], np.ndarray]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "quantized"
    model = make_model(make_tokenizer())
    plan = scheme.choose(model, 32)
    frozen.freeze(model, plan)
    model.save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_facts(plan))
    return folder


@pytest.fixture
def exact(quantized: Path) -> Any:
    return reference.load_exact(quantized)


def prompts(seed: int) -> list[ScoredIds]:
    text = np.random.default_rng(seed).integers(3, 250, 4000)
    found = fault_test.probes([ScoredIds(text.tolist(), [])])
    assert len(found) == fault_test.PROMPTS and len({tuple(p.ids) for p in found}) == fault_test.PROMPTS
    return found


def whole(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def by_token(model: Any, ids: list[int], late: bool = False) -> np.ndarray:
    """Decoded one at a time. late: what the cache gets, it gets one position late, and position 0 stays empty."""
    cache: Any = DynamicCache(config=model.config)
    if late:
        plain = cache.update

        def update(keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            shape = (keys.shape[0], keys.shape[1], 1, keys.shape[3])
            empty = [torch.zeros(shape)] * 2 if cache.get_seq_length(layer) == 0 else held[layer]
            held[layer] = [keys, values]
            return plain(*empty, layer, *args, **kwargs)

        held: dict[int, list[Any]] = {}
        cache.update = update
    rows = []
    with torch.no_grad():
        for place, token in enumerate(ids):
            step = {"past_key_values": cache, "use_cache": True, "position_ids": torch.tensor([[place]])}
            rows.append(model(torch.tensor([[token]]), **step).logits[0, -1].numpy())
    return np.stack(rows)


def both_ways(model: Any, ids: list[int], ahead: bool = False) -> np.ndarray:
    """The first tokens at once, the others one at a time. ahead: those read at once see what follows them."""
    cache, first = DynamicCache(config=model.config), ids[: fault_test.DECODED_FROM]
    mask = torch.zeros(1, 1, len(first), len(first)) if ahead else None
    with torch.no_grad():
        asked = {"past_key_values": cache, "use_cache": True}
        rows = [model(torch.tensor([first]), attention_mask=mask, **asked).logits[0]]
        rows += [model(torch.tensor([[token]]), **asked).logits[0] for token in ids[len(first) :]]
    return torch.cat(rows).numpy()


def reordered(model: Any, ids: list[int]) -> np.ndarray:
    """Every matrix product in two halves: other sums, the same function."""

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
    """One bit of the mantissa less than bfloat16 has, cut off and not rounded."""
    weights = frozen.read_weights(quantized)
    linears = frozen.read_scheme(quantized).linears
    kept = {name: model.get_submodule(name).weight.data for name in linears}
    for name in linears:
        scales = (weights[name].scales.float().view(torch.int32) & ~0x1FFFF).view(torch.float32)
        model.get_submodule(name).weight.data = numerics.dequantize(weights[name].codes, scales)
    yield
    for name, weight in kept.items():
        model.get_submodule(name).weight.data = weight


def late(model: Any, ids: list[int]) -> np.ndarray:
    return by_token(model, ids, late=True)


def ahead(model: Any, ids: list[int]) -> np.ndarray:
    return both_ways(model, ids, ahead=True)


def judged(model: Any, implementation: Implementation, fault: Any, seed: int) -> Judgement:
    asked = prompts(seed)
    expected = list(reference.rows(model, asked))
    floor = fault_test.noise(model, asked, expected)
    with fault:
        return fault_test.judge(fault_test.errors(expected, [implementation(model, p.ids[:-1]) for p in asked]), floor)


def planted(quantized: Path, model: Any) -> dict[str, tuple[Any, Implementation, Parting]]:
    """Each fault with an implementation to show it in, and the place at which the two part."""
    return {
        "one group's scale doubled": (doubled_scale(model), whole, Parting(LINEAR, at_input=False)),
        "one rotary angle off": (rotary_angle(model), whole, Parting(ATTENTION, at_input=True)),
        "a cache written one position late": (nullcontext(), late, Parting(ATTENTION, at_input=True)),
        "a mask that lets a prompt look ahead": (nullcontext(), ahead, Parting(ATTENTION, at_input=True)),
        "scales truncated": (truncated_scales(model, quantized), whole, Parting(FIRST, at_input=False)),
    }


def test_correct_implementations_are_never_flagged(exact: Any) -> None:
    runs = [(how, seed) for how in (by_token, both_ways, reordered) for seed in range(3)]
    alarms = [(how.__name__, seed) for how, seed in runs if judged(exact, how, nullcontext(), seed).beyond]
    assert alarms == [], f"{len(alarms)} false alarms in {len(runs)} runs of {fault_test.PROMPTS} prompts"


def test_every_planted_fault_is_flagged(quantized: Path, exact: Any) -> None:
    found = {
        (name, seed): judged(exact, planted(quantized, exact)[name][1], planted(quantized, exact)[name][0], seed)
        for name in planted(quantized, exact)
        for seed in range(2)
    }
    missed = {key: one.chance for key, one in found.items() if not one.beyond}
    assert missed == {}, f"{len(missed)} misses in {len(found)}"
    # Position 0 has nothing to turn: a rotary fault shows later, a fault of the weights at once.
    assert found["one rotary angle off", 0].position != 0
    assert found["one group's scale doubled", 0].position == 0


def test_a_fault_is_named_with_the_first_layer_at_which_outputs_part(quantized: Path, exact: Any) -> None:
    ids, names = prompts(0)[0].ids, frozen.read_scheme(quantized).linears
    for fault, implementation, place in planted(quantized, exact).values():
        with fault:
            candidate = fault_test.trace(exact, names, partial(implementation, exact, ids))
        assert fault_test.first_parting(exact, [(ids, candidate)]) == place
        assert place.module in str(place)


@pytest.mark.parametrize("implementation", [whole, by_token, both_ways, reordered])
def test_a_correct_implementation_parts_nowhere(quantized: Path, exact: Any, implementation: Implementation) -> None:
    ids, names = prompts(0)[0].ids, frozen.read_scheme(quantized).linears
    candidate = fault_test.trace(exact, names, partial(implementation, exact, ids))
    assert fault_test.first_parting(exact, [(ids, candidate)]) is None


def test_the_chance_is_that_of_mann_and_whitney() -> None:
    floor = np.array([[-100.0, -50.0], [-50.0, -40.0]])
    assert fault_test.judge(floor, floor).chance == 0.5, "a copy of the noise is no fault"
    worse = fault_test.judge(np.array([[-100.0, -45.0]]), floor)  # ties with one and loses to one; wins and loses
    assert (worse.chance, worse.beyond) == (0.5, False)
    worst = fault_test.judge(np.array([[-90.0, -30.0]]), floor)
    assert (worst.chance, worst.beyond, worst.position) == (1.0, True, 1)


def test_logits_that_are_all_zero_are_equal_to_themselves_only() -> None:
    nothing, something = np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32)
    assert fault_test.errors([nothing, nothing], [nothing, something]).tolist() == [[fault_test.EQUAL_DB], [0.0]]
