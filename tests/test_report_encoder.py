"""The page of an encoder: its own figures, each one of the JSON, and none of a model that generates text."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pages import HOSTILE, Page, check_renders, check_self_contained, make_run, numbers_in, svgs, write
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate import encoder_results
from qat_edge.evaluate.encoder_results import ACCURACY, CORRELATION, RETRIEVAL, Answered, Comparison
from qat_edge.evaluate.results import Gate
from qat_edge.report.verdict import of_encoder
from qat_edge.run import MANIFEST, Run, sha256
from qat_edge.verbs.report import report

PARTS = {"linears": 10_700_000, "scales": 1_300_000, "embedding": 12_000_000, "head": 0, "graph": 250_000}
DECODERS = (
    "erplexity",
    "tok/s",
    "tokens/s",
    "per token",
    "Decode",
    "Prefill",
    "First token",
    "Exact match",
    "KL",
    "Context",
)


def artifact(name: str, quality: float, cosine: float) -> Answered:
    return Answered(name, "executorch", PARTS, quality, cosine, cosine - 0.125, quality - 0.03, 0.999876)


def example(measure: str = ACCURACY) -> Comparison:
    tuned = Answered("fp32 fine-tuned", "torch", {"linears": 43_000_000, "embedding": 48_000_000}, 0.9375)
    rows = [tuned, artifact("qat", 0.9219, 0.9931), artifact("ptq (round-to-nearest)", 0.8125, 0.9604)]
    rows.append(artifact("ptq (GPTQ)", 0.875, 0.9875))
    if measure != ACCURACY:
        rows = [replace(row, agreement=None) for row in rows]
    return Comparison(
        created="2026-01-02T03:04:05+00:00",
        device="local",
        machine={"cpu_model": "x86", "memory_bytes": 16_400_000_000},
        options={"eval_data": None, "min_cosine": 0.99},
        kind="text-classification" if measure == ACCURACY else "sentence-similarity",
        measure=measure,
        rows=640,
        texts=640 if measure == ACCURACY else 1280,
        answered=rows,
        gates=[
            Gate("--min-cosine", 0.99, "qat, executorch", 0.9931, True),
            Gate("--min-quality", 0.95, "qat, executorch", 0.9219, False),
        ],
    )


def run_with(folder: Path, comparison: Comparison) -> Run:
    run = make_run(folder, target="executorch")
    encoder_results.save(comparison, run.answers)
    return run


@pytest.mark.parametrize("measure", encoder_results.MEASURES)
def test_the_page_has_the_figures_of_an_encoder_and_no_others(tmp_path: Path, measure: str) -> None:
    page = write(run_with(tmp_path, example(measure)))
    check_self_contained(page)
    shown, words = {value for value, _ in Page(page).data}, Page(page).words
    for row in example(measure).answered:
        figures = (row.quality, row.cosine, row.least_cosine, row.agreement, row.parity, float(row.total_bytes))
        assert {figure for figure in figures if figure is not None} <= shown
    known = numbers_in(json.loads((tmp_path / "report.json").read_text()))
    sums = {float(row.total_bytes) for row in example().answered} | {1.0}  # 1 file in an artifact
    assert shown <= known | sums
    assert measure.capitalize() in words and encoder_results.MEASURES[measure] in words
    assert ("Same label" in words) is (measure == ACCURACY)
    assert [word for word in DECODERS if word in words] == []
    titles = [svg[0].text for svg in svgs(page)]
    assert titles == ["Loss during training", "Size by part"]
    assert "✓ pass" in page and "✗ fail" in page and "0.9931" in words


def test_what_verify_found_is_shown(tmp_path: Path) -> None:
    run = run_with(tmp_path, example())
    row: dict[str, Any] = {"folder": "exports/executorch", "linears": 12, "linears_equal": 12, "embedding_equal": True}
    row |= {"head_equal": None, "faults": [], "manifest_sha256": sha256(run.exports / "executorch" / MANIFEST)}
    run.verified.write_text(json.dumps([row]))
    assert "12 of 12 linear layers, embedding equal<" in write(run)


def test_the_verdict_says_what_qat_keeps_and_what_it_gains() -> None:
    judged = of_encoder(example())
    assert judged.headline == (
        "QAT has an accuracy of 92.2% where the FP32 fine-tune has 93.8%, and a mean cosine of 0.9931 with its "
        "answers, at 27% of its size; GPTQ, the best of the post-training methods measured, has 87.5% and 0.9875."
    )
    assert judged.notes == [] and judged.figures["qat_quality"] == [0.9219]
    found = example(CORRELATION)
    assert "a rank correlation of 0.922 where" in of_encoder(found).headline
    tuned, qat, _, best = found.answered
    alone = of_encoder(replace(found, answered=[tuned, qat]))
    assert alone.headline.endswith("at 27% of its size. No post-training method was measured beside it.")
    worse = replace(found, answered=[tuned, replace(qat, quality=0.8, cosine=0.9), best])
    assert of_encoder(worse).headline.startswith("QAT gains nothing here: ")
    mixed = replace(found, answered=[tuned, replace(qat, cosine=0.9), best])
    assert of_encoder(mixed).headline.endswith("and which is better depends on the figure.")
    assert of_encoder(replace(found, answered=[tuned, best])).headline.startswith("No QAT artifact")
    (note,) = of_encoder(replace(example(RETRIEVAL), rows=100)).notes
    assert note.startswith("100 rows cannot tell the retrieval accuracy of QAT from that of GPTQ with 95% certainty")


def test_hostile_text_and_figures_that_are_not_finite(tmp_path: Path) -> None:
    rows = [
        replace(example().answered[1], cosine=math.nan),
        replace(example().answered[0], name=HOSTILE, target=HOSTILE),
    ]
    hostile = replace(example(), device=HOSTILE, created=HOSTILE, answered=[example().answered[0], *rows])
    hostile = replace(hostile, machine={HOSTILE: HOSTILE}, gates=[Gate(HOSTILE, 0.1, HOSTILE, math.nan, False)])
    page = write(run_with(tmp_path, hostile))
    check_self_contained(page)
    assert "<script>alert(1)</script>" in Page(page).words and "not finite" in page
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_a_damaged_file_and_a_history_are_named(tmp_path: Path) -> None:
    run = run_with(tmp_path / "one", example())
    other = run_with(tmp_path / "other", example())
    with pytest.raises(UsageError, match="holds an encoder; a history is of models that generate text"):
        report([run, other])
    run.answers.write_text(json.dumps({"kind": "text-classification"}))
    with pytest.raises(RunError, match=r"answers\.json: damaged .*Run validate again"):
        report([run])
    assert not run.report_html.exists() and not (other.path / "history.html").exists()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_renders_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    check_renders(report([run_with(tmp_path, example())]), width, dark)
