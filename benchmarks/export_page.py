"""docs/export.md and its plot, from the JSON of an export benchmark alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from benchmarks.chart import STYLE
from benchmarks.export_step import CONTEXT, LAYERS, MODELS, SIZES, VOCABULARY, Shape
from benchmarks.page import MISSING, provenance, table
from qat_edge.errors import RunError
from qat_edge.report import charts
from qat_edge.report.charts import WIDTH, Scale
from qat_edge.report.figures import number
from qat_edge.run import write_text

Documents = Mapping[str, Mapping[str, Any]]  # by name of the model, as the store of cells keeps them
Points = Sequence[tuple[float, float]]

RATIO = 2.5  # of peak memory to the FP32 weights: where the plot has a line
PANEL, LEFT, TOP, FOOT = 232.0, 56.0, 34.0, 52.0
LEAST_SHARE = 0.01  # of the time, for a stage to have a column


def write(result: Path, out: Path) -> Path:
    """Write the report of one export.json, and its plot beside it.

    Raises:
        RunError: there is no such file, or it is no result of this benchmark.
    """
    try:
        documents: Documents = json.loads(result.read_text(encoding="utf-8"))
        page = render(documents, out.with_suffix(".svg").name if documents else None)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{result}: no result of the export benchmark ({error}). Run it without --document.") from error
    if documents:
        write_text(out.with_suffix(".svg"), plot(documents))
    write_text(out, page)
    return out


def render(documents: Documents, picture: str | None = None) -> str:
    """The report as Markdown. picture: file name of the plot, None for none."""
    if not documents:
        return "# Time and memory of exporting\n\nNothing has been measured yet.\n"
    blocks = [
        "# Time and memory of exporting", _introduction(), table(("", ""), provenance(list(documents.values()))),
        *([] if picture is None else [f"![CPU time by layers and peak memory by weights]({picture})"]),
        "## By size", _sizes(documents),
        _line_words(memory_points(documents), "peak", "GB", "times the FP32 weights", "size"),
        "## By layers", _layers(documents),
        _line_words(time_points(documents), "CPU time", "s", "s a layer", "number of layers"),
        "## By stage", _stages(documents),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def fit(points: Points) -> tuple[float, float, float] | None:
    """Intercept and slope of least squares, and the greatest deviation from that line as a share of the value.

    None for fewer than three points, which a line fits in any case.
    """
    if len(points) < 3:
        return None
    x, y = np.array(points).T
    slope, intercept = np.polyfit(x, y, 1)
    worst = np.max(np.abs(intercept + slope * x - y) / y)
    return float(intercept), float(slope), float(worst)


def _introduction() -> str:
    return (
        "Written by `python -m benchmarks.export` from the JSON of its exports; no figure here was typed by hand. "
        f"The models are Llamas of random weights with {VOCABULARY:,} tokens, tied embeddings and SmolLM2's "
        f"proportions (135M is SmolLM2's own shape), rounded to nearest, exported to a `.pte` of {CONTEXT} tokens of "
        "context. Each export is a process of its own. *CPU time* is what it computed, *clock* what passed: where the "
        "clock is longer, other programs had the machine, and CPU time is longer than alone as well. *Libraries* is "
        "the memory of the imported libraries before anything is loaded, *peak* the most that was resident, libraries "
        "and weights that are mapped from their file included."
    )


def _sizes(documents: Documents) -> str:
    head = (
        "model", "parameters, M", "layers", "clock, s", "CPU time, s", "FP32 weights, GB", "peak, GB", "libraries, GB",
        "peak / FP32", "without libraries", "file, MB",
    )  # fmt: skip
    return table(head, [_size(name, shape, documents.get(name)) for name, shape in SIZES.items()])


def _size(name: str, shape: Shape, document: Mapping[str, Any] | None) -> list[str]:
    cells = [name, number(shape.parameters / 1e6), str(shape.layers)]
    if document is None:
        return [*cells, MISSING, MISSING, number(shape.float_bytes / 1e9), *[MISSING] * 5]
    found = document["figures"]
    peak, libraries = found["peak_bytes"], found["runtime_bytes"]
    return [
        *cells, number(found["seconds"]), number(found["cpu_seconds"]), number(shape.float_bytes / 1e9),
        number(peak / 1e9), number(libraries / 1e9), number(peak / shape.float_bytes),
        number((peak - libraries) / shape.float_bytes), number(found["file_bytes"] / 1e6),
    ]  # fmt: skip


def _line_words(points: Points, what: str, unit: str, of: str, whose: str) -> str:
    """The line through points in words; empty where there are too few."""
    found = fit(points)
    if found is None:
        return ""
    intercept, slope, worst = found
    return (
        f"Least squares: {what} = {number(intercept)} {unit} + {number(slope)} {of}; no {whose} is further "
        f"from that line than {worst:.0%}."
    )


def _layers(documents: Documents) -> str:
    rows, before = [], None
    for name, shape in LAYERS.items():
        found = _figures(documents, name)
        if found is None:
            rows.append([str(shape.layers), *[MISSING] * 3])
            continue
        each = "" if before is None else number((found["cpu_seconds"] - before[1]) / (shape.layers - before[0]))
        rows.append([str(shape.layers), number(found["seconds"]), number(found["cpu_seconds"]), each])
        before = shape.layers, found["cpu_seconds"]
    return table(("layers of SmolLM2's", "clock, s", "CPU time, s", "CPU time of each further layer, s"), rows)


def _stages(documents: Documents) -> str:
    found = {name: document["figures"] for name, document in documents.items()}
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
    return "CPU time and peak memory while each stage ran.\n\n" + table(("model", *names), rows)


def _figures(documents: Documents, name: str) -> Mapping[str, Any] | None:
    document = documents.get(name)
    return None if document is None else document["figures"]


def time_points(documents: Documents) -> Points:
    """(layers, seconds of CPU time) at one width."""
    found = ((shape.layers, _figures(documents, name)) for name, shape in LAYERS.items())
    return [(layers, figures["cpu_seconds"]) for layers, figures in found if figures is not None]


def memory_points(documents: Documents) -> Points:
    """(GB of FP32 weights, GB at most) by size."""
    found = ((shape.float_bytes, _figures(documents, name)) for name, shape in SIZES.items())
    return [(size / 1e9, figures["peak_bytes"] / 1e9) for size, figures in found if figures is not None]


def plot(documents: Documents) -> str:
    """CPU time by layers, and peak memory by weights with the line at RATIO times them, as SVG."""
    root = charts.canvas("export", "CPU time and peak memory of exporting", "One mark a model.", 2 * PANEL)
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = (
        STYLE + ".grid{stroke:#e4e4e4}.fit{fill:none;stroke:#888}.limit{fill:none;stroke:#2d8a4e;stroke-dasharray:5 4}"
    )
    charts.rect(root, 0, 0, WIDTH, 2 * PANEL, "paper")
    _panel(root, 0, "CPU time, s", "layers of SmolLM2's width", time_points(documents), None)
    largest = max(shape.float_bytes for name, shape in MODELS.items() if name in documents) / 1e9
    title = f"Peak memory, GB; dashed: {RATIO} times the weights"
    _panel(root, PANEL, title, "GB of FP32 weights", memory_points(documents), [(0, 0), (largest, RATIO * largest)])
    return charts.to_svg(root)


def _panel(root: ET.Element, top: float, title: str, axis: str, points: Points, limit: Points | None) -> None:
    charts.text(root, 8, top + 18, title, "head")
    if not points:
        charts.text(root, LEFT, top + PANEL / 2, MISSING, "tick")
        return
    right, bottom = WIDTH - 14, top + PANEL - FOOT
    across = Scale(0, charts.nice_top(max(x for x, _ in points)), LEFT, right)
    up = Scale(0, charts.nice_top(max(y for _, y in [*points, *(limit or [])])), bottom, top + TOP)
    charts.y_axis(root, up, right, LEFT)
    charts.x_axis(root, across, bottom, axis)
    if limit is not None:
        charts.path(root, [(across(x), up(y)) for x, y in limit], "limit")
    found = fit(points)
    if found is not None:
        ends = [(x, found[0] + found[1] * x) for x in (min(x for x, _ in points), max(x for x, _ in points))]
        (x1, y1), (x2, y2) = ends
        charts.line(root, (across(x1), up(y1)), (across(x2), up(y2)), "fit")
    for x, y in points:
        charts.marker(root, across(x), up(y), "square", "square", f"{x:.4g}: {y:.4g}")
