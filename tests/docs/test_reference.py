"""The generated reference pages are those of today's commands and options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from conftest import parts_of_a_run
from qat_edge import config
from qat_edge.cli.commands import main
from tools import write_reference

RENEW = "run `python tools/write_reference.py`"


def test_the_command_line_page_is_current() -> None:
    page = write_reference.REFERENCE / "cli.md"
    assert page.read_text(encoding="utf-8") == write_reference.cli_page(), RENEW


def test_the_configuration_page_is_current() -> None:
    page = write_reference.REFERENCE / "configuration.md"
    assert page.read_text(encoding="utf-8") == write_reference.configuration_page(), RENEW


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_a_section(command: str) -> None:
    assert f"\n## {command}\n" in write_reference.cli_page()


def test_the_configuration_page_has_every_section_and_field() -> None:
    assert set(write_reference.SECTIONS) == set(config.SECTIONS)
    page = write_reference.configuration_page()
    fields = [f for options in write_reference.SECTIONS.values() for f in dataclasses.fields(options)]
    assert [f.name for f in fields if f"| `{f.name}` | `{config.flag_name(f.name)}` |" not in page] == []


def test_writes_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_reference, "REFERENCE", tmp_path / "reference")
    write_reference.write()
    assert {path.name for path in (tmp_path / "reference").iterdir()} == {"cli.md", "configuration.md"}


def test_the_run_folder_page_has_every_part_of_a_run() -> None:
    page = (write_reference.REFERENCE / "run-folder.md").read_text(encoding="utf-8")
    parts = parts_of_a_run()
    assert len(parts) > 8
    assert [part for part in parts if part not in page] == []
