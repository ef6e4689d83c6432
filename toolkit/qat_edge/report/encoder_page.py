"""The page of an encoder: how each artifact answers beside the FP32 fine-tune, filled into encoder.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qat_edge.evaluate.encoder_results import CORRELATION, Answered, Comparison
from qat_edge.report import run_details, tables
from qat_edge.report.collect import Story
from qat_edge.report.figures import cosine, label, megabytes, number, percent, quantized, role, span
from qat_edge.report.run_page import Tile, environment, parts_plot, style, subtitle, training_plot
from qat_edge.report.tables import Cell, Column, Row, Table, best_rows


def render(story: Story) -> str:
    """The whole page as one text."""
    found = story.answers
    assert found is not None
    return environment().get_template("encoder.html").render(
        model=story.model,
        subtitle=subtitle(story),
        style=style(),
        verdict=story.verdicts[0],
        tiles=_tiles(found),
        gates=tables.gates(found.gates),
        summary=_summary(found),
        parity=_parity(found.answered),
        plots=[training_plot(story, "per row"), parts_plot(found.answered, 0)],
        words=run_details.encoder_words(found),
        facts=run_details.about_answers(found),
        about=run_details.about_run(story),
        artifacts=run_details.artifacts(story),
        verified=story.verified,
        missing=story.missing,
        version=story.quantized.get("qat_edge"),
    )  # fmt: skip


def _columns(found: Comparison) -> list[Column[Answered]]:
    """The figures of every model, those first that decide."""
    share = found.measure != CORRELATION
    columns: list[Column[Answered]] = [
        Column(
            found.measure.capitalize(), "%" if share else "", lambda row: row.quality, percent if share else number, 1
        ),
        Column("Cosine", "", lambda row: row.cosine, cosine, 1),
        Column("Size", "MB", lambda row: float(row.total_bytes), megabytes, -1),
        Column("Least cosine", "", lambda row: row.least_cosine, cosine, 1),
        Column("Same label", "%", lambda row: row.agreement, percent, 1),
    ]
    return [column for column in columns if any(column.value(row) is not None for row in found.answered)]


def _tiles(found: Comparison) -> list[Tile]:
    """QAT's figures, each with the fine-tune's and the span of those of post-training quantization."""
    tiles = []
    for column in _columns(found):
        known: dict[str, list[float]] = {}
        for row in found.answered:
            if (value := column.value(row)) is not None:
                known.setdefault(role(row), []).append(value)
        if "qat" in known:
            write = _bare(column)
            names = (("tuned", "FP32 fine-tuned"), ("ptq", "PTQ"))
            beside = [(name, span(known[kind], write, "–")) for kind, name in names if kind in known]
            tiles.append(Tile(column.name, span(known["qat"], write, "–"), column.unit, beside))
    return tiles[:4]


def _summary(found: Comparison) -> Table:
    """One row a model, the best of the quantized ones marked in every column."""
    columns = _columns(found)
    best = [best_rows([row for row in found.answered if quantized(row)], column) for column in columns]
    rows = [
        Row(label(row), role(row), [_cell(c, row, row in top) for c, top in zip(columns, best, strict=True)])
        for row in found.answered
    ]
    caption = (
        f"{found.rows:,} evaluation rows, {found.texts:,} texts, answered one by one in ExecuTorch's Python runtime; "
        "cosine with the answers of the FP32 fine-tune."
    )
    return Table(caption, [(column.name, column.unit) for column in columns], rows)


def _cell(column: Column[Answered], row: Answered, best: bool) -> Cell:
    value = column.value(row)
    if value is None:
        return Cell("reference" if role(row) == "tuned" else "–")
    return Cell(_bare(column)(value), value, best)


def _bare(column: Column[Answered]) -> Callable[[float], str]:
    """How a column's figures are written where their unit stands beside them."""
    return lambda value: column.write(value).removesuffix("%")


def _parity(answered: Sequence[Answered]) -> Table:
    rows = [
        Row(label(row), role(row), [Cell(f"{row.parity:.6f}", row.parity)])
        for row in answered
        if row.parity is not None
    ]
    return Table("Artifact against its frozen checkpoint in torch", [("Cosine", "mean over the texts")], rows)
