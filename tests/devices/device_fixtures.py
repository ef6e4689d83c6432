"""Devices for tests: sshd on loopback, the real adbd in its own network namespace, and a fake `adb`."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from qat_edge_devices import open_transport, remote, session
from qat_edge_devices.remote import RemoteTransport
from qat_edge_devices.transport import Access

TRIXIE = Path(__file__).parents[2] / ".cache" / "trixie"  # made by tests/devices/install
DEVICE_TYPES = ("ssh", "adbd", "fake-adb")


@dataclass
class DeviceUnderTest:
    """A device under test. Its disk is a folder of this machine, so tests can inspect it.

    Attributes:
        device: the device as `open_transport` takes it.
        folder: folder that holds its root folder.
        bin: folder that comes first in the PATH of its programs.
        cut: ends the connection as a pulled cable would.
        env: environment variables that this process needs to reach it.
        ssh_config: configuration file for ssh.
        cable: the port forwarder in front of sshd, for ssh.
        sent: returns the bytes sent to it so far, protocols included; None if they cannot be counted.
    """

    device: str
    folder: Path
    bin: Path
    cut: Callable[[], None]
    env: dict[str, str] = field(default_factory=dict)
    ssh_config: str | None = None
    cable: Cable | None = None
    sent: Callable[[], int] | None = None

    @property
    def access(self) -> Access:
        return Access(python=sys.executable, folder=str(self.folder), ssh_config=self.ssh_config)

    @property
    def root(self) -> Path:
        return self.folder / "qat-edge"

    def runs(self) -> list[str]:
        """Return the existing work folders."""
        return sorted(p.name for p in (self.root / "runs").glob("*"))

    def cached(self) -> list[str]:
        return sorted(p.name for p in (self.root / "cache").glob("*"))

    def plant(self, name: str, script: str) -> None:
        """Put a program of that name before the device's own in PATH."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)


def unavailable_reason(device_type: str) -> str | None:
    """Return why a type of device is unavailable on this machine, or None if it is available."""
    if device_type == "ssh" and not (_program("sshd") and shutil.which("ssh")):
        return "sshd is not installed (tests/devices/install does it)"
    if device_type == "adbd" and not (_library_folder() / "android").is_dir():
        return "the real adbd is not installed (tests/devices/install does it)"
    missing = [name for name in ("adb", "ip", "unshare", "nsenter") if not _program(name)]
    if device_type == "adbd" and missing:
        return f"there is no {', '.join(missing)} (tests/devices/install installs adb and iproute2)"
    if device_type == "adbd" and subprocess.run([*_unshare(), "true"], capture_output=True, check=False).returncode:
        return "no network namespace can be made here, and adbd listens on every interface of its network"
    return None


@contextlib.contextmanager
def start_device(device_type: str, folder: Path) -> Iterator[DeviceUnderTest]:
    """Start a device below `folder`, and stop it at the end."""
    for name in ("disk", "bin"):
        (folder / name).mkdir()
    start = {"ssh": _ssh, "adbd": _adbd, "fake-adb": _fake_adb}[device_type]
    with start(folder) as found:
        yield found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- ssh -----------------------------------------------------------------------------------------------------


class Cable:
    """Forwards one port of this machine to another, with faults on demand.

    Attributes:
        target: port it forwards to.
        plugged: False to refuse new connections.
        cut_after: bytes after which it cuts all connections; 0 for never.
        drops: number of connections to drop as soon as they are opened.
        sent: bytes forwarded to the target.
    """

    def __init__(self, target: int) -> None:
        self.target, self.plugged, self.cut_after, self.drops = target, True, 0, 0
        self.sent = 0
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()

    def close(self) -> None:
        self.plugged = False
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.drops or not self.plugged:
                    self.drops = max(0, self.drops - 1)
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [near, far]
                for one, other in ((near, far), (far, near)):
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._forward, args=(one, other, one is near), daemon=True).start()

    def _forward(self, one: socket.socket, other: socket.socket, to_target: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError), one:
            while data := one.recv(65536):
                other.sendall(data)
                passed += len(data)
                self.sent += len(data) if to_target else 0
                if self.cut_after and passed > self.cut_after:
                    self.cut_after = 0
                    self.cut()
            other.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _ssh(folder: Path) -> Iterator[DeviceUnderTest]:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\nMaxStartups 100\nMaxSessions 50\n"
        f'SetEnv "PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin"\n'
    )
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root confines its child processes
    argv = [_program("sshd"), "-D", "-f", str(folder / "sshd.conf"), "-E", str(folder / "sshd.log")]
    server = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    cable = Cable(port)
    public = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{cable.port} {public}")
    (folder / "ssh.conf").write_text(
        f"Host kitchen\n  HostName 127.0.0.1\n  Port {cable.port}\n  IdentityFile {folder}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    try:
        _wait_for(port)
        config = str(folder / "ssh.conf")
        yield DeviceUnderTest(
            "ssh:kitchen", folder / "disk", folder / "bin", cable.cut, ssh_config=config, cable=cable,
            sent=lambda: cable.sent,
        )  # fmt: skip
    finally:
        cable.close()
        for process in psutil.Process(server.pid).children():
            process.kill()
        server.kill()
        server.wait()


def _program(name: str) -> str:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin") or ""


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens at port {port}"
            time.sleep(0.05)


# --- the real adbd -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _adbd(folder: Path) -> Iterator[DeviceUnderTest]:
    """Run adbd of Debian trixie on this machine's files, in a network namespace: it listens on every interface."""
    library = _library_folder()
    loader = next(library.glob("ld-linux-*.so.*"))
    search = f"{library}:{library / 'android'}"
    argv = [str(loader), "--library-path", search, str(TRIXIE / "usr/sbin/adbd")]
    home = folder / "home"
    home.mkdir()
    env = {"PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "ADBD_PORT": "5555"}
    with (folder / "adbd.log").open("wb") as log:
        script = f'{_program("ip")} link set lo up && exec "$@"'
        server = subprocess.Popen([*_unshare(), "sh", "-c", script, "sh", *argv], env=env, stdout=log, stderr=log)
    wrapper = folder / "client"
    wrapper.mkdir()
    user = [] if os.geteuid() == 0 else ["-U", "--preserve-credentials"]
    enter = " ".join(["nsenter", "-t", str(server.pid), *user, "-n"])
    (wrapper / "adb").write_text(f'#!/bin/sh\nexec {enter} {shutil.which("adb")} "$@"\n')
    (wrapper / "adb").chmod(0o755)
    client = {
        "PATH": f"{wrapper}:{os.environ['PATH']}", "HOME": str(home), "TMPDIR": str(folder),
        "ANDROID_ADB_SERVER_PORT": "5137",
    }  # fmt: skip

    def adb(*arguments: str) -> str:
        argv = [str(wrapper / "adb"), *arguments]
        return subprocess.run(
            argv, env={**os.environ, **client}, capture_output=True, text=True, check=False, timeout=30
        ).stdout

    def sent() -> int:
        """Return the bytes that the kernel counted at adbd's side of the connection."""
        argv = ["nsenter", "-t", str(server.pid), *user, "-n", _program("ss"), "-tinH", "sport = :5555"]
        counters = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        return sum(map(int, re.findall(r"bytes_received:(\d+)", counters)))  # none before it is connected

    try:
        deadline = time.monotonic() + 20
        while "connected to" not in adb("connect", "127.0.0.1:5555"):
            assert time.monotonic() < deadline, (folder / "adbd.log").read_text()
            time.sleep(0.1)
        adb("disconnect")
        yield DeviceUnderTest(
            "adb:127.0.0.1:5555", folder / "disk", folder / "bin", lambda: print(adb("disconnect")), client, sent=sent
        )
    finally:
        adb("kill-server")
        server.kill()
        server.wait()


def _unshare() -> list[str]:
    return ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-Urn"]


def _library_folder() -> Path:
    return TRIXIE / "usr/lib" / f"{platform.machine()}-linux-gnu"


# --- a fake adb ---------------------------------------------------------------------------------------------

FAKE_ADB = '''#!{python}
"""The adb commands that the transport uses; the device is a shell of this machine. Files in `state` cause faults."""
import os, shutil, signal, subprocess, sys, threading, time
from pathlib import Path

STATE = Path({state!r})
CUT = STATE / "cut"


def is_set(name):
    return (STATE / name).exists()


def relay(source, target):
    while data := os.read(source, 65536):
        try:
            while data:
                data = data[os.write(target, data):]
        except OSError:
            break
    if target > 2:
        os.close(target)


def shell(line):
    env = dict(os.environ, PATH={path!r})
    cut = CUT.stat().st_mtime_ns if is_set("cut") else 0
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    # Its own session: it notices the end of the client only through its pipes.
    there = subprocess.Popen(["sh", "-c", line], env=env, start_new_session=True, **pipes)
    threading.Thread(target=relay, args=(0, there.stdin.fileno()), daemon=True).start()
    outs = [threading.Thread(target=relay, args=(p.fileno(), fd)) for p, fd in ((there.stdout, 1), (there.stderr, 2))]
    for one in outs:
        one.daemon = True
        one.start()
    while any(one.is_alive() for one in outs):
        outs[0].join(0.02), outs[1].join(0.02)
        if is_set("cut") and CUT.stat().st_mtime_ns != cut:
            os._exit(255)
    return there.wait() % 256


def push(local, remote):
    if is_set("slow"):
        time.sleep(60)
    if is_set("cut-push"):
        (STATE / "cut-push").unlink()
        CUT.touch()
        Path(remote).write_bytes(Path(local).read_bytes()[:1000])
        (STATE / "offline").touch()
        sys.exit("adb: error: failed to read copy response: closed")
    try:
        shutil.copyfile(local, remote)
    except OSError as error:
        sys.exit(f"adb: error: failed to copy '{{local}}' to '{{remote}}': remote write failed: {{error.strerror}}")


arguments = sys.argv[1:]
if arguments[0] == "-s":
    arguments = arguments[2:]
if arguments[0] == "shell":
    sys.exit(shell(arguments[2]))
elif arguments[0] == "push":
    push(*arguments[1:])
elif arguments[0] == "connect":
    if not is_set("gone"):
        (STATE / "offline").unlink(missing_ok=True)
elif arguments[0] == "get-state":
    if is_set("error"):
        sys.exit("error: " + (STATE / "error").read_text())
    if is_set("offline"):
        sys.exit("error: device offline")
    print("device")
elif arguments[0] == "features":
    print("" if is_set("old") else "shell_v2\\ncmd")
'''


@contextlib.contextmanager
def _fake_adb(folder: Path) -> Iterator[DeviceUnderTest]:
    (folder / "client").mkdir()
    state = folder / "state"
    state.mkdir()
    path = f"{folder}/bin:/usr/local/bin:/usr/bin:/bin"
    (folder / "client" / "adb").write_text(FAKE_ADB.format(python=sys.executable, state=str(state), path=path))
    (folder / "client" / "adb").chmod(0o755)
    env = {"PATH": f"{folder}/client:{os.environ['PATH']}"}

    def cut() -> None:
        (state / "cut").touch()
        os.utime(state / "cut")

    yield DeviceUnderTest("adb:10.0.0.9:5555", folder / "disk", folder / "bin", cut, env)


# --- helpers -------------------------------------------------------------------------------------------------

# Program that starts a child sleeping for a minute and prints both process ids; tests append what follows.
SPAWN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(os.getpid(), child.pid, flush=True)
"""
FOREVER = SPAWN + "time.sleep(60)"
LARGE = 3 * remote.CACHE_BYTES


@contextlib.contextmanager
def device_under_test(device_type: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceUnderTest]:
    """Start a device with the environment to reach it; skip the test if its type is unavailable."""
    reason = unavailable_reason(device_type)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(session, "PAUSES_S", (0.05, 0.1, 0.2))
    folder.mkdir(exist_ok=True)
    with start_device(device_type, folder) as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


def opened(dut: DeviceUnderTest) -> RemoteTransport:
    transport = open_transport(dut.device, dut.access)
    assert isinstance(transport, RemoteTransport)
    return transport


def large_file(folder: Path) -> Path:
    """Write a file of random bytes, large enough to be kept in the device's cache."""
    path = folder / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(LARGE))
    return path


def is_running(pid: int) -> bool:
    """Return whether a process still runs; a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"some of {pids} outlived the program that started them"
        time.sleep(0.02)


def assert_gone(dut: DeviceUnderTest) -> None:
    """Wait until the device has removed the work folders by itself, soon after the connection ended."""
    deadline = time.monotonic() + 10
    while dut.runs():
        assert time.monotonic() < deadline, f"{dut.runs()} were left on the device"
        time.sleep(0.02)
