"""Folders of data: every file with rows is read or named, and none outside of the folder is."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError


def write(data_folder: Path, *names: str) -> None:
    """Write files with one text each: the name of the file."""
    for name in names:
        (data_folder / name).parent.mkdir(exist_ok=True)
        text = {".csv": "text\n{}\n", ".txt": "{}\n"}.get(Path(name).suffix, '{{"text": "{}"}}\n')
        (data_folder / name).write_text(text.format(name))


def read(source: Any, part: str = "train") -> list[str]:
    rows: Any = load_rows(str(source), part)
    return [row.text for row in rows]


# --- files by their names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "left_out"),
    [
        (["train.jsonl", "more.jsonl"], "more.jsonl"),
        (["train.jsonl", "test.jsonl", "extra/part.jsonl"], "extra/part.jsonl"),
        (["train/a.jsonl", "b.jsonl"], "b.jsonl"),
        (["train.jsonl", "train-2.jsonl", "train-3.csv"], "train-3.csv"),
        (["train.jsonl", "book.txt"], "book.txt"),
        (["train.jsonl", "more.zip"], "more.zip"),
        (["train.jsonl", "more.feather", "more.xlsx"], "more.feather, more.xlsx"),
        (["train.jsonl", "more.tar.gz"], "more.tar.gz"),
        (["train.jsonl", *(f"{i}.jsonl" for i in range(7))], "0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl and 2 more"),
    ],
)
def test_a_file_that_would_be_left_out_is_named(data_folder: Path, names: list[str], left_out: str) -> None:
    write(data_folder, *names)
    with pytest.raises(DataError) as caught:
        load_rows(str(data_folder))
    assert str(caught.value).startswith(
        f"{data_folder}: {left_out} would not be read, because the parts of a folder come"
    )
    assert "'train' is train" in str(caught.value)


@pytest.mark.parametrize("suffix", ["zip", "tar", "xz", "gz", "jsonl.gz", "jsonl.xz", "7z"])
@pytest.mark.parametrize("data", [b"x", b"PK\x03\x04cut", b"\xfd7zXZ\x00cut", b"\x1f\x8b\x08cut"])
def test_a_damaged_archive_is_one_error(data_folder: Path, suffix: str, data: bytes) -> None:
    write(data_folder, "train.jsonl")
    (data_folder / f"train-2.{suffix}").write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_rows(str(data_folder))
    assert str(data_folder) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_in_an_archive_of_a_part_are_read(data_folder: Path) -> None:
    write(data_folder, "train.jsonl")
    with zipfile.ZipFile(data_folder / "train-2.zip", "w") as archive:
        archive.writestr("inner.jsonl", '{"text": "inner"}\n')
    assert sorted(read(data_folder)) == ["inner", "train.jsonl"]


def test_every_file_of_a_part_is_read(data_folder: Path) -> None:
    write(data_folder, "train.jsonl", "train-2.jsonl", "validation.jsonl")
    # Neither rows nor visible.
    for name in ("README.md", "LICENSE", "dataset_infos.json", ".notes.jsonl"):
        (data_folder / name).write_text("---\nlicense: mit\n---\n" if name == "README.md" else "{}")
    assert sorted(read(data_folder)) == ["train-2.jsonl", "train.jsonl"]
    assert read(data_folder, "validation") == ["validation.jsonl"]


def test_names_that_say_nothing_are_all_of_the_training(data_folder: Path) -> None:
    write(data_folder, "a.jsonl", "b.jsonl")
    assert sorted(read(data_folder)) == ["a.jsonl", "b.jsonl"]


def test_a_description_decides_alone(data_folder: Path) -> None:
    write(data_folder, "train.jsonl", "more.jsonl", "eval.jsonl")
    (data_folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: more.jsonl\n---\n"
    )
    assert read(data_folder) == ["more.jsonl"]


def test_the_part_eval_is_the_file_of_that_name(data_folder: Path) -> None:
    write(data_folder, "train.jsonl", "eval.jsonl")
    assert read(data_folder, "eval") == read(f"{data_folder}:eval") == read(f"{data_folder}:test") == ["eval.jsonl"]
    # `datasets` would read both as one part.
    write(data_folder, "test.jsonl")
    for part in ("eval", "test"):
        with pytest.raises(DataError, match=r"eval\.jsonl, test\.jsonl are one part, 'test', because files named eval"):
            read(data_folder, part)
    assert read(data_folder) == ["train.jsonl"]
    (data_folder / "eval.jsonl").unlink()
    with pytest.raises(DataError, match="no data set with a part 'eval'"):
        read(data_folder, "eval")


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.tsv.gz", "train.csv.gz"])
def test_numbers_in_tables_are_texts(data_folder: Path, name: str) -> None:
    separator = "\t" if ".tsv" in name else ","
    data = separator.join(("text", "label")) + "\n" + "".join(f"00{i}{separator}0{i}\n" for i in range(3))
    (data_folder / name).write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    rows: Any = load_rows(str(data_folder))
    assert [(row.text, row.label) for row in rows] == [("000", "00"), ("001", "01"), ("002", "02")]


def test_a_txt_file_is_one_text_in_a_folder_too(data_folder: Path) -> None:
    for name in ("train.txt", "train-2.txt"):
        (data_folder / name).write_text(f"{name}\n\nA paragraph.\n")
    assert sorted(read(data_folder)) == ["train-2.txt\n\nA paragraph.\n", "train.txt\n\nA paragraph.\n"]


def test_a_tsv_file_is_read_like_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('prompt\tcompletion\none, two\t"a\tb"\n')
    (row,) = load_rows(str(path))
    assert (row.prompt, row.completion) == ("one, two", "a\tb")  # type: ignore[union-attr]
    path.write_text("prompt\tcompletion\na\tb\tc\n")
    with pytest.raises(DataError, match=r"rows\.tsv:2: more values than the 2 columns .*Put values that contain tabs"):
        load_rows(str(path))


# --- files that were replaced ------------------------------------------------------------------------------


def write_table(path: Path, text: str) -> None:
    """Write one row with a time that does not tell when: that of files copied with `cp -p`, or out of an archive."""
    line = json.dumps({"text": text, "of": None}) + "\n"
    if path.suffix == ".parquet":
        datasets.Dataset.from_list([{"text": text}]).to_parquet(str(path))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(line.encode()))
    else:
        path.write_text(f"[{line}]")
    os.utime(path, (1e9, 1e9))


@pytest.mark.parametrize("name", ["train.parquet", "train.json", "train.jsonl.gz"])
def test_a_file_replaced_with_one_of_the_same_time_is_read_again(data_folder: Path, name: str) -> None:
    for text in ("first", "other", "first"):
        write_table(data_folder / name, text)
        assert read(data_folder) == [text]
        if name == "train.parquet":
            assert read(data_folder / name) == [text]


# --- records of save_to_disk -------------------------------------------------------------------------------


def outside(name: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["_data_files"][0].update(filename=name)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train/state.json", outside("../../other/data.arrow"), "state.json names data outside of the folder, '../"),
        ("train/state.json", outside("/etc/passwd"), "names data outside of the folder, '/etc/passwd'"),
        ("train/state.json", outside("http://127.0.0.1:9/x"), "names data outside of the folder, 'http:"),
        ("train/state.json", outside(3), "does not list the names of the data"),
        ("train/state.json", lambda record: record.update(_data_files="x"), "does not list the names of the data"),
        ("train/state.json", lambda record: record.update(_data_files=["x"]), "does not list the names of the data"),
        ("train/state.json", lambda record: record.pop("_data_files"), "does not list the names of the data"),
        ("train/state.json", lambda record: record.pop("_split"), "no data set with a part 'train'"),
        ("train/dataset_info.json", lambda record: record.update(features=[3]), "no data set with a part 'train'"),
        ("dataset_dict.json", lambda record: record.update(splits=["../other"]), "names data outside of the folder"),
        ("dataset_dict.json", lambda record: record.update(splits={"a": 1}), "does not list the names of the data"),
        ("dataset_dict.json", lambda record: record.update(splits=[]), "no data set with a part 'train'"),
    ],
)
def test_a_record_that_names_data_elsewhere_is_refused(
    data_folder: Path, file: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = datasets.Dataset.from_list([{"text": "secret"}])
    data.save_to_disk(data_folder.parent / "other")
    (data_folder.parent / "other" / "data.arrow").write_bytes(
        (data_folder.parent / "other" / "data-00000-of-00001.arrow").read_bytes()
    )
    datasets.DatasetDict({"train": data}).save_to_disk(data_folder)
    assert read(data_folder) == ["secret"]
    path = data_folder / file
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        load_rows(str(data_folder))
    assert message in str(caught.value) and "\n" not in str(caught.value)
