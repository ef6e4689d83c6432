"""What is said and left when something breaks: the disk, the hash, the connection."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reached import FOREVER, LARGE, WAYS, Way, assert_ends, assert_gone, large_file, on_the_way, opened

from qat_edge_devices import remote
from qat_edge_devices.device_errors import ConnectionLostError, IntegrityError, RoomError
from qat_edge_devices.transport import Completed


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    with on_the_way(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return large_file(tmp_path)


def test_a_damaged_cache_is_found_and_sent_again(way: Way, large: Path) -> None:
    for _ in range(2):
        with contextlib.closing(opened(way)) as device:
            device.push({"weights": large})
            assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
        (cached,) = (way.root / "cache").iterdir()
        cached.chmod(0o644)
        with cached.open("r+b") as file:
            file.seek(LARGE // 2)
            file.write(b"\0\0")


@pytest.mark.parametrize("answer", ["a digest it knows", "nonsense", "nothing"])
def test_a_device_that_lies_about_its_hash_is_found(way: Way, large: Path, answer: str) -> None:
    digest = subprocess.run(["sha256sum", str(large)], capture_output=True, text=True, check=True).stdout.split()[0]
    said = {"a digest it knows": digest, "nonsense": "x" * 64, "nothing": ""}[answer]
    with contextlib.closing(opened(way)) as device:
        for program in ("openssl", "sha256sum"):
            way.plant(program, f"cat >/dev/null; echo '{said}  -'")
        with pytest.raises(IntegrityError, match=r"(something else|digests)"):
            device.push({"weights": large})
        assert way.cached() == [] or answer == "nothing"
        for program in ("openssl", "sha256sum"):
            (way.bin / program).unlink()
        device.push({"weights": large})
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
    assert way.runs() == []


@pytest.fixture
def small_disk(way: Way) -> Iterator[Path]:
    """The device's disk, as large as what must stay free and 2 MB."""
    size = remote.MARGIN_BYTES + 2 * 1024**2
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(way.folder)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield way.folder
    subprocess.run(["umount", "-l", str(way.folder)], check=True)


def test_what_does_not_fit_the_disk_is_not_sent(way: Way, small_disk: Path, large: Path, tmp_path: Path) -> None:
    (tmp_path / "huge").write_bytes(b"x" * 3 * 1024**2)
    with contextlib.closing(opened(way)) as device:
        with pytest.raises(RoomError, match=r"3\.3 MB are to be sent, .* has 3\d\.\d MB.*Nothing was sent"):
            device.push({"huge": tmp_path / "huge", "weights": large})
        assert way.cached() == []
        device.push({"weights": large})
    assert way.runs() == []


def test_a_disk_that_fills_meanwhile_is_reported(way: Way, small_disk: Path, large: Path, tmp_path: Path) -> None:
    (tmp_path / "huge").write_bytes(random.Random(0).randbytes(remote.MARGIN_BYTES + 3 * 1024**2))
    way.plant("df", "echo tmpfs 999999999 0 999999999 0% /")
    with contextlib.closing(opened(way)) as device:
        with pytest.raises(RoomError, match=r"(?s)huge cannot be sent.*(No space left|disk is full).*--device-folder"):
            device.push({"huge": tmp_path / "huge"})
        assert way.cached() == []
    assert way.runs() == []
    with contextlib.closing(opened(way)) as device:
        device.push({"weights": large})
    assert len(way.cached()) == 1


def test_a_connection_cut_while_a_program_runs_is_reported(way: Way, large: Path, tmp_path: Path) -> None:
    (tmp_path / "request").write_bytes(b"{}")
    (tmp_path / "linked").symlink_to(large)
    with contextlib.closing(opened(way)) as device:
        device.push({"artifact/weights": tmp_path / "linked", "request": tmp_path / "request"})
        for name in ("request", "linked"):
            (tmp_path / name).unlink()
        first, seen = device.folder, list[str]()

        def cut(line: str) -> None:
            seen.append(line)
            way.cut()

        with pytest.raises(ConnectionLostError) as caught:
            device.run([device.python, "-c", FOREVER], 60, on_line=cut)
        said = str(caught.value)
        assert "the connection was lost" in said and "qat-edge-" not in said.replace(str(way.root), "")
        assert "Done: sent weights.bin (0.2 MB" in said and "send artifact/weights, request." in said
        assert "Not done: run `" in said and first in said
        assert_ends(*map(int, seen[0].split()))
        # The next call finds everything where it was, in a new folder.
        listed = device.run(["sh", "-c", 'cat request; cmp artifact/weights "$1"', "sh", str(large)], 30)
        assert listed == Completed(0, "{}", "")
        assert device.folder != first
        deadline = time.monotonic() + 10
        while len(way.runs()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert way.runs() == []


def test_results_lost_with_the_connection_are_told_from_results_that_never_were(way: Way, tmp_path: Path) -> None:
    with contextlib.closing(opened(way)) as device:
        device.run(["touch", "results"], 30)
        way.cut()
        deadline = time.monotonic() + 10
        while device.is_held():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ConnectionLostError, match=r"Done: run `touch results`\. Not done: bring back results\."):
            device.pull("results", tmp_path / "back")
        with pytest.raises(ConnectionLostError):  # until something is sent or run again
            device.pull("results", tmp_path / "back")
        device.run(["touch", "results"], 30)
        device.pull("results", tmp_path / "back")
    assert (tmp_path / "back").is_file()


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_a_connection_cut_in_the_middle_of_a_file_is_made_again(way: Way, tmp_path: Path) -> None:
    assert way.cable is not None
    huge = tmp_path / "huge"
    huge.write_bytes(random.Random(0).randbytes(8 * 1024**2))
    with contextlib.closing(opened(way)) as device:
        way.cable.cut_after = 4 * 1024**2
        device.push({"huge": huge})
        assert way.cable.cut_after == 0
        assert (Path(device.folder) / "huge").read_bytes() == huge.read_bytes()
    assert_gone(way)
    assert list(way.root.rglob(".incoming*")) == []


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_a_device_that_does_not_come_back_is_reported(way: Way, large: Path, tmp_path: Path) -> None:
    assert way.cable is not None
    huge = tmp_path / "huge"
    huge.write_bytes(random.Random(0).randbytes(8 * 1024**2))
    device = opened(way)
    device.push({"weights": large})
    way.cable.cut_after, way.cable.plugged = 4 * 1024**2, False
    with pytest.raises(ConnectionLostError) as caught:
        device.push({"huge": huge})
    said = str(caught.value)
    assert "Tried 4 times" in said and "Done: sent weights.bin" in said and "Not done: send huge." in said
    device.close()
    assert_gone(way)
    way.cable.plugged = True
    with contextlib.closing(opened(way)) as again:
        again.push({"weights": large, "huge": huge})
    assert len(way.cached()) == 2


@pytest.mark.parametrize("way", ["fake-adb"], indirect=True)
def test_adb_that_drops_in_the_middle_of_a_file_is_connected_again(way: Way, large: Path) -> None:
    state = way.bin.parent / "state"
    with contextlib.closing(opened(way)) as device:
        (state / "cut-push").touch()
        device.push({"weights": large})
        assert not (state / "cut-push").exists() and not (state / "offline").exists()
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
        (state / "gone").touch()
        (state / "cut-push").touch()
        large.write_bytes(large.read_bytes()[::-1])
        with pytest.raises(ConnectionLostError, match=r"(?s)offline.*Tried 4 times\. Done: .* Not done: send b"):
            device.push({"b": large})
    assert_gone(way)
