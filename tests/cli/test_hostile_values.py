"""Values that no command can use end in one paragraph that names the flag or the key (C24)."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import rich.console
from click.testing import CliRunner

import qat_edge
from qat_edge import config
from qat_edge.cli import bug_report, commands
from qat_edge.cli import console as console_module
from qat_edge.cli.commands import main
from qat_edge.cli.console import visible
from qat_edge.errors import DataError, QatEdgeError, UsageError
from qat_edge.options import ExportOptions, FinetuneOptions, ValidateOptions

FINETUNE = ["finetune", "--model", "m", "--data", "d", "--out", "x"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FINETUNE, "--steps", str(2**70)], "--steps: 1180591620717411303424 is above the greatest permitted value"),
        ([*FINETUNE, "--steps", "-1"], "--steps: -1 is below the least permitted value, 0"),
        ([*FINETUNE, "--learning-rate", "nan"], "--learning-rate: expected a number, found nan"),
        ([*FINETUNE, "--learning-rate", "inf"], "--learning-rate: expected a number, found inf"),
        ([*FINETUNE, "--lora-dropout", "1"], "--lora-dropout: 1.0 is above the greatest permitted value, 0.99"),
        ([*FINETUNE, "--distill-weight", "1.5"], "--distill-weight: 1.5 is above the greatest permitted value, 1"),
        ([*FINETUNE, "--seed", str(2**32)], "--seed: 4294967296 is above the greatest permitted value, 4294967295"),
        (["validate", "run", "--min-top1", "95"], "--min-top1: 95.0 is above the greatest permitted value, 1"),
        (["validate", "run", "--max-kl", "nan"], "--max-kl: expected a number, found nan"),
        (["validate", "run", "--threads", "100000"], "--threads: 100000 is above the greatest permitted value, 1024"),
        (["export", "run", "--context-length", str(10**30)], "--context-length: 10"),
        (["generate", "run", "hello", "--max-new-tokens", str(2**70)], "--max-new-tokens"),
        (["generate", "run", "hel\udcfflo"], "prompt: 'hel\\udcfflo' is not UTF-8 text"),
        (["generate", "run", "hello", "--system", "\udcff"], "--system: '\\udcff' is not UTF-8 text"),
        ([*FINETUNE, "--eval-data", "a\udcff"], "--eval-data: 'a\\udcff' is not UTF-8 text"),
        ([*FINETUNE, "--model", ""], "--model: empty. Name a file, a folder or an id on the Hub"),
        ([*FINETUNE, "--data", " "], "--data: empty. Name a file"),
        (["validate", "run", "--profile", ""], "--profile: empty. Name a profile or a .toml file"),
        ([*FINETUNE, "--eval-data", "a" * 5000], "--eval-data: 5000 characters; at most 4096 are permitted"),
        (
            ["finetune", "--model", "m", "--data", "d", "--out", "file.txt/run"],
            "--out file.txt/run: file.txt is a file",
        ),
        (["compare", "--model", "m", "--data", "d", "--out", "file.txt/a/b"], "--out file.txt/a/b: file.txt is a file"),
        (["demo", "--out", "file.txt/run"], "--out file.txt/run: file.txt is a file"),
        (["validate", "run", "--junit", "file.txt/a.xml"], "--junit file.txt/a.xml: file.txt is a file"),
        ([*FINETUNE[:-1], "n" * 300], "File name too long"),
    ],
    ids=range(24),
)
def test_a_hostile_flag_is_one_paragraph(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output and len(result.stderr) < 1500
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 8)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "is not supported; write the value again"),
        ("finetune: {steps: [1, 2, [3]]}", "finetune.steps: expected int, found list of 3"),
        ("finetune: {steps: " + "9" * 5000 + "}", "an integer of 5000 digits"),
        ("finetune: {steps: 1e99999}", "finetune.steps: expected int, found '1e99999'"),
        ("finetune: {learning_rate: .inf}", "finetune.learning_rate: expected a number, found inf"),
        ("finetune: {learning_rate: 1" + "0" * 99 + "}", "finetune.learning_rate: 1e+99 is above"),
        ('finetune: {model: "a\\0b", data: d}', "finetune.model: 'a\\x00b' is not UTF-8 text without null"),
        ("finetune: {model: " + "a" * 5000 + "}", "finetune.model: 5000 characters"),
        ("k" * 1000 + ": {}", "unknown section 'kkk"),
        ("finetune: {" + "k" * 1000 + ": 1}", "unknown key 'finetune.kkk"),
        ("[]", "expected sections such as 'finetune:', found list"),
        ("0", "expected sections such as 'finetune:', found int"),
        ("export: {target: []}", "export.target: an empty list leaves nothing to do"),
        ("validate: {device: []}", "validate.device: an empty list leaves nothing to do"),
    ],
    ids=range(14),
)
def test_a_hostile_configuration_is_one_paragraph(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    classes: dict[str, type] = {"finetune": FinetuneOptions, "export": ExportOptions, "validate": ValidateOptions}
    section = next((name for name in classes if text.startswith(name)), "finetune")
    with pytest.raises(UsageError) as raised:
        config.load(classes[section], section, path, {})
    assert message in str(raised.value) and str(path) in str(raised.value) and len(str(raised.value)) < 1500


def test_a_bad_value_in_the_file_does_not_matter_where_a_flag_overrides_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("finetune: {model: m, data: d, steps: -1}\n")
    assert config.load(FinetuneOptions, "finetune", path, {"steps": 3}).steps == 3


def test_the_api_names_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    calls: list[tuple[str, Any]] = [
        ("export.target: an empty list", lambda: qat_edge.export(tmp_path, target=[])),
        ("validate.device: an empty list", lambda: qat_edge.validate(tmp_path, device=[])),
        (
            "finetune.learning_rate: expected a number",
            lambda: qat_edge.finetune("m", "d", "o", learning_rate=float("nan")),
        ),
        ("finetune.learning_rate: expected float", lambda: qat_edge.finetune("m", "d", "o", learning_rate=10**400)),
        ("out .*file is a file", lambda: qat_edge.finetune("m", "d", tmp_path / "file" / "run")),
        ("max_new_tokens: 1180591620717411303424", lambda: qat_edge.generate(tmp_path, "a", max_new_tokens=2**70)),
        ("prompt: .* is not UTF-8", lambda: qat_edge.generate(tmp_path, "\ud800")),
    ]
    for message, call in calls:
        with pytest.raises(UsageError, match=message):
            call()


# --- what still escapes -------------------------------------------------------------------------------------


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Result of a command in which `error` is raised."""

    def fail(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(commands, "_open", fail)
    return CliRunner().invoke(main, ["quantize", "run"])


def test_an_unexpected_error_is_a_bug_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bug_report.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["qat-edge", "quantize", "a run"])
    result = raising(ZeroDivisionError("division by zero"), monkeypatch)
    assert result.exit_code == bug_report.EX_SOFTWARE == 70
    (written,) = tmp_path.iterdir()
    for part in (qat_edge.__version__, "ZeroDivisionError: division by zero", str(written), "quantize 'a run'"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr
    text = written.read_text()
    assert "Traceback" in text and "division by zero" in text and "torch 2." in text and "quantize 'a run'" in text


def test_a_panic_in_a_library_is_a_bug_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    monkeypatch.setattr(bug_report.tempfile, "tempdir", str(tmp_path))
    result = raising(PanicException("index out of bounds"), monkeypatch)
    assert result.exit_code == bug_report.EX_SOFTWARE
    assert "PanicException: index out of bounds" in result.stderr


# --- what reaches the terminal ------------------------------------------------------------------------------

HOSTILE = "a\x1b[31mb\x07\r\u202ec\u2066\x9b2J\udc80\x00"
SHOWN = r"a\x1b[31mb\x07\r\u202ec\u2066\x9b2J\udc80\x00"


@pytest.mark.parametrize("error", [DataError, UsageError, click.UsageError])
def test_control_characters_in_an_error_are_shown_as_escapes(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bug_report.tempfile, "tempdir", str(tmp_path))
    result = raising(error(f"{HOSTILE}\n\tend"), monkeypatch)
    assert SHOWN in result.stderr
    assert not set("\x1b\x07\r\u202e\x9b\x00") & set(result.stderr)


def test_control_characters_in_messages_and_progress_are_shown_as_escapes() -> None:
    stream = io.StringIO()
    terminal = rich.console.Console(file=stream, force_terminal=True, color_system=None, width=400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console_module, "console", lambda: terminal)
        reporter = console_module.ConsoleReporter()
        reporter.info(HOSTILE)
        reporter.warn(HOSTILE)
        with reporter.progress(f"[red]{HOSTILE}", 2) as bar:
            bar.update(1, HOSTILE)
    written = stream.getvalue()
    assert written.count(SHOWN) >= 4 and "[red]" in written
    assert "\x1b[31m" not in written and "\u202e" not in written


def test_other_text_is_shown_as_it_is() -> None:
    text = "naïve 日本語 👩\u200d💻 \n\t'quoted' \\x1b"
    assert visible(text) == text


def test_a_bug_report_needs_no_folder_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bug_report.tempfile, "tempdir", "/no/such/folder")
    result = raising(KeyError("x"), monkeypatch)
    assert result.exit_code == 70 and "no file could be written" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "Out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left on device. Make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            "runs/x: Permission denied. Choose another path",
        ),
    ],
    ids=["memory", "torch", "disk", "permission"],
)
def test_a_resource_that_ran_out_is_one_paragraph(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = raising(error, monkeypatch)
    assert (result.exit_code, message in result.stderr) == (1, True), result.stderr


def test_errors_of_our_own_keep_their_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert raising(QatEdgeError("x"), monkeypatch).exit_code == 1
    assert raising(UsageError("x"), monkeypatch).exit_code == 2
    assert raising(KeyboardInterrupt(), monkeypatch).exit_code == 130


def test_a_closed_pipe_ends_the_command_without_a_word() -> None:
    code = (
        "import sys, os; from qat_edge.cli import commands\n"
        "import click\n"
        "def fail(path): \n"
        "    for _ in range(100000): click.echo('x' * 100)\n"
        "commands._open = fail\n"
        "commands.main(['quantize', 'run'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1 and errors == ""


def test_telemetry_is_off_once_the_package_is_imported() -> None:
    code = "import os, json, qat_edge; print(json.dumps([os.environ[n] for n in %r]))"
    names = ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"]
    done = subprocess.run([sys.executable, "-c", code % names], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["1", "1"]
