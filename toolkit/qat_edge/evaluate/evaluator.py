"""One model at a time: its logits against the reference's, its answers, its speed, its memory."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from qat_edge import config, progress
from qat_edge.config import FinetuneOptions, ValidateOptions
from qat_edge.data import tokenization
from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError, DeviceError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import file_name
from qat_edge.evaluate.metrics import Comparison, LogitComparison, first_divergence, same_answer
from qat_edge.evaluate.reference import Logits, LogitStore
from qat_edge.evaluate.results import Agreement, Measured, Speed
from qat_edge.lazy import resolve
from qat_edge.models import tokenizer
from qat_edge.run import Run, Variant, disk_errors, work_folder
from qat_edge_devices import open_runtime
from qat_edge_devices.device_errors import DeviceError as TransportLevelError
from qat_edge_devices.run_results import Speed as DeviceSpeed
from qat_edge_devices.transport import Transport
from qat_edge_exporters import READERS

FLOOR_TOKENS = 512  # compared tokens the noise floor is measured on


@dataclass(frozen=True)
class Material:
    """What every model is asked. sequences: for teacher-forced comparison; prompts: to be answered."""

    sequences: list[tokenization.ScoredIds]
    prompts: list[tuple[list[int], str]]
    eos_ids: list[int]
    pad_id: int
    tokenizer: Any

    @property
    def tokens(self) -> int:
        """Compared tokens in all."""
        return sum(len(s.positions) for s in self.sequences)

    @property
    def questions(self) -> list[list[int]]:
        """Prompt ids without their answers."""
        return [ids for ids, _ in self.prompts]

    def exact_match(self, answers: Sequence[Sequence[int]]) -> float | None:
        """Share of the prompts answered as expected, None where there are no prompts."""
        if not self.prompts:
            return None
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return sum(same_answer(t, e) for t, (_, e) in zip(texts, self.prompts, strict=True)) / len(self.prompts)


@dataclass(frozen=True)
class Bench:
    """What all measurements of one validate share. Logits lie below `scratch`: `fp32` the fine-tune's, which
    everything is held against, as its answers are; `exact` the frozen checkpoint's in torch."""

    material: Material
    options: ValidateOptions
    scratch: Path

    @property
    def fp32(self) -> LogitStore:
        return LogitStore(self.scratch / "fp32")

    @property
    def exact(self) -> LogitStore:
        return LogitStore(self.scratch / "exact")

    @property
    def fp32_answers(self) -> Path:
        """Token ids of the fine-tune's answers as JSON, one list a prompt."""
        return self.scratch / "answers.json"

    def kept(self, device: str, target: str) -> LogitStore:
        """The logits of the run's own artifact of one target on a device; there where a budget is asked for."""
        return LogitStore(self.scratch / f"{target}-{file_name(device)}")

    def fine_tuned(self, model: Any) -> Measured:
        """The FP32 fine-tune, whose logits stay in `fp32` and its answers in `fp32_answers`."""
        self._score("FP32 fine-tune", model, self.fp32)
        if self.material.prompts:
            progress.info("  answering the prompts")
        material, options = self.material, self.options
        answers = reference.answer(model, material.questions, material.eos_ids, options.max_new_tokens, material.pad_id)
        self.fp32_answers.write_text(json.dumps(answers), encoding="utf-8")
        return Measured(
            name="fp32 fine-tuned",
            target="torch",
            runtime=_torch_runtime(),
            size_bytes=reference.size_by_part(model),
            perplexity=self._compare(self.fp32, self.fp32).perplexity,
            exact_match=material.exact_match(answers),
            prompts=len(material.prompts),
            speed=reference.speed(model, options.prefill, options.decode, options.repeats, options.threads),
            notes=("memory not measured: torch shares this process with validate",),
        )

    def base(self, model: Any) -> Measured:
        """The FP32 base model, before any training."""
        store = LogitStore(self.scratch / "base")
        self._score("FP32 base", model, store)
        figures = self._compare(self.fp32, store)
        shutil.rmtree(store.folder)
        return Measured(
            name="fp32 base",
            target="torch",
            runtime=_torch_runtime(),
            size_bytes=reference.size_by_part(model),
            perplexity=figures.perplexity,
            agreement=agreement(figures),
            notes=("speed and answers not measured: the same network as the fine-tune, before training",),
        )

    def noise_floor(self, quantized: Path) -> Agreement:
        """The frozen checkpoint's logits into `exact`, and how far it parts from itself when disturbed."""
        model = reference.load_exact(quantized)
        self._score("frozen checkpoint", model, self.exact)
        part = self.first_tokens(FLOOR_TOKENS)
        store = LogitStore(self.scratch / "disturbed")
        with reference.disturbed(model):
            part._score("frozen checkpoint, disturbed by 1e-7", model, store)
        figures = part._compare(self.exact, store)
        shutil.rmtree(store.folder)
        progress.info(f"  noise floor: KL {figures.kl_nats:.2g}, top-1 {figures.top1_agreement:.1%}")
        return agreement(figures)

    def artifact(self, variant: Variant, target: str, transport: Transport, own: bool) -> Measured:
        """One artifact on the device behind `transport`. own: of the run itself, so that `exact` is its parity."""
        folder, options = variant.exports / target, self.options
        progress.info(f"Measuring {folder}")
        accuracy, parity = self._score_artifact(folder, target, transport, own)
        runtime = open_runtime(target, transport, options.threads)
        answers: list[tuple[int, ...]] = []
        if self.material.prompts:
            progress.info("  answering the prompts")
            asked = self.material.questions, self.material.eos_ids, options.max_new_tokens
            answers = [answer.ids for answer in runtime.generate(*asked).answers]
        same, parting = self.against_fp32(answers)
        progress.info("  timing")
        timed = runtime.speed(options.prefill, options.decode, options.repeats)
        return Measured(
            name=variant.name,
            target=target,
            runtime=f"{timed.load.runtime} {timed.load.runtime_version}",
            size_bytes=resolve(READERS, target, "--target")(folder).size_bytes,
            perplexity=accuracy.perplexity,
            agreement=agreement(accuracy),
            parity=None if parity is None else agreement(parity),
            exact_match=self.material.exact_match(answers),
            prompts=len(self.material.prompts),
            same_answers=same,
            first_divergence=parting,
            load_ms=timed.load.load_ms,
            speed=_speed(timed, options),
            memory_bytes=timed.load.peak_rss_bytes,
            runtime_bytes=timed.load.baseline_rss_bytes,
            notes=timed.remarks(),
        )

    def first_tokens(self, limit: int) -> Bench:
        """The same on the first sequences that hold `limit` compared tokens between them."""
        some: list[tokenization.ScoredIds] = []
        for sequence in self.material.sequences:
            if sum(len(s.positions) for s in some) < limit:
                some.append(sequence)
        return dataclasses.replace(self, material=dataclasses.replace(self.material, sequences=some))

    def against_fp32(self, answers: Sequence[Sequence[int]]) -> tuple[float | None, float | None]:
        """Share of answers equal to the fine-tune's, and the median place where the others part from it."""
        if not answers or not self.fp32_answers.is_file():
            return None, None
        expected = json.loads(self.fp32_answers.read_text(encoding="utf-8"))
        places = [first_divergence(ours, theirs) for ours, theirs in zip(answers, expected, strict=True)]
        parted = [place for place in places if place is not None]
        return 1 - len(parted) / len(places), median(parted) if parted else None

    def _score_artifact(
        self, folder: Path, target: str, transport: Transport, own: bool
    ) -> tuple[Comparison, Comparison | None]:
        """The artifact's logits against FP32's and, where it is the run's own, against the frozen checkpoint's."""
        accuracy, parity = LogitComparison(), LogitComparison()
        keep = self.kept(transport.name, target) if own and self.options.error_budget else None
        for index, logits in self.artifact_rows(folder, target, transport):
            targets = self.material.sequences[index].targets
            accuracy.add(self.fp32.get(index), logits, targets)
            if own:
                parity.add(self.exact.get(index), logits, targets)
            if keep is not None:
                keep.put(index, logits)
        return accuracy.result(), parity.result() if own else None

    def artifact_rows(
        self, folder: Path, target: str, transport: Transport, decode_from: int | None = None
    ) -> Iterator[tuple[int, Logits]]:
        """An artifact's logits on a device, at the compared positions of each sequence in turn.

        decode_from: see `Runtime.score`.
        """
        sequences = self.material.sequences
        with progress.bar("scoring", len(sequences)) as shown:
            runtime = open_runtime(target, transport, self.options.threads, lambda done, _: shown.update(done))
            runtime.prepare(folder)
            for scored in runtime.score([s.ids for s in sequences], decode_from):
                yield scored.index, reference.read_rows(scored.logits, sequences[scored.index].positions)

    def _score(self, title: str, model: Any, store: LogitStore) -> None:
        with progress.bar(title, len(self.material.sequences)) as shown:
            reference.score(model, self.material.sequences, store, shown.update)

    def _compare(self, one: LogitStore, other: LogitStore) -> Comparison:
        comparison = LogitComparison()
        for index, sequence in enumerate(self.material.sequences):
            comparison.add(one.get(index), other.get(index), sequence.targets)
        return comparison.result()


def gather_material(run: Run, options: ValidateOptions) -> Material:
    """What the run's models are asked: rows that `options` name, or those of finetune's --eval-data.

    Raises:
        DataError: there are none.
    """
    words = tokenizer.load(run.quantized)
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.text or options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: finetune had no --eval-data. Give validate --eval-data FILE.")
    rows = load_rows(source, "eval")
    sequences = tokenization.scored_ids(rows, words, options.window, options.tokens)
    answered = options.eval_data or trained.eval_data
    if answered and answered != source:
        rows = load_rows(answered, "eval")
    prompts = list(islice(tokenization.prompts(rows, words), options.prompts)) if answered else []
    eos_ids = tokenizer.end_tokens(run.quantized)
    pad_id = eos_ids[0] if words.pad_token_id is None else words.pad_token_id
    material = Material(sequences, prompts, eos_ids, pad_id, words)
    progress.info(
        f"Comparing {material.tokens} tokens in {len(sequences)} sequences, and {len(prompts)} answers, from {source}"
    )
    return material


@contextmanager
def scratch_folder(run: Run) -> Iterator[Path]:
    """A folder for logits on the run's own disk, gone at the end."""
    with disk_errors(run.path), work_folder(run.path, "validate") as folder:
        yield folder


@contextmanager
def device_errors() -> Iterator[None]:
    """The devices package knows nothing of ours: translate the root of its error tree."""
    try:
        yield
    except TransportLevelError as error:
        raise DeviceError(str(error)) from error


def _torch_runtime() -> str:
    return f"torch {torch.__version__}, eager"


def agreement(figures: Comparison) -> Agreement:
    """The figures that reports keep."""
    sqnr_db = figures.sqnr_db if math.isfinite(figures.sqnr_db) else None
    return Agreement(figures.tokens, figures.kl_nats, figures.top1_agreement, sqnr_db)


def _speed(timed: DeviceSpeed, options: ValidateOptions) -> Speed:
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
