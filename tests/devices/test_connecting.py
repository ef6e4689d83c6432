"""Connecting to devices, and the messages if that fails."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_fixtures import DEVICE_TYPES, Cable, DeviceUnderTest, device_under_test, large_file, opened

from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import ConnectionLostError, TransportError, UnknownNameError
from qat_edge_devices.transport import Access


@pytest.fixture(params=DEVICE_TYPES)
def dut(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceUnderTest]:
    with device_under_test(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_an_unknown_host_key_is_refused(dut: DeviceUnderTest) -> None:
    known = Path(str(dut.ssh_config)).parent / "known_hosts"
    for text in ("", known.read_text().replace("AAAA", "AAAB")):
        known.write_text(text)
        with pytest.raises(TransportError, match=r"kitchen: cannot be reached\. The key of \[\S+ is not known here"):
            opened(dut)
    assert known.read_text() == text
    assert list(dut.folder.iterdir()) == []


@pytest.fixture
def gate(dut: DeviceUnderTest) -> Iterator[Cable]:
    """A jump host before ssh:behind: the same sshd behind another port, which needs its own known key."""
    assert dut.cable is not None and dut.ssh_config is not None
    cable = Cable(dut.cable.target)
    config = Path(dut.ssh_config)
    known = config.with_name("known_hosts")
    known.write_text(known.read_text() + known.read_text().replace(f":{dut.cable.port}", f":{cable.port}"))
    kitchen = config.read_text()
    behind = kitchen.replace("Host kitchen", "Host behind\n  ProxyJump gate")
    # The user's configuration accepts unknown keys for this jump host; the transport overrides that.
    gate = kitchen.replace("Host kitchen", "Host gate\n  StrictHostKeyChecking no")
    config.write_text(behind + gate.replace(f"Port {dut.cable.port}", f"Port {cable.port}"))
    yield cable
    cable.close()


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_a_device_is_reached_through_a_jump_host(dut: DeviceUnderTest, gate: Cable, tmp_path: Path) -> None:
    large = large_file(tmp_path)
    with contextlib.closing(open_transport("ssh:behind", dut.access)) as device:
        device.push({"weights": large})
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()  # type: ignore[attr-defined]
    assert gate.sent > large.stat().st_size
    assert dut.runs() == []


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_an_unknown_key_of_a_jump_host_or_of_the_device_behind_it_is_named(dut: DeviceUnderTest, gate: Cable) -> None:
    assert dut.cable is not None
    known = Path(str(dut.ssh_config)).with_name("known_hosts")
    entries = known.read_text()
    for cable in (gate, dut.cable):
        other = next(line for line in entries.splitlines() if f":{cable.port} " not in line)
        known.write_text(f"{other}\n")
        with pytest.raises(TransportError, match=rf"key of \[127\.0\.0\.1\]:{cable.port} is not known here") as caught:
            open_transport("ssh:behind", dut.access)
        assert not isinstance(caught.value, ConnectionLostError) and known.read_text() == f"{other}\n"
    assert list(dut.folder.iterdir()) == []


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_a_refused_ssh_login_reports_the_reason(dut: DeviceUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(str(dut.ssh_config)).parent / "user.pub").write_text("")
    with pytest.raises(TransportError, match=r"No key or agent of yours opens it .*\n.*Permission denied"):
        opened(dut)
    with pytest.raises(UnknownNameError, match="begins with '-' would be read as an option"):
        open_transport("ssh:-oProxyCommand=id", Access(ssh_config=dut.ssh_config))
    with pytest.raises(UnknownNameError, match="names no host"):
        open_transport("ssh://")
    monkeypatch.setenv("PATH", str(dut.folder))
    with pytest.raises(TransportError, match="there is no `ssh` on this machine"):
        opened(dut)


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_connecting_is_retried_if_the_server_drops_connections(dut: DeviceUnderTest) -> None:
    assert dut.cable is not None
    dut.cable.drops = 2
    opened(dut).close()
    dut.cable.drops = 9
    with pytest.raises(ConnectionLostError, match=r"ssh:kitchen: cannot be reached\. "):
        opened(dut)
    assert dut.cable.drops < 9 - 1  # more than once


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_ssh_shares_one_connection_and_leaves_no_socket(dut: DeviceUnderTest, monkeypatch: pytest.MonkeyPatch) -> None:
    private = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are too long for a socket's name
    monkeypatch.setattr("tempfile.tempdir", str(private))
    log = dut.bin.parent / "sshd.log"
    with contextlib.closing(opened(dut)) as device:
        for _ in range(3):
            device.run(["true"], 30)
        (folder,) = private.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        with_port = Access(folder=str(dut.folder), ssh_config=dut.ssh_config)
        assert dut.cable is not None
        address = f"ssh://{os.environ.get('USER', 'root')}@kitchen:{dut.cable.port}"
        with contextlib.closing(open_transport(address, with_port)) as other:
            assert other.name == address
    private.rmdir()
    assert log.read_text().count("Accepted publickey") in (0, 2)  # nothing is logged at some log levels


@pytest.mark.parametrize("dut", ["fake-adb"], indirect=True)
@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("device unauthorized.", "allow USB debugging"),
        ("more than one device/emulator", "adb:SERIAL"),
        ("no devices/emulators found", "Plug one in"),
        ("device '10.0.0.9:5555' not found", "Check the serial number"),
    ],
)
def test_adb_without_a_device_reports_the_reason(dut: DeviceUnderTest, message: str, advice: str) -> None:
    (dut.bin.parent / "state" / "error").write_text(message)
    with pytest.raises(TransportError, match=f"(?s)cannot be reached.*{advice}.*{message}"):
        opened(dut)


@pytest.mark.parametrize("dut", ["fake-adb"], indirect=True)
def test_adb_without_exit_codes_or_without_a_client_is_refused(
    dut: DeviceUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dut.bin.parent / "state" / "old").touch()
    with pytest.raises(TransportError, match="Android 7 or later"):
        opened(dut)
    monkeypatch.setenv("PATH", str(dut.folder))
    with pytest.raises(TransportError, match="Install the Android platform tools"):
        opened(dut)


def test_a_folder_that_is_not_writable_is_named(dut: DeviceUnderTest) -> None:
    (dut.folder / "file").touch()
    access = Access(folder=str(dut.folder / "file"), ssh_config=dut.ssh_config)
    with pytest.raises(TransportError, match=r"there is no folder for files: .*file"):
        open_transport(dut.device, access)
