"""Ends of a training in several processes: errors, signals, a process that dies, and other commands than finetune."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from click.testing import CliRunner
from transformers import BertConfig

from conftest import plain_rows, short_training
from qat_edge import launched
from qat_edge.cli.commands import main
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.models.tasks import SentenceEncoder
from qat_edge.options import FinetuneOptions
from qat_edge.python_process import python_command
from qat_edge.run import Run
from qat_edge.train import checkpoints, distributed, setup
from qat_edge.train.distributed_trainer import DistributedTrainer
from qat_edge.train.trainer import QatTrainer
from qat_edge.verbs.finetune import _lost_process, finetune

SECONDS = 60  # a training takes 6 s to begin on an idle core

LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def options(tiny_model_folder: Path, tmp_path: Path) -> FinetuneOptions:
    return short_training(
        tiny_model_folder, tmp_path, plain_rows(16), steps=80, qat_start=0.9, ptq_init="none", save_every=2,
        eval_rows=4, device="cpu", precision="fp32", track=("none",),
    )  # fmt: skip


def launch(options: FinetuneOptions, out: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `qat-edge finetune` in two processes by torchrun."""
    command = python_command(
        "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qat_edge", "finetune", "--model",
        options.model, "--data", options.data, "--eval-data", str(options.eval_data), "--steps", str(options.steps),
        "--qat-start", str(options.qat_start), "--batch-size", str(options.batch_size), "--lora-rank", "4",
        "--ptq-init", "none", "--eval-rows", "4", "--save-every", "2", "--device", "cpu", "--precision", "fp32",
        "--track", "none", "--out", str(out), *flags,
    )  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode
    return output


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def newest(out: Path) -> int:
    return max(map(checkpoints.step_of, checkpoints.found(out / "checkpoints")), default=0)


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def test_an_error_is_reported_once(options: FinetuneOptions, tmp_path: Path) -> None:
    output = end(launch(options, tmp_path / "run", "--data", str(tmp_path / "none.jsonl")))
    assert output.count("no such file or folder") == 1 and output.count("Training on CPU") == 1
    # The launcher has a traceback of its own, which begins here.
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_all_processes_in_order_and_a_dead_one_ends_the_others(
    options: FinetuneOptions, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    launcher = launch(options, out)
    until(lambda: newest(out) > 0)
    launcher.send_signal(signal.SIGTERM)
    output = end(launcher)
    stopped = newest(out)
    assert output.count("SIGTERM: stopping after this step") == 1
    assert output.count(f"Stopped by SIGTERM; checkpoint-{stopped} is saved.") == 1 and "Error:" not in output

    launcher = launch(options, out, "--resume")
    until(lambda: newest(out) > stopped)
    worker(launcher, 1).kill()
    killed = time.monotonic()
    output = end(launcher)
    assert time.monotonic() - killed < 20
    assert output.count("To continue: qat-edge finetune --resume") == 1

    finetune(options, out, resume=True)
    assert (out / "adapter").is_dir() and newest(out) == options.steps


# --- without processes -------------------------------------------------------------------------------------


def set_launcher(patch: pytest.MonkeyPatch, **changes: str) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3}, r"^--batch-size 3 and 2 processes: .* Give a multiple of 2, such as 4\.$"),
        ({"steps": 0}, "^--steps 0 trains nothing, and a launcher started 2 processes"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_processes_connect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    set_launcher(monkeypatch)
    with pytest.raises(UsageError, match=message):
        finetune(FinetuneOptions(model="m", data="d", **changes), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["export", "quantize", "validate", "doctor"])
def test_other_commands_run_in_one_process(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    set_launcher(monkeypatch)
    done = CliRunner().invoke(main, [command, "RUN"])
    assert done.exit_code == 2 and f"qat-edge {command} runs in one process, and a launcher started 2" in done.output


def test_process_0_reports_an_error_and_the_others_give_it_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    assert launched.may_report() and not waited
    set_launcher(monkeypatch)
    assert launched.may_report() and not waited
    monkeypatch.setenv("RANK", "1")
    assert launched.may_report() and waited == [launched.PATIENCE_S]


def test_an_unknown_option_is_reported_by_process_0_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, RANK="1")
    monkeypatch.setattr(launched, "may_report", lambda: False)
    done = CliRunner().invoke(main, ["finetune", "--no-such-option"])
    assert done.exit_code == 2 and done.output == ""


def test_a_process_that_has_ended_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")
    assert not distributed.is_lost_process(lost)
    monkeypatch.setattr(distributed, "_control", object())
    assert distributed.is_lost_process(lost)
    assert not distributed.is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not distributed.is_lost_process(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))


class StoreOfOne:
    """Store that counts, until it is closed."""

    def __init__(self) -> None:
        self.count, self.closed = 0, False

    def add(self, key: str, amount: int) -> int:
        if self.closed:
            raise RuntimeError("Broken pipe")
        self.count += amount
        return self.count


def test_the_first_process_with_an_error_reports_it() -> None:
    store: Any = StoreOfOne()
    assert [distributed._is_first_error(store) for _ in range(3)] == [True, False, False]
    store.closed = True
    assert distributed._is_first_error(store)


def test_a_single_process_agrees_with_itself() -> None:
    assert distributed.on_first(lambda: 3) == 3 and distributed.gather("a") == ["a"] and distributed.largest(2) == 2
    distributed.require_all(None)
    with pytest.raises(DataError, match=r"^row 1$"):
        distributed.require_all(DataError("row 1"))


@pytest.mark.parametrize(
    ("hosts", "refused"), [([("a", "pid"), ("b", "pid")], ""), ([("a", "pid"), ("b", "")], "not visible on b: ")]
)
def test_a_run_folder_that_others_do_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hosts: list[tuple[str, str]], refused: str
) -> None:
    monkeypatch.setattr(distributed, "gather", lambda _: hosts)
    if not refused:
        distributed.require_shared(tmp_path / ".lock.json")
        return
    with pytest.raises(RunError, match=refused):
        distributed.require_shared(tmp_path / ".lock.json")


def test_processes_with_other_inputs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value, "other"])
    with pytest.raises(RunError, match=r"^The inputs of process 2 differ from those of process 0\. Give the same"):
        distributed.require_same("own", "The inputs", "Give the same.")


def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch, LOCAL_RANK="1", RANK="1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"^Process 1 of this machine has no GPU: torch finds 1 here\."):
        distributed.join("cuda")
    assert os.environ["WORLD_SIZE"] == "2" and distributed.count() == 1


def test_the_message_about_a_lost_process_names_the_checkpoint(tmp_path: Path) -> None:
    run = Run(tmp_path / "lost")
    error = RuntimeError("Connection closed by peer")
    assert "(Connection closed by peer). There is no checkpoint yet" in _lost_process(run, error)
    (run.checkpoints / "checkpoint-4").mkdir(parents=True)
    assert "checkpoint-4 is saved. To continue: qat-edge finetune --resume" in _lost_process(run, error)


def test_processes_that_cannot_connect_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    set_launcher(monkeypatch)

    def fail(_: str) -> None:
        raise RuntimeError("connect() timed out")

    monkeypatch.setattr(distributed, "rendezvous", fail)
    with pytest.raises(RunError, match=r"^The 2 processes of this training cannot connect over 127\.0\.0\.1:29500: co"):
        distributed.join("cpu")


def test_rows_whose_wrong_answers_are_the_rest_of_the_batch_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"anchor": "a", "positive": "b"}\n')
    chosen = FinetuneOptions(model=str(tmp_path), data=str(data))
    assert setup._choose_task(chosen) == SentenceEncoder(scored=False)
    monkeypatch.setattr(distributed, "count", lambda: 2)
    with pytest.raises(UsageError, match=r"^Rows of 'anchor' and 'positive' and 2 processes: the other texts"):
        setup._choose_task(chosen)


def test_a_model_with_a_loss_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QatTrainer, "set_objective", lambda self, objective: None)
    trainer = DistributedTrainer.__new__(DistributedTrainer)
    trainer.model = torch.nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"^Linear computes a loss of its own, which is no mean over tokens"):
        trainer.set_objective(None)
    trainer.at_targets = True
    trainer.set_objective(None)
