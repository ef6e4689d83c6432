"""Two processes with the frozen base weights in shards train what they train without, bit for bit, in both phases."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from conftest import make_model, make_tokenizer, plain_rows, short_training
from qat_edge.errors import ModelError, UsageError
from qat_edge.options import FinetuneOptions
from qat_edge.train.option_checks import check_combination
from qat_edge.train.sharded_base import ShardedBase
from qat_edge.verbs.finetune import finetune
from tests.train.distributed_program import begin_at, start
from tests.train.test_distributed import assert_equal, assert_same_curve, curve, tensors

DEFAULTS, CHECKPOINTED = "defaults", "gradient checkpointing"
# The default initialization rotates and replaces base weights, and the backward pass of QAT reads them again.
KINDS: dict[str, dict[str, Any]] = {
    DEFAULTS: {"save_every": 1, "calibration_tokens": 256},
    CHECKPOINTED: {"ptq_init": "hqq", "base": "bf16", "gradient_checkpointing": True, "gradient_accumulation": 2},
    "fixed codes and a teacher": {"ptq_init": "hqq", "codes": "fixed", "distill_weight": 0.5, "distill_top_k": 8},
}
DIVERGING = {"shard_base": True, "steps": 5, "qat_start": 1, "ptq_init": "hqq"}


class Pair(NamedTuple):
    """Folders of two runs in two processes: with whole weights, and with the base in shards."""

    whole: Path
    sharded: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, folder: Path) -> FinetuneOptions:
    # In evaluations, 5 rows in batches of 4 leave a process without one. It has to gather weights nevertheless.
    return short_training(
        tiny_model_folder, folder, plain_rows(21), steps=4, eval_rows=5, eval_every=2,
        device="cpu", precision="fp32", track=("none",),
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(options: FinetuneOptions, folder: Path) -> dict[str, Pair]:
    """Runs of every kind, and one that diverges; "one" and "alone" in one process, the others of each name resumed."""
    found = {kind: Pair(folder / f"{kind}, whole", folder / f"{kind}, sharded") for kind in KINDS}
    jobs: list[dict[str, Any]] = []
    for kind, changes in KINDS.items():
        chosen = replace(options, **changes)
        jobs.append({"options": asdict(chosen), "out": found[kind].whole})
        jobs.append({"options": asdict(replace(chosen, shard_base=True)), "out": found[kind].sharded})
    whole, sharded = jobs[0], jobs[1]
    jobs.append({**sharded, "out": folder / "resumed", "copy_of": sharded["out"], "step": 3})
    jobs.append({**sharded, "out": folder / "begun whole", "copy_of": whole["out"], "step": 1})
    jobs.append({"options": asdict(replace(options, **DIVERGING)), "out": folder / "diverging", "nan_at": 1})
    start(jobs, folder)
    begin_at(found[DEFAULTS].sharded, folder / "alone", 3)
    finetune(replace(options, **KINDS[DEFAULTS]), folder / "alone", resume=True)
    finetune(replace(options, **KINDS[CHECKPOINTED]), folder / "one")
    return found


def losses(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in ("step", "phase", "loss", "grad_norm", "eval_loss")) for row in curve(run)]


def assert_same_run(run: Path, expected: Path) -> None:
    for part in ("reference", "start", "adapter"):
        assert_equal(tensors(run, part), tensors(expected, part))
    assert losses(run) == losses(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_shards_trains_like_a_whole_one_bit_for_bit(runs: dict[str, Pair], kind: str) -> None:
    assert_same_run(runs[kind].sharded, runs[kind].whole)


def test_a_base_in_shards_has_the_losses_of_one_process(runs: dict[str, Pair], folder: Path) -> None:
    assert_same_curve(runs[CHECKPOINTED].sharded, folder / "one")


@pytest.mark.parametrize("name", ["resumed", "begun whole"])
def test_a_run_is_resumed_with_its_base_in_shards(runs: dict[str, Pair], folder: Path, name: str) -> None:
    for part in ("reference", "start", "adapter"):
        assert_equal(tensors(folder / name, part), tensors(runs[DEFAULTS].whole, part))


def test_one_process_resumes_what_had_its_base_in_shards(runs: dict[str, Pair], folder: Path) -> None:
    assert_same_curve(folder / "alone", runs[DEFAULTS].sharded)


def test_each_process_holds_half_of_the_frozen_weights_of_layers_in_both_phases(
    runs: dict[str, Pair], folder: Path
) -> None:
    layers: Any = make_model(make_tokenizer()).base_model.layers
    in_layers = sum(p.numel() for p in layers.parameters()) * 4
    for rank in range(2):
        lines = (folder / f"{runs['fixed codes and a teacher'].sharded.name} held by {rank}.jsonl").read_text()
        held = [json.loads(line) for line in lines.splitlines()]
        assert len(held) == 4
        # Weights are stored in 16 bits where that changes none.
        assert {total - own for own, total in held} <= {in_layers // 2, in_layers // 4}


def test_a_step_that_is_not_finite_is_described_with_the_base_in_shards(runs: dict[str, Pair], folder: Path) -> None:
    found = json.loads((folder / "diverging/training.json").read_text())["qat_guard"]
    reason = found["restarts"][0]["reason"]
    assert reason.startswith("at step 2 (QAT, ") and "First tensor that is not finite: base_model.model.model" in reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "ptq_init": "none"}, "^--shard-base and --method full: "),
        ({"base": "nf4", "ptq_init": "hqq"}, "^--shard-base and --base nf4: "),
        ({"distill_weight": 0.5, "ptq_init": "hqq"}, "^--shard-base and --distill-weight: .* Add --distill-top-k 64"),
    ],
)
def test_weights_that_cannot_be_in_shards_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_combination(FinetuneOptions(model="m", data="d", shard_base=True, **changes))


def test_one_process_has_no_shards(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--shard-base: .* there is one\. Start it with torchrun or"):
        finetune(replace(options, shard_base=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_that_share_a_weight_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "new_group", lambda: pytest.fail("no group is needed"))
    model: Any = make_model(make_tokenizer()).requires_grad_(False)
    layers = model.base_model.layers
    layers[1].mlp = layers[0].mlp
    with pytest.raises(ModelError, match=r"^--shard-base: decoder layer 1 shares mlp\.\w+\.weight with another layer"):
        ShardedBase(model)
