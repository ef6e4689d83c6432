"""How a figure is written, and what the models and targets are called: the same in tables, plots and sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from qat_edge.run import PTQ_METHODS

ROLES = {
    "base": "FP32 base",
    "tuned": "FP32 fine-tuned",
    "ptq": "PTQ",
    "qat": "QAT",
}
TARGETS = {"torch": "torch", "executorch": "ExecuTorch", "onnx": "ONNX"}
PARTS = ("linears", "scales", "embedding", "head", "graph", "tokenizer", "float")
_NAMES = {"fp32 base": "base", "fp32 fine-tuned": "tuned", "qat": "qat"}
_SHORT = {f"ptq ({words})": method.upper() for method, words in PTQ_METHODS.items()}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Model(Protocol):
    """What a row of every report has: of a model that generates text, and of an encoder."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def size_bytes(self) -> dict[str, int]: ...
    @property
    def total_bytes(self) -> int: ...


def role(row: Model) -> str:
    """base, tuned, ptq, qat, or other for a name this page does not know."""
    return "ptq" if row.name.startswith("ptq") else _NAMES.get(row.name, "other")


def quantized(row: Model) -> bool:
    """Whether the row is a quantized model, wherever it ran."""
    return role(row) in ("ptq", "qat")


def label(row: Model) -> str:
    """`QAT · ONNX`, `RTN · ONNX`; a float model's name alone, as it only runs in torch."""
    name = ROLES.get(role(row), plain(row.name))
    if role(row) == "ptq":
        name = _SHORT.get(row.name, plain(row.name))
    if role(row) in ("base", "tuned") and row.target == "torch":
        return name
    return f"{name} · {TARGETS.get(row.target, plain(row.target))}"


def plain(text: str) -> str:
    """The text without the characters that neither XML nor a reader can take."""
    return _CONTROL.sub("\ufffd", text)


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, whole numbers in full: 0.0312, 17.3, 165, 1,053."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if magnitude < -4:
        return f"{value / 10**magnitude:.1f}×10{str(magnitude).translate(_SUPERSCRIPT)}"
    return f"{value:,.{max(digits - 1 - magnitude, 0)}f}"


def percent(share: float) -> str:
    """A share as per cent with one decimal; 100% only where nothing is missing from it."""
    if not math.isfinite(share):
        return "not finite"
    text = f"{share * 100:.1f}"
    if share < 1 and text == "100.0":
        return f"{math.floor(share * 10000) / 100:.2f}%"
    return text.removesuffix(".0") + "%"


def cosine(value: float) -> str:
    """With four decimals, as all of them are close to 1."""
    return f"{value:.4f}" if math.isfinite(value) else "not finite"


def megabytes(size_bytes: float) -> str:
    """Millions of bytes, without the unit."""
    return number(size_bytes / 1e6)


def whole_percent(share: float) -> str:
    """A share as whole per cents, rounded down where it would otherwise read as all of it."""
    if not math.isfinite(share):
        return "not finite"
    return f"{math.floor(share * 100) if 0.99 <= share < 1 else round(share * 100)}%"


def span(values: Sequence[float], write: Callable[[float], str], between: str = " to ") -> str:
    """The least and the greatest value as written, or one where both read the same: `19% to 22%`."""
    texts = list(dict.fromkeys(write(value) for value in (min(values), max(values))))
    return between.join(texts)


def duration(seconds: float) -> str:
    """`41 s` or `12 min 30 s`."""
    if not math.isfinite(seconds):
        return "not finite"
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    hours, minutes = divmod(round(seconds) // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {round(seconds) % 60} s"
