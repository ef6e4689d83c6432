"""Both sides of the protocol between a command and the process of a runtime, with a runner that has no model."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError
from qat_edge_exporters.runner_process import IdRunner, run_ids

HERE = Path(__file__).parent


class Decimal:
    """Stands for a tokenizer: the text of an id is its number."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(f"{token} " for token in ids)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[IdRunner]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    tokenizer: Any = Decimal()
    with run_ids(ModuleType("echo_runner"), Path("folder"), tokenizer, {"ends": []}, "the runtime") as started:
        yield started


def ask(runner: IdRunner, ids: list[int], most: int = 4) -> list[int]:
    pieces: list[str] = []
    assert not runner.generate(Prompt("", ids), pieces.append, most)
    return [int(word) for word in "".join(pieces).split()]


def test_one_process_answers_many_prompts(runner: IdRunner) -> None:
    process = runner._runner._process
    for turn in range(20):
        assert ask(runner, [turn, 7]) == [turn, 7, 0, 1]
    assert process.poll() is None
    long = list(range(50_000))  # more than a pipe holds
    assert ask(runner, long) == long[:4]


def test_an_answer_is_stopped_and_the_next_one_is_whole(runner: IdRunner) -> None:
    pieces: list[str] = []

    def stop_at_once(piece: str) -> None:
        pieces.append(piece)
        runner.stop()

    started = time.monotonic()
    assert runner.generate(Prompt("", [5]), stop_at_once, 10_000)  # 100 s, if it were not stopped
    assert time.monotonic() - started < 50 and pieces[0] == "5 "
    assert ask(runner, [1, 2]) == [1, 2, 0, 1]


def test_a_stop_before_the_answer_begins_counts(runner: IdRunner) -> None:
    runner.stop()
    assert runner.generate(Prompt("", [5]), lambda piece: None, 10_000)
    assert ask(runner, [1, 2]) == [1, 2, 0, 1]


def test_ctrl_c_in_a_terminal_does_not_reach_the_runner(runner: IdRunner) -> None:
    """A terminal sends it to the process group in the foreground."""
    assert os.getpgid(runner._runner._process.pid) != os.getpgid(0)


def test_a_runner_that_dies_is_an_error(runner: IdRunner) -> None:
    pieces: list[str] = []
    message = (
        r"^folder: the runtime ended in the middle of the conversation: its process was ended by signal 9 \(Killed\)"
    )
    with pytest.raises(ArtifactError, match=message):
        runner.generate(Prompt("", [5, 666]), pieces.append, 4)
    assert pieces == ["5 "]
    with pytest.raises(ArtifactError, match=message):
        ask(runner, [5])


def test_an_error_of_the_reader_ends_the_runner(runner: IdRunner) -> None:
    def fail(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.generate(Prompt("", [5]), fail, 10_000)
    assert runner._runner._process.wait(50) == -signal.SIGKILL


def test_the_runner_ends_with_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    tokenizer: Any = Decimal()
    with run_ids(ModuleType("echo_runner"), Path("folder"), tokenizer, {"ends": []}, "the runtime") as runner:
        ask(runner, [5])
    assert runner._runner._process.returncode == 0

    with (
        pytest.raises(ArtifactError, match=r"^folder: the runtime refused it: .*No module named missing_runner"),
        run_ids(ModuleType("missing_runner"), Path("folder"), tokenizer, {}, "the runtime"),
    ):
        pass
