"""The report page: every figure it shows is one of the JSON, nothing in it is executed or fetched."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from pages import (
    HOSTILE,
    Page,
    agreement,
    budget,
    check_renders,
    check_self_contained,
    curve,
    example,
    make_run,
    numbers_in,
    quantized,
    svgs,
    write,
)  # fmt: skip
from qat_edge import config
from qat_edge.config import FinetuneOptions
from qat_edge.errors import RunError
from qat_edge.evaluate import results
from qat_edge.evaluate.results import Gate, Measured, Report
from qat_edge.report.charts import LINE, linear_ticks, log_ticks, text_width, thin
from qat_edge.report.figures import number, percent, whole_percent
from qat_edge.report.plots import loss_curve
from qat_edge.report.tables import COLUMNS, parts
from qat_edge.report.verdict import verdict
from qat_edge.run import MANIFEST, sha256, write_manifest
from qat_edge.verbs.report import report


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write(make_run(tmp_path, example()))


def test_every_number_is_one_of_the_json(page: str, tmp_path: Path) -> None:
    shown = Page(page).data
    document = json.loads((tmp_path / "report.json").read_text())
    known = numbers_in(document)
    for row in example().measured:  # sums, differences and ratios the tables show
        known |= {float(row.total_bytes), 344_000_000.0 - 104_000_000.0, 0.0221 / 0.0233, 1.0}
    known |= {1.0}  # files in an artifact, the floor over itself
    assert len(shown) > 150
    assert {value for value, _ in shown} <= known


def test_shown_text_is_the_value_rounded(page: str) -> None:
    for value, text in Page(page).data:
        digits = text.replace(",", "").split()[0].removesuffix("%")
        half_a_digit = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * 1.0001
        ways = (value, value * 100, value / 1e6)
        assert any(abs(float(digits) - way) <= half_a_digit for way in ways), (value, text)


def test_summary_has_each_figure_of_each_model(page: str) -> None:
    shown = {value for value, _ in Page(page).data}
    for row in example().measured:
        for column in COLUMNS:
            value = column.value(row)
            assert value is None or value in shown


def test_the_large_figures_are_what_their_names_say(page: str) -> None:
    tiles = re.findall(r'tile-name">(.*?)</span><span class="tile-figure">(.*?)</span>', page)
    assert tiles == [
        ("Exact match", "82.8–84.4%"), ("Perplexity", "18.7"), ("Size", "88.7–117 <small>MB</small>"),
        ("Decode", "120–165 <small>tokens/s</small>"),
    ]  # fmt: skip


def test_json_holds_the_reports_and_the_verdict(page: str, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "report.json").read_text())
    saved = json.loads((tmp_path / "reports" / "0.json").read_text())
    device = document["devices"][0]
    assert {key: device[key] for key in saved if key != "format"} == {k: v for k, v in saved.items() if k != "format"}
    assert device["verdict"]["headline"] in page
    assert document["training"]["curve"] == curve(40, 20)
    assert str(tmp_path) not in page


def test_nothing_is_fetched_or_executed(page: str) -> None:
    check_self_contained(page)
    assert len(page.encode()) < 300_000


def with_budgets() -> Report:
    return replace(example(), budgets=[budget("executorch"), budget("onnx")])


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    base = example()
    rows = [replace(row, notes=(HOSTILE,), runtime=HOSTILE) for row in base.measured]
    rows[0] = replace(rows[0], name=HOSTILE, target=HOSTILE)
    rows[2] = replace(rows[2], size_bytes={HOSTILE: 5_000_000})
    gates = [Gate(HOSTILE, 0.1, HOSTILE, 0.2, False)]
    hostile = replace(base, device=HOSTILE, created=HOSTILE, measured=rows, gates=gates)
    hostile = replace(hostile, machine={HOSTILE: HOSTILE}, options={"a": [HOSTILE]})
    run = make_run(tmp_path, hostile)
    config.save(run.config, "finetune", FinetuneOptions(model=HOSTILE, data=HOSTILE))
    log = {"device": HOSTILE, "curve": [{"step": HOSTILE, "phase": HOSTILE, "loss": HOSTILE}, HOSTILE]}
    (tmp_path / "training.json").write_text(json.dumps(log))
    shutil.rmtree(run.quantized)
    html = write(run)
    check_self_contained(html)
    parsed = Page(html)
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "script")]
    assert "<script>alert(1)</script>" in parsed.words
    assert "\x00" not in html
    assert len(svgs(html)) == 3


def test_plots_are_well_formed_and_described(page: str) -> None:
    found = svgs(page)
    assert len(found) == 4
    names = [element.get("id") for svg in found for element in svg.iter() if element.get("id")]
    assert len(names) == len(set(names)) == 8
    for svg in found:
        parts = {child.get("id"): child.text for child in svg if child.tag in ("title", "desc")}
        assert (svg.get("aria-labelledby") or "").split() == list(parts)
        assert all(parts.values())
        _, _, width, height = map(float, (svg.get("viewBox") or "").split())
        for element in svg.iter("text"):
            assert 0 <= float(element.get("x") or -1) <= width
            assert 0 < float(element.get("y") or -1) < height


@pytest.mark.parametrize("losses", [(0.0522, 0.05), (2.9, 2.9), (1e-4, 1e-4), (1.25, 0.05)])
@pytest.mark.parametrize("start", [1, 50, 90, 99])
def test_labels_of_evaluations_cover_neither_each_other_nor_a_point(losses: tuple[float, float], start: int) -> None:
    rows: list[dict[str, Any]] = [row for row in curve(100, start) if "loss" in row]
    for phase, step, loss in zip(("lora", "qat"), (start, 100), losses, strict=True):
        rows.append({"phase": phase, "step": step, "eval_loss": loss})
    svg = ET.fromstring(loss_curve("loss", rows))
    labels = [text for text in svg.iter("text") if "value" in text.get("class", "")]
    assert sorted(str(text.text) for text in labels) == sorted(map(number, losses))
    boxes = []
    for text in labels:
        middle, baseline, wide = float(text.get("x", "")), float(text.get("y", "")), text_width(str(text.text))
        boxes.append((middle - wide / 2, middle + wide / 2, baseline - LINE + 2, baseline + 1))
    for point in svg.iter("circle"):
        left, height = float(point.get("cx", "")), float(point.get("cy", ""))
        boxes.append((left - 4, left + 4, height - 4, height + 4))
    for a, b in [boxes[:2], *itertools.product(boxes[:2], boxes[2:])]:
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], (a, b)


def test_the_waterfalls_steps_add_up(tmp_path: Path) -> None:
    page = write(make_run(tmp_path, with_budgets()))
    found = svgs(page)[4:]
    assert len(found) == 2
    for svg, told in zip(found, with_budgets().budgets, strict=True):
        drawn = {(e.get("class"), str(e[0].text).split(":")[0]): e for e in svg.iter("rect")}
        steps = [e for (css, _), e in drawn.items() if css in ("bar c-more", "bar c-less")]
        (whole,) = (e for (_, name), e in drawn.items() if name == "all of it")
        assert len(steps) == len(told.steps) - 2
        total = math.log(told.steps[-1].perplexity / told.steps[1].perplexity)
        assert f"+{number(total)} nats" in str(whole[0].text)
        signed = [float(e.get("width") or 0) * (1 if e.get("class") == "bar c-more" else -1) for e in steps]
        drawn_nothing = sum(width == -1.5 for width in signed)  # freezing costs nothing, and shows as a line
        assert drawn_nothing == 1
        assert sum(signed) + 1.5 == pytest.approx(float(whole.get("width") or 0), abs=0.1)
    words = Page(page).words
    assert "The file is not what was frozen: lm_head" in words and words.count("no more than rounding apart") == 1
    assert "equal" in words, "the checkpoint is the trained forward, and the table says so"


def test_a_budget_survives_its_file_and_may_be_missing_from_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.save(with_budgets(), path)
    assert results.load(path) == with_budgets()
    document = json.loads(path.read_text())
    del document["budgets"]
    path.write_text(json.dumps(document))
    assert results.load(path) == example()


def test_a_budget_that_is_not_finite_is_named(tmp_path: Path) -> None:
    broken = budget("onnx")
    broken = replace(broken, steps=[*broken.steps[:-1], replace(broken.steps[-1], perplexity=math.inf)])
    assert "is not finite" in write(make_run(tmp_path, replace(example(), budgets=[broken])))


def test_each_device_has_its_own_plots(tmp_path: Path) -> None:
    phone = replace(example(), device="adb:R5", gates=[], measured=example().measured[1:5:3])
    html = write(make_run(tmp_path, phone, example()))
    assert html.index("Measured on local") < html.index("Measured on adb:R5")
    names = [element.get("id") for svg in svgs(html) for element in svg.iter() if element.get("id")]
    assert len(svgs(html)) == 7
    assert len(names) == len(set(names))


def test_missing_pieces_are_named(tmp_path: Path, messages: list[str]) -> None:
    bare = [
        Measured(row.name, row.target, row.runtime, row.size_bytes, row.perplexity, prompts=row.prompts)
        for row in example().measured
    ]
    run = make_run(tmp_path, replace(example(), measured=bare, gates=[], machine={}), whole=False)
    html = report([run]).read_text(encoding="utf-8")
    words = Page(html).words
    assert "Not measured: training.json is missing" in words
    assert "Not measured: no artifact was compared with its frozen checkpoint" in words
    assert "None were set." in words
    assert "not measured" in words
    assert any("training.json is missing" in line for line in messages)
    assert any("quantized" in line for line in messages)
    assert "times the perplexity" in words


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_few_models_do_not_crash(tmp_path: Path, kept: int) -> None:
    html = write(make_run(tmp_path, replace(example(), measured=example().measured[:kept]), whole=False))
    assert "No QAT artifact was measured" in html


@pytest.mark.parametrize("text", ["{", "[1]", '{"curve": 3}', '{"curve": []}', '{"curve": [{"step": 1}, 7]}'])
def test_odd_training_log_is_named(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, example())
    (tmp_path / "training.json").write_text(text)
    assert "Not measured: " in write(run)


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    rows = [replace(row, perplexity=math.inf, agreement=agreement(math.nan)) for row in example().measured]
    assert "not finite" in write(make_run(tmp_path, replace(example(), measured=rows)))
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_no_report_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="qat-edge validate"):
        report([make_run(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_damaged_report_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, example())
    (run.reports / "0.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        report([run])


def test_verdict_says_what_qat_keeps() -> None:
    judged = verdict(example())
    assert judged.headline == (
        "QAT keeps 96% to 98% of the exact match of the FP32 fine-tune at 16% to 22% of its size; "
        "round-to-nearest keeps 62% to 64%."
    )
    assert judged.notes == []
    assert judged.figures["qat_exact_match_kept"] == [0.8438 / 0.8594, 0.8281 / 0.8594]


def with_exact_match(qat: float, onnx: float | None = None, tuned: float = 0.8594) -> Report:
    by_target = {"executorch": qat, "onnx": qat if onnx is None else onnx}
    rows = [
        replace(row, exact_match=by_target[row.target]) if row.name == "qat"
        else replace(row, exact_match=tuned) if row.name == "fp32 fine-tuned" else row
        for row in example().measured
    ]  # fmt: skip
    return replace(example(), measured=rows)


def test_verdict_names_the_best_method_it_is_held_against() -> None:
    rows = [*example().measured, quantized("ptq (GPTQ)", "executorch", 0.7, 0.2, 164.0)]
    headline = verdict(replace(example(), measured=rows)).headline
    assert "; round-to-nearest, the best" in headline, "GPTQ lacks a target, so it is out of the running"
    rows.append(quantized("ptq (GPTQ)", "onnx", 0.7, 0.2, 120.0))
    judged = verdict(replace(example(), measured=rows))
    assert judged.headline.endswith("GPTQ, the best of the post-training methods measured, keeps 81%.")
    assert judged.figures["ptq_exact_match_kept"] == [0.7 / 0.8594] * 2


def test_every_method_has_a_row_of_its_own(tmp_path: Path) -> None:
    rows = [replace(row, name=row.name.replace("round-to-nearest", "HQQ")) for row in example().measured[2:4]]
    words = Page(write(make_run(tmp_path, replace(example(), measured=[*example().measured, *rows])))).words
    assert "RTN · ONNX" in words and "HQQ · ONNX" in words


def test_verdict_is_honest_where_qat_is_worse() -> None:
    assert verdict(with_exact_match(0.2)).headline.startswith("QAT gains nothing here")
    assert "depends on the target" in verdict(with_exact_match(0.8, onnx=0.2)).headline
    assert "reaches" in verdict(with_exact_match(0.9)).headline
    assert "cannot tell" in verdict(with_exact_match(0.56)).notes[0]
    unanswered = verdict(with_exact_match(0.0, tuned=0.0))
    assert "times the perplexity" in unanswered.headline
    assert "none of the prompts" in unanswered.notes[0]


def test_numbers_as_written() -> None:
    written = [number(v) for v in (0, 0.03124, 17.34, 165.4, 1053.2, 999.9, 538_060, 2.4e-7, -0.5, math.nan)]
    assert written == ["0", "0.0312", "17.3", "165", "1,053", "1,000", "538,060", "2.4×10⁻⁷", "-0.500", "not finite"]
    assert [percent(v) for v in (0, 0.8438, 0.99999, 1)] == ["0%", "84.4%", "99.99%", "100%"]
    assert [whole_percent(v) for v in (0.184, 0.996, 1.03)] == ["18%", "99%", "103%"]


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0, 1250, 5) == [0, 250, 500, 750, 1000, 1250]
    assert linear_ticks(0, 0.3, 5) == [0, 0.1, 0.2, 0.3]
    assert log_ticks(0.05, 4, 7) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(1, 1e9, 4)[0] == 1


def test_thinning_keeps_the_extremes() -> None:
    points = [(float(step), math.sin(step)) for step in range(50_000)]
    points[777] = (777.0, 9.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert (777.0, 9.0) in kept
    assert kept == sorted(kept)


def test_long_training_stays_small(tmp_path: Path) -> None:
    run = make_run(tmp_path, example())
    (tmp_path / "training.json").write_text(json.dumps({"curve": curve(20_000, 10_000)}))
    assert len(write(run).encode()) < 300_000


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_renders_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    check_renders(report([make_run(tmp_path, with_budgets())]), width, dark)


def test_what_verify_found_is_shown_while_the_artifact_is_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", example())
    row = {"folder": "exports/onnx", "linears": 14, "linears_equal": 14, "embedding_equal": True, "head_equal": True}
    row |= {"faults": [], "manifest_sha256": sha256(run.exports / "onnx" / MANIFEST)}
    run.verified.write_text(json.dumps([row]))
    assert "14 of 14 linear layers" in write(run)
    (run.exports / "onnx" / MANIFEST).unlink()
    write_manifest(run.exports / "onnx", "export", target="onnx", options={"context_length": 512}, wall_s=3.5)
    page = write(run)
    assert "14 of 14 linear layers" not in page and "exported again since" in page


def test_a_head_that_shares_the_embeddings_table_says_so() -> None:
    table = parts([quantized("QAT", target, 0.7, 0.02, 100.0) for target in ("executorch", "onnx")])
    place = [name for name, _ in table.heads].index("head")
    assert [row.cells[place].text for row in table.rows] == ["28.5", "in embedding"]
