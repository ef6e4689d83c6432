"""The run folder: whole or not at all, and a manifest that says what made it."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qat_edge import storage
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, read_manifest, sha256, write_manifest
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.run import Run
from qat_edge.storage import replace_folder, write_text


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with replace_folder(target, force=False) as work:
        (work / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, before: bool) -> None:
    target = tmp_path / "made"
    if before:
        target.mkdir()
        (target / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), replace_folder(target, force=True) as work:
        (work / "file").write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == (["made"] if before else [])
    assert not before or (target / "file").read_text() == "old"


def test_replacing_needs_force(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(RunError, match="--force"), replace_folder(tmp_path / "made", force=False):
        pass
    with replace_folder(tmp_path / "made", force=True) as work:
        (work / "file").write_text("new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "made"]


KILLED = """
import os, signal, sys
from pathlib import Path
from qat_edge.storage import replace_folder

def kill(*given):
    os.kill(os.getpid(), signal.SIGKILL)

with replace_folder(Path(sys.argv[1]), force=True) as work:
    (work / "file").write_text("half")
    if sys.argv[2] == "while replacing":
        work.chmod(0o755)
        rename = Path.replace
        Path.replace = lambda self, other: kill() if self == work else rename(self, other)
    else:
        kill()
"""


@pytest.mark.parametrize("when", ["while writing", "while replacing"])
def test_what_a_killed_process_left_goes_the_next_time(tmp_path: Path, when: str) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("old")
    answer = subprocess.run([sys.executable, "-c", KILLED, str(target), when], check=False)
    assert answer.returncode == -signal.SIGKILL
    left = {p.name for p in tmp_path.iterdir()} - {"made"}
    assert len(left) == (2 if when == "while replacing" else 1) and target.exists() is (when == "while writing")
    with replace_folder(tmp_path / "other", force=False) as work:
        assert {p.name for p in tmp_path.iterdir()} == {"made", work.name}
    assert (target / "file").read_text() == "old"


def test_what_is_in_use_or_foreign_stays(tmp_path: Path) -> None:
    """Of a process that runs, of another machine, and of somebody else altogether."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    others = {f".made.{platform.node()}x-{dead.pid}-abcdefgh", f".made-{dead.pid}-abcdefgh", ".git"}
    for name in others:
        (tmp_path / name).mkdir()
    with replace_folder(tmp_path / "made", force=False) as one, replace_folder(tmp_path / "made", force=True) as two:
        assert {p.name for p in tmp_path.iterdir()} == {*others, one.name, two.name}


def test_a_process_id_that_is_used_again_is_not_the_process_that_left_a_name(tmp_path: Path) -> None:
    """This process runs; one that started ten seconds before it under the same id does not."""
    started = storage.own_start_s()
    here, pid = platform.node(), os.getpid()
    for name in (f".made.{here}-{pid}.{started}-abcdefgh", f".made.{here}-{pid}.{started - 10}-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name.replace("made", "file.json")).write_text("half")
    write_text(tmp_path / "other", "text")
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"other"} | {f".{name}.{here}-{pid}.{started}-abcdefgh" for name in ("made", "file.json")}


def test_a_stop_between_the_two_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "file").write_text("old")
    rename = Path.replace

    def stop(self: Path, other: Path) -> Path:
        if other == target and (self / "file").read_text() == "new":
            raise KeyboardInterrupt
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt), replace_folder(target, force=True) as work:
        (work / "file").write_text("new")
    assert (target / "file").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files first, then the folders that hold their names, then the name itself, then the folder that holds it."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def flush(handle: int) -> None:
        events.append(f"flush {Path(f'/proc/self/fd/{handle}').readlink().name}")
        fsync(handle)

    def name(self: Path, other: Path) -> Path:
        events.append(f"name {other.name}")
        return rename(self, other)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", name)
    with replace_folder(tmp_path / "made", force=False) as work:
        (work / "sub").mkdir()
        (work / "sub" / "file").write_text("new")
    assert events == ["flush file", "flush sub", f"flush {work.name}", "name made", f"flush {tmp_path.name}"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(RunError, match=r"made: cannot be written \(No space left on device\)"),
        replace_folder(tmp_path / "made", force=False) as work,
    ):
        (work / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_not_called_full(tmp_path: Path) -> None:
    with (
        pytest.raises(
            RunError, match=r"\(Read-only file system\)\. Choose a path on a file system that can be written"
        ),
        replace_folder(tmp_path / "made", force=False),
    ):
        raise OSError(errno.EROFS, "Read-only file system")


def test_errors_about_something_else_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), replace_folder(tmp_path / "made", force=False):
        raise RuntimeError("shapes do not match")


def test_write_text_replaces_at_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and [p.name for p in path.parent.iterdir()] == ["file.json"]


def test_the_manifest_names_every_file_and_library(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"abc")
    write_manifest(tmp_path, "test", seed=3)
    manifest = read_manifest(tmp_path)
    digest = sha256(tmp_path / "sub" / "weights")
    assert manifest["files"] == {"sub/weights": {"bytes": 3, "sha256": digest}}
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["kind"] == "test" and manifest["seed"] == 3
    assert manifest["libraries"]["torch"].startswith("2.13")


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RunError, match="damaged"):
        read_manifest(tmp_path)


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path)
    write_text(run.config, "finetune: {}\n")
    write_text(run.adapter / MANIFEST, json.dumps({"format": 99, "qat_edge": "9.0"}))
    with pytest.raises(RunError, match=r"format 99, written by qat-edge 9\.0"):
        Run.open(tmp_path)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such run folder"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(RunError, match="not a run folder"):
        Run.open(tmp_path)


def test_a_run_of_0_1_0_keeps_the_folder_of_a_renamed_method(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (run.ptq_folder / "cd").mkdir(parents=True)
    variant = run.ptq("coordinate-descent")
    assert variant.path == run.ptq_folder / "cd" and variant.name == "ptq (coordinate descent)"
    assert [each.path.name for each in run.variants()[1:]] == ["cd"]
    assert Run(tmp_path / "new").ptq("coordinate-descent").path.name == "coordinate-descent"


def test_an_export_folder_without_a_manifest_is_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for name in ("onnx", "executorch", ".onnx.part"):
        (run.exports / name).mkdir(parents=True)
    write_manifest(run.exports / "onnx", "export", options={}, quantized_sha256="")
    assert run.damaged_exports() == [run.exports / "executorch"]


@pytest.mark.parametrize("length", [10**9, -7, 0])
def test_a_context_that_no_artifact_has_is_damage(tmp_path: Path, length: int) -> None:
    write_manifest(tmp_path, "export", options={"context_length": length}, quantized_sha256="")
    with pytest.raises(RunError, match=f"damaged, its options have context_length {length}"):
        context_of_artifact(tmp_path)
