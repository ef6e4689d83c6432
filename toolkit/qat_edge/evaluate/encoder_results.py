"""What validate measured of an encoder, as values: written to RUN/answers.json, read by report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.evaluate.results import Gate, read_document, write_document

FORMAT = 1
ACCURACY, RETRIEVAL, CORRELATION = "accuracy", "retrieval accuracy", "rank correlation"
MEASURES = {
    ACCURACY: "share of texts whose label is right",
    RETRIEVAL: "share of anchors whose own positive is the nearest of all",
    CORRELATION: "Spearman's correlation of the pairs' cosines and scores",
}


@dataclass(frozen=True)
class Answered:
    """One model beside the FP32 fine-tune, which has no cosine. name, target, size_bytes: as of `results.Measured`.

    quality: see `Comparison.measure`. cosine: of its answers and the fine-tune's, mean over the texts; least_cosine:
    the least of them. agreement: share of texts with the same label, of classifiers. parity: cosine with the frozen
    checkpoint in torch.
    """

    name: str
    target: str
    size_bytes: dict[str, int]
    quality: float
    cosine: float | None = None
    least_cosine: float | None = None
    agreement: float | None = None
    parity: float | None = None

    @property
    def total_bytes(self) -> int:
        """Size of everything the device needs."""
        return sum(self.size_bytes.values())


@dataclass(frozen=True)
class Comparison:
    """All models on the same rows. kind: `Kind.name`. measure: what `Answered.quality` is, one of MEASURES."""

    created: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    kind: str
    measure: str
    rows: int
    texts: int
    answered: list[Answered]
    gates: list[Gate]

    def lines(self) -> Iterator[str]:
        """For people, one a model."""
        yield f"{self.rows} rows, {self.texts} texts; {self.measure}, and cosine with the FP32 fine-tune"
        for found in self.answered:
            parts = [f"{found.quality:.4f}"]
            if found.cosine is not None:
                parts.append(f"cosine {found.cosine:.4f} (least {found.least_cosine:.4f})")
            parts += [] if found.agreement is None else [f"{found.agreement:.1%} of the labels alike"]
            parts += [] if found.parity is None else [f"frozen checkpoint {found.parity:.6f}"]
            yield f"  {found.name}: {', '.join([*parts, f'{found.total_bytes / 1e6:.1f} MB'])}"


def save(comparison: Comparison, path: Path) -> None:
    """Write the comparison as JSON."""
    write_document(path, FORMAT, dataclasses.asdict(comparison))


def load(path: Path) -> Comparison:
    """Read what `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "comparison", "validate", _comparison)


def _comparison(document: dict[str, Any]) -> Comparison:
    answered = [Answered(**row) for row in document.pop("answered")]
    gates = [Gate(**row) for row in document.pop("gates")]
    return Comparison(**document, answered=answered, gates=gates)
