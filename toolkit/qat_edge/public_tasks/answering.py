"""One model of a run for public tasks: greedy answers and log-probabilities, in torch or from an artifact.

A source names the model as `eval --from` does:

    torch                the frozen checkpoint in torch
    executorch, onnx     an artifact in its own runtime, on this machine
    METHOD/torch, ...    the same of the PTQ variant in RUN/ptq/METHOD, such as rtn/onnx
    reference            the FP32 fine-tune
    base                 the FP32 base model, before any training
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from qat_edge import progress
from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.evaluate import reference
from qat_edge.evaluate.evaluator import device_errors
from qat_edge.evaluate.metrics import first_not_finite, log_softmax
from qat_edge.evaluate.reference import Logits
from qat_edge.manifest import MANIFEST, check_files, sha256
from qat_edge.models import merge
from qat_edge.models.artifact_options import context_of_artifact
from qat_edge.quant.ptq.method_names import PTQ_METHODS, RENAMED_METHODS
from qat_edge.run import Run, Variant
from qat_edge_devices import RUNTIMES, open_runtime, open_transport
from qat_edge_exporters.targets import TARGETS, target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qat_edge_devices.runtime import Runtime
    from qat_edge_devices.transport import Transport

TORCH, REFERENCE, BASE = "torch", "reference", "base"
FLOAT = (REFERENCE, BASE)  # models of the run, not of a variant
ROWS = 64  # logits converted to float64 at once


class TargetScores(NamedTuple):
    """Log-probabilities of the tokens that follow the compared positions of a sequence.

    Attributes:
        log_probs: In nats, shape (positions,).
        first: Whether each of these tokens is the most probable one, shape (positions,).
    """

    log_probs: NDArray[np.float64]
    first: NDArray[np.bool_]


class AnsweringModel(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without its end token."""

    def score(self, sequences: Sequence[ScoredIds]) -> Iterator[TargetScores]:
        """Yield the scores of each sequence in turn."""


# --- sources -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """A model that exists, and was checked.

    Attributes:
        name: As `--from` has it.
        kind: TORCH, REFERENCE, BASE or the name of a target.
        folder: Its files.
    """

    name: str
    kind: str
    folder: Path

    @property
    def model_sha256(self) -> str:
        """Checksum of the manifest, which has the checksums of all files."""
        return sha256(self.folder / MANIFEST)

    @property
    def context_length(self) -> int | None:
        """Tokens that an artifact holds, prompt and answer together; None for torch, which has no such limit."""
        return context_of_artifact(self.folder) if self.kind in TARGETS else None


def find_source(run: Run, name: str) -> ModelSource:
    """Find a model of a run and check its files.

    Raises:
        UsageError: There is no such kind of model.
        RunError: The run does not have it, it runs elsewhere only, or a file of it was changed.
    """
    method, slash, kind = name.rpartition("/")
    kinds = (TORCH, *TARGETS) if slash else (TORCH, *TARGETS, *FLOAT)
    if kind not in kinds:
        raise UsageError(f"--from {name}: not known. Known: {', '.join(kinds)}, and METHOD/ before the first ones.")
    if slash and RENAMED_METHODS.get(method, method) not in PTQ_METHODS:
        raise UsageError(f"--from {name}: '{method}' is no PTQ method. Known: {', '.join(PTQ_METHODS)}.")
    variant = run.ptq(method) if slash else run
    folder = run.reference if kind in FLOAT else variant.quantized if kind == TORCH else variant.exports / kind
    if kind in TARGETS:
        _require_artifact(run, variant, kind, method)
    elif not folder.is_dir():
        raise RunError(f"--from {name}: {folder} is missing. `{_export_command(run, method)}` makes it.")
    check_files(folder)
    return ModelSource(name, kind, folder)


def _require_artifact(run: Run, variant: Variant, target: str, method: str) -> None:
    """Require an artifact of the current checkpoint that runs on this machine.

    Raises:
        RunError: There is none.
    """
    record = target_named(target)
    if record.runs_elsewhere or target not in RUNTIMES:
        raise RunError(f"{record.runs_elsewhere or target} Use the same codes in another artifact, or torch.")
    folder = variant.exports / target
    if not (folder / MANIFEST).is_file():
        command = _export_command(run, method)
        raise RunError(f"--from {target}: {folder} is missing. `{command} --target {record.format}` makes it.")
    variant.require_current(target)
    record.check(folder)


def _export_command(run: Run, method: str) -> str:
    return f"qat-edge export {run.path}" + (f" --ptq {method}" if method else "")


# --- models ------------------------------------------------------------------------------------------------


@contextmanager
def open_model(source: ModelSource, eos_ids: Sequence[int], pad_id: int, threads: int) -> Iterator[AnsweringModel]:
    """Load a model, and free what it holds at the end.

    Args:
        source: The model.
        eos_ids: Tokens that end an answer.
        pad_id: Token that pads prompts of a batch.
        threads: CPU threads of an artifact's runtime.

    Raises:
        ModelError, RunError, DeviceError: It cannot be loaded.
    """
    if source.kind not in TARGETS:
        yield TorchModel(source.name, _load_in_torch(source), eos_ids, pad_id)
        return
    with device_errors(), closing(open_transport("local")) as transport:
        yield _ArtifactModel(source, transport, eos_ids, threads)


def _load_in_torch(source: ModelSource) -> PreTrainedModel:
    if source.kind == REFERENCE:
        return merge.merged_model(source.folder).model
    if source.kind == BASE:
        return merge.base_model(source.folder)
    return reference.load_exact(source.folder)


@dataclass(frozen=True)
class TorchModel:
    """A model in torch, on this machine's CPU.

    Attributes:
        name: For progress and messages.
        model: In evaluation mode.
        eos_ids: Tokens that end an answer.
        pad_id: Token that pads prompts of a batch.
    """

    name: str
    model: PreTrainedModel
    eos_ids: Sequence[int]
    pad_id: int

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Generate in batches of prompts of similar length, which need the least padding."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        outputs: dict[int, list[int]] = {}
        with progress.bar(f"{self.name}: answers in torch", len(prompts)) as bar:
            for start in range(0, len(order), reference.BATCH):
                batch = order[start : start + reference.BATCH]
                answers = reference.generate(
                    self.model, [prompts[index] for index in batch], self.eos_ids, max_new_tokens, self.pad_id
                )
                outputs.update(zip(batch, answers, strict=True))
                bar.update(len(outputs))
        return [outputs[index] for index in range(len(prompts))]

    def score(self, sequences: Sequence[ScoredIds]) -> Iterator[TargetScores]:
        """Score one sequence a pass."""
        with progress.bar(f"{self.name}: log-probabilities in torch", len(sequences)) as bar:
            logits = reference.compared_logits(self.model, sequences)
            for index, (sequence, rows) in enumerate(zip(sequences, logits, strict=True)):
                yield _target_scores(rows, sequence, self.name)
                bar.update(index + 1)


@dataclass(frozen=True)
class _ArtifactModel:
    """An artifact in its own runtime, one process a call."""

    source: ModelSource
    transport: Transport
    eos_ids: Sequence[int]
    threads: int

    def generate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Generate for all prompts in one process."""
        with progress.bar(f"{self.source.name}: answers", len(prompts)) as bar:
            runtime = self._runtime(lambda done, _: bar.update(done))
            completions = runtime.generate(prompts, self.eos_ids, max_new_tokens).completions
        return [list(completion.ids) for completion in completions]

    def score(self, sequences: Sequence[ScoredIds]) -> Iterator[TargetScores]:
        """Score the sequences in as few processes as their logits' size permits."""
        with progress.bar(f"{self.source.name}: log-probabilities", len(sequences)) as bar:
            runtime = self._runtime(lambda done, _: bar.update(done))
            for scored in runtime.score([sequence.ids for sequence in sequences]):
                sequence = sequences[scored.index]
                rows = reference.read_rows(scored.logits, sequence.positions)
                yield _target_scores(rows, sequence, self.source.name)

    def _runtime(self, advance: Callable[[int, int], None]) -> Runtime:
        runtime = open_runtime(self.source.kind, self.transport, self.threads, advance)
        runtime.prepare(self.source.folder)
        return runtime


def _target_scores(logits: Logits, sequence: ScoredIds, name: str) -> TargetScores:
    """Return the scores of the tokens after the compared positions.

    Raises:
        ModelError: A logit is not a finite number.
    """
    row = first_not_finite(logits)
    if row is not None:
        raise ModelError(
            f"{name}: its logits are not finite, first at token {sequence.positions[row]} of a question. Its answers "
            "mean nothing: `qat-edge verify` and `qat-edge validate` look for the cause."
        )
    # In blocks: float64 logits of a long sequence would fill the memory.
    targets, log_probs = sequence.targets, np.empty(len(sequence.positions))
    for start in range(0, len(targets), ROWS):
        rows = slice(start, start + ROWS)
        block = log_softmax(logits[rows])
        log_probs[rows] = block[np.arange(len(block)), targets[rows]]
    return TargetScores(log_probs, logits.argmax(axis=1) == targets)
