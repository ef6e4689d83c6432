"""The benchmark of all commands: whose time is whose, and what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import verbs
from benchmarks.verbs import START, Line, measure, page_of, parts_of
from qat_edge.errors import RunError


def test_time_before_a_line_of_a_bar_is_that_of_the_bar() -> None:
    lines = [
        Line(2.0, "loading"), Line(5.0, "  training 2/8  loss 1.0  9 s left"), Line(9.0, "  training 8/8"),
        Line(9.5, "writing"),
    ]  # fmt: skip
    assert parts_of(lines, 12.0) == {"training": 7.5, "writing": 2.5, START: 2.0}


def test_parts_sum_to_the_whole() -> None:
    lines = [Line(1.0, "one"), Line(1.5, ""), Line(3.0, "two"), Line(4.0, "one")]
    parts = parts_of(lines, 10.0)
    assert sum(parts.values()) == pytest.approx(10.0)
    assert parts == {START: 1.0, "one": 8.0, "two": 1.0}


def test_a_command_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    figures = measure(["--version"], tmp_path)
    assert 0 < figures["wall_s"] < 60 and figures["peak_bytes"] > 10**6
    assert sum(figures["parts"].values()) == pytest.approx(figures["wall_s"])


def test_a_command_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="ended with exit code 2"):
        measure(["no-such-command"], tmp_path)
    assert "no-such-command" in (tmp_path / "log.txt").read_text()


def test_the_page_lists_the_three_largest_parts() -> None:
    figures = {"wall_s": 10.0, "peak_bytes": 2e9, "parts": {"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}}
    record = {
        "cell": {"name": "verify", "settings": {"cores": 1}}, "figures": figures, "wall_s": 10.0,
        "created": "2026-12-01T00:00:00",
        "machine": "m", "python": "3.11.7", "libraries": {}, "git_revision": None,
    }  # fmt: skip
    text = page_of([record])
    assert "| verify | 10 s | 2.00 | a 4.0 s; b 3.0 s; c 2.0 s |" in text


def test_every_command_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_edge.cli.commands import main

    monkeypatch.setattr(verbs, "fetch_demo_model", lambda folder: "model.gguf")
    assert {arguments[0] for arguments in verbs.commands(tmp_path).values()} <= set(main.commands)
