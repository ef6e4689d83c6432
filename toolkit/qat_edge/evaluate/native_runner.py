"""A .pte in a runner that the user built for the device: what the binary can give, and a reason for the rest.

llama_main gives text and its own clock, executor_runner the logits after as many tokens as the program takes in one
call and no other number (see `qat_edge_devices.runtimes.native_runtime`). Answers are compared as text: the
runner's own tokenizer reads the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from qat_edge import progress
from qat_edge.config import ValidateOptions
from qat_edge.errors import DeviceError, UsageError
from qat_edge.evaluate.evaluator import Bench, agreement
from qat_edge.evaluate.metrics import Comparison, LogitComparison, same_answer
from qat_edge.evaluate.reference import Logits, spread
from qat_edge.evaluate.results import Measured, Speed
from qat_edge.lazy import resolve
from qat_edge.run import Variant, read_manifest
from qat_edge_devices.runtimes.native_runtime import Clock, NativeRunner
from qat_edge_devices.transport import Transport
from qat_edge_exporters import READERS

MEMORY = "memory not measured: the runner does not say"
NO_LOGITS = "KL, top-1 and perplexity not measured: the runner gives text, not logits"
NO_TEXT = "exact match and decode speed not measured: the runner takes and gives tensors, not text"
NO_CLOCK = "speed not measured: the runner printed no figures of its own"
AS_TEXT = "answers compared as text, prompts read by the runner's own tokenizer; speed by the runner's own clock"


@dataclass(frozen=True)
class _Scored:
    """What the logits said, None where there were none to compare, and a note on it."""

    accuracy: Comparison | None
    parity: Comparison | None
    note: str


def require_possible(options: ValidateOptions) -> Path:
    """The file that --runner-binary names.

    Raises:
        UsageError: there is none, or something was asked for beside it that no runner gives.
    """
    binary = Path(options.runner_binary or "")
    if not binary.is_file():
        raise UsageError(f"--runner-binary {binary}: there is no such file. Give an executor_runner or a llama_main.")
    if options.error_budget:
        raise UsageError(
            "--error-budget: needs logits of whole sequences, which no --runner-binary gives. Leave one out."
        )
    return binary


def why_not(target: str) -> str:
    """Why a runner cannot take artifacts of `target`, a sentence; empty where it can: whatever is a .pte."""
    return "" if target.startswith("executorch") else f"{target} cannot run in --runner-binary, which takes a .pte."


def measure(bench: Bench, binary: Path, variant: Variant, target: str, transport: Transport, own: bool) -> Measured:
    """The .pte of `variant` in `binary` on a device. own: of the run itself, as in `Bench.artifact`."""
    folder = variant.exports / target
    progress.info(f"Measuring {folder} in {binary.name}")
    runner = NativeRunner(transport, binary, bench.options.threads)
    runner.prepare(folder)
    scored = _score(bench, runner, folder, own) if runner.scores else _Scored(None, None, NO_LOGITS)
    exact_match, clocks = _answer(bench, runner) if runner.answers else (None, [])
    notes = [f"runs in {binary.name}, built by you", scored.note, MEMORY]
    notes += ([AS_TEXT] if clocks else [AS_TEXT.partition(";")[0], NO_CLOCK]) if runner.answers else [NO_TEXT]
    return Measured(
        name=variant.name,
        target=target,
        runtime=f"{binary.name}, native",
        size_bytes=resolve(READERS, target, "--target")(folder).size_bytes,
        perplexity=math.nan if scored.accuracy is None else scored.accuracy.perplexity,
        agreement=None if scored.accuracy is None else agreement(scored.accuracy),
        parity=None if scored.parity is None else agreement(scored.parity),
        exact_match=exact_match,
        prompts=0 if exact_match is None else len(bench.material.prompts),
        load_ms=median(clock.load_ms for clock in clocks) if clocks else None,
        speed=_speed(clocks, bench.options.threads) if clocks else None,
        notes=tuple(notes),
    )


def _score(bench: Bench, runner: NativeRunner, folder: Path, own: bool) -> _Scored:
    """Every compared position that has as many tokens before and at it as the program takes."""
    width = int(read_manifest(folder)["options"]["context_length"])
    accuracy, parity = LogitComparison(), LogitComparison()
    found = [(i, s) for i, s in enumerate(bench.material.sequences) if width - 1 in s.positions]
    if not found:
        reason = f"the runner takes {width} tokens a call and no other number, and no compared sequence is that long"
        return _Scored(None, None, f"{NO_LOGITS.partition(':')[0]}: {reason}; give --text FILE --window {width + 1}")
    progress.info("  scoring")
    for index, sequence in found:
        row = sequence.positions.index(width - 1)
        place = slice(row, row + 1)
        logits = _row(runner, sequence.ids[:width], bench.fp32.get(index)[place])
        accuracy.add(bench.fp32.get(index)[place], logits, sequence.targets[place])
        if own:
            parity.add(bench.exact.get(index)[place], logits, sequence.targets[place])
    note = f"logits after {width} tokens only, {len(found)} of them: the runner takes no other number"
    return _Scored(accuracy.result(), parity.result() if own else None, note)


def _row(runner: NativeRunner, ids: list[int], expected: Logits) -> Logits:
    """(1, vocabulary) logits after the last of `ids`.

    Raises:
        DeviceError: what came back has another size than the reference.
    """
    written = runner.logits(ids)
    if len(written) != expected.shape[1] * 4:
        raise DeviceError(
            f"{runner.transport.name}: {runner.binary.name} wrote {len(written)} bytes of logits; expected were "
            f"{expected.shape[1]} of float32. Is the .pte this run's own?"
        )
    return np.frombuffer(written, "<f4")[None]


def _answer(bench: Bench, runner: NativeRunner) -> tuple[float | None, list[Clock]]:
    """Share of the prompts answered as expected, None where there are none, and the figures of the timed repeats."""
    material, options = bench.material, bench.options
    text: Callable[[list[int]], str] = material.tokenizer.decode
    ends = tuple(text([token]) for token in material.eos_ids)
    right = 0
    if material.prompts:
        progress.info("  answering the prompts")
    for ids, expected in material.prompts:
        answer, _ = runner.answer(text(ids), options.max_new_tokens)
        right += same_answer(_without_end(answer, ends), expected)
    progress.info("  timing")
    read = [token for sequence in material.sequences for token in sequence.ids][: options.prefill]
    rounds = [runner.answer(text(read), options.decode, to_the_end=True)[1] for _ in range(options.repeats)]
    return right / len(material.prompts) if material.prompts else None, [clock for clock in rounds if clock is not None]


def _without_end(answer: str, ends: tuple[str, ...]) -> str:
    """The answer up to the first end token, which runners print."""
    return answer[: min((place for end in ends if end and (place := answer.find(end)) >= 0), default=len(answer))]


def _speed(clocks: list[Clock], threads: int) -> Speed:
    return Speed(
        threads=threads,
        prompt_tokens=clocks[0].prompt_tokens,
        new_tokens=min(clock.new_tokens for clock in clocks),
        repeats=len(clocks),
        prefill=spread([clock.prefill_tokens_per_s for clock in clocks]),
        decode=spread([clock.decode_tokens_per_s for clock in clocks]),
        first_token_ms=spread([clock.ttft_ms for clock in clocks]),
    )
