"""Every command line, configuration and profile in the documentation is one that the tool accepts."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import yaml

from qat_edge import config, profiles
from qat_edge.cli.commands import main
from qat_edge.data.formats import load_rows
from qat_edge.options import ValidateOptions
from qat_edge.quant.bits_file import load_bits
from tests.docs.doc_pages import ROOT, CodeBlock, code_blocks

SHELL = [(block, line) for block in code_blocks("") for line in block.code.splitlines() if line.strip()]
COMMANDS = [(f"{block.name} {line}", line) for block, line in SHELL if line.startswith("qat-edge ")]
MAKE_TARGETS = {line.split()[1] for _, line in SHELL if line.startswith("make ")}
MODULES = {line.split()[2] for _, line in SHELL if line.startswith("python -m qat_edge.")}


def test_the_documentation_has_commands_of_every_kind() -> None:
    assert len(COMMANDS) > 25
    assert set(main.commands) - {line.split()[1] for _, line in COMMANDS} == {"demo"}  # `make demo` runs it


@pytest.mark.parametrize("line", [line for _, line in COMMANDS], ids=[name for name, _ in COMMANDS])
def test_every_command_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    if words == ["--version"]:
        return
    name, *arguments = words
    command = main.commands[name]
    parent = click.Context(main, info_name="qat-edge", **main.context_settings)
    with click.Context(command, parent, info_name=name) as context:
        # Raises where a flag or a value is wrong; what it returns is what no parameter took.
        assert command.parse_args(context, arguments) == []


@pytest.mark.parametrize("target", sorted(MAKE_TARGETS))
def test_every_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_module_that_is_run_exists(module: str) -> None:
    assert (ROOT / "toolkit" / Path(*module.split("."))).with_suffix(".py").is_file()


@pytest.mark.parametrize("block", code_blocks("yaml"), ids=lambda block: block.name)
def test_every_yaml_block_loads(block: CodeBlock, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(_with_snippets(block.code), encoding="utf-8")
    if block.title == "bits.yaml":
        assert load_bits(path)
    elif block.title.startswith(".github/"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    else:
        found = config.read_sections(path)
        assert found and all(config.load(config.SECTIONS[section], section, path, {}) for section in found)


@pytest.mark.parametrize("block", code_blocks("toml"), ids=lambda block: block.name)
def test_every_toml_block_is_a_profile(block: CodeBlock) -> None:
    values = tomllib.loads(block.code)
    assert values
    assert [key for key in values if not profiles.permitted(key)] == []
    assert config.load(ValidateOptions, "validate", None, values)


@pytest.mark.parametrize("block", code_blocks("json"), ids=lambda block: block.name)
def test_every_json_block_has_rows_of_known_shapes(block: CodeBlock, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(block.code, encoding="utf-8")
    assert len(load_rows(str(path))) == len(block.code.splitlines())


def _with_snippets(code: str) -> str:
    """Return code with the files in place of `--8<-- "FILE"`, as the site includes them."""
    return re.sub(r'^--8<-- "(.+)"$', lambda m: (ROOT / m[1]).read_text(encoding="utf-8"), code, flags=re.MULTILINE)
