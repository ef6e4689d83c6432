"""Sizes of a model: what exporters store once counts once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qat_edge.quant.bit_allocation import (
    Cost,
    LayerCost,
    Sensitivity,
    frontier,
    weight_bytes,
    within_budget,
    within_kl,
)

VOCABULARY, WIDTH, GROUP = 288, 64, 32
TABLE = weight_bytes(VOCABULARY, WIDTH, 8, WIDTH)
FLOAT_BYTES = 1000
LINEAR = {bits: weight_bytes(WIDTH, WIDTH, bits, GROUP) for bits in (4, 8)}


def measured(tied: bool) -> Sensitivity:
    """One linear layer between an embedding and a head, in the order of the model's modules."""
    table = LayerCost(None, "embed_tokens", (VOCABULARY, WIDTH), {8: Cost(0.001, TABLE)})
    linear = LayerCost(0, "q_proj", (WIDTH, WIDTH), {4: Cost(0.4, LINEAR[4]), 8: Cost(0.1, LINEAR[8])})
    weights = {
        "model.embed_tokens": table,
        "model.layers.0.q_proj": linear,
        "lm_head": replace(table, kind="lm_head"),
    }
    return Sensitivity("tiny", 9, 9, 1, 0, GROUP, tied, FLOAT_BYTES, 1.0, {4: 0.4, 8: 0.1}, weights)


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_a_table_that_embedding_and_head_share_counts_once(tied: bool, tables: int) -> None:
    found = measured(tied)
    for bits in (4, 8):
        assert found.size_bytes(bits) == tables * TABLE + LINEAR[bits] + FLOAT_BYTES
    assert [size for size, _ in frontier(found.costs, FLOAT_BYTES)] == [found.size_bytes(4), found.size_bytes(8)]


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_limit_is_met_exactly(tied: bool) -> None:
    found = measured(tied)
    for bits in (4, 8):
        choice = within_budget(found.costs, FLOAT_BYTES, found.size_bytes(bits) / 1e6)
        assert choice.bits["model.layers.0.q_proj"] == bits and choice.size_bytes == found.size_bytes(bits)


def test_a_shared_table_still_costs_kl_in_both_places() -> None:
    assert measured(True).predicted(8) == pytest.approx(0.1 + 2 * 0.001)
    assert measured(True).weights["lm_head"].costs[8].size_bytes == TABLE


def test_a_projection_outside_the_layers_is_no_shared_table() -> None:
    """As in models whose embedding is narrower than their hidden states."""
    found = measured(True)
    narrow = replace(found.weights["lm_head"], shape=(WIDTH, VOCABULARY))
    other = replace(found, weights={**found.weights, "lm_head": narrow})
    assert other.size_bytes(8) == 2 * TABLE + LINEAR[8] + FLOAT_BYTES


def three_widths() -> dict[str, dict[int, Cost]]:
    """One layer that gains most by each step, and one for which 4 bits are not worth stopping at."""
    return {
        "steady": {2: Cost(0.9, 100), 4: Cost(0.2, 200), 8: Cost(0.1, 400)},
        "late": {2: Cost(0.8, 100), 4: Cost(0.75, 200), 8: Cost(0.1, 400)},
    }


def test_three_widths_are_climbed_by_the_steepest_step_first() -> None:
    # Saved per byte: steady 2 -> 4 .0070, late 2 -> 8 .0023, steady 4 -> 8 .0005.
    points = frontier(three_widths(), 0)
    assert [size for size, _ in points] == [200, 300, 600, 800]
    assert [kl for _, kl in points] == pytest.approx([1.7, 1.0, 0.3, 0.2])
    chosen = [within_budget(three_widths(), 0, size / 1e6).bits for size in (200, 300, 500, 600, 800)]
    assert [(c["steady"], c["late"]) for c in chosen] == [(2, 2), (4, 2), (8, 2), (4, 8), (8, 8)]
    assert within_kl(three_widths(), 0, 0.31).bits == {"steady": 4, "late": 8}


def test_a_smaller_step_is_taken_where_a_larger_one_does_not_fit() -> None:
    costs = {"only": {2: Cost(0.9, 100), 4: Cost(0.2, 200), 8: Cost(0.1, 400)}}
    assert within_budget(costs, 0, 399e-6).bits == {"only": 4}


def test_two_bits_take_a_quarter_of_a_byte_and_a_float_scale() -> None:
    assert weight_bytes(64, 128, 2, 32, scale_bytes=4) == 64 * (128 // 4 + 4 * 4)
