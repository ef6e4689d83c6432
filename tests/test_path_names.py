"""Names in documents that were written on Linux, macOS or Windows, and files that Windows does not let go."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from qat_edge import previous_run, run_lock, storage
from qat_edge.errors import DataError, ModelError, RunError
from qat_edge.manifest import file_faults
from qat_edge.models.load import load_model
from qat_edge.path_names import is_inside, is_path, short_name
from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.transport import work_path


class WindowsOs:
    """`os` of a module that runs on Windows. Setting `os.name` itself would break pathlib."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (storage, run_lock):
        monkeypatch.setattr(module, "os", WindowsOs())
    monkeypatch.setattr(storage, "RENAME_PAUSES_S", (0.0, 0.0))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("gpt2", "gpt2"),
        ("/home/jo/models/tiny", "tiny"),
        ("./models/tiny/", "tiny"),
        ("models/of/mine", "mine"),
        (r"C:\Users\Jörg\models\tiny", "tiny"),
        ("C:/models/tiny", "tiny"),
        (r"models\tiny", "tiny"),
        (r"\\server\share\models\tiny", "tiny"),
    ],
)
def test_reports_have_the_last_part_of_a_path_from_any_system(name: str, short: str) -> None:
    assert short_name(name) == short
    assert is_path(name) == (short != name and not name.startswith("models/"))


LEADING_OUT = (
    "C:/Windows/win.ini", "C:config.json", r"..\..\secret", r"\secret", r"\\server\share\file", "a/../../b", "/x",
)  # fmt: skip


@pytest.mark.parametrize("name", LEADING_OUT)
def test_names_that_lead_out_on_any_system_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_inside(name)
    (fault,) = file_faults(tmp_path, {"files": {name: {"bytes": 1, "sha256": ""}}})  # type: ignore[arg-type]
    assert "leads out of the folder" in fault
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(TransportError, match="is not a path inside the work folder"):
        work_path("local", name)


def test_names_below_the_folder_are_taken() -> None:
    assert all(map(is_inside, ("config.json", "1_Pooling/config.json", "", ".", "data/*.jsonl")))
    assert work_path("local", "artifact/model.onnx").as_posix() == "artifact/model.onnx"


@pytest.mark.parametrize("path", [r"C:\models\missing", "C:/models/missing", r"models\missing"])
def test_a_missing_path_of_windows_is_not_looked_up_on_the_hub(path: str) -> None:
    from qat_edge.data.formats import load_rows

    with pytest.raises(ModelError, match="no such file or folder"):
        load_model(path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(path)


# --- files in use --------------------------------------------------------------------------------------------


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of times that renaming fails, as where a virus scanner looks into a new file."""
    left, original = [0], Path.replace

    def replace(self: Path, target: Path) -> Path:
        if left[0]:
            left[0] -= 1
            raise PermissionError(13, "The process cannot access the file", str(self))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    return left


@pytest.mark.usefixtures("on_windows")
def test_a_file_in_use_for_a_moment_is_waited_for(tmp_path: Path, busy: list[int]) -> None:
    busy[0] = 2
    storage.write_text(tmp_path / "results.json", "1\n")
    assert (tmp_path / "results.json").read_bytes() == b"1\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.usefixtures("on_windows")
def test_a_folder_that_stays_in_use_is_named_and_unchanged(tmp_path: Path, busy: list[int]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    with (
        pytest.raises(RunError, match=r"run: cannot be written .* Close the programs that use it"),
        storage.replace_folder(tmp_path / "run", force=True) as work,
    ):
        (work / "new").touch()
        busy[0] = 3
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["run", "run/old"]


def test_elsewhere_it_is_an_error_at_once(tmp_path: Path, busy: list[int]) -> None:
    busy[0] = 1
    with pytest.raises(RunError, match="Choose another path"):
        storage.write_text(tmp_path / "results.json", "1\n")
    assert busy[0] == 0 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
@pytest.mark.usefixtures("on_windows")
def test_a_lock_is_removed_where_open_files_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no open file, so the lock goes after it was released."""
    original = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        opened = [os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()]
        if str(self.resolve()) in opened:
            raise PermissionError(13, "The process cannot access the file", str(self))
        original(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with run_lock.writing(tmp_path / "new" / "run", "finetune", create=True):
        assert (tmp_path / "new/run" / run_lock.LOCK).is_file()
    assert list(tmp_path.iterdir()) == []

    with run_lock.writing(tmp_path / "new" / "run", "finetune", create=True):
        (tmp_path / "new/run/config.yaml").touch()
    assert (tmp_path / "new/run" / run_lock.LOCK).is_file()


def test_text_has_the_same_bytes_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows would write CR and LF for a line end, and manifests have the sha256 of files."""
    monkeypatch.setattr(os, "linesep", "\r\n")
    storage.write_text(tmp_path / "config.yaml", "a: 1\nb: ü\n")
    assert (tmp_path / "config.yaml").read_bytes() == "a: 1\nb: ü\n".encode()


def test_a_temporary_name_is_one_that_windows_has() -> None:
    assert not set(storage._hidden_prefix("run")) & set('<>:"|?*\\/'), platform.node()
    assert previous_run.PREVIOUS in previous_run.WRITTEN_INTO
