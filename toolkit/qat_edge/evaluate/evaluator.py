"""Measure one model at a time: its logits compared with the FP32 fine-tune's, its outputs, its speed, its memory."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from qat_edge import config, option_paths, progress, readers
from qat_edge.data import tokenization
from qat_edge.data.changed_rows import EVAL_DATA, describe_change
from qat_edge.data.conversation import AnswerReader
from qat_edge.data.formats import RowStream
from qat_edge.errors import DataError, DeviceError, ModelError, RunError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import file_name
from qat_edge.evaluate.metrics import LogitComparison, LogitMetrics, first_divergence, first_not_finite, outputs_match
from qat_edge.evaluate.prompts import (
    Context,
    EvalPrompt,
    describe_cut_answers,
    describe_early_ends,
    describe_lack_of_room,
    eval_prompts,
    fitting_prompts,
)
from qat_edge.evaluate.reference import Logits, LogitStore
from qat_edge.evaluate.results import REFERENCES, Agreement, Measurement, Speed
from qat_edge.evaluate.structured import measure_schema
from qat_edge.models.tokenizer import load_tokenizer, stored_end_token_origins
from qat_edge.options import ValidateOptions
from qat_edge.readers import counted
from qat_edge.run import Run, Variant
from qat_edge.storage import disk_errors, work_folder
from qat_edge_devices import open_runtime
from qat_edge_devices.device_errors import DeviceLayerError
from qat_edge_devices.runtime import TimedRun
from qat_edge_devices.transport import Transport
from qat_edge_exporters.targets import target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qat_edge_devices.runtime import Runtime

FLOOR_TOKENS = 512  # compared tokens that the noise floor is measured on


@dataclass(frozen=True)
class EvalSet:
    """The evaluation data of all models, tokenized.

    Attributes:
        sequences: for teacher-forced comparison of logits.
        prompts: prompts and their expected outputs, for exact match.
        eos_ids: tokens that end an output.
        pad_id: token that pads prompts of a batch.
        tokenizer: decodes outputs; None only where there are no prompts.
        notes: sentences about the prompts to show next to exact match, such as answers that are too long.
    """

    sequences: list[tokenization.ScoredIds]
    prompts: list[EvalPrompt]
    eos_ids: list[int]
    pad_id: int
    tokenizer: PreTrainedTokenizerBase | None
    notes: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of compared tokens in all sequences."""
        return sum(len(s.positions) for s in self.sequences)

    @property
    def prompt_ids(self) -> list[list[int]]:
        """Ids of the prompts without their expected outputs."""
        return [prompt.ids for prompt in self.prompts]

    @property
    def identity(self) -> list[tuple[list[int], str]]:
        """Ids and expected outputs of the prompts: two measurements with the same ones can be compared."""
        return [(prompt.ids, prompt.expected) for prompt in self.prompts]

    def exact_match(self, outputs: Sequence[Sequence[int]]) -> float | None:
        """Return the share of outputs that equal the expected ones; None where there are no prompts."""
        if not self.prompts:
            return None
        reader = self.reader()
        pairs = zip(map(reader.from_ids, outputs), self.prompts, strict=True)
        matches = [outputs_match(text, reader.from_text(prompt.expected)) for text, prompt in pairs]
        return sum(matches) / len(matches)

    def reader(self) -> AnswerReader:
        """Return what takes the answers out of generated texts; there have to be prompts."""
        assert self.tokenizer is not None
        return AnswerReader(self.tokenizer)


class OutputAgreement(NamedTuple):
    """Generated token ids compared with the FP32 fine-tune's.

    Attributes:
        equal: share of prompts with equal outputs.
        first_divergence: median index of the first differing token over the other prompts; None if there are none.
    """

    equal: float | None
    first_divergence: float | None


@dataclass(frozen=True)
class Evaluator:
    """Measures the models of one run on one evaluation set.

    Attributes:
        eval_set: the data.
        options: how to measure.
        scratch: folder for logits and outputs that later measurements are compared with.
    """

    eval_set: EvalSet
    options: ValidateOptions
    scratch: Path

    @property
    def fp32_logits(self) -> LogitStore:
        """Logits of the FP32 fine-tune, the reference of every other model."""
        return LogitStore(self.scratch / "fp32")

    @property
    def frozen_logits(self) -> LogitStore:
        """Logits of the frozen checkpoint in torch, the reference for parity."""
        return LogitStore(self.scratch / "exact")

    @property
    def fp32_outputs(self) -> Path:
        """JSON file with the token ids that the FP32 fine-tune generates, one list a prompt."""
        return self.scratch / "answers.json"

    def artifact_logits(self, device: str, target: str) -> LogitStore:
        """Return the logits of the run's own artifact on a device; filled only with --error-budget."""
        return LogitStore(self.scratch / f"{target}-{file_name(device)}")

    def measure_reference(self, model: PreTrainedModel, name: str) -> Measurement:
        """Measure the FP32 reference in torch; its logits and outputs stay in `fp32_logits` and `fp32_outputs`.

        Args:
            model: the fine-tune, or a model that was not trained.
            name: one of REFERENCES.
        """
        eval_set, options, title = self.eval_set, self.options, REFERENCES[name]

        # Both are kept on disk: every artifact is compared with them later.
        self._score_in_torch(f"{title}, logits in torch", model, self.fp32_logits)
        self._require_finite(self.fp32_logits, f"the {title}")

        if eval_set.prompts:
            progress.info(f"{title}: generating outputs for {counted(len(eval_set.prompts), 'prompt')} in torch")
        outputs = reference.generate(
            model, eval_set.prompt_ids, eval_set.eos_ids, options.max_new_tokens, eval_set.pad_id
        )
        self.fp32_outputs.write_text(json.dumps(outputs), encoding="utf-8")

        return Measurement(
            name=name,
            target="torch",
            runtime=_torch_runtime(),
            size_bytes=reference.size_by_part(model),
            perplexity=self._compare(self.fp32_logits, self.fp32_logits).perplexity,
            exact_match=eval_set.exact_match(outputs),
            prompts=len(eval_set.prompts),
            speed=reference.speed(model, options.prefill, options.decode, options.repeats, options.threads),
            notes=("memory not measured: torch shares this process with validate", *eval_set.notes),
        )

    def measure_base(self, model: PreTrainedModel) -> Measurement:
        """Measure the logits of the FP32 base model, before any training, in torch."""
        # Nothing else is compared with the base, so its logits are deleted at once: they may take gigabytes.
        store = LogitStore(self.scratch / "base")
        self._score_in_torch("FP32 base model, logits in torch", model, store)
        metrics = self._compare(self.fp32_logits, store)
        self._require_finite(store, "the FP32 base model")
        shutil.rmtree(store.folder)
        return Measurement(
            name="fp32 base",
            target="torch",
            runtime=_torch_runtime(),
            size_bytes=reference.size_by_part(model),
            perplexity=metrics.perplexity,
            agreement=as_agreement(metrics),
            notes=("speed and outputs not measured: the same network as the fine-tune, before training",),
        )

    def measure_noise_floor(self, quantized: Path) -> Agreement:
        """Write the frozen checkpoint's logits to `frozen_logits` and compare them with a disturbed copy's.

        An exact runtime differs from the checkpoint about as much as the copy does.
        """
        model = reference.load_exact(quantized)
        self._score_in_torch("frozen checkpoint, logits in torch", model, self.frozen_logits)
        self._require_finite(self.frozen_logits, f"the frozen checkpoint {quantized}")

        # The disturbed copy runs on the first tokens only: the mean over these is precise enough.
        part = self.first_tokens(FLOOR_TOKENS)
        store = LogitStore(self.scratch / "disturbed")
        with reference.disturbed(model):
            part._score_in_torch("frozen checkpoint with embeddings disturbed by 1e-7", model, store)
        metrics = part._compare(self.frozen_logits, store)
        shutil.rmtree(store.folder)

        progress.info(
            f"Noise floor of the frozen checkpoint (disturbed by 1e-7, compared with itself): KL {metrics.kl_nats:.2g} "
            f"nats per token, top-1 agreement {metrics.top1_agreement:.1%}"
        )
        return as_agreement(metrics)

    def measure_artifact(self, variant: Variant, target: str, transport: Transport, own: bool) -> Measurement:
        """Measure one artifact on the device behind `transport`.

        own: True for an artifact of the run itself, whose frozen checkpoint is the reference for parity.
        """
        folder, options, eval_set = variant.exports / target, self.options, self.eval_set
        target_named(target).check(folder)
        progress.info(f"Measuring {folder} on {transport.name}: logits of {eval_set.tokens} tokens")
        accuracy, parity = self._compare_artifact(folder, target, transport, own)
        if accuracy.not_finite:
            progress.warn(f"{variant.name}, {target}: {accuracy.not_finite}")

        # Scoring has sent the artifact, so no file is sent again: this runtime learns what the artifact consists of.
        runtime = open_runtime(target, transport, options.threads)
        runtime.prepare(folder)
        outputs = self._generate(runtime)
        same_outputs, divergence = self.compare_outputs(outputs)

        # Timing is a process of its own, whose memory is the one reported: logits would add to its peak.
        announce_timing(options)
        timed = runtime.speed(options.prefill, options.decode, options.repeats)

        # Answers under a grammar last: the timing shows which runtime the device generates in.
        schema = measure_schema(eval_set, folder, target, runtime, timed.load.runtime, outputs, options.max_new_tokens)
        artifact = target_named(target).read(folder)
        return Measurement(
            name=variant.name,
            target=target,
            runtime=f"{timed.load.runtime} {timed.load.runtime_version}",
            size_bytes=artifact.size_bytes,
            perplexity=accuracy.perplexity,
            agreement=as_agreement(accuracy),
            parity=None if parity is None else as_agreement(parity),
            exact_match=eval_set.exact_match(outputs),
            prompts=len(eval_set.prompts),
            same_answers=same_outputs,
            first_divergence=divergence,
            load_ms=timed.load.load_ms,
            speed=_speed(timed, options),
            memory_bytes=timed.load.peak_rss_bytes,
            runtime_bytes=timed.load.baseline_rss_bytes,
            notes=(*timed.remarks(), *eval_set.notes),
            not_finite=accuracy.not_finite,
            schema=schema,
        )

    def first_tokens(self, limit: int) -> Evaluator:
        """Return an evaluator of the first sequences, as many as hold at least `limit` compared tokens."""
        sequences: list[tokenization.ScoredIds] = []
        tokens = 0
        for sequence in self.eval_set.sequences:
            if tokens >= limit:
                break
            sequences.append(sequence)
            tokens += len(sequence.positions)
        return dataclasses.replace(self, eval_set=dataclasses.replace(self.eval_set, sequences=sequences))

    def compare_outputs(self, outputs: Sequence[Sequence[int]]) -> OutputAgreement:
        """Compare generated token ids with the FP32 fine-tune's; both figures are None where either has none."""
        if not outputs or not self.fp32_outputs.is_file():
            return OutputAgreement(None, None)
        expected = readers.read_json(self.fp32_outputs, RunError)
        divergences = [first_divergence(ours, theirs) for ours, theirs in zip(outputs, expected, strict=True)]
        # None marks equal outputs; the index of the others is where they first differ.
        different = [index for index in divergences if index is not None]
        return OutputAgreement(1 - len(different) / len(divergences), median(different) if different else None)

    def score_artifact(
        self, folder: Path, target: str, transport: Transport, decode_from: int | None = None
    ) -> Iterator[tuple[int, Logits]]:
        """Yield each sequence's index and an artifact's logits at its compared positions.

        decode_from: see `Runtime.score`.
        """
        sequences = self.eval_set.sequences
        with progress.bar("logits of the artifact", len(sequences)) as bar:
            runtime = open_runtime(target, transport, self.options.threads, lambda done, _: bar.update(done))
            runtime.prepare(folder)
            # The device returns the logits of all tokens; only the compared positions are kept here.
            for scored in runtime.score([s.ids for s in sequences], decode_from):
                yield scored.index, reference.read_rows(scored.logits, sequences[scored.index].positions)

    def _generate(self, runtime: Runtime) -> list[tuple[int, ...]]:
        """Return the token ids that an artifact generates for each prompt."""
        eval_set = self.eval_set
        if not eval_set.prompts:
            return []
        progress.info(f"  generating outputs for {counted(len(eval_set.prompts), 'prompt')}")
        completions = runtime.generate(eval_set.prompt_ids, eval_set.eos_ids, self.options.max_new_tokens).completions
        cut = sum(completion.stopped == "context" for completion in completions)
        if cut:
            progress.warn(
                f"  {cut} of {len(completions)} outputs ended at the artifact's context, where those of the reference "
                "go on: export with a longer --context-length, or give a smaller --max-new-tokens"
            )
        return [completion.ids for completion in completions]

    def _compare_artifact(
        self, folder: Path, target: str, transport: Transport, own: bool
    ) -> tuple[LogitMetrics, LogitMetrics | None]:
        """Compare an artifact's logits with FP32's and, if it is the run's own, with the frozen checkpoint's."""
        accuracy, parity = LogitComparison(), LogitComparison()
        keep = own and self.options.error_budget  # the error budget compares them with other steps' later
        for index, logits in self.score_artifact(folder, target, transport):
            targets = self.eval_set.sequences[index].targets
            accuracy.add(self.fp32_logits.get(index), logits, targets, f"evaluation sequence {index}")
            if own:
                parity.add(self.frozen_logits.get(index), logits, targets, f"evaluation sequence {index}")
            if keep:
                self.artifact_logits(transport.name, target).put(index, logits)
        return accuracy.result(), parity.result() if own else None

    def _require_finite(self, store: LogitStore, what: str) -> None:
        """Refuse a reference whose logits are not finite: every figure is relative to it.

        Raises:
            ModelError: names the reference, the sequence and the token.
        """
        for index in range(len(self.eval_set.sequences)):
            row = first_not_finite(store.get(index))
            if row is not None:
                raise ModelError(
                    f"{what}: its logits are not finite, first at compared token {row} of evaluation sequence {index}. "
                    "Nothing can be compared with it: its weights are not finite, or too large. "
                    "Train again, with a lower --learning-rate if the loss was not finite."
                )

    def _score_in_torch(self, title: str, model: PreTrainedModel, store: LogitStore) -> None:
        with progress.bar(title, len(self.eval_set.sequences)) as bar:
            reference.score(model, self.eval_set.sequences, store, bar.update)

    def _compare(self, one: LogitStore, other: LogitStore) -> LogitMetrics:
        comparison = LogitComparison()
        for index, sequence in enumerate(self.eval_set.sequences):
            comparison.add(one.get(index), other.get(index), sequence.targets)
        return comparison.result()


def load_eval_set(run: Run, options: ValidateOptions, context: Context | None = None) -> EvalSet:
    """Tokenize the evaluation data: --text or --eval-data of `options`, or the --eval-data of finetune.

    Args:
        run: a run with a frozen checkpoint.
        options: name the rows, and limit what is taken of them.
        context: of the artifacts that answer the prompts; those without room for an answer are left out.

    Raises:
        DataError: there is none.
        UsageError: no prompt leaves room for an answer.
    """
    tokenizer = load_tokenizer(run.quantized)
    trained = config.load_trained(run.config)

    # Logits are compared on --text where it is given; prompts need rows with an expected output.
    prompt_source = options.eval_data or trained.eval_data
    source = options.text or prompt_source
    if source is None:
        raise DataError("No evaluation rows: finetune had no --eval-data. Give validate --eval-data FILE.")
    if source == trained.eval_data:
        option_paths.require_data(source, "validate --eval-data")
    stream = RowStream(source, "eval")
    rows = list(stream)
    sequences = tokenization.scored_ids(rows, tokenizer, options.window, options.tokens)

    prompts: list[EvalPrompt] = []
    if prompt_source:
        if prompt_source != source:
            stream = RowStream(prompt_source, "eval")
            rows = list(stream)
        prompts = fitting_prompts(eval_prompts(rows, tokenizer), options.prompts, context)

    origins = stored_end_token_origins(run.quantized)
    eos_ids = list(origins)
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    cut = describe_cut_answers([prompt.answer_tokens for prompt in prompts], options.max_new_tokens)
    early = describe_early_ends(prompts, origins, tokenizer)
    is_own = prompt_source is not None and options.eval_data is None
    changed = describe_change(run, EVAL_DATA, stream, "validate --eval-data") if is_own else ""
    notes = tuple(filter(None, [early, cut, describe_lack_of_room(prompts, context), changed]))
    eval_set = EvalSet(sequences, prompts, eos_ids, pad_id, tokenizer, notes)
    progress.info(
        f"Evaluation data: {source}; comparing logits of {eval_set.tokens} tokens in "
        f"{counted(len(sequences), 'sequence')}, and outputs for {counted(len(prompts), 'prompt')}; both from the "
        f"first of {counted(len(rows), 'row')}"
    )
    for note in notes:
        progress.warn(note)
    return eval_set


@contextmanager
def scratch_folder(run: Run) -> Iterator[Path]:
    """Yield a folder for logits on the same disk as the run; it is deleted at the end."""
    with disk_errors(run.path), work_folder(run.path, "validate") as folder:
        yield folder


@contextmanager
def device_errors() -> Iterator[None]:
    """Turn errors of the devices package, which has an exception tree of its own, into `DeviceError`."""
    try:
        yield
    except DeviceLayerError as error:
        raise DeviceError(str(error)) from error


def announce_timing(options: ValidateOptions) -> None:
    """Report that speed is being measured, and how."""
    progress.info(
        f"  timing {options.prefill} prompt tokens and {options.decode} new tokens, "
        f"{counted(options.repeats, 'repeat')}"
    )


def as_agreement(metrics: LogitMetrics) -> Agreement:
    """Return the metrics that reports record."""
    # JSON has no infinity, which is the SQNR of equal logits. nan says that the logits are not finite, and stays.
    sqnr_db = None if metrics.sqnr_db == math.inf else metrics.sqnr_db
    return Agreement(metrics.tokens, metrics.kl_nats, metrics.top1_agreement, sqnr_db)


def _torch_runtime() -> str:
    return f"torch {torch.__version__}, eager"


def _speed(timed: TimedRun, options: ValidateOptions) -> Speed:
    return Speed(
        threads=timed.load.threads,
        prompt_tokens=options.prefill,
        new_tokens=options.decode,
        repeats=options.repeats,
        prefill=reference.spread(timed.prefill_tokens_per_s),
        decode=reference.spread(timed.decode_tokens_per_s),
        first_token_ms=reference.spread(timed.ttft_ms),
        step_ms_p50=timed.step_percentile(50),
        step_ms_p95=timed.step_percentile(95),
    )
