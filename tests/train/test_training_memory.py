"""Predicted memory of training steps, compared with the tensors of real trainings of tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import short_training
from qat_edge.models.outline import read_outline
from qat_edge.options import FinetuneOptions
from qat_edge.quant import scheme
from qat_edge.quant.ptq.method_names import CALIBRATED
from qat_edge.train.live_bytes import LiveBytes
from qat_edge.train.rotated_outline import find_outcome
from qat_edge.train.training_memory import count_training
from qat_edge.verbs.finetune import finetune

LENGTH = 64
# Rows that are all cut to the greatest length, but one, whose padding makes a mask.
LONG = [{"prompt": f"say {i} ", "completion": "a b c d e f g h " * 10} for i in range(16)]
VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {},
    "bfloat16": {"precision": "bf16"},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation": 2},
    "without rotation": {"rotate": "off"},
    "tables apart": {"head_bits": 4},
    "all weights": {"method": "full", "lora_rank": 16},
    "int8 base": {"base": "int8", "ptq_init": "hqq"},
    "nf4 base": {"base": "nf4", "ptq_init": "hqq"},
    "teacher": {"distill_weight": 0.5, "ptq_init": "hqq"},
    "likely tokens of a teacher": {"distill_weight": 0.5, "distill_top_k": 8},
    "rounded base": {"base": "bf16", "ptq_init": "hqq"},
    "wide base": {"base": "fp32"},
    "scales alone": {"weight_bits": 2},
    "scales of the largest weights": {"scales": "absmax", "ptq_init": "none"},
}


def predicted(options: FinetuneOptions, is_narrow: bool = False) -> int:
    """Return the predicted peak of all tensors."""

    def choose(model: Any) -> scheme.Scheme:
        tables = (options.embedding_bits, options.head_bits)
        return scheme.choose_scheme(model, 32, {}, tables, scheme.LinearCodes(options.weight_bits))

    model = read_outline(options.model).model
    outcome = find_outcome(model, options, choose)
    return count_training(model, choose(model), options, LENGTH, options.precision, outcome, is_narrow).peak


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_peak_of_a_training_is_predicted_within_10_percent(
    variant: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    options = short_training(
        tiny_model_folder, tmp_path, LONG, steps=4,
        **{"precision": "fp32", "max_length": LENGTH, "lora_rank": 16, **VARIANTS[variant]},
    )  # fmt: skip
    if options.ptq_init in CALIBRATED:
        options = dataclasses.replace(options, calibration_tokens=len(LONG) * LENGTH)
    with LiveBytes() as live:
        finetune(options, tmp_path / "run")
    assert predicted(options) == pytest.approx(live.peak_bytes, rel=0.1)


def test_a_checkpoint_in_bfloat16_takes_half_of_the_memory_for_its_weights(tiny_model_folder: Path) -> None:
    options = FinetuneOptions(model=str(tiny_model_folder), data="-", ptq_init="hqq", precision="fp32", qat_start=0.5)
    model = read_outline(options.model).model
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert predicted(options) - predicted(options, is_narrow=True) == pytest.approx(2 * weights, rel=0.1)
