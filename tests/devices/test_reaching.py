"""Devices that let us in, and what is said of those that do not."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from reached import WAYS, Cable, Way, large_file, on_the_way, opened

from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import ConnectionLostError, TransportError, UnknownNameError
from qat_edge_devices.transport import Access


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    with on_the_way(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_an_unknown_host_key_is_refused(way: Way) -> None:
    known = Path(str(way.ssh_config)).parent / "known_hosts"
    for text in ("", known.read_text().replace("AAAA", "AAAB")):
        known.write_text(text)
        with pytest.raises(TransportError, match=r"kitchen: cannot be reached\. The key of \[\S+ is not known here"):
            opened(way)
    assert known.read_text() == text
    assert list(way.folder.iterdir()) == []


@pytest.fixture
def gate(way: Way) -> Iterator[Cable]:
    """A jump host before ssh:behind: the same sshd at a port of its own, which must have a known key of its own."""
    assert way.cable is not None and way.ssh_config is not None
    cable = Cable(way.cable.target)
    config = Path(way.ssh_config)
    known = config.with_name("known_hosts")
    known.write_text(known.read_text() + known.read_text().replace(f":{way.cable.port}", f":{cable.port}"))
    kitchen = config.read_text()
    behind = kitchen.replace("Host kitchen", "Host behind\n  ProxyJump gate")
    # What the user's configuration permits for a jump host does not hold here.
    gate = kitchen.replace("Host kitchen", "Host gate\n  StrictHostKeyChecking no")
    config.write_text(behind + gate.replace(f"Port {way.cable.port}", f"Port {cable.port}"))
    yield cable
    cable.close()


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_a_device_behind_a_jump_host_is_reached_through_it(way: Way, gate: Cable, tmp_path: Path) -> None:
    large = large_file(tmp_path)
    with contextlib.closing(open_transport("ssh:behind", way.access)) as device:
        device.push({"weights": large})
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()  # type: ignore[attr-defined]
    assert gate.sent > large.stat().st_size
    assert way.runs() == []


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_an_unknown_key_of_a_jump_host_or_behind_it_is_named(way: Way, gate: Cable) -> None:
    assert way.cable is not None
    known = Path(str(way.ssh_config)).with_name("known_hosts")
    entries = known.read_text()
    for cable in (gate, way.cable):
        other = next(line for line in entries.splitlines() if f":{cable.port} " not in line)
        known.write_text(f"{other}\n")
        with pytest.raises(TransportError, match=rf"key of \[127\.0\.0\.1\]:{cable.port} is not known here") as caught:
            open_transport("ssh:behind", way.access)
        assert not isinstance(caught.value, ConnectionLostError) and known.read_text() == f"{other}\n"
    assert list(way.folder.iterdir()) == []


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_ssh_that_does_not_let_us_in_says_why(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(str(way.ssh_config)).parent / "user.pub").write_text("")
    with pytest.raises(TransportError, match=r"No key or agent of yours opens it .*\n.*Permission denied"):
        opened(way)
    with pytest.raises(TransportError, match=r"ssh:-oProxyCommand=id: cannot be reached"):
        open_transport("ssh:-oProxyCommand=id", Access(ssh_config=way.ssh_config))
    with pytest.raises(UnknownNameError, match="names no host"):
        open_transport("ssh://")
    monkeypatch.setenv("PATH", str(way.folder))
    with pytest.raises(TransportError, match="there is no `ssh` on this machine"):
        opened(way)


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_a_server_that_drops_connections_at_first_is_tried_again(way: Way) -> None:
    assert way.cable is not None
    way.cable.drops = 2
    opened(way).close()
    way.cable.drops = 9
    with pytest.raises(ConnectionLostError, match=r"ssh:kitchen: cannot be reached\. "):
        opened(way)
    assert way.cable.drops < 9 - 1  # more than once


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_ssh_shares_one_connection_and_leaves_no_socket(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    private = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are too long for a socket's name
    monkeypatch.setattr("tempfile.tempdir", str(private))
    log = way.bin.parent / "sshd.log"
    with contextlib.closing(opened(way)) as device:
        for _ in range(3):
            device.run(["true"], 30)
        (folder,) = private.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        with_port = Access(folder=str(way.folder), ssh_config=way.ssh_config)
        assert way.cable is not None
        address = f"ssh://{os.environ.get('USER', 'root')}@kitchen:{way.cable.port}"
        with contextlib.closing(open_transport(address, with_port)) as other:
            assert other.name == address
    private.rmdir()
    assert log.read_text().count("Accepted publickey") in (0, 2)  # nothing is logged at some log levels


@pytest.mark.parametrize("way", ["fake-adb"], indirect=True)
@pytest.mark.parametrize(
    ("said", "advice"),
    [
        ("device unauthorized.", "allow USB debugging"),
        ("more than one device/emulator", "adb:SERIAL"),
        ("no devices/emulators found", "Plug one in"),
        ("device '10.0.0.9:5555' not found", "Check the serial number"),
    ],
)
def test_adb_that_has_no_device_says_why(way: Way, said: str, advice: str) -> None:
    (way.bin.parent / "state" / "error").write_text(said)
    with pytest.raises(TransportError, match=f"(?s)cannot be reached.*{advice}.*{said}"):
        opened(way)


@pytest.mark.parametrize("way", ["fake-adb"], indirect=True)
def test_adb_without_exit_codes_or_without_a_client_is_refused(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    (way.bin.parent / "state" / "old").touch()
    with pytest.raises(TransportError, match="Android 7 or later"):
        opened(way)
    monkeypatch.setenv("PATH", str(way.folder))
    with pytest.raises(TransportError, match="Install the Android platform tools"):
        opened(way)


def test_a_folder_that_cannot_be_written_to_is_named(way: Way) -> None:
    (way.folder / "file").touch()
    access = Access(folder=str(way.folder / "file"), ssh_config=way.ssh_config)
    with pytest.raises(TransportError, match=r"there is no place for files: .*file"):
        open_transport(way.device, access)
