"""Page of an encoder (encoder.html): the outputs of each artifact compared with those of the FP32 fine-tune."""

from __future__ import annotations

from collections.abc import Sequence

from qat_edge.evaluate.encoder_results import CORRELATION, EncoderReport, EncoderResult
from qat_edge.report import run_details, tables
from qat_edge.report.collect import RunResults
from qat_edge.report.formatting import (
    cosine,
    label,
    megabytes,
    number,
    percent,
    quantized,
    reference_title,
    role,
    role_names,
    span,
)
from qat_edge.report.glossary import encoder_terms
from qat_edge.report.run_page import Tile, environment, parts_plot, style, subtitle, training_plot
from qat_edge.report.tables import Column, Table, TableCell, TableRow, best_rows, known_values

MOST_TILES = 4


def render(results: RunResults) -> str:
    """Return the HTML of the whole page."""
    found = results.encoder
    # verbs.report chooses this page for encoders only.
    assert found is not None
    return environment().get_template("encoder.html").render(
        model=results.model,
        subtitle=subtitle(results),
        style=style(),
        verdict=results.verdicts[0],
        tiles=_tiles(found),
        gates=tables.gates(found.gates),
        summary=summary(found),
        parity=_parity(found.results),
        plots=[training_plot(results, "per row"), parts_plot(found.results, 0)],
        glossary=encoder_terms(found),
        details_blocks=run_details.encoder_details(found),
        provenance=run_details.provenance(results),
        artifacts=run_details.artifacts(results),
        verified=results.verified,
        missing=results.missing,
        version=results.quantized.get("qat_edge"),
    )  # fmt: skip


def _columns(found: EncoderReport) -> list[Column[EncoderResult]]:
    """Return the metrics that any model has, the most important first."""
    is_share = found.measure != CORRELATION
    # The metric of the task: a share, or a rank correlation between -1 and 1.
    quality: Column[EncoderResult] = Column(
        found.measure.capitalize(),
        "%" if is_share else "",
        lambda row: row.quality,
        percent if is_share else number,
        1,
    )
    columns: list[Column[EncoderResult]] = [
        quality,
        Column("Cosine", "mean", lambda row: row.cosine, cosine, 1),
        Column("Size", "MB", lambda row: float(row.total_bytes), megabytes, -1),
        Column("Cosine", "minimum", lambda row: row.least_cosine, cosine, 1),
        Column("Same label", "%", lambda row: row.agreement, percent, 1),
    ]
    return [column for column in columns if known_values(column, found.results)]


def _tiles(found: EncoderReport) -> list[Tile]:
    """Return the own model's main metrics, each with the FP32 reference's and the range of PTQ's."""
    tiles, names = [], role_names(found.results)
    for column in _columns(found):
        values = {
            key: known_values(column, [row for row in found.results if role(row) == key])
            for key in ("qat", "tuned", "ptq")
        }
        if not values["qat"]:
            continue
        compared = [(names[key], span(values[key], column.bare, "–")) for key in ("tuned", "ptq") if values[key]]
        own = span(values["qat"], column.bare, "–")
        tiles.append(Tile(names["qat"], column.name, own, column.unit, compared))
    # One row of tiles on a wide page.
    return tiles[:MOST_TILES]


def summary(found: EncoderReport) -> Table:
    """Return the main table: one row per model, the best quantized model of each column marked."""
    columns = _columns(found)
    best = [best_rows([row for row in found.results if quantized(row)], column) for column in columns]
    rows = [
        TableRow(label(row), role(row), [_cell(c, row, row in top) for c, top in zip(columns, best, strict=True)])
        for row in found.results
    ]
    caption = (
        f"{found.rows:,} evaluation rows with {found.texts:,} texts, run one at a time in each artifact's runtime. "
        f"Cosine similarity is relative to the outputs of the {reference_title(found.results)}."
    )
    return Table(caption, [(column.name, column.unit) for column in columns], rows)


def _cell(column: Column[EncoderResult], row: EncoderResult, best: bool) -> TableCell:
    value = column.value(row)
    # The FP32 fine-tune is what the others are compared with.
    if value is None and role(row) == "tuned":
        return TableCell("reference")
    return column.cell(value, best)


def _parity(answered: Sequence[EncoderResult]) -> Table:
    rows = [
        TableRow(label(row), role(row), [TableCell(f"{row.parity:.6f}", row.parity)])
        for row in answered
        if row.parity is not None
    ]
    heads = [("Cosine", "mean over the texts")]
    return Table("Each artifact compared with its frozen checkpoint in torch", heads, rows)
