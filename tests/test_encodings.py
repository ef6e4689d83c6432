"""Text files have the encoding that the code names. By default, Windows takes the one of the country."""

from __future__ import annotations

import ast

import pytest

from qat_edge.python_process import python_command, utf8_command
from tests.test_structure import MODULES, calls

# Objects with a method `open` that opens no text file.
OTHER_OPEN = {"Run", "transport", "tarfile", "os"}
OWN_FUNCTIONS = {"readers", "storage"}  # whose read_text and write_text are UTF-8


def is_text(mode: ast.expr | None, default: str) -> bool:
    """Return whether a mode of `open` is one of text; a mode that is no constant counts as text."""
    return "b" not in (ast.literal_eval(mode) if isinstance(mode, ast.Constant) else default if mode is None else "r")


def lacks_encoding(name: str, call: ast.Call) -> bool:
    """Return whether a call reads or writes text in the encoding of the system."""
    owner, _, function = name.rpartition(".")
    keywords = {k.arg: k.value for k in call.keywords}
    if "encoding" in keywords:
        return False
    if function in ("read_text", "write_text"):
        return bool(owner) and owner not in OWN_FUNCTIONS
    if function == "open" and owner not in OTHER_OPEN:
        position = 0 if owner else 1
        given = call.args[position] if len(call.args) > position else keywords.get("mode")
        return is_text(given, "r")
    if function in ("TemporaryFile", "NamedTemporaryFile"):
        return is_text(call.args[0] if call.args else keywords.get("mode"), "w+b")
    return name in ("subprocess.run", "subprocess.Popen") and bool({"text", "universal_newlines"} & set(keywords))


@pytest.mark.parametrize("module", MODULES)
def test_every_text_file_and_pipe_names_its_encoding(module: str) -> None:
    found = [f"{module}:{call.lineno}: {name}" for name, call in calls(MODULES[module]) if lacks_encoding(name, call)]
    assert found == []


@pytest.mark.parametrize(
    ("line", "faulty"),
    [
        ("path.read_text()", True),
        ("path.read_text(encoding='utf-8')", False),
        ("readers.read_text(path, DataError)", False),
        ("read_text(path, DataError)", False),
        ("path.open()", True),
        ("path.open('rb')", False),
        ("path.open(mode)", True),
        ("open(name, 'w')", True),
        ("open(name, 'wb')", False),
        ("tempfile.TemporaryFile('w+')", True),
        ("tempfile.TemporaryFile()", False),
        ("subprocess.run(command, text=True)", True),
        ("subprocess.run(command, text=True, encoding='utf-8')", False),
    ],
)
def test_the_check_finds_what_it_should(line: str, faulty: bool) -> None:
    (call,) = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
    assert lacks_encoding(ast.unparse(call.func), call) == faulty


def test_programs_whose_output_is_read_write_utf8() -> None:
    assert utf8_command("pip", "--version") == [python_command("pip")[0], "-X", "utf8", "-P", "-m", "pip", "--version"]
    import subprocess

    command = [*utf8_command("pip")[:3], "-c", "print('Jörg'); import sys; print('漢', file=sys.stderr)"]
    env = {"PYTHONIOENCODING": "", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, env=env)
    assert (done.stdout, done.stderr) == ("Jörg\n", "漢\n")
