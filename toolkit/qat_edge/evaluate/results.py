"""What validate measured, as values: written to RUN/reports/DEVICE.json, read by report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qat_edge.errors import RunError
from qat_edge.run import write_text

FORMAT = 1
Document = TypeVar("Document")  # what a file is read as


@dataclass(frozen=True)
class Agreement:
    """Two models on the same token ids. kl_nats: mean KL(reference || candidate) per token, in nats;
    top1: share of tokens with the same first choice; sqnr_db: of the logits, None where they are equal."""

    tokens: int
    kl_nats: float
    top1: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with the least and the greatest."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Speed:
    """prefill and decode in tokens per second, first_token in ms (time to first token of the whole prompt).

    step_ms_p50, step_ms_p95: of one decoded token, over all repeats; None where only their sum was measured.
    """

    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill: Spread
    decode: Spread
    first_token_ms: Spread
    step_ms_p50: float | None = None
    step_ms_p95: float | None = None


@dataclass(frozen=True)
class Measured:
    """One model as it ran.

    name: "fp32 base", "fp32 fine-tuned", "qat" or "ptq (round-to-nearest)". target: "torch", "executorch", "onnx".
    size_bytes: by part (linears, scales, embedding, head, graph, tokenizer; float for a torch model's weights); a head
    of 0 bytes shares the embedding's table.
    exact_match: share of prompts answered exactly, None where none was asked. agreement: against the FP32
    fine-tune; parity: against the frozen checkpoint in torch, which an exact runtime matches to the noise floor.
    same_answers: share of prompts answered as the FP32 fine-tune does, token for token; first_divergence: median
    index of the first other token over the rest of them, None where there is no rest.
    perplexity: nan where the runtime gives no logits (`scored` is False), as agreement is None then.
    memory_bytes: peak resident memory; runtime_bytes: of which the runtime took before the artifact was loaded.
    """

    name: str
    target: str
    runtime: str
    size_bytes: dict[str, int]
    perplexity: float
    agreement: Agreement | None = None
    parity: Agreement | None = None
    exact_match: float | None = None
    prompts: int = 0
    load_ms: float | None = None
    speed: Speed | None = None
    memory_bytes: int | None = None
    runtime_bytes: int | None = None
    same_answers: float | None = None
    first_divergence: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Size of everything the device needs."""
        return sum(self.size_bytes.values())

    @property
    def scored(self) -> bool:
        """Whether there were logits to compare; some native runners give none."""
        return self.agreement is not None or not math.isnan(self.perplexity)

    @property
    def above_runtime_bytes(self) -> int | None:
        """Peak memory without what the runtime took before it loaded the artifact; None where not measured."""
        if self.memory_bytes is None or self.runtime_bytes is None:
            return None
        return self.memory_bytes - self.runtime_bytes


@dataclass(frozen=True)
class Gate:
    """A limit that was set and what was found: `found` must be at most or at least `limit`. why: what is known."""

    flag: str
    limit: float
    measured: str
    found: float
    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One state of the model on its way to a device. agreement: with the FP32 fine-tune; change: with the step before.

    Both None for the first; agreement None for the fine-tune itself.
    """

    name: str
    perplexity: float
    agreement: Agreement | None
    change: Agreement | None


@dataclass(frozen=True)
class Part:
    """The frozen checkpoint in torch with one part of its rounding off: agreement is with the FP32 fine-tune."""

    name: str
    perplexity: float
    agreement: Agreement


@dataclass(frozen=True)
class Judgement:
    """Whether a difference from the frozen checkpoint is more than rounding.

    chance: greatest over the positions that a token errs more than the disturbed checkpoint's does; 0.5 where they are
    alike. position: the first of a prompt at which it is beyond rounding. where: what is known of the place, if any.
    """

    beyond: bool
    chance: float
    position: int | None
    where: str


@dataclass(frozen=True)
class Budget:
    """Where one QAT artifact's difference from the FP32 fine-tune comes from.

    floor: the frozen checkpoint against itself disturbed by one part in 10^7, by seed; floor_nats: how much its
    log perplexity moved by that. judged: the artifact on this device against the frozen checkpoint. converted: where
    that checkpoint parts from the trained forward, empty where the two are the same but for rounding.
    """

    target: str
    judged: Judgement
    converted: str
    steps: list[Step]
    parts: list[Part]
    floor: list[Agreement]
    floor_nats: list[float]


@dataclass(frozen=True)
class Report:
    """All of one validate. noise_floor: the frozen model against itself, disturbed by one part in 10^7.

    budgets: one a QAT artifact where they were asked for. identities: digests of the "tokens" that were compared, of
    the "prompts" that were asked, and of the "reference" model; empty in files of earlier versions.
    """

    created: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    noise_floor: Agreement
    measured: list[Measured]
    gates: list[Gate]
    budgets: list[Budget] = field(default_factory=list)
    identities: dict[str, str] = field(default_factory=dict)


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    write_document(path, FORMAT, dataclasses.asdict(report))


def load(path: Path) -> Report:
    """Read what `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "report", "validate", _report)


def write_document(path: Path, file_format: int, values: dict[str, Any]) -> None:
    """Write plain values as the JSON object that `read_document` reads."""
    write_text(path, json.dumps({"format": file_format, **values}, indent=1) + "\n")


def read_document(
    path: Path, file_format: int, noun: str, verb: str, build: Callable[[dict[str, Any]], Document]
) -> Document:
    """What `build` makes of the JSON object in a file. noun: what the file is; verb: the command that wrote it.

    Raises:
        RunError: no such file, damaged, or of another format than `file_format`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document.pop("format") != file_format:
            raise RunError(f"{path}: written by another version of qat-edge. Run {verb} again.")
        return build(document)
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such {noun}. `qat-edge {verb}` makes it.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}). Run {verb} again.") from error


def measured(row: dict[str, Any]) -> Measured:
    """One model out of plain values, as `dataclasses.asdict` makes them."""
    for key in ("agreement", "parity"):
        row[key] = row[key] and Agreement(**row[key])
    if row["speed"]:
        for key in ("prefill", "decode", "first_token_ms"):
            row["speed"][key] = Spread(**row["speed"][key])
        row["speed"] = Speed(**row["speed"])
    row["notes"] = tuple(row["notes"])
    return Measured(**row)


def _report(document: dict[str, Any]) -> Report:
    found = [measured(row) for row in document.pop("measured")]
    gates = [Gate(**row) for row in document.pop("gates")]
    floor = Agreement(**document.pop("noise_floor"))
    budgets = [_budget(row) for row in document.pop("budgets", [])]
    return Report(**document, noise_floor=floor, measured=found, gates=gates, budgets=budgets)


def _budget(row: dict[str, Any]) -> Budget:
    for step in row["steps"]:
        for key in ("agreement", "change"):
            step[key] = step[key] and Agreement(**step[key])
    steps = [Step(**step) for step in row.pop("steps")]
    parts = [Part(**part | {"agreement": Agreement(**part["agreement"])}) for part in row.pop("parts")]
    floor = [Agreement(**found) for found in row.pop("floor")]
    row["judged"] = Judgement(**row["judged"])
    return Budget(**row, steps=steps, parts=parts, floor=floor)
