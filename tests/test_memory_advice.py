"""A training that runs out of memory: the message has `plan`'s figures, and options that need less."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import qat_edge
from qat_edge.cli import commands
from qat_edge.errors import ModelError
from qat_edge.options import FinetuneOptions
from qat_edge.train.trainer import QatTrainer
from qat_edge.verbs import memory_advice

TOO_MUCH = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB."


def options(model: Path, **changes: object) -> FinetuneOptions:
    values: dict[str, object] = {"batch_size": 4, "max_length": 64, "ptq_init": "hqq"}
    return FinetuneOptions(model=str(model), data=("-",), **(values | changes))  # type: ignore[arg-type]


def test_finetune_names_what_needs_the_memory_and_what_needs_less(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError(TOO_MUCH)

    monkeypatch.setattr(QatTrainer, "train", fail)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "one", "completion": "two"}) + "\n")
    flags = ["--model", str(tiny_model_folder), "--data", str(rows), "--out", str(tmp_path / "run"), "--steps", "4"]
    flags += ["--batch-size", "4", "--max-length", "64", "--ptq-init", "hqq", "--device", "cpu"]
    result = CliRunner().invoke(commands.main, ["finetune", *flags])

    shown = " ".join(result.stderr.split())
    assert result.exit_code == 1, shown
    assert "CUDA out of memory. Tried to allocate 2.00 GiB" in shown
    assert "Traceback" not in shown
    # The figures of `plan`.
    memory = qat_edge.plan(tiny_model_folder, batch_size=4, max_length=64, steps=4, ptq_init="hqq", device="cpu").memory
    assert f"it needs {memory.peak_bytes / 1e9:.2f} GB" in shown
    assert f"libraries {memory.libraries / 1e9:.2f}" in shown


def test_alternatives_need_less_and_are_three_at_the_most(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_advice, "LEAST_GAIN", 0.0)
    given = options(tiny_model_folder)
    memory = memory_advice.training_memory(given)
    found = list(memory_advice._alternatives(given, memory))
    assert set(found[0][0].changes) == {"batch_size", "gradient_accumulation"}
    assert 0 < len(found) <= 3
    assert all(needed.peak_bytes < memory.peak_bytes for _, needed in found)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"batch_size": 4, "gradient_accumulation": 3}, "--batch-size 2 --gradient-accumulation 6"),
        ({"batch_size": 3}, "--batch-size 1 --gradient-accumulation 3"),
        ({"batch_size": 1}, "--gradient-checkpointing"),
        ({"batch_size": 1, "gradient_checkpointing": True, "method": "full"}, "--method lora"),
        ({"batch_size": 1, "gradient_checkpointing": True, "base": "nf4"}, "--max-length 32"),
        ({"batch_size": 1, "gradient_checkpointing": True, "distill_weight": 0.5}, "--distill-top-k 64"),
    ],
)
def test_what_changes_the_training_least_comes_first(changes: dict[str, object], first: str) -> None:
    candidates = list(memory_advice._candidates(options(Path("model"), **changes)))
    assert memory_advice._flags(candidates[0].changes) == first


def test_without_a_plan_the_message_names_options_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: FinetuneOptions) -> None:
        raise ModelError("an encoder, and plan is for models that generate text.")

    monkeypatch.setattr(memory_advice, "training_memory", refuse)
    shown = memory_advice.explain(options(Path("model")), f"OutOfMemoryError: {TOO_MUCH}")
    assert "could not be counted: an encoder" in shown
    assert "--gradient-checkpointing" in shown


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(QatTrainer, "train", fail)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "one", "completion": "two"}) + "\n")
    with pytest.raises(RuntimeError, match="shapes do not match"):
        qat_edge.finetune(tiny_model_folder, rows, tmp_path / "run", steps=2, device="cpu", ptq_init="hqq")
