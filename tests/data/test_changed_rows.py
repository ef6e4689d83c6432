"""Commands that read the rows of a run say so where these are no longer the rows that finetune read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import plain_rows, train_run
from qat_edge.data.changed_rows import EVAL_DATA, ROWS, describe_change
from qat_edge.data.formats import RowStream
from qat_edge.evaluate.evaluator import load_eval_set
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models.merge import merged_model
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.options import EvalOptions, QuantizeOptions, SensitivityOptions, ValidateOptions
from qat_edge.public_tasks import own_rows
from qat_edge.run import Run
from qat_edge.train import run_inputs
from qat_edge.verbs.freezing import _calibration
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.sensitivity import measure


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train_run(tiny_model_folder, tmp_path_factory.mktemp("changed"), plain_rows(40))
    quantize(run, QuantizeOptions())
    return run


def evaluate(run: Run, other: str | None) -> None:
    load_eval_set(run, ValidateOptions(tokens=32, window=64, prompts=2, eval_data=other))


def answer(run: Run, other: str | None) -> None:
    own_rows.load(run, EvalOptions(task="rows", context_length=128, data=other), load_tokenizer(run.quantized))


def calibrate(run: Run, other: str | None) -> None:
    options = QuantizeOptions(method="gptq", calibration_tokens=64, calibration_data=other)
    _calibration(run, merged_model(run.reference), options)


def probe(run: Run, other: str | None) -> None:
    measure(run, SensitivityOptions(tokens=64, data=other))


# Reads rows of a run, or others; the file of the run; the flag for others.
READERS: dict[str, tuple[Callable[[Run, str | None], None], str, str]] = {
    "validate": (evaluate, "eval.jsonl", "validate --eval-data FILE"),
    "eval": (answer, "eval.jsonl", "eval --data FILE"),
    "quantize": (calibrate, "train.jsonl", "--calibration-data FILE"),
    "sensitivity": (probe, "train.jsonl", "--data FILE"),
}


@pytest.mark.parametrize("name", READERS)
def test_rows_that_changed_since_the_training_are_named(trained: Run, messages: list[str], name: str) -> None:
    read, file, flag = READERS[name]
    path = trained.path.parent / file
    read(trained, None)
    assert not any("other rows" in line for line in messages)

    before = path.read_text()
    path.write_text(before.replace("it is", "it was"))
    try:
        read(trained, None)
        assert any(line.startswith(f"{path} has other rows than when finetune read it") for line in messages)
        assert any(flag in line for line in messages)
        # Rows that the command names itself are compared with nothing.
        del messages[:]
        read(trained, str(path))
        assert not any("other rows" in line for line in messages)
    finally:
        path.write_text(before)


def test_the_report_mentions_rows_that_changed(trained: Run) -> None:
    path = trained.path.parent / "eval.jsonl"
    before = path.read_text()
    path.write_text(before + json.dumps({"prompt": "one more ", "completion": "row"}) + "\n")
    try:
        notes = load_eval_set(trained, ValidateOptions(tokens=32, window=64, prompts=2)).notes
    finally:
        path.write_text(before)
    assert any("other rows" in note for note in notes)


def test_nothing_is_said_of_a_run_without_a_record(trained: Run, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    document = json.loads((run.reference / MANIFEST).read_text())
    other = RowStream(str(trained.path.parent / "train.jsonl"))
    list(other)
    assert describe_change(run, EVAL_DATA, other, "") == "", "both files have the same rows"
    for entry in ({"source": "x", "sha256": "y"}, None):
        (run.reference / MANIFEST).write_text(json.dumps({**document, EVAL_DATA: entry}))
        assert describe_change(run, EVAL_DATA, other, "") == ""


def test_rows_are_the_same_in_another_file_and_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 0}\n\n{"text": "y", "label": null}\n')
    (tmp_path / "b.json").write_text('[{"label": 0, "text": "x"}, {"text": "y", "unused": 1}]')
    (tmp_path / "c.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y"}\n')
    streams = [RowStream(str(tmp_path / name), report=False) for name in ("a.jsonl", "b.json", "c.jsonl")]
    assert {stream.sha256 for stream in streams} == {""}
    for stream in streams:
        list(stream)
    same, again, other = (stream.sha256 for stream in streams)
    assert same == again != other
    list(streams[0])
    assert streams[0].sha256 == same


def test_a_run_of_an_earlier_version_is_resumed_with_its_rows(trained: Run) -> None:
    current = read_manifest(trained.reference)["data"]
    earlier = {key: value for key, value in current.items() if key != ROWS}
    assert current[ROWS] and not run_inputs._differs(current, earlier)
    assert run_inputs._differs(current, {**earlier, "sha256": "other"})
