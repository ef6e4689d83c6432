"""One writer per run folder: refused at once, released by a dead process, entered again by its own thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from qat_edge import run_lock
from qat_edge.errors import RunError
from qat_edge.run import Run
from qat_edge.verbs.report import report

HOLD = """
import sys, time
from pathlib import Path
from qat_edge import run_lock
with run_lock.writing(Path(sys.argv[1]), "export", create=True):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock of a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_name_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    with process:
        refusal = rf"run is in use: `qat-edge export`, process {process.pid} on .* Wait until it ends"
        with pytest.raises(RunError, match=refusal), run_lock.writing(tmp_path / "run", "validate"):
            pass
        process.send_signal(signal.SIGKILL)
    with run_lock.writing(tmp_path / "run", "validate"):
        pass


def test_the_name_of_a_dead_holder_is_not_given(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as process:
        left = (tmp_path / "run" / run_lock.HOLDER).read_text()
        process.kill()
    with hold(tmp_path / "run") as process:
        (tmp_path / "run" / run_lock.HOLDER).write_text(left)
        with pytest.raises(RunError, match="in use: another process"), run_lock.writing(tmp_path / "run", "validate"):
            pass
        process.kill()


def test_a_thread_enters_again_and_another_one_does_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with run_lock.writing(tmp_path, "validate"):
                pass
        except RunError as error:
            refused.append(str(error))

    with run_lock.writing(tmp_path, "compare"):
        with run_lock.writing(tmp_path, "export"):
            pass
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"`qat-edge compare`, process {os.getpid()}" in refused[0]
    enter()
    assert len(refused) == 1


def test_a_folder_made_for_the_lock_goes_if_nothing_came_into_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lock.writing(tmp_path / "a" / "b", "finetune", create=True):
        assert run_lock.is_unused(tmp_path / "a" / "b")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with run_lock.writing(tmp_path / "a" / "b", "finetune", create=True):
        (tmp_path / "a" / "b" / "config.yaml").write_text("")
        assert not run_lock.is_unused(tmp_path / "a" / "b")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"config.yaml", run_lock.LOCK}


def test_a_folder_of_somebody_else_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(RunError, match="refused"), run_lock.writing(tmp_path / "model", "finetune", create=True):
        raise RunError("refused")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


def test_a_run_folder_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"file/run: cannot be written \(Not a directory\)"),
        run_lock.writing(tmp_path / "file" / "run", "finetune", create=True),
    ):
        pass


def test_every_verb_that_writes_takes_the_lock(tmp_path: Path) -> None:
    from qat_edge.options import CompareOptions, ExportOptions, QuantizeOptions, SensitivityOptions, ValidateOptions
    from qat_edge.verbs.compare import compare
    from qat_edge.verbs.export import export
    from qat_edge.verbs.quantize import quantize
    from qat_edge.verbs.sensitivity import sensitivity
    from qat_edge.verbs.validate import validate, validate_devices, validate_run
    from qat_edge.verbs.verify import verify

    run = Run(tmp_path)
    verbs = [
        lambda: quantize(run, QuantizeOptions()),
        lambda: export(run, ExportOptions()),
        lambda: verify(run, ()),
        lambda: validate(run, ValidateOptions()),
        lambda: validate_run(run, ValidateOptions()),
        lambda: validate_devices(run, ValidateOptions()),
        lambda: sensitivity(run, SensitivityOptions()),
        lambda: compare(run, CompareOptions(), None),
    ]
    with hold(tmp_path) as process:
        for verb in verbs:
            with pytest.raises(RunError, match="is in use"):
                verb()
        process.kill()
    with pytest.raises(RunError):
        report([run])


@pytest.mark.parametrize("name", [run_lock.LOCK, run_lock.HOLDER])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_lock_that_is_no_file_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    {"folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "other"), "pipe": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(RunError, match=f"{name} is a {kind}; qat-edge keeps a plain file there"):
        run_lock.writing(tmp_path, "export").__enter__()
    assert not (tmp_path / "other").exists()
