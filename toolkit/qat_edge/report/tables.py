"""Figures as tables: what the page prints, each cell with the exact number it was written from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from qat_edge.evaluate.results import Agreement, Gate, Measured, Report, Speed, Spread
from qat_edge.report.figures import Model, cosine, label, megabytes, number, percent, plain, quantized, role
from qat_edge.report.plots import ordered_parts

Shown = TypeVar("Shown")  # what a row of a table is about
CURVE_ROWS = 40


@dataclass(frozen=True)
class Cell:
    """text as shown; value the number behind it, None where there is none (`text` then says why).

    below: smaller figures under it. tip: shown when the pointer rests on it, and spoken. css: class of its text.
    """

    text: str
    value: float | None = None
    best: bool = False
    below: tuple[Cell, ...] = ()
    tip: str = ""
    css: str = ""


@dataclass(frozen=True)
class Row:
    """css: the role, which colours the row's mark."""

    head: str
    css: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """heads: name and unit of each column after the first."""

    caption: str
    heads: list[tuple[str, str]]
    rows: list[Row]
    first: str = "Model"
    notes: list[str] = field(default_factory=list)

    @property
    def has_best(self) -> bool:
        """Whether any cell is marked as the best of its column."""
        return any(cell.best for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Column(Generic[Shown]):
    """One figure of a row. sign: 1 where more is better, -1 where less is. spread: of its repeats, if any."""

    name: str
    unit: str
    value: Callable[[Shown], float | None]
    write: Callable[[float], str]
    sign: int
    spread: Callable[[Shown], Spread | None] = lambda row: None


def _timed(name: str, unit: str, pick: Callable[[Speed], Spread], sign: int) -> Column[Measured]:
    """A column of medians, with the spread that says which of them differ."""

    def spread(row: Measured) -> Spread | None:
        return None if row.speed is None else pick(row.speed)

    def median(row: Measured) -> float | None:
        return None if row.speed is None else pick(row.speed).median

    return Column(name, unit, median, number, sign, spread)


COLUMNS: tuple[Column[Measured], ...] = (
    Column("Size", "MB", lambda row: float(row.total_bytes), megabytes, -1),
    Column("Perplexity", "", lambda row: row.perplexity if row.scored else None, number, -1),
    Column("Exact match", "%", lambda row: row.exact_match, percent, 1),
    Column("KL", "nats", lambda row: None if row.agreement is None else row.agreement.kl_nats, number, -1),
    Column("Top-1", "%", lambda row: None if row.agreement is None else row.agreement.top1, percent, 1),
    _timed("Decode", "tok/s", lambda speed: speed.decode, 1),
    _timed("Prefill", "tok/s", lambda speed: speed.prefill, 1),
    _timed("First token", "ms", lambda speed: speed.first_token_ms, -1),
    Column("Load", "ms", lambda row: row.load_ms, number, -1),
    Column("Memory", "MB", lambda row: row.above_runtime_bytes, megabytes, -1),
    Column("Same answers", "%", lambda row: row.same_answers, percent, 1),
    Column("First difference", "token", lambda row: row.first_divergence, number, 1),
)
SQNR: Column[Measured] = Column(
    "SQNR", "dB", lambda row: None if row.agreement is None else row.agreement.sqnr_db, number, 1
)
GATE_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "max-kl": (" nats", number),
    "min-top1": ("", percent),
    "max-perplexity-ratio": (" times", number),
    "min-exact-match": ("", percent),
    "max-size-mb": (" MB", number),
    "max-memory-mb": (" MB", number),
    "min-prefill": (" tok/s", number),
    "min-decode": (" tok/s", number),
    "max-fault-chance": ("", percent),
    "min-quality": ("", number),
    "min-cosine": ("", cosine),
}


def summary(report: Report) -> Table:
    """One row a model, the best of the quantized ones marked in every column."""
    rows = [Row(label(row), role(row), []) for row in report.measured]
    for column in COLUMNS:
        best = best_rows([row for row in report.measured if quantized(row)], column)
        for shown, row in zip(rows, report.measured, strict=True):
            shown.cells.append(_cell(column, column.value(row), row, row in best))
    caption = f"Compared on {report.tokens:,} tokens; KL and top-1 against the FP32 fine-tune."
    return Table(
        caption=" ".join([caption, *_conditions(report.measured)]),
        heads=[(column.name, column.unit) for column in COLUMNS],
        rows=rows,
        notes=[f"{label(row)}: {note}" for row in report.measured for note in row.notes],
    )


def parity(report: Report) -> Table | None:
    """Each artifact against its frozen checkpoint, below the noise floor; None where nothing was compared."""
    compared = [(row, row.parity) for row in report.measured if row.parity is not None]
    if not compared:
        return None
    floor = report.noise_floor
    rows = [Row("Noise floor", "floor", _agreement(floor, Cell("1", 1)))]
    for row, found in compared:
        times = [found.kl_nats / floor.kl_nats] if floor.kl_nats > 0 else []
        over = Cell(number(times[0], 2), times[0]) if times else Cell("–")
        rows.append(Row(label(row), role(row), _agreement(found, over)))
    heads = [("KL", "nats"), ("KL over floor", "times"), ("Top-1", "%"), ("SQNR", "dB"), ("Compared", "tokens")]
    return Table("Artifact against its frozen checkpoint in torch", heads, rows)


def gates(found: Sequence[Gate]) -> list[dict[str, Any]]:
    """Each gate in words, with its numbers."""
    shown = []
    for gate in found:
        name = gate.flag.lstrip("-").replace("_", "-")
        unit, write = GATE_FIGURES.get(name, ("", number))
        shown.append(
            {
                "flag": gate.flag,
                "measured": gate.measured,
                "bound": "at least" if name.startswith("min") else "at most",
                "limit": Cell((f"{gate.limit:g}" if write is number else write(gate.limit)) + unit, gate.limit),
                "found": Cell(write(gate.found) + unit, gate.found),
                "passed": gate.passed,
            }
        )
    return shown


def parts(rows: Sequence[Model]) -> Table:
    """Megabytes by part, in the order they are stacked."""
    names = list(dict.fromkeys(part for row in rows for part, _ in ordered_parts(row)))
    shown = []
    for row in rows:
        cells = [_part(row, name) for name in names]
        shown.append(Row(label(row), role(row), [*cells, Cell(megabytes(row.total_bytes), row.total_bytes)]))
    return Table("Size by part", [(plain(name), "MB") for name in [*names, "total"]], shown)


def _part(row: Model, name: str) -> Cell:
    """A language model's head without bytes of its own is the embedding's table; an encoder may have none."""
    size = row.size_bytes.get(name)
    if size is None:
        return Cell("none")
    shared = isinstance(row, Measured) and name == "head" and not size and row.size_bytes.get("embedding")
    return Cell("in embedding") if shared else Cell(megabytes(size), size)


def speeds(rows: Sequence[Measured]) -> Table:
    """Median, least and greatest of what was timed."""
    shown = []
    for row in rows:
        if row.speed is None:
            continue
        spreads = (row.speed.prefill, row.speed.decode, row.speed.first_token_ms)
        cells = [Cell(number(v), v) for spread in spreads for v in (spread.median, spread.least, spread.greatest)]
        shown.append(Row(label(row), role(row), cells))
    units = (("Prefill", "tok/s"), ("Decode", "tok/s"), ("First token", "ms"))
    heads = [(name + kind, unit) for name, unit in units for kind in ("", ", least", ", greatest")]
    return Table("Speed, median and range of the repeats", heads, shown)


def quality(rows: Sequence[Measured]) -> Table:
    """What the scatter plot shows."""
    columns = (*COLUMNS[:5], SQNR)
    shown = [Row(label(row), role(row), [_cell(c, c.value(row), row, False) for c in columns]) for row in rows]
    return Table("Accuracy and size", [(column.name, column.unit) for column in columns], shown)


def losses(curve: Sequence[dict[str, Any]], unit: str = "nats per token") -> Table:
    """Some rows of the loss curve, evenly chosen, and every evaluation."""
    every = max(math.ceil(len(curve) / CURVE_ROWS), 1)
    chosen = [row for i, row in enumerate(curve) if i % every == 0 or i == len(curve) - 1 or "eval_loss" in row]
    chosen = chosen[:: max(math.ceil(len(chosen) / (3 * CURVE_ROWS)), 1)]
    keys = ("loss", "eval_loss", "learning_rate")
    shown = [
        Row(f"{row.get('step', '?')}", f"{row.get('phase', 'other')}", [_plain_cell(row.get(key)) for key in keys])
        for row in chosen
    ]
    heads = [("Loss", unit), ("Evaluation", unit), ("Learning rate", "")]
    whole = "" if len(chosen) == len(curve) else f"; {len(chosen)} of {len(curve)} rows, all are in report.json"
    return Table(f"Loss by step{whole}", heads, shown, first="Step")


def best_rows(rows: Sequence[Shown], column: Column[Shown]) -> list[Shown]:
    """The best row and those that read the same or whose repeats overlap with its own; none where all do."""
    known = [(row, value) for row in rows if (value := column.value(row)) is not None and math.isfinite(value)]
    if not known:
        return []
    first, top = max(known, key=lambda pair: column.sign * pair[1])
    found = []
    for row, value in known:
        mine, its = column.spread(first), column.spread(row)
        overlaps = mine is not None and its is not None and its.greatest >= mine.least and its.least <= mine.greatest
        if overlaps or column.write(value) == column.write(top):
            found.append(row)
    return found if len(found) < len(known) else []


def _cell(column: Column[Measured], value: float | None, row: Measured, best: bool) -> Cell:
    if value is not None:
        return Cell(column.write(value).removesuffix("%"), value, best)
    is_reference = column.name in ("KL", "Top-1", "SQNR") and role(row) == "tuned"
    return Cell("reference" if is_reference else "–")


def _plain_cell(value: Any) -> Cell:
    return Cell(number(value), value) if isinstance(value, int | float) else Cell("–")


def _agreement(found: Agreement, over_floor: Cell) -> list[Cell]:
    return [
        Cell(number(found.kl_nats), found.kl_nats),
        over_floor,
        Cell(percent(found.top1).removesuffix("%"), found.top1),
        _plain_cell(found.sqnr_db),
        Cell(f"{found.tokens:,}", found.tokens),
    ]


def _conditions(rows: Sequence[Measured]) -> list[str]:
    """How speed was timed and how many prompts were asked, a sentence for each way it was done."""
    prompts = sorted({row.prompts for row in rows if row.prompts and row.exact_match is not None})
    asked = [f"Exact match on {' or '.join(map(str, prompts))} prompts."] if prompts else []
    timed = [
        f"Speed with {s.threads} threads: a prompt of {s.prompt_tokens} tokens, {s.new_tokens} generated, "
        f"median of {s.repeats} repeats."
        for s in (row.speed for row in rows)
        if s is not None
    ]
    return [*asked, *dict.fromkeys(timed)]
