"""Training on rows that are read as they are needed: it resumes bit for bit, and goes on after a bad row is mended."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from conftest import make_tokenizer, plain_rows, short_training
from qat_edge.data import streamed_rows
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.manifest import file_entry, read_manifest
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.run import Run
from qat_edge.train import checkpoints
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize

STEPS = 14  # of 4 rows each: one pass over 36 rows, and a half


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FinetuneOptions:
    monkeypatch.setattr(streamed_rows, "BLOCK_ROWS", 10)
    return short_training(
        tiny_model_folder, tmp_path, plain_rows(36), steps=STEPS, lora_dropout=0.1, save_every=1, eval_rows=4,
        calibration_tokens=64, streaming=True,
    )  # fmt: skip


def training_losses(run: Run) -> list[float]:
    return [row["loss"] for row in json.loads((run.path / "training.json").read_text())["curve"] if "loss" in row]


def weights(run: Run) -> dict[str, str]:
    return {p.name: file_entry(p)["sha256"] for p in run.adapter.glob("*.safetensors")}


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_resumes_bit_for_bit(
    options: FinetuneOptions, tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "KEPT", STEPS)
    options = replace(options, packing=packing, max_length=48, gradient_accumulation=2)
    whole = Run(tmp_path / "whole")
    finetune(options, whole.path)
    expected = training_losses(whole)

    # In the first block, at the end of a pass, and in the second pass; before and after the start of QAT.
    for step in (1, 9, 12):
        run = Run(Path(shutil.copytree(whole.path, tmp_path / f"from-{step}")))
        shutil.rmtree(run.adapter)
        for later in range(step + 1, STEPS + 1):
            shutil.rmtree(run.checkpoints / f"checkpoint-{later}")
        finetune(options, run.path, resume=True)
        assert training_losses(run) == expected and weights(run) == weights(whole)


def test_training_goes_on_after_a_row_is_mended(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    whole, run, file = Run(tmp_path / "whole"), Run(tmp_path / "run"), tmp_path / "train.jsonl"
    finetune(options, whole.path)
    good = file.read_text()
    lines = good.splitlines(keepends=True)
    options = replace(options, save_every=100)

    # Line 24 is in the third block, whose rows come after 5 steps of 4 rows.
    file.write_text("".join([*lines[:23], '{"prompt": "say\n', *lines[24:]]))
    with pytest.raises(DataError, match=r"train\.jsonl:24: not JSON"):
        finetune(options, run.path)
    assert "To continue: qat-edge finetune --resume" in messages[-1]
    assert [path.name for path in checkpoints.found(run.checkpoints)] == ["checkpoint-5"]

    file.write_text(good)
    finetune(replace(options, save_every=100), run.path, resume=True)
    assert training_losses(run) == training_losses(whole) and weights(run) == weights(whole)


def test_rows_that_are_trained_on_stay_as_they_are(options: FinetuneOptions, tmp_path: Path) -> None:
    run, file = Run(tmp_path / "run"), tmp_path / "train.jsonl"
    finetune(options, run.path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / f"checkpoint-{STEPS}")
    good = file.read_text()
    file.write_text(good.replace("it is 12", "it was 12"))
    with pytest.raises(RunError, match=r"train\.jsonl has other rows than when the run read them"):
        finetune(options, run.path, resume=True)

    file.write_text(good)
    (run.checkpoints / f"checkpoint-{STEPS - 1}" / streamed_rows.POSITION_FILE).unlink()
    finetune(options, run.path, resume=True)  # from the checkpoint before, which is whole
    assert run.adapter.is_dir()


def test_the_report_has_what_was_read(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    run = Run(tmp_path / "run")
    finetune(replace(options, packing=True, max_length=48), run.path)
    shown = "\n".join(messages)
    assert "train, the first 10 rows: 10 rows, " in shown and "of QAT: 56 sequences of a stream" in shown
    assert "train: 10 rows packed into " in shown and "train: 36 rows read, some of them " in shown
    # Rows that all commands know are not known of a stream.
    assert "rows_sha256" not in read_manifest(run.reference)["data"]


def test_other_commands_take_the_first_block(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    run = Run(tmp_path / "run")
    finetune(options, run.path)
    quantize(run, QuantizeOptions(method="gptq", calibration_tokens=64))
    assert any("is streamed: the first 10 rows stand for all of it" in message for message in messages)


def test_what_needs_all_rows_is_refused(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--distill-top-k 8 and --streaming: the teacher would have to be run on all"):
        finetune(replace(options, distill_weight=0.5, distill_top_k=8), tmp_path / "run")
    untrained = replace(options, steps=0, qat_start=None, lora_dropout=0.0, save_every=50, eval_rows=128)
    with pytest.raises(UsageError, match="--streaming and --steps 0"):
        finetune(replace(untrained, batch_size=8, lora_rank=16, track=("tensorboard",)), tmp_path / "run")

    sizes = {"vocab_size": 288, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    make_tokenizer().save_pretrained(tmp_path / "encoder")
    with pytest.raises(UsageError, match="--streaming is for models that generate text"):
        finetune(replace(options, model=str(tmp_path / "encoder")), tmp_path / "run")
