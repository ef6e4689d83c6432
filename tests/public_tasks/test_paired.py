"""Intervals and differences on the same questions, and their file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from qat_edge.errors import RunError
from qat_edge.public_tasks import answer_records, paired
from qat_edge.public_tasks.answer_records import Answered, SourceAnswers, TaskAnswers


def answers(scores: list[float], weights: list[float] | None = None) -> list[Answered]:
    weights = weights or [1.0] * len(scores)
    return [Answered(f"q{i}", "d", s, w, "") for i, (s, w) in enumerate(zip(scores, weights, strict=True))]


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution() -> None:
    found = paired.mean(answers([1.0] * 120 + [0.0] * 80))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert found.value == 0.6
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.005)


def test_the_same_answers_give_the_same_interval() -> None:
    scores = [float(x) for x in np.random.default_rng(1).integers(2, size=50)]
    assert paired.mean(answers(scores)) == paired.mean(answers(scores))


def test_perplexity_weighs_texts_by_their_tokens() -> None:
    assert paired.mean(answers([10.0, 2.0], [4.0, 2.0])).value == 2.0


def test_pairing_shows_a_difference_that_the_single_intervals_hide() -> None:
    """Both models fail on the same hard half; one of them fails on 20 of 200 further questions."""
    one, other = [1.0] * 100 + [0.0] * 100, [1.0] * 80 + [0.0] * 120
    found = paired.difference(answers(one), answers(other))
    assert (found.interval.value, found.questions, found.changed) == (0.1, 200, 20)
    assert found.is_shown
    assert paired.mean(answers(one)).low < paired.mean(answers(other)).high


def test_equal_models_show_no_difference() -> None:
    found = paired.difference(answers([1.0, 0.0] * 50), answers([1.0, 0.0] * 50))
    assert (found.interval.value, found.interval.low, found.interval.high, found.changed) == (0, 0, 0, 0)
    assert not found.is_shown


def test_changes_in_both_directions_show_no_difference() -> None:
    found = paired.difference(answers([1.0, 0.0] * 50), answers([0.0, 1.0] * 49 + [0.0, 0.0]))
    assert found.interval.low < 0 < found.interval.high
    assert not found.is_shown


@pytest.mark.parametrize(("changed", "is_shown"), [(5, False), (6, True)])
def test_fewer_than_six_changed_answers_show_nothing(changed: int, is_shown: bool) -> None:
    """The interval of five wins out of five would be 1 to 1, and a coin does that in 6 of 100 cases."""
    found = paired.difference(answers([1.0] * changed), answers([0.0] * changed))
    assert found.interval.low == 1.0
    assert found.is_shown == is_shown


def test_only_questions_that_both_answered_are_paired() -> None:
    one = [*answers([1.0] * 8), Answered("q8", "other text", 0.0, 1.0, "")]
    other = [*answers([0.0] * 9)]
    assert paired.difference(one, other).questions == 8
    with pytest.raises(RunError, match="no question in common"):
        paired.difference(one[8:], other)


def test_texts_of_another_length_are_not_paired() -> None:
    with pytest.raises(RunError, match="tokenizers split the text differently"):
        paired.difference(answers([3.0], [4.0]), answers([3.0], [5.0]))


def results() -> TaskAnswers:
    source = SourceAnswers(
        "onnx", "abc", {"max_new_tokens": 8}, {"torch": "2"}, "2026-01-01T00:00:00+00:00", 1.5, answers([1.0, 0.0])
    )
    return TaskAnswers("bfcl", "bfcl-eval==1", "generate").with_source(source)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "bfcl.json"
    answer_records.save(path, results())
    assert answer_records.read(path) == results()
    assert [each.name for each in path.parent.iterdir()] == ["bfcl.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("format", 99), ("sources", []), ("sources", {"onnx": {"answers": [{}]}}), ("sources", {"onnx": 3}), ("x", 1)],
)
def test_a_damaged_file_is_named(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "bfcl.json"
    answer_records.save(path, results())
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=r"bfcl.json: (damaged|written by another version).*--force again"):
        answer_records.read(path)


@pytest.mark.parametrize(
    ("form", "key", "value", "message"),
    [
        ("generate", "score", 7, "score is 7, expected 0 or 1"),
        ("generate", "score", math.nan, "score is nan, expected 0 or 1"),
        ("choose", "score", 0.5, "score is 0.5, expected 0 or 1"),
        ("generate", "score", "1", "score is str, expected float"),
        ("generate", "score", True, "score is bool, expected float"),
        ("generate", "weight", 0, "weight is 0, expected 1"),
        ("generate", "answer", 3, "answer is int, expected str"),
        ("generate", "id", "q1", "id is 'q1', as of an earlier answer"),
        ("predict", "score", -1.0, "score is -1.0, expected nats"),
        ("predict", "score", math.nan, "score is nan, expected nats"),
        ("predict", "score", math.inf, "score is inf, expected nats"),
        ("predict", "weight", 0.0, "weight is 0.0, expected a number of tokens"),
        ("predict", "weight", -4, "weight is -4, expected a number of tokens"),
        ("guess", "score", 1.0, "form is 'guess', expected generate, choose or predict"),
    ],
)
def test_an_answer_that_eval_cannot_have_written_is_damage(
    tmp_path: Path, form: str, key: str, value: object, message: str
) -> None:
    path = tmp_path / "runs" / "mine" / "eval" / "bfcl.json"
    answer_records.save(path, results())
    document = json.loads(path.read_text())
    document["form"] = form
    document["sources"]["onnx"]["answers"][0][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match="damaged") as caught:
        answer_records.read(path)
    assert message in str(caught.value) and (form == "guess" or ".answers[" in str(caught.value))
    assert f"Run eval {tmp_path / 'runs' / 'mine'} --task bfcl --force again." in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("source", "torch"), ("wall_s", math.nan), ("wall_s", -1.0)])
def test_a_figure_of_a_model_that_eval_cannot_have_written_is_damage(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "bfcl.json"
    answer_records.save(path, results())
    document = json.loads(path.read_text())
    document["sources"]["onnx"][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(RunError, match=rf"sources\.onnx\.{key} is"):
        answer_records.read(path)


def test_results_of_another_task_are_damage(tmp_path: Path) -> None:
    answer_records.save(tmp_path / "gsm8k.json", results())
    with pytest.raises(RunError, match="task is 'bfcl', expected 'gsm8k'"):
        answer_records.read(tmp_path / "gsm8k.json")
