"""Advice for a training that ran out of memory: what needs it, and three options that need less, with figures."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

from qat_edge import launched, progress
from qat_edge.config import flag_name
from qat_edge.errors import QatEdgeError
from qat_edge.options import FinetuneOptions
from qat_edge.peak_memory import is_out_of_memory
from qat_edge.verbs.plan import training_memory
from qat_edge.verbs.prediction import GIGABYTE, TrainingMemory

SHOWN = 3  # options that the message names
LEAST_GAIN = 0.02  # of the memory; an option that saves less is no help
TEACHER_TOKENS = 64  # per position, of a teacher that is computed once


class Alternative(NamedTuple):
    """Options that may need less memory.

    Attributes:
        changes: Their new values, by name.
        effect: On the training, for a message.
    """

    changes: dict[str, Any]
    effect: str


def explain(options: FinetuneOptions, found: str) -> str:
    """Return the paragraph for a training that ran out of memory.

    Args:
        options: Of the training, with absolute paths.
        found: The allocator's message.
    """
    gc.collect()  # tensors of the training that reference cycles hold
    head = f"Out of memory ({found[:300].rstrip('. ')})."
    progress.info("Out of memory. Counting what the training needs, and which options need less; Ctrl-C leaves it out")
    try:
        with progress.report_to(progress.SilentReporter()):
            memory = _memory(options)
            shown = [
                f"{_flags(other.changes)} ({needed.peak_bytes / GIGABYTE:.2f} GB; {other.effect})"
                for other, needed in _alternatives(options, memory)
            ]
    except (QatEdgeError, KeyboardInterrupt, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = str(error) or type(error).__name__
        return (
            f"{head} What it needs could not be counted: {reason} Try --gradient-checkpointing, a smaller --batch-size "
            "with more --gradient-accumulation, or a smaller --max-length."
        )
    advice = f"Less memory is needed with {'; or '.join(shown)}." if shown else "No option needs less memory."
    return f"{head} {_needs(memory)} {advice} `qat-edge plan` predicts other options."


def _memory(options: FinetuneOptions) -> TrainingMemory:
    """Predict the memory of this process, which has a share of the batch."""
    return training_memory(dataclasses.replace(options, batch_size=options.batch_size // launched.count()))


def _needs(memory: TrainingMemory) -> str:
    """Return what takes the memory, as a sentence."""
    stages = {"phase 1": memory.phase_1, "the PTQ initialization": memory.initialization, "QAT": memory.qat}
    stage = max(stages, key=lambda name: stages[name] or 0)
    parts = {
        "base weights": memory.base, "trained weights": memory.trained, "optimizer": memory.optimizer,
        "gradients and activations": memory.step, "libraries": memory.libraries,
    }  # fmt: skip
    listed = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items() if size)
    return f"By `qat-edge plan` it needs {memory.peak_bytes / GIGABYTE:.2f} GB, most of all in {stage}: {listed}."


def _alternatives(options: FinetuneOptions, memory: TrainingMemory) -> Iterator[tuple[Alternative, TrainingMemory]]:
    """Yield up to `SHOWN` alternatives that need less memory than `memory`, those that change the least first."""
    count = 0
    for other in _candidates(options):
        try:
            needed = _memory(dataclasses.replace(options, **other.changes))
        except QatEdgeError:
            continue  # a combination that finetune refuses
        if needed.peak_bytes < (1 - LEAST_GAIN) * memory.peak_bytes:
            yield other, needed
            count += 1
        if count == SHOWN:
            return


def _candidates(options: FinetuneOptions) -> Iterator[Alternative]:
    """Yield options that may need less memory than those of a training."""
    share = options.batch_size // launched.count()
    if share > 1:
        parts = 2 if share % 2 == 0 else share
        changes = {
            "batch_size": options.batch_size // parts,
            "gradient_accumulation": options.gradient_accumulation * parts,
        }
        yield Alternative(changes, "the same training")
    if not options.gradient_checkpointing:
        yield Alternative({"gradient_checkpointing": True}, "the same training, slower")
    if options.distill_weight > 0 and not options.distill_top_k:
        yield Alternative({"distill_top_k": TEACHER_TOKENS}, "the teacher is computed once")
    if options.method == "full":
        yield Alternative({"method": "lora"}, "trains adapters instead of all weights")
    elif options.base not in ("nf4", "int8"):
        yield Alternative({"base": "int8"}, "rounds the base that adapters are added to")
    if options.max_length > 1:
        yield Alternative({"max_length": options.max_length // 2}, "truncates longer rows")


def _flags(changes: dict[str, Any]) -> str:
    """Return options as flags of the command line."""
    return " ".join(
        flag_name(name) if value is True else f"{flag_name(name)} {value}" for name, value in changes.items()
    )
