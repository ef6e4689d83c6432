"""Tables of a report page: each cell has its text and the exact number that the text was rounded from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from qat_edge.evaluate.results import Agreement, Gate, Measurement, Report, Speed, Spread
from qat_edge.readers import counted
from qat_edge.report.formatting import (
    ReportedModel,
    cosine,
    label,
    megabytes,
    number,
    part_label,
    percent,
    quantized,
    reference_title,
    role,
)
from qat_edge.report.plots import ordered_parts

RowData = TypeVar("RowData")  # the object that one row of a table describes
# Enough to follow the curve; the file has all rows.
CURVE_ROWS = 40  # rows of the loss table, evaluations not counted


@dataclass(frozen=True)
class TableCell:
    """One cell of a table.

    Attributes:
        text: The text shown.
        value: The number behind the text; None if there is none, and `text` then says why.
        best: Whether the value is marked as the best of its column.
        below: Smaller values, shown under this one.
        tip: Tooltip, which screen readers speak too.
        css: CSS class of the text.
    """

    text: str
    value: float | None = None
    best: bool = False
    below: tuple[TableCell, ...] = ()
    tip: str = ""
    css: str = ""


MISSING = TableCell("–")  # the templates explain it as "not measured"


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        head: Text of the first column.
        css: Role of the row, which sets the color of its dot.
        cells: The other columns.
    """

    head: str
    css: str
    cells: list[TableCell]


@dataclass(frozen=True)
class Table:
    """A table with a caption.

    Attributes:
        caption: What the table shows; screen readers speak it.
        heads: Name and unit of each column after the first.
        rows: Rows, in order.
        first: Name of the first column.
        notes: Sentences shown below the table.
    """

    caption: str
    heads: list[tuple[str, str]]
    rows: list[TableRow]
    first: str = "Model"
    notes: list[str] = field(default_factory=list)

    @property
    def has_best(self) -> bool:
        """True if any cell is marked as the best of its column."""
        return any(cell.best for row in self.rows for cell in row.cells)


@dataclass(frozen=True)
class Column(Generic[RowData]):
    """One metric of a table.

    Attributes:
        name: Column title.
        unit: Unit shown below the title; empty if there is none.
        value: Returns the metric of a row, None if it was not measured.
        write: Formats a value.
        sign: 1 if higher is better, -1 if lower is better.
        spread: Returns the range of repeated measurements, None if there were no repeats.
    """

    name: str
    unit: str
    value: Callable[[RowData], float | None]
    write: Callable[[float], str]
    sign: int
    spread: Callable[[RowData], Spread | None] = lambda row: None

    def bare(self, value: float) -> str:
        """Format a value without the percent sign, which the column title shows."""
        return self.write(value).removesuffix("%").replace("-", "−")

    def cell(self, value: float | None, best: bool = False) -> TableCell:
        """Return the cell of a value."""
        return MISSING if value is None else TableCell(self.bare(value), value, best)


def _speed_column(name: str, unit: str, pick: Callable[[Speed], Spread], sign: int) -> Column[Measurement]:
    """Return a column of medians, with the range of the repeats."""

    def spread(row: Measurement) -> Spread | None:
        return None if row.speed is None else pick(row.speed)

    def median(row: Measurement) -> float | None:
        return None if row.speed is None else pick(row.speed).median

    return Column(name, unit, median, number, sign, spread)


# Accuracy and size come first, then speed, then agreement of the generated text with the fine-tune.
COLUMNS: tuple[Column[Measurement], ...] = (
    Column("Size", "MB", lambda row: float(row.total_bytes), megabytes, -1),
    Column("Perplexity", "", lambda row: row.perplexity if row.scored else None, number, -1),
    Column("Exact match", "%", lambda row: row.exact_match, percent, 1),
    Column("KL", "nats", lambda row: None if row.agreement is None else row.agreement.kl_nats, number, -1),
    Column("Top-1", "%", lambda row: None if row.agreement is None else row.agreement.top1, percent, 1),
    _speed_column("Decode", "tok/s", lambda speed: speed.decode, 1),
    _speed_column("Prefill", "tok/s", lambda speed: speed.prefill, 1),
    _speed_column("First token", "ms", lambda speed: speed.first_token_ms, -1),
    Column("Load", "ms", lambda row: row.load_ms, number, -1),
    Column("Memory", "MB", lambda row: row.above_runtime_bytes, megabytes, -1),
    Column("Same output", "%", lambda row: row.same_answers, percent, 1),
    Column("First difference", "token", lambda row: row.first_divergence, number, 1),
)
SQNR: Column[Measurement] = Column(
    "SQNR", "dB", lambda row: None if row.agreement is None else row.agreement.sqnr_db, number, 1
)
# Unit and format of the value that a gate compares, by the name of its flag.
GATE_FORMATS: dict[str, tuple[str, Callable[[float], str]]] = {
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
    """Return the main table: one row per model, the best quantized model of each column marked."""
    rows = [TableRow(label(row), role(row), []) for row in report.measured]
    for column in COLUMNS:
        # A float model is more accurate than all quantized ones, so it would always be marked.
        best = best_rows([row for row in report.measured if quantized(row)], column)
        for table_row, row in zip(rows, report.measured, strict=True):
            table_row.cells.append(_metric_cell(column, row, row in best))

    reference = reference_title(report.measured)
    compared = f"Compared on {report.tokens:,} tokens; KL and top-1 are relative to the {reference}."
    return Table(
        caption=" ".join([compared, *_conditions(report.measured)]),
        heads=[(column.name, column.unit) for column in COLUMNS],
        rows=rows,
        notes=[f"{label(row)}: {note}" for row in report.measured for note in row.notes],
    )


def parity(report: Report) -> Table | None:
    """Return each artifact compared with its frozen checkpoint; None if no artifact was compared."""
    compared = [(row, row.parity) for row in report.measured if row.parity is not None]
    if not compared:
        return None

    floor = report.noise_floor
    rows = [TableRow("Noise floor", "floor", _agreement_cells(floor, TableCell("1", 1)))]
    for row, found in compared:
        over_floor = MISSING
        # A floor of 0 would make the ratio infinite.
        if floor.kl_nats > 0:
            times = found.kl_nats / floor.kl_nats
            over_floor = TableCell(number(times, 2), times)
        rows.append(TableRow(label(row), role(row), _agreement_cells(found, over_floor)))

    heads = [("KL", "nats"), ("KL / noise floor", "times"), ("Top-1", "%"), ("SQNR", "dB"), ("Compared", "tokens")]
    return Table("Each artifact compared with its frozen checkpoint in torch", heads, rows)


def structured(report: Report) -> Table | None:
    """Return the answers of each artifact that are valid by its schema; None if no artifact has one."""
    judged = [(row, row.schema) for row in report.measured if row.schema is not None]
    if not judged:
        return None
    rows = []
    for row, found in judged:
        shares = (found.valid_share, found.constrained_share)
        cells = [MISSING if share is None else TableCell(percent(share).removesuffix("%"), share) for share in shares]
        rows.append(TableRow(label(row), role(row), [TableCell(f"{found.answers:,}", found.answers), *cells]))
    left_out = max(found.left_out for _, found in judged)
    caption = "Answers that are valid by schema.json, without a constraint and under the grammar of the runtime"
    caption += f"; left out: {counted(left_out, 'prompt')} whose expected answer is not valid" if left_out else ""
    return Table(
        caption=f"{caption}.",
        heads=[("Answers", ""), ("Valid", "%"), ("Valid, constrained", "%")],
        rows=rows,
        notes=[f"{label(row)}: {remark}" for row, found in judged for remark in found.remarks()],
    )


@dataclass(frozen=True)
class GateRow:
    """One gate as the page shows it.

    Attributes:
        flag: The option that set the gate.
        measured: The artifact or model that was measured.
        bound: "at least" or "at most".
        limit: The required value.
        found: The measured value.
        passed: Whether the gate passed.
    """

    flag: str
    measured: str
    bound: str
    limit: TableCell
    found: TableCell
    passed: bool


def gates(found: Sequence[Gate]) -> list[GateRow]:
    """Return each gate with its values formatted in the unit of its flag."""
    rows = []
    for gate in found:
        name = gate.flag.lstrip("-").replace("_", "-")
        unit, write = GATE_FORMATS.get(name, ("", number))
        # A required number is shown as the user typed it, not rounded to three digits.
        limit = f"{gate.limit:g}" if write is number else write(gate.limit)
        rows.append(
            GateRow(
                flag=gate.flag,
                measured=gate.measured,
                bound="at least" if name.startswith("min") else "at most",
                limit=TableCell(limit + unit, gate.limit),
                found=TableCell(write(gate.found) + unit, gate.found),
                passed=gate.passed,
            )
        )
    return rows


def parts(rows: Sequence[ReportedModel]) -> Table:
    """Return the size of each part in MB, in the order in which the chart stacks them."""
    names = list(dict.fromkeys(part for row in rows for part, _ in ordered_parts(row)))
    table_rows = []
    for row in rows:
        # Every row has every part, so that the columns line up.
        cells = [_part_cell(row, name) for name in names]
        total = TableCell(megabytes(row.total_bytes), row.total_bytes)
        table_rows.append(TableRow(label(row), role(row), [*cells, total]))
    return Table("Size by part", [*((part_label(name), "MB") for name in names), ("total", "MB")], table_rows)


def _part_cell(row: ReportedModel, name: str) -> TableCell:
    size = row.size_bytes.get(name)
    if size is None:
        return TableCell("none")
    # A language model always has a head: one of 0 bytes shares the embedding's table. An encoder may have none.
    shared = isinstance(row, Measurement) and name == "head" and not size and row.size_bytes.get("embedding")
    return TableCell("in embedding") if shared else TableCell(megabytes(size), size)


def speeds(rows: Sequence[Measurement]) -> Table:
    """Return median, minimum and maximum of each speed."""
    table_rows = []
    for row in rows:
        if row.speed is None:
            continue
        spreads = (row.speed.prefill, row.speed.decode, row.speed.first_token_ms)
        values = [value for spread in spreads for value in (spread.median, spread.least, spread.greatest)]
        table_rows.append(TableRow(label(row), role(row), [TableCell(number(value), value) for value in values]))

    units = (("Prefill", "tok/s"), ("Decode", "tok/s"), ("First token", "ms"))
    heads = [(name + statistic, unit) for name, unit in units for statistic in ("", ", min", ", max")]
    return Table("Speed: median, minimum and maximum of the repeats", heads, table_rows)


def quality(rows: Sequence[Measurement]) -> Table:
    """Return the data of the chart of accuracy against size."""
    columns = (*COLUMNS[:5], SQNR)
    table_rows = [
        TableRow(label(row), role(row), [_metric_cell(column, row, best=False) for column in columns]) for row in rows
    ]
    return Table("Accuracy and size", [(column.name, column.unit) for column in columns], table_rows)


def losses(curve: Sequence[dict[str, Any]], unit: str = "nats per token") -> Table:
    """Return evenly spaced rows of the loss curve, and every evaluation.

    Args:
        curve: Rows of training.json with "step", "phase", and "loss" or "eval_loss".
        unit: Unit of the loss.
    """
    every = max(math.ceil(len(curve) / CURVE_ROWS), 1)
    chosen = [row for i, row in enumerate(curve) if i % every == 0 or i == len(curve) - 1 or "eval_loss" in row]
    # A run that evaluates very often would still make a long table.
    chosen = chosen[:: max(math.ceil(len(chosen) / (3 * CURVE_ROWS)), 1)]

    keys = ("loss", "eval_loss", "learning_rate")
    rows = [
        TableRow(f"{row.get('step', '?')}", f"{row.get('phase', 'other')}", [number_cell(row.get(key)) for key in keys])
        for row in chosen
    ]
    heads = [("Loss", unit), ("Evaluation", unit), ("Learning rate", "")]
    omitted = "" if len(chosen) == len(curve) else f"; {len(chosen)} of {len(curve)} rows, report.json has all"
    return Table(f"Loss by step{omitted}", heads, rows, first="Step")


def known_values(column: Column[RowData], rows: Sequence[RowData]) -> list[float]:
    """Return the values of a column without those that were not measured."""
    values = (column.value(row) for row in rows)
    return [value for value in values if value is not None]


def best_rows(rows: Sequence[RowData], column: Column[RowData]) -> list[RowData]:
    """Return the best row and those equal to it: same text, or overlapping repeats. Empty if all rows are equal."""
    # Rows without a finite value cannot be the best.
    known: list[tuple[RowData, float]] = []
    for row in rows:
        value = column.value(row)
        if value is not None and math.isfinite(value):
            known.append((row, value))
    if not known:
        return []

    # `sign` turns a minimum into a maximum.
    best_row, best_value = max(known, key=lambda pair: column.sign * pair[1])
    best_spread = column.spread(best_row)
    found = []
    for row, value in known:
        spread = column.spread(row)
        # Repeats that overlap with those of the best row are as good, within the measurement.
        overlaps = (
            best_spread is not None
            and spread is not None
            and spread.greatest >= best_spread.least
            and spread.least <= best_spread.greatest
        )
        if overlaps or column.write(value) == column.write(best_value):
            found.append(row)
    # If all rows are equal, marking them says nothing.
    return found if len(found) < len(known) else []


def _metric_cell(column: Column[Measurement], row: Measurement, best: bool) -> TableCell:
    value = column.value(row)
    if value is None and column.name in ("KL", "Top-1", "SQNR") and role(row) == "tuned":
        return TableCell("reference")
    return column.cell(value, best)


def number_cell(value: Any) -> TableCell:
    """Return the cell of a value read from JSON or a manifest, which may be of any type."""
    return TableCell(number(value), value) if isinstance(value, int | float) else MISSING


def _agreement_cells(found: Agreement, over_floor: TableCell) -> list[TableCell]:
    return [
        TableCell(number(found.kl_nats), found.kl_nats),
        over_floor,
        TableCell(percent(found.top1).removesuffix("%"), found.top1),
        number_cell(found.sqnr_db),
        TableCell(f"{found.tokens:,}", found.tokens),
    ]


def _conditions(rows: Sequence[Measurement]) -> list[str]:
    """Return sentences on the number of prompts and the settings of the speed measurement."""
    prompts = sorted({row.prompts for row in rows if row.prompts and row.exact_match is not None})
    noun = "prompt" if prompts == [1] else "prompts"
    sentences = [f"Exact match on {' or '.join(map(str, prompts))} {noun}."] if prompts else []
    for row in rows:
        if row.speed is None:
            continue
        speed = row.speed
        sentences.append(
            f"Speed with {counted(speed.threads, 'thread')}: a prompt of {speed.prompt_tokens} tokens, "
            f"{speed.new_tokens} generated tokens, median of {counted(speed.repeats, 'repeat')}."
        )
    # Models measured with the same settings give the same sentence.
    return list(dict.fromkeys(sentences))
