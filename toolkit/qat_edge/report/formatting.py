"""Numbers as text, and display names of models and targets: the same in tables, plots and sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from qat_edge.evaluate.results import FINE_TUNED, REFERENCES, UNTRAINED
from qat_edge.quant.ptq.method_names import OWN_ADAPTERS, PTQ_METHODS, QAT, STORED, TITLES, is_own
from qat_edge_exporters.targets import TARGETS

# Roles of models with their names in most runs. "tuned" is the float model that others are compared with, and "qat" the
# run's own model: without a training, or without a step of QAT, `model_label` has other names for them.
ROLES = {
    "base": "FP32 base",
    "tuned": "FP32 fine-tuned",
    "ptq": "PTQ",
    "qat": "QAT",
}
TARGET_TITLES = {"torch": "torch"} | {target.name: target.title for target in TARGETS.values()}
# Parts of an artifact's size with their display names, in the order in which they are stacked.
PARTS = {
    "linears": "linear layers",
    "scales": "scales",
    "embedding": "embedding",
    "head": "head",
    "graph": "graph",
    "tokenizer": "tokenizer",
    "float": "float weights",
}

# Acronyms in capitals, names in sentence case: "RTN", "GPTQ", "Coordinate descent".
_PTQ_LABELS = {
    f"ptq ({title})": title.capitalize() if "-" in method else method.upper() for method, title in PTQ_METHODS.items()
} | {f"ptq ({TITLES[STORED]})": TITLES[STORED].capitalize()}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control characters and surrogates: not allowed in XML, and invisible to readers.
_NOT_PRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class ReportedModel(Protocol):
    """Fields that a measured language model and a measured encoder have in common."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def size_bytes(self) -> dict[str, int]: ...
    @property
    def total_bytes(self) -> int: ...


def role(row: ReportedModel) -> str:
    """Return the row's role, a key of ROLES, and "other" for an unknown name."""
    if row.name.startswith("ptq"):
        return "ptq"
    if is_own(row.name):
        return "qat"
    return "base" if row.name == "fp32 base" else "tuned" if row.name in REFERENCES else "other"


def quantized(row: ReportedModel) -> bool:
    """Return whether the row is a quantized model, on any target."""
    return role(row) in ("ptq", "qat")


def label(row: ReportedModel) -> str:
    """Return `QAT · ONNX` or `RTN · ONNX`; the name alone for a float model, which runs in torch only."""
    name = model_label(row)
    if role(row) in ("base", "tuned") and row.target == "torch":
        return name
    return f"{name} · {target_label(row)}"


def model_label(row: ReportedModel) -> str:
    """Return the display name without the target: `QAT`, `RTN`, `RTN (this run)`, `FP32 base`."""
    if role(row) == "ptq":
        return _PTQ_LABELS.get(row.name, plain(row.name))
    if is_own(row.name) and row.name != QAT:
        prefix, _, method = row.name.partition(" ")
        title = plain(method.strip("()"))
        return (
            f"Adapters on {title}"
            if prefix == OWN_ADAPTERS
            else f"{_PTQ_LABELS.get(f'ptq {method}', title)} (this run)"
        )
    return "FP32 model" if row.name == UNTRAINED else ROLES.get(role(row), plain(row.name))


def reference_title(rows: Iterable[ReportedModel]) -> str:
    """Return what sentences call the float model that others are compared with."""
    return next((REFERENCES[row.name] for row in rows if row.name in REFERENCES), REFERENCES[FINE_TUNED])


def role_names(rows: Sequence[ReportedModel]) -> dict[str, str]:
    """Return the display name of each role that the rows have, in their order."""
    shared = {"ptq": ROLES["ptq"], "other": "other"}  # by several models
    labels = {role(row): model_label(row) for row in reversed(rows)} | shared
    return {name: labels[name] for name in dict.fromkeys(map(role, rows))}


def role_legend(rows: Sequence[ReportedModel]) -> list[tuple[str, str]]:
    """Return the color of each role, as a CSS class, with its name."""
    return [(f"l-bar c-{role}", name) for role, name in role_names(rows).items()]


def own_title(rows: Sequence[ReportedModel]) -> str:
    """Return the display name of the run's own model."""
    return role_names(rows).get("qat", ROLES["qat"])


def target_label(row: ReportedModel) -> str:
    """Return the display name of the row's target."""
    return TARGET_TITLES.get(row.target, plain(row.target))


def part_label(part: str) -> str:
    """Return the display name of a part of an artifact's size."""
    return PARTS.get(part, plain(part))


def plain(text: str) -> str:
    """Replace characters that XML does not allow or that no reader could see."""
    return _NOT_PRINTABLE.sub("\ufffd", text)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, of cells in which `|` is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """Format with `digits` significant digits, integers in full: 0.0312, 17.3, 165, 1,053."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"

    # The exponent of the rounded value: 999.9 with three digits has four digits before the point.
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if magnitude < -4:
        return f"{value / 10**magnitude:.1f}×10{str(magnitude).translate(_SUPERSCRIPT)}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def percent(share: float) -> str:
    """Format a share as a percentage with one decimal; "100%" only for exactly 1."""
    if not math.isfinite(share):
        return "not finite"
    text = f"{share * 100:.1f}"
    if share < 1 and text == "100.0":
        return f"{math.floor(share * 10000) / 100:.2f}%"
    return text.removesuffix(".0") + "%"


def cosine(value: float) -> str:
    """Format a cosine similarity with four decimals, since all of them are close to 1."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def megabytes(size_bytes: float) -> str:
    """Format bytes as millions of bytes, without the unit."""
    return number(size_bytes / 1e6)


def whole_percent(share: float) -> str:
    """Format a share as a whole percentage, rounded down between 99% and 100%."""
    if not math.isfinite(share):
        return "not finite"
    return f"{math.floor(share * 100) if 0.99 <= share < 1 else round(share * 100)}%"


def span(values: Sequence[float], write: Callable[[float], str], between: str = " to ") -> str:
    """Format the smallest and the largest value, `19% to 22%`, or one text if both read the same."""
    texts = list(dict.fromkeys(write(value) for value in (min(values), max(values))))
    return between.join(texts)


def duration(seconds: float) -> str:
    """Format a duration as `41 s`, `12 min 30 s` or `2 h 5 min`."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"
