"""The public Python API: generated from the options, lazily imported, and the same as the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import qat_edge
from conftest import train_run
from qat_edge import api, config
from qat_edge.errors import RunError, UsageError
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions, ValidateOptions
from qat_edge.run import Run

ROOT = Path(__file__).parents[1]
GENERATED: dict[str, type] = {
    "finetune": FinetuneOptions,
    "quantize": QuantizeOptions,
    "export": ExportOptions,
    "validate": ValidateOptions,
}


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(tiny_model_folder, tmp_path_factory.mktemp("api"))


def test_the_generated_file_is_current() -> None:
    written = runpy.run_path(str(ROOT / "tools" / "write_api.py"))["source"]()
    assert written == Path(api.__file__).read_text(encoding="utf-8"), "run `python tools/write_api.py`"


@pytest.mark.parametrize("name", GENERATED)
def test_every_option_is_a_parameter_with_its_default(name: str) -> None:
    parameters = inspect.signature(getattr(api, name)).parameters
    for field in dataclasses.fields(GENERATED[name]):
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        assert parameters[field.name].default == default


@pytest.mark.parametrize("name", qat_edge.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(qat_edge, name)
    assert name == "__version__" or inspect.getdoc(found)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'fintune'"):
        qat_edge.fintune  # noqa: B018


def test_verbs_stay_functions_after_their_modules_were_imported() -> None:
    import qat_edge.verbs.export

    assert callable(qat_edge.export)


def test_from_training_to_an_answer(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i}"} for i in range(20)]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = qat_edge.finetune(
        tiny_model_folder, tmp_path / "train.jsonl", tmp_path / "run", eval_data=tmp_path / "eval.jsonl",
        steps=2, qat_start=1.0, batch_size=2, lora_rank=2, max_length=32, ptq_init="none", track=[],
    )  # fmt: skip
    assert done.run == tmp_path / "run" and done.steps == 2

    (exported,) = qat_edge.export(done.run, target=["onnx"], ptq=["none"], context_length=64)
    assert exported.folder == tmp_path / "run" / "exports" / "onnx"
    assert [result.faults for result in qat_edge.verify(done.run)] == [[]]
    reports = qat_edge.validate(
        done.run, tokens=64, prompts=1, max_new_tokens=4, prefill=4, decode=2, repeats=1, threads=1, max_kl=100.0
    )
    assert [gate.passed for report in reports for gate in report.gates] == [True]

    assert [result.target for result in qat_edge.verify(done.run, target="onnx")] == ["onnx"]

    pieces: list[str] = []
    answer = qat_edge.generate(done.run, "say 3 ", source="onnx", raw=True, max_new_tokens=4, emit=pieces.append)
    assert answer == "".join(pieces)
    model = qat_edge.load_frozen(Run(done.run))
    with torch.no_grad():
        assert model(torch.tensor([[3, 4]])).logits.shape[:2] == (1, 2)


def test_paths_runs_and_text_name_the_same_run(run: Run) -> None:
    made = [qat_edge.quantize(given) for given in (run, run.path, str(run.path))]
    assert {each.folder for each in made} == {run.quantized}
    assert qat_edge.load_frozen(run.quantized) is not None


def test_a_bad_value_names_its_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"finetune.steps: -1 is below the least permitted value, 0"):
        qat_edge.finetune("model", "data.jsonl", tmp_path / "run", steps=-1)
    with pytest.raises(UsageError, match=r"export.target: 'gguff' is not one of"):
        qat_edge.export(tmp_path, target=["gguff"])
    with pytest.raises(RunError, match="no such run folder"):
        qat_edge.verify(tmp_path / "missing")
    with pytest.raises(RunError, match="no frozen checkpoint"):
        qat_edge.load_frozen(tmp_path)


def test_arguments_at_their_defaults_do_not_override_a_profile(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    given: list[Any] = []

    def stop(opened: Run, options: ValidateOptions, **_: Any) -> None:
        given.append(options)
        raise UsageError("stop")

    monkeypatch.setattr("qat_edge.verbs.validate.validate_run", stop)
    with pytest.raises(UsageError, match="stop"):
        qat_edge.validate(run, profile="pi5", repeats=3)
    from_profile = config.load(ValidateOptions, "validate", None, {"profile": "pi5", "repeats": 3})
    assert given == [from_profile]


def test_a_resumed_run_has_its_own_options(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    given: list[Any] = []

    def stop(options: FinetuneOptions, out: Path, **_: Any) -> None:
        given.append(options)
        raise UsageError("stop")

    monkeypatch.setattr("qat_edge.verbs.finetune.finetune", stop)
    own = config.load(FinetuneOptions, "finetune", run.config, {})
    with pytest.raises(UsageError, match="stop"):
        qat_edge.finetune(own.model, own.data, run.path, resume=True)
    assert given == [own] and own.lora_rank == 4


def test_messages_go_to_the_logger(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="qat_edge"):
        qat_edge.quantize(run, method="rtn", force=True)
    assert any("Frozen:" in record.getMessage() for record in caplog.records)
