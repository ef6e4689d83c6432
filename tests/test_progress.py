"""Messages and progress: where they go, and how few lines a log gets."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest

from conftest import Recorder
from qat_edge import progress
from qat_edge.progress import LineBar, PrefixedReporter


def test_a_log_gets_a_line_at_each_quarter() -> None:
    lines: list[str] = []
    bar = LineBar("training", 200, lines.append)
    for done in range(1, 201):
        bar.update(done, f"loss {done}")
    assert [line.split()[1] for line in lines] == ["50/200", "100/200", "150/200", "200/200"]
    assert lines[0].startswith("  training 50/200  loss 50  ") and lines[-1] == "  training 200/200  loss 200"


def test_slow_work_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    bar = LineBar("measuring", 1000, lines.append)
    for done in range(1, 9):
        now[0] += 20.0
        bar.update(done)
    assert [line.split()[1] for line in lines] == ["3/1000", "6/1000"]
    assert lines[0].endswith("332 min left"), "997 left at 20 s each"


def test_steps_of_an_earlier_process_do_not_count_for_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    bar = LineBar("training", 100, lines.append)
    bar.start_at(45)
    now[0] = 5.0
    bar.update(50)
    assert lines == ["  training 50/100    50 s left"]


def test_a_reporter_is_in_force_inside_its_block_only() -> None:
    outer, inner = Recorder(), Recorder()
    with progress.report_to(outer):
        with progress.report_to(inner):
            progress.info("one")
        progress.warn("two")
    assert (inner.lines, outer.lines) == (["one"], ["two"])


def test_without_a_reporter_the_logger_gets_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qat_edge"):
        progress.info("  done")
        progress.warn("look")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("INFO", "done"), ("WARNING", "look")]


def test_a_thread_with_a_copied_context_reports_under_its_name() -> None:
    recorder = Recorder()

    def work() -> None:
        with progress.report_to(PrefixedReporter("ssh:pi", progress.current())):
            progress.info("  timing")
            with progress.bar("scoring", 2) as bar:
                bar.update(2)

    with progress.report_to(recorder), ThreadPoolExecutor(1) as pool:
        pool.submit(copy_context().run, work).result()
    assert recorder.lines == ["ssh:pi: timing", "ssh:pi: scoring 2/2"]
