"""Run every artifact in its own runtime, in a process of its own, and compare it with the FP32 fine-tune.

Everything is compared in token ids, teacher-forced, on the tokens that training would put loss on. Beside
the comparison with FP32 stands `parity`: the same artifact against the frozen checkpoint in torch, which
an exact runtime matches down to the arithmetic noise floor (the checkpoint against itself, disturbed).
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qat_edge import config, data, quantize, reference, tokenizer
from qat_edge.config import FinetuneOptions, ValidateOptions
from qat_edge.console import bar
from qat_edge.errors import DataError, DeviceError, RunError
from qat_edge.gates import hold
from qat_edge.metrics import LogitComparison, same_answer
from qat_edge.reference import LogitStore
from qat_edge.results import Agreement, Measured, Report, Speed, save
from qat_edge.rows import load_rows
from qat_edge.run import Run, Variant, disk_errors
from qat_edge.tables import resolve
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.errors import DeviceError as TransportLevelError
from qat_edge_exporters import READERS

Say = Callable[[str], None]
DEVICE = "local"
FLOOR_TOKENS = 512  # compared tokens the noise floor is measured on


@dataclass(frozen=True)
class Material:
    """What every model is asked. sequences: for teacher-forced comparison; prompts: to be answered."""

    sequences: list[data.ScoredIds]
    prompts: list[tuple[list[int], str]]
    eos_ids: list[int]
    pad_id: int
    tokenizer: Any

    @property
    def tokens(self) -> int:
        """Compared tokens in all."""
        return sum(len(s.positions) for s in self.sequences)

    def exact_match(self, answers: Sequence[Sequence[int]]) -> float | None:
        """Share of the prompts answered as expected, None where there are no prompts."""
        if not self.prompts:
            return None
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return sum(same_answer(t, e) for t, (_, e) in zip(texts, self.prompts, strict=True)) / len(self.prompts)


def validate(run: Run, options: ValidateOptions, say: Say, force: bool = False) -> Report:
    """Measure the run's artifacts and its baseline's on this machine; write RUN/reports/local.json.

    Raises:
        RunError: nothing exported, or a report exists and `force` is not set.
        DataError: no evaluation rows.
        DeviceError: a runtime failed.
    """
    path = run.reports / f"{DEVICE}.json"
    if path.exists() and not force:
        raise RunError(f"{path} exists already. Give --force to measure again.")
    artifacts = _artifacts(run, options)
    material = _material(run, options, say)
    with _scratch(run) as scratch, closing(open_transport(DEVICE)) as transport:
        fp32, exact = LogitStore(scratch / "fp32"), LogitStore(scratch / "exact")
        measured = _measure_torch(run, options, material, fp32, say)
        floor = _noise_floor(run, material, exact, scratch, say)
        for variant, target in artifacts:
            stores = (fp32, exact if variant is run else None)
            with _devices_errors():
                measured.append(_measure_artifact(variant, target, transport, options, material, stores, say))
        machine = dataclasses.asdict(transport.info())
    report = Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=DEVICE,
        machine=machine,
        options=config.plain(options),
        tokens=material.tokens,
        noise_floor=floor,
        measured=measured,
        gates=hold(options, measured),
    )
    save(report, path)
    config.save(run.config, "validate", options)
    return report


def _artifacts(run: Run, options: ValidateOptions) -> list[tuple[Variant, str]]:
    wanted = options.target or run.targets()
    missing = [t for t in wanted if t not in run.targets()]
    if missing or not wanted:
        raise RunError(f"{run.exports}: {', '.join(missing) or 'nothing'} exported. Do `qat-edge export {run.path}`.")
    return [(v, t) for v in (run, run.baseline) for t in wanted if t in v.targets()]


def _material(run: Run, options: ValidateOptions, say: Say) -> Material:
    words = tokenizer.load(run.quantized)
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.text or options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: finetune had no --eval-data. Give validate --eval-data FILE.")
    sequences = data.scored_ids(load_rows(source, "eval"), words, options.window, options.tokens)
    answered = options.eval_data or trained.eval_data
    prompts = data.prompts(load_rows(answered, "eval"), words)[: options.prompts] if answered else []
    eos_ids = tokenizer.end_tokens(run.quantized)
    pad_id = eos_ids[0] if words.pad_token_id is None else words.pad_token_id
    material = Material(sequences, prompts, eos_ids, pad_id, words)
    say(f"Comparing {material.tokens} tokens in {len(sequences)} sequences, and {len(prompts)} answers, from {source}")
    return material


def _measure_torch(
    run: Run, options: ValidateOptions, material: Material, fp32: LogitStore, say: Say
) -> list[Measured]:
    """The FP32 base and the FP32 fine-tune; the latter's logits stay in `fp32` for the artifacts' comparison."""
    base_store = LogitStore(fp32.folder.parent / "base")
    tuned = quantize.merged_model(run.reference, say)[0]
    _score("FP32 fine-tune", tuned, material, fp32)
    say("  answering the prompts")
    answers = reference.answer(
        tuned, [p for p, _ in material.prompts], material.eos_ids, options.max_new_tokens, material.pad_id
    )
    figures = _compare(material, fp32, fp32.get)
    tuned_row = Measured(
        name="fp32 fine-tuned",
        target="torch",
        runtime=f"torch {torch.__version__}, eager",
        size_bytes=reference.size_by_part(tuned),
        perplexity=figures.perplexity,
        exact_match=material.exact_match(answers),
        prompts=len(material.prompts),
        speed=reference.speed(tuned, options.prefill, options.decode, options.repeats, options.threads),
        notes=("memory not measured: torch shares this process with validate",),
    )
    del tuned
    base = quantize.base_model(run.reference)
    _score("FP32 base", base, material, base_store)
    figures = _compare(material, fp32, base_store.get)
    base_row = Measured(
        name="fp32 base",
        target="torch",
        runtime=tuned_row.runtime,
        size_bytes=tuned_row.size_bytes,
        perplexity=figures.perplexity,
        agreement=_agreement(figures),
        notes=("speed and answers not measured: the same network as the fine-tune, before training",),
    )
    shutil.rmtree(base_store.folder)
    return [base_row, tuned_row]


def _noise_floor(run: Run, material: Material, exact: LogitStore, scratch: Path, say: Say) -> Agreement:
    """The frozen checkpoint's logits into `exact`, and how far it parts from itself when disturbed."""
    model = reference.load_exact(run.quantized)
    _score("frozen checkpoint", model, material, exact)
    some, tokens = [], 0
    for sequence in material.sequences:
        if tokens < FLOOR_TOKENS:
            some.append(sequence)
            tokens += len(sequence.positions)
    store = LogitStore(scratch / "disturbed")
    part = dataclasses.replace(material, sequences=some)
    with reference.disturbed(model):
        _score("frozen checkpoint, disturbed by 1e-7", model, part, store)
    figures = _compare(part, exact, store.get)
    shutil.rmtree(store.folder)
    say(f"  noise floor: KL {figures.kl_nats:.2g}, top-1 {figures.top1_agreement:.1%}, {figures.sqnr_db:.1f} dB")
    return _agreement(figures)


def _measure_artifact(
    variant: Variant,
    target: str,
    transport: Any,
    options: ValidateOptions,
    material: Material,
    stores: tuple[LogitStore, LogitStore | None],
    say: Say,
) -> Measured:
    """Size, accuracy, answers and speed of one artifact, each in a process of its own."""
    folder = variant.exports / target
    fp32, exact = stores
    say(f"Measuring {folder}")
    with bar("scoring", len(material.sequences)) as progress:
        runtime = open_runtime(target, transport, options.threads, lambda done, _: progress.update(done))
        runtime.prepare(folder)
        accuracy, parity = LogitComparison(), LogitComparison()
        for scored in runtime.score([s.ids for s in material.sequences]):
            sequence = material.sequences[scored.index]
            logits = reference.read_rows(scored.logits, sequence.positions)
            accuracy.add(fp32.get(scored.index), logits, sequence.targets)
            if exact is not None:
                parity.add(exact.get(scored.index), logits, sequence.targets)
    runtime = open_runtime(target, transport, options.threads)
    answers = []
    if material.prompts:
        say("  answering the prompts")
        generated = runtime.generate([p for p, _ in material.prompts], material.eos_ids, options.max_new_tokens)
        answers = [a.ids for a in generated.answers]
    say("  timing")
    timed = runtime.speed(options.prefill, options.decode, options.repeats)
    figures = accuracy.result()
    return Measured(
        name="qat" if exact is not None else "ptq (round-to-nearest)",
        target=target,
        runtime=f"{timed.load.runtime} {timed.load.runtime_version}",
        size_bytes=resolve(READERS, target, "--target")(folder).size_bytes,
        perplexity=figures.perplexity,
        agreement=_agreement(figures),
        parity=_agreement(parity.result()) if exact is not None else None,
        exact_match=material.exact_match(answers),
        prompts=len(material.prompts),
        load_ms=timed.load.load_ms,
        speed=_speed(timed, options),
        memory_bytes=timed.load.peak_rss_bytes,
        runtime_bytes=timed.load.baseline_rss_bytes,
    )


def _speed(timed: Any, options: ValidateOptions) -> Speed:
    return Speed(
        threads=timed.load.threads,
        prompt_tokens=options.prefill,
        new_tokens=options.decode,
        repeats=options.repeats,
        prefill=reference.spread(timed.prefill_tokens_per_s),
        decode=reference.spread(timed.decode_tokens_per_s),
        first_token_ms=reference.spread(timed.ttft_ms),
    )


def _score(title: str, model: Any, material: Material, store: LogitStore) -> None:
    with bar(title, len(material.sequences)) as progress:
        reference.score(model, material.sequences, store, progress.update)


def _compare(material: Material, store: LogitStore, candidate: Callable[[int], Any]) -> Any:
    comparison = LogitComparison()
    for index, sequence in enumerate(material.sequences):
        comparison.add(store.get(index), candidate(index), sequence.targets)
    return comparison.result()


def _agreement(figures: Any) -> Agreement:
    sqnr_db = figures.sqnr_db if math.isfinite(figures.sqnr_db) else None
    return Agreement(figures.tokens, figures.kl_nats, figures.top1_agreement, sqnr_db)


@contextmanager
def _scratch(run: Run) -> Iterator[Path]:
    """A folder for logits on the run's own disk, gone at the end."""
    with disk_errors(run.path), tempfile.TemporaryDirectory(prefix=".validate-", dir=run.path) as name:
        yield Path(name)


@contextmanager
def _devices_errors() -> Iterator[None]:
    """The devices package knows nothing of ours: translate the root of its error tree."""
    try:
        yield
    except TransportLevelError as error:
        raise DeviceError(str(error)) from error
