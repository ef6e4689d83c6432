"""Devices that tests can reach: sshd on loopback, the real adbd in a network of its own, and an `adb` of ours."""

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
WAYS = ("ssh", "adbd", "fake-adb")


@dataclass
class Way:
    """One way to a device whose disk is ours to look at.

    folder: holds its root folder. bin: comes first in the PATH of its programs. env: what this process needs
    meanwhile. cut: ends the connection as a pulled cable would. sent: bytes that went to it so far, protocols and all.
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
        """Work folders that are there now."""
        return sorted(p.name for p in (self.root / "runs").glob("*"))

    def cached(self) -> list[str]:
        return sorted(p.name for p in (self.root / "cache").glob("*"))

    def plant(self, name: str, script: str) -> None:
        """Put a program of that name before the device's own."""
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)


def why_not(way: str) -> str | None:
    """Why a way cannot be had on this machine, None where it can."""
    if way == "ssh" and not (_program("sshd") and shutil.which("ssh")):
        return "sshd is not installed (tests/devices/install does it)"
    if way == "adbd" and not (_library_folder() / "android").is_dir():
        return "the real adbd is not installed (tests/devices/install does it)"
    missing = [name for name in ("adb", "ip", "unshare", "nsenter") if not _program(name)]
    if way == "adbd" and missing:
        return f"there is no {', '.join(missing)} (tests/devices/install installs adb and iproute2)"
    if way == "adbd" and subprocess.run([*_unshare(), "true"], capture_output=True, check=False).returncode:
        return "no network namespace can be made here, and adbd listens on every interface of its network"
    return None


@contextlib.contextmanager
def reached(way: str, folder: Path) -> Iterator[Way]:
    """A device of its own below `folder`, gone at the end."""
    for name in ("disk", "bin"):
        (folder / name).mkdir()
    made = {"ssh": _ssh, "adbd": _adbd, "fake-adb": _fake_adb}[way]
    with made(folder) as found:
        yield found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- ssh -----------------------------------------------------------------------------------------------------


class Cable:
    """Forwards a port of this machine to another.

    It can be cut, at once or after so many bytes, can drop so many connections in their beginnings, and be unplugged.
    sent: bytes that it brought to its target.
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
def _ssh(folder: Path) -> Iterator[Way]:
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    port = free_port()
    (folder / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\nMaxStartups 100\nMaxSessions 50\n"
        f'SetEnv "PATH={folder}/bin:/usr/local/bin:/usr/bin:/bin"\n'
    )
    with contextlib.suppress(OSError):
        Path("/run/sshd").mkdir(exist_ok=True)  # where root's sshd locks its children up
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
        yield Way(
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
def _adbd(folder: Path) -> Iterator[Way]:
    """adbd of Debian trixie on this machine's own files, in a network namespace, for it binds every interface."""
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

    def adb(*words: str) -> str:
        argv = [str(wrapper / "adb"), *words]
        return subprocess.run(
            argv, env={**os.environ, **client}, capture_output=True, text=True, check=False, timeout=30
        ).stdout

    def sent() -> int:
        """As the kernel counts what adbd's side of the connection took in."""
        argv = ["nsenter", "-t", str(server.pid), *user, "-n", _program("ss"), "-tinH", "sport = :5555"]
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        return sum(map(int, re.findall(r"bytes_received:(\d+)", said)))  # none before it is connected

    try:
        deadline = time.monotonic() + 20
        while "connected to" not in adb("connect", "127.0.0.1:5555"):
            assert time.monotonic() < deadline, (folder / "adbd.log").read_text()
            time.sleep(0.1)
        adb("disconnect")
        yield Way(
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


# --- an adb of ours ------------------------------------------------------------------------------------------

FAKE_ADB = '''#!{python}
"""adb as far as the transport uses it; the device is a shell of this machine. `state` sets what goes wrong."""
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
    # A session of its own: what happens to the client happens to it only through its pipes.
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


words = sys.argv[1:]
if words[0] == "-s":
    words = words[2:]
if words[0] == "shell":
    sys.exit(shell(words[2]))
elif words[0] == "push":
    push(*words[1:])
elif words[0] == "connect":
    if not is_set("gone"):
        (STATE / "offline").unlink(missing_ok=True)
elif words[0] == "get-state":
    if is_set("error"):
        sys.exit("error: " + (STATE / "error").read_text())
    if is_set("offline"):
        sys.exit("error: device offline")
    print("device")
elif words[0] == "features":
    print("" if is_set("old") else "shell_v2\\ncmd")
'''


@contextlib.contextmanager
def _fake_adb(folder: Path) -> Iterator[Way]:
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

    yield Way("adb:10.0.0.9:5555", folder / "disk", folder / "bin", cut, env)


# --- what tests do with them ---------------------------------------------------------------------------------

# Starts a child that would sleep for a minute and says both ids, then does what follows.
SPAWN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(os.getpid(), child.pid, flush=True)
"""
FOREVER = SPAWN + "time.sleep(60)"
LARGE = 3 * remote.CACHE_BYTES


@contextlib.contextmanager
def on_the_way(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """What `reached` gives, in the environment of this test, which is skipped where the way cannot be had."""
    reason = why_not(kind)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(session, "PAUSES_S", (0.05, 0.1, 0.2))
    folder.mkdir(exist_ok=True)
    with reached(kind, folder) as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


def opened(way: Way) -> RemoteTransport:
    transport = open_transport(way.device, way.access)
    assert isinstance(transport, RemoteTransport)
    return transport


def large_file(folder: Path) -> Path:
    """Random bytes, enough to be kept in the device's cache."""
    path = folder / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(LARGE))
    return path


def is_running(pid: int) -> bool:
    """Whether a process still does anything: a zombie that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"of {pids} some outlived the program that started them"
        time.sleep(0.02)


def assert_gone(way: Way) -> None:
    """The device removes work folders by itself, a moment after it lost us."""
    deadline = time.monotonic() + 10
    while way.runs():
        assert time.monotonic() < deadline, f"{way.runs()} were left on the device"
        time.sleep(0.02)
