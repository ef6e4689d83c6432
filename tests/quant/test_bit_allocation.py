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
