"""Measure a .pte in a runner binary that the user built for the device, as far as the binary allows.

llama_main returns text and its own timing. executor_runner returns logits for one input length only, the context length
of the program (see `qat_edge_devices.runtimes.native_runtime`). Outputs are compared as text, because the runner's own
tokenizer reads the prompt. What a binary cannot measure is noted with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from qat_edge import progress
from qat_edge.errors import DeviceError, UsageError
from qat_edge.evaluate.evaluator import Evaluator, announce_timing, as_agreement
from qat_edge.evaluate.metrics import LogitComparison, LogitMetrics, outputs_match
from qat_edge.evaluate.reference import Logits, spread
from qat_edge.evaluate.results import Measurement, Speed
from qat_edge.evaluate.structured import OWN_RUNNER, judge, judged_prompts
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.options import ValidateOptions
from qat_edge.readers import counted
from qat_edge.run import Variant
from qat_edge_devices.runtimes.native_runtime import NativeRunner, RunnerTimings
from qat_edge_devices.transport import Transport
from qat_edge_exporters.targets import target_named

MEMORY = "memory not measured: the runner does not report it"
NO_LOGITS = "KL, top-1 and perplexity not measured: the runner gives text, not logits"
NO_TEXT = "exact match and decode speed not measured: the runner takes and gives tensors, not text"
NO_CLOCK = "speed not measured: the runner printed no timing of its own"
AS_TEXT = "outputs compared as text, prompts tokenized by the runner's own tokenizer"
OWN_CLOCK = f"{AS_TEXT}; speed by the runner's own clock"


class _LogitFigures(NamedTuple):
    """Metrics of the runner's logits, None where there were none to compare, and a note about them."""

    accuracy: LogitMetrics | None
    parity: LogitMetrics | None
    note: str


class _TextFigures(NamedTuple):
    """Share of prompts with the expected output, None without prompts.

    Attributes:
        exact_match: that share.
        clocks: the runner's timing of each repeat.
        answers: to the prompts.
    """

    exact_match: float | None
    clocks: list[RunnerTimings]
    answers: list[str]


def require_supported(options: ValidateOptions) -> Path:
    """Return the path that --runner-binary names.

    Raises:
        UsageError: no such file, or an option is set that no runner supports.
    """
    binary = Path(options.runner_binary or "")
    if not binary.is_file():
        raise UsageError(f"--runner-binary {binary}: there is no such file. Give an executor_runner or a llama_main.")
    if options.error_budget:
        raise UsageError(
            "--error-budget: needs logits of whole sequences, which no --runner-binary gives. Leave one out."
        )
    return binary


def unsupported_reason(target: str) -> str:
    """Return a sentence why a runner cannot load artifacts of `target`; empty if it can, which is for any .pte."""
    return "" if target.startswith("executorch") else f"{target} cannot run in --runner-binary, which takes a .pte."


def measure(
    evaluator: Evaluator, binary: Path, variant: Variant, target: str, transport: Transport, own: bool
) -> Measurement:
    """Measure the .pte of `variant` in `binary` on a device.

    own: True for an artifact of the run itself, as in `Evaluator.measure_artifact`.
    """
    folder, threads = variant.exports / target, evaluator.options.threads
    progress.info(f"Measuring {folder} in {binary.name} on {transport.name}")
    runner = NativeRunner(transport, binary, threads)
    runner.prepare(folder)

    # The flags in the binary's --help tell which of the two it is.
    scored = _score(evaluator, runner, folder, own) if runner.computes_logits else _LogitFigures(None, None, NO_LOGITS)
    generated = _generate(evaluator, runner) if runner.generates_text else _TextFigures(None, [], [])
    exact_match, clocks, answers = generated
    judged = judged_prompts(evaluator.eval_set, folder) if runner.generates_text else None

    # Every figure that is missing has a note that says why.
    notes = [f"runs in {binary.name}, built by you", scored.note, MEMORY]
    if not runner.generates_text:
        notes.append(NO_TEXT)
    elif clocks:
        notes.append(OWN_CLOCK)
    else:
        notes += [AS_TEXT, NO_CLOCK]
    if exact_match is not None:
        notes += evaluator.eval_set.notes

    artifact = target_named(target).read(folder)
    return Measurement(
        name=variant.name,
        target=target,
        runtime=f"{binary.name}, native",
        size_bytes=artifact.size_bytes,
        perplexity=math.nan if scored.accuracy is None else scored.accuracy.perplexity,
        agreement=None if scored.accuracy is None else as_agreement(scored.accuracy),
        parity=None if scored.parity is None else as_agreement(scored.parity),
        exact_match=exact_match,
        prompts=0 if exact_match is None else len(evaluator.eval_set.prompts),
        schema=None if judged is None else judge(judged, answers, OWN_RUNNER),
        load_ms=median(clock.load_ms for clock in clocks) if clocks else None,
        speed=_speed(clocks, threads) if clocks else None,
        notes=tuple(notes),
    )


def _score(evaluator: Evaluator, runner: NativeRunner, folder: Path, own: bool) -> _LogitFigures:
    """Compare the logits at position `context length - 1` of every sequence that is compared there.

    The runner takes inputs of the program's context length only and returns the logits of the last token.
    """
    width = context_of_artifact(folder)
    fitting = [(i, s) for i, s in enumerate(evaluator.eval_set.sequences) if width - 1 in s.positions]
    if not fitting:
        reason = f"the runner takes {width} tokens a call and no other number, and no compared sequence is that long"
        what = NO_LOGITS.partition(":")[0]
        return _LogitFigures(None, None, f"{what}: {reason}; give --text FILE --window {width + 1}")

    progress.info(f"  logits after {width} tokens of {counted(len(fitting), 'sequence')}")
    accuracy, parity = LogitComparison(), LogitComparison()
    for index, sequence in fitting:
        row = sequence.positions.index(width - 1)
        rows = slice(row, row + 1)
        expected = evaluator.fp32_logits.get(index)[rows]
        logits = _last_logits(runner, sequence.ids[:width], expected)
        accuracy.add(expected, logits, sequence.targets[rows])
        if own:
            parity.add(evaluator.frozen_logits.get(index)[rows], logits, sequence.targets[rows])

    note = f"logits after {width} tokens only, {len(fitting)} of them: the runner takes no other number"
    return _LogitFigures(accuracy.result(), parity.result() if own else None, note)


def _last_logits(runner: NativeRunner, ids: list[int], expected: Logits) -> Logits:
    """Return the logits (1, vocabulary) after the last of `ids`.

    Raises:
        DeviceError: the runner returned another number of logits than the reference has.
    """
    # A raw file of float32 without a shape: its size is the only check that it is this vocabulary's.
    written = runner.logits(ids)
    if len(written) != expected.shape[1] * 4:
        raise DeviceError(
            f"{runner.transport.name}: {runner.binary.name} wrote {len(written)} bytes of logits; expected were "
            f"{expected.shape[1]} of float32. Is the .pte this run's own?"
        )
    return np.frombuffer(written, "<f4")[None]


def _generate(evaluator: Evaluator, runner: NativeRunner) -> _TextFigures:
    """Compare the runner's output for each prompt with the expected text, then time it."""
    eval_set, options = evaluator.eval_set, evaluator.options
    assert eval_set.tokenizer is not None
    decode: Callable[[list[int]], str] = eval_set.tokenizer.decode
    end_texts = [decode([token]) for token in eval_set.eos_ids]

    if eval_set.prompts:
        progress.info(f"  generating outputs for {counted(len(eval_set.prompts), 'prompt')}")
    # The runner takes text: prompts are decoded to text, and its own tokenizer encodes them again.
    answers, right, reader = [], 0, eval_set.reader()
    for prompt in eval_set.prompts:
        output, _ = runner.generate_text(decode(prompt.ids), options.max_new_tokens)
        answer = reader.from_text(_before_end(output, end_texts))
        answers.append(answer)
        right += outputs_match(answer, reader.from_text(prompt.expected))

    # Timing needs a prompt of `prefill` tokens of real text; its content does not matter.
    announce_timing(options)
    ids = [token for sequence in eval_set.sequences for token in sequence.ids][: options.prefill]
    rounds = [runner.generate_text(decode(ids), options.decode, for_timing=True)[1] for _ in range(options.repeats)]

    exact_match = right / len(eval_set.prompts) if eval_set.prompts else None
    return _TextFigures(exact_match, [clock for clock in rounds if clock is not None], answers)


def _before_end(output: str, end_texts: list[str]) -> str:
    """Return the output before the first end token, which runners print."""
    starts = [output.find(end) for end in end_texts if end]
    return output[: min((start for start in starts if start >= 0), default=len(output))]


def _speed(clocks: list[RunnerTimings], threads: int) -> Speed:
    return Speed(
        threads=threads,
        prompt_tokens=clocks[0].prompt_tokens,
        new_tokens=min(clock.new_tokens for clock in clocks),
        repeats=len(clocks),
        prefill=spread([clock.prefill_tokens_per_s for clock in clocks]),
        decode=spread([clock.decode_tokens_per_s for clock in clocks]),
        first_token_ms=spread([clock.ttft_ms for clock in clocks]),
    )
