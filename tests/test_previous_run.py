"""The run that --force replaces: moved aside, brought back, removed, and all of it after a kill in between."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import parts_of_a_run
from qat_edge import previous_run, run_lock, storage
from qat_edge.errors import RunError
from qat_edge.run import Run

PARTS = ("adapter/weights", "checkpoints/checkpoint-4/state", "exports/onnx/model", "training.json", "config.yaml")


def make_run(folder: Path, text: str) -> None:
    for name in PARTS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_is_set_aside_whole_and_brought_back(tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    previous_run.set_aside(tmp_path)
    assert contents(tmp_path / ".previous") == dict.fromkeys(PARTS, "old")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "config.yaml").write_text("new")
    previous_run.recover(tmp_path)  # the new run has no checkpoint
    assert contents(tmp_path) == before


def test_every_part_of_a_run_is_set_aside() -> None:
    parts = parts_of_a_run()
    assert len(parts) > 8 and parts <= set(previous_run.RUN_PARTS)


def test_a_run_with_a_checkpoint_keeps_the_previous_one_until_it_is_finished(tmp_path: Path) -> None:
    make_run(tmp_path, "old")
    previous_run.set_aside(tmp_path)
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text("new")
    previous_run.recover(tmp_path)
    assert contents(tmp_path / ".previous") == dict.fromkeys(PARTS, "old")
    previous_run.set_aside(tmp_path)  # --force once more: what goes is the unfinished run
    assert contents(tmp_path / ".previous") == dict.fromkeys(PARTS, "old")
    make_run(tmp_path, "new")
    previous_run.recover(tmp_path)  # killed before it could remove the previous run
    assert contents(tmp_path) == dict.fromkeys(PARTS, "new")


@pytest.mark.parametrize("step", ["set_aside", "restore"])
def test_a_kill_at_any_rename_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class Killed(BaseException):
        pass

    renames = 0
    for last in range(2 * len(PARTS)):
        folder = tmp_path / str(last)
        make_run(folder, "old")
        if step == "restore":
            previous_run.set_aside(folder)
            (folder / "config.yaml").write_text("new")
        renames = 0

        def rename(self: Path, target: Path, original: object = Path.replace, last: int = last) -> Path:
            nonlocal renames
            renames += 1
            if renames > last:
                raise Killed
            return original(self, target)  # type: ignore[operator]

        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", rename)
            with suppress(Killed):
                getattr(previous_run, step)(folder)
        Run.open(folder)
        (folder / ".lock").unlink(missing_ok=True)
        assert contents(folder) == dict.fromkeys(PARTS, "old"), last


@pytest.mark.parametrize("name", ["exports", "checkpoints", "eval", "ptq", ".previous", "ptq/rtn", "ptq/rtn/exports"])
def test_nothing_is_written_through_a_link_inside_a_run(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / "run", "run")
    outside = tmp_path / "outside"
    make_run(outside, "somebody else's")
    (outside / f".model.{platform.node()}-1.1-abcdefgh").mkdir()  # looks like what a killed process left
    before = sorted(outside.rglob("*"))
    link = tmp_path / "run" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_dir():
        link.rename(tmp_path / "moved")
    link.symlink_to(outside)
    with pytest.raises(RunError, match=f"{link} is a link to {outside}; nothing is written or removed through"):
        run_lock.writing(tmp_path / "run", "export").__enter__()
    Run.open(tmp_path / "run")  # reading is no harm
    assert sorted(outside.rglob("*")) == before and not (tmp_path / "run" / ".lock.json").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_in_place_of_a_folder_is_replaced_and_not_followed(tmp_path: Path, exists: bool) -> None:
    outside, link = tmp_path / "outside", tmp_path / "run" / "quantized"
    if exists:
        make_run(outside, "somebody else's")
    link.parent.mkdir()
    link.symlink_to(outside)
    with pytest.raises(RunError, match="exists already"), storage.replace_folder(link, force=False):
        pass
    with storage.replace_folder(link, force=True) as work:
        (work / "new").write_text("new")
    assert contents(link) == {"new": "new"} and not link.is_symlink()
    assert contents(outside) == (dict.fromkeys(PARTS, "somebody else's") if exists else {})
