"""How an encoder's artifacts answer beside its FP32 fine-tune: text by text, in ExecuTorch's runtime, on this machine.

cosine    of an artifact's answer (embedding or logits) and the FP32 fine-tune's, over all texts
parity    the same beside the frozen checkpoint in torch, which an exact runtime answers like
quality   what `answers.MEASURES` says of labels, of pairs that belong together, and of pairs with scores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from qat_edge import config, progress
from qat_edge.config import FinetuneOptions, ValidateOptions
from qat_edge.data import training_examples
from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError, RunError, UsageError
from qat_edge.evaluate import gates
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.encoder_results import ACCURACY, CORRELATION, RETRIEVAL, Answered, Comparison, save
from qat_edge.lazy import resolve
from qat_edge.models import merge, tasks
from qat_edge.models.tasks import Kind, SentenceEncoder
from qat_edge.quant import frozen
from qat_edge.run import Run, Variant
from qat_edge_devices import open_transport
from qat_edge_exporters import ENCODERS, READERS

TARGET = "executorch"
TEXTS = 16  # that torch is given at once
OPTIONS = ("eval_data", "profile", *gates.FOR_ENCODERS)  # the others are for models that generate text
Answers = NDArray[np.float32]  # (texts, width); of pairs, all first texts, then all second ones
Say = Callable[[str], None]


def validate(run: Run, options: ValidateOptions, force: bool = False) -> Comparison:
    """Compare every .pte of the run and of its PTQ variants with the FP32 fine-tune; RUN/answers.json keeps it.

    Raises:
        UsageError: an option or a limit that is for other models.
        RunError: nothing exported, an artifact of an earlier checkpoint, or compared before (without `force`).
        DataError: no evaluation rows.
    """
    kind = tasks.of_run(run)
    _check_options(run, options, kind)
    if run.answers.exists() and not force:
        raise RunError(f"{run.answers} exists already. Give --force to measure again.")
    variants = _exported(run)
    progress.info("FP32 fine-tune in torch")
    tuned = merge.merged_model(run.reference)
    rows = _rows(run, options, kind, tuned)
    texts = [*(row["input_ids"] for row in rows), *(row["other_ids"] for row in rows if "other_ids" in row)]
    labels = np.array([row["labels"][0] for row in rows])
    reference = _torch_answers(kind, tuned.model, texts)
    answered = [Answered("fp32 fine-tuned", "torch", _size_by_part(tuned.model), quality(kind, reference, labels))]
    for variant in variants:
        progress.info(f"{variant.name}: {variant.exports / TARGET}")
        exact = _torch_answers(kind, frozen.load(variant.quantized), texts)
        found = resolve(ENCODERS, TARGET, "--target")(variant.exports / TARGET, texts)
        answered.append(_beside(kind, variant, found, reference, exact, labels))
    result = Comparison(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=LOCAL,
        machine=_machine(),
        options={name: value for name, value in config.plain(options).items() if name in OPTIONS},
        kind=kind.name,
        measure=_measure(kind),
        rows=len(rows),
        texts=len(texts),
        answered=answered,
        gates=gates.hold_answers(options, answered),
    )
    save(result, run.answers)
    config.save(run.config, "validate", options)
    return result


def quality(kind: Kind, answers: Answers, labels: NDArray[Any]) -> float:
    """0 to 1, or a correlation. labels: (rows,) of labels or of scores."""
    if not isinstance(kind, SentenceEncoder):
        return float((answers.argmax(1) == labels).mean())
    first, second = np.split(answers, 2)
    if not kind.scored:
        return float(((first @ second.T).argmax(1) == np.arange(len(first))).mean())
    return float(np.corrcoef(_ranks((first * second).sum(1)), _ranks(labels))[0, 1])


def cosines(one: Answers, other: Answers) -> NDArray[np.float64]:
    """(texts,)"""
    a, b = one.astype(np.float64), other.astype(np.float64)
    found: NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Places in order; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks


def _beside(
    kind: Kind, variant: Variant, found: Answers, reference: Answers, exact: Answers, labels: NDArray[Any]
) -> Answered:
    alike = cosines(found, reference)
    return Answered(
        name=variant.name,
        target=TARGET,
        size_bytes=resolve(READERS, TARGET, "--target")(variant.exports / TARGET).size_bytes,
        quality=quality(kind, found, labels),
        cosine=float(alike.mean()),
        least_cosine=float(alike.min()),
        agreement=None if isinstance(kind, SentenceEncoder) else float((found.argmax(1) == reference.argmax(1)).mean()),
        parity=float(cosines(found, exact).mean()),
    )


def _measure(kind: Kind) -> str:
    if not isinstance(kind, SentenceEncoder):
        return ACCURACY
    return CORRELATION if kind.scored else RETRIEVAL


def _size_by_part(model: nn.Module) -> dict[str, int]:
    """Bytes of a torch model's weights, in an artifact's parts; it counts a head among the linear layers."""
    linears, tables = (
        sum(m.weight.nbytes for m in model.modules() if isinstance(m, kind)) for kind in (nn.Linear, nn.Embedding)
    )
    whole = sum(parameter.nbytes for parameter in model.parameters())
    return {"linears": linears, "embedding": tables, "float": whole - linears - tables}


def _machine() -> dict[str, Any]:
    with closing(open_transport(LOCAL)) as here:
        return dataclasses.asdict(here.info())


def _check_options(run: Run, options: ValidateOptions, kind: Kind) -> None:
    """Refuse what has no meaning for an encoder, by name, before anything is loaded."""
    for field in dataclasses.fields(options):
        asked = getattr(options, field.name)
        if asked != field.default and field.name not in OPTIONS and (field.name, asked) != ("target", (TARGET,)):
            flag = config.flag_name(field.name) + (f" {asked[0]}" if isinstance(asked, tuple) else "")
            tasks.require_generating(run, f"validate {flag}{_by_profile(options)}")
    if options.min_top1 is not None and isinstance(kind, SentenceEncoder):
        raise UsageError(
            f"--min-top1{_by_profile(options)} is for models that choose tokens or labels; {run.path} holds "
            f"{kind.title}. Give --min-cosine."
        )


def _by_profile(options: ValidateOptions) -> str:
    return "" if options.profile is None else f" (given, or set by --profile {options.profile})"


def _exported(run: Run) -> list[Variant]:
    """Those that have a .pte, of the checkpoint that is there; the run's own is what limits are held against."""
    found = [variant for variant in run.variants() if TARGET in variant.targets()]
    if TARGET not in run.targets():
        raise RunError(f"{run.exports}: nothing exported. Do `qat-edge export {run.path} --target {TARGET}`.")
    for variant in found:
        variant.require_current(TARGET, f"qat-edge export {run.path} --target {TARGET} --force")
    return found


def _rows(run: Run, options: ValidateOptions, kind: Kind, tuned: merge.Merged) -> list[dict[str, Any]]:
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: the run was trained without --eval-data. Give --eval-data.")
    return training_examples.tokenize(
        kind, load_rows(source, "eval"), tuned.model, tuned.tokenizer, trained.max_length
    ).rows


def _torch_answers(kind: Kind, model: Any, texts: Sequence[list[int]]) -> Answers:
    def answer(part: Sequence[list[int]]) -> Tensor:
        ids = pad_sequence([torch.tensor(text) for text in part], batch_first=True)
        mask = pad_sequence([torch.ones(len(text), dtype=torch.int64) for text in part], batch_first=True)
        return kind.answer(model, ids, mask)

    with torch.no_grad():
        return torch.cat([answer(texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]).numpy()
