"""Sweeps: the search space, trials with a stand-in for training, and real trainings that are killed and shared."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import qat_edge
from conftest import plain_rows, short_training
from pages import Page, check_fits, check_renders, check_self_contained, svgs
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import DataError, ModelError, QatEdgeError, RunError, UsageError
from qat_edge.options import EvalOptions, FinetuneOptions, SweepOptions
from qat_edge.public_tasks import answer_records
from qat_edge.public_tasks.answer_records import Answered, SourceAnswers, TaskAnswers
from qat_edge.python_process import python_command
from qat_edge.report.sweep_results import SweepResult, summarize
from qat_edge.run import Run
from qat_edge.stop_signals import Stopped
from qat_edge.train import search_space, trial_store
from qat_edge.train.search_space import SearchedOption
from qat_edge.train.trainer import QatTrainer
from qat_edge.verbs import memory_advice, sweep_trials
from qat_edge.verbs.eval import evaluate
from qat_edge.verbs.sweep import load_recorded, pruner_of, sweep
from qat_edge.verbs.sweep_workers import Worker, stop_at_error

BASE = FinetuneOptions("m", "d", eval_data="e")
ROWS = 12  # of the stand-in's evaluation

# --- the search space ---------------------------------------------------------------------------------------


def test_ranges_and_lists_become_values_of_the_option() -> None:
    space = search_space.parse(
        [
            "learning_rate=1e-5:1e-3:log",
            "--lora-rank=8,16",
            "lora_dropout=0:0.5",
            "steps=10:20",
            "lr_restart=true,false",
        ]
    )
    assert space == [
        SearchedOption("learning_rate", low=1e-5, high=1e-3, log=True),
        SearchedOption("lora_rank", (8, 16)),
        SearchedOption("lora_dropout", low=0.0, high=0.5),
        SearchedOption("steps", low=10, high=20),
        SearchedOption("lr_restart", (True, False)),
    ]
    assert [option.is_integer for option in space] == [False, True, False, True, False]
    assert 16 in space[1] and 12 not in space[1] and 1e-4 in space[0] and None not in space[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rnk=8,16", r"unknown option 'lora_rnk'. Did you mean 'lora_rank'\?"),
        ("lora_rank", "expected NAME=LOW:HIGH"),
        ("lora_rank=8", "one value leaves nothing to search. Give at least two, or --lora-rank instead"),
        ("lora_rank=", "expected int, found ''"),
        ("lora_rank=16:8", "an empty range"),
        ("lora_rank=8:8", "an empty range"),
        ("lora_rank=8,8", "a value is given twice"),
        ("lora_rank=a,b", "expected int, found 'a'"),
        ("lora_rank=1.5,2", "expected int, found '1.5'"),
        ("lora_rank=0:4", "0 is below the least permitted value, 1"),
        ("lora_rank=1:2:3", "expected LOW:HIGH or LOW:HIGH:log"),
        ("learning_rate=0:1:log", "a logarithmic scale has no 0"),
        ("learning_rate=nan:1", "expected a number, found nan"),
        ("learning_rate=1e-3:99", "above the greatest permitted value, 10"),
        ("group_size=32:128", "group_size has no range. List values: group_size=32,64,128"),
        ("group_size=32,48", "48 is not one of 32, 64, 128"),
        ("lr_schedule=cosine,step", "'step' is not one of cosine, constant, linear"),
        ("lr_restart=yes,no", "expected bool, found 'yes'"),
        ("qat_start=0.5:50", "a range of fractions ends below 1"),
        ("data=a.jsonl,b.jsonl", "--search data: cannot vary, because it names files"),
        ("model=a,b", "cannot vary, because it names files"),
        ("seed=1,2", "cannot vary, because the best seed is the luckiest one. Give --seed once"),
        ("eval_rows=8,16", "cannot vary, because trials are compared by these evaluations"),
        ("device=cpu,cuda", "cannot vary, because it is no setting of the model's training"),
        ("target_modules=q_proj,k_proj", "cannot vary, because it holds a list"),
        ("trust_remote_code=true,false", "cannot vary, because it is a permission"),
    ],
)
def test_a_bad_search_names_the_option_and_what_is_permitted(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        search_space.parse([text])
    assert str(raised.value).startswith("--search")


def test_an_option_is_searched_once() -> None:
    with pytest.raises(UsageError, match="--search lora_rank: given more than once"):
        search_space.parse(["lora_rank=8,16", "--lora-rank=4:8"])


def test_values_that_exclude_each_other_are_refused_before_any_trial() -> None:
    space = search_space.parse(["method=lora,full", "lora_rank=8,16"])
    with pytest.raises(UsageError, match="--search, with method full, lora_rank 8: --method full and --lora-rank"):
        search_space.require_combinations(BASE, space)
    search_space.require_combinations(BASE, search_space.parse(["lora_rank=8,16", "ptq_init=hqq,gptq"]))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["learning_rate", "scale_learning_rate", "lora_rank", "lora_alpha", "qat_start"]),
        ({"method": "full"}, ["learning_rate", "scale_learning_rate", "qat_start"]),
        ({"scales": "fixed"}, ["learning_rate", "lora_rank", "lora_alpha", "qat_start"]),
        ({"weight_bits": 2}, ["learning_rate", "scale_learning_rate", "lora_rank", "lora_alpha", "qat_start"]),
        ({"qat_start": 1.0, "steps": 1}, ["learning_rate", "lora_rank", "lora_alpha"]),
    ],
)
def test_the_default_space_has_what_the_options_train_and_contains_them(
    changes: dict[str, Any], names: list[str]
) -> None:
    base = dataclasses.replace(BASE, **changes)
    space = search_space.parse(search_space.default_space(base))
    assert [option.name for option in space] == names
    search_space.require_combinations(base, space)
    values = search_space.values_of(base, space)
    assert values is not None
    found = search_space.with_values(base, values)
    assert found.qat_start_step == base.qat_start_step
    assert dataclasses.replace(found, qat_start=base.qat_start) == base


def test_the_options_as_given_are_no_trial_where_the_space_lacks_them() -> None:
    assert search_space.values_of(BASE, search_space.parse(["lora_rank=4,8"])) is None
    assert search_space.values_of(BASE, search_space.parse(["keep_layers=1,2"])) is None
    # The default is a fraction of the learning rate.
    space = search_space.parse(["qat_learning_rate=1e-5:1e-2:log"])
    assert search_space.values_of(BASE, space) == {"qat_learning_rate": pytest.approx(1e-4)}
    # At 2 bits, giving the rate changes what is trained.
    assert search_space.values_of(dataclasses.replace(BASE, weight_bits=2), space) is None


# --- trials, with a stand-in for training -------------------------------------------------------------------


class Trainer:
    """A stand-in for training and measuring: the loss of a row is `loss` of the options, plus noise of the row.

    Attributes:
        trained: Options of every training.
        loss: Returns the loss of options.
        curve: Losses of phase 1 by step, for the callbacks.
        act: Called at the end of a training.
    """

    def __init__(self) -> None:
        self.trained: list[FinetuneOptions] = []
        self.loss: Callable[[FinetuneOptions], float] = lambda options: 1 + abs(math.log10(options.learning_rate) + 3)
        self.noise: Callable[[FinetuneOptions, int], float] = lambda options, row: 0.001 * row
        self.curve: dict[int, float] = {}
        self.act: Callable[[FinetuneOptions, Path], None] = lambda options, run: None

    def finetune(
        self, options: FinetuneOptions, out: Path, resume: bool = False, callbacks: Sequence[Any] = ()
    ) -> None:
        assert resume == (out / "config.yaml").is_file()
        config.save(out / "config.yaml", "finetune", options)
        for part in ("checkpoints", "adapter"):
            (out / part).mkdir(exist_ok=True)
            (out / part / "weights").write_bytes(b"0" * 1000)
        self.trained.append(options)
        for step, loss in self.curve.items():
            for callback in callbacks:
                state = SimpleNamespace(global_step=step)
                callback.on_evaluate(None, state, None, metrics={"eval_loss": loss * self.loss(options)})
        self.act(options, out)

    def measure(self, run: Run, options: FinetuneOptions, search: SweepOptions) -> sweep_trials.Score:
        loss = self.loss(self.trained[-1])
        losses = [loss + self.noise(self.trained[-1], row) for row in range(ROWS)]
        answers = [Answered(f"row-{row}", "d", 5 * each, 5, "") for row, each in enumerate(losses)]
        source = SourceAnswers("torch", "sha", {}, {}, "now", 1.0, answers)
        answer_records.save(
            run.evaluations / "rows_loss.json", TaskAnswers("rows_loss", "e", "predict", {"torch": source})
        )
        return sweep_trials.Score(sum(losses) / ROWS, 5 * ROWS)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer()
    monkeypatch.setattr(sweep_trials, "finetune", stand_in.finetune)
    monkeypatch.setattr(sweep_trials, "measure", stand_in.measure)
    monkeypatch.setattr(sweep_trials, "_free_memory", lambda: None)  # nothing to collect
    return stand_in


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    return short_training(tiny_model_folder, tmp_path, plain_rows(16))


RATES = ("learning_rate=1e-5:1e-1:log",)


def numbers(result: SweepResult) -> list[int]:
    return [trial.number for trial in result.trials]


def test_a_sweep_has_a_run_folder_a_page_and_the_best_options(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer, messages: list[str]
) -> None:
    out = tmp_path / "sweep"
    result = sweep(base, SweepOptions(search=(*RATES, "lora_rank=4,8,16"), trials=5), out)
    assert numbers(result) == [0, 1, 2, 3, 4] and result.finished == 5 and result.as_given == 0
    assert result.trials[0].values == {"learning_rate": base.learning_rate, "lora_rank": base.lora_rank}
    assert result.best is not None
    best = result.of(result.best)
    assert best.score == min(trial.score for trial in result.trials if trial.score is not None)

    # best.yaml has every option of the best trial.
    found = config.load(FinetuneOptions, "finetune", out / "best.yaml", {})
    assert found == dataclasses.replace(base, **best.values)
    assert found in trainer.trained

    # Weights of the others are gone, what was measured is not, and both are reported.
    for trial in result.trials:
        folder = out / "trials" / f"{trial.number:03}"
        assert (folder / "adapter").is_dir() == (trial.number == best.number) == trial.has_weights
        assert (folder / "eval/rows_loss.json").is_file() and (folder / "config.yaml").is_file()
    assert any(line.startswith("Removed the weights of trial") and "--keep-all keeps them" in line for line in messages)

    document = json.loads((out / "sweep.json").read_text())
    assert [trial["score"] for trial in document["trials"]] == [trial.score for trial in result.trials]
    assert all(trial["seconds"] >= 0 and trial["state"] == "complete" for trial in document["trials"])
    assert load_recorded(out)[0] == dataclasses.replace(base) and load_recorded(out)[1].trials == 5


def test_all_weights_stay_where_that_is_requested(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    result = sweep(base, SweepOptions(search=RATES, trials=3, keep_all=True), tmp_path / "sweep")
    assert all(trial.has_weights for trial in result.trials)


def test_a_stopped_sweep_goes_on_with_the_values_that_it_would_have_had(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer
) -> None:
    search = SweepOptions(search=(*RATES, "lora_rank=4,8,16,32"), trials=12)
    whole = sweep(base, search, tmp_path / "whole")

    def stop(options: FinetuneOptions, run: Path) -> None:
        if len(trainer.trained) == 12 + 6:
            raise Stopped(signal.SIGINT)

    trainer.act = stop
    with pytest.raises(
        Stopped, match=r"Stopped by SIGINT after 5 of 12 trials: 5 complete. To continue: qat-edge sweep"
    ) as raised:
        sweep(base, search, tmp_path / "parts")
    assert f"--resume --out {tmp_path / 'parts'}" in str(raised.value) and raised.value.signum == signal.SIGINT
    parts = sweep(base, search, tmp_path / "parts", resume=True)

    def found(result: SweepResult) -> list[Any]:
        return [(trial.values, trial.score) for trial in result.trials if trial.state != "interrupted"]

    assert found(whole) == found(parts) and len(found(whole)) == 12
    (stopped,) = (trial for trial in parts.trials if trial.state == "interrupted")
    assert stopped.reason == "stopped" and stopped.values == parts.of(stopped.number + 1).values
    # More trials may be requested of a sweep that is finished.
    more = sweep(base, dataclasses.replace(search, trials=13), tmp_path / "whole", resume=True)
    assert more.finished == 13 and found(more)[:12] == found(whole)


def test_every_combination_of_a_small_space_is_tried_once(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer
) -> None:
    result = sweep(base, SweepOptions(search=("lora_rank=4,8", "group_size=32,64,128"), trials=20), tmp_path / "sweep")
    values = [(trial.values["lora_rank"], trial.values["group_size"]) for trial in result.trials]
    assert sorted(values) == [(rank, size) for rank in (4, 8) for size in (32, 64, 128)]
    assert numbers(result) == list(range(6)) and values[0] == (base.lora_rank, base.group_size)


def test_values_of_a_list_are_not_tried_twice(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    result = sweep(base, SweepOptions(search=("lora_rank=1:4", "group_size=32,64,128"), trials=11), tmp_path / "sweep")
    values = [tuple(trial.values.values()) for trial in result.trials]
    assert len(values) == len(set(values)) == 11


def test_no_winner_is_claimed_inside_the_noise(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    trainer.loss = lambda options: 2.0 + (0.5 if options.lora_rank == 32 else 0.0)
    trainer.noise = lambda options, row: 0.01 * ((row * options.lora_rank) % 7)
    result = sweep(base, SweepOptions(search=("lora_rank=5,8,32",), trials=3), tmp_path / "sweep")
    text = " ".join(result.verdict())
    other = next(
        trial for trial in result.trials if trial.values["lora_rank"] in (5, 8) and trial.number != result.best
    )
    assert other.may_equal_best
    assert f"These rows do not tell it from trial {other.number}:" in text and "above the noise" not in text
    far = next(trial for trial in result.trials if trial.values["lora_rank"] == 32)
    assert far.difference is not None and far.difference.is_shown
    assert far.difference.interval.low > 0.4 and far.difference.questions == ROWS
    page = Page((tmp_path / "sweep/report.html").read_text())
    assert "These rows do not tell it from" in page.words and "no difference shown" in page.words

    # The same where one of them has the options as they were given.
    given = sweep(
        dataclasses.replace(base, lora_rank=5), SweepOptions(search=("lora_rank=5,8,32",), trials=3), tmp_path / "b"
    )
    assert given.as_given == 0
    if given.best != 0:
        assert "These rows show no difference from trial 0, with the options as they were given:" in " ".join(
            given.verdict()
        )
    assert "above the noise" not in " ".join(given.verdict())


def test_pruned_trials_are_listed_as_pruned_and_have_no_loss(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer
) -> None:
    trainer.curve = {1: 1.1, 2: 1.0, 5: 0.1}  # the last one is after the start of QAT, where nothing is pruned
    options = dataclasses.replace(base, eval_every=1)
    result = sweep(options, SweepOptions(search=RATES, trials=12), tmp_path / "sweep")
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert pruned and result.accounts() == f"12 of 12 trials: {12 - len(pruned)} complete, {len(pruned)} pruned"
    assert all(trial.score is None and "in phase 1, at step 1" in trial.reason for trial in pruned)
    assert not any(trial.has_weights for trial in pruned) and result.best not in [trial.number for trial in pruned]
    assert not any(trial.number == result.best for trial in pruned) and len(result.ranked) == 12 - len(pruned)
    assert "Other trials" in (tmp_path / "sweep/report.html").read_text()

    trainer.trained.clear()
    whole = sweep(
        options,
        SweepOptions(search=("learning_rate=1e-3,1e-5,1e-4,1e-2,1e-6,1e-7,1e-8",), trials=7, pruner="none"),
        tmp_path / "other",
    )
    assert whole.count("complete") == 7


def test_a_pruner_needs_an_evaluation_before_qat(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    with pytest.raises(UsageError, match="--pruner halving: a trial is pruned by its loss before QAT starts"):
        sweep(base, SweepOptions(search=RATES, pruner="halving"), tmp_path / "sweep")
    late = dataclasses.replace(base, eval_every=4)
    assert pruner_of(late, SweepOptions(search=("--qat-start=0.3:0.9",))) == "median"
    with pytest.raises(UsageError, match="no evaluation before step 3"):
        sweep(late, SweepOptions(search=RATES, pruner="median"), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()
    assert sweep(late, SweepOptions(search=RATES, trials=1), tmp_path / "sweep").count("complete") == 1


def test_a_trial_that_diverges_is_recorded_with_its_reason(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer, messages: list[str]
) -> None:
    def diverge(options: FinetuneOptions, run: Path) -> None:
        if options.learning_rate > 1e-3:
            raise ModelError("Training diverged at step 2 (LoRA): the loss is nan. Train again with a lower one.")

    trainer.act = diverge
    result = sweep(base, SweepOptions(search=("learning_rate=1e-4,1e-3,1e-2,1e-1",), trials=4), tmp_path / "sweep")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert {trial.values["learning_rate"] for trial in failed} == {1e-2, 1e-1} and result.count("complete") == 2
    assert {trial.reason for trial in failed} == {"Training diverged at step 2 (LoRA): the loss is nan"}
    assert not any(trial.has_weights for trial in failed)
    assert any("failed: Training diverged at step 2" in line for line in messages)
    # A failure is a result: it is not run again.
    count = len(trainer.trained)
    again = sweep(
        base, SweepOptions(search=("learning_rate=1e-4,1e-3,1e-2,1e-1",), trials=4), tmp_path / "sweep", resume=True
    )
    assert len(trainer.trained) == count and numbers(again) == numbers(result)


def test_a_trial_without_enough_memory_is_recorded_and_the_sweep_goes_on(
    base: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = QatTrainer.train

    def fail_at_rank_16(self: Any, **keywords: Any) -> Any:
        if any(p.shape[0] == 16 for name, p in self.model.named_parameters() if "lora_A" in name):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return train(self, **keywords)

    monkeypatch.setattr(QatTrainer, "train", fail_at_rank_16)
    monkeypatch.setattr(memory_advice, "explain", lambda options, found: f"Out of memory ({found}).")
    result = sweep(base, SweepOptions(search=("lora_rank=4,16",), trials=2), tmp_path / "sweep")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert [trial.values["lora_rank"] for trial in failed] == [16] and result.count("complete") == 1
    assert failed[0].reason.startswith("Out of memory (OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize("error", [UsageError, DataError, RunError])
def test_other_errors_end_the_sweep_and_their_trial_is_run_again(
    error: type[Exception], base: FinetuneOptions, tmp_path: Path, trainer: Trainer
) -> None:
    def fail(options: FinetuneOptions, run: Path) -> None:
        raise error("the disk is full. Make room.")

    trainer.act = fail
    search = SweepOptions(search=RATES, trials=2)
    with pytest.raises(error, match="the disk is full"):
        sweep(base, search, tmp_path / "sweep")
    trainer.act = lambda options, run: None
    result = sweep(base, search, tmp_path / "sweep", resume=True)
    assert result.count("complete") == 2 and result.count("interrupted") == 1
    assert result.trials[0].reason == "the disk is full" and result.trials[0].values == result.trials[1].values
    # The folder went on with the values.
    assert sorted(path.name for path in (tmp_path / "sweep/trials").iterdir()) == ["001", "002"]


def test_a_model_that_fails_before_training_ends_the_sweep(
    base: FinetuneOptions, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ModelError("model.safetensors is damaged.")

    monkeypatch.setattr(sweep_trials, "finetune", fail)
    with pytest.raises(ModelError, match="damaged"):
        sweep(base, SweepOptions(search=RATES, trials=2), tmp_path / "sweep")


def test_values_that_always_kill_their_process_are_given_up(
    base: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = search_space.parse(RATES)

    def open_store() -> trial_store.TrialStore:
        return trial_store.TrialStore(tmp_path, space, 0, "none", 0)

    monkeypatch.setattr(trial_store, "_is_alive", lambda process: False)
    found = [open_store().begin(2) for _ in range(4)]
    values = [trial.params["learning_rate"] for trial in found if trial is not None]
    assert len(values) == 4 and len(set(values[:3])) == 1 and values[3] != values[0]
    store = open_store()
    result = summarize(store, tmp_path, "m", RATES, 2, None)
    assert [trial.state for trial in result.trials] == ["interrupted", "interrupted", "failed", "running"]
    assert [trial.reason for trial in result.trials[:3]] == ["its process ended"] * 2 + ["its process ended 3 times"]


def test_a_trial_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    space = search_space.parse(RATES)
    stores = [trial_store.TrialStore(tmp_path, space, 0, "none", 0) for _ in range(2)]
    begun = [stores[index % 2].begin(3) for index in range(4)]
    assert [trial and trial.number for trial in begun] == [0, 1, 2, None]
    assert len({trial.params["learning_rate"] for trial in begun if trial is not None}) == 3


# --- what is refused -----------------------------------------------------------------------------------------


def test_a_missing_extra_is_named_before_anything_is_computed(
    base: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qat_edge.verbs.sweep.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"optuna is not installed. `pip install 'qat-edge\[sweep\]'` installs it"):
        sweep(base, SweepOptions(), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eval_data": None}, UsageError, "--eval-data is missing: the loss on held-out rows is the score"),
        ({"steps": 0}, UsageError, "--steps 0: nothing is trained"),
        ({"model": "nowhere/model"}, ModelError, "nowhere/model"),
        ({"data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"eval_data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
    ],
)
def test_what_no_trial_could_use_is_refused_at_once(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    base: FinetuneOptions,
    tmp_path: Path,
    trainer: Trainer,
) -> None:
    with pytest.raises(error, match=message):
        sweep(dataclasses.replace(base, **changes), SweepOptions(search=RATES), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists() and trainer.trained == []


def test_an_encoder_is_refused(base: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_edge.models.load.encoder_config", lambda *_: object())
    with pytest.raises(UsageError, match="is an encoder; sweep is for models that generate text"):
        sweep(base, SweepOptions(search=RATES), tmp_path / "sweep")


def test_a_folder_is_continued_or_left_alone(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    out, search = tmp_path / "sweep", SweepOptions(search=RATES, trials=1)
    with pytest.raises(RunError, match=r"no sweep.yaml, so there is no sweep to continue"):
        sweep(base, search, out, resume=True)
    sweep(base, search, out)
    with pytest.raises(RunError, match="has a sweep already"):
        sweep(base, search, out)
    with pytest.raises(RunError, match="exists already, and is no sweep"):
        sweep(base, search, tmp_path)
    changed = dataclasses.replace(base, steps=7)
    with pytest.raises(
        UsageError, match=r"--resume: --steps differ from .*sweep.yaml.*only --trials, --workers, --keep-all"
    ):
        sweep(changed, search, out, resume=True)
    with pytest.raises(UsageError, match="--resume: --search differ"):
        sweep(base, SweepOptions(search=("lora_rank=4,8",), trials=1), out, resume=True)
    (out / "study.db").write_text("no database")
    with pytest.raises(RunError, match=r"study.db: cannot be used as the trials of a sweep"):
        sweep(base, search, out, resume=True)


def test_other_commands_name_a_sweep(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    out = tmp_path / "sweep"
    sweep(base, SweepOptions(search=RATES, trials=1), out)
    for verb in ("report", "export", "validate"):
        done = CliRunner().invoke(commands.main, [verb, str(out)])
        assert done.exit_code == 1 and f"{out}: a sweep, not a run folder. Its page is" in " ".join(done.output.split())


# --- command line, API, page ---------------------------------------------------------------------------------


def test_the_command_takes_the_options_of_finetune(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    config.save(tmp_path / "base.yaml", "finetune", base)
    out = tmp_path / "sweep"
    arguments = [
        "sweep",
        "--config",
        str(tmp_path / "base.yaml"),
        "--out",
        str(out),
        "--trials",
        "2",
        "--batch-size",
        "2",
    ]
    done = CliRunner().invoke(commands.main, [*arguments, "--search", "lora_rank=4,8,16"])
    assert done.exit_code == 0, done.output
    assert {each.batch_size for each in trainer.trained} == {2}
    assert "Trial" in done.output and f"qat-edge finetune --config {out}/best.yaml" in done.output.replace("\n", "")
    done = CliRunner().invoke(commands.main, ["sweep", "--resume", "--out", str(out), "--trials", "3", "--json"])
    assert done.exit_code == 0, done.output
    assert len(trainer.trained) == 3 and len(json.loads(done.stdout[: done.stdout.rindex("}") + 1])["trials"]) == 3

    both = CliRunner().invoke(commands.main, [*arguments, "--search", "batch_size=2,4"])
    assert both.exit_code == 2 and "--batch-size and --search batch_size=2,4: give one of them" in both.output


def test_the_api_is_the_command(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> None:
    options = {"model": Path(base.model), "data": base.data, "eval_data": base.eval_data, "steps": 6, "qat_start": 0.5}
    result = qat_edge.sweep(options, tmp_path / "sweep", search=["lora_rank=8,16"], trials=2)
    assert result.finished == 2 and result.search == ("lora_rank=8,16",) and result.as_given is not None
    assert qat_edge.sweep({}, tmp_path / "sweep", resume=True).finished == 2
    with pytest.raises(UsageError, match=r"options: unknown option 'lora_rnk'. Did you mean 'lora_rank'\?"):
        qat_edge.sweep({**options, "lora_rnk": 3}, tmp_path / "other")


@pytest.fixture
def page(base: FinetuneOptions, tmp_path: Path, trainer: Trainer) -> Path:
    """The page of a sweep with trials of every state."""

    def diverge(options: FinetuneOptions, run: Path) -> None:
        if options.learning_rate > 0.03:
            raise ModelError("Training diverged at step 2 (LoRA): <b>the loss</b> is nan. Try again.")

    trainer.act, trainer.curve = diverge, {1: 1.0}
    options = dataclasses.replace(base, eval_every=1)
    search = (*RATES, "lora_rank=4,8,16", "lr_schedule=cosine,constant,linear", "qat_start=0.3:0.95")
    sweep(options, SweepOptions(search=search, trials=16), tmp_path / "sweep")
    return tmp_path / "sweep/report.html"


def test_the_page_holds_every_trial_and_a_chart_for_each_option(page: Path) -> None:
    html = page.read_text()
    check_self_contained(html)
    result = json.loads((page.parent / "sweep.json").read_text())
    assert len(svgs(html)) == 5 and "<b>the loss" not in html
    words = Page(html).words
    for state in ("pruned", "failed"):
        assert any(trial["state"] == state for trial in result["trials"]) and state in words
    shown = {value for value, _ in Page(html).data}
    assert {trial["score"] for trial in result["trials"] if trial["score"] is not None} <= shown


@pytest.mark.browser
def test_a_browser_shows_the_page(page: Path) -> None:
    check_renders(page, 1200)
    check_fits(page, 1200)


# --- real trainings ------------------------------------------------------------------------------------------


def test_the_score_is_the_loss_of_the_frozen_checkpoint_and_a_bad_start_is_pruned(
    base: FinetuneOptions, tmp_path: Path
) -> None:
    options = dataclasses.replace(base, eval_every=1, learning_rate=1e-2)
    search = SweepOptions(search=("learning_rate=1e-2,1e-7",), trials=2, pruner="halving", score_rows=6)
    result = sweep(options, search, tmp_path / "sweep")
    assert [trial.state for trial in result.trials] == ["complete", "pruned"] and result.rows == 6

    run = Run.open(tmp_path / "sweep/trials/000")
    again = evaluate(run, EvalOptions(task="rows_loss", limit=6, context_length=512), force=True)
    assert again.scores[0].score.value == result.trials[0].score
    assert not (tmp_path / "sweep/trials/001/adapter").exists()
    assert qat_edge.export(run, target=["onnx"], ptq=["none"], context_length=128)


def test_a_killed_trial_is_continued_from_its_checkpoint(base: FinetuneOptions, tmp_path: Path) -> None:
    options = dataclasses.replace(base, steps=40, save_every=2, lora_rank=16)
    out, search = tmp_path / "sweep", SweepOptions(search=("lora_rank=4,16",), trials=2)
    config.save(tmp_path / "sweep-options.yaml", "finetune", options)
    config.save(tmp_path / "sweep-options.yaml", "sweep", search)
    arguments = ("sweep", "--config", str(tmp_path / "sweep-options.yaml"), "--out", str(out))
    process = subprocess.Popen(
        python_command("qat_edge", *arguments), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list(out.glob("trials/000/checkpoints/checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()

    result = sweep(options, search, out, resume=True)
    assert [trial.state for trial in result.trials] == ["interrupted", "complete", "complete"]
    assert result.trials[0].values == result.trials[1].values == {"lora_rank": 16}
    assert sorted(path.name for path in (out / "trials").iterdir()) == ["001", "002"]
    # The curve of a whole training, in the folder that was taken over.
    curve = json.loads((out / "trials/001/training.json").read_text())["curve"]
    assert [row["step"] for row in curve if "loss" in row] == list(range(1, 41))
    assert "its process ended; run again" in (out / "report.html").read_text()


def test_the_error_of_a_worker_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "0.log").write_text("a line\nError: the rows are\n  damaged.\n")
    programs = ["raise SystemExit(1)", "import time; time.sleep(60)"]
    workers = [
        Worker(subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.DEVNULL), tmp_path / f"{index}.log")
        for index, text in enumerate(programs)
    ]
    workers[0].process.wait()
    with pytest.raises(QatEdgeError, match="A worker ended with an error: the rows are damaged"):
        stop_at_error(workers)
    assert workers[1].process.returncode is not None


def test_two_workers_share_a_sweep(base: FinetuneOptions, tmp_path: Path, messages: list[str]) -> None:
    options, out = dataclasses.replace(base, steps=2), tmp_path / "sweep"
    result = sweep(options, SweepOptions(search=RATES, trials=4, workers=2), out)
    assert numbers(result) == [0, 1, 2, 3] and result.count("complete") == 4
    assert len({trial.values["learning_rate"] for trial in result.trials}) == 4
    assert sum(line.startswith("trial ") and ": loss" in line for line in messages) == 4
    assert len(list((out / "workers").glob("*.log"))) == 2
