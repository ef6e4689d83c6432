"""Fuzz the readers of models and artifacts: headers of safetensors and GGUF, .pte, ONNX folders, whole run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz_inputs import EXAMPLES, copy_of, make_run
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import as_json, mutated_bytes, mutated_document, require_value_or_error

from models.tiny_gguf import write_gguf
from qat_edge.models.load import load_model
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.targets import target_named

# A call takes up to a second.
slow = settings(max_examples=int(EXAMPLES) if EXAMPLES else 8)
HEADER = 4096  # bytes that are mutated of large files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("fuzz"))


def header_of(path: Path) -> int:
    """The length of the header of a safetensors file."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@slow
@given(st.data())
def test_safetensors(run: Run, tmp_path: Path, data: st.DataObject) -> None:
    folder = copy_of(run.path.parent / "model", tmp_path / "copy")
    path = folder / "model.safetensors"
    path.write_bytes(data.draw(mutated_bytes(path.read_bytes(), header_of(path))))
    require_value_or_error(lambda: load_model(str(folder)))


@slow
@given(st.data())
def test_gguf(run: Run, tmp_path: Path, data: st.DataObject) -> None:
    valid = run.path.parent / "model.gguf"
    if not valid.is_file():
        write_gguf(run.path.parent / "model", valid)
    path = tmp_path / "model.gguf"
    path.write_bytes(data.draw(mutated_bytes(valid.read_bytes(), HEADER)))
    require_value_or_error(lambda: load_model(str(path)))


@slow
@given(st.data())
def test_configurations_of_models(run: Run, tmp_path: Path, data: st.DataObject) -> None:
    folder = copy_of(run.path.parent / "model", tmp_path / "copy")
    path = folder / "config.json"
    path.write_bytes(as_json(data.draw(mutated_document(json.loads(path.read_text())))))
    require_value_or_error(lambda: load_model(str(folder)))


@pytest.mark.parametrize("file", ["model.pte", "layers.json"])
@slow
@given(st.data())
def test_pte_folders(run: Run, tmp_path: Path, file: str, data: st.DataObject) -> None:
    folder = copy_of(run.exports / "executorch", tmp_path / "copy")
    path = folder / file
    path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    require_value_or_error(lambda: target_named("executorch").read(folder))
    require_value_or_error(lambda: target_named("executorch").held_options(folder))
    require_value_or_error(lambda: inspect(folder / "model.pte"))


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data", "genai_config.json"])
@given(st.data())
def test_onnx_folders(run: Run, tmp_path: Path, file: str, data: st.DataObject) -> None:
    folder = copy_of(run.exports / "onnx", tmp_path / "copy")
    path = folder / file
    path.write_bytes(data.draw(mutated_bytes(path.read_bytes())))
    require_value_or_error(lambda: target_named("onnx").check(folder))
    require_value_or_error(lambda: target_named("onnx").read(folder))
    require_value_or_error(lambda: target_named("onnx").held_options(folder))


@given(st.data())
def test_gguf_folders(run: Run, tmp_path: Path, data: st.DataObject) -> None:
    exported = run.path.parent / "gguf"
    if not exported.is_dir():
        exported.mkdir()
        target_named("gguf").export(run.path.parent / "model", exported, 64)
    folder = copy_of(exported, tmp_path / "copy")
    path = folder / "model.gguf"
    path.write_bytes(data.draw(mutated_bytes(path.read_bytes(), 2 * HEADER)))
    require_value_or_error(lambda: target_named("gguf").check(folder))
    require_value_or_error(lambda: target_named("gguf").read(folder))
    require_value_or_error(lambda: target_named("gguf").held_options(folder))


@pytest.mark.parametrize("file", ["manifest.json", "config.json"])
@given(st.data())
def test_frozen_checkpoints(run: Run, tmp_path: Path, file: str, data: st.DataObject) -> None:
    folder = copy_of(run.quantized, tmp_path / "copy")
    document: Any = json.loads((folder / file).read_text())
    (folder / file).write_bytes(as_json(data.draw(mutated_document(document))))
    calls: tuple[Callable[[Path], Any], ...] = (frozen.read_scheme, frozen.read_weights)
    for call in calls:
        require_value_or_error(lambda call=call: call(folder))


@given(st.data())
def test_hugging_face_folders(run: Run, tmp_path: Path, data: st.DataObject) -> None:
    exported = run.path.parent / "hf"
    if not exported.is_dir():
        exported.mkdir()
        target_named("hf").export(run.quantized, exported, 64)
    folder = copy_of(exported, tmp_path / "copy")
    name = data.draw(st.sampled_from(("config.json", "generation_config.json", "model.safetensors")))
    path = folder / name
    if name.endswith(".json"):
        path.write_bytes(as_json(data.draw(mutated_document(json.loads(path.read_text())))))
    else:
        path.write_bytes(data.draw(mutated_bytes(path.read_bytes(), HEADER)))
    require_value_or_error(lambda: target_named("hf").check(folder))
    require_value_or_error(lambda: target_named("hf").read(folder))
    require_value_or_error(lambda: target_named("hf").held_options(folder))
