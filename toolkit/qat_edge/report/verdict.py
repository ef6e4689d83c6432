"""Sentences computed from the metrics: a run's own model compared with the FP32 reference and with the best PTQ method.

The own model is that of QAT, or in a run without QAT what the model was quantized to. The sentences follow from the
numbers alone. Where QAT is no better than PTQ, the headline begins with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from qat_edge.evaluate.encoder_results import CORRELATION, EncoderReport, EncoderResult
from qat_edge.evaluate.results import Measurement, Report
from qat_edge.readers import counted
from qat_edge.report.formatting import (
    ROLES,
    ReportedModel,
    cosine,
    model_label,
    number,
    own_title,
    percent,
    reference_title,
    role,
    span,
    whole_percent,
)

Z_95 = 1.96  # two-sided 95% quantile of the normal distribution
NO_OWN = "No artifact of the run's own model was measured, so there is no result yet."
NO_PTQ = "No PTQ method was measured for comparison."

Reported = TypeVar("Reported", bound=ReportedModel)


@dataclass(frozen=True)
class Verdict:
    """The conclusion of one report, in sentences.

    Attributes:
        headline: The comparison.
        notes: Caveats.
        figures: Numbers of the headline, by name.
        context: The improvement by fine-tuning alone.
    """

    headline: str
    notes: list[str]
    figures: dict[str, list[float]]
    context: str = ""


@dataclass(frozen=True)
class _ComparedModels:
    """Rows of one report that the sentences are about.

    Attributes:
        tuned: The FP32 reference.
        qat: Artifacts of the run's own model.
        ptq: Artifacts of the best PTQ method, only on targets that `qat` has too.
        ptq_name: Name of that method in the sentences.
    """

    tuned: Measurement
    qat: list[Measurement]
    ptq: list[Measurement]
    ptq_name: str

    @property
    def reference(self) -> str:
        """The FP32 reference in sentences."""
        return reference_title([self.tuned])

    @property
    def own(self) -> str:
        """The run's own model in sentences."""
        return own_title(self.qat)


def verdict(report: Report) -> Verdict:
    """Compare the own model with the FP32 reference and with the best PTQ method, by the metrics of this report."""
    tuned = next((row for row in report.measured if role(row) == "tuned"), None)
    qat, ptq = shipped(report, "qat"), shipped(report, "ptq")
    if not qat:
        return Verdict(NO_OWN, [], {})
    if tuned is None:
        return Verdict("The FP32 model was not measured, so there is no reference to compare with.", [], {})

    if ptq:
        # Both are compared on the same targets.
        targets = {row.target for row in qat} & {row.target for row in ptq}
        ptq = [row for row in ptq if row.target in targets]
    merit = partial(_mean_accuracy, has_exact_match=all(row.exact_match is not None for row in ptq))
    compared = _ComparedModels(tuned, qat, *_best_method(ptq, merit))

    # Exact match is what users see, so it decides where it is known and the reference solves any prompt at all.
    has_exact_match = all(row.exact_match is not None for row in (tuned, *qat))
    by_exact_match = has_exact_match and bool(tuned.exact_match)
    if not by_exact_match and not all(row.scored for row in (*compared.qat, *compared.ptq)):
        return Verdict(
            f"{compared.own} cannot be compared: the runner returned no logits, so there is no perplexity, and exact "
            f"match is missing or 0 for the {compared.reference}.",
            [],
            {},
        )
    found = _by_exact_match(compared) if by_exact_match else _by_perplexity(compared, has_exact_match)
    return replace(found, context=_fine_tuning(report, tuned))


def encoder_verdict(comparison: EncoderReport) -> Verdict:
    """Compare an encoder with the FP32 reference and with the best PTQ method, by task quality and cosine."""
    rows = comparison.results
    tuned, qat = rows[0], [row for row in rows if role(row) == "qat"]
    if not qat:
        return Verdict(NO_OWN, [], {})

    # The own model against the FP32 reference.
    own, reference = own_title(rows), reference_title(rows)
    write = number if comparison.measure == CORRELATION else percent
    sizes = [row.total_bytes / max(tuned.total_bytes, 1) for row in qat]
    article = "an" if comparison.measure[0] in "aeiou" else "a"
    qualities, similarities = [row.quality for row in qat], [row.cosine or 0.0 for row in qat]
    text = (
        f"{own} has {article} {comparison.measure} of {span(qualities, write)} ({reference}: {write(tuned.quality)}) "
        f"and a mean cosine of {span(similarities, cosine)} with the outputs of the {reference}, at "
        f"{_shares(sizes)} of its size"
    )
    figures = {"qat_quality": qualities, "qat_cosine": similarities, "qat_size_share": sizes}

    # The own model against the best PTQ method, on the same targets.
    targets = {row.target for row in qat}
    best, ptq_name = _best_method([row for row in rows if role(row) == "ptq" and row.target in targets], _mean_quality)
    if not best:
        return Verdict(f"{text}. {NO_PTQ}", [], figures)
    ptq_qualities, ptq_similarities = [row.quality for row in best], [row.cosine or 0.0 for row in best]
    figures |= {"ptq_quality": ptq_qualities, "ptq_cosine": ptq_similarities}
    text = f"{text}; {ptq_name} has {span(ptq_qualities, write)} and {span(ptq_similarities, cosine)}"
    pairs = [(_same_target(row, qat), row) for row in best]
    gains = [one.quality - other.quality for one, other in pairs]
    gains += [(one.cosine or 0.0) - (other.cosine or 0.0) for one, other in pairs]
    if max(gains) <= 0:
        text = _no_gain(text, own)
    elif min(gains) < 0:
        text = f"{text}, so which is better depends on the metric"
    return Verdict(f"{text}.", _rows_note(comparison, *pairs[0], ptq_name), figures)


def _rows_note(comparison: EncoderReport, qat: EncoderResult, best: EncoderResult, ptq_name: str) -> list[str]:
    """Return a caveat if there are too few rows to tell the two shares apart."""
    # A correlation is not a share, so the test of `_within_chance` does not apply.
    if comparison.measure == CORRELATION or not _within_chance(qat.quality, best.quality, comparison.rows):
        return []
    return [
        f"With {counted(comparison.rows, 'row')}, the difference in {comparison.measure} between {model_label(qat)} "
        f"and {ptq_name.partition(',')[0]} is not significant (95% confidence); give more rows with --eval-data."
    ]


def _method_name(name: str, is_best: bool) -> str:
    """Return the name of a PTQ method in a sentence. is_best: whether it is the best of several methods."""
    title = name.removeprefix("ptq (").removesuffix(")") or "round-to-nearest"
    return f"{title}, the best PTQ method measured," if is_best else title


def _best_method(
    rows: Sequence[Reported], merit: Callable[[Sequence[Reported]], tuple[float, float]]
) -> tuple[list[Reported], str]:
    """Return the rows and the name of the PTQ method with the highest merit of its rows."""
    methods: dict[str, list[Reported]] = {}
    for row in rows:
        methods.setdefault(row.name, []).append(row)
    several = len(methods) > 1

    # A method that was not measured on every target could win by the missing target alone, so it is left out.
    most = max((len(found) for found in methods.values()), default=0)
    methods = {name: found for name, found in methods.items() if len(found) == most}
    best = max(methods, key=lambda name: merit(methods[name]), default="")
    return methods.get(best, []), _method_name(best, several)


def _mean_accuracy(rows: Sequence[Measurement], has_exact_match: bool) -> tuple[float, float]:
    """Return the mean exact match, if there is one; ties are decided by perplexity."""
    exact = sum(map(_exact_match, rows)) / len(rows) if has_exact_match else 0.0
    return exact, -sum(row.perplexity for row in rows) / len(rows)


def _mean_quality(rows: Sequence[EncoderResult]) -> tuple[float, float]:
    """Return the mean quality; ties are decided by the mean cosine."""
    return sum(row.quality for row in rows) / len(rows), sum(row.cosine or 0.0 for row in rows) / len(rows)


def shipped(report: Report, wanted: str) -> list[Measurement]:
    """Return the rows of a role in device runtimes, or in torch if no other was measured."""
    rows = [row for row in report.measured if role(row) == wanted]
    return [row for row in rows if row.target != "torch"] or rows


def _by_exact_match(compared: _ComparedModels) -> Verdict:
    tuned = compared.tuned.exact_match or 0.0
    # The own model against the FP32 reference.
    kept = _ratios(compared.qat, lambda row: _exact_match(row) / tuned)
    sizes = _size_shares(compared)
    figures = {"qat_exact_match_kept": kept, "qat_size_share": sizes}
    verb = "reaches" if min(kept) >= 1 else "keeps"
    share = f"{_shares(kept)} of the exact match of the {compared.reference}"
    text = f"{compared.own} {verb} {share} at {_shares(sizes)} of its size"

    ptq = [row for row in compared.ptq if row.exact_match is not None]
    if not ptq:
        return Verdict(f"{text}. {NO_PTQ}", _notes(compared), figures)

    # Each PTQ artifact is compared with the own artifact of the same target.
    figures["ptq_exact_match_kept"] = [_exact_match(row) / tuned for row in ptq]
    gains = [_exact_match(_same_target(row, compared.qat)) - _exact_match(row) for row in ptq]
    figures["qat_gain_exact_match"] = gains
    ptq_kept = _shares(figures["ptq_exact_match_kept"])
    # Better on every target, on none, or on some.
    if min(gains) > 0:
        text = f"{text}; {compared.ptq_name} keeps {ptq_kept}."
    elif max(gains) <= 0:
        text = f"{_no_gain(text, compared.own)}, while {compared.ptq_name} keeps {ptq_kept}."
    else:
        text = f"{text}; {compared.ptq_name} keeps {ptq_kept}, so which is better depends on the target."
    return Verdict(text, [*_prompts_note(ptq, compared), *_notes(compared)], figures)


def _by_perplexity(compared: _ComparedModels, has_exact_match: bool) -> Verdict:
    """Compare by perplexity: exact match was not measured, or is 0 for the reference itself."""
    ratios = _ratios(compared.qat, lambda row: row.perplexity / compared.tuned.perplexity)
    sizes = _size_shares(compared)
    # The own model against the FP32 reference: 1 is as good.
    figures = {"qat_perplexity_ratio": ratios, "qat_size_share": sizes}
    times = f"{span(ratios, number)} times the perplexity of the {compared.reference}"
    text = f"{compared.own} has {times} at {_shares(sizes)} of its size"

    if compared.ptq:
        # The same ratio of the best PTQ method.
        ptq_ratios = [row.perplexity / compared.tuned.perplexity for row in compared.ptq]
        figures["ptq_perplexity_ratio"] = ptq_ratios
        gains = [row.perplexity - _same_target(row, compared.qat).perplexity for row in compared.ptq]
        text = f"{text}; {compared.ptq_name} has {span(ptq_ratios, number)} times"
        if max(gains) <= 0:
            text = _no_gain(text, compared.own)

    # The usual metric is exact match, so the reason for another one is given.
    reason = (
        f"The {compared.reference} solves none of the prompts exactly, so perplexity is compared instead."
        if has_exact_match
        else "Exact match was not measured for every model, so perplexity is compared instead."
    )
    return Verdict(f"{text}.", [reason, *_notes(compared)], figures)


def _no_gain(text: str, own: str) -> str:
    """Return a sentence that begins with the own model's name with the conclusion that it is no better in front."""
    others = "post-training quantization" if own == ROLES["qat"] else "another PTQ method"
    return f"{own} is no better than {others} here: it{text.removeprefix(own)}"


def _fine_tuning(report: Report, tuned: Measurement) -> str:
    """Return a sentence on the improvement by training, before quantization; empty if the base was not measured."""
    base = next((row for row in report.measured if role(row) == "base"), None)
    if base is None:
        return ""
    changes = [f"perplexity from {number(base.perplexity)} to {number(tuned.perplexity)}"]
    if base.exact_match is not None and tuned.exact_match is not None:
        changes.insert(0, f"exact match from {percent(base.exact_match)} to {percent(tuned.exact_match)}")
    return f"Fine-tuning alone, before quantization, changed {' and '.join(changes)}."


def _notes(compared: _ComparedModels) -> list[str]:
    """Return caveats that do not show in the numbers of the headline."""
    notes = []
    unusable = [row for row in (*compared.qat, *compared.ptq) if row.scored and not math.isfinite(row.perplexity)]
    if unusable:
        notes.append("A perplexity is not finite: the outputs of that model are unusable.")
    if all(row.target == "torch" for row in compared.qat):
        notes.append("The quantized model was measured in torch only, not in a device runtime.")
    return notes


def _prompts_note(ptq: list[Measurement], compared: _ComparedModels) -> list[str]:
    """Return a caveat if there are too few prompts to tell the exact matches apart."""
    for row in ptq:
        qat = _same_target(row, compared.qat)
        prompts = min(row.prompts, qat.prompts)
        if prompts and within_chance(qat, row):
            return [
                f"With {counted(prompts, 'prompt')}, the difference in exact match between {compared.own} and "
                f"{compared.ptq_name.partition(',')[0]} is not significant (95% confidence); give more with --prompts."
            ]
    return []


def within_chance(one: Measurement, other: Measurement) -> bool:
    """Return whether the exact matches of two models do not differ significantly, with 95% confidence."""
    return _within_chance(_exact_match(one), _exact_match(other), min(one.prompts, other.prompts))


def _within_chance(one: float, other: float, trials: int) -> bool:
    """Return whether two shares of `trials` do not differ significantly: a z-test with unpooled variance."""
    # The variance of a share p of n trials is p (1 - p) / n; those of two independent shares add up.
    variance = sum(share * (1 - share) / max(trials, 1) for share in (one, other))
    return abs(one - other) <= Z_95 * math.sqrt(variance)


def _exact_match(row: Measurement) -> float:
    return row.exact_match or 0.0


def _same_target(row: ReportedModel, rows: Sequence[Reported]) -> Reported:
    return next(other for other in rows if other.target == row.target)


def _ratios(rows: list[Measurement], ratio: Callable[[Measurement], float]) -> list[float]:
    return [ratio(row) for row in rows]


def _size_shares(compared: _ComparedModels) -> list[float]:
    return _ratios(compared.qat, lambda row: row.total_bytes / max(compared.tuned.total_bytes, 1))


def _shares(values: list[float]) -> str:
    return span(values, whole_percent)
