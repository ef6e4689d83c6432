"""Fuzz chat templates: programs in Jinja with statements removed, moved, repeated or taken from other templates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import fuzz_inputs  # noqa: F401  (loads the settings)
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated_bytes, require_value_or_error

from data import chat_templates
from qat_edge.data import conversation, tokenization
from qat_edge.data.formats import load_rows

TEMPLATES = {name: text for name, text in vars(chat_templates).items() if name.isupper()}
# Statements that ask for time, memory, Python or values of another type.
HOSTILE = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}", "{{ messages * 64 }}",
    "{{ messages.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ 10 ** 9 }}", "{{ 'a' * 1000000 }}",
    "{{ messages[99] }}", "{{ messages[0].content.x.y }}", "{{ 1 / 0 }}", "{% set messages = [] %}", "{{ eos_token }}",
    "{{ raise_exception('no') }}", "{% include '/etc/passwd' %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages | tojson }}", "{% break %}", "{{ strftime_now('%Y') }}", "\ud7ff\0", "{% generation %}",
    "{{ ('%' ~ '9' * 9 ~ 'd') % 1 }}", "{{ ('{:>' ~ '9' * 9 ~ '}').format(1) }}", "{{ 'a'.center(('9' * 9) | int) }}",
)  # fmt: skip
CALL = {"type": "function", "function": {"name": "wake", "arguments": {"time": "7:15"}}}
TOOL = {"type": "function", "function": {"name": "wake", "parameters": {"type": "object"}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "say 1"}, {"role": "assistant", "content": "1"}] * 2},
    {
        "tools": [TOOL],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Wake me"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "done"},
            {"role": "assistant", "content": "Done.", "reasoning_content": "It is."},
        ],
    },
]


def pieces(template: str) -> list[str]:
    """Return the statements, expressions and texts of a template."""
    return [piece for piece in re.split(r"(\{%.*?%\}|\{\{.*?\}\})", template, flags=re.DOTALL) if piece]


POOL = sorted({piece for template in TEMPLATES.values() for piece in pieces(template)}) + list(HOSTILE)


@st.composite
def mutated_templates(draw: st.DrawFn) -> str:
    """A template with one to three changes."""
    template = TEMPLATES[draw(st.sampled_from(sorted(TEMPLATES)))]
    if draw(st.booleans()):
        return draw(mutated_bytes(template.encode())).decode("utf-8", "replace")
    changed = pieces(template)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed) - 1)) if changed else 0
        kind = draw(st.sampled_from(("remove", "repeat", "insert", "replace", "move")))
        if kind in ("remove", "replace", "move"):
            taken = changed[at : at + 1]
            del changed[at : at + 1]
        if kind == "repeat":
            changed[at:at] = changed[at : at + 1]
        elif kind in ("insert", "replace"):
            changed.insert(at, draw(st.sampled_from(POOL)))
        elif kind == "move" and taken:
            changed.insert(draw(st.integers(0, len(changed))), taken[0])
    return "".join(changed)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rows")
    paths = [folder / f"{number}.jsonl" for number in range(len(ROWS))]
    for path, row in zip(paths, ROWS, strict=True):
        path.write_text(json.dumps(row) + "\n")
    return paths


@given(mutated_templates())
def test_templates(rows: list[Path], template: str) -> None:
    tokenizer = chat_templates.tokenizer_for(template)
    for path in rows:
        require_value_or_error(lambda path=path: tokenization.tokenize(load_rows(str(path)), tokenizer, 64))
    require_value_or_error(lambda: conversation.template_faults(tokenizer, [1], None))
