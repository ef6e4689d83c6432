"""The quantization scheme: bits and group size of every weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from qat_edge.errors import ModelError, UsageError
from qat_edge.quant.scheme import WeightScheme, choose_scheme

BERT = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64}


def model(hidden: int, intermediate: int, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def test_linears_get_int4_embedding_and_head_int8() -> None:
    scheme = choose_scheme(model(64, 128), 32)
    assert len(scheme.linears) == 14 and {w.bits for w in scheme.linears.values()} == {4}
    assert (scheme.embedding, scheme.head) == ("model.embed_tokens", "lm_head")
    assert scheme.weights[scheme.embedding] == WeightScheme(8, 64, quantize_input=False)
    assert scheme.weights[scheme.head] == WeightScheme(8, 64, quantize_input=True)
    assert scheme.exceptions == {} and scheme.tied
    assert scheme.summary() == "14 int4 (group 32), 2 int8 (per channel)"


def test_an_untied_model_is_recognized() -> None:
    assert not choose_scheme(model(64, 128, tied=False), 32).tied


def test_a_width_that_the_group_size_does_not_divide_gets_a_smaller_one() -> None:
    scheme = choose_scheme(model(64, 128), 128)
    down = scheme.weights["model.layers.0.mlp.down_proj"]
    up = scheme.weights["model.layers.0.mlp.up_proj"]
    assert (down.bits, down.group_size, down.reason) == (4, 128, "")
    assert (up.bits, up.group_size) == (4, 64)
    assert up.reason == "width 64 is no multiple of 128: int4 in groups of 64 instead"
    assert set(scheme.exceptions) == {n for n in scheme.linears if "down_proj" not in n}


def test_a_width_that_no_group_size_divides_gets_int8() -> None:
    scheme = choose_scheme(model(64, 80), 32)
    down = scheme.weights["model.layers.1.mlp.down_proj"]
    assert (down.bits, down.group_size) == (8, 80)
    assert "int8 per channel instead" in down.reason


UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"


def test_bits_by_name_override_the_default() -> None:
    scheme = choose_scheme(model(64, 128), 32, {UP: 8, DOWN: 4, "lm_head": 8})
    assert scheme.weights[UP] == WeightScheme(8, 64, quantize_input=True)
    assert scheme.weights[DOWN] == WeightScheme(4, 32, quantize_input=True)
    assert scheme.exceptions == {}
    assert scheme.summary() == "13 int4 (group 32), 3 int8 (per channel)"
    assert choose_scheme(model(64, 128), 32, {}) == choose_scheme(model(64, 128), 32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("table_bits", [(8, 8), (4, 8), (8, 4), (4, 4)])
def test_embedding_and_head_get_their_own_bits(tied: bool, table_bits: tuple[int, int]) -> None:
    scheme = choose_scheme(model(64, 128, tied), 32, {"lm_head": 8, UP: 8}, table_bits)
    groups = [32 if bits == 4 else 64 for bits in table_bits]
    assert scheme.table_bits == table_bits
    assert scheme.weights[scheme.embedding] == WeightScheme(table_bits[0], groups[0], quantize_input=False)
    assert scheme.weights[scheme.head] == WeightScheme(table_bits[1], groups[1], quantize_input=True)
    assert scheme.linears == choose_scheme(model(64, 128), 32, {UP: 8}).linears
    assert scheme.tied == (tied and table_bits[0] == table_bits[1])  # with two widths, both are stored


def test_embedding_and_head_are_described() -> None:
    assert choose_scheme(model(64, 128), 32).describe_tables() == "embedding and head share a table: int8 (per channel)"
    apart = choose_scheme(model(64, 128), 32, table_bits=(4, 8)).describe_tables()
    assert apart == "embedding int4 (group 32), head int8 (per channel)"


def test_a_table_that_no_group_size_divides_gets_int8() -> None:
    scheme = choose_scheme(model(72, 128), 64, table_bits=(4, 4))
    assert scheme.table_bits == (8, 8) and scheme.tied
    assert "width 72" in scheme.exceptions["lm_head"] and "width 72" in scheme.exceptions["model.embed_tokens"]


def test_every_linear_layer_can_be_int8() -> None:
    every = dict.fromkeys(choose_scheme(model(64, 128), 32).linears, 8)
    assert choose_scheme(model(64, 128), 32, every).summary() == "16 int8 (per channel)"


def test_bits_that_a_width_does_not_allow_are_an_exception_with_a_reason() -> None:
    scheme = choose_scheme(model(64, 80), 32, {DOWN: 4})
    assert scheme.weights[DOWN].bits == 8 and "width 80" in scheme.exceptions[DOWN]
    scheme = choose_scheme(model(64, 80), 32, {DOWN: 8})
    assert DOWN not in scheme.exceptions


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"model.layers.0.mlp.up_prj": 8}, rf"'bits.model.layers.0.mlp.up_prj' names no weight .*Nearest: {UP}"),
        ({"model.layers.0.input_layernorm": 8}, r"'bits.model.layers.0.input_layernorm' names no weight"),
        ({"?": 8}, r"'bits.\?' names no weight of this model. Its weights are named like model.embed_tokens"),
        ({UP: 5}, rf"'bits.{UP}' is 5; a weight can have 2, 4 or 8 bits"),
        ({"lm_head": 4}, r"'bits.lm_head' is 4, and only finetune --head-bits 4 sets it"),
        ({"model.embed_tokens": 4}, r"'bits.model.embed_tokens' is 4, and only finetune --embedding-bits 4 sets it"),
    ],
)
def test_impossible_bits_are_refused_by_name(bits: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_scheme(model(64, 128), 32, bits)


def test_a_group_size_that_divides_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--group-size 128 divides no layer .*widths \[48, 80\]"):
        choose_scheme(model(48, 80), 128)


def test_a_model_without_a_head_is_an_error() -> None:
    headless = model(64, 128).model
    with pytest.raises(ModelError, match="LlamaModel: no token embedding and linear output head"):
        choose_scheme(headless, 32)


def classifier() -> BertForSequenceClassification:
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(**BERT))


def test_an_encoder_has_several_tables_and_its_head_at_eight_bits() -> None:
    scheme = choose_scheme(classifier(), 32)
    assert scheme.embeddings == [f"bert.embeddings.{n}_embeddings" for n in ("word", "position", "token_type")]
    assert scheme.heads == ["bert.pooler.dense", "classifier"] and scheme.head == "classifier"
    assert {scheme.weights[name].bits for name in (*scheme.embeddings, *scheme.heads)} == {8}
    assert set(scheme.exceptions) == set(scheme.heads) and not scheme.tied
    assert len(scheme.linears) == 6 and {w.bits for w in scheme.linears.values()} == {4}
    assert set(scheme.weights) == {*scheme.embeddings, *scheme.heads, *scheme.linears}


def test_an_encoder_without_a_head_ends_with_its_blocks() -> None:
    bert: Any = classifier().bert
    bert.pooler = None
    scheme = choose_scheme(bert, 32, table_bits=(4, 8))
    assert scheme.head == "" and scheme.heads == [] and len(scheme.linears) == 6
    assert [scheme.weights[name].bits for name in scheme.embeddings] == [4, 8, 8] and scheme.table_bits == (4, 8)


@pytest.mark.parametrize(
    ("bits", "table_bits", "message"),
    [
        ({}, (8, 4), "--head-bits 4: BertForSequenceClassification is an encoder, whose head stays at 8 bits"),
        ({"bert.pooler.dense": 4}, (8, 8), "'bits.bert.pooler.dense' is 4; this part of an encoder stays at 8 bits"),
    ],
)
def test_an_encoders_head_in_four_bits_is_refused(
    bits: dict[str, int], table_bits: tuple[int, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_scheme(classifier(), 32, bits, table_bits)


def test_an_encoder_without_an_embedding_is_an_error() -> None:
    model: Any = classifier()
    model.get_input_embeddings = lambda: nn.Linear(2, 2)
    with pytest.raises(ModelError, match="BertForSequenceClassification: no token embedding"):
        choose_scheme(model, 32)
