"""Checkpoints: whole or not there, the newest whole one chosen, damage noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qat_edge.train import checkpoints


def write(work: Path) -> None:
    """Write the files that the Trainer writes, of a few bytes."""
    (work / checkpoints.STATE).write_text(json.dumps({"global_step": 1, "loss": float("nan")}))
    save_file({"a": torch.zeros(4)}, work / "adapter_model.safetensors")
    for name in checkpoints.TORCH_FILES:
        torch.save(torch.zeros(4), work / name)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_older_checkpoints_go_when_a_newer_one_is_whole(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        checkpoints.save(tmp_path, step, write)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-11"


def test_a_checkpoint_that_fails_leaves_the_others(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, write)

    def fail(work: Path) -> None:
        write(work)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoints.save(tmp_path, 3, fail)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("damage", ["delete", "cut", "flip", "empty"])
@pytest.mark.parametrize("name", [checkpoints.STATE, "adapter_model.safetensors", "optimizer.pt"])
def test_an_incomplete_checkpoint_is_reported_and_removed(
    tmp_path: Path, messages: list[str], name: str, damage: str, marked: bool
) -> None:
    """Without the marker, as earlier versions left them, a flipped bit is not noticed."""
    for step in (2, 4):
        checkpoints.save(tmp_path, step, write)
        if not marked:
            (tmp_path / f"checkpoint-{step}" / checkpoints.MARKER).unlink()
    file = tmp_path / "checkpoint-4" / name
    data = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        file.write_bytes(
            {"cut": data[:-10], "empty": b"", "flip": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]}[damage]
        )

    if damage == "flip" and not marked:
        assert checkpoints.newest_whole(tmp_path) is not None
        return
    assert checkpoints.newest_whole(tmp_path) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2"]
    assert any("checkpoint-4 is incomplete" in line and "continuing from checkpoint-2" in line for line in messages)


def test_with_no_whole_checkpoint_training_begins_again(tmp_path: Path, messages: list[str]) -> None:
    (tmp_path / "checkpoint-7").mkdir()
    assert checkpoints.newest_whole(tmp_path) is None
    assert "training starts from the beginning" in messages[0] and names(tmp_path) == []
