"""Figures of a small checkout whose values are known by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from qat_edge.cli import commands
from tools import measure_readability
from tools.measure_readability import FileTracer, cycles, lines, measure

FIRST = '''
"""What it was asked: one module, and a paragraph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat_edge_devices.phone import Phone


class Model:
    """Named like a class of the devices."""

    def run(self, model: Any, count: int, other: Any | None = None) -> None:
        # a reason

        from qat_edge import second  # inside a function

        second.call(model)
'''
SECOND = """
def call(value: object) -> object:
    from qat_edge.first import Model

    return Model
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two modules that import each other, and a package with a file and a class of the same names."""
    contents = {
        "README.md": "four words stand here\n",
        "docs/one.md": "",
        "toolkit/qat_edge/__init__.py": '__all__ = ["first"]\n',
        "toolkit/qat_edge/py.typed": "",
        "toolkit/qat_edge/first.py": FIRST,
        "toolkit/qat_edge/second.py": SECOND,
        "devices/qat_edge_devices/__init__.py": "",
        "devices/qat_edge_devices/phone.py": "class Phone: ...\n",
        "devices/qat_edge_devices/second.py": "class Model: ...\n",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_figures_by_hand(checkout: Path) -> None:
    found = measure(checkout)
    assert (found["readme_words"], found["docs_pages"], found["has_all"]) == (4, 1, True)
    assert found["py_typed"] == {"qat_edge": True, "qat_edge_devices": False}
    assert (found["modules"], found["import_edges"], found["type_only_import_edges"]) == (6, 2, 1)
    assert found["import_cycles"] == [["qat_edge.first", "qat_edge.second"]]
    assert (found["functions"], found["function_lines_median"], found["function_lines_longest"]) == (2, 5, 6)
    assert (found["parameters"], found["any_parameters"], found["any_model_parameters"]) == (4, 2, 1)
    assert found["any_parameters_percent"] == 50.0
    assert found["odd_docstring_openings"] == {"What": 1, "Whether": 0, "Of": 0, "How": 0, "Is": 0}
    # 9 words in the module's docstring, 7 in the class's, 2 and 3 in the comments.
    assert found["prose_words"] == 21 and found["per_10000_words"]["asked"] == pytest.approx(10_000 / 21, abs=0.1)
    assert found["repeated_file_names"] == {"second.py": 2} and found["repeated_class_names"] == {"Model": 2}
    # 28 lines; one comment stands alone, one behind code.
    assert (found["comment_lines_percent"], found["comment_lines_without_code_percent"]) == (7.1, 3.6)


def test_a_chain_is_no_cycle() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_a_file_counts_when_a_function_of_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {
        "entered_by_call": "def run():\n    import only_imported, calls_at_import\n",
        "only_imported": "names = [name for name in 'ab']\nclass Body:\n    value = 1\n",
        "calls_at_import": "import called_at_import\ncalled_at_import.decorate()\n",
        "called_at_import": "def decorate():\n    pass\n",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("entered_by_call")
    with FileTracer([tmp_path]) as tracer:
        module.run()
        measure_readability.cycles({})  # not below the folder
    assert tracer.entered == {str(tmp_path / "entered_by_call.py")}


def test_names_are_printed_when_requested(checkout: Path) -> None:
    found = measure(checkout)
    assert "import_cycles: 1" in lines(found)
    assert "  qat_edge.first <-> qat_edge.second" in lines(found, is_verbose=True)


@pytest.mark.parametrize("verb", measure_readability.VERBS)
def test_the_traced_commands_parse(verb: str, tmp_path: Path) -> None:
    name, *arguments = measure_readability._arguments(verb, tmp_path)
    command = commands.main.commands[name]
    parent = click.Context(commands.main, **commands.main.context_settings)  # click keeps the help option that it makes
    with click.Context(command, parent, info_name=name) as context:
        assert command.parse_args(context, arguments) == []


def test_it_runs_as_a_script_and_writes_json(checkout: Path) -> None:
    command = [sys.executable, measure_readability.__file__, str(checkout), "--json", str(checkout / "out.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads((checkout / "out.json").read_text()) == measure(checkout)
    assert "readme_words: 4\n" in printed
