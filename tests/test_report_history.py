"""History of several runs: changes of comparable metrics, and every setting that changed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pages import (
    HOSTILE,
    Page,
    check_fits,
    check_renders,
    check_self_contained,
    example,
    make_run,
    numbers_in,
    spread,
    svgs,
)
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import UsageError
from qat_edge.evaluate.results import Report
from qat_edge.manifest import MANIFEST
from qat_edge.options import FinetuneOptions
from qat_edge.report.collect import collect
from qat_edge.report.history import History, RunEntry, history
from qat_edge.run import Run
from qat_edge.verbs.report import report

SAME = {"tokens": "t", "prompts": "p", "reference": "r"}


def later(gain: float, **changes: Any) -> Report:
    """Return the example with a better QAT ONNX artifact: lower perplexity, higher exact match and decode speed."""
    rows = [
        replace(
            row, perplexity=row.perplexity * (1 - gain), exact_match=min((row.exact_match or 0) + gain, 1.0),
            speed=row.speed and replace(row.speed, decode=spread(row.speed.decode.median * (1 + gain))),
        ) if (row.name, row.target) == ("qat", "onnx") else row
        for row in example().measured
    ]  # fmt: skip
    machine = {"machine": "x86_64", "cpu_model": "a", "cores": 2, "free_disk_bytes": int(1e9 * gain)}
    return replace(example(), **{"measured": rows, "machine": machine, "identities": SAME} | changes)


def make_runs(folder: Path, *reports: Report) -> list[Run]:
    """Write a run folder per report: "run 0", "run 1" and so on."""
    runs = []
    for index, one in enumerate(reports):
        (folder / f"run {index}").mkdir(parents=True)
        runs.append(make_run(folder / f"run {index}", one))
    return runs


def history_of(runs: list[Run]) -> History:
    """Return the history that the report verb computes."""
    return history([RunEntry(run.path.name, collect(run)) for run in runs])


def qat_onnx(found: History, metric: str) -> list[Any]:
    """Return a metric of the QAT ONNX artifact over the runs."""
    (series,) = (s for s in found.series if (s.model.name, s.model.target) == ("qat", "onnx"))
    return series.metrics[metric]


def test_a_metric_changes_since_the_previous_and_since_the_first_run(tmp_path: Path) -> None:
    found = history_of(make_runs(tmp_path, later(0), later(0.1), later(0.05)))
    for name, sign in (("Perplexity", -1), ("Exact match", 1), ("Decode", 1)):
        first, second, third = qat_onnx(found, name)
        # A share changes by percentage points, everything else by a ratio.
        ratio = (lambda a, b: b - a) if name == "Exact match" else lambda a, b: b / a - 1
        assert (first.before, first.first) == (None, None)
        assert second.before == second.first and second.before.since == 0
        assert (third.before.since, third.first.since) == (1, 0)
        assert second.before.amount == pytest.approx(sign * 0.1)
        assert third.before.amount == pytest.approx(ratio(second.value, third.value))
        assert third.first.amount == pytest.approx(sign * 0.05)
        assert second.before.better and not third.before.better and third.first.better
    (size, again, _), decode = qat_onnx(found, "Size"), qat_onnx(found, "Decode")
    assert again.before.amount == 0 and not again.before.clear and size.value == again.value
    # A difference of a tenth is not significant with 64 prompts, and the repeats differ by 5 percent.
    assert not qat_onnx(found, "Exact match")[1].before.clear
    assert decode[1].before.clear and not decode[2].before.clear


def test_a_run_without_a_metric_is_skipped_as_the_previous_run(tmp_path: Path) -> None:
    without_prompts = [replace(row, exact_match=None) for row in later(0).measured]
    found = history_of(make_runs(tmp_path, later(0), later(0, measured=without_prompts), later(0.1)))
    _, second, third = qat_onnx(found, "Exact match")
    assert second.value is None and third.before.since == 0
    assert qat_onnx(found, "Perplexity")[2].before.since == 1


@pytest.mark.parametrize(
    ("changes", "incomparable", "words"),
    [
        ({"identities": SAME | {"tokens": "x"}}, {"Perplexity", "KL", "Top-1"}, "different evaluation tokens"),
        ({"identities": SAME | {"reference": "x"}}, {"KL", "Top-1"}, "different FP32 fine-tunes"),
        ({"identities": SAME | {"prompts": "x"}}, {"Exact match"}, "different prompts"),
        ({"machine": {"machine": "x86_64", "cpu_model": "b", "cores": 2}}, {"Decode", "Prefill"}, "different machines"),
        (
            {"identities": {}},
            {"Perplexity", "KL", "Top-1", "Exact match"},
            "possibly different evaluation tokens (not recorded: validate again)",
        ),
    ],
)
def test_runs_that_are_not_comparable_are_marked(
    tmp_path: Path, changes: dict[str, Any], incomparable: set[str], words: str
) -> None:
    runs = make_runs(tmp_path, later(0), later(0.1, **changes), later(0.2, **changes))
    found = history_of(runs)
    metrics = next(s for s in found.series if (s.model.name, s.model.target) == ("qat", "onnx")).metrics
    assert {
        name for name, points in metrics.items() if points[1].before and points[1].before.amount is None
    } == incomparable
    # The later two runs are comparable, unless their conditions were not recorded.
    assert (qat_onnx(found, "Perplexity")[2].before.amount is None) is (not changes.get("identities", SAME))
    assert qat_onnx(found, min(incomparable))[2].first.amount is None
    html = report(runs).read_text(encoding="utf-8")
    shown = Page(html).words
    assert f"2 run 1 ≠ 1 run 0: {words}" in shown and "≠ 1" in shown
    broken = [svg for svg in svgs(html) if any(e.get("class") == "apart" for e in svg.iter("line"))]
    assert {svg[0].text for svg in broken} == {f"{name} by run" for name in incomparable}


def test_changed_settings_are_listed(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, later(0), later(0), later(0))
    config.save(runs[1].config, "finetune", FinetuneOptions(model="org/tiny-model", data="rows.jsonl", steps=7))
    manifest = json.loads((runs[1].quantized / MANIFEST).read_text())
    (runs[1].quantized / MANIFEST).write_text(json.dumps({**manifest, "libraries": {"torch": "9.9"}}))
    shutil.copytree(runs[1].path, runs[2].path, dirs_exist_ok=True)
    first, second = history_of(runs).differences
    changed = {one.name: (one.before, one.after) for one in first}
    assert changed["finetune · steps"] == ("200", "7") and changed["version · torch"][1] == "9.9"
    assert all(name.startswith(("finetune · steps", "version · ")) for name in changed)
    assert second == []
    shown = Page(report(runs).read_text()).words
    assert "200 → 7" in shown and "No recorded setting changed." in shown


def test_every_number_on_the_page_of_several_runs_is_in_its_json(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, later(0), later(0.1), replace(later(0.2), device="ssh:pi"))
    page = report(runs)
    assert page == runs[-1].path / "history.html" and not runs[-1].report_html.exists()
    html = page.read_text(encoding="utf-8")
    check_self_contained(html)
    shown = Page(html).data
    assert len(shown) > 100
    assert {value for value, _ in shown} <= numbers_in(json.loads(page.with_suffix(".json").read_text()))
    names = [element.get("id") for svg in svgs(html) for element in svg.iter() if element.get("id")]
    assert len(names) == len(set(names)) == 2 * len(svgs(html)) == 2 * 2 * 7
    assert html.count('class="trend s-qat"') == 2 * 7, "two artifacts and seven metrics, from run 1 to run 2"


def test_hostile_text_in_several_runs_is_escaped(tmp_path: Path) -> None:
    rows = [replace(row, name=HOSTILE, target=HOSTILE, runtime=HOSTILE) for row in example().measured[2:3]]
    rows += [replace(row, perplexity=math.inf, speed=None) for row in example().measured[:2]]
    hostile = later(0, measured=rows, device=HOSTILE, created=HOSTILE, machine={HOSTILE: HOSTILE})
    runs = make_runs(tmp_path, hostile, replace(hostile, machine={}))
    page = report(runs)
    check_self_contained(page.read_text())
    assert "<script>alert(1)</script>" in Page(page.read_text()).words
    json.loads(page.with_suffix(".json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_the_command_takes_several_runs_once_each(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, later(0), later(0.1))
    (tmp_path / "bare").mkdir()
    config.save(Run(tmp_path / "bare").config, "finetune", FinetuneOptions(model="m", data="d"))
    for arguments, code, words in (
        ([runs[0].path, runs[1].path], 0, "history.html"),
        ([runs[0].path, tmp_path / "run 1" / ".." / "run 0"], 2, "named more than once"),
        ([runs[0].path, tmp_path / "bare"], 1, "holds no report"),
        ([], 2, "RUN..."),
    ):
        result = CliRunner().invoke(commands.main, ["report", *map(str, arguments)])
        assert result.exit_code == code and words in result.output.replace("\n", ""), result.output
    assert [p.name for p in (tmp_path / "bare").iterdir()] == ["config.yaml"]
    with pytest.raises(UsageError, match="the oldest first"):
        report([runs[0], runs[0]])


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_renders_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    check_renders(report(make_runs(tmp_path, later(0), later(0.1, identities={}))), width, dark)


@pytest.mark.browser
def test_its_tables_fit_a_window_of_1200_pixels(tmp_path: Path) -> None:
    check_fits(report(make_runs(tmp_path, later(0), later(0.1), later(0.2))), 1200)
