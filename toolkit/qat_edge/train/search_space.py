"""Search space of a sweep: options of finetune with the values to try.

learning_rate=1e-5:1e-3        any number from 1e-5 to 1e-3
learning_rate=1e-5:1e-3:log    the same, even on a logarithmic scale
lora_rank=8,16,32              one of these values
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat_edge import config, option_paths, remote_code
from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions
from qat_edge.quant.codebook import FEWEST
from qat_edge.readers import shorten
from qat_edge.train.option_checks import check_combination
from qat_edge.train.trainer import qat_learning_rate

FIELDS = {field.name: field for field in dataclasses.fields(FinetuneOptions)}
HINTS = typing.get_type_hints(FinetuneOptions)
# Options that are the same in every trial, with the reason.
FIXED = {
    **dict.fromkeys(option_paths.PATH_OPTIONS, "it names files, and losses are compared on the same ones"),
    remote_code.OPTION: "it is a permission",
    "target_modules": "it holds a list",
    "seed": "the best seed is the luckiest one",
    **dict.fromkeys(("eval_every", "eval_rows"), "trials are compared by these evaluations"),
    **dict.fromkeys(
        ("device", "shard_base", "save_every", "track", "streaming"), "it is no setting of the model's training"
    ),
}
LOG = "log"
MOST_CHECKED = 1000  # combinations of values that are checked before the first trial
MOST_LISTED = 10_000  # combinations of a space that are listed, to leave out those that were tried


@dataclass(frozen=True)
class SearchedOption:
    """An option and its values.

    Attributes:
        name: Field of FinetuneOptions.
        choices: Values to try; empty for a range.
        low: Least value of a range.
        high: Greatest value of a range.
        log: Whether a range is searched on a logarithmic scale.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def values(self) -> tuple[Any, ...]:
        """The choices, or both ends of the range."""
        return self.choices or (self.low, self.high)

    @property
    def is_integer(self) -> bool:
        """Return whether every value is an integer."""
        return all(type(value) is int for value in self.values)

    def __contains__(self, value: Any) -> bool:
        """Return whether a value can be tried."""
        return value in self.choices if self.choices else value is not None and self.low <= value <= self.high

    def listed(self) -> Sequence[Any] | None:
        """Return all values; None where there are too many to list."""
        if self.choices:
            return self.choices
        return range(int(self.low), int(self.high) + 1) if self.is_integer else None


Space = Sequence[SearchedOption]


def parse(texts: Sequence[str]) -> list[SearchedOption]:
    """Return the search space of the flags --search.

    Raises:
        UsageError: Names the option and what is permitted.
    """
    space = [_parse(text) for text in texts]
    names = [option.name for option in space]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"--search {twice}: given more than once. Give all its values in one.")
    return space


def default_space(base: FinetuneOptions) -> list[str]:
    """Return the space that is searched without --search: what these options train, around their learning rates."""
    rates = {"learning_rate": base.learning_rate}
    if base.scales == "learned" and base.frozen_base is None and base.has_qat:
        rates["scale_learning_rate"] = base.scale_learning_rate
    texts = [f"{name}={rate / 10:g}:{rate * 3:g}:{LOG}" for name, rate in rates.items() if rate > 0]
    if base.method == "lora":
        texts += ["lora_rank=4,8,16,32,64", "lora_alpha=8,16,32,64,128"]
    return texts + (["qat_start=0.3:0.95"] if base.has_qat else [])


def with_values(base: FinetuneOptions, values: Mapping[str, Any]) -> FinetuneOptions:
    """Return the options of a trial."""
    return dataclasses.replace(base, **values)


def values_of(base: FinetuneOptions, space: Space) -> dict[str, Any] | None:
    """Return the values that the options have without a search; None where the space does not contain them all."""
    # Where these are not given, others decide them.
    decided = {"qat_start": _start(base, space), "qat_learning_rate": qat_learning_rate(base)}
    values = {option.name: decided.get(option.name, getattr(base, option.name)) for option in space}
    # A given rate also permits codes of 2 bits to change.
    if "qat_learning_rate" in values and base.weight_bits == FEWEST:
        return None
    return values if all(values[option.name] in option for option in space) else None


def _start(base: FinetuneOptions, space: Space) -> float:
    """Return the start of QAT as the space has it: a step, or a fraction of the steps."""
    has_steps = any(option.name == "qat_start" and max(option.values) >= 1 for option in space)
    start = base.start_of_qat
    return start / base.steps if start >= 1 and not has_steps else start


def require_combinations(base: FinetuneOptions, space: Space) -> None:
    """Refuse values that exclude each other or the other options, before anything is trained.

    Raises:
        UsageError: Names the values and what to change.
    """
    names = [option.name for option in space]
    for values in itertools.islice(itertools.product(*(option.values for option in space)), MOST_CHECKED):
        chosen = dict(zip(names, values, strict=True))
        try:
            check_combination(with_values(base, chosen))
        except UsageError as error:
            raise UsageError(f"--search, with {describe(chosen)}: {error}") from error


def combinations(space: Space) -> list[dict[str, Any]] | None:
    """Return all combinations of values; None where there are too many to list."""
    listed = [option.listed() for option in space]
    if any(values is None for values in listed):
        return None
    whole = [values for values in listed if values is not None]
    if math.prod(map(len, whole)) > MOST_LISTED:
        return None
    names = [option.name for option in space]
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*whole)]


def describe(values: Mapping[str, Any]) -> str:
    """Return values for a message: "learning_rate 0.0003, lora_rank 8"."""
    return ", ".join(f"{name} {write(value)}" for name, value in values.items())


def write(value: Any) -> str:
    """Return a value as text, numbers with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


# --- one option --------------------------------------------------------------------------------------------


def _parse(text: str) -> SearchedOption:
    """Return one option with its values.

    Raises:
        UsageError: See `parse`.
    """
    config.require_text(text, "--search")
    _, equals, values = text.partition("=")
    name = config.searched_name(text)
    if not equals or not name:
        raise UsageError(
            f"--search {shorten(text)}: expected NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C, such as "
            "learning_rate=1e-4:1e-2:log or lora_rank=8,16."
        )
    config.require_key(name, FIELDS, "--search")
    if name in FIXED:
        raise UsageError(f"--search {name}: cannot vary, because {FIXED[name]}. Give {config.flag_name(name)} once.")
    is_number = _type_of(name) in (int, float)
    if is_number and ":" in values:
        return _range(name, values)
    return SearchedOption(name, _choices(name, values))


def _range(name: str, text: str) -> SearchedOption:
    """Return an option with a range of numbers.

    Raises:
        UsageError: It is empty, no range of numbers, or the option has a few values only.
    """
    where = f"--search {name}={shorten(text)}"
    if FIELDS[name].metadata["choices"]:
        permitted = ",".join(map(str, FIELDS[name].metadata["choices"]))
        raise UsageError(f"{where}: {name} has no range. List values: {name}={permitted}.")
    ends, is_log = text.split(":"), text.endswith(f":{LOG}")
    ends = ends[:-1] if is_log else ends
    if len(ends) != 2:
        raise UsageError(f"{where}: expected LOW:HIGH or LOW:HIGH:{LOG}.")
    low, high = (_value(name, end, where) for end in ends)
    if low >= high:
        raise UsageError(f"{where}: an empty range. The first number must be below the second.")
    if is_log and low <= 0:
        raise UsageError(f"{where}: a logarithmic scale has no {low:g}. Begin above 0, or leave :{LOG} out.")
    if name == "qat_start" and high >= 1:
        raise UsageError(
            f"{where}: a range of fractions ends below 1; from 1 on it is a step. List steps: {name}=50,100,150."
        )
    return SearchedOption(name, low=low, high=high, log=is_log)


def _choices(name: str, text: str) -> tuple[Any, ...]:
    """Return the values of a list.

    Raises:
        UsageError: There is one only, or one of them is not permitted.
    """
    where = f"--search {name}={shorten(text)}"
    values = tuple(_value(name, part.strip(), where) for part in text.split(","))
    if len(values) == 1:
        raise UsageError(
            f"{where}: one value leaves nothing to search. Give at least two, or {config.flag_name(name)} instead."
        )
    if len(set(values)) < len(values):
        raise UsageError(f"{where}: a value is given twice. Give each once.")
    return values


def _value(name: str, text: str, where: str) -> Any:
    """Return one value as the option has it.

    Raises:
        UsageError: It has another type, or is not permitted.
    """
    value: Any = text
    if _type_of(name) is bool:
        value = {"true": True, "false": False}.get(text.lower(), text)
    elif _type_of(name) is int and text.removeprefix("-").isdecimal() and len(text) < 20:
        value = int(text)
    return config.checked_value(FinetuneOptions, name, value, where)


def _type_of(name: str) -> type:
    """Return the type of an option's values, where it has any."""
    hint = HINTS[name]
    if typing.get_origin(hint) is types.UnionType:
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    return typing.cast(type, hint)
