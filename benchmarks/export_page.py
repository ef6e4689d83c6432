"""Write docs/export.md and its plot from the JSON file of an export benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

import numpy as np

from benchmarks.chart import STYLE
from benchmarks.export_step import CONTEXT, LAYERS, MODELS, SIZES, VOCABULARY, Shape
from benchmarks.page import MISSING, provenance, table
from qat_edge.errors import RunError
from qat_edge.report import charts
from qat_edge.report.charts import WIDTH, Scale
from qat_edge.report.formatting import number
from qat_edge.storage import write_text

Records = Mapping[str, Mapping[str, Any]]  # name of the model -> record of its cell
Points = Sequence[tuple[float, float]]

RATIO = 2.5  # peak memory over FP32 weights at which the plot draws a line
PANEL, LEFT, TOP, FOOT = 232.0, 56.0, 34.0, 52.0
LEAST_SHARE = 0.01  # of the CPU time that a stage must take to get a column


def write(result: Path, out: Path) -> Path:
    """Write the report of one export.json, and its plot next to it.

    Raises:
        RunError: the file is missing, or is not a result of this benchmark.
    """
    try:
        records: Records = json.loads(result.read_text(encoding="utf-8"))
        page = render(records, out.with_suffix(".svg").name if records else None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(
            f"{result}: not a result of the export benchmark ({error}). Run it without --page-only."
        ) from error
    if records:
        write_text(out.with_suffix(".svg"), plot(records))
    write_text(out, page)
    return out


def render(records: Records, picture: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        records: finished exports.
        picture: file name of the plot, None for none.
    """
    if not records:
        return "# Time and memory of exporting\n\nNothing has been measured yet.\n"
    blocks = [
        "# Time and memory of exporting", _introduction(), table(("", ""), provenance(list(records.values()))),
        *([] if picture is None else [f"![CPU time by layers and peak memory by weights]({picture})"]),
        "## By size", _sizes(records),
        _fit_text(memory_points(records), "peak", "GB", "times the FP32 weights", "size"),
        "## By layers", _layers(records),
        _fit_text(time_points(records), "CPU time", "s", "s per layer", "number of layers"),
        "## By stage", _stages(records),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


class Fit(NamedTuple):
    """Least-squares line.

    Attributes:
        intercept: value of the line at 0.
        slope: increase per unit.
        worst: largest deviation of a point from the line, as a share of the point's value.
    """

    intercept: float
    slope: float
    worst: float


def fit(points: Points) -> Fit | None:
    """Return the least-squares line through points, None for fewer than three: a line fits any two."""
    if len(points) < 3:
        return None
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    worst = np.max(np.abs(intercept + slope * x - y) / y)
    return Fit(float(intercept), float(slope), float(worst))


def _introduction() -> str:
    return (
        "`python -m benchmarks.export` writes this page from the JSON files of its exports; no figure is typed by "
        f"hand. The models are Llamas with random weights, {VOCABULARY:,} tokens, tied embeddings and SmolLM2's "
        "proportions (135M is the shape of SmolLM2 itself). They are rounded to nearest and exported to a `.pte` with "
        f"{CONTEXT} tokens of context. Each export runs in a process of its own. *CPU time* is the processor time of "
        "that process, *clock* the elapsed time. Where the clock shows more, other programs were using the machine, "
        "and the CPU time is higher than it would be otherwise. *Libraries* is the memory of the imported libraries "
        "before anything is loaded. *Peak* is the largest resident memory, including libraries and weights mapped from "
        "their file."
    )


def _sizes(records: Records) -> str:
    head = (
        "model", "parameters, M", "layers", "clock, s", "CPU time, s", "FP32 weights, GB", "peak, GB", "libraries, GB",
        "peak / FP32", "without libraries", "file, MB",
    )  # fmt: skip
    return table(head, [_size(name, shape, records.get(name)) for name, shape in SIZES.items()])


def _size(name: str, shape: Shape, record: Mapping[str, Any] | None) -> list[str]:
    """Row of one model."""
    cells = [name, number(shape.parameters / 1e6), str(shape.layers)]
    if record is None:
        return [*cells, MISSING, MISSING, number(shape.float_bytes / 1e9), *[MISSING] * 5]
    found = record["figures"]
    peak, libraries = found["peak_bytes"], found["runtime_bytes"]

    return [
        *cells, number(found["seconds"]), number(found["cpu_seconds"]), number(shape.float_bytes / 1e9),
        number(peak / 1e9), number(libraries / 1e9), number(peak / shape.float_bytes),
        number((peak - libraries) / shape.float_bytes), number(found["file_bytes"] / 1e6),
    ]  # fmt: skip


def _fit_text(points: Points, title: str, unit: str, of: str, point: str) -> str:
    """Sentence about the line through points; empty where there are too few."""
    line = fit(points)
    if line is None:
        return ""
    return (
        f"Least-squares fit: {title} = {number(line.intercept)} {unit} + {number(line.slope)} {of}; no {point} "
        f"deviates from it by more than {line.worst:.0%}."
    )


def _layers(records: Records) -> str:
    rows, before = [], None
    for name, shape in LAYERS.items():
        found = _figures(records, name)
        if found is None:
            rows.append([str(shape.layers), *[MISSING] * 3])
            continue
        each = "" if before is None else number((found["cpu_seconds"] - before[1]) / (shape.layers - before[0]))
        rows.append([str(shape.layers), number(found["seconds"]), number(found["cpu_seconds"]), each])
        before = shape.layers, found["cpu_seconds"]
    return table(("layers of SmolLM2's width", "clock, s", "CPU time, s", "CPU time per additional layer, s"), rows)


def _stages(records: Records) -> str:
    """CPU time and peak memory of every stage, of every model."""
    found = {name: record["figures"] for name, record in records.items()}

    # A stage gets a column where it takes a noticeable share of any export.
    names: dict[str, None] = {}
    for figures in found.values():
        for stage in figures["stages"]:
            if stage["cpu_seconds"] >= LEAST_SHARE * figures["cpu_seconds"]:
                names.setdefault(stage["name"])

    rows = []
    for model, figures in found.items():
        stages = {stage["name"]: stage for stage in figures["stages"]}
        cells = [
            f"{number(stages[name]['cpu_seconds'])} s, {number(stages[name]['peak_bytes'] / 1e9)} GB"
            if name in stages else "" for name in names
        ]  # fmt: skip
        rows.append([model, *cells])
    return "CPU time and peak memory of each stage.\n\n" + table(("model", *names), rows)


def _figures(records: Records, name: str) -> Mapping[str, Any] | None:
    record = records.get(name)
    return None if record is None else record["figures"]


def time_points(records: Records) -> Points:
    """Return (layers, seconds of CPU time) of the models of one width."""
    found = ((shape.layers, _figures(records, name)) for name, shape in LAYERS.items())
    return [(layers, figures["cpu_seconds"]) for layers, figures in found if figures is not None]


def memory_points(records: Records) -> Points:
    """Return (GB of FP32 weights, GB of peak memory) of the models of growing size."""
    found = ((shape.float_bytes, _figures(records, name)) for name, shape in SIZES.items())
    return [(size / 1e9, figures["peak_bytes"] / 1e9) for size, figures in found if figures is not None]


def plot(records: Records) -> str:
    """Return an SVG plot: CPU time by layers, and peak memory by weights with a line at RATIO times them."""
    root = charts.canvas("export", "CPU time and peak memory of exporting", "One mark per model.", 2 * PANEL)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = (
        STYLE + ".grid{stroke:#e4e4e4}.fit{fill:none;stroke:#888}.limit{fill:none;stroke:#2d8a4e;stroke-dasharray:5 4}"
    )
    charts.rect(root, 0, 0, WIDTH, 2 * PANEL, "paper")
    _panel(root, 0, "CPU time, s", "layers of SmolLM2's width", time_points(records), None)
    largest = max(shape.float_bytes for name, shape in MODELS.items() if name in records) / 1e9
    title = f"Peak memory, GB; dashed: {RATIO} times the weights"
    _panel(root, PANEL, title, "GB of FP32 weights", memory_points(records), [(0, 0), (largest, RATIO * largest)])
    return charts.to_svg(root)


def _panel(root: ET.Element, top: float, title: str, axis: str, points: Points, limit: Points | None) -> None:
    """Draw one scatter plot with its fitted line and, where `limit` is given, a dashed line through these points."""
    charts.text(root, 8, top + 18, title, "head")
    if not points:
        charts.text(root, LEFT, top + PANEL / 2, MISSING, "tick")
        return

    # Both axes start at 0 and end at a round number.
    right, bottom = WIDTH - 14, top + PANEL - FOOT
    across = Scale(0, charts.nice_top(max(x for x, _ in points)), LEFT, right)
    up = Scale(0, charts.nice_top(max(y for _, y in [*points, *(limit or [])])), bottom, top + TOP)
    charts.y_axis(root, up, right, LEFT)
    charts.x_axis(root, across, bottom, axis)
    if limit is not None:
        charts.path(root, [(across(x), up(y)) for x, y in limit], "limit")

    found = fit(points)
    if found is not None:
        ends = [(x, found.intercept + found.slope * x) for x in (min(x for x, _ in points), max(x for x, _ in points))]
        (x1, y1), (x2, y2) = ends
        charts.line(root, (across(x1), up(y1)), (across(x2), up(y2)), "fit")

    for x, y in points:
        charts.marker(root, across(x), up(y), "square", "square", f"{x:.4g}: {y:.4g}")
