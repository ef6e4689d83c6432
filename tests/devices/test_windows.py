"""The parts that run on Windows alone, with a kernel32 in Python: job objects and figures of memory."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import qat_edge_devices
from qat_edge_devices.transport import CompletedProgram

PACKAGE = Path(qat_edge_devices.__file__).parent


class FakeFunction:
    """A function of kernel32, whose types may be set."""

    def __init__(self, kernel: FakeKernel, name: str) -> None:
        self.kernel, self.name = kernel, name

    def __call__(self, *arguments: Any) -> Any:
        self.kernel.calls.append((self.name, *arguments))
        action = self.kernel.actions.get(self.name, 1)
        return action(*arguments) if callable(action) else action


class FakeKernel:
    """A kernel32 that records calls and answers 1, or what `actions` has."""

    def __init__(self, **actions: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.actions = actions

    def __getattr__(self, name: str) -> FakeFunction:
        function = FakeFunction(self, name)
        setattr(self, name, function)
        return function


def as_on_windows(name: str, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return a module of the package as Windows would import it, with `kernel` in the place of kernel32."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "WinDLL", lambda *_, **__: kernel, raising=False)
    monkeypatch.setattr(ctypes, "WinError", OSError, raising=False)
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 5, raising=False)
    spec = importlib.util.spec_from_file_location(f"windows_{Path(name).stem}", PACKAGE / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakePopen:
    """A process that counts how often it is killed."""

    pid = 4321
    kills = 0

    def kill(self) -> None:
        self.kills += 1


def test_a_program_and_its_children_end_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(CreateJobObjectW=70, OpenProcess=80)
    process_group = as_on_windows("process_group.py", kernel, monkeypatch)
    process = FakePopen()

    group = process_group.ProcessGroup(process)
    group.kill()
    group.close()
    group.kill()  # from another thread, a moment late: the job is gone
    group.close()
    assert kernel.calls == [
        ("CreateJobObjectW", None, None), ("OpenProcess", 0x101, False, 4321), ("AssignProcessToJobObject", 70, 80),
        ("CloseHandle", 80), ("TerminateJobObject", 70, 1), ("CloseHandle", 70),
    ]  # fmt: skip
    assert process.kills == 2


def test_a_program_that_ended_before_it_was_added_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel(CreateJobObjectW=70, OpenProcess=None)
    process_group = as_on_windows("process_group.py", kernel, monkeypatch)
    process_group.ProcessGroup(FakePopen()).kill()
    assert [call[0] for call in kernel.calls] == ["CreateJobObjectW", "OpenProcess", "TerminateJobObject"]


def test_memory_is_that_of_kernel32(monkeypatch: pytest.MonkeyPatch) -> None:
    def fill_counters(process: Any, reference: Any, size: int) -> int:
        reference._obj.WorkingSetSize, reference._obj.PeakWorkingSetSize = 300, 400
        assert size == ctypes.sizeof(reference._obj) == reference._obj.cb
        return 1

    def fill_status(reference: Any) -> int:
        assert reference._obj.dwLength == ctypes.sizeof(reference._obj)
        reference._obj.ullTotalPhys, reference._obj.ullAvailPhys = 16 * 2**30, 5 * 2**30
        return 1

    kernel = FakeKernel(K32GetProcessMemoryInfo=fill_counters, GlobalMemoryStatusEx=fill_status)
    memory = as_on_windows("agent/windows_memory.py", kernel, monkeypatch)
    assert (memory.resident_bytes(), memory.peak_bytes()) == (300, 400)
    assert memory.machine_bytes() == (16 * 2**30, 5 * 2**30)

    kernel.actions.update(K32GetProcessMemoryInfo=0, GlobalMemoryStatusEx=0)
    for read in (memory.peak_bytes, memory.machine_bytes):
        with pytest.raises(OSError, match="5"):
            read()


def test_exit_codes_of_windows_are_no_signals() -> None:
    """An access violation ends a program with 0xC0000005 there."""
    assert CompletedProgram(0xC0000005, "", "").signal is None
    assert CompletedProgram(137, "", "").signal == 9


def test_the_agent_needs_no_module_of_unix(tmp_path: Path) -> None:
    """It is sent without its package, so that it must start with what any Python has."""
    code = (
        "import os, sys, types\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.modules['agent.windows_memory'] = types.SimpleNamespace(resident_bytes=lambda: 3, peak_bytes=lambda: 4)\n"
        "import agent\n"
        "agent.windows_memory = sys.modules['agent.windows_memory']\n"
        "for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'): sys.modules[name] = None\n"
        "for name in ('sched_getaffinity', 'sched_setaffinity', 'sysconf'): delattr(os, name)\n"
        "sys.platform = 'win32'\n"
        "from pathlib import Path\n"
        "def missing(*_, **__): raise FileNotFoundError\n"
        "Path.read_text = missing\n"
        "from agent import machine\n"
        "print(machine.pin(1, 'onnx'), machine.resident_bytes(), machine.peak_bytes(), machine.allowed_cpus())\n"
        "assert machine.machine_state()['clocks_khz'] == []\n"
    )
    command = [sys.executable, "-c", code, str(PACKAGE)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (done.stdout, done.stderr) == ("1 3 4 set()\n", "")


def test_peak_memory_of_a_command_is_that_of_its_largest_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    from qat_edge import peak_memory

    peaks = {1: 20, 2: 900, 3: 70}

    class FakeProcess:
        def __init__(self, pid: int = 1) -> None:
            self.pid = pid

        def children(self, recursive: bool) -> list[FakeProcess]:
            return [FakeProcess(2), FakeProcess(3), FakeProcess(4)]

        def memory_info(self) -> SimpleNamespace:
            if self.pid not in peaks:
                raise psutil.NoSuchProcess(self.pid)
            return SimpleNamespace(peak_wset=peaks[self.pid])

    monkeypatch.setattr(psutil, "Process", FakeProcess)
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("windows_peak_memory", peak_memory.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "POLL_S", 0.01)

    class Waiting:
        pid = 1

        def wait(self) -> int:
            import time

            time.sleep(0.2)
            return 0

    assert module.own_peak_bytes() == 20
    assert module.wait_for(Waiting()) == 900
