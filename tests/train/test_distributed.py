"""Two processes train what one does: losses, codes and checkpoints, in both phases."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from conftest import make_tokenizer, plain_rows, short_training
from qat_edge.options import FinetuneOptions
from qat_edge.verbs.finetune import finetune
from tests.train.distributed_program import begin_at, start

# 21 rows in batches of 4 leave one row for the last batch, so that one of two processes has none.
ROWS = 21
# Sums in another order change losses and norms by 2e-7 at most. In longer trainings, inputs and weights are rounded to
# the next code here and there.
SAME = 2e-6
AT_ONCE, LABELS, SCORES = "no phase 1", "a classifier", "a sentence encoder"
KINDS: dict[str, dict[str, Any]] = {
    "learned scales": {"save_every": 2, "calibration_tokens": 256},
    AT_ONCE: {"qat_start": 0, "steps": 2, "calibration_tokens": 256},
    "scales that follow the weights": {"ptq_init": "none", "scales": "absmax", "gradient_accumulation": 2},
    "packed rows and a cached teacher": {"packing": True, "max_length": 64, "distill_weight": 0.5, "distill_top_k": 8},
    "a stream and a live teacher": {
        "streaming": True, "ptq_init": "hqq", "distill_weight": 0.5, "gradient_checkpointing": True
    },
    "fixed codes, clipped apart": {"ptq_init": "hqq", "codes": "fixed", "clip_gradients": "apart"},
    "all weights": {"method": "full", "ptq_init": "none", "lora_rank": FinetuneOptions.lora_rank},
    "a base in NF4": {"base": "nf4", "ptq_init": "hqq"},
    LABELS: {},
    SCORES: {},
}  # fmt: skip
DIVERGING = {
    "steps": 16, "qat_start": 4, "ptq_init": "hqq", "scale_learning_rate": 10.0, "warmup_steps": 0,
    "lr_schedule": "constant",
}  # fmt: skip
DROPOUT = {"lora_dropout": 0.1, "save_every": 2, "calibration_tokens": 256}


class Trained(NamedTuple):
    """Folders of the runs of one process and of two."""

    one: Path
    two: Path


def curve(run: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run / "training.json").read_text())["curve"]
    return rows


def assert_same_curve(run: Path, expected: Path) -> None:
    """Compare the losses of training and evaluation, and the norms of gradients, of all steps."""
    found, known = curve(run), curve(expected)
    assert [(row["step"], row["phase"], *row) for row in found] == [(row["step"], row["phase"], *row) for row in known]
    for row, other in zip(found, known, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in other:
                assert row[name] == pytest.approx(other[name], rel=SAME), (name, row, other)


def tensors(run: Path, part: str) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted((run / part).glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, folder: Path) -> FinetuneOptions:
    return short_training(
        tiny_model_folder, folder, plain_rows(ROWS), steps=6, eval_rows=6, eval_every=2,
        device="cpu", precision="fp32", track=("none",),
    )  # fmt: skip


def encoder_options(kind: str, options: FinetuneOptions, folder: Path) -> FinetuneOptions:
    """Options for a BERT and rows of its task."""
    config = BertConfig(
        vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    rows: list[dict[str, Any]] = [{"text": f"row {i}", "label": "ab"[i % 2]} for i in range(ROWS)]
    if kind == SCORES:
        rows = [{"text_a": f"row {i}", "text_b": f"a row {i}", "score": i / ROWS} for i in range(ROWS)]
    data = folder / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(options, model=str(folder / "bert"), data=str(data), eval_data=str(data))


@pytest.fixture(scope="module")
def runs(options: FinetuneOptions, folder: Path) -> dict[str, Trained]:
    """Runs of every kind; in "more", "fewer" and "killed" those that are resumed, and "diverging" in two processes."""
    found = {kind: Trained(folder / f"one {kind}", folder / f"two {kind}") for kind in KINDS}
    jobs = []
    for kind, changes in KINDS.items():
        chosen = replace(options, **changes)
        if kind in (LABELS, SCORES):
            chosen = encoder_options(kind, options, folder)
        finetune(chosen, found[kind].one)
        jobs.append({"options": asdict(chosen), "out": found[kind].two})
    jobs.append({"options": asdict(replace(options, **DIVERGING)), "out": folder / "diverging"})

    # From one process to two, in phase 1; and two processes that are killed and resumed, in QAT.
    one, two = found["learned scales"]
    saved = asdict(replace(options, **KINDS["learned scales"]))
    jobs.append({"options": saved, "out": folder / "more", "copy_of": one, "step": 2})
    dropping = asdict(replace(options, **DROPOUT))
    jobs.append({"options": dropping, "out": folder / "whole"})
    jobs.append({"options": dropping, "out": folder / "killed", "copy_of": folder / "whole", "step": 4})
    start(jobs, folder)

    # From two processes to one, in QAT.
    begin_at(two, folder / "fewer", 4)
    finetune(replace(options, **KINDS["learned scales"]), folder / "fewer", resume=True)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(runs: dict[str, Trained], kind: str) -> None:
    one, two = runs[kind]
    assert_same_curve(two, one)


def test_the_start_of_qat_is_that_of_one_process_bit_for_bit_where_its_inputs_are(runs: dict[str, Trained]) -> None:
    one, two = runs[AT_ONCE]
    assert_equal(tensors(two, "start"), tensors(one, "start"))


@pytest.mark.parametrize("name", ["more", "fewer"])
def test_a_run_is_resumed_with_another_number_of_processes(runs: dict[str, Trained], folder: Path, name: str) -> None:
    assert_same_curve(folder / name, runs["learned scales"].one)


def test_two_processes_resume_bit_for_bit_with_dropout(runs: dict[str, Trained], folder: Path) -> None:
    for part in ("adapter", "start", "reference"):
        assert_equal(tensors(folder / "killed", part), tensors(folder / "whole", part))
    losses = [[row.get("loss") for row in curve(folder / name)] for name in ("killed", "whole")]
    assert losses[0] == losses[1]


def test_the_guard_decides_the_same_in_all_processes(runs: dict[str, Trained], folder: Path) -> None:
    found = json.loads((folder / "diverging/training.json").read_text())["qat_guard"]
    assert len(found["restarts"]) == 1 and found["result_loss"] <= found["start_loss"]


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA GPUs on this machine")
def test_two_gpus_have_the_losses_of_one(options: FinetuneOptions, folder: Path) -> None:
    on_gpu = replace(options, device="cuda", calibration_tokens=256)
    finetune(on_gpu, folder / "one GPU")
    start([{"options": asdict(on_gpu), "out": folder / "two GPUs"}], folder)
    for row, other in zip(curve(folder / "two GPUs"), curve(folder / "one GPU"), strict=True):
        assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-4)
