"""The file of bits per layer: what is written is read, and nothing else; a file for another model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from qat_edge.errors import UsageError
from qat_edge.quant.bit_allocation import Choice
from qat_edge.quant.bits_file import MeasuredModel, load_bits, require_model, save_bits

UP = "model.layers.1.mlp.up_proj"
CHOICE = Choice({UP: 8, "lm_head": 8}, 1234, 0.3, "--max-kl 0.4")
FOLDER = {"name": "/models/a", "revision": None, "files": {"model.safetensors": "ab"}}


def saved(path: Path, kept_layers: list[int] | None = None, identity: dict[str, Any] | None = None) -> str:
    """Write a file of bits for a model and return its path."""
    save_bits(path / "bits.yaml", CHOICE, MeasuredModel.of_base(identity or FOLDER, kept_layers))
    return str(path / "bits.yaml")


def test_bits_survive_their_file(tmp_path: Path) -> None:
    path = Path(saved(tmp_path))
    assert load_bits(path) == CHOICE.bits
    document = yaml.safe_load(path.read_text())
    assert document["prediction"]["kl_nats"] == CHOICE.kl_nats
    assert document["prediction"]["size_bytes"] == CHOICE.size_bytes
    assert document["asked"] == "--max-kl 0.4"
    assert document["model"].keys() == {"name", "weights"}
    save_bits(path, CHOICE, MeasuredModel("m", "ab"), "seq")
    assert "levels" not in yaml.safe_load(path.read_text()), "no weight has 2 bits"
    (tmp_path / "bits.json").write_text(json.dumps({"bits": {UP: 8}}))
    assert load_bits(tmp_path / "bits.json") == {UP: 8}


def test_a_file_is_for_the_model_that_was_measured(tmp_path: Path) -> None:
    path = saved(tmp_path)
    require_model(path, FOLDER, None)
    require_model(path, {**FOLDER, "name": "/moved/b", "files": {"renamed.safetensors": "ab"}}, None)
    require_model(None, FOLDER, 3)
    with pytest.raises(UsageError, match=r"chosen for /models/a, and this model is b, with other weights\. .* remove"):
        require_model(path, {"name": "b", "revision": None, "files": {"model.safetensors": "cd"}}, None)

    hub = {"name": "org/a", "revision": "123", "files": {}}
    path = saved(tmp_path, identity=hub)
    require_model(path, hub, None)
    with pytest.raises(UsageError, match="other weights"):
        require_model(path, {**hub, "revision": "124"}, None)


def test_a_file_is_for_the_layers_that_were_kept(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for kept in (2, [0, 1]):
        with pytest.raises(UsageError, match=r"chosen for all layers, and this model has (2 layers|layers 0, 1);"):
            require_model(path, FOLDER, kept)

    path = saved(tmp_path, [0, 2])
    require_model(path, FOLDER, 2)  # which two is measured later
    require_model(path, FOLDER, [0, 2])
    with pytest.raises(UsageError, match="chosen for layers 0, 2, and this model has layers 0, 1;"):
        require_model(path, FOLDER, [0, 1])
    for kept, found in ((3, "3 layers"), (None, "all layers")):
        with pytest.raises(UsageError, match=f"this model has {found}"):
            require_model(path, FOLDER, kept)


def test_a_file_without_a_model_is_for_any(tmp_path: Path) -> None:
    (tmp_path / "bits.yaml").write_text(yaml.safe_dump({"bits": {UP: 8}}))
    require_model(str(tmp_path / "bits.yaml"), FOLDER, [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: [", "cannot be read as YAML"),
        ("", "expected 'bits:' .* found NoneType"),
        ("- a", "found list"),
        ("weights: {a: 8}", "found the keys weights"),
        ("bits: {}", "found no such line under it"),
        ("bits: 8", "found no such line under it"),
        ("bits: {a.b: 6}", r"'bits.a.b' is 6; a weight can have 2, 4 or 8 bits"),
        ("bits: {a.b: true}", r"'bits.a.b' is True"),
        ("bits: {a.b: '8'}", r"'bits.a.b' is '8'"),
        ("bits: {3: 8}", r"'bits.3'"),
        ("bits:\n  a.b: 8\n  a.b: 4\n", "'a.b' is given twice"),
        ("{level: seq, bits: {a.b: 2}}", r"unknown key 'level'\. Known: asked, prediction, model, levels, bits"),
        ("{model: SmolLM2, bits: {a.b: 8}}", r"'model' is 'SmolLM2', expected name, weights and kept_layers"),
        ("{model: {name: a}, bits: {a.b: 8}}", "expected name, weights and kept_layers"),
        ("{model: {name: a, weights: 3}, bits: {a.b: 8}}", "expected name, weights and kept_layers"),
        ("{model: {name: a, weights: b, kept_layers: [x]}, bits: {a.b: 8}}", "Remove it if the bits fit this model"),
        ("{levels: sep, bits: {a.b: 2}}", r"'levels' is 'sep', expected seq or integer"),
        ("{levels: , bits: {a.b: 2}}", r"'levels' is None"),
        ("{levels: seq, bits: {a.b: 8}}", r"no line under 'bits' has 2\. Remove it"),
    ],
)
def test_a_bad_file_is_an_error_that_names_the_problem(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_bits(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_or_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.yaml: no such file. `qat-edge sensitivity"):
        load_bits(tmp_path / "nowhere.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_bits(tmp_path)
