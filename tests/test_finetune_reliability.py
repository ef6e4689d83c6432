"""What a fine-tune does when it diverges, is stopped, killed, repeated, moved, or would replace something."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import make_model, plain_rows, short_training
from qat_edge import config
from qat_edge.errors import DataError, ModelError, RunError, UsageError
from qat_edge.manifest import sha256
from qat_edge.models.merge import merged_model
from qat_edge.options import FinetuneOptions, QuantizeOptions, SensitivityOptions, ValidateOptions
from qat_edge.quant import qat_init
from qat_edge.run import Run
from qat_edge.stop_signals import Stopped
from qat_edge.train import checkpoints
from qat_edge.train.trainer import QatTrainer
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    return short_training(
        tiny_model_folder, tmp_path, plain_rows(24), lora_dropout=0.1, save_every=2, eval_rows=4,
        calibration_tokens=256,
    )  # fmt: skip


def tensors(run: Path) -> dict[str, str]:
    """Return the sha256 of every tensor file of a run's trained parts."""
    return {
        str(p.relative_to(run)): sha256(p)
        for part in ("adapter", "reference", "start")
        for p in (run / part).glob("*.safetensors")
    }


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in json.loads((run / "training.json").read_text())["curve"] if "loss" in row]


def drop_checkpoints(run: Path, after: int) -> None:
    for path in checkpoints.found(run / "checkpoints"):
        if checkpoints.step_of(path) > after:
            shutil.rmtree(path)


# --- divergence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "step"), [("LoRA", 3), ("QAT", 5)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_bad_step_stops_training(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, step: int, value: float
) -> None:
    compute_loss = QatTrainer.compute_loss

    def diverging(self: QatTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(self, *args, **kwargs)
        return loss * value if self.model.training and self.state.global_step == step - 1 else loss

    monkeypatch.setattr(QatTrainer, "compute_loss", diverging)
    # With evaluation rows, the guard of QAT starts the phase again: tests/train/test_qat_guard.py.
    options = options if phase == "LoRA" else replace(options, eval_data=None, eval_rows=128)
    with pytest.raises(ModelError) as caught:
        finetune(options, tmp_path / "run")
    message = str(caught.value)
    assert f"diverged at step {step} ({phase}, learning rate " in message and f"the loss is {value}" in message
    assert re.search(r"First tensor that is not finite: the gradient of base_model\S+ \(\d+ of \d+ values", message)
    last = checkpoints.found(tmp_path / "run" / "checkpoints")[0]
    assert str(last) in message and checkpoints.step_of(last) == step - 1
    assert not (tmp_path / "run" / "adapter").exists() and not (tmp_path / "run" / "training.json").exists()
    # The checkpoint that is kept is good: without the fault, training continues to the usual result.
    monkeypatch.setattr(QatTrainer, "compute_loss", compute_loss)
    finetune(options, tmp_path / "run", resume=True)
    finetune(options, tmp_path / "whole")
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")


def test_a_weight_that_is_not_finite_is_named(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = QatTrainer.training_step

    def spoil(self: QatTrainer, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            parameter = dict(model.named_parameters())["base_model.model.model.norm.weight"]
            parameter.data[3] = math.inf
        return step(self, model, *args, **kwargs)

    monkeypatch.setattr(QatTrainer, "training_step", spoil)
    with pytest.raises(
        ModelError, match=r"at step 2 .*norm\.weight \(1 of 64 values are not finite\)\. There was no check"
    ):
        finetune(options, tmp_path / "run")


def test_a_checkpoint_with_bad_weights_does_not_replace_good_ones(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last update may do it: no later loss would tell."""
    write = checkpoints.save

    def spoil(self: QatTrainer, model: nn.Module, trial: Any) -> None:
        if self.state.global_step == 6:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data[0] = math.nan
        save(self, model, trial)

    save = QatTrainer._save_checkpoint
    monkeypatch.setattr(QatTrainer, "_save_checkpoint", spoil)
    with pytest.raises(ModelError, match=r"Training diverged: after step 6, .*lora_B"):
        finetune(options, tmp_path / "run")
    assert write is checkpoints.save
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "run" / "checkpoints")] == [4, 3]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_learning_rate_that_is_far_too_high_ends_in_words(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Training diverged .*--learning-rate"):
        finetune(replace(options, learning_rate=1e30, warmup_steps=0), tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_loss_of_evaluation_that_is_not_finite_is_reported(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def evaluate(self: QatTrainer, **kwargs: Any) -> dict[str, float]:
        self.log({"eval_loss": math.nan})
        return {"eval_loss": math.nan}

    monkeypatch.setattr(QatTrainer, "evaluate", evaluate)
    finetune(options, tmp_path / "run")
    assert any("loss on the evaluation data is nan at step 3" in line for line in messages)
    rows = json.loads((tmp_path / "run" / "training.json").read_text(), parse_constant=pytest.fail)["curve"]
    assert {row["eval_loss"] for row in rows if "eval_loss" in row} == {None}


# --- resume ------------------------------------------------------------------------------------------------


def test_resuming_a_finished_run_trains_nothing(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    before = {path: (path.stat().st_mtime_ns, sha256(path)) for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr(QatTrainer, "train", pytest.fail)
    for _ in range(2):
        result = finetune(options, out, resume=True)
        assert result.steps == 6 and result.loss == losses(out)[-1] and result.wall_s == 0
    assert "finished: all 6 steps are done" in messages[-1]
    after = {path: (path.stat().st_mtime_ns, sha256(path)) for path in out.rglob("*") if path.is_file()}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert changed <= {"config.yaml", "inputs.json", ".lock"} and before.keys() == after.keys()


@pytest.mark.parametrize("changes", [{}, {"qat_start": 6.0}, {"method": "full", "lora_rank": 16, "lora_dropout": 0.0}])
@pytest.mark.parametrize("missing", ["adapter", "training.json"])
def test_resuming_writes_what_a_finished_training_lacks(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], missing: str
) -> None:
    out, options = tmp_path / "run", replace(options, **changes)
    finetune(options, out)
    whole, curve = tensors(out), losses(out)
    path = out / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr(QatTrainer, "train", pytest.fail)
    finetune(options, out, resume=True)
    assert tensors(out) == whole and losses(out) == curve


@pytest.mark.parametrize("left", ["config and inputs", "reference too", "incomplete checkpoint"])
def test_resuming_before_the_first_checkpoint_begins_again(
    options: FinetuneOptions, tmp_path: Path, messages: list[str], left: str
) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    whole, curve = tensors(out), losses(out)
    drop_checkpoints(out, after=0)
    for name in ("adapter", "start", *(() if left == "reference too" else ("reference",))):
        shutil.rmtree(out / name)
    (out / "training.json").unlink()
    if left == "incomplete checkpoint":
        (out / "checkpoints" / "checkpoint-2").mkdir()
    finetune(options, out, resume=True)
    assert any("has no checkpoint yet, so training starts from the beginning" in line for line in messages)
    assert tensors(out) == whole and losses(out) == curve


def test_resuming_takes_the_newest_whole_checkpoint(
    options: FinetuneOptions, tmp_path: Path, messages: list[str]
) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    whole, curve = tensors(out), losses(out)
    shutil.rmtree(out / "adapter")
    (out / "checkpoints" / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    finetune(options, out, resume=True)
    assert any("checkpoint-6 is incomplete (optimizer.pt changed: 4 bytes" in line for line in messages)
    assert any("continuing from checkpoint-4" in line for line in messages)
    assert tensors(out) == whole and losses(out) == curve


@pytest.mark.parametrize("left", ["nothing", "manifest"])
def test_resuming_without_the_initialization_names_the_command(
    options: FinetuneOptions, tmp_path: Path, left: str
) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    shutil.rmtree(out / "adapter")
    if left == "nothing":
        shutil.rmtree(out / "start")
    else:
        (out / "start" / "start.safetensors").unlink()
    drop_checkpoints(out, after=4)
    with pytest.raises(RunError, match=r"--resume: .*start is missing or damaged.* `qat-edge finetune --force` with"):
        finetune(options, out, resume=True)


def test_resuming_where_there_is_no_run_says_so(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"missing: no such run folder, so there is nothing to resume\. Check --out"):
        finetune(options, tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotate": "off"},
        {"ptq_init": "awq", "scales": "fixed"},
        {"ptq_init": "hqq", "calibration_tokens": None},
        {"distill_weight": 0.5, "distill_top_k": 8},
        {"method": "full", "lora_rank": 16, "lora_dropout": 0.0, "learning_rate": 1e-4},
        {"qat_start": 0.0},
    ],
)
def test_a_kill_after_the_transition_does_not_repeat_calibration(
    options: FinetuneOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    messages: list[str],
    changes: dict[str, Any],
) -> None:
    """The transition has a checkpoint before it, however rarely others are saved, and its result is kept."""
    out, options = tmp_path / "run", replace(options, save_every=100, **changes)
    finetune(options, out)
    whole, curve = tensors(out), losses(out)
    start = 0 if options.qat_start == 0 else 3
    assert [checkpoints.step_of(p) for p in checkpoints.found(out / "checkpoints")] == ([6, 3] if start else [6])

    # As a kill in the first step of QAT leaves it.
    drop_checkpoints(out, after=start)
    shutil.rmtree(out / "adapter")
    (out / "training.json").unlink()
    monkeypatch.setattr(qat_init, "prepare", pytest.fail)
    monkeypatch.setattr("qat_edge.train.phases.write_cache", pytest.fail)
    finetune(options, out, resume=True)
    assert any("taking the initialization in" in line for line in messages)
    assert tensors(out) == whole and losses(out) == curve


@pytest.mark.parametrize("damage", ["other weights", "damaged file"])
def test_an_initialization_of_other_weights_is_made_again(
    options: FinetuneOptions, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "run"
    finetune(options, out)
    whole = tensors(out)
    drop_checkpoints(out, after=3)
    shutil.rmtree(out / "adapter")
    if damage == "other weights":
        manifest = json.loads((out / "start" / "manifest.json").read_text())
        (out / "start" / "manifest.json").write_text(json.dumps(manifest | {"made_of": "something else"}))
    else:
        changed = load_file(out / "start" / "start.safetensors")
        save_file({name: tensor * 2 for name, tensor in changed.items()}, out / "start" / "start.safetensors")
    finetune(options, out, resume=True)
    assert tensors(out) == whole


# --- signals -----------------------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[int]]]:
    """Signals to send in a step, counted from 1."""
    plan: dict[int, list[int]] = {}
    step = QatTrainer.training_step

    def stopping(self: QatTrainer, *args: Any, **kwargs: Any) -> Any:
        for signum in plan.pop(self.state.global_step + 1, []):
            os.kill(os.getpid(), signum)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(QatTrainer, "training_step", stopping)
    yield plan


def test_a_run_folder_that_was_removed_is_not_made_again(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, step = tmp_path / "run", QatTrainer.training_step

    def removing(self: QatTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            shutil.rmtree(out)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(QatTrainer, "training_step", removing)
    with pytest.raises(RunError, match="was removed or replaced by another process"):
        finetune(options, out)
    assert not out.exists()


@pytest.mark.parametrize(("step", "signum"), [(1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGHUP)])
def test_a_signal_saves_the_step_and_names_the_command(
    options: FinetuneOptions, tmp_path: Path, stop_at: dict[int, list[int]], step: int, signum: signal.Signals
) -> None:
    finetune(options, tmp_path / "whole")
    out, options = tmp_path / "a run", replace(options, save_every=100)
    stop_at[step] = [signum]
    command = rf"Stopped by {signum.name}; checkpoint-{step} is saved\. To continue: qat-edge finetune --resume --out '"
    with pytest.raises(Stopped, match=command) as caught:
        finetune(options, out)
    assert caught.value.exit_code == 128 + signum
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]
    finetune(options, out, resume=True)
    assert tensors(out) == tensors(tmp_path / "whole") and losses(out) == losses(tmp_path / "whole")


def test_a_second_signal_ends_at_once(options: FinetuneOptions, tmp_path: Path, stop_at: dict[int, list[int]]) -> None:
    stop_at[5] = [signal.SIGTERM, signal.SIGTERM]
    with pytest.raises(Stopped, match="checkpoint-4 is saved"):
        finetune(options, tmp_path / "run")


def test_a_signal_during_calibration_leaves_nothing_half_written(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    monkeypatch.setattr(qat_init, "prepare", prepare)
    with pytest.raises(Stopped, match=r"checkpoint-3 is saved\. To continue: qat-edge finetune --resume"):
        finetune(options, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"checkpoints", "config.yaml", "reference", ".lock"}


# --- --force -----------------------------------------------------------------------------------------------


@pytest.fixture
def earlier(options: FinetuneOptions, tmp_path: Path) -> dict[str, str]:
    """A finished run in tmp_path / "run"."""
    finetune(options, tmp_path / "run")
    return tensors(tmp_path / "run")


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = QatTrainer.training_step

    def failing(self: QatTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step + 1 == step:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(QatTrainer, "training_step", failing)


def test_a_new_run_that_fails_early_brings_the_earlier_one_back(
    options: FinetuneOptions,
    tmp_path: Path,
    earlier: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    messages: list[str],
) -> None:
    out = tmp_path / "run"
    fail_at(monkeypatch, 1)
    with pytest.raises(RunError, match="No space left"):
        finetune(replace(options, seed=1), out, force=True)
    assert tensors(out) == earlier and "the earlier run is back" in messages[-1]
    assert config.load(FinetuneOptions, "finetune", out / "config.yaml", {}).seed == 0


def test_a_new_run_that_fails_late_keeps_the_earlier_one(
    options: FinetuneOptions,
    tmp_path: Path,
    earlier: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    messages: list[str],
) -> None:
    out, changed = tmp_path / "run", replace(options, seed=1)
    with monkeypatch.context() as patched:
        fail_at(patched, 5)
        with pytest.raises(RunError, match="No space left"):
            finetune(changed, out, force=True)
    assert tensors(out / ".previous") == earlier
    assert any(f"The earlier run is kept in {out / '.previous'}" in line for line in messages)
    assert any(f"To continue: qat-edge finetune --resume --out {out}" in line for line in messages)
    merged_model(Run.open(out / ".previous").adapter)  # a whole run
    finetune(changed, out, resume=True)
    assert not (out / ".previous").exists()
    finetune(changed, tmp_path / "whole")
    assert tensors(out) == tensors(tmp_path / "whole")


@pytest.mark.parametrize("text", ["services:\n  web: {}\n", "finetune: [1]\n", "finetune:\n  model: a\n  data: b\n"])
def test_force_leaves_the_folder_of_somebody_else(options: FinetuneOptions, tmp_path: Path, text: str) -> None:
    out = tmp_path / "mine"
    (out / "logs").mkdir(parents=True)
    (out / "config.yaml").write_text(text)
    (out / "logs" / "log").write_text("years")
    with pytest.raises(RunError, match=r"--force does not replace it"):
        finetune(options, out, force=True)
    assert (out / "config.yaml").read_text() == text and (out / "logs" / "log").read_text() == "years"


def test_force_leaves_files_that_are_no_part_of_a_run(
    options: FinetuneOptions, tmp_path: Path, earlier: dict[str, str]
) -> None:
    (tmp_path / "run" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "exports").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    finetune(replace(options, seed=1), tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "run" / "exports").exists()
    assert tensors(tmp_path / "run").keys() == earlier.keys() and tensors(tmp_path / "run") != earlier


def test_what_a_killed_beginning_left_is_no_obstacle(options: FinetuneOptions, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".lock").write_text("")
    (tmp_path / "run" / "checkpoints" / "inputs.json").write_text("{}")
    finetune(options, tmp_path / "run")


# --- a run is whole in itself ------------------------------------------------------------------------------


def test_a_run_works_from_anywhere_and_after_it_was_moved(
    options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    relative = replace(options, model="base", data="train.jsonl", eval_data="./eval.jsonl")
    finetune(relative, Path("run"))
    shutil.rmtree("run/adapter")
    finetune(relative, Path("run"), resume=True)
    whole = tensors(tmp_path / "run")

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    shutil.rmtree("moved/adapter")
    saved = config.load(FinetuneOptions, "finetune", Path("moved/config.yaml"), {})
    finetune(saved, Path("moved"), resume=True)
    assert tensors(Path("moved")) == whole
    quantize(Run.open(Path("moved")), QuantizeOptions(method="gptq", calibration_tokens=64))


def test_where_inputs_are_gone_the_message_names_the_flag(
    options: FinetuneOptions, tmp_path: Path, tokenizer: Any
) -> None:
    from qat_edge.evaluate.evaluator import load_eval_set
    from qat_edge.verbs.sensitivity import sensitivity

    make_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = replace(options, model=str(tmp_path / "base"))
    finetune(options, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    quantize(run, QuantizeOptions())
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).rename(tmp_path / f"new-{name}")

    with pytest.raises(DataError, match=r"train\.jsonl: .*--calibration-data FILE"):
        quantize(run, QuantizeOptions(method="gptq"))
    with pytest.raises(DataError, match=r"train\.jsonl: .*--data FILE"):
        sensitivity(run, SensitivityOptions())
    sensitivity(run, SensitivityOptions(data=str(tmp_path / "new-train.jsonl"), tokens=64))
    with pytest.raises(DataError, match=r"eval\.jsonl: .*validate --eval-data FILE"):
        load_eval_set(run, ValidateOptions())

    # A resumed run takes the new places, if the contents are the same.
    with pytest.raises(RunError, match=r"train\.jsonl is gone, .*give --data its new path"):
        finetune(options, run.path, resume=True)
    new = {"data": str(tmp_path / "new-train.jsonl"), "eval_data": str(tmp_path / "new-eval.jsonl")}
    shutil.rmtree(run.adapter)
    finetune(replace(options, **new), run.path, resume=True)
    assert config.load(FinetuneOptions, "finetune", run.config, {}).data == new["data"]
    with pytest.raises(UsageError, match="--data differ"):
        finetune(replace(options, **new | {"data": options.model}), run.path, resume=True)

    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(RunError, match=r"base: no such file or folder; the run was trained on the model there"):
        merged_model(run.adapter)
    (tmp_path / "base").symlink_to(tmp_path / "moved")
    merged_model(run.adapter)


def test_what_was_edited_since_a_run_began_is_named(options: FinetuneOptions, tmp_path: Path, tokenizer: Any) -> None:
    base = tmp_path / "base"
    make_model(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    finetune(replace(options, model=str(base)), tmp_path / "run")
    run = Run.open(tmp_path / "run")

    def resume() -> None:
        finetune(config.load(FinetuneOptions, "finetune", run.config, {}), run.path, resume=True)

    written = run.config.read_text()
    run.config.write_text(written.replace("save_every: ", "save_every: 1"))
    resume()
    run.config.write_text(written.replace("seed: 0", "seed: 7"))
    with pytest.raises(RunError, match=r"config\.yaml was edited since the run began: seed 7 \(was 0\)\. .*restore"):
        resume()
    run.config.write_text(written)

    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.1}))
    with pytest.raises(RunError, match=r"--resume: model changed since"):
        resume()
    with pytest.raises(RunError, match=r"base is not the model that was trained: config\.json changed since\."):
        merged_model(run.adapter)

    inputs = run.checkpoints / "inputs.json"
    recorded = json.loads(inputs.read_text())
    inputs.write_text(json.dumps({"x": 1}))
    with pytest.raises(RunError, match=r"inputs\.json: damaged \('model' is no object\)"):
        resume()
    # Earlier versions recorded neither options nor settings.
    recorded["model"]["identity"].pop("settings")
    recorded.pop("options")
    inputs.write_text(json.dumps(recorded))
    resume()


def test_qat_after_the_last_step_is_refused(options: FinetuneOptions, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--qat-start 7 and --steps 6: training ends before QAT starts"):
        finetune(replace(options, qat_start=7.0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_with_damage_is_mended_or_refused(
    options: FinetuneOptions, tmp_path: Path, earlier: dict[str, str], messages: list[str]
) -> None:
    run = Run(tmp_path / "run")
    weights = run.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    finetune(options, run.path, resume=True)
    assert any("adapter is not as it was written: adapter_model.safetensors" in line for line in messages)
    assert tensors(run.path) == earlier

    shutil.rmtree(run.reference)
    with pytest.raises(RunError, match=r"--resume: .*reference is missing or damaged: it was written at step \d+, and"):
        finetune(options, run.path, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill_weight": 0.5, "distill_top_k": 100_000}, r"--distill-top-k 100000: this model has 288 tokens"),
        ({"track": ("none", "tensorboard")}, "--track none: stands alone"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(
    options: FinetuneOptions, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(replace(options, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_clipping_is_that_of_torch() -> None:
    """The check between the norm and the clipping changes no bit."""
    torch.manual_seed(0)
    ours, theirs = (nn.ParameterList([nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(7))]) for _ in range(2))
    for one, other in zip(ours, theirs, strict=True):
        one.grad = torch.randn_like(one)
        other.grad = one.grad.clone()
    norm = torch.nn.utils.get_total_norm([p.grad for p in ours])
    torch.nn.utils.clip_grads_with_norm_(list(ours), 1.0, norm)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(list(theirs), 1.0))
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours, theirs, strict=True))
