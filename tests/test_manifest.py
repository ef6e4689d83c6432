"""Manifests: a folder is read only as it was written, and a damaged manifest is an error in words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from qat_edge import manifest
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, check_files, file_faults, read_manifest, sha256, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "sub").mkdir(parents=True)
    (made / "weights").write_bytes(b"abcdefgh")
    (made / "sub" / "config.json").write_text("{}")
    write_manifest(made, "test", options={"context_length": 64}, scheme={"weights": {"layer": {"bits": 4}}})
    return made


def change(folder: Path, **entries: Any) -> None:
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in (document | entries).items() if v != "REMOVED"}))


def test_a_folder_as_it_was_written_passes(folder: Path) -> None:
    (folder / "README.md").write_text("a note")
    (folder / "export.log").write_text("a log")
    (folder / ".DS_Store").write_bytes(b"hidden")
    assert check_files(folder)["kind"] == "test"


def test_one_flipped_bit_is_found(folder: Path) -> None:
    (folder / "weights").write_bytes(b"abcdefgi")
    with pytest.raises(RunError, match=r"made is not as it was written: weights: changed since it was written"):
        check_files(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights", "weights: listed in manifest.json, but missing"),
        ("sub/config.json", "sub/config.json: listed in manifest.json, but missing"),
    ],
)
def test_a_missing_file_is_found(folder: Path, name: str, words: str) -> None:
    (folder / name).unlink()
    assert file_faults(folder, read_manifest(folder)) == [words]


def test_another_size_is_found_without_reading_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "weights").write_bytes(b"abc")
    monkeypatch.setattr(manifest, "sha256", lambda path: pytest.fail("read") if path.name == "weights" else "")
    assert "weights: changed since it was exported (3 bytes, not 8)" in file_faults(
        folder, read_manifest(folder), "exported"
    )


@pytest.mark.parametrize("name", ["model-00002.safetensors", "sub/generation_config.json", "tokenizer.json"])
def test_a_file_that_is_not_listed_is_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"x")
    with pytest.raises(RunError, match=f"{name}: not listed in manifest.json"):
        check_files(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../outside", "..", "sub\\..\\outside"])
def test_a_manifest_does_not_lead_out_of_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    files = json.loads((folder / MANIFEST).read_text())["files"]
    change(folder, files=files | {name: {"bytes": 1, "sha256": sha256(folder.parent / "outside")}})
    assert any("leads out of the folder" in fault for fault in file_faults(folder, read_manifest(folder)))


def test_many_faults_are_counted(folder: Path) -> None:
    for number in range(manifest.SHOWN_FAULTS + 3):
        (folder / f"extra{number}").write_bytes(b"x")
    with pytest.raises(RunError, match=r"; 3 more\. Restore the folder"):
        check_files(folder)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"files": []}, "'files' is list of 0, expected dict"),
        ({"files": {"weights": 5}}, "'files.weights' is 5, expected dict"),
        ({"files": {"weights": {"bytes": "8", "sha256": ""}}}, "'files.weights.bytes' is 8, expected int"),
        ({"files": {"weights": {"bytes": True, "sha256": ""}}}, "'files.weights.bytes' is True, expected int"),
        ({"options": {"context_length": "64"}}, "'options.context_length' is 64, expected int"),
        ({"scheme": {"weights": {"layer": {"bits": None}}}}, "'scheme.weights.layer.bits' is None, expected int"),
        ({"model": "SmolLM2"}, "'model' is SmolLM2, expected dict"),
        ({"start": 1}, "'start' is 1, expected dict or null"),
        ({"kind": None}, "'kind' is None, expected str"),
    ],
)
def test_an_entry_of_another_type_is_named(folder: Path, entries: dict[str, Any], words: str) -> None:
    change(folder, **entries)
    with pytest.raises(RunError) as caught:
        read_manifest(folder)
    assert words in str(caught.value) and str(folder / MANIFEST) in str(caught.value)


def test_an_entry_that_is_missing_is_named_where_it_is_read(folder: Path) -> None:
    found = read_manifest(folder)
    with pytest.raises(RunError, match=r"damaged \(no entry 'quantized_sha256'\)"):
        found["quantized_sha256"]
    with pytest.raises(RunError, match=r"no entry 'options\.kv_cache'"):
        found["options"]["kv_cache"]
    with pytest.raises(RunError, match=r"no entry 'scheme\.weights\.layer\.group_size'"):
        found["scheme"]["weights"]["layer"]["group_size"]
    assert found.get("quantized_sha256") is None and "quantized_sha256" not in found
    change(folder, files={"weights": {"bytes": 8}})
    with pytest.raises(RunError, match=r"no entry 'files\.weights\.sha256'"):
        check_files(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "5", '{"format": ', '{"format": 2, "format": 2}', "[" * 100_000])
def test_a_manifest_that_is_no_object_is_an_error(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(RunError, match="damaged"):
        check_files(folder)


def test_a_file_is_hashed_once_until_it_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = folder / "weights", []
    digest = manifest.hashlib.file_digest
    monkeypatch.setattr(
        manifest.hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name)
    )
    # A file that was just written is not remembered, as it may be written again at the same time of the clock.
    sha256(path)
    sha256(path)
    assert len(hashed) == 2
    time.sleep(manifest.TICK_NS / 1e9 * 1.5)
    first = sha256(path)
    assert sha256(path) == first and len(hashed) == 3
    path.rename(folder / "renamed")
    (folder / "renamed").rename(path)
    times = path.stat()
    path.write_bytes(b"hgfedcba")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert sha256(path) != first, "a changed file with its old size and time of modification is read again"
