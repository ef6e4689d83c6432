"""Messages and leftovers when the disk, the hash or the connection fails."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_fixtures import (
    DEVICE_TYPES,
    FOREVER,
    LARGE,
    DeviceUnderTest,
    assert_ends,
    assert_gone,
    device_under_test,
    large_file,
    opened,
)

from qat_edge_devices import remote
from qat_edge_devices.device_errors import CapacityError, ConnectionLostError, IntegrityError
from qat_edge_devices.transport import CompletedProgram


@pytest.fixture(params=DEVICE_TYPES)
def dut(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceUnderTest]:
    with device_under_test(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return large_file(tmp_path)


def test_a_damaged_cached_file_is_detected_and_sent_again(dut: DeviceUnderTest, large: Path) -> None:
    for _ in range(2):
        with contextlib.closing(opened(dut)) as device:
            device.push({"weights": large})
            assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
        (cached,) = (dut.root / "cache").iterdir()
        cached.chmod(0o644)
        with cached.open("r+b") as file:
            file.seek(LARGE // 2)
            file.write(b"\0\0")


@pytest.mark.parametrize("output", ["a digest it knows", "nonsense", "nothing"])
def test_a_wrong_hash_from_the_device_is_detected(dut: DeviceUnderTest, large: Path, output: str) -> None:
    digest = subprocess.run(["sha256sum", str(large)], capture_output=True, text=True, check=True).stdout.split()[0]
    printed = {"a digest it knows": digest, "nonsense": "x" * 64, "nothing": ""}[output]
    with contextlib.closing(opened(dut)) as device:
        for program in ("openssl", "sha256sum"):
            dut.plant(program, f"cat >/dev/null; echo '{printed}  -'")
        with pytest.raises(IntegrityError, match=r"(something else|digests)"):
            device.push({"weights": large})
        assert dut.cached() == [] or output == "nothing"
        for program in ("openssl", "sha256sum"):
            (dut.bin / program).unlink()
        device.push({"weights": large})
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
    assert dut.runs() == []


@pytest.fixture
def small_disk(dut: DeviceUnderTest) -> Iterator[Path]:
    """The device's disk, 2 MB larger than the space that must stay free."""
    size = remote.MARGIN_BYTES + 2 * 1024**2
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(dut.folder)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield dut.folder
    subprocess.run(["umount", "-l", str(dut.folder)], check=True)


def test_files_that_do_not_fit_the_disk_are_not_sent(
    dut: DeviceUnderTest, small_disk: Path, large: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge").write_bytes(b"x" * 3 * 1024**2)
    with contextlib.closing(opened(dut)) as device:
        with pytest.raises(CapacityError, match=r"3\.3 MB are to be sent and .* has 3\d\.\d MB.*Nothing was sent"):
            device.push({"huge": tmp_path / "huge", "weights": large})
        assert dut.cached() == []
        device.push({"weights": large})
    assert dut.runs() == []


def test_a_disk_that_fills_during_the_transfer_is_reported(
    dut: DeviceUnderTest, small_disk: Path, large: Path, tmp_path: Path
) -> None:
    (tmp_path / "huge").write_bytes(random.Random(0).randbytes(remote.MARGIN_BYTES + 3 * 1024**2))
    dut.plant("df", "echo tmpfs 999999999 0 999999999 0% /")
    with contextlib.closing(opened(dut)) as device:
        with pytest.raises(
            CapacityError, match=r"(?s)huge cannot be sent.*(No space left|disk is full).*--device-folder"
        ):
            device.push({"huge": tmp_path / "huge"})
        assert dut.cached() == []
    assert dut.runs() == []
    with contextlib.closing(opened(dut)) as device:
        device.push({"weights": large})
    assert len(dut.cached()) == 1


def test_a_connection_cut_while_a_program_runs_is_reported(dut: DeviceUnderTest, large: Path, tmp_path: Path) -> None:
    (tmp_path / "request").write_bytes(b"{}")
    (tmp_path / "linked").symlink_to(large)
    with contextlib.closing(opened(dut)) as device:
        device.push({"artifact/weights": tmp_path / "linked", "request": tmp_path / "request"})
        for name in ("request", "linked"):
            (tmp_path / name).unlink()
        first, seen = device.folder, list[str]()

        def cut(line: str) -> None:
            seen.append(line)
            dut.cut()

        with pytest.raises(ConnectionLostError) as caught:
            device.run([device.python, "-c", FOREVER], 60, on_line=cut)
        message = str(caught.value)
        assert "the connection was lost" in message and "qat-edge-" not in message.replace(str(dut.root), "")
        assert "Done: sent weights.bin (0.2 MB" in message and "send artifact/weights, request." in message
        assert "Not done: run `" in message and first in message
        assert_ends(*map(int, seen[0].split()))
        # The next call finds all files under their names, in a new folder.
        listed = device.run(["sh", "-c", 'cat request; cmp artifact/weights "$1"', "sh", str(large)], 30)
        assert listed == CompletedProgram(0, "{}", "")
        assert device.folder != first
        deadline = time.monotonic() + 10
        while len(dut.runs()) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert dut.runs() == []


def test_results_lost_with_the_connection_differ_from_missing_results(dut: DeviceUnderTest, tmp_path: Path) -> None:
    with contextlib.closing(opened(dut)) as device:
        device.run(["touch", "results"], 30)
        dut.cut()
        deadline = time.monotonic() + 10
        while device.is_connected():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ConnectionLostError, match=r"Done: run `touch results`\. Not done: bring back results\."):
            device.pull("results", tmp_path / "back")
        with pytest.raises(ConnectionLostError):  # until a file is sent or a program run again
            device.pull("results", tmp_path / "back")
        device.run(["touch", "results"], 30)
        device.pull("results", tmp_path / "back")
    assert (tmp_path / "back").is_file()


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_a_file_is_sent_again_after_the_connection_is_cut(dut: DeviceUnderTest, tmp_path: Path) -> None:
    assert dut.cable is not None
    huge = tmp_path / "huge"
    huge.write_bytes(random.Random(0).randbytes(8 * 1024**2))
    with contextlib.closing(opened(dut)) as device:
        dut.cable.cut_after = 4 * 1024**2
        device.push({"huge": huge})
        assert dut.cable.cut_after == 0
        assert (Path(device.folder) / "huge").read_bytes() == huge.read_bytes()
    assert_gone(dut)
    assert list(dut.root.rglob(".incoming*")) == []


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_a_device_that_stays_unreachable_is_reported(dut: DeviceUnderTest, large: Path, tmp_path: Path) -> None:
    assert dut.cable is not None
    huge = tmp_path / "huge"
    huge.write_bytes(random.Random(0).randbytes(8 * 1024**2))
    device = opened(dut)
    device.push({"weights": large})
    dut.cable.cut_after, dut.cable.plugged = 4 * 1024**2, False
    with pytest.raises(ConnectionLostError) as caught:
        device.push({"huge": huge})
    message = str(caught.value)
    assert "Tried 4 times" in message and "Done: sent weights.bin" in message and "Not done: send huge." in message
    device.close()
    assert_gone(dut)
    dut.cable.plugged = True
    with contextlib.closing(opened(dut)) as again:
        again.push({"weights": large, "huge": huge})
    assert len(dut.cached()) == 2


@pytest.mark.parametrize("dut", ["fake-adb"], indirect=True)
def test_adb_reconnects_after_it_drops_during_a_file(dut: DeviceUnderTest, large: Path) -> None:
    state = dut.bin.parent / "state"
    with contextlib.closing(opened(dut)) as device:
        (state / "cut-push").touch()
        device.push({"weights": large})
        assert not (state / "cut-push").exists() and not (state / "offline").exists()
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
        (state / "gone").touch()
        (state / "cut-push").touch()
        large.write_bytes(large.read_bytes()[::-1])
        with pytest.raises(ConnectionLostError, match=r"(?s)offline.*Tried 4 times\. Done: .* Not done: send b"):
            device.push({"b": large})
    assert_gone(dut)
