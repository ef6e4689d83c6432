"""Page of one run: every number on it is in the JSON, and nothing in it is executed or loaded."""

from __future__ import annotations

import io
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
from rich.console import Console

from pages import (
    HOSTILE,
    Page,
    agreement,
    budget,
    check_fits,
    check_renders,
    check_self_contained,
    curve,
    example,
    make_run,
    numbers_in,
    quantized,
    region_widths,
    svgs,
    write,
)  # fmt: skip
from qat_edge import config
from qat_edge.cli.terminal_tables import summary_table
from qat_edge.errors import RunError
from qat_edge.evaluate import results
from qat_edge.evaluate.deployments import TITLES, Deployment, DeploymentTable
from qat_edge.evaluate.results import Gate, Measurement, Parity, Report
from qat_edge.manifest import MANIFEST, sha256, write_manifest
from qat_edge.options import FinetuneOptions
from qat_edge.quant.ptq.method_names import PTQ_METHODS
from qat_edge.report import comparison_page
from qat_edge.report.charts import LINE, linear_ticks, log_ticks, marker, text_width, thin
from qat_edge.report.formatting import number, percent, whole_percent
from qat_edge.report.glossary import PTQ_TERMS, RUN_TERMS
from qat_edge.report.plots import SHAPES, loss_curve
from qat_edge.report.tables import COLUMNS, parts
from qat_edge.report.verdict import verdict
from qat_edge.verbs.report import report


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write(make_run(tmp_path, example()))


def test_every_number_on_the_page_is_in_the_json(page: str, tmp_path: Path) -> None:
    shown = Page(page).data
    document = json.loads((tmp_path / "report.json").read_text())
    known = numbers_in(document)

    # Sums, differences and ratios that the page computes: total size, memory without the runtime, KL / noise floor.
    for row in example().measured:
        known |= {float(row.total_bytes), 344_000_000.0 - 104_000_000.0, 0.0221 / 0.0233, 1.0}
    # The number of files in an artifact, and the noise floor relative to itself.
    known |= {1.0}

    assert len(shown) > 150
    assert {value for value, _ in shown} <= known


def test_text_is_the_value_rounded(page: str) -> None:
    for value, text in Page(page).data:
        digits = text.replace(",", "").split()[0].removesuffix("%")
        # The text is the value itself, a percentage, or in millions; the factor allows for binary fractions.
        half_a_digit = 0.5 * 10.0 ** -len(digits.partition(".")[2]) * 1.0001
        ways = (value, value * 100, value / 1e6)
        assert any(abs(float(digits) - way) <= half_a_digit for way in ways), (value, text)


def test_summary_has_every_metric_of_every_model(page: str) -> None:
    shown = {value for value, _ in Page(page).data}
    for row in example().measured:
        for column in COLUMNS:
            value = column.value(row)
            assert value is None or value in shown


def test_tiles_show_the_metrics_they_name(page: str) -> None:
    tiles = re.findall(r'tile-name"><b>QAT</b> (.*?)</span><span class="tile-figure">(.*?)</span>', page)
    assert tiles == [
        ("Exact match", "82.8–84.4%"), ("Perplexity", "18.7"), ("Size", "88.7–117 <small>MB</small>"),
        ("Decode", "120–165 <small>tokens/s</small>"),
    ]  # fmt: skip


def test_json_has_the_reports_and_the_verdict(page: str, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "report.json").read_text())
    saved = json.loads((tmp_path / "reports" / "0.json").read_text())
    device = document["devices"][0]
    assert {key: device[key] for key in saved if key != "format"} == {k: v for k, v in saved.items() if k != "format"}
    assert device["verdict"]["headline"] in page
    assert document["training"]["curve"] == curve(40, 20)
    # The page may be shared, so it does not show where the run is stored.
    assert str(tmp_path) not in page


def test_nothing_is_loaded_or_executed(page: str) -> None:
    check_self_contained(page)
    assert len(page.encode()) < 300_000


def with_budgets() -> Report:
    """Return the example with an error budget of each QAT artifact."""
    return replace(example(), budgets=[budget("executorch"), budget("onnx")])


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    # Every text of the report, the configuration and the training log is hostile.
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
    # Without its manifest, the name of the model comes from the configuration.
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
def test_labels_of_evaluations_overlap_neither_each_other_nor_a_point(losses: tuple[float, float], start: int) -> None:
    rows: list[dict[str, Any]] = [row for row in curve(100, start) if "loss" in row]
    for phase, step, loss in zip(("lora", "qat"), (start, 100), losses, strict=True):
        rows.append({"phase": phase, "step": step, "eval_loss": loss})
    svg = ET.fromstring(loss_curve("loss", rows))
    labels = [text for text in svg.iter("text") if "value" in text.get("class", "")]
    assert sorted(str(text.text) for text in labels) == sorted(map(number, losses))

    # Left, right, top and bottom of the labels, then of the points.
    boxes = []
    for text in labels:
        middle, baseline, wide = float(text.get("x", "")), float(text.get("y", "")), text_width(str(text.text))
        boxes.append((middle - wide / 2, middle + wide / 2, baseline - LINE + 2, baseline + 1))
    for point in svg.iter("circle"):
        left, height = float(point.get("cx", "")), float(point.get("cy", ""))
        boxes.append((left - 4, left + 4, height - 4, height + 4))

    # No two labels overlap, and no label overlaps a point.
    for a, b in [boxes[:2], *itertools.product(boxes[:2], boxes[2:])]:
        assert a[1] <= b[0] or b[1] <= a[0] or a[3] <= b[2] or b[3] <= a[2], (a, b)


def test_steps_of_the_error_budget_add_up(tmp_path: Path) -> None:
    page = write(make_run(tmp_path, with_budgets()))
    found = svgs(page)[4:]
    assert len(found) == 2
    for svg, reported in zip(found, with_budgets().budgets, strict=True):
        drawn = {(e.get("class"), str(e[0].text).split(":")[0]): e for e in svg.iter("rect")}
        steps = [e for (css, _), e in drawn.items() if css in ("bar c-more", "bar c-less")]
        (whole,) = (e for (_, name), e in drawn.items() if name == "total")
        # The base and the fine-tune are not steps of quantization.
        assert len(steps) == len(reported.steps) - 2
        total = math.log(reported.steps[-1].perplexity / reported.steps[1].perplexity)
        assert f"+{number(total)} nats" in str(whole[0].text)

        # Widths of the bars are proportional to the changes.
        signed = [float(e.get("width") or 0) * (1 if e.get("class") == "bar c-more" else -1) for e in steps]
        zero_width = sum(width == -1.5 for width in signed)  # freezing changes nothing, and is drawn as a thin line
        assert zero_width == 1
        assert sum(signed) + 1.5 == pytest.approx(float(whole.get("width") or 0), abs=0.1)
    words = Page(page).words
    assert "The file is not what was frozen: lm_head" in words and words.count("by rounding noise only") == 1
    assert "equal" in words, "the checkpoint equals the model in training"


def test_an_error_budget_is_read_back_and_is_optional(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results.save(with_budgets(), path)
    assert results.load(path) == with_budgets()
    document = json.loads(path.read_text())
    del document["budgets"]
    path.write_text(json.dumps(document))
    assert results.load(path) == example()


def test_an_error_budget_that_is_not_finite_is_reported(tmp_path: Path) -> None:
    broken = budget("onnx")
    broken = replace(broken, steps=[*broken.steps[:-1], replace(broken.steps[-1], perplexity=math.inf)])
    assert "is not finite" in write(make_run(tmp_path, replace(example(), budgets=[broken])))


def test_each_device_has_its_own_charts(tmp_path: Path) -> None:
    # The phone has three charts: the training curve is shown once, on the first device.
    phone = replace(example(), device="adb:R5", gates=[], measured=example().measured[1:5:3])
    html = write(make_run(tmp_path, phone, example()))
    assert html.index("Measured on local") < html.index("Measured on adb:R5")
    names = [element.get("id") for svg in svgs(html) for element in svg.iter() if element.get("id")]
    assert len(svgs(html)) == 7
    assert len(names) == len(set(names))


def test_missing_parts_are_listed_with_their_reasons(tmp_path: Path, messages: list[str]) -> None:
    # Only what validate always measures.
    bare = [
        Measurement(row.name, row.target, row.runtime, row.size_bytes, row.perplexity, prompts=row.prompts)
        for row in example().measured
    ]
    run = make_run(tmp_path, replace(example(), measured=bare, gates=[], machine={}), whole=False)
    html = report([run]).read_text(encoding="utf-8")
    words = Page(html).words
    assert "Not measured: training.json is missing" in words
    assert "Not measured: no artifact was compared with its frozen checkpoint" in words
    assert "No gates were set." in words
    assert "not measured" in words
    assert any("training.json is missing" in line for line in messages)
    assert any("quantized" in line for line in messages)
    assert "times the perplexity" in words


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_few_models_do_not_crash(tmp_path: Path, kept: int) -> None:
    html = write(make_run(tmp_path, replace(example(), measured=example().measured[:kept]), whole=False))
    assert "No artifact of the run&#39;s own model was measured" in html


@pytest.mark.parametrize("text", ["{", "[1]", '{"curve": 3}', '{"curve": []}', '{"curve": [{"step": 1}, 7]}'])
def test_damaged_training_log_is_reported(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, example())
    (tmp_path / "training.json").write_text(text)
    assert "Not measured: " in write(run)


GUARD = {
    "rows": 8, "start_loss": 0.0995, "best_loss": 0.0901, "best_step": 35, "result_loss": 0.0901, "result_step": 35,
    "evaluations": [{"step": 20, "loss": 0.0995}, {"step": 35, "loss": 0.0901}, {"step": 40, "loss": None}],
    "restarts": [{"step": 25, "reason": "the loss rose <b>"}], "stopped": {"step": 40, "reason": "again"},
    "moved": {"rms_steps": 0.0214, "codes_changed": 0.007, "rms_scale": 0.002}, "wall_s": 8.1, "share": 0.034,
}  # fmt: skip


def test_the_guard_of_qat_is_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, example())
    log = json.loads((tmp_path / "training.json").read_text()) | {"qat_guard": GUARD}
    (tmp_path / "training.json").write_text(json.dumps(log))
    words = " ".join(Page(write(run)).words.split())
    assert (
        "On 8 evaluation rows the loss was 0.0995 where QAT began and is 0.0901 in the result, of step 35. QAT "
        "diverged and was started again after step 25. QAT diverged, and training ended at step 40."
    ) in words
    for shown in (
        "loss where QAT began, step 20 0.0995",
        "loss at step 40 not a number",
        "best 0.0901, of step 35",
        "started again after step 25 the loss rose <b>",
        "ended at step 40 again",
        "weights moved by 0.0214 of a code's step",
        "codes changed 0.7%",
        "time 8.10 s, 3.4% of the training",
    ):
        assert shown.replace(" ", "") in words.replace(" ", ""), shown
    assert json.loads((tmp_path / "report.json").read_text())["training"]["qat_guard"] == GUARD


@pytest.mark.parametrize(
    "guard",
    [
        None, 7, [], {}, {"rows": HOSTILE, "start_loss": HOSTILE, "evaluations": HOSTILE, "restarts": 3, "stopped": 1},
        {"start_loss": 1.0, "result_loss": True, "evaluations": [1, {"loss": []}], "restarts": [HOSTILE, {}],
         "stopped": {}, "moved": {"rms_steps": HOSTILE}, "wall_s": HOSTILE},
    ],
)  # fmt: skip
def test_a_damaged_entry_of_the_guard_is_no_obstacle(tmp_path: Path, guard: Any) -> None:
    run = make_run(tmp_path, example())
    log = json.loads((tmp_path / "training.json").read_text()) | {"qat_guard": guard}
    (tmp_path / "training.json").write_text(json.dumps(log))
    check_self_contained(write(run))


def test_metrics_that_are_not_finite(tmp_path: Path) -> None:
    nowhere = replace(agreement(math.nan), sqnr_db=math.nan)
    rows = [
        replace(row, perplexity=math.inf)
        if row.target == "torch"
        else replace(row, perplexity=math.nan, agreement=nowhere)
        for row in example().measured
    ]
    assert "not finite" in write(make_run(tmp_path, replace(example(), measured=rows)))
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_a_run_without_reports_is_an_error_with_the_command_to_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="qat-edge validate"):
        report([make_run(tmp_path)])
    assert not (tmp_path / "report.html").exists()


def test_damaged_report_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, example())
    (run.reports / "0.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        report([run])


def test_verdict_reports_the_share_that_qat_keeps() -> None:
    found = verdict(example())
    assert found.headline == (
        "QAT keeps 96% to 98% of the exact match of the FP32 fine-tune at 16% to 22% of its size; "
        "round-to-nearest keeps 62% to 64%."
    )
    assert found.notes == []
    assert found.figures["qat_exact_match_kept"] == [0.8438 / 0.8594, 0.8281 / 0.8594]


def with_exact_match(qat: float, onnx: float | None = None, tuned: float = 0.8594) -> Report:
    """Return the example with another exact match of QAT and of the fine-tune. onnx: of QAT in ONNX, if different."""
    by_target = {"executorch": qat, "onnx": qat if onnx is None else onnx}
    rows = [
        replace(row, exact_match=by_target[row.target]) if row.name == "qat"
        else replace(row, exact_match=tuned) if row.name == "fp32 fine-tuned" else row
        for row in example().measured
    ]  # fmt: skip
    return replace(example(), measured=rows)


def test_verdict_names_the_best_ptq_method() -> None:
    rows = [*example().measured, quantized("ptq (GPTQ)", "executorch", 0.7, 0.2, 164.0)]
    headline = verdict(replace(example(), measured=rows)).headline
    assert "; round-to-nearest, the best" in headline, "GPTQ was not measured on every target"
    rows.append(quantized("ptq (GPTQ)", "onnx", 0.7, 0.2, 120.0))
    found = verdict(replace(example(), measured=rows))
    assert found.headline.endswith("GPTQ, the best PTQ method measured, keeps 81%.")
    assert found.figures["ptq_exact_match_kept"] == [0.7 / 0.8594] * 2


def test_every_ptq_method_has_its_own_row(tmp_path: Path) -> None:
    rows = [replace(row, name=row.name.replace("round-to-nearest", "HQQ")) for row in example().measured[2:4]]
    words = Page(write(make_run(tmp_path, replace(example(), measured=[*example().measured, *rows])))).words
    assert "RTN · ONNX" in words and "HQQ · ONNX" in words


def test_verdict_reports_that_qat_is_no_better() -> None:
    assert verdict(with_exact_match(0.2)).headline.startswith(
        "QAT is no better than post-training quantization here: it keeps "
    )
    assert "depends on the target" in verdict(with_exact_match(0.8, onnx=0.2)).headline
    assert "reaches" in verdict(with_exact_match(0.9)).headline
    assert "is not significant (95% confidence)" in verdict(with_exact_match(0.56)).notes[0]
    unsolved = verdict(with_exact_match(0.0, tuned=0.0))
    assert "times the perplexity" in unsolved.headline
    assert "none of the prompts" in unsolved.notes[0]


def test_number_formats() -> None:
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
    points[777] = (777.0, 9.0)  # above all others
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


def with_every_method() -> Report:
    """Return the example with a row for every PTQ method on both targets."""
    base = with_budgets()
    rows = [
        quantized(f"ptq ({title})", target, 0.6, 0.2, 150.0)
        for target in ("executorch", "onnx")
        for method, title in PTQ_METHODS.items()
        if method != "rtn"  # which the example has
    ]
    return replace(base, measured=[*base.measured, *rows])


@pytest.mark.browser
def test_the_main_table_fits_a_window_of_1200_pixels(tmp_path: Path) -> None:
    page = report([make_run(tmp_path, with_every_method())])
    check_fits(page, 1200)
    (main_table,) = (region for region in region_widths(page, 1200) if region.name.startswith("Compared on"))
    assert main_table.visible > 1000, "the table uses the width of the window"


@pytest.mark.browser
def test_the_table_of_deployments_fits_a_window_of_1200_pixels(tmp_path: Path) -> None:
    rows = [
        Deployment(name, target, quantized("qat", target, 0.5, 0.1, 150.0))
        for target in ("executorch", "onnx")
        for name in TITLES
    ]
    reference = example().measured[1]
    table = DeploymentTable("now", "org/model", "local", {}, {}, 2048, {}, reference, rows)
    page = tmp_path / "compare.html"
    page.write_text(comparison_page.render(table))
    check_fits(page, 1200)


def test_the_terminal_table_fits_80_columns() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as shown:
        console.print(summary_table(with_every_method()))
    assert "…" not in shown.get()
    assert "cd executorch" in shown.get() and "cd: coordinate descent" in shown.get()
    assert "1072" in shown.get(), "the prefill speed of QAT in ExecuTorch"


def test_the_glossary_explains_every_ptq_method(page: str) -> None:
    terms = [term for term, _ in RUN_TERMS]
    assert terms[terms.index("PTQ") + 1 :][: len(PTQ_METHODS)] == [term for term, _ in PTQ_TERMS]
    for title in PTQ_METHODS.values():
        assert any(title.lower() in term.lower() for term, _ in PTQ_TERMS)
    assert all(term in Page(page).words for term, _ in RUN_TERMS)


def test_results_of_verify_are_shown_until_the_artifact_changes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", example())
    row = {"folder": "exports/onnx", "linears": 14, "linears_equal": 14, "embedding_equal": True, "head_equal": True}
    row |= {"faults": [], "manifest_sha256": sha256(run.exports / "onnx" / MANIFEST)}
    run.verified.write_text(json.dumps([row]))
    assert "14 of 14 linear layers" in write(run)
    line = Parity(tokens=192, error_db=-52.0, noise_db=-50.0, chance=0.5, seconds=3.0).describe()
    row |= {"floats": 5, "floats_equal": 5, "parity_line": line}
    run.verified.write_text(json.dumps([row]))
    shown = write(run)
    assert (
        "5 of 5 norms and biases equal; parity -52 dB (noise floor -50 dB), fault chance 50% (equal: 50%), "
        "192 tokens in 3 s" in shown
    )
    run.verified.write_text(json.dumps([row | {"adapter": 28, "adapter_equal": 27}]))
    assert "5 of 5 norms and biases equal, adapter: 27 of 28 matrices equal; parity" in write(run)
    run.verified.write_text(json.dumps([row | {"adapter": 0, "adapter_equal": 0}]))
    assert "adapter: " not in write(run)

    # Exported again, with another context length: the results of verify no longer apply.
    (run.exports / "onnx" / MANIFEST).unlink()
    write_manifest(run.exports / "onnx", "export", target="onnx", options={"context_length": 512}, wall_s=3.5)
    page = write(run)
    assert "14 of 14 linear layers" not in page and "exported again since" in page


def test_a_head_that_shares_the_embedding_is_labeled() -> None:
    # ExecuTorch stores two tables, ONNX one.
    table = parts([quantized("QAT", target, 0.7, 0.02, 100.0) for target in ("executorch", "onnx")])
    column = [name for name, _ in table.heads].index("head")
    assert [row.cells[column].text for row in table.rows] == ["28.5", "in embedding"]


def test_figures_of_an_artifact_that_was_exported_again_are_called_outdated(
    tmp_path: Path, messages: list[str]
) -> None:
    run = make_run(tmp_path)
    artifact = run.exports / "onnx"
    frozen = {"quantized_sha256": sha256(run.quantized / MANIFEST)}
    write_manifest(artifact, "export", target="onnx", options={"context_length": 256}, **frozen)
    rows = [
        replace(row, artifact_sha256=sha256(artifact / MANIFEST)) if (row.name, row.target) == ("qat", "onnx") else row
        for row in example().measured
    ]
    results.save(replace(example(), measured=rows), run.reports / "0.json")
    assert "Outdated" not in write(run)

    # A new checkpoint, whose export is the old one.
    write_manifest(run.quantized, "quantized", model={"source": "x", "identity": {"name": "x"}}, seed=1)
    assert "qat, onnx (quantized again, but not exported again)" in Page(write(run)).words
    # Another context length, as `export --force --context-length 64` writes.
    write_manifest(artifact, "export", target="onnx", options={"context_length": 64})
    assert "qat, onnx (exported again)" in Page(write(run)).words
    assert any("measured on local: Outdated" in line for line in messages)
    shutil.rmtree(artifact)
    assert "qat, onnx (removed)" in Page(write(run)).words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {}, "expected a list, found dict of 0"),
        (lambda row: [3], "row 0 is 3, expected an object"),
        (lambda row: [{key: value for key, value in row.items() if key != "faults"}], "row 0 has no 'faults'"),
        (lambda row: [row | {"linears": "x"}], "'linears' of row 0 is 'x'"),
        (lambda row: [row | {"folder": "a" * 5000}], "artifacts were exported again"),
    ],
)
def test_damaged_results_of_verify_are_left_out_with_the_reason(
    tmp_path: Path, messages: list[str], change: Any, message: str
) -> None:
    run = make_run(tmp_path, example())
    row = {"folder": "exports/onnx", "linears": 14, "linears_equal": 14, "embedding_equal": True, "head_equal": True}
    row |= {"faults": [], "manifest_sha256": sha256(run.exports / "onnx" / MANIFEST)}
    run.verified.write_text(json.dumps(change(row)))
    assert "14 of 14 linear layers" not in write(run)
    assert any("verified" in line and message in line for line in messages), messages


def test_the_marker_of_every_target_can_be_drawn() -> None:
    root = ET.Element("svg")
    for shape in SHAPES.values():
        marker(root, 10, 10, shape, "point", shape)
    drawn = {shape: element.get("points") for shape, element in zip(SHAPES.values(), root, strict=True)}
    assert len(set(drawn.values())) == len(drawn)
    # A legend draws each of them by a rule of its own.
    style = (Path(comparison_page.__file__).parent / "style.css").read_text()
    assert all(f".legend .l-{shape} {{" in style for shape in set(SHAPES.values()) - {"square"})
