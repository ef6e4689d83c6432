"""Results of validate for a model that generates text: written to RUN/reports/DEVICE.json, read by report."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.field_types import check_types
from qat_edge.storage import write_text

FORMAT = 1
# Names of the float model that all others are compared with: a fine-tune, or a model that was not trained here.
FINE_TUNED, UNTRAINED = "fp32 fine-tuned", "fp32 model"
REFERENCES = {FINE_TUNED: "FP32 fine-tune", UNTRAINED: "FP32 model"}  # with what sentences call them
KEY = "key"  # metadata of a field whose key in the JSON files differs from its name
# Least and greatest value of figures, by the name of their field at any depth. Those of logits may be nan, for "not
# measured" and for logits that are not finite; those in FINITE are measured, or None.
COUNT, SHARE = (0.0, math.inf), (0.0, 1.0)
RANGES = {
    **dict.fromkeys(("tokens", "prompts", "rows", "texts", "repeats", "threads"), COUNT),
    **dict.fromkeys(("answers", "left_out", "valid", "constrained", "cut"), COUNT),
    **dict.fromkeys(("size_bytes", "memory_bytes", "runtime_bytes", "load_ms"), COUNT),
    **dict.fromkeys(("median", "least", "greatest", "perplexity", "first_divergence"), COUNT),
    **dict.fromkeys(("top1", "exact_match", "same_answers", "chance"), SHARE),
    # Rounding moves a KL divergence below 0 and a cosine above 1.
    "kl_nats": (-1e-3, math.inf),
    **dict.fromkeys(("quality", "cosine", "least_cosine"), (-1.001, 1.001)),
}
FINITE = (
    "median", "least", "greatest", "step_ms_p50", "step_ms_p95", "load_ms", "exact_match", "same_answers",
    "first_divergence", "chance", "limit",
)  # fmt: skip
Document = TypeVar("Document")  # the type that a file is read as


@dataclass(frozen=True)
class Agreement:
    """A candidate's logits compared with a reference's, on the same token ids.

    Attributes:
        tokens: number of compared tokens.
        kl_nats: mean KL(reference || candidate) per token, in nats.
        top1: share of tokens for which both models rank the same token first, 0 to 1.
        sqnr_db: signal-to-quantization-noise ratio of the logits in dB; None where they are equal.
    """

    tokens: int
    kl_nats: float
    top1: float
    sqnr_db: float | None


@dataclass(frozen=True)
class Parity:
    """An artifact that was run on a few prompts, compared with its frozen checkpoint in torch.

    Both sides round as the artifact's runtime does on this machine.

    Attributes:
        not_measured: why it was not run, as a sentence; empty where it was.
        fault: how it differs by more than rounding noise, as sentences; empty where it does not.
        tokens: number of compared tokens.
        error_db: median error of a token, in dB of its logits; errors below -80 dB count as -80 dB.
        noise_db: the same of the checkpoint against itself with disturbed layers.
        sqnr_db: of all logits or outputs, in dB; None where they are equal or were not compared. A single token, such
            as one of the first position, may decide it.
        kl_nats: mean KL divergence per token, in nats; None for an encoder.
        floor_sqnr_db: the same figure of the disturbed checkpoint, the lowest of all draws.
        floor_kl_nats: the same, the highest of all draws.
        chance: probability that a token's error exceeds that of the disturbed checkpoint; see `FaultTest`.
        not_reached: what these prompts do not test, as a phrase; empty where nothing is known.
        seconds: time of the comparison.
    """

    not_measured: str = ""
    fault: str = ""
    tokens: int = 0
    error_db: float | None = None
    noise_db: float | None = None
    sqnr_db: float | None = None
    kl_nats: float | None = None
    floor_sqnr_db: float | None = None
    floor_kl_nats: float | None = None
    chance: float | None = None
    not_reached: str = ""
    seconds: float = 0.0

    def describe(self) -> str:
        """Return it as a phrase for one line."""
        if self.not_measured:
            return f"parity not measured: {self.not_measured.rstrip('.')}"
        if self.fault:
            return "parity FAILED"
        if self.error_db is None or self.noise_db is None or self.chance is None:
            return "parity not recorded"
        beyond = f"; not reached: {self.not_reached}" if self.not_reached else ""
        return (
            f"parity {self.error_db:.0f} dB (noise floor {self.noise_db:.0f} dB), fault chance {self.chance:.0%} "
            f"(equal: 50%), {self.tokens} tokens in {self.seconds:.0f} s{beyond}"
        )


@dataclass(frozen=True)
class Spread:
    """Median of repeated measurements, with the smallest and the largest."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True)
class Speed:
    """Timing of one model: prefill of a prompt, then decoding.

    Attributes:
        threads: CPU threads used.
        prompt_tokens: length of the prompt.
        new_tokens: tokens decoded after it.
        repeats: timed repeats, without the warm-up.
        prefill: tokens per second.
        decode: tokens per second.
        first_token_ms: time to first token for the whole prompt.
        step_ms_p50: median time of one decoded token over all repeats; None where only their sum was measured.
        step_ms_p95: 95th percentile of the same.
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
class SchemaResult:
    """Answers of an artifact that are valid by its schema.json.

    Attributes:
        answers: number of prompts that count: those whose expected answer is valid.
        left_out: number of the other prompts.
        valid: valid answers, generated without a constraint.
        first_fault: why the first invalid one of them is not valid, as a phrase; empty where all are.
        constrained: valid answers, generated under the grammar; None where not measured.
        cut: those of the others that ended at the longest permitted answer, or at the context.
        not_measured: why `constrained` is None.
    """

    answers: int
    left_out: int
    valid: int
    first_fault: str = ""
    constrained: int | None = None
    cut: int = 0
    not_measured: str = ""

    def require_counts(self) -> None:
        """Require no more valid answers than answers.

        Raises:
            ValueError: there are more.
        """
        if max(self.valid, (self.constrained or 0) + self.cut) > self.answers:
            raise ValueError(f"{self.valid} and {self.constrained} of {self.answers} answers are valid")

    def with_constraint(self, valid: int, cut: int) -> SchemaResult:
        """Return it with the answers that were generated under the grammar."""
        return dataclasses.replace(self, constrained=valid, cut=cut)

    def remarks(self) -> list[str]:
        """Return sentences to print below the figures."""
        remarks = []
        if self.first_fault:
            remarks.append(f"the first invalid answer without the constraint: {self.first_fault}")
        if self.cut:
            remarks.append(f"{self.cut} constrained answers were cut off: give a larger --max-new-tokens")
        if self.not_measured:
            remarks.append(f"constrained answers not measured: {self.not_measured}")
        return remarks

    @property
    def valid_share(self) -> float | None:
        """Share of valid answers without the constraint, 0 to 1; None without answers."""
        return self.valid / self.answers if self.answers else None

    @property
    def constrained_share(self) -> float | None:
        """Share of valid answers under the grammar, 0 to 1; None where not measured."""
        return None if self.constrained is None or not self.answers else self.constrained / self.answers


@dataclass(frozen=True)
class Measurement:
    """All figures of one model in one runtime.

    Attributes:
        name: "fp32 base", one of REFERENCES, the name of the run or of a PTQ variant such as "ptq (round-to-nearest)".
        target: "torch", "executorch", "onnx", ...
        runtime: name and version of the runtime.
        size_bytes: by part (linears, scales, embedding, head, graph, tokenizer; float for a torch model's weights).
            A head of 0 bytes shares the embedding's table.
        perplexity: nan where the runtime returns no logits.
        agreement: compared with the FP32 fine-tune; None where the runtime returns no logits.
        parity: compared with the frozen checkpoint in torch, which an exact runtime matches down to the noise floor.
        exact_match: share of prompts whose output equals the expected one; None without prompts.
        prompts: number of prompts.
        load_ms: time to load the artifact.
        speed: timing of prefill and decoding.
        memory_bytes: peak resident memory of the process.
        runtime_bytes: resident memory of the runtime before it loaded the artifact.
        same_answers: share of prompts whose output equals the FP32 fine-tune's, token for token.
        first_divergence: median index of the first differing token over the other prompts; None if there are none.
        notes: sentences to show next to the figures.
        not_finite: which of its logits are not finite, as a sentence without a stop; empty where all are. The figures
            are then nan.
        artifact_sha256: hash of the manifest of the measured artifact; empty for a torch model and in files of earlier
            versions.
        schema: answers that are valid by the artifact's schema; None for one without a schema.
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
    not_finite: str = ""
    artifact_sha256: str = ""
    schema: SchemaResult | None = None

    @property
    def total_bytes(self) -> int:
        """Size of every file that the device needs."""
        return sum(self.size_bytes.values())

    @property
    def scored(self) -> bool:
        """Return True if there were logits to compare; some native runners return none."""
        return self.agreement is not None or not math.isnan(self.perplexity)

    @property
    def above_runtime_bytes(self) -> int | None:
        """Peak memory minus what the runtime used before it loaded the artifact; None where not measured."""
        if self.memory_bytes is None or self.runtime_bytes is None:
            return None
        return self.memory_bytes - self.runtime_bytes


@dataclass(frozen=True)
class Gate:
    """A limit that was set, and the figure checked against it.

    Attributes:
        flag: command-line flag that sets the limit; --max-... is an upper limit, --min-... a lower one.
        limit: value of the flag.
        measured: model and target, such as "qat, onnx".
        found: measured figure; nan where it was not measured, which fails the gate.
        passed: result of the check.
        why: known cause of a failure, may be empty.
    """

    flag: str
    limit: float
    measured: str
    found: float
    passed: bool
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One state of the model between the base model and the artifact on a device.

    Attributes:
        name: of the state, such as "frozen checkpoint".
        perplexity: on the evaluation tokens.
        agreement: compared with the FP32 fine-tune; None for the fine-tune itself.
        change: compared with the previous step; None for the first.
    """

    name: str
    perplexity: float
    agreement: Agreement | None
    change: Agreement | None


@dataclass(frozen=True)
class Part:
    """The frozen checkpoint in torch with one part unquantized; agreement: compared with the FP32 fine-tune."""

    name: str
    perplexity: float
    agreement: Agreement


@dataclass(frozen=True)
class FaultTest:
    """Result of testing whether an artifact differs from the frozen checkpoint by more than rounding noise.

    Attributes:
        exceeds_noise: True if it does.
        chance: probability that a token's error exceeds that of the disturbed checkpoint, at the position of a prompt
            where it is largest; 0.5 where both have the same distribution.
        position: first position of a prompt at which the error exceeds rounding noise; None if none does.
        location: a sentence about where the fault is; may be empty.
    """

    exceeds_noise: bool = field(metadata={KEY: "beyond"})
    chance: float
    position: int | None
    location: str = field(metadata={KEY: "where"})


@dataclass(frozen=True)
class Budget:
    """Error budget of one QAT artifact: where its difference from the FP32 fine-tune comes from.

    Attributes:
        target: of the artifact.
        fault_test: the artifact on this device compared with the frozen checkpoint.
        frozen_divergence: first layer at which the frozen checkpoint differs from the trained forward by more than
            rounding; empty where none does.
        steps: from the base model to the artifact.
        parts: the frozen checkpoint with one part unquantized at a time.
        floor: the frozen checkpoint compared with itself after a relative disturbance of 1e-7, one per seed.
        floor_nats: change of its log perplexity under that disturbance, one per seed.
    """

    target: str
    fault_test: FaultTest = field(metadata={KEY: "judged"})
    frozen_divergence: str = field(metadata={KEY: "converted"})
    steps: list[Step]
    parts: list[Part]
    floor: list[Agreement]
    floor_nats: list[float]


@dataclass(frozen=True)
class Report:
    """Everything that one run of validate measured on one device.

    Attributes:
        created: time in ISO format.
        device: as --device names it.
        machine: description of the device.
        options: of validate.
        tokens: number of compared tokens.
        noise_floor: the frozen checkpoint compared with itself after a relative disturbance of 1e-7.
        measured: one measurement a model and target.
        gates: one a limit and QAT artifact.
        budgets: one a QAT artifact, with --error-budget.
        identities: digests of the compared "tokens", the "prompts" and the "reference" model; empty in files of
            earlier versions.
    """

    created: str
    device: str
    machine: dict[str, Any]
    options: dict[str, Any]
    tokens: int
    noise_floor: Agreement
    measured: list[Measurement]
    gates: list[Gate]
    budgets: list[Budget] = field(default_factory=list)
    identities: dict[str, str] = field(default_factory=dict)


def save(report: Report, path: Path) -> None:
    """Write the report as JSON."""
    write_document(path, FORMAT, to_json(report))


def load(path: Path) -> Report:
    """Read a report that `save` wrote.

    Raises:
        RunError: no such file, damaged, or of another format.
    """
    return read_document(path, FORMAT, "report", "validate", _read_report)


def to_json(value: Any) -> Any:
    """Return dataclasses, at any depth, as dictionaries under the keys of the files that validate and compare write."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.metadata.get(KEY, f.name): to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value


def from_json(cls: type[Document], values: dict[str, Any]) -> Document:
    """Build a dataclass from the keys that `to_json` writes; nested values must have been built already.

    Raises:
        TypeError: a key is missing or unknown.
    """
    # mypy knows no bound "any dataclass" for a type variable.
    names = {f.metadata.get(KEY, f.name): f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{names.get(key, key): value for key, value in values.items()})


def write_document(path: Path, file_format: int, values: dict[str, Any]) -> None:
    """Write plain values as the JSON object that `read_document` reads."""
    write_text(path, json.dumps({"format": file_format, **values}, indent=1) + "\n")


def read_document(
    path: Path, file_format: int, noun: str, verb: str, build: Callable[[dict[str, Any]], Document]
) -> Document:
    """Read a JSON object from a file and build a value from it.

    Args:
        path: of the file.
        file_format: expected number under "format".
        noun: name of the file's content, for messages.
        verb: command that writes the file, for messages.
        build: called with the object without its "format".

    Raises:
        RunError: no such file, damaged, or of another format than `file_format`.
    """
    if not path.exists():
        raise RunError(f"{path}: no such {noun}. `qat-edge {verb}` writes it.")
    try:
        document = readers.read_object(path, RunError, allow_nan=True)
        if document.pop("format") != file_format:
            raise RunError(f"{path}: written by another version of qat-edge. Run {verb} again.")
        found = build(document)
        check_types(found, type(found), type(found).__name__, _check_range)
        return found
    except (AttributeError, IndexError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: damaged ({error}). Run {verb} again.") from error


def _check_range(value: Any, field_name: str, name: str) -> None:
    """Check that a figure is within the range of its field, and nan only where it can be.

    Raises:
        ValueError: names the field.
    """
    least, greatest = RANGES.get(field_name, (-math.inf, math.inf))
    for key, number in value.items() if isinstance(value, dict) else [("", value)]:
        where = f"{name}[{key!r}]" if key else name
        if isinstance(number, int | float) and (number < least or number > greatest):
            expected = f"from {least:g} to {greatest:g}" if math.isfinite(greatest) else f"at least {least:g}"
            raise ValueError(f"{where} is {readers.show(number)}, expected {expected}")
        if field_name in FINITE and number is not None and not math.isfinite(number):
            raise ValueError(f"{where} is {number}, expected a finite number, or null if it was not measured")
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        _check_nan(item, f"{name}[{index}]" if isinstance(value, list) else name)


def _check_nan(value: Any, name: str) -> None:
    """Check that figures of the same logits are nan together, or none of them.

    Raises:
        ValueError: names the figure.
    """
    if isinstance(value, Agreement):
        figures = {"kl_nats": value.kl_nats, "top1": value.top1}
        figures |= {} if value.sqnr_db is None else {"sqnr_db": value.sqnr_db}
    elif isinstance(value, Measurement | Step | Part):
        figures = {"perplexity": value.perplexity}
        figures |= {} if value.agreement is None else {"agreement.kl_nats": value.agreement.kl_nats}
        # The float models are required to have finite logits, and torch returns all of them.
        figures |= {"fp32": 0.0} if value.name.lower().startswith("fp32 ") else {}
    elif isinstance(value, Gate):
        figures = {"found": value.found, "passed": 0.0} if value.passed else {}
    else:
        return
    unknown = [key for key, number in figures.items() if math.isnan(number)]
    if unknown and len(unknown) < len(figures):
        raise ValueError(f"{name}.{unknown[0]} is nan, although it was measured")


def read_measurement(row: dict[str, Any]) -> Measurement:
    """Build a measurement from the values that `to_json` returns."""
    # Nested values first: JSON has dictionaries, None and lists where the dataclass has others.
    for key in ("agreement", "parity"):
        row[key] = row[key] and Agreement(**row[key])
    if row["speed"]:
        for key in ("prefill", "decode", "first_token_ms"):
            row["speed"][key] = Spread(**row["speed"][key])
        row["speed"] = Speed(**row["speed"])
    if row.get("schema"):  # missing in files of earlier versions
        row["schema"] = SchemaResult(**row["schema"])
        row["schema"].require_counts()
    row["notes"] = tuple(row["notes"])
    return Measurement(**row)


def _read_report(document: dict[str, Any]) -> Report:
    measured = [read_measurement(row) for row in document.pop("measured")]
    gates = [Gate(**row) for row in document.pop("gates")]
    floor = Agreement(**document.pop("noise_floor"))
    budgets = [_read_budget(row) for row in document.pop("budgets", [])]  # missing in files of earlier versions
    return Report(**document, noise_floor=floor, measured=measured, gates=gates, budgets=budgets)


def _read_budget(row: dict[str, Any]) -> Budget:
    for step in row["steps"]:
        for key in ("agreement", "change"):
            step[key] = step[key] and Agreement(**step[key])
    row["steps"] = [Step(**step) for step in row["steps"]]
    row["parts"] = [Part(**part | {"agreement": Agreement(**part["agreement"])}) for part in row["parts"]]
    row["floor"] = [Agreement(**figures) for figures in row["floor"]]
    row["judged"] = from_json(FaultTest, row["judged"])
    return from_json(Budget, row)
