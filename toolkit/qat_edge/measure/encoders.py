"""How an encoder's artifacts answer beside its FP32 fine-tune: text by text, in ExecuTorch's runtime, on this machine.

cosine    of an artifact's answer (embedding or logits) and the FP32 fine-tune's, over all texts
parity    the same beside the frozen checkpoint in torch, which an exact runtime answers like
quality   of labels, and of pairs that belong together: share that is right, an anchor's being the nearest of all
          positives; of pairs with scores: Spearman's correlation of cosines and scores
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qat_edge import adapters, config, examples, kinds
from qat_edge.config import FinetuneOptions, ValidateOptions
from qat_edge.errors import DataError, RunError
from qat_edge.kinds import Kind, SentenceEncoder
from qat_edge.measure import gates
from qat_edge.measure.devices import LOCAL
from qat_edge.quant import frozen
from qat_edge.rows import load_rows
from qat_edge.run import Run, Variant, write_text
from qat_edge.tables import resolve
from qat_edge_exporters import ENCODERS, READERS

TARGET = "executorch"
TEXTS = 16  # that torch is given at once
Answers = NDArray[np.float32]  # (texts, width); of pairs, all first texts, then all second ones
Say = Callable[[str], None]


@dataclass(frozen=True)
class Answered:
    """One model beside the FP32 fine-tune, which has no cosine; least: over the texts. agreement: of labels."""

    name: str
    quality: float
    cosine: float | None = None
    least_cosine: float | None = None
    parity: float | None = None
    agreement: float | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class Comparison:
    """All models on the same rows. measure: what `quality` is."""

    kind: str
    measure: str
    rows: int
    texts: int
    answered: list[Answered]

    def lines(self) -> Iterator[str]:
        """For people, one a model."""
        yield f"{self.rows} rows, {self.texts} texts; {self.measure}, cosine with the FP32 fine-tune"
        for found in self.answered:
            parts = [f"{found.quality:.4f}"]
            if found.cosine is not None:
                parts.append(f"cosine {found.cosine:.4f} (least {found.least_cosine:.4f})")
            parts += [] if found.agreement is None else [f"{found.agreement:.1%} of the labels alike"]
            parts += [] if found.parity is None else [f"frozen checkpoint {found.parity:.6f}"]
            parts += [] if found.size_bytes is None else [f"{found.size_bytes / 1e6:.1f} MB"]
            yield f"  {found.name}: {', '.join(parts)}"


def validate(run: Run, options: ValidateOptions, say: Say, force: bool = False) -> Comparison:
    """Compare every .pte of the run and of its PTQ variants with the FP32 fine-tune; RUN/answers.json keeps it.

    Raises:
        UsageError: an option that is for models that generate text.
        RunError: nothing exported, an artifact of an earlier checkpoint, or compared before (without `force`).
        DataError: no evaluation rows.
    """
    _check_options(run, options)
    if run.answers.exists() and not force:
        raise RunError(f"{run.answers} exists already. Give --force to measure again.")
    variants = _exported(run)
    kind = kinds.of_run(run)
    say("FP32 fine-tune in torch")
    tuned = adapters.merged_model(run.reference, say)
    rows = _rows(run, options, kind, tuned)
    texts = [*(row["input_ids"] for row in rows), *(row["other_ids"] for row in rows if "other_ids" in row)]
    labels = np.array([row["labels"][0] for row in rows])
    reference = _torch_answers(kind, tuned.model, texts)
    answered = [Answered("fp32 fine-tuned", quality(kind, reference, labels))]
    for variant in variants:
        say(f"{variant.name}: {variant.exports / TARGET}")
        exact = _torch_answers(kind, frozen.load(variant.quantized), texts)
        found = resolve(ENCODERS, TARGET, "--target")(variant.exports / TARGET, texts)
        answered.append(_beside(kind, variant, found, reference, exact, labels))
    result = Comparison(kind.name, _measure(kind), len(rows), len(texts), answered)
    write_text(run.answers, json.dumps(dataclasses.asdict(result), indent=1) + "\n")
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
    sizes = resolve(READERS, TARGET, "--target")(variant.exports / TARGET).size_bytes
    return Answered(
        name=variant.name,
        quality=quality(kind, found, labels),
        cosine=float(alike.mean()),
        least_cosine=float(alike.min()),
        parity=float(cosines(found, exact).mean()),
        agreement=None if isinstance(kind, SentenceEncoder) else float((found.argmax(1) == reference.argmax(1)).mean()),
        size_bytes=sum(sizes.values()),
    )


def _measure(kind: Kind) -> str:
    if not isinstance(kind, SentenceEncoder):
        return "share of labels that are right"
    return "Spearman's correlation with the scores" if kind.scored else "share of anchors nearest to their own"


def _check_options(run: Run, options: ValidateOptions) -> None:
    limits = [config.flag_name(name) for name in gates.limits(options)]
    given = {
        f"--device {options.device[0]}": options.device != (LOCAL,),
        f"--target {options.target[0] if options.target else ''}": options.target not in ((), (TARGET,)),
        "--text": options.text is not None,
        "--budget": options.budget,
        "--profile": options.profile is not None,
        **dict.fromkeys(limits, True),
    }
    for flag, wrong in given.items():
        if wrong:
            kinds.require_generating(run, f"validate {flag}")


def _exported(run: Run) -> list[Variant]:
    """Those that have a .pte, of the checkpoint that is there."""
    found = [variant for variant in run.variants() if TARGET in variant.targets()]
    if not found:
        raise RunError(f"{run.exports}: nothing exported. Do `qat-edge export {run.path} --target {TARGET}`.")
    for variant in found:
        variant.require_current(TARGET, f"qat-edge export {run.path} --target {TARGET} --force")
    return found


def _rows(run: Run, options: ValidateOptions, kind: Kind, tuned: adapters.Merged) -> list[dict[str, Any]]:
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: the run was trained without --eval-data. Give --eval-data.")
    return examples.tokenize(kind, load_rows(source, "eval"), tuned.model, tuned.tokenizer, trained.max_length).rows


def _torch_answers(kind: Kind, model: Any, texts: Sequence[list[int]]) -> Answers:
    def answer(part: Sequence[list[int]]) -> Tensor:
        ids = pad_sequence([torch.tensor(text) for text in part], batch_first=True)
        mask = pad_sequence([torch.ones(len(text), dtype=torch.int64) for text in part], batch_first=True)
        return kind.answer(model, ids, mask)

    with torch.no_grad():
        return torch.cat([answer(texts[i : i + TEXTS]) for i in range(0, len(texts), TEXTS)]).numpy()
