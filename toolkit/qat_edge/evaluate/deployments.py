"""The four-deployment table as values: what a model becomes on a device by each way of shipping a fine-tune.

    base     the FP32 base model, before any training
    lora     FP32 base, the adapters beside it as matrices of their own
    naive    the base rounded to nearest, float adapters beside it that never saw the rounding
    merged   the adapters merged into FP32 weights
    ptq      the merged weights quantized after training, a row for each method of run.PTQ_METHODS
    qat      fused QAT-LoRA: merged weights under the codes and scales they were trained with

What a fine-tune gained over its base, and how much of that a deployment keeps, is a ratio of differences:

    kept = (row - base) / (fine-tune - base)    in exact match, and in log perplexity (nats per token)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.config import DEPLOYMENTS
from qat_edge.evaluate import results
from qat_edge.evaluate.results import Measured
from qat_edge.run import PTQ_METHODS, write_text

FORMAT = 1
PTQ = "ptq-"  # what the name of a merged PTQ row starts with; its method follows
TITLES = {
    "base": "Base, FP32",
    "lora": "LoRA unmerged, FP32",
    "naive": "Naive PTQ base + adapters",
    "merged": "Merged, FP32",
    **{f"{PTQ}{method}": f"Merged PTQ, {words}" for method, words in PTQ_METHODS.items()},
    "qat": "Fused QAT-LoRA",
}


@dataclass(frozen=True)
class Deployment:
    """One way of shipping on one target. measured: None where it could not be made or run; `reason` says why."""

    name: str
    target: str
    measured: Measured | None = None
    reason: str = ""

    @property
    def title(self) -> str:
        """What people call it."""
        return TITLES.get(self.name, self.name)

    @property
    def ms_per_token(self) -> float | None:
        """Median time of one decoded token."""
        if self.measured is None or self.measured.speed is None:
            return None
        return 1e3 / self.measured.speed.decode.median

    @property
    def memory_bytes(self) -> int | None:
        """Peak memory above what the runtime took before it loaded the artifact."""
        return None if self.measured is None else self.measured.above_runtime_bytes


@dataclass(frozen=True)
class DeploymentTable:
    """All of one compare. reference: the FP32 fine-tune in torch, which every row's KL is against.

    steps: optimizer steps behind the "reference" and behind "qat"; empty where the run does not say.
    """

    created: str
    model: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    steps: dict[str, int]
    reference: Measured
    deployments: list[Deployment]

    @property
    def further_training(self) -> str:
        """A sentence where QAT trained longer than what it is compared with; empty where it did not."""
        first, last = self.steps.get("reference"), self.steps.get("qat")
        if first is None or last is None or last <= first or not any(d.name == "qat" for d in self.deployments):
            return ""
        return (
            f"Fused QAT-LoRA was trained for {last} steps, the fine-tune in all other rows is its state after {first}: "
            f"some of what it keeps may be bought by the {last - first} further steps, not by the kind of training."
        )

    @property
    def targets(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(d.target for d in self.deployments))

    @property
    def base(self) -> Measured | None:
        """The base model on any target: its answers are the same function's."""
        return next((d.measured for d in self.deployments if d.name == "base" and d.measured), None)

    def row(self, name: str, target: str) -> Deployment | None:
        """One row, None where it was not asked for."""
        return next((d for d in self.deployments if (d.name, d.target) == (name, target)), None)

    def kept_exact_match(self, row: Deployment) -> float | None:
        """Share of the fine-tune's gain in exact match; None where it gained nothing or was not measured."""
        found = [None if m is None else m.exact_match for m in (row.measured, self.base, self.reference)]
        return _kept(found, sign=1)

    def kept_perplexity(self, row: Deployment) -> float | None:
        """Share of the fine-tune's gain in log perplexity; None where it gained nothing or was not measured."""
        found = [None if m is None else m.perplexity for m in (row.measured, self.base, self.reference)]
        return _kept([None if p is None or not math.isfinite(p) else math.log(p) for p in found], sign=-1)


def row_names(deployments: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Rows in the order of the table."""
    wanted = [name for name in DEPLOYMENTS if name in deployments]
    return [row for name in wanted for row in ([f"{PTQ}{m}" for m in methods] if name == "ptq" else [name])]


def document(table: DeploymentTable) -> dict[str, Any]:
    """The table as plain values for compare.json, with what follows from the figures beside them."""
    rows = [
        {
            **dataclasses.asdict(row),
            "title": row.title,
            "ms_per_token": row.ms_per_token,
            "above_runtime_bytes": row.memory_bytes,
            "kept_exact_match": table.kept_exact_match(row),
            "kept_perplexity": table.kept_perplexity(row),
        }
        for row in table.deployments
    ]
    return {"format": FORMAT, **dataclasses.asdict(table), "deployments": rows}


def save(table: DeploymentTable, path: Path) -> None:
    """Write the table as JSON."""
    write_text(path, json.dumps(document(table), indent=1) + "\n")


def load(path: Path) -> DeploymentTable:
    """Read what `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return results.read_document(path, FORMAT, "table", "compare", _table)


def _table(found: dict[str, Any]) -> DeploymentTable:
    rows = [_row(row) for row in found.pop("deployments")]
    return DeploymentTable(**found | {"reference": results.measured(found["reference"]), "deployments": rows})


def _row(row: dict[str, Any]) -> Deployment:
    measured = row["measured"] and results.measured(row["measured"])
    return Deployment(row["name"], row["target"], measured, row["reason"])


def _kept(found: Sequence[float | None], sign: int) -> float | None:
    row, base, tuned = found
    if row is None or base is None or tuned is None or sign * (tuned - base) <= 0:
        return None
    return (row - base) / (tuned - base)
