"""A sandbox for chat templates that ends an operation before its result fills the memory.

`template_limits.limit_rendering` ends a rendering between two steps of Python, and one step can take a gigabyte:
`'%999999999d' % 1`. `check_template` refuses such numbers where they are written in a template. Numbers that a template
puts together are refused here, when an operation is about to use them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import Template
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from transformers.utils import chat_template_utils

from qat_edge.data.template_limits import MAX_INTEGER, MAX_WIDTH, WIDE, TemplateLimitError

# In a text with conversions such as %5d, %(name)5d and %*d: a width or precision of five digits, and one that is given.
PERCENT_WIDTH = re.compile(r"[%)][^a-zA-Z%)]*\d{5}")
PERCENT_GIVEN = re.compile(r"[%)][^a-zA-Z%)]*\*")
LONG_NUMBER = re.compile(r"\d{5}")
# Their numbers are widths, counts of elements or digits. range() has a limit of jinja2's.
METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill"})
FILTERS = ("batch", "center", "indent", "round", "tojson")

_limited: ContextVar[bool] = ContextVar("limited", default=False)


@contextmanager
def limit_operations() -> Iterator[None]:
    """Refuse operations with large results in templates that transformers renders inside the block.

    Raises:
        TemplateLimitError: A template has such an operation.
    """
    # transformers keeps compiled templates: those from before have its own sandbox.
    names = vars(chat_template_utils)
    if names["ImmutableSandboxedEnvironment"] is not LimitedSandbox:
        names["ImmutableSandboxedEnvironment"] = LimitedSandbox
        names["_compile_jinja_template"].cache_clear()
    token = _limited.set(True)
    try:
        yield
    finally:
        _limited.reset(token)


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with the limits inside `limit_operations` and none outside."""

    intercepted_binops = frozenset({"%", "*"})

    def from_string(self, *args: Any, **kwargs: Any) -> Template:
        """Compile a template, after transformers has added its own filters."""
        for name in FILTERS:
            self.filters[name] = _with_small_numbers(self.filters[name])
        self.filters["format"] = _checked_format(self.filters["format"])
        return super().from_string(*args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a remainder, a product, or a text with conversions such as %5d."""
        if operator == "%":
            _check_conversions(left, right)
        else:
            _check_repetition(left, right)
            _check_repetition(right, left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function or a method of a value."""
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str | bytes | int) and name in METHODS:
            _check_numbers(args, kwargs)
        return super().call(context, function, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `str.format` or `str.format_map` of a text, sandboxed."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def limited(*args: Any, **kwargs: Any) -> str:
            # Once more before, because a width may be the value of another field.
            from_map = value.__name__ == "format_map" and len(args) == 1
            _WidthFormatter(self).vformat(value.__self__, () if from_map else args, args[0] if from_map else kwargs)
            return wrapped(*args, **kwargs)

        return functools.update_wrapper(limited, wrapped)


class _WidthFormatter(SandboxedFormatter):
    """Refuses fields whose width or precision is too large; a width may come from an argument."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field."""
        if LONG_NUMBER.search(format_spec):
            _refuse(WIDE)
        return super().format_field(value, format_spec)


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses large numbers after its value."""

    @functools.wraps(function)
    def limited(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return function(value, *args, **kwargs)

    return limited


def _checked_format(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter `format` with a check of its conversions."""

    @functools.wraps(function)
    def limited(value: Any, *args: Any, **kwargs: Any) -> Any:
        _check_conversions(str(value), kwargs or args)
        return function(value, *args, **kwargs)

    return limited


def _check_conversions(text: Any, values: Any) -> None:
    """Check the widths of conversions in the left side of %; a remainder of numbers passes."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if not isinstance(text, str):
        return
    given = values if isinstance(values, tuple) else (values,)
    if PERCENT_WIDTH.search(text) or (PERCENT_GIVEN.search(text) and any(map(_is_large, given))):
        _refuse(WIDE)


def _check_repetition(sequence: Any, count: Any) -> None:
    repeats = isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int)
    if repeats and len(sequence) * count > MAX_INTEGER:
        _refuse(f"it repeats a value to a length of more than {MAX_INTEGER}")


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(map(_is_large, (*args, *kwargs.values()))):
        _refuse(WIDE)


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and abs(value) > MAX_WIDTH


def _refuse(reason: str) -> None:
    if _limited.get():
        raise TemplateLimitError(reason)
