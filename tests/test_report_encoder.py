"""Page of an encoder: its own metrics, each in the JSON, and none of those of a language model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pages import HOSTILE, Page, check_fits, check_renders, check_self_contained, make_run, numbers_in, svgs, write
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate import encoder_results
from qat_edge.evaluate.encoder_results import ACCURACY, CORRELATION, RETRIEVAL, EncoderReport, EncoderResult
from qat_edge.evaluate.results import Gate
from qat_edge.manifest import MANIFEST, sha256
from qat_edge.report.verdict import encoder_verdict
from qat_edge.run import Run
from qat_edge.verbs.report import report

PARTS = {"linears": 10_700_000, "scales": 1_300_000, "embedding": 12_000_000, "head": 0, "graph": 250_000}
# Words of a language model's page that an encoder's page must not have.
DECODER_METRICS = (
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


def artifact(name: str, quality: float, cosine: float) -> EncoderResult:
    """Return a quantized encoder with every metric set."""
    return EncoderResult(name, "executorch", PARTS, quality, cosine, cosine - 0.125, quality - 0.03, 0.999876)


def example(measure: str = ACCURACY) -> EncoderReport:
    """Return results of the FP32 fine-tune, QAT, RTN and GPTQ; only a classifier has labels to agree on."""
    tuned = EncoderResult("fp32 fine-tuned", "torch", {"linears": 43_000_000, "embedding": 48_000_000}, 0.9375)
    rows = [tuned, artifact("qat", 0.9219, 0.9931), artifact("ptq (round-to-nearest)", 0.8125, 0.9604)]
    rows.append(artifact("ptq (GPTQ)", 0.875, 0.9875))
    if measure != ACCURACY:
        rows = [replace(row, agreement=None) for row in rows]
    return EncoderReport(
        created="2026-01-02T03:04:05+00:00",
        device="local",
        machine={"cpu_model": "x86", "memory_bytes": 16_400_000_000},
        options={"eval_data": None, "min_cosine": 0.99},
        task="text-classification" if measure == ACCURACY else "sentence-similarity",
        measure=measure,
        rows=640,
        texts=640 if measure == ACCURACY else 1280,
        results=rows,
        gates=[
            Gate("--min-cosine", 0.99, "qat, executorch", 0.9931, True),
            Gate("--min-quality", 0.95, "qat, executorch", 0.9219, False),
        ],
    )


def run_with(folder: Path, comparison: EncoderReport) -> Run:
    """Write a run folder of an encoder."""
    run = make_run(folder, target="executorch")
    encoder_results.save(comparison, run.answers)
    return run


@pytest.mark.parametrize("measure", encoder_results.MEASURES)
def test_the_page_has_the_metrics_of_an_encoder_and_no_others(tmp_path: Path, measure: str) -> None:
    page = write(run_with(tmp_path, example(measure)))
    check_self_contained(page)
    shown, words = {value for value, _ in Page(page).data}, Page(page).words
    for row in example(measure).results:
        figures = (row.quality, row.cosine, row.least_cosine, row.agreement, row.parity, float(row.total_bytes))
        assert {figure for figure in figures if figure is not None} <= shown
    known = numbers_in(json.loads((tmp_path / "report.json").read_text()))
    sums = {float(row.total_bytes) for row in example().results} | {1.0}  # 1 file in an artifact
    assert shown <= known | sums
    assert measure.capitalize() in words and encoder_results.MEASURES[measure] in words
    assert ("Same label" in words) is (measure == ACCURACY)
    assert [word for word in DECODER_METRICS if word in words] == []
    # An encoder has no speed, and no chart of accuracy against size.
    titles = [svg[0].text for svg in svgs(page)]
    assert titles == ["Loss during training", "Size by part"]
    assert "✓ pass" in page and "✗ fail" in page and "0.9931" in words


def test_results_of_verify_are_shown(tmp_path: Path) -> None:
    run = run_with(tmp_path, example())
    row: dict[str, Any] = {"folder": "exports/executorch", "linears": 12, "linears_equal": 12, "embedding_equal": True}
    row |= {"head_equal": None, "faults": [], "manifest_sha256": sha256(run.exports / "executorch" / MANIFEST)}
    run.verified.write_text(json.dumps([row]))
    assert "12 of 12 linear layers equal, embedding equal<" in write(run)


def test_the_verdict_compares_qat_with_the_fine_tune_and_the_best_ptq_method() -> None:
    qat_verdict = encoder_verdict(example())
    assert qat_verdict.headline == (
        "QAT has an accuracy of 92.2% (FP32 fine-tune: 93.8%) and a mean cosine of 0.9931 with the outputs of the FP32 "
        "fine-tune, at 27% of its size; GPTQ, the best PTQ method measured, has 87.5% and 0.9875."
    )
    assert qat_verdict.notes == [] and qat_verdict.figures["qat_quality"] == [0.9219]
    found = example(CORRELATION)
    assert "a rank correlation of 0.922 (FP32 fine-tune: " in encoder_verdict(found).headline
    tuned, qat, _, best = found.results
    alone = encoder_verdict(replace(found, results=[tuned, qat]))
    assert alone.headline.endswith("at 27% of its size. No PTQ method was measured for comparison.")
    worse = replace(found, results=[tuned, replace(qat, quality=0.8, cosine=0.9), best])
    assert encoder_verdict(worse).headline.startswith("QAT is no better than post-training quantization here: it has ")
    mixed = replace(found, results=[tuned, replace(qat, cosine=0.9), best])
    assert encoder_verdict(mixed).headline.endswith("so which is better depends on the metric.")
    assert encoder_verdict(replace(found, results=[tuned, best])).headline.startswith("No artifact of the run's own")
    (note,) = encoder_verdict(replace(example(RETRIEVAL), rows=100)).notes
    assert note.startswith(
        "With 100 rows, the difference in retrieval accuracy between QAT and GPTQ is not significant (95% confidence)"
    )


def test_two_targets_are_compared_target_by_target(tmp_path: Path) -> None:
    found = example()
    tuned, *rows = found.results
    onnx = [replace(row, target="onnx", quality=row.quality + 0.01, cosine=(row.cosine or 0) - 0.01) for row in rows]
    both = replace(found, results=[tuned, *rows, *onnx])
    conclusion = encoder_verdict(both)
    assert conclusion.headline == (
        "QAT has an accuracy of 92.2% to 93.2% (FP32 fine-tune: 93.8%) and a mean cosine of 0.9831 to 0.9931 with the "
        "outputs of the FP32 fine-tune, at 27% of its size; GPTQ, the best PTQ method measured, has 87.5% to 88.5% and "
        "0.9775 to 0.9875."
    )
    assert conclusion.figures["qat_quality"] == pytest.approx([0.9219, 0.9319])

    # A method is compared on the targets that QAT was measured on, and QAT has to be better on each of them.
    other = replace(rows[2], target="executorch-vulkan", quality=1.0)
    assert encoder_verdict(replace(both, results=[*both.results, other])) == conclusion
    worse = replace(onnx[0], quality=0.5)
    mixed = encoder_verdict(replace(both, results=[tuned, *rows, worse, *onnx[1:]]))
    assert mixed.headline.endswith("so which is better depends on the metric.")
    page = Page(write(run_with(tmp_path, both)))
    assert "QAT · ExecuTorch" in page.words and "QAT · ONNX" in page.words


def test_hostile_text_and_metrics_that_are_not_finite(tmp_path: Path) -> None:
    rows = [
        replace(example().results[1], cosine=math.nan),
        replace(example().results[0], name=HOSTILE, target=HOSTILE),
    ]
    hostile = replace(example(), device=HOSTILE, created=HOSTILE, results=[example().results[0], *rows])
    hostile = replace(hostile, machine={HOSTILE: HOSTILE}, gates=[Gate(HOSTILE, 0.1, HOSTILE, math.nan, False)])
    page = write(run_with(tmp_path, hostile))
    check_self_contained(page)
    assert "<script>alert(1)</script>" in Page(page).words and "not finite" in page
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))


def test_a_damaged_file_and_a_history_of_encoders_are_errors(tmp_path: Path) -> None:
    run = run_with(tmp_path / "one", example())
    other = run_with(tmp_path / "other", example())
    with pytest.raises(UsageError, match="has an encoder; a history is of models that generate text"):
        report([run, other])
    run.answers.write_text(json.dumps({"kind": "text-classification"}))
    with pytest.raises(RunError, match=r"answers\.json: damaged .*Run validate again"):
        report([run])
    assert not run.report_html.exists() and not (other.path / "history.html").exists()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_renders_in_a_browser(tmp_path: Path, width: int, dark: bool) -> None:
    check_renders(report([run_with(tmp_path, example())]), width, dark)


@pytest.mark.browser
def test_its_tables_fit_a_window_of_1200_pixels(tmp_path: Path) -> None:
    check_fits(report([run_with(tmp_path, example())]), 1200)
