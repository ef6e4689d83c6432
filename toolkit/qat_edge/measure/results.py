"""What validate measured, as values: written to RUN/reports/DEVICE.json, read by report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
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
    """prefill and decode in tokens per second, first_token in ms (time to first token of the whole prompt)."""

    threads: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    prefill: Spread
    decode: Spread
    first_token_ms: Spread


@dataclass(frozen=True)
class Measured:
    """One model as it ran.

    name: "fp32 base", "fp32 fine-tuned", "qat" or "ptq (round-to-nearest)". target: "torch", "executorch", "onnx".
    size_bytes: by part (linears, scales, embedding, head, graph, tokenizer; float for a torch model's weights).
    exact_match: share of prompts answered exactly, None where none was asked. agreement: against the FP32
    fine-tune; parity: against the frozen checkpoint in torch, which an exact runtime matches to the noise floor.
    same_answers: share of prompts answered as the FP32 fine-tune does, token for token; first_divergence: median
    index of the first other token over the rest of them, None where there is no rest.
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


@dataclass(frozen=True)
class Gate:
    """A limit that was set and what was found: `found` must be at most or at least `limit`."""

    flag: str
    limit: float
    measured: str
    found: float
    passed: bool


@dataclass(frozen=True)
class Report:
    """All of one validate. noise_floor: the frozen model against itself, disturbed by one part in 10^7."""

    created: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    noise_floor: Agreement
    measured: list[Measured]
    gates: list[Gate]


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    document = {"format": FORMAT, **dataclasses.asdict(report)}
    write_text(path, json.dumps(document, indent=1) + "\n")


def load(path: Path) -> Report:
    """Read what `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "report", "validate", _report)


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
    return Report(**document, noise_floor=floor, measured=found, gates=gates)
