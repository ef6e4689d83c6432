"""Options that exclude each other are refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions
from qat_edge.train.option_checks import check_combination, row_length

OPTIONS = FinetuneOptions(model="m", data="d", steps=100)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"ptq_init": "hqq", "scales": "absmax"}, ("--ptq-init hqq", "--scales absmax")),
        ({"distill_weight": 0.5}, ("--distill-weight", "--ptq-init coordinate-descent")),
        ({"distill_weight": 0.5, "qat_start": 0.0}, ("--distill-weight", "--qat-start 0")),
        ({"distill_top_k": 8}, ("--distill-top-k 8", "--distill-weight 0")),
        ({"rotate": "on", "ptq_init": "hqq"}, ("--rotate on", "--ptq-init hqq")),
        ({"rotate": "on", "method": "full"}, ("--rotate on", "--method full")),
        ({"distill_weight": 1.5}, ("--distill-weight 1.5",)),
        ({"prune": "first"}, ("--prune first", "--keep-layers")),
        ({"eval_rows": 4}, ("--eval-rows 4", "--eval-data")),
        ({"eval_every": 2, "eval_rows": 4}, ("--eval-every 2 and --eval-rows 4", "--eval-data")),
        ({"calibration_tokens": 64, "ptq_init": "hqq"}, ("--calibration-tokens 64", "--ptq-init hqq")),
        ({"calibration_tokens": 64, "ptq_init": "none"}, ("--calibration-tokens 64", "--ptq-init none")),
        ({"scale_learning_rate": 0.5, "scales": "fixed"}, ("--scale-learning-rate 0.5", "--scales fixed")),
        (
            {"scale_learning_rate": 0.0, "scales": "absmax", "ptq_init": "none"},
            ("--scale-learning-rate 0", "--scales absmax"),
        ),
        ({"codes": "fixed", "scale_learning_rate": 0.0}, ("--codes fixed", "--scale-learning-rate 0")),
        ({"qat_start": 1.5}, ("--qat-start 1.5", "whole number")),
        ({"distill_temperature": 2.0}, ("--distill-temperature 2", "--distill-weight 0")),
        ({"clip_gradients": "apart", "scales": "fixed"}, ("--clip-gradients apart", "--scales fixed")),
    ],
)
def test_options_that_exclude_each_other_are_named(changes: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        check_combination(replace(OPTIONS, **changes))
    assert all(name in str(caught.value) for name in names)


@pytest.mark.parametrize(
    "changes",
    [
        {"prune": "first", "keep_layers": 1},
        {"eval_every": 2, "eval_rows": 4, "eval_data": "e"},
        {"calibration_tokens": 64},
        {"codes": "fixed", "scale_learning_rate": 0.5},
        {"qat_start": 2.0},
        {"distill_temperature": 2.0, "distill_weight": 0.5, "distill_top_k": 8},
    ],
)
def test_options_that_act_together_are_taken(changes: dict[str, Any]) -> None:
    check_combination(replace(OPTIONS, **changes))


def test_rows_are_at_most_as_long_as_the_model_has_positions() -> None:
    config = LlamaConfig(max_position_embeddings=100)
    with pytest.raises(UsageError, match=r"--max-length 101: this model has 100 positions .* Give at most 100"):
        row_length(replace(OPTIONS, max_length=101), config)
    assert row_length(replace(OPTIONS, max_length=100), config) == 100
    assert row_length(OPTIONS, config) == 100, "the default follows the model"
    assert row_length(OPTIONS, LlamaConfig(max_position_embeddings=4096)) == 512
    assert row_length(replace(OPTIONS, max_length=2000), PretrainedConfig()) == 2000, "no limit is known"
