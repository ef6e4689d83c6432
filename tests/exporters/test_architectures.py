"""The table of architectures in the documentation: it is current, whole and without faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qat_edge.errors import ModelError
from qat_edge.models import load
from qat_edge.options import FinetuneOptions
from qat_edge.verbs.finetune import finetune
from qat_edge_exporters.huggingface import hf_support
from tools.sweep_architectures import (
    ARCHITECTURES,
    TARGETS,
    Outcome,
    make_config,
    refusals,
    save_model,
    sweep,
    write_table,
)

REFERENCE = Path(__file__).parents[2] / "docs/reference"
RESULTS: dict[str, dict[str, Any]] = json.loads((REFERENCE / "architectures.json").read_text(encoding="utf-8"))
# Whole lines that no other test takes: multipliers, norms with a bias, norms after the blocks, a head that transformers
# renames as it loads and saves.
WHOLE = ("granite", "nemotron", "olmo2", "gpt_neox")


def outcome(name: str, target: str) -> Outcome:
    return Outcome(**RESULTS[name][target])


def test_the_table_is_of_at_least_25_architectures_and_has_every_one() -> None:
    assert sorted(RESULTS) == sorted(ARCHITECTURES)
    assert len({name.partition(":")[0] for name in RESULTS}) >= 25


def test_every_architecture_is_exported_or_refused_before_training() -> None:
    faults = {(name, target) for name in RESULTS for target in TARGETS if outcome(name, target).fault}
    assert faults == set()
    for name in RESULTS:
        for target in TARGETS:
            assert bool(outcome(name, target).refusal) != (outcome(name, target).decibels is not None)


def test_the_page_shows_the_results(tmp_path: Path) -> None:
    write_table(RESULTS, tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == (REFERENCE / "architectures.md").read_text()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_refusals_of_the_table_are_those_of_the_code(name: str) -> None:
    found = refusals(make_config(name))
    expected = {target: found.get("training", found.get(target, "")) for target in TARGETS}
    assert {target: outcome(name, target).refusal for target in TARGETS} == expected


def test_a_model_that_no_target_can_express_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers runs any model, so a Hugging Face folder could hold this one.
    monkeypatch.setattr(hf_support, "missing", lambda config: "not here either.")
    save_model(make_config("bloom"), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say 1", "completion": "1!"}\n' * 4)
    options = FinetuneOptions(model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), steps=2)
    with pytest.raises(ModelError, match="no target can express, so it is not trained") as caught:
        finetune(options, tmp_path / "run")
    assert all(outcome("bloom", target).refusal in str(caught.value) for target in TARGETS)
    assert not (tmp_path / "run").exists()


def test_a_number_that_the_class_does_not_read_prevents_nothing() -> None:
    config = make_config("llama")
    config.embedding_multiplier, config.clip_qkv = 12.0, 2.0
    assert load.export_gaps(config) == {}


def test_rotary_embeddings_that_change_with_the_length_are_exported_up_to_the_positions_of_the_model() -> None:
    config = make_config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert load.export_gaps(config) == {}


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_line_of_an_architecture(name: str, tmp_path: Path) -> None:
    for target, found in sweep(name, tmp_path).items():
        assert found.fault == ""
        assert found.refusal == outcome(name, target).refusal
