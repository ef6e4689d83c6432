"""Results of validate for an encoder: written to RUN/answers.json, read by report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qat_edge.evaluate.results import KEY, Gate, from_json, read_document, to_json, write_document

FORMAT = 1
ACCURACY, RETRIEVAL, CORRELATION = "accuracy", "retrieval accuracy", "rank correlation"
MEASURES = {
    ACCURACY: "share of texts whose label is right",
    RETRIEVAL: "share of anchors whose own positive is the nearest of all",
    CORRELATION: "Spearman's correlation of the pairs' cosines and scores",
}


@dataclass(frozen=True)
class EncoderResult:
    """Figures of one model; all but `quality` and the size compare it with another and may be None.

    Attributes:
        name: as in `results.Measurement`.
        target: as in `results.Measurement`.
        size_bytes: as in `results.Measurement`.
        quality: the metric that `EncoderReport.measure` names.
        cosine: mean cosine similarity of its outputs and the FP32 fine-tune's over the texts; None for the fine-tune.
        least_cosine: the lowest cosine similarity of all texts.
        agreement: share of texts with the same predicted label as the FP32 fine-tune; classifiers only.
        parity: mean cosine similarity with the outputs of the frozen checkpoint in torch.
        not_finite: which of its outputs are not finite, as a sentence without a stop; empty where all are. The figures
            are then nan.
        artifact_sha256: as in `results.Measurement`.
    """

    name: str
    target: str
    size_bytes: dict[str, int]
    quality: float
    cosine: float | None = None
    least_cosine: float | None = None
    agreement: float | None = None
    parity: float | None = None
    not_finite: str = ""
    artifact_sha256: str = ""

    @property
    def total_bytes(self) -> int:
        """Size of every file that the device needs."""
        return sum(self.size_bytes.values())


@dataclass(frozen=True)
class EncoderReport:
    """Results of all models of a run on the same rows.

    Attributes:
        created: time in ISO format.
        device: always this machine.
        machine: description of it.
        options: of validate.
        task: name of the model's task, such as "text-classification".
        measure: metric in `EncoderResult.quality`, one of MEASURES.
        rows: number of evaluation rows.
        texts: number of texts in them; a row of a pair has two.
        results: one a model, the FP32 fine-tune first.
        gates: one a limit.
    """

    created: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    task: str = field(metadata={KEY: "kind"})
    measure: str
    rows: int
    texts: int
    results: list[EncoderResult] = field(metadata={KEY: "answered"})
    gates: list[Gate]

    def lines(self) -> Iterator[str]:
        """Yield a summary for the terminal: a heading, then one line a model."""
        yield f"{self.rows} rows, {self.texts} texts; {self.measure}, and cosine similarity with the FP32 fine-tune"

        for result in self.results:
            # What was not measured for a model is left out of its line.
            parts = [f"{result.quality:.4f}"]
            if result.cosine is not None:
                parts.append(f"cosine {result.cosine:.4f} (lowest {result.least_cosine:.4f})")
            if result.agreement is not None:
                parts.append(f"{result.agreement:.1%} of labels equal")
            if result.parity is not None:
                parts.append(f"cosine with the frozen checkpoint {result.parity:.6f}")
            parts.append(f"{result.total_bytes / 1e6:.1f} MB")
            yield f"  {result.name}: {', '.join(parts)}"


def save(report: EncoderReport, path: Path) -> None:
    """Write the report as JSON."""
    write_document(path, FORMAT, to_json(report))


def load(path: Path) -> EncoderReport:
    """Read a report that `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "comparison", "validate", _read_report)


def _read_report(document: dict[str, Any]) -> EncoderReport:
    document["answered"] = [EncoderResult(**row) for row in document["answered"]]
    document["gates"] = [Gate(**row) for row in document["gates"]]
    return from_json(EncoderReport, document)
