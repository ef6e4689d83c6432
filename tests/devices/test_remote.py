"""Transports to real devices on this machine: names are data, programs end, files arrive, nothing remains."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from device_fixtures import (
    DEVICE_TYPES,
    FOREVER,
    LARGE,
    SPAWN,
    DeviceUnderTest,
    assert_ends,
    assert_gone,
    device_under_test,
    is_running,
    large_file,
    opened,
)

from qat_edge_devices import ssh
from qat_edge_devices.device_errors import CancelledError, ConnectionLostError, DeviceTimeoutError, TransportError
from qat_edge_devices.remote import RemoteTransport
from qat_edge_devices.transport import CompletedProgram

NASTY = [*" '\"`$;&|<>()[]{}*?!#~\\%\n\t=-", "$(id)", "`id`", "';id;'", "\\n", "%s", "é", "漢", "\x7f"]


@pytest.fixture(params=DEVICE_TYPES)
def dut(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceUnderTest]:
    with device_under_test(request.param, tmp_path, monkeypatch) as found:
        yield found


@pytest.fixture
def device(dut: DeviceUnderTest) -> Iterator[RemoteTransport]:
    """A transport to `dut`; afterwards no work folder is left."""
    transport = opened(dut)
    yield transport
    transport.close()
    assert dut.runs() == []


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return large_file(tmp_path)


# --- names and arguments are data ------------------------------------------------------------------------


def random_words(seed: int, count: int) -> list[str]:
    dice = random.Random(seed)
    return ["".join(dice.choices(NASTY, k=dice.randint(1, 8))) for _ in range(count)]


def test_arguments_and_environment_reach_the_device_as_data(device: RemoteTransport, tmp_path: Path) -> None:
    code = "import json, os, sys; json.dump([sys.argv[1:], os.environ['WORD']], open('out.json', 'w'))"
    for seed in range(8):
        arguments = ["", *random_words(seed, 12), "-n", "--", "'"]
        word = random_words(seed + 100, 1)[0]
        completed = device.run([device.python, "-c", code, *arguments], 30, env={"WORD": word})
        assert completed == CompletedProgram(0, "", "")
        back = tmp_path / f"{seed}.json"
        device.pull("out.json", back)
        assert json.loads(back.read_text()) == [arguments, word]


def test_names_reach_the_device_as_data(
    device: RemoteTransport, dut: DeviceUnderTest, large: Path, tmp_path: Path
) -> None:
    dice = random.Random(1)
    names = {f"{index}{name}" for index, name in enumerate(random_words(2, 12)) if "/" not in name}
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


@pytest.mark.parametrize("sh", ["dash", "bash", "busybox", "mksh"])
@pytest.mark.parametrize("dut", ["fake-adb"], indirect=True)
def test_any_posix_shell_runs_and_ends_programs(dut: DeviceUnderTest, sh: str, large: Path) -> None:
    if shutil.which(sh) is None:
        pytest.skip(f"{sh} is not installed")
    (dut.bin / "sh").symlink_to(str(shutil.which(sh)))
    with contextlib.closing(opened(dut)) as device:
        device.push({"a b": large})
        for _ in range(10):  # a shell that misses a signal does so now and then
            assert device.run(["sh", "-c", "echo out; echo err >&2; exit 3"], 30) == CompletedProgram(
                3, "out\n", "err\n"
            )
        seen: list[str] = []
        with pytest.raises(DeviceTimeoutError):
            device.run([device.python, "-c", FOREVER], 2, on_line=seen.append)
        assert_ends(*map(int, seen[0].split()))
        assert device.info().cores == os.cpu_count()
    assert dut.runs() == []


def test_text_printed_by_a_login_shell_is_not_output(dut: DeviceUnderTest, large: Path, tmp_path: Path) -> None:
    dut.plant("sh", 'echo welcome home; echo welcome >&2\nexec /bin/sh "$@"')
    with contextlib.closing(opened(dut)) as device:
        device.push({"weights": large})
        seen: list[str] = []
        program = ["/bin/sh", "-c", "echo one; echo two >&2"]
        assert device.run(program, 30, on_line=seen.append) == CompletedProgram(0, "one\n", "two\n")
        assert seen == ["one"]
        device.pull("weights", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


# --- programs --------------------------------------------------------------------------------------------


def test_exit_codes_streams_and_signals_are_kept_apart(device: RemoteTransport) -> None:
    code = "import os, sys; print(os.getcwd()); print('oh', end='', file=sys.stderr); sys.exit(int(sys.argv[1]))"
    for number in (0, 7, 127):
        expected = CompletedProgram(number, f"{device.folder}\n", "oh")
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


def test_cancelling_from_another_thread_ends_everything(dut: DeviceUnderTest, large: Path) -> None:
    device, seen = opened(dut), []

    def cancel(line: str) -> None:
        seen.append(line)
        threading.Thread(target=device.cancel).start()

    with pytest.raises(CancelledError):
        device.run([device.python, "-c", FOREVER], 60, on_line=cancel)
    with pytest.raises(CancelledError):
        device.push({"weights": large})
    device.close()
    assert_ends(*map(int, seen[0].split()))
    assert dut.runs() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_remains_on_the_device_when_this_process_is_killed(dut: DeviceUnderTest, number: int) -> None:
    code = (
        "import signal; from contextlib import closing; from qat_edge_devices import open_transport, transport\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it\n"
        f"with closing(open_transport({dut.device!r}, transport.{dut.access!r})) as device:\n"
        f"    device.run([device.python, '-c', {FOREVER!r}], 60, on_line=lambda line: print(line, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ours:
        assert ours.stdout is not None
        pids = list(map(int, ours.stdout.readline().split()))
        assert len(dut.runs()) == 1 and all(map(is_running, pids))
        ours.send_signal(number)
        ours.communicate(timeout=30)
    assert_ends(*pids)
    assert_gone(dut)


def test_a_program_whose_shell_was_killed_ends_with_the_work_folder(dut: DeviceUnderTest) -> None:
    device, seen = opened(dut), []

    def kill_its_shell(line: str) -> None:
        seen.append(line)
        status = Path(f"/proc/{line.split()[0]}/status").read_text()
        os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
        threading.Timer(1, device.cancel).start()

    with pytest.raises((CancelledError, ConnectionLostError)):
        device.run([device.python, "-c", FOREVER], 60, on_line=kill_its_shell)
    device.close()
    assert_ends(int(seen[0].split()[0]))
    assert dut.runs() == []


# --- files -----------------------------------------------------------------------------------------------


def test_a_second_run_sends_only_what_changed(
    dut: DeviceUnderTest, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        with contextlib.closing(opened(dut)) as device:
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
    assert len(dut.cached()) == 2


def test_a_file_of_the_same_size_as_a_cached_one_is_not_hashed_before_it_is_sent(
    dut: DeviceUnderTest, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_bytes(large.read_bytes()[::-1])
    with contextlib.closing(opened(dut)) as device:
        device.push({"a": large})
        hashed: list[str] = []
        original = device._hash_on_device

        def noted(places: Iterable[str], size: int) -> list[str]:
            hashed.extend(listed := list(places))
            return original(listed, size)

        monkeypatch.setattr(device, "_hash_on_device", noted)
        device.push({"b": tmp_path / "other"})
        assert hashed == []
        device.push({"c": large})
        assert len(hashed) == 1
    assert len(dut.cached()) == 2


def test_a_file_that_cannot_be_hashed_as_it_arrives_is_hashed_afterwards(dut: DeviceUnderTest, large: Path) -> None:
    dut.plant("dd", "exit 1")
    with contextlib.closing(opened(dut)) as device:
        device.push({"weights": large})
        assert (Path(device.folder) / "weights").read_bytes() == large.read_bytes()
    assert len(dut.cached()) == 1


def test_files_sent_with_keep_false_are_not_cached(dut: DeviceUnderTest, large: Path) -> None:
    with contextlib.closing(opened(dut)) as device:
        device.push({"request": large}, keep=False)
        assert (Path(device.folder) / "request").read_bytes() == large.read_bytes()
    assert dut.cached() == [] and dut.runs() == []


def test_close_removes_the_work_folder_and_nothing_else(dut: DeviceUnderTest, large: Path) -> None:
    with contextlib.closing(opened(dut)) as first:
        first.push({"weights": large})
    mine = dut.root / "runs" / "somebody's"
    mine.mkdir()
    (dut.folder / "neighbour").touch()
    cached = dut.cached()
    second = opened(dut)
    second.push({"weights": large, "outside": dut.folder / "neighbour"})
    (Path(second.folder) / "link").symlink_to(dut.folder)
    second.close()
    second.close()
    assert dut.runs() == ["somebody's"] and dut.cached() == cached
    assert (dut.folder / "neighbour").is_file()


def test_two_connections_do_not_interfere(dut: DeviceUnderTest, large: Path) -> None:
    with contextlib.closing(opened(dut)) as one, contextlib.closing(opened(dut)) as other:
        both = [threading.Thread(target=each.push, args=({"weights": large},)) for each in (one, other)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert one.folder != other.folder
        one.close()
        assert other.run(["cmp", "weights", f"{dut.root}/cache/{dut.cached()[0]}"], 30).returncode == 0
    assert len(dut.cached()) == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../neighbour", "inner/../../neighbour", "", "nul\0"])
def test_names_outside_the_work_folder_are_refused(device: RemoteTransport, large: Path, name: str) -> None:
    with pytest.raises(TransportError, match="is not a path inside the work folder"):
        device.push({name: large})
    with pytest.raises(TransportError, match="is not a path inside the work folder"):
        device.pull(name, large.parent / "back")


def test_missing_files_are_named(device: RemoteTransport, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"absent cannot be sent \(No such file"):
        device.push({"absent": tmp_path / "absent"})
    with pytest.raises(TransportError, match=r"absent cannot be brought back to .*there is no absent"):
        device.pull("absent", tmp_path / "back")
    assert list(tmp_path.glob(".pull-*")) == []


def test_an_archive_cannot_write_outside_its_folder(
    device: RemoteTransport, dut: DeviceUnderTest, tmp_path: Path
) -> None:
    # A device that sends a forged archive.
    evil = "import io, sys, tarfile; t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|')"
    evil += "; i = tarfile.TarInfo('../escaped'); i.size = 1; t.addfile(i, io.BytesIO(b'x')); t.close()"
    dut.plant("tar", f'exec {sys.executable} -c "{evil}"')
    (Path(device.folder) / "results").mkdir()
    with pytest.raises(TransportError, match="results cannot be brought back"):
        device.pull("results", tmp_path / "into" / "back" if (tmp_path / "into").mkdir() else tmp_path / "into/back")
    assert not (tmp_path / "into" / "escaped").exists() and not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("dut", ["ssh"], indirect=True)
def test_ssh_works_where_connections_cannot_be_shared(
    dut: DeviceUnderTest, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows: each command has a connection of its own."""
    monkeypatch.setattr(ssh, "SHARES_CONNECTION", False)
    with contextlib.closing(opened(dut)) as transport:
        assert "ControlMaster=no" in transport.command() and not any(a[-2:] == "/s" for a in transport.command())
        transport.push({"artifact/model.pte": large})
        assert transport.run(["wc", "-c", "artifact/model.pte"], 30).stdout.split()[0] == str(LARGE)
        transport.pull("artifact/model.pte", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert dut.runs() == []


def test_info_describes_the_machine(device: RemoteTransport) -> None:
    info = device.info()
    assert (info.machine, info.cores) == (os.uname().machine, os.cpu_count())
    assert info.bits == 64 and info.cpu_model and info.os
    assert info.memory_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert info.free_memory_bytes is not None and 0 < info.free_memory_bytes <= info.memory_bytes
    free = shutil.disk_usage(device.root).free
    assert info.free_disk_bytes is not None and abs(info.free_disk_bytes - free) < 0.1 * free
