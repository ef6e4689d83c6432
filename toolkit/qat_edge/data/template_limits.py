"""Limits for chat templates, which are programs in Jinja that come with a model, from anyone.

transformers runs them in a sandbox, which keeps them away from files and from Python, but lets them compute for hours
or fill the memory. A template is checked before its first use (`check_template`), and each rendering is watched by a
thread that ends it (`limit_rendering`). Single operations are limited by `template_sandbox`.
"""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jinja2
import psutil
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 10.0  # of one rendering; those of the longest conversations take milliseconds
MAX_EXTRA_BYTES = 1024**3  # of memory, allocated while one rendering runs
MAX_TEMPLATE_CHARACTERS = 1_000_000  # the longest templates have 50,000
MAX_INTEGER = 1_000_000  # written in a template: lengths and widths are far smaller
MAX_WIDTH = 9999  # of a formatted value
WIDE = "it formats a value with a width of more than four digits"
LONG_WIDTH = re.compile(r"%[^a-zA-Z%]*\d{5}|\{[^{}:]*:[^{}]*\d{5}")  # such a width in a text that formats
MAX_FACTOR = 64  # of a repetition
POLL_SECONDS = 0.05
ARRIVAL_SECONDS = 5.0  # for an exception of the watching thread to arrive


class TemplateLimitError(Exception):
    """A rendering took too long or too much memory."""


@dataclass(frozen=True)
class TemplateFacts:
    """Facts about a template, from its source.

    Attributes:
        variables: Names that it reads and does not set: arguments and special tokens.
        source: Its text.
    """

    variables: frozenset[str]
    source: str


class _Generation(Extension):
    """Parse {% generation %}, a tag of transformers around the assistant's text, as its contents."""

    tags = {"generation"}  # noqa: RUF012  declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def check_template(source: str) -> TemplateFacts:
    """Parse a template and check it for operations that a single step could fill the memory with.

    Raises:
        jinja2.TemplateError: It is no Jinja.
        TemplateLimitError: It is too long, or has a power, or a repetition, a number or a width that is too large.
    """
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise TemplateLimitError(f"it has {len(source)} characters, more than {MAX_TEMPLATE_CHARACTERS}")
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols, _Generation])
    try:
        tree = environment.parse(source)
    except RecursionError as error:
        raise TemplateLimitError("it is nested too deep") from error

    # The sandbox limits range(), but neither powers nor repetitions of text.
    if tree.find(nodes.Pow) is not None:
        raise TemplateLimitError("it computes a power")
    if any(not _is_small(node.left) and not _is_small(node.right) for node in tree.find_all(nodes.Mul)):
        raise TemplateLimitError("it multiplies by an unlimited number")
    for node in tree.find_all(nodes.Const):
        if isinstance(node.value, int) and abs(node.value) > MAX_INTEGER:
            raise TemplateLimitError(f"it has a number above {MAX_INTEGER}")
        if isinstance(node.value, str) and LONG_WIDTH.search(node.value):
            raise TemplateLimitError(WIDE)
    return TemplateFacts(frozenset(meta.find_undeclared_variables(tree)), source)


def _is_small(node: nodes.Expr) -> bool:
    """Return whether a factor is a small number or a short text."""
    if not isinstance(node, nodes.Const):
        return False
    return len(node.value) <= MAX_FACTOR if isinstance(node.value, str) else abs(node.value) <= MAX_FACTOR


@contextmanager
def limit_rendering() -> Iterator[None]:
    """End the block with an exception if it takes too long or too much memory.

    Raises:
        TemplateLimitError: It was ended.
    """
    thread = threading.get_ident()
    _watched[thread] = time.monotonic() + MAX_SECONDS
    _start_watching()
    arrived = False
    try:
        yield
    except TemplateLimitError:
        arrived = True
        raise
    finally:
        # Whoever removes the entry decides. If the watching thread did, its exception is on its way to this thread.
        if _watched.pop(thread, None) is None and not arrived:
            deadline = time.monotonic() + ARRIVAL_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.001)


# Deadline of each thread that renders. Single operations on a dict need no lock, which an exception from another
# thread could leave locked.
_watched: dict[int, float] = {}
_work = threading.Event()
_watcher: list[threading.Thread] = []


def _start_watching() -> None:
    # A forked process has the entry, but not the thread.
    if not _watcher or not _watcher[0].is_alive():
        _watcher[:] = [threading.Thread(target=_watch, name="template limits", daemon=True)]
        _watcher[0].start()
    _work.set()


def _watch() -> None:
    """Look at all renderings every now and then, and end those beyond a limit."""
    process = psutil.Process()
    seen: dict[tuple[int, float], int] = {}  # memory at the first look at a rendering
    while True:
        _work.wait()
        time.sleep(POLL_SECONDS)
        entries = dict(_watched)
        if not entries:
            seen.clear()
            _work.clear()
            if _watched:  # since the copy was made
                _work.set()
            continue

        used = process.memory_info().rss
        seen = {entry: seen.get(entry, used) for entry in entries.items()}
        for thread, deadline in entries.items():
            full = used - seen[thread, deadline] > MAX_EXTRA_BYTES
            if not full and time.monotonic() < deadline:
                continue
            # Another rendering of the thread may have begun meanwhile: that one is put back.
            found = _watched.pop(thread, None)
            if found == deadline:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(thread), ctypes.py_object(_OutOfMemory if full else _OutOfTime)
                )
            elif found is not None:
                _watched[thread] = found


class _OutOfTime(TemplateLimitError):
    def __init__(self) -> None:
        super().__init__(f"it ran longer than {MAX_SECONDS:.0f} s")


class _OutOfMemory(TemplateLimitError):
    def __init__(self) -> None:
        super().__init__(f"it took more than {MAX_EXTRA_BYTES // 1024**2} MB of memory")


# jinja2 and the template's own expressions raise these; none of them is an error of ours.
RENDERING_ERRORS = (
    jinja2.TemplateError,
    TemplateLimitError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
