"""A chat template can neither run for hours nor fill the memory."""

from __future__ import annotations

import threading
import time

import jinja2
import pytest

from data.chat_templates import tokenizer_for
from qat_edge.data import template_limits
from qat_edge.data.chat_template import ChatTemplate
from qat_edge.data.conversation import ChatFormat
from qat_edge.data.rows import Chat
from qat_edge.data.template_limits import TemplateLimitError, check_template, limit_rendering
from qat_edge.errors import ModelError

CHAT = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "f:3")
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x='a' * 64) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"


def test_a_rendering_is_ended_after_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(ModelError, match="f:3: the chat template was stopped: it ran longer than"):
        ChatFormat(tokenizer_for(ENDLESS)).turns(CHAT)
    assert time.monotonic() - began < 5


def test_a_rendering_is_ended_before_the_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_EXTRA_BYTES", 64 * 1024**2)
    monkeypatch.setattr(template_limits, "POLL_SECONDS", 0.002)
    with pytest.raises(ModelError, match="it took more than 64 MB of memory"):
        ChatFormat(tokenizer_for(DOUBLING + "{{ ns.x }}")).turns(CHAT)


def test_a_late_exception_reaches_the_block_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.05)
    # sleep is one call: the exception arrives when it returns, inside the block or at its end.
    with pytest.raises(TemplateLimitError), limit_rendering():
        time.sleep(0.5)
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 10.0)
    for _ in range(200):
        with limit_rendering():
            pass


@pytest.mark.parametrize("text", ["'%999999999d' % 1", "'{:>99999}'.format(1)", "'% 123456.2f' | format(1)"])
def test_a_width_that_would_fill_the_memory_is_refused(text: str) -> None:
    with pytest.raises(TemplateLimitError, match="formats a value with a width of more than four digits"):
        check_template("{{ " + text + " }}")
    check_template("{{ '%5d 20240101 100%' % 1 }}{{ '{}: 12345'.format(2) }}")


NUMBER = "{% set n = ('9' * 9) | int %}"


@pytest.mark.parametrize(
    "text",
    [
        "('%' ~ n ~ 's') % 1", "('%(a)' ~ n ~ 's') % {'a': 1}", "'%*d' % (n, 1)", "('%.' ~ n ~ 'f') | format(1.0)",
        "('%' ~ n ~ 'd').encode() % 1", "'%(a)*d' % (n, 1)",
        "('{:>' ~ n ~ '}').format(1)", "'{:>{}}'.format(1, n)", "'{a:{b}}'.format_map({'a': 1, 'b': n})",
        "('{:>' ~ n ~ '}' | safe).format(1)",
        "'a'.center(n)", "'a'.ljust(n)", "'a'.rjust(n)", "'a'.zfill(n)",
        "'\\t'.expandtabs(n)", "'a'.encode().center(n)", "(5).to_bytes(n, 'big')",
        "'a' | center(n)", "'a' | center(width=n)", "['a'] | map('center', n) | list", "'a\\nb' | indent(n)",
        "1.5 | round(n, 'floor')", "[1] | batch(n, 0) | list", "[1] | tojson(indent=n)",
    ],
)  # fmt: skip
def test_a_width_that_is_put_together_is_refused_at_once(text: str) -> None:
    template, began = f"{NUMBER}{{{{ {text} }}}}", time.monotonic()
    check_template(template)
    with pytest.raises(ModelError, match="stopped: it formats a value with a width of more than four digits"):
        ChatFormat(tokenizer_for(template)).turns(CHAT)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("text", ["'a' * n", "n * 'ab'", "messages * 64 * 64 * 64 * 64"])
def test_a_repetition_that_is_put_together_is_refused_at_once(text: str) -> None:
    with pytest.raises(ModelError, match="stopped: it repeats a value to a length of more than 1000000"):
        ChatFormat(tokenizer_for(f"{NUMBER}{{{{ {text} }}}}")).turns(CHAT)


def test_usual_widths_are_written_as_transformers_writes_them() -> None:
    text = (
        "{{ '%5d|%-3s|' % (345678, 'a') }}{{ 7 % 4 }}{{ '=' * 5 }}"
        "{{ '{:>{}}|{a:.2f}'.format('x', 4, a=1) }}{{ 'a' | center(5) }}{{ 'a'.ljust(3) }}{{ 2.567 | round(1) }}"
        "{{ [1, 240101] | tojson(indent=1) }}{{ '%s' | format(240101) }}{{ '{}'.format_map({}) if false }}"
    )
    tokenizer = tokenizer_for(text)
    expected = tokenizer.apply_chat_template(CHAT.messages, tokenize=False)
    assert ChatTemplate(tokenizer).render(CHAT, 2) == expected
    # Templates of others have no limits, before and afterwards.
    other = tokenizer_for("{{ ('%' ~ '99999' ~ 's') % 1 }}")
    assert len(other.apply_chat_template(CHAT.messages, tokenize=False)) == 99999


def test_a_text_that_looks_like_a_format_is_checked_at_once() -> None:
    began = time.monotonic()
    check_template("{{ '{" + ":" * 300_000 + "' }}{{ '%" + "(" * 300_000 + "' }}")
    assert time.monotonic() - began < 5


def test_threads_are_watched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_SECONDS", 0.2)
    ended: list[str] = []

    def work(name: str, seconds: float) -> None:
        try:
            with limit_rendering():
                until = time.monotonic() + seconds
                while time.monotonic() < until:
                    pass
        except TemplateLimitError:
            ended.append(name)

    threads = [threading.Thread(target=work, args=item) for item in (("long", 3.0), ("short", 0.01))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["long"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 2 ** messages|length }}", "power"),
        ("{{ 'a' * messages|length * 1000 }}", "multiplies"),
        ("{{ messages[0].content * messages|length }}", "multiplies"),
        ("{{ 'a'.ljust(2000000) }}", "number above"),
        ("x" * 1_000_001, "characters"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deep"),
    ],
)
def test_operations_that_fill_the_memory_at_once_are_refused(source: str, reason: str) -> None:
    with pytest.raises(TemplateLimitError, match=reason):
        check_template(source)


def test_usual_templates_pass() -> None:
    facts = check_template(
        "{% generation %}{{ '  ' * 4 }}{{ ' ' * loop_depth }}{% endgeneration %}"
        "{% for m in messages %}{% break %}{% endfor %}"
    )
    assert facts.variables == {"messages", "loop_depth"}
    with pytest.raises(jinja2.TemplateError):
        check_template("{% for %}")
