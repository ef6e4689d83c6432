"""Table of deployments, for compare: figures of one fine-tune shipped in each of these ways.

    base     the FP32 base model, before any training
    lora     FP32 base, the adapters as unmerged matrices
    naive    the base rounded to nearest, with float adapters that were trained without that rounding
    merged   the adapters merged into FP32 weights
    ptq      the merged weights quantized after training, a row for each method of PTQ_METHODS
    qat      fused QAT-LoRA: merged weights under the codes and scales they were trained with

The share of the fine-tune's gain over its base that a deployment keeps is a ratio of differences:

    kept = (row - base) / (fine-tune - base)    in exact match, and in log perplexity (nats per token)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.evaluate.results import Measurement, read_document, read_measurement, to_json
from qat_edge.options import DEPLOYMENTS
from qat_edge.quant.ptq.method_names import PTQ_METHODS
from qat_edge.storage import write_text

FORMAT = 1
PTQ = "ptq-"  # prefix of the name of a merged PTQ row; its method follows
TITLES = {
    "base": "Base, FP32",
    "lora": "LoRA unmerged, FP32",
    "naive": "Naive PTQ base + adapters",
    "merged": "Merged, FP32",
    **{f"{PTQ}{method}": f"Merged PTQ, {title}" for method, title in PTQ_METHODS.items()},
    "qat": "Fused QAT-LoRA",
}


@dataclass(frozen=True)
class Deployment:
    """One row: a way of shipping on one target.

    Attributes:
        name: key of TITLES.
        target: "executorch" or "onnx".
        measured: None where it could not be exported or run.
        reason: why not; empty where it was measured.
    """

    name: str
    target: str
    measured: Measurement | None = None
    reason: str = ""

    @property
    def title(self) -> str:
        """Name for people."""
        return TITLES.get(self.name, self.name)

    @property
    def ms_per_token(self) -> float | None:
        """Median time of one decoded token."""
        if self.measured is None or self.measured.speed is None:
            return None
        return 1e3 / self.measured.speed.decode.median

    @property
    def memory_bytes(self) -> int | None:
        """Peak memory above what the runtime used before it loaded the artifact."""
        return None if self.measured is None else self.measured.above_runtime_bytes


@dataclass(frozen=True)
class DeploymentTable:
    """Everything that one run of compare measured.

    Attributes:
        created: time in ISO format.
        model: name of the base model.
        device: where the artifacts ran.
        machine: description of it.
        options: of validate, and the context length.
        tokens: number of compared tokens.
        steps: optimizer steps behind the "reference" and behind "qat"; empty where the run does not record them.
        reference: the FP32 fine-tune in torch, which the KL of every row is relative to.
        deployments: the rows.
    """

    created: str
    model: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    steps: dict[str, int]
    reference: Measurement
    deployments: list[Deployment]

    @property
    def further_training(self) -> str:
        """A sentence for tables in which QAT was trained for longer than the other rows; else empty."""
        # The reference is the state at the start of QAT, so that QAT has had more optimizer steps.
        first, last = self.steps.get("reference"), self.steps.get("qat")
        if first is None or last is None or last <= first:
            return ""
        if not any(row.name == "qat" for row in self.deployments):
            return ""
        return (
            f"Fused QAT-LoRA was trained for {last} steps; the fine-tune in all other rows is its state after {first}. "
            f"Part of what it keeps may come from the {last - first} further steps instead of from quantization-aware "
            "training."
        )

    @property
    def targets(self) -> list[str]:
        """Targets in the order of the rows."""
        return list(dict.fromkeys(row.target for row in self.deployments))

    @property
    def base(self) -> Measurement | None:
        """The base model on the first target that has it; its outputs are the same function on all."""
        return next((row.measured for row in self.deployments if row.name == "base" and row.measured), None)

    def row(self, name: str, target: str) -> Deployment | None:
        """Return one row, or None if it was not requested."""
        return next((row for row in self.deployments if (row.name, row.target) == (name, target)), None)

    def kept_exact_match(self, row: Deployment) -> float | None:
        """Return the share of the fine-tune's gain in exact match that a row keeps; None if there is no gain."""
        values = [None if m is None else m.exact_match for m in (row.measured, self.base, self.reference)]
        return _kept(values, sign=1)

    def kept_perplexity(self, row: Deployment) -> float | None:
        """Return the share of the fine-tune's gain in log perplexity that a row keeps; None if there is no gain."""
        perplexities = [None if m is None else m.perplexity for m in (row.measured, self.base, self.reference)]
        # A runner without logits has a perplexity of nan, and an overflow gives infinity.
        return _kept([None if p is None or not math.isfinite(p) else math.log(p) for p in perplexities], sign=-1)


def row_names(deployments: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Return the names of the requested rows, in the order of the table: "ptq" becomes one row a method."""
    names: list[str] = []
    for name in DEPLOYMENTS:
        if name not in deployments:
            continue
        names += [f"{PTQ}{method}" for method in methods] if name == "ptq" else [name]
    return names


def as_document(table: DeploymentTable) -> dict[str, Any]:
    """Return the table as plain values for compare.json, with the figures that are derived from others."""
    rows = [
        {
            **to_json(row),
            "title": row.title,
            "ms_per_token": row.ms_per_token,
            "above_runtime_bytes": row.memory_bytes,
            "kept_exact_match": table.kept_exact_match(row),
            "kept_perplexity": table.kept_perplexity(row),
        }
        for row in table.deployments
    ]
    return {"format": FORMAT, **to_json(table), "deployments": rows}


def save(table: DeploymentTable, path: Path) -> None:
    """Write the table as JSON."""
    write_text(path, json.dumps(as_document(table), indent=1) + "\n")


def load(path: Path) -> DeploymentTable:
    """Read a table that `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "table", "compare", _read_table)


def _read_table(document: dict[str, Any]) -> DeploymentTable:
    rows = [_read_row(row) for row in document.pop("deployments")]
    reference = read_measurement(document.pop("reference"))
    return DeploymentTable(**document, reference=reference, deployments=rows)


def _read_row(row: dict[str, Any]) -> Deployment:
    measured = row["measured"] and read_measurement(row["measured"])
    return Deployment(row["name"], row["target"], measured, row["reason"])


def _kept(values: Sequence[float | None], sign: int) -> float | None:
    """Return (row - base) / (fine-tune - base); None where one is missing or the fine-tune gained nothing.

    Args:
        values: of row, base and fine-tune.
        sign: 1 where larger is better, -1 where smaller is.
    """
    # Of a loss (sign -1), a gain is a decrease. Without a gain the ratio has no meaning.
    row, base, tuned = values
    if row is None or base is None or tuned is None:
        return None
    gain = tuned - base
    return (row - base) / gain if sign * gain > 0 else None
