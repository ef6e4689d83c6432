"""The plot of docs/accuracy.md: perplexity of every model, one mark a seed and runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

from qat_edge.report.charts import WIDTH, Scale, canvas, line, marker, rect, text, to_svg, x_axis

Points = Sequence[tuple[str, float]]  # (target, perplexity)

SHAPES = {"torch": "circle", "executorch": "square", "onnx": "diamond"}
LEFT, ROW, HEAD, FOOT = 122.0, 24.0, 44.0, 52.0
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.name,.tick{fill:#555}.head{font-weight:600}"
    ".paper{fill:#fff}.axis{stroke:#888}.row{stroke:#e4e4e4}"
    ".torch{fill:none;stroke:#1b5e9b;stroke-width:1.6}.executorch{fill:#c4501b}.onnx{fill:#2d8a4e}"
)


def perplexities(panels: Mapping[str, Mapping[str, Points]]) -> str:
    """task -> model -> points, as SVG; empty where nothing was measured."""
    drawn = {task: models for task, models in panels.items() if any(models.values())}
    if not drawn:
        return ""
    heights = [HEAD + FOOT + ROW * len(models) for models in drawn.values()]
    title = "Perplexity of the FP32 fine-tune and of what quantization makes of it"
    root = canvas("perplexity", title, "Lower is better; one mark a seed and runtime.", sum(heights))
    root.set("xmlns", "http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = STYLE
    rect(root, 0, 0, WIDTH, sum(heights), "paper")
    top = 0.0
    for (task, models), height in zip(drawn.items(), heights, strict=True):
        _panel(root, task, models, top)
        top += height
    return to_svg(root)


def _panel(root: ET.Element, task: str, models: Mapping[str, Points], top: float) -> None:
    values = [value for points in models.values() for _, value in points]
    pad = (max(values) - min(values)) * 0.06 or 1.0
    scale = Scale(min(values) - pad, max(values) + pad, LEFT, WIDTH - 14)
    text(root, 8, top + 18, task, "head")
    _legend(root, top + 18)
    for index, (model, points) in enumerate(models.items()):
        y = top + HEAD + ROW * (index + 0.5)
        text(root, LEFT - 10, y + 4, model, "", "end")
        line(root, (LEFT, y), (WIDTH - 14, y), "row")
        for target, value in points:
            marker(root, scale(value), y, SHAPES[target], target, f"{model}, {target}: {value:.4g}")
        if not points:
            text(root, LEFT + 4, y + 4, "not measured", "tick")
    x_axis(root, scale, top + HEAD + ROW * len(models), "perplexity, lower is better")


def _legend(root: ET.Element, y: float) -> None:
    x = LEFT + 60
    for target, words in (("torch", "torch"), ("executorch", ".pte"), ("onnx", "ONNX")):
        marker(root, x, y - 4, SHAPES[target], target)
        text(root, x + 10, y, words, "tick")
        x += 72
