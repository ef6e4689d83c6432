"""JSON files of validate: they keep their keys, whatever the fields are called in code."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from pages import example
from qat_edge.errors import RunError
from qat_edge.evaluate import encoder_results, results
from qat_edge.evaluate.encoder_results import ACCURACY, EncoderReport, EncoderResult
from qat_edge.evaluate.results import (
    Agreement,
    Budget,
    FaultTest,
    Gate,
    Measurement,
    Part,
    Report,
    SchemaResult,
    Speed,
    Spread,
    Step,
)

AGREEMENT = Agreement(64, 0.05, 0.9, 20.0)
TIMES = Spread(2.0, 1.0, 3.0)


def report() -> Report:
    """A report in which every field is set."""
    qat = Measurement(
        "qat", "onnx", "onnxruntime", {"linears": 5}, 11.0, AGREEMENT, AGREEMENT, 0.8, 4, 1.5,
        Speed(2, 8, 4, 2, TIMES, TIMES, TIMES, 1.0, 2.0), 300, 100, 0.5, 3.0, ("a note",),
        schema=SchemaResult(4, 1, 2, "not JSON", 3, 1, ""),
    )  # fmt: skip
    budget = Budget(
        target="onnx",
        fault_test=FaultTest(exceeds_noise=True, chance=0.98, position=1, location="layer 0"),
        frozen_divergence="layer 1",
        steps=[Step("FP32 base", 20.0, AGREEMENT, None)],
        parts=[Part("weights", 12.0, AGREEMENT)],
        floor=[AGREEMENT],
        floor_nats=[0.001],
    )
    gate = Gate("--max-kl", 0.1, "qat, onnx", 0.05, True, "why")
    machine, options = {"cores": 2}, {"tokens": 64}
    return Report("now", "local", machine, options, 64, AGREEMENT, [qat], [gate], [budget], {"tokens": "abc"})


def encoder_report() -> EncoderReport:
    result = EncoderResult("qat", "executorch", {"linears": 5}, 0.8, 0.99, 0.5, 0.95, 1.0)
    return EncoderReport("now", "local", {}, {}, "text-classification", ACCURACY, 2, 2, [result], [])


def test_a_report_survives_its_file_and_keeps_its_keys(tmp_path: Path) -> None:
    results.save(report(), tmp_path / "local.json")
    assert results.load(tmp_path / "local.json") == report()
    document = json.loads((tmp_path / "local.json").read_text())
    assert list(document) == [
        "format", "created", "device", "machine", "options", "tokens", "noise_floor", "measured", "gates", "budgets",
        "identities",
    ]  # fmt: skip
    (budget,) = document["budgets"]
    assert list(budget) == ["target", "judged", "converted", "steps", "parts", "floor", "floor_nats"]
    assert budget["judged"] == {"beyond": True, "chance": 0.98, "position": 1, "where": "layer 0"}
    assert document["measured"][0]["speed"]["prefill"] == {"median": 2.0, "least": 1.0, "greatest": 3.0}


def test_reports_of_earlier_versions_have_no_schema(tmp_path: Path) -> None:
    path = tmp_path / "local.json"
    results.save(report(), path)
    document = json.loads(path.read_text())
    schema = document["measured"][0].pop("schema")
    path.write_text(json.dumps(document))
    assert results.load(path).measured[0].schema is None
    # No more valid answers than answers.
    for key in ("valid", "constrained"):
        document["measured"][0]["schema"] = {**schema, key: 5}
        path.write_text(json.dumps(document))
        with pytest.raises(RunError, match=r"damaged .*of 4 answers are valid"):
            results.load(path)


def test_an_encoders_report_survives_its_file_and_keeps_its_keys(tmp_path: Path) -> None:
    encoder_results.save(encoder_report(), tmp_path / "answers.json")
    assert encoder_results.load(tmp_path / "answers.json") == encoder_report()
    assert list(json.loads((tmp_path / "answers.json").read_text())) == [
        "format", "created", "device", "machine", "options", "kind", "measure", "rows", "texts", "answered", "gates",
    ]  # fmt: skip


def test_an_unknown_key_is_damage(tmp_path: Path) -> None:
    document = {"format": encoder_results.FORMAT, **results.to_json(encoder_report()), "more": 1}
    (tmp_path / "answers.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=r"answers\.json: damaged .*'more'"):
        encoder_results.load(tmp_path / "answers.json")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("perplexity", -5, r"measured\[2\]\.perplexity is -5, expected at least 0"),
        ("exact_match", 7.5, r"measured\[2\]\.exact_match is 7\.5, expected from 0 to 1"),
        ("memory_bytes", -1, r"measured\[2\]\.memory_bytes is -1"),
    ],
)
def test_figures_out_of_range_are_damage(tmp_path: Path, key: str, value: float, message: str) -> None:
    path = tmp_path / "local.json"
    results.save(example(), path)
    document = json.loads(path.read_text())
    document["measured"][2][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=message):
        results.load(path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["measured", 2, "speed", "decode", "greatest"], math.nan),
        (["measured", 2, "speed", "prefill", "least"], math.nan),
        (["measured", 2, "speed", "first_token_ms", "median"], math.inf),
        (["measured", 2, "load_ms"], math.nan),
        (["measured", 2, "exact_match"], math.nan),
        (["measured", 2, "same_answers"], math.nan),
        (["measured", 2, "first_divergence"], math.nan),
        (["measured", 2, "perplexity"], math.nan),
        (["measured", 1, "perplexity"], math.nan),
        (["measured", 2, "agreement", "kl_nats"], math.nan),
        (["measured", 2, "agreement", "top1"], math.nan),
        (["measured", 2, "parity", "sqnr_db"], math.nan),
        (["noise_floor", "kl_nats"], math.nan),
        (["budgets", 0, "steps", 0, "perplexity"], math.nan),
        (["budgets", 0, "parts", 0, "perplexity"], math.nan),
        (["budgets", 0, "judged", "chance"], math.nan),
        (["gates", 0, "limit"], math.nan),
        (["gates", 0, "found"], math.nan),
    ],
)
def test_nan_is_damage_where_validate_never_writes_it(tmp_path: Path, keys: list[Any], value: float) -> None:
    path = tmp_path / "local.json"
    results.save(dataclasses.replace(example(), budgets=report().budgets), path)
    document = json.loads(path.read_text())
    assert document["gates"][0]["passed"]
    *parents, last = keys
    entry = document
    for key in parents:
        entry = entry[key]
    entry[last] = value
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=rf"local.json: damaged \(.*{last} is (nan|inf).*Run validate again"):
        results.load(path)


def test_figures_of_logits_that_are_not_finite_are_nan_together(tmp_path: Path) -> None:
    whole = report()
    nowhere = Agreement(64, math.nan, math.nan, math.nan)
    row = dataclasses.replace(whole.measured[0], perplexity=math.nan, agreement=nowhere, not_finite="some logits")
    silent = dataclasses.replace(whole.measured[0], perplexity=math.nan, agreement=None, parity=None)
    missed = Gate("--max-kl", 0.1, "qat, onnx", math.nan, False, "not finite")
    results.save(dataclasses.replace(whole, measured=[row, silent], gates=[missed]), tmp_path / "local.json")
    assert [math.isnan(m.perplexity) for m in results.load(tmp_path / "local.json").measured] == [True, True]
