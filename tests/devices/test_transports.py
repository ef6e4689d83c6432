"""The contract of a transport: files arrive, programs end on request, and nothing remains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_fixtures import assert_ends

from qat_edge_devices import RUNTIMES, TRANSPORTS, open_runtime, open_transport
from qat_edge_devices.device_errors import DeviceTimeoutError, TransportError, UnknownNameError
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.mock import MockTransport
from qat_edge_devices.transport import CompletedProgram

# Program that starts a child sleeping for a minute and writes its process id; tests append what follows.
SPAWN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
open("child", "w").write(str(child.pid))
"""


@pytest.fixture
def local(tmp_path: Path) -> Iterator[LocalTransport]:
    transport = LocalTransport(root=tmp_path)
    yield transport
    transport.close()


def child_of(transport: LocalTransport) -> int:
    return int((transport.folder / "child").read_text())


def test_a_pushed_file_is_not_copied(local: LocalTransport, tmp_path: Path) -> None:
    artifact = tmp_path / "model.pte"
    artifact.write_bytes(b"weights")
    local.push({"artifact/model.pte": artifact})
    assert (local.folder / "artifact/model.pte").samefile(artifact)


def test_files_are_copied_where_they_cannot_be_linked(
    local: LocalTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "model.pte").write_bytes(b"weights")
    local.push({"model.pte": tmp_path / "model.pte"})
    assert (local.folder / "model.pte").read_bytes() == b"weights"


def test_pushing_over_a_name_does_not_change_the_file_linked_there(local: LocalTransport, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        local.push({"model.pte": tmp_path / name})
    assert (local.folder / "model.pte").read_text() == "two"
    assert (tmp_path / "one").read_text() == "one"
    local.push({"model.pte": tmp_path / "two"})
    assert (local.folder / "model.pte").samefile(tmp_path / "two")


def test_a_folder_is_pushed_and_pulled(local: LocalTransport, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "a").write_text("1")
    (source / "inner/b").write_text("2")
    local.push({"sent": source})
    local.pull("sent", tmp_path / "back")
    assert {p.relative_to(tmp_path / "back").as_posix() for p in (tmp_path / "back").rglob("*")} == {
        "a", "inner", "inner/b",
    }  # fmt: skip
    assert (tmp_path / "back/inner/b").read_text() == "2"


def test_programs_start_in_the_work_folder_with_separate_streams(local: LocalTransport) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['WORD']); print('oh', file=sys.stderr); sys.exit(7)"
    completed = local.run([local.python, "-c", code], 30, env={"WORD": "set"})
    assert completed == CompletedProgram(7, f"{local.folder} set\n", "oh\n")
    assert completed.signal is None


def test_lines_arrive_while_the_program_runs(local: LocalTransport) -> None:
    # The program goes on only once its first line has been seen.
    code = "import os, time\nprint('one', flush=True)\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('two')"
    seen = []

    def watch(line: str) -> None:
        seen.append(line)
        (local.folder / "go").touch()

    local.run([local.python, "-c", code], 30, on_line=watch)
    assert seen == ["one", "two"]


def test_timeout_kills_the_program_and_its_children(local: LocalTransport) -> None:
    code = SPAWN + "print('thinking', file=sys.stderr, flush=True)\ntime.sleep(60)"
    began = time.monotonic()
    with pytest.raises(DeviceTimeoutError, match=r"(?s)local: .* ran past 1 s .*thinking"):
        local.run([local.python, "-c", code], 1)
    assert time.monotonic() - began < 10
    assert_ends(child_of(local))


def test_an_interrupt_kills_the_program_and_its_children(local: LocalTransport) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    code = SPAWN + "print('started', flush=True)\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        local.run([local.python, "-c", code], 30, on_line=interrupt)
    assert_ends(child_of(local))


def test_a_child_left_behind_ends_with_the_program(local: LocalTransport) -> None:
    assert local.run([local.python, "-c", SPAWN], 30).returncode == 0
    assert_ends(child_of(local))


def test_a_signal_differs_from_an_exit_code(local: LocalTransport) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert local.run([local.python, "-c", code], 30).signal == signal.SIGKILL
    assert CompletedProgram(128 + signal.SIGSEGV, "", "").signal == signal.SIGSEGV  # as a remote shell reports it


def test_close_removes_the_work_folder_and_nothing_else(tmp_path: Path) -> None:
    artifact = tmp_path / "exports"
    artifact.mkdir()
    (artifact / "model.onnx").write_bytes(b"graph")
    transport = LocalTransport(root=tmp_path)
    transport.push({"artifact": artifact})
    transport.close()
    transport.close()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["exports", "model.onnx"]
    assert (artifact / "model.onnx").read_bytes() == b"graph"


@pytest.mark.parametrize("remote", ["/etc/passwd", "../neighbour", "inner/../../neighbour", ""])
def test_names_outside_the_work_folder_are_refused(local: LocalTransport, tmp_path: Path, remote: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TransportError, match="is not a path inside the work folder"):
        local.push({remote: tmp_path / "file"})


def test_missing_files_and_programs_are_named(local: LocalTransport, tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"local: .*absent cannot be sent .*No such file"):
        local.push({"absent": tmp_path / "absent"})
    with pytest.raises(TransportError, match=r"local: absent cannot be brought back .*No such file"):
        local.pull("absent", tmp_path / "back")
    with pytest.raises(TransportError, match=r"local: `no-such-python -V` cannot be started"):
        local.run(["no-such-python", "-V"], 5)


def test_info_describes_this_machine(local: LocalTransport) -> None:
    info = local.info()
    assert info.machine == os.uname().machine
    assert info.cores == os.cpu_count()
    assert info.memory_bytes > 2**28
    assert info.cpu_model


def test_names_are_resolved_and_unknown_ones_listed() -> None:
    transport = open_transport("local")
    transport.close()
    assert transport.name == "local"
    for target in RUNTIMES:
        open_runtime(target, transport, threads=1)
    known = "adb, browser, browser-webgpu, local, ssh"
    with pytest.raises(UnknownNameError, match=rf"'lokal' is not a known transport\. Known: {known}"):
        open_transport("lokal")
    with pytest.raises(UnknownNameError, match=r"'tflite' is not a known runtime\. Known: executorch, gguf, hf, onnx"):
        open_runtime("tflite", transport, threads=1)
    with pytest.raises(UnknownNameError, match="takes no address"):
        open_transport("local:kitchen")


def test_the_mock_records_its_calls(tmp_path: Path) -> None:
    def handler(argv: object, files: dict[str, bytes]) -> CompletedProgram:
        files["out/copy"] = files["in/a"]
        return CompletedProgram(0, "one\ntwo\n", "")

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a").write_bytes(b"1")
    seen: list[str] = []
    mock = MockTransport(handler)
    mock.push({"in": tmp_path / "folder"})
    mock.run(["copy"], 1, on_line=seen.append)
    mock.pull("out", tmp_path / "back")
    assert (tmp_path / "back/copy").read_bytes() == b"1"
    assert seen == ["one", "two"]
    with pytest.raises(TransportError, match="no absent on the device"):
        mock.pull("absent", tmp_path / "absent")
    mock.close()
    assert mock.calls == [("push", "in"), ("run", "copy"), ("pull", "out"), ("pull", "absent"), ("close",)]


def test_importing_the_package_loads_no_library_outside_python() -> None:
    modules = ["qat_edge_devices", "qat_edge_devices.mock"]
    modules += [entry.partition(":")[0] for entry in (*TRANSPORTS.values(), *RUNTIMES.values())]
    code = f"import sys, {', '.join(modules)}; print(*{{m.partition('.')[0] for m in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"qat_edge", "numpy", "torch", "onnxruntime", "executorch"} & set(loaded)
