"""The guard of phase 2: the best state ships, a phase that diverges starts again once, and a resume ends the same."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import plain_rows, short_training
from qat_edge.errors import RunError
from qat_edge.manifest import read_manifest, sha256
from qat_edge.models.merge import merged_model
from qat_edge.options import FinetuneOptions
from qat_edge.train import checkpoints, qat_guard
from qat_edge.train.guard_record import GuardRecord, recorded
from qat_edge.train.recipe import describe_recipe
from qat_edge.train.trainer import QatTrainer, learning_rate_factor
from qat_edge.verbs.finetune import finetune


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    """Four steps of LoRA, eight of QAT, with dropout, which would tell if the guard used random numbers."""
    return short_training(
        tiny_model_folder, tmp_path, plain_rows(24), steps=12, qat_start=4.0, lora_dropout=0.1, save_every=2,
        eval_rows=4, calibration_tokens=256,
    )  # fmt: skip


def script(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float], measuring: bool = False) -> None:
    """Make the guard see these losses, by step. measuring: the rows are evaluated all the same."""
    measure = QatTrainer.mean_loss

    def scripted(self: QatTrainer, rows: Any) -> float:
        if measuring:
            assert math.isfinite(measure(self, rows))
        return losses[self.state.global_step]

    monkeypatch.setattr(QatTrainer, "mean_loss", scripted)


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def digests(run: Path) -> dict[str, str]:
    return {str(path.relative_to(run)): sha256(path) for path in run.glob("*/*.safetensors")}


def kept(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the parameters that the guard kept of a step, under the names of the adapter's file."""
    tensors = load_file(run / "checkpoints" / f"qat-{step}.safetensors")
    return {name.replace(".default", ""): tensor for name, tensor in tensors.items()}


def cut(run: Path, after: int) -> None:
    """Leave the run as a kill after a checkpoint leaves it."""
    for path in checkpoints.found(run / "checkpoints"):
        if checkpoints.step_of(path) > after:
            shutil.rmtree(path)
    shutil.rmtree(run / "adapter", ignore_errors=True)
    (run / "training.json").unlink(missing_ok=True)


def log(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "training.json").read_text(), parse_constant=pytest.fail)
    return found


# --- what ships --------------------------------------------------------------------------------------------


def test_a_guard_that_does_not_act_changes_no_bit(
    options: FinetuneOptions, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, {4: 0.5, 7: 0.45, 9: 0.42, 12: 0.4}, measuring=True)
    finetune(options, tmp_path / "guarded")
    guard = log(tmp_path / "guarded")["qat_guard"]
    assert [each["step"] for each in guard["evaluations"]] == [4, 7, 9, 12] and guard["result_step"] == 12
    assert guard["rows"] == 4 and not guard["restarts"] and guard["stopped"] is None and 0 < guard["share"] < 1
    assert read_manifest(tmp_path / "guarded" / "adapter")["qat_guard"]["result_loss"] == guard["result_loss"]
    assert "QAT: 0.5000 -> 0.4000 on 4 evaluation rows, at step 12, the last" in messages
    assert 0 < guard["moved"]["rms_steps"] < 0.5 and 0 < guard["moved"]["codes_changed"] < 0.5
    assert any(line.startswith("QAT moved weights by 0.") for line in messages)
    monkeypatch.setattr(qat_guard, "make_guard", lambda *_: None)
    finetune(options, tmp_path / "alone")
    alone = digests(tmp_path / "alone")
    assert alone == {name: digest for name, digest in digests(tmp_path / "guarded").items() if name in alone}
    rows = [[row.get("loss") for row in log(tmp_path / name)["curve"]] for name in ("guarded", "alone")]
    assert rows[0] == rows[1]


def test_the_loss_is_that_of_the_trainer(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch: the mean over its tokens is also the Trainer's mean over rows of batches."""
    finetune(options, tmp_path / "run")
    found = log(tmp_path / "run")
    last = [row["eval_loss"] for row in found["curve"] if "eval_loss" in row][-1]
    assert found["qat_guard"]["evaluations"][-1]["loss"] == pytest.approx(last, rel=1e-6)


def test_the_best_state_ships(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    script(monkeypatch, {4: 0.5, 7: 0.4, 9: 0.45, 12: 0.46})
    finetune(options, tmp_path / "run")
    line = "QAT: 0.5000 -> 0.4000 on 4 evaluation rows, best at step 7, which is the result (0.4600 at step 12)"
    assert line in messages
    best, shipped = kept(tmp_path / "run", 7), adapter(tmp_path / "run")
    assert best.keys() == shipped.keys() and all(torch.equal(best[name], shipped[name]) for name in best)
    last = load_file(checkpoints.found(tmp_path / "run" / "checkpoints")[0] / "adapter_model.safetensors")
    assert not all(torch.equal(best[name], last[name]) for name in best)


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ((0.5, 0.5, 0.5, 0.5), 12),
        ((0.5, 0.4, 0.45, 0.45), 12),  # half of the gain: the rest is noise
        ((0.5, 0.4, 0.45, 0.451), 7),
        ((0.5, 0.5001, 0.5001, 0.5001), 4),
        ((0.5, 0.49, 0.5001, math.nan), 7),
        ((0.5, 0.49, 0.48, 0.5001), 9),
    ],
)
def test_the_last_state_ships_if_it_has_most_of_the_gain(losses: tuple[float, ...], step: int) -> None:
    steps = (4, 7, 9, 12)
    evaluations = [{"step": step, "loss": loss} for step, loss in zip(steps, losses, strict=True)]
    best = min((each for each in evaluations if each["loss"] == each["loss"]), key=lambda e: (e["loss"], -e["step"]))
    record = GuardRecord(began=4, evaluations=evaluations, best_step=int(best["step"]))
    assert record.result(12)["step"] == step
    assert record.result(12)["loss"] <= 0.5


def test_without_an_improvement_ptq_ships(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """The adapters as the PTQ initialization left them, and its scales."""
    script(monkeypatch, {4: 0.5, 7: 0.51, 9: 0.51, 12: 0.501})
    finetune(options, tmp_path / "run")
    assert any("better than the start, so the result is the start, coordinate-descent alone" in m for m in messages)
    assert all(torch.equal(a, adapter(tmp_path / "run")[n]) for n, a in kept(tmp_path / "run", 4).items())
    start = load_file(tmp_path / "run" / "start" / "start.safetensors")
    scales = merged_model(tmp_path / "run" / "adapter").scales
    assert scales and all(torch.equal(scales[name], start[f"{name}.scales"].float()) for name in scales)


# --- divergence --------------------------------------------------------------------------------------------


def test_a_phase_that_diverges_starts_again_at_a_quarter_of_the_rates(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    script(monkeypatch, {4: 0.5, 7: 0.9, 9: 1.5, 10: 0.45, 11: 0.44, 12: 0.4})
    finetune(replace(options, lr_schedule="constant", warmup_steps=0), tmp_path / "run")
    found = log(tmp_path / "run")
    (event,) = found["qat_guard"]["restarts"]
    assert event["step"] == 9
    assert event["reason"] == (
        "the loss on 4 evaluation rows was 0.5000 where it began, 0.9000 at step 7 and 1.5000 at step 9"
    )
    rates = {row["step"]: row["learning_rate"] for row in found["curve"] if "loss" in row}
    assert rates[9] == pytest.approx(1e-4) and rates[10] == rates[12] == pytest.approx(2.5e-5)
    assert any(
        "starts again from its beginning for the 3 steps that are left, at a quarter of the learning rates: "
        "--qat-learning-rate 2.5e-05, --scale-learning-rate 0.00025." in line for line in messages
    )  # fmt: skip
    assert found["qat_guard"]["result_step"] == 12


def test_a_restart_puts_the_parameters_of_the_start_back(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, {4: 0.5, 7: 0.9, 9: 1.5, 10: 0.45, 11: 0.44, 12: 0.4})
    finetune(replace(options, qat_learning_rate=0.0, scale_learning_rate=0.0), tmp_path / "still")
    assert all(torch.equal(a, adapter(tmp_path / "still")[n]) for n, a in kept(tmp_path / "still", 4).items())
    restart = QatTrainer.restart_phase_2

    def restart_without_a_rate(self: QatTrainer) -> None:
        restart(self)
        assert self.optimizer is not None and not self.optimizer.state
        monkeypatch.setattr(self.lr_scheduler, "lr_lambdas", [lambda step: 0.0] * 2)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    monkeypatch.setattr(QatTrainer, "restart_phase_2", restart_without_a_rate)
    finetune(options, tmp_path / "run")
    assert all(torch.equal(a, adapter(tmp_path / "run")[n]) for n, a in kept(tmp_path / "run", 4).items())


def test_the_second_divergence_ends_the_training_with_the_best_state(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    options = replace(options, steps=24)
    at = qat_guard.evaluation_steps(4, 24)
    again = qat_guard.evaluation_steps(at[2], 24)
    losses = {4: 0.5, at[0]: 0.4, at[1]: 0.9, at[2]: 1.5} | {again[0]: 2.0, again[1]: 3.0}
    script(monkeypatch, losses)
    finetune(options, tmp_path / "run")
    guard = log(tmp_path / "run")["qat_guard"]
    assert guard["restarts"][0]["step"] == at[2] and guard["stopped"]["step"] == again[1] < 24
    assert any("QAT diverged again: the loss" in m and f"ends after step {again[1]} of 24." in m for m in messages)
    best = kept(tmp_path / "run", at[0])
    assert all(torch.equal(best[name], tensor) for name, tensor in adapter(tmp_path / "run").items())
    whole = digests(tmp_path / "run")

    # The training is finished: a resume writes what is missing, and does no step.
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "training.json").unlink()
    monkeypatch.setattr(QatTrainer, "train", pytest.fail)
    finetune(options, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == whole and log(tmp_path / "run")["qat_guard"]["stopped"] == guard["stopped"]


def test_a_step_that_is_not_finite_starts_the_phase_again(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    compute_loss = QatTrainer.compute_loss

    def diverging(self: QatTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        return loss * math.nan if self.model.training and self.state.global_step == 5 else loss

    monkeypatch.setattr(QatTrainer, "compute_loss", diverging)
    result = finetune(options, tmp_path / "run")
    found = log(tmp_path / "run")
    (event,) = found["qat_guard"]["restarts"]
    assert event["step"] == 6 and event["reason"].startswith("at step 6 (QAT, learning rate 0.0001): the loss is nan")
    assert any(line.startswith("QAT diverged: at step 6 (QAT, ") for line in messages)
    losses = {row["step"]: row["loss"] for row in found["curve"] if "loss" in row}
    assert losses[6] is None and all(losses[step] for step in losses if step != 6)
    assert math.isfinite(result.loss)


def test_an_update_that_is_not_finite_starts_the_phase_again(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of such parameters would stop the training. The second time, what ships is the start."""
    clip = QatTrainer._clip_grad_norm

    def spoiling(self: QatTrainer, model: nn.Module) -> torch.Tensor:
        norm = clip(self, model)
        if self.state.global_step in (5, 7):
            next(p for n, p in model.named_parameters() if "lora_B" in n).grad[0] = math.nan  # type: ignore[index]
        return norm

    monkeypatch.setattr(QatTrainer, "_clip_grad_norm", spoiling)
    finetune(options, tmp_path / "run")
    guard = log(tmp_path / "run")["qat_guard"]
    assert guard["restarts"][0]["reason"].startswith("after step 6, base_model.") and guard["stopped"]["step"] == 8
    assert all(torch.equal(a, adapter(tmp_path / "run")[n]) for n, a in kept(tmp_path / "run", 4).items())


# --- a run that is resumed ---------------------------------------------------------------------------------

SCRIPTS: dict[str, dict[int, float]] = {
    "good": {4: 0.5, 7: 0.45, 9: 0.42, 12: 0.4},
    "best in between": {4: 0.5, 7: 0.4, 9: 0.45, 12: 0.46},
    "restarted": {4: 0.5, 7: 0.9, 9: 1.5, 10: 0.45, 11: 0.44, 12: 0.46},
    "no better": {4: 0.5, 7: 0.9, 9: 1.5, 10: 0.55, 11: 0.6, 12: 0.7},
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("changes", [{}, {"method": "full", "lora_rank": 16, "lora_dropout": 0.0}])
def test_a_run_resumed_anywhere_in_phase_2_ends_the_same(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(checkpoints, "KEPT", 100)
    script(monkeypatch, SCRIPTS[name])
    options, run = replace(options, save_every=1, **changes), tmp_path / "run"
    finetune(options, run)
    whole, curve, guard = digests(run), log(run)["curve"], log(run)["qat_guard"]
    for step in (11, 9, 8, 5, 4):
        cut(run, after=step)
        finetune(options, run, resume=True)
        found = log(run)
        assert digests(run) == whole and found["curve"] == curve, step
        assert {**found["qat_guard"], "wall_s": 0, "share": 0} == {**guard, "wall_s": 0, "share": 0}


def test_parameters_that_no_checkpoint_needs_are_removed(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, steps=36, save_every=1)
    at = qat_guard.evaluation_steps(4, 36)
    script(monkeypatch, {4: 0.5} | {step: 0.4 - step / 1000 for step in at})
    finetune(options, tmp_path / "run")
    left = sorted(int(p.stem.rpartition("-")[2]) for p in (tmp_path / "run" / "checkpoints").glob("qat-*.safetensors"))
    # The two kept checkpoints are of the last steps; the one before the last was best at the last but one evaluation.
    assert left == [4, at[-2]]


@pytest.mark.parametrize(("damage", "words"), [("missing", "missing"), ("changed", "another file than was written")])
def test_parameters_that_are_gone_are_reported_before_training_goes_on(
    options: FinetuneOptions, tmp_path: Path, damage: str, words: str
) -> None:
    finetune(options, tmp_path / "run")
    cut(tmp_path / "run", after=10)
    path = tmp_path / "run" / "checkpoints" / "qat-4.safetensors"
    path.unlink() if damage == "missing" else path.write_bytes(b"other")
    with pytest.raises(RunError, match=rf"qat-4\.safetensors: {words}; .* of step 4, .* train again with --force"):
        finetune(options, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "change",
    [
        {"began": -1},
        {"best_step": 5},
        {"evaluations": [{"step": 4}]},
        {"evaluations": {}},
        {"restarts": [{"step": "4", "reason": "x"}]},
        {"restarts": 1},
        {"stopped": [1]},
        {"files": []},
        {"is_on": "yes"},
        {"unknown": 1},
    ],
)
def test_a_damaged_record_is_reported(options: FinetuneOptions, tmp_path: Path, change: dict[str, Any]) -> None:
    good = {"step": 4, "loss": 0.5}
    record = dataclasses.asdict(GuardRecord(began=4, evaluations=[good], best_step=4))
    assert recorded({"QatGuard": {"args": {}, "attributes": record}}, tmp_path) == GuardRecord(**record)
    with pytest.raises(RunError, match=r"the record of QatGuard in trainer_state\.json is damaged"):
        recorded({"QatGuard": {"args": {}, "attributes": record | change}}, tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_resumed_without_a_guard(
    options: FinetuneOptions, tmp_path: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(qat_guard, "make_guard", lambda *_: None)
        finetune(options, tmp_path / "run")
    whole = digests(tmp_path / "run")
    cut(tmp_path / "run", after=10)
    finetune(options, tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == whole and log(tmp_path / "run")["qat_guard"] is None
    assert any("QAT has no guard: the run began with a version" in line for line in messages)


# --- where there is none -----------------------------------------------------------------------------------


def test_without_evaluation_rows_the_lack_of_a_guard_is_said(
    options: FinetuneOptions, tmp_path: Path, messages: list[str]
) -> None:
    finetune(replace(options, eval_data=None, eval_rows=128), tmp_path / "run")
    assert any("QAT has no guard: without --eval-data" in line for line in messages)
    assert log(tmp_path / "run")["qat_guard"] is None
    assert read_manifest(tmp_path / "run" / "adapter")["qat_guard"] is None


def test_a_start_that_cannot_be_measured_has_no_guard(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    script(monkeypatch, {4: math.nan})
    finetune(options, tmp_path / "run")
    assert any("QAT has no guard: the loss on 4 evaluation rows is nan where it begins" in line for line in messages)
    cut(tmp_path / "run", after=10)
    finetune(options, tmp_path / "run", resume=True)
    assert not any("began with a version" in line for line in messages)


def test_a_training_without_phase_2_has_no_guard(options: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    finetune(replace(options, qat_start=12.0, eval_data=None, eval_rows=128), tmp_path / "run")
    assert not any("guard" in line for line in messages)


# --- figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "end", "steps"),
    [
        (40, 45, [42, 43, 45]),
        (180, 200, [184, 188, 192, 196, 200]),
        (60, 122, [68, 76, 83, 91, 99, 106, 114, 122]),
        (5, 6, [6]),
        (0, 2, [1, 2]),
    ],
)
def test_evaluations_are_spread_over_the_phase(begin: int, end: int, steps: list[int]) -> None:
    assert qat_guard.evaluation_steps(begin, end) == steps


def test_the_evaluations_are_a_twentieth_of_the_work_or_one_batch_each() -> None:
    options = FinetuneOptions(model="m", data="d", batch_size=8, eval_rows=1000)
    for steps, start in ((45, 40), (200, 180), (1000, 500), (5000, 4500)):
        rows = qat_guard.row_count(replace(options, steps=steps), start)
        evaluations = 1 + len(qat_guard.evaluation_steps(start, steps))
        work = start + qat_guard.QAT_COST * (steps - start)
        assert rows % 8 == 0 and rows >= 8  # the first are the demo's steps
        assert evaluations * rows / 8 * qat_guard.EVALUATION_COST <= 0.05 * work
    assert qat_guard.row_count(replace(options, steps=6), 3) == 8
    assert qat_guard.row_count(replace(options, steps=5000, eval_rows=20), 4500) == 20


def test_a_restart_has_a_schedule_of_its_own_at_a_quarter_of_the_peak() -> None:
    options = FinetuneOptions(model="m", data="d", steps=100, warmup_steps=4, lr_restart=False)
    again: int | None = None
    factor = learning_rate_factor(options, 50, restarted=lambda: again)
    before = [factor(step) for step in range(70)]
    again = 70
    assert [factor(step) for step in range(70)] == before
    assert factor(70) < factor(74) == pytest.approx(0.25) and factor(99) < 0.01


def test_the_recipe_is_described() -> None:
    options = FinetuneOptions(model="m", data="d", steps=100, qat_start=0.5)
    assert describe_recipe(options, 50, "210 int4 (group 32)", rotated=True) == (
        "Recipe: 210 int4 (group 32); 50 steps of LoRA at a learning rate of 0.001, then rotation and "
        "coordinate-descent, then 50 steps of QAT (50%) at 0.0001, learned scales at 0.001. docs/accuracy.md compares "
        "recipes"
    )
    narrow = FinetuneOptions(model="m", data="d", steps=100, weight_bits=2)
    assert describe_recipe(narrow, 50, "210 int2", rotated=True).endswith(
        "then 50 steps of QAT of scales alone (50%) at 0.001. docs/frontier.md compares recipes"
    )
    alone = describe_recipe(replace(options, method="full", ptq_init="none", scales="absmax"), 100, "", rotated=False)
    assert (
        "100 steps of full fine-tuning at a learning rate of 0.001, then no PTQ initialization, then no step" in alone
    )
