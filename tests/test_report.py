"""The report page: every figure it shows is one of the JSON, nothing in it is executed or fetched."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from qat_edge import cli, config
from qat_edge.config import FinetuneOptions
from qat_edge.errors import RunError, UsageError
from qat_edge.measure import results
from qat_edge.measure.results import (
    Agreement,
    Budget,
    Gate,
    Judgement,
    Measured,
    Part,
    Report,
    Speed,
    Spread,
    Step,
)
from qat_edge.report import report
from qat_edge.report.charts import linear_ticks, log_ticks, thin
from qat_edge.report.collect import collect
from qat_edge.report.figures import number, percent, whole_percent
from qat_edge.report.history import Entry, History, history
from qat_edge.report.tables import COLUMNS
from qat_edge.report.verdict import verdict
from qat_edge.run import MANIFEST, Run, sha256, write_manifest

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\x1b"
SIZES = {"linears": 53_084_160, "scales": 6_635_520, "embedding": 28_508_160, "head": 28_508_160, "graph": 512_000}


def agreement(kl_nats: float) -> Agreement:
    return Agreement(tokens=2048, kl_nats=kl_nats, top1=1 - kl_nats, sqnr_db=21.7)


def spread(median: float) -> Spread:
    return Spread(median, median * 0.97, median * 1.02)


def quantized(name: str, target: str, exact_match: float, kl_nats: float, decode: float) -> Measured:
    return Measured(
        name=name,
        target=target,
        runtime=f"{target} 1.0",
        size_bytes=SIZES if target == "executorch" else {**SIZES, "head": 0},
        perplexity=18 + 10 * kl_nats,
        agreement=agreement(kl_nats),
        parity=agreement(0.0221),
        exact_match=exact_match,
        prompts=64,
        same_answers=exact_match - 0.125,
        first_divergence=11.5,
        load_ms=402.5,
        speed=Speed(2, 128, 64, 5, spread(decode * 6.5), spread(decode), spread(124.25)),
        memory_bytes=344_000_000,
        runtime_bytes=104_000_000,
    )


def example() -> Report:
    float_bytes = {"float": 538_060_032}
    return Report(
        created="2026-01-02 03:04",
        device="local",
        machine={"cpu": "x86", "memory_bytes": 16_400_000_000},
        options={"tokens": 2048, "max_kl": 0.1},
        tokens=2048,
        noise_floor=agreement(0.0233),
        measured=[
            Measured("fp32 base", "torch", "torch 2.13", float_bytes, 21.9, agreement(0.9), None, 0.0156, 64),
            Measured("fp32 fine-tuned", "torch", "torch 2.13", float_bytes, 17.3, None, None, 0.8594, 64),
            quantized("ptq (round-to-nearest)", "executorch", 0.5469, 0.412, 164.2),
            quantized("ptq (round-to-nearest)", "onnx", 0.5313, 0.409, 118.9),
            quantized("qat", "executorch", 0.8438, 0.0672, 165.0),
            replace(quantized("qat", "onnx", 0.8281, 0.0668, 120.4), notes=("int8 activations on x86",)),
        ],
        gates=[
            Gate("--max-kl", 0.1, "qat executorch", 0.0672, True),
            Gate("--min-exact-match", 0.9, "qat onnx", 0.8281, False),
        ],
    )


def budget(target: str) -> Budget:
    """Perplexities and KL of each step; the checkpoint is the trained forward, bit for bit."""
    states = [
        ("FP32 base", 21.9, 0.9, None),
        ("FP32 fine-tuned", 17.3, None, 0.9),
        ("trained forward, fake-quantized", 18.1, 0.065, 0.065),
        ("frozen checkpoint", 18.1, 0.065, 0.0),
        ("inputs rounded per block, as ONNX Runtime does on x86", 17.9, 0.061, 0.018),
        ("artifact on this machine", 18.0, 0.063, 0.021),
        ("artifact on the device", 18.05, 0.0631, 0.0221),
    ]
    steps = [
        Step(
            name, perplexity, kl and agreement(kl), None if change is None else replace(agreement(change), sqnr_db=None)
        )
        for name, perplexity, kl, change in states
        if target == "onnx" or "block" not in name
    ]
    parts = [Part(name, 17.4 + kl, agreement(kl)) for name, kl in (("weights", 0.021), ("activations", 0.052))]
    where = "The file is not what was frozen: lm_head" if target == "executorch" else ""
    judged = Judgement(bool(where), 0.98 if where else 0.52, 0 if where else None, where)
    return Budget(target, judged, "", steps, parts, [agreement(0.0233), agreement(0.0219)], [0.004, -0.006])


def curve(steps: int, start: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        phase = "lora" if step <= start else "qat"
        rows.append({"step": step, "loss": 3 * math.exp(-step / 10) + 0.1, "learning_rate": 1e-3, "phase": phase})
        if step in (start, steps):
            rows.append({"step": step, "eval_loss": 0.25, "phase": phase})
    return rows


def make_run(folder: Path, *reports: Report, whole: bool = True) -> Run:
    """A run folder; `whole` with the training log and manifests, otherwise the reports alone."""
    run = Run(folder)
    config.save(run.config, "finetune", FinetuneOptions(model="org/tiny-model", data="rows.jsonl"))
    for index, one in enumerate(reports):
        results.save(one, run.reports / f"{index}.json")
    if whole:
        log = {"run": str(folder), "steps": 40, "qat_start_step": 20, "wall_s": 542.1, "truncated_rows": 3}
        log |= {"peak_memory_bytes": 2_310_000_000, "device": "CPU (2 threads)", "curve": curve(40, 20)}
        (folder / "training.json").write_text(json.dumps(log))
        run.quantized.mkdir()
        identity = {"kind": "hub", "name": "org/tiny-model"}
        write_manifest(run.quantized, "quantized", model={"source": "x", "identity": identity}, seed=0)
        for variant in (run, run.ptq("rtn")):
            artifact = variant.exports / "onnx"
            artifact.mkdir(parents=True)
            (artifact / "model.onnx").write_bytes(b"x")
            write_manifest(artifact, "export", target="onnx", options={"context_length": 256}, wall_s=3.5)
    return run


def write(run: Run) -> str:
    return report([run], lambda text: None).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags with their attributes, visible text, and (value, text) of each <data>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.data: list[tuple[float, str]] = []
        self._value: float | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "data" and (value := dict(attrs).get("value")) is not None:
            self._value = float(value)

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._value is not None:
            self.data.append((self._value, data))
            self._value = None


def numbers_in(document: Any) -> set[float]:
    if isinstance(document, dict):
        return set().union(*map(numbers_in, document.values())) if document else set()
    if isinstance(document, list):
        return set().union(*map(numbers_in, document)) if document else set()
    return {float(document)} if isinstance(document, int | float) and not isinstance(document, bool) else set()


def svgs(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL)]


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
    for tag, attributes in Page(page).tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page
    assert len(page.encode()) < 300_000


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
    test_nothing_is_fetched_or_executed(html)
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


def with_budgets() -> Report:
    return replace(example(), budgets=[budget("executorch"), budget("onnx")])


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


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    bare = [
        Measured(row.name, row.target, row.runtime, row.size_bytes, row.perplexity, prompts=row.prompts)
        for row in example().measured
    ]
    said: list[str] = []
    run = make_run(tmp_path, replace(example(), measured=bare, gates=[], machine={}), whole=False)
    html = report([run], said.append).read_text(encoding="utf-8")
    words = Page(html).words
    assert "Not measured: training.json is missing" in words
    assert "Not measured: no artifact was compared with its frozen checkpoint" in words
    assert "None were set." in words
    assert "not measured" in words
    assert any("training.json is missing" in line for line in said)
    assert any("quantized" in line for line in said)
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
        report([make_run(tmp_path)], print)
    assert not (tmp_path / "report.html").exists()


def test_damaged_report_is_an_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, example())
    (run.reports / "0.json").write_text("{}")
    with pytest.raises(RunError, match="damaged"):
        report([run], print)


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


# --- several runs ------------------------------------------------------------------------------------------

SAME = {"tokens": "t", "prompts": "p", "reference": "r"}


def later(gain: float, **changes: Any) -> Report:
    """The example with QAT's ONNX folder better: less perplexity, more exact matches and tokens per second."""
    rows = [
        replace(
            row, perplexity=row.perplexity * (1 - gain), exact_match=(row.exact_match or 0) + gain,
            speed=row.speed and replace(row.speed, decode=spread(row.speed.decode.median * (1 + gain))),
        ) if (row.name, row.target) == ("qat", "onnx") else row
        for row in example().measured
    ]  # fmt: skip
    machine = {"machine": "x86_64", "cpu_model": "a", "cores": 2, "free_disk_bytes": int(1e9 * gain)}
    return replace(example(), **{"measured": rows, "machine": machine, "identities": SAME} | changes)


def make_runs(folder: Path, *reports: Report) -> list[Run]:
    runs = []
    for index, one in enumerate(reports):
        (folder / f"run {index}").mkdir(parents=True)
        runs.append(make_run(folder / f"run {index}", one))
    return runs


def history_of(runs: list[Run]) -> History:
    return history([Entry(run.path.name, collect(run)) for run in runs])


def qat_onnx(found: History, figure: str) -> list[Any]:
    (series,) = (s for s in found.series if (s.model.name, s.model.target) == ("qat", "onnx"))
    return series.figures[figure]


def test_a_figure_changes_from_the_run_before_and_from_the_first(tmp_path: Path) -> None:
    found = history_of(make_runs(tmp_path, later(0), later(0.1), later(0.05)))
    for name, sign in (("Perplexity", -1), ("Exact match", 1), ("Decode", 1)):
        first, second, third = qat_onnx(found, name)
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
    # 64 prompts cannot tell a tenth, and the spread of the repeats is 5 percent.
    assert not qat_onnx(found, "Exact match")[1].before.clear
    assert decode[1].before.clear and not decode[2].before.clear


def test_a_run_that_lacks_a_figure_is_no_run_before(tmp_path: Path) -> None:
    unasked = [replace(row, exact_match=None) for row in later(0).measured]
    found = history_of(make_runs(tmp_path, later(0), later(0, measured=unasked), later(0.1)))
    _, second, third = qat_onnx(found, "Exact match")
    assert second.value is None and third.before.since == 0
    assert qat_onnx(found, "Perplexity")[2].before.since == 1


@pytest.mark.parametrize(
    ("changes", "apart", "words"),
    [
        ({"identities": SAME | {"tokens": "x"}}, {"Perplexity", "KL", "Top-1"}, "other evaluation tokens"),
        ({"identities": SAME | {"reference": "x"}}, {"KL", "Top-1"}, "another FP32 fine-tune to compare with"),
        ({"identities": SAME | {"prompts": "x"}}, {"Exact match"}, "other prompts"),
        ({"machine": {"machine": "x86_64", "cpu_model": "b", "cores": 2}}, {"Decode", "Prefill"}, "another machine"),
        ({"identities": {}}, {"Perplexity", "KL", "Top-1", "Exact match"}, "not recorded"),
    ],
)
def test_runs_that_do_not_compare_are_marked(
    tmp_path: Path, changes: dict[str, Any], apart: set[str], words: str
) -> None:
    runs = make_runs(tmp_path, later(0), later(0.1, **changes), later(0.2, **changes))
    found = history_of(runs)
    figures = next(s for s in found.series if (s.model.name, s.model.target) == ("qat", "onnx")).figures
    assert {name for name, points in figures.items() if points[1].before and points[1].before.amount is None} == apart
    # What was never recorded stays unknown between the later two; what is the same again compares.
    assert (qat_onnx(found, "Perplexity")[2].before.amount is None) is (not changes.get("identities", SAME))
    assert qat_onnx(found, min(apart))[2].first.amount is None
    html = report(runs, print).read_text(encoding="utf-8")
    shown = Page(html).words
    assert f"2 run 1 ≠ 1 run 0: {words}" in shown and "≠ 1" in shown
    broken = [svg for svg in svgs(html) if any(e.get("class") == "apart" for e in svg.iter("line"))]
    assert {svg[0].text for svg in broken} == {f"{name} by run" for name in apart}


def test_what_differs_between_neighbours_is_listed(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, later(0), later(0), later(0))
    config.save(runs[1].config, "finetune", FinetuneOptions(model="org/tiny-model", data="rows.jsonl", steps=7))
    manifest = json.loads((runs[1].quantized / MANIFEST).read_text())
    (runs[1].quantized / MANIFEST).write_text(json.dumps({**manifest, "libraries": {"torch": "9.9"}}))
    shutil.copytree(runs[1].path, runs[2].path, dirs_exist_ok=True)
    first, second = history_of(runs).differences
    told = {one.name: (one.before, one.after) for one in first}
    assert told["finetune · steps"] == ("200", "7") and told["version · torch"][1] == "9.9"
    assert all(name.startswith(("finetune · steps", "version · ")) for name in told)
    assert second == []
    shown = Page(report(runs, print).read_text()).words
    assert "200 → 7" in shown and "Nothing that was recorded." in shown


def test_the_page_of_several_runs_shows_what_its_json_holds(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, later(0), later(0.1), replace(later(0.2), device="ssh:pi"))
    page = report(runs, print)
    assert page == runs[-1].path / "history.html" and not runs[-1].report_html.exists()
    html = page.read_text(encoding="utf-8")
    test_nothing_is_fetched_or_executed(html)
    shown = Page(html).data
    assert len(shown) > 100
    assert {value for value, _ in shown} <= numbers_in(json.loads(page.with_suffix(".json").read_text()))
    names = [element.get("id") for svg in svgs(html) for element in svg.iter() if element.get("id")]
    assert len(names) == len(set(names)) == 2 * len(svgs(html)) == 2 * 2 * 7
    assert html.count('class="trend s-qat"') == 2 * 7, "of two artifacts and seven figures, from run 1 to run 2"


def test_hostile_text_in_several_runs_is_escaped(tmp_path: Path) -> None:
    rows = [replace(row, name=HOSTILE, target=HOSTILE, runtime=HOSTILE) for row in example().measured[2:3]]
    rows += [replace(row, perplexity=math.inf, speed=None) for row in example().measured[:2]]
    hostile = later(0, measured=rows, device=HOSTILE, created=HOSTILE, machine={HOSTILE: HOSTILE})
    runs = make_runs(tmp_path, hostile, replace(hostile, machine={}))
    page = report(runs, print)
    test_nothing_is_fetched_or_executed(page.read_text())
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
        answer = CliRunner().invoke(cli.main, ["report", *map(str, arguments)])
        assert answer.exit_code == code and words in answer.output.replace("\n", ""), answer.output
    assert [p.name for p in (tmp_path / "bare").iterdir()] == ["config.yaml"]
    with pytest.raises(UsageError, match="the oldest first"):
        report([runs[0], runs[0]], print)


@pytest.mark.browser
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_renders_in_a_browser(tmp_path: Path, width: int, dark: bool, several: bool) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    runs = make_runs(tmp_path, with_budgets(), later(0.1, identities={}))
    page = report(runs if several else runs[:1], print)
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000", f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert len(picture.read_bytes()) > 20_000


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
