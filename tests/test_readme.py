"""README says what the tool does today."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from qat_edge.cli.commands import main
from readme import README, with_reference

TEXT = README.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^qat-edge (.+)$", TEXT, flags=re.M)
ROOT = README.parent


def test_the_command_reference_is_current() -> None:
    assert with_reference(TEXT) == TEXT, "run `make docs`"


def test_it_opens_with_the_two_commands() -> None:
    opening = TEXT.split("```")[1]
    assert re.findall(r"^make \w+", opening, flags=re.M) == ["make demo", "make test"]


def test_the_story_has_six_commands_in_order() -> None:
    assert [c.split()[0] for c in COMMANDS] == ["finetune", "export", "verify", "validate", "report", "generate"]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_story_parses(line: str) -> None:
    name, *arguments = shlex.split(line)
    command = main.commands[name]
    parent = click.Context(main, info_name="qat-edge", **main.context_settings)
    with click.Context(command, parent, info_name=name) as ctx:
        # Raises where a flag or a value is wrong; what it returns is what no parameter took.
        assert command.parse_args(ctx, arguments) == []


@pytest.mark.parametrize("path", re.findall(r"^(toolkit|exporters|devices|examples|tests)\S*", TEXT, flags=re.M))
def test_the_tree_names_what_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_module_named_in_the_tree_exists() -> None:
    tree = TEXT.split("## The repository")[1].split("```")[1]
    named = set(re.findall(r"[\w/]+\.py", tree))
    assert len(named) > 12
    missing = [n for n in named if not list((ROOT / "toolkit" / "qat_edge").rglob(Path(n).name))]
    assert missing == []
