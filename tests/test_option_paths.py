"""Options that name files: absolute in config.yaml, equal in any spelling, named by flag where they are gone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qat_edge import config, option_paths
from qat_edge.errors import DataError
from qat_edge.options import FinetuneOptions, ValidateOptions


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("")
    return tmp_path


def test_paths_become_absolute_and_names_on_the_hub_do_not(folder: Path) -> None:
    options = FinetuneOptions(model="org/name", data="rows/train.jsonl", eval_data="rows:test", bits=None)
    found = option_paths.absolute(options)
    assert found.model == "org/name" and found.bits is None
    assert found.data == str(folder / "rows" / "train.jsonl") and found.eval_data == f"{folder / 'rows'}:test"


def test_config_yaml_has_absolute_paths(folder: Path) -> None:
    config.save(folder / "config.yaml", "validate", ValidateOptions(eval_data="rows/train.jsonl"))
    saved = config.load(ValidateOptions, "validate", folder / "config.yaml", {})
    assert saved.eval_data == str(folder / "rows" / "train.jsonl")


def test_two_spellings_of_a_path_are_equal(folder: Path) -> None:
    (folder / "link").symlink_to("rows")
    assert option_paths.same("rows/train.jsonl", str(folder / "link" / ".." / "rows" / "train.jsonl"))
    assert option_paths.same("rows:test", f"{folder}/rows:test") and not option_paths.same("rows:test", "rows:train")
    assert not option_paths.same("rows", "rows/train.jsonl") and not option_paths.same(1, 2)


def test_data_that_is_gone_is_named_with_the_flag_of_its_new_place(folder: Path) -> None:
    gone = str(folder / "rows" / "eval.jsonl")
    option_paths.require_data("org/name", "--data")
    with pytest.raises(DataError, match=r"eval\.jsonl: no such file .* give its new place: validate --eval-data FILE"):
        option_paths.require_data(gone, "validate --eval-data")
    options = FinetuneOptions(model="org/name", data="rows/train.jsonl", eval_data=gone)
    assert option_paths.missing(options) == [("eval_data", gone)]
