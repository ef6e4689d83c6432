"""Transports to real devices of this machine: what they promise, and what is said and left when something breaks."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from reached import WAYS, Way, reached, why_not

from qat_edge_devices import open_transport, remote, session, shell
from qat_edge_devices.errors import (
    CancelledError,
    ConnectionLostError,
    DeviceTimeoutError,
    IntegrityError,
    RoomError,
    TransportError,
    UnknownNameError,
)
from qat_edge_devices.remote import RemoteTransport
from qat_edge_devices.transport import Access, Completed

LARGE = 3 * remote.CACHE_BYTES
NASTY = [*" '\"`$;&|<>()[]{}*?!#~\\%\n\t=-", "$(id)", "`id`", "';id;'", "\\n", "%s", "é", "漢", "\x7f"]
# Starts a child that would sleep for a minute and says both ids, then does what follows.
SPAWN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
print(os.getpid(), child.pid, flush=True)
"""
FOREVER = SPAWN + "time.sleep(60)"


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    reason = why_not(request.param)
    if reason:
        pytest.skip(reason)
    monkeypatch.setattr(session, "PAUSES_S", (0.05, 0.1, 0.2))
    with reached(request.param, tmp_path) as found:
        for name, value in found.env.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def device(way: Way) -> Iterator[RemoteTransport]:
    """A transport along `way`, after which no work folder is left."""
    transport = opened(way)
    yield transport
    transport.close()
    assert way.runs() == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(random.Random(0).randbytes(LARGE))
    return path


def opened(way: Way) -> RemoteTransport:
    transport = open_transport(way.device, way.access)
    assert isinstance(transport, RemoteTransport)
    return transport


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, f"of {pids} some still run on the device"
        time.sleep(0.02)


def assert_gone(way: Way) -> None:
    """The device removes work folders by itself, a moment after it lost us."""
    deadline = time.monotonic() + 10
    while way.runs():
        assert time.monotonic() < deadline, f"{way.runs()} were left on the device"
        time.sleep(0.02)


# --- names and arguments are data ------------------------------------------------------------------------


def words(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices(NASTY, k=dice.randint(1, 8))) for _ in range(count)]


def test_arguments_and_environment_reach_the_device_as_data(device: RemoteTransport, tmp_path: Path) -> None:
    code = "import json, os, sys; json.dump([sys.argv[1:], os.environ['WORD']], open('out.json', 'w'))"
    for seed in range(8):
        arguments = ["", *words(seed, 12), "-n", "--", "'"]
        word = words(seed + 100, 1)[0]
        completed = device.run([device.python, "-c", code, *arguments], 30, env={"WORD": word})
        assert completed == Completed(0, "", "")
        back = tmp_path / f"{seed}.json"
        device.pull("out.json", back)
        assert json.loads(back.read_text()) == [arguments, word]


def test_names_reach_the_device_as_data(device: RemoteTransport, way: Way, large: Path, tmp_path: Path) -> None:
    dice = random.Random(1)
    names = {f"{index}{name}" for index, name in enumerate(words(2, 12)) if "/" not in name}
    names |= {f"in {name}/{dice.choice(NASTY)}x" for name in sorted(names)[:4]} | {"-rf", " ", "'", "$HOME"}
    (tmp_path / "small").write_bytes(b"small")
    device.push({name: large if index % 2 else tmp_path / "small" for index, name in enumerate(sorted(names))})
    there = Path(device.folder)
    assert {p.relative_to(there).as_posix() for p in there.rglob("*") if p.is_file()} == names
    for index, name in enumerate(sorted(names)):
        assert (there / name).read_bytes() == (large.read_bytes() if index % 2 else b"small")
    (there / "-results ;").mkdir()
    (there / "-results ;" / "a'b").write_text("back")
    device.pull("-results ;", tmp_path / "back")
    assert (tmp_path / "back" / "a'b").read_text() == "back"


@pytest.mark.parametrize("login", ["dash", "bash", "busybox sh", "mksh", "fish", "tcsh", "zsh"])
def test_any_login_shell_understands_the_command_line(login: str) -> None:
    if shutil.which(login.split()[0]) is None:
        pytest.skip(f"{login} is not installed")
    script = shell.Script('printf "%s|" "$@" "$v"; cat; echo oh >&2; exit 7', "w", {"v": "a'b\\n$x"}, ["é \\ \n'", "%"])
    argv = [*login.split(), "-c", shell.BOOTSTRAP]
    done = subprocess.run(argv, input=script.line() + b"rest\n", capture_output=True, check=False)
    answer = script.completed(Completed(done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert answer == Completed(7, "é \\ \n'|%|a'b\\n$x|rest\n", "oh\n")


@pytest.mark.parametrize("sh", ["dash", "bash", "busybox", "mksh"])
@pytest.mark.parametrize("way", ["fake-adb"], indirect=True)
def test_any_posix_shell_runs_and_ends_programs(way: Way, sh: str, large: Path) -> None:
    if shutil.which(sh) is None:
        pytest.skip(f"{sh} is not installed")
    (way.bin / "sh").symlink_to(str(shutil.which(sh)))
    with contextlib.closing(opened(way)) as device:
        device.push({"a b": large})
        assert device.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 30) == Completed(3, "out\n", "err\n")
        seen: list[str] = []
        with pytest.raises(DeviceTimeoutError):
            device.run([device.python, "-c", FOREVER], 2, on_line=seen.append)
        assert_ends(*map(int, seen[0].split()))
        assert device.info().cores == os.cpu_count()
    assert way.runs() == []


def test_what_a_login_shell_prints_is_no_output(way: Way, large: Path, tmp_path: Path) -> None:
    way.plant("sh", 'echo welcome home; echo welcome >&2\nexec /bin/sh "$@"')
    with contextlib.closing(opened(way)) as device:
        device.push({"weights": large})
        seen: list[str] = []
        program = ["/bin/sh", "-c", "echo one; echo two >&2"]
        assert device.run(program, 30, on_line=seen.append) == Completed(0, "one\n", "two\n")
        assert seen == ["one"]
        device.pull("weights", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


# --- programs --------------------------------------------------------------------------------------------


def test_exit_codes_streams_and_signals_are_told_apart(device: RemoteTransport) -> None:
    code = "import os, sys; print(os.getcwd()); print('oh', end='', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    for number in (0, 7, 127):
        expected = Completed(number, f"{device.folder}\n", "oh")
        assert device.run([device.python, "-c", code, str(number)], 30) == expected
    for number in (signal.SIGKILL, signal.SIGSEGV):
        code = f"import os; os.kill(os.getpid(), {int(number)})"
        assert device.run([device.python, "-c", code], 30).signal == number
    with pytest.raises(TransportError, match=r"`no-such-python -V` cannot be started: there is no no-such-python"):
        device.run(["no-such-python", "-V"], 30)


def test_lines_arrive_while_the_program_runs(device: RemoteTransport) -> None:
    code = "import os, time\nprint('one', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('two')"
    seen = []

    def watch(line: str) -> None:
        seen.append(line)
        (Path(device.folder) / "go").touch()

    device.run([device.python, "-c", code], 30, on_line=watch)
    assert seen == ["one", "two"]


def test_a_timeout_ends_the_program_and_its_children(device: RemoteTransport) -> None:
    seen: list[str] = []
    code = SPAWN + "print('thinking', file=sys.stderr, flush=True)\ntime.sleep(60)"
    with pytest.raises(DeviceTimeoutError, match=r"(?s)ran past 2 s .*\n  thinking$") as caught:
        device.run([device.python, "-c", code], 2, on_line=seen.append)
    assert "qat-edge-begin" not in str(caught.value)
    assert_ends(*map(int, seen[0].split()))
    assert device.run(["true"], 30).returncode == 0


def test_a_child_left_behind_ends_with_the_program(device: RemoteTransport) -> None:
    completed = device.run([device.python, "-c", SPAWN], 30)
    assert_ends(*map(int, completed.stdout.split()))


def test_an_interrupt_ends_the_program_and_its_children(device: RemoteTransport) -> None:
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.run([device.python, "-c", FOREVER], 60, on_line=interrupt)
    assert_ends(*map(int, seen[0].split()))


def test_cancelling_from_another_thread_ends_it_all(way: Way, large: Path) -> None:
    device, seen = opened(way), []

    def cancel(line: str) -> None:
        seen.append(line)
        threading.Thread(target=device.cancel).start()

    with pytest.raises(CancelledError):
        device.run([device.python, "-c", FOREVER], 60, on_line=cancel)
    with pytest.raises(CancelledError):
        device.push({"weights": large})
    device.close()
    assert_ends(*map(int, seen[0].split()))
    assert way.runs() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_on_the_device_when_we_are_ended(way: Way, number: int) -> None:
    code = (
        "import signal; from contextlib import closing; from qat_edge_devices import open_transport, transport\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it\n"
        f"with closing(open_transport({way.device!r}, transport.{way.access!r})) as device:\n"
        f"    device.run([device.python, '-c', {FOREVER!r}], 60, on_line=lambda line: print(line, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        pids = list(map(int, ours.stdout.readline().split()))
        assert len(way.runs()) == 1 and all(map(is_running, pids))
        ours.send_signal(number)
        ours.communicate(timeout=30)
    assert_ends(*pids)
    assert_gone(way)


def test_a_program_whose_shell_was_killed_ends_with_the_work_folder(way: Way) -> None:
    device, seen = opened(way), []

    def kill_its_shell(line: str) -> None:
        seen.append(line)
        status = Path(f"/proc/{line.split()[0]}/status").read_text()
        os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
        threading.Timer(1, device.cancel).start()

    with pytest.raises((CancelledError, ConnectionLostError)):
        device.run([device.python, "-c", FOREVER], 60, on_line=kill_its_shell)
    device.close()
    assert_ends(int(seen[0].split()[0]))
    assert way.runs() == []


# --- files -----------------------------------------------------------------------------------------------


def test_a_second_run_sends_only_what_changed(
    way: Way, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_bytes(large.read_bytes()[::-1])
    (tmp_path / "request").write_bytes(b"{}")
    sent: list[int] = []
    for files, bytes_sent in (
        ({"a": large, "sub/b": large, "request": tmp_path / "request"}, LARGE),
        ({"a": large, "request": tmp_path / "request"}, 0),
        ({"a": other, "b": large}, LARGE),
    ):
        with contextlib.closing(opened(way)) as device:
            original = device.send_file

            def counted(local: Path, size: int, place: str, original: object = original) -> None:
                sent.append(size)
                original(local, size, place)  # type: ignore[operator]

            monkeypatch.setattr(device, "send_file", counted)
            device.push(files)
            for name, path in files.items():
                assert (Path(device.folder) / name).read_bytes() == path.read_bytes()
        assert sum(sent) == bytes_sent
        sent.clear()
    assert len(way.cached()) == 2


def test_what_is_not_worth_keeping_is_not_kept(way: Way, large: Path) -> None:
    with contextlib.closing(opened(way)) as device:
        device.push({"request": large}, keep=False)
        assert (Path(device.folder) / "request").read_bytes() == large.read_bytes()
    assert way.cached() == [] and way.runs() == []


def test_close_removes_the_work_folder_and_nothing_else(way: Way, large: Path) -> None:
    with contextlib.closing(opened(way)) as first:
        first.push({"weights": large})
    mine = way.root / "runs" / "somebody's"
    mine.mkdir()
    (way.folder / "beside").touch()
    cached = way.cached()
    second = opened(way)
    second.push({"weights": large, "outside": way.folder / "beside"})
    (Path(second.folder) / "link").symlink_to(way.folder)
    second.close()
    second.close()
    assert way.runs() == ["somebody's"] and way.cached() == cached
    assert (way.folder / "beside").is_file()


def test_two_at_once_do_not_meet(way: Way, large: Path) -> None:
    with contextlib.closing(opened(way)) as one, contextlib.closing(opened(way)) as other:
        both = [threading.Thread(target=each.push, args=({"weights": large},)) for each in (one, other)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert one.folder != other.folder
        one.close()
        assert other.run(["cmp", "weights", f"{way.root}/cache/{way.cached()[0]}"], 30).returncode == 0
    assert len(way.cached()) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../beside", "inner/../../beside", "", "nul\0"])
def test_names_outside_the_work_folder_are_refused(device: RemoteTransport, large: Path, name: str) -> None:
    with pytest.raises(TransportError, match="does not name a place in the work folder"):
        device.push({name: large})
    with pytest.raises(TransportError, match="does not name a place in the work folder"):
        device.pull(name, large.parent / "back")


def test_missing_files_are_named(device: RemoteTransport, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"absent cannot be sent \(No such file"):
        device.push({"absent": tmp_path / "absent"})
    with pytest.raises(TransportError, match=r"absent cannot be brought back to .*there is no absent"):
        device.pull("absent", tmp_path / "back")
    assert list(tmp_path.glob(".pull-*")) == []


def test_an_archive_cannot_leave_the_folder_it_is_for(device: RemoteTransport, way: Way, tmp_path: Path) -> None:
    # A device that answers with an archive of its own making.
    evil = "import io, sys, tarfile; t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|')"
    evil += "; i = tarfile.TarInfo('../escaped'); i.size = 1; t.addfile(i, io.BytesIO(b'x')); t.close()"
    way.plant("tar", f'exec {sys.executable} -c "{evil}"')
    (Path(device.folder) / "results").mkdir()
    with pytest.raises(TransportError, match="results cannot be brought back"):
        device.pull("results", tmp_path / "into" / "back" if (tmp_path / "into").mkdir() else tmp_path / "into/back")
    assert not (tmp_path / "into" / "escaped").exists() and not (tmp_path / "escaped").exists()


def test_info_describes_the_machine(device: RemoteTransport) -> None:
    info = device.info()
    assert (info.machine, info.cores) == (os.uname().machine, os.cpu_count())
    assert info.bits == 64 and info.cpu_model and info.os
    assert info.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert info.free_memory_bytes is not None and 0 < info.free_memory_bytes <= info.memory_bytes
    free = shutil.disk_usage(device.root).free
    assert info.free_disk_bytes is not None and abs(info.free_disk_bytes - free) < 0.1 * free


# --- faults ----------------------------------------------------------------------------------------------


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
        way.plant("sha256sum", f"cat >/dev/null; echo '{said}  -'")
        with pytest.raises(IntegrityError, match=r"(something else|digests)"):
            device.push({"weights": large})
        assert way.cached() == [] or answer == "nothing"
        (way.bin / "sha256sum").unlink()
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
    with contextlib.closing(opened(way)) as device:
        device.push({"artifact/weights": large, "request": tmp_path / "request"})
        (tmp_path / "request").unlink()
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


# --- reaching --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ssh"], indirect=True)
def test_an_unknown_host_key_is_refused(way: Way) -> None:
    known = Path(str(way.ssh_config)).parent / "known_hosts"
    for text in ("", known.read_text().replace("AAAA", "AAAB")):
        known.write_text(text)
        with pytest.raises(TransportError, match=r"ssh:kitchen: cannot be reached\. Its key is not known here"):
            opened(way)
    assert known.read_text() == text
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
