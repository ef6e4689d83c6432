"""What the figures say, in sentences: computed, never chosen, and plain where QAT gains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from qat_edge.evaluate.encoder_results import CORRELATION, Answered, Comparison
from qat_edge.evaluate.results import Measured, Report
from qat_edge.report.figures import cosine, number, percent, role, span, whole_percent

Z_95 = 1.96  # two-sided 95% of a normal distribution


@dataclass(frozen=True)
class Verdict:
    """headline: the comparison. context: what fine-tuning itself did. notes: what to keep in mind.

    figures: the numbers in the headline, by name.
    """

    headline: str
    notes: list[str]
    figures: dict[str, list[float]]
    context: str = ""


@dataclass(frozen=True)
class _Compared:
    """Rows of one report that the sentences are about; `ptq` holds only targets that `qat` has too.

    rival: what the sentences call the method of `ptq`, the best of those measured.
    """

    tuned: Measured
    qat: list[Measured]
    ptq: list[Measured]
    rival: str


def verdict(report: Report) -> Verdict:
    """Compare QAT with the FP32 fine-tune and with the best post-training method, on this report's figures."""
    tuned = next((row for row in report.measured if role(row) == "tuned"), None)
    qat, ptq = shipped(report, "qat"), shipped(report, "ptq")
    if not qat:
        return Verdict("No QAT artifact was measured, so there is nothing to judge yet.", [], {})
    if tuned is None:
        return Verdict("The FP32 fine-tune was not measured, so QAT has nothing to be held against.", [], {})
    if ptq:
        targets = {row.target for row in qat} & {row.target for row in ptq}
        ptq = [row for row in ptq if row.target in targets]
    compared = _Compared(tuned, qat, *_best_method(ptq))
    asked = all(row.exact_match is not None for row in (tuned, *qat))
    by_exact = asked and bool(tuned.exact_match)
    if not by_exact and not all(row.scored for row in (*compared.qat, *compared.ptq)):
        return Verdict("The runner gave no logits, and no exact match decides, so QAT cannot be judged.", [], {})
    judged = _by_exact_match(compared) if by_exact else _by_perplexity(compared, asked)
    return replace(judged, context=_fine_tuning(report, tuned))


def of_encoder(comparison: Comparison) -> Verdict:
    """The same of an encoder, on what its texts were answered."""
    rows = comparison.answered
    tuned, qat = rows[0], next((row for row in rows if role(row) == "qat"), None)
    if qat is None:
        return Verdict("No QAT artifact was measured, so there is nothing to judge yet.", [], {})
    write = number if comparison.measure == CORRELATION else percent
    size = qat.total_bytes / max(tuned.total_bytes, 1)
    text = (
        f"QAT has {'an' if comparison.measure[0] in 'aeiou' else 'a'} {comparison.measure} of {write(qat.quality)} "
        f"where the FP32 fine-tune has {write(tuned.quality)}, and a mean cosine of {cosine(qat.cosine or 0.0)} with "
        f"its answers, at {whole_percent(size)} of its size"
    )
    figures = {"qat_quality": [qat.quality], "qat_cosine": [qat.cosine or 0.0], "qat_size_share": [size]}
    ptq = [row for row in rows if role(row) == "ptq"]
    if not ptq:
        return Verdict(f"{text}. No post-training method was measured beside it.", [], figures)
    best = max(ptq, key=lambda row: (row.quality, row.cosine or 0.0))
    figures |= {"ptq_quality": [best.quality], "ptq_cosine": [best.cosine or 0.0]}
    rival = _called(best.name, len(ptq) > 1)
    text = f"{text}; {rival} has {write(best.quality)} and {cosine(best.cosine or 0.0)}"
    gains = [qat.quality - best.quality, (qat.cosine or 0.0) - (best.cosine or 0.0)]
    if max(gains) <= 0:
        text = f"QAT gains nothing here: {text}"
    elif min(gains) < 0:
        text = f"{text}, and which is better depends on the figure"
    return Verdict(f"{text}.", _rows_note(comparison, qat, best, rival), figures)


def _rows_note(comparison: Comparison, qat: Answered, best: Answered, rival: str) -> list[str]:
    """Say so where so few rows cannot tell two shares apart."""
    if comparison.measure == CORRELATION or not _by_chance(qat.quality, best.quality, comparison.rows):
        return []
    return [
        f"{comparison.rows} rows cannot tell the {comparison.measure} of QAT from that of {rival.partition(',')[0]} "
        "with 95% certainty; give more with --eval-data."
    ]


def _called(name: str, others: bool) -> str:
    """What sentences call a method. others: whether it is the best of several."""
    words = name.removeprefix("ptq (").removesuffix(")") or "round-to-nearest"
    return f"{words}, the best of the post-training methods measured," if others else words


def _best_method(rows: list[Measured]) -> tuple[list[Measured], str]:
    """Rows of the method with the most exact answers on average, or the least perplexity, and its name."""
    methods: dict[str, list[Measured]] = {}
    for row in rows:
        methods.setdefault(row.name, []).append(row)
    others = len(methods) > 1
    # A method that lacks a target that others have could win by that alone.
    most = max((len(found) for found in methods.values()), default=0)
    methods = {name: found for name, found in methods.items() if len(found) == most}
    asked = all(row.exact_match is not None for row in rows)

    def merit(name: str) -> tuple[float, float]:
        found = methods[name]
        exact = sum(_exact(row) for row in found) / len(found) if asked else 0.0
        return exact, -sum(row.perplexity for row in found) / len(found)

    best = max(methods, key=merit, default="")
    return methods.get(best, []), _called(best, others)


def shipped(report: Report, wanted: str) -> list[Measured]:
    """Rows of one role as they ship: in a device runtime, or in torch where nothing else was measured."""
    rows = [row for row in report.measured if role(row) == wanted]
    return [row for row in rows if row.target != "torch"] or rows


def _by_exact_match(compared: _Compared) -> Verdict:
    tuned = compared.tuned.exact_match or 0.0
    kept = _ratios(compared.qat, lambda row: _exact(row) / tuned)
    sizes = _ratios(compared.qat, lambda row: row.total_bytes / max(compared.tuned.total_bytes, 1))
    figures = {"qat_exact_match_kept": kept, "qat_size_share": sizes}
    verb = "reaches" if min(kept) >= 1 else "keeps"
    text = f"QAT {verb} {_shares(kept)} of the exact match of the FP32 fine-tune at {_shares(sizes)} of its size"
    rounded = [row for row in compared.ptq if row.exact_match is not None]
    if not rounded:
        return Verdict(f"{text}. No post-training method was measured beside it.", _notes(compared), figures)
    figures["ptq_exact_match_kept"] = [_exact(row) / tuned for row in rounded]
    gains = [_exact(_same_target(row, compared.qat)) - _exact(row) for row in rounded]
    figures["qat_gain_exact_match"] = gains
    theirs = _shares(figures["ptq_exact_match_kept"])
    if min(gains) > 0:
        text = f"{text}; {compared.rival} keeps {theirs}."
    elif max(gains) <= 0:
        text = f"QAT gains nothing here: {text}, while {compared.rival} keeps {theirs}."
    else:
        text = f"{text}; {compared.rival} keeps {theirs}, and which is better depends on the target."
    return Verdict(text, [*_chance(rounded, compared), *_notes(compared)], figures)


def _by_perplexity(compared: _Compared, asked: bool) -> Verdict:
    """Where no prompts were asked, or the fine-tune itself answers none of them."""
    ratios = _ratios(compared.qat, lambda row: row.perplexity / compared.tuned.perplexity)
    sizes = _ratios(compared.qat, lambda row: row.total_bytes / max(compared.tuned.total_bytes, 1))
    figures = {"qat_perplexity_ratio": ratios, "qat_size_share": sizes}
    text = f"QAT has {span(ratios, number)} times the perplexity of the FP32 fine-tune at {_shares(sizes)} of its size"
    if compared.ptq:
        theirs = [row.perplexity / compared.tuned.perplexity for row in compared.ptq]
        figures["ptq_perplexity_ratio"] = theirs
        gains = [row.perplexity - _same_target(row, compared.qat).perplexity for row in compared.ptq]
        text += f"; {compared.rival} has {span(theirs, number)} times"
        text = f"QAT gains nothing here: {text}" if max(gains) <= 0 else text
    reason = (
        "The FP32 fine-tune answers none of the prompts exactly, so perplexity is compared instead."
        if asked
        else "Exact match was not measured for every model, so perplexity is compared."
    )
    return Verdict(f"{text}.", [reason, *_notes(compared)], figures)


def _fine_tuning(report: Report, tuned: Measured) -> str:
    """What the training gained before anything was quantized."""
    base = next((row for row in report.measured if role(row) == "base"), None)
    if base is None:
        return ""
    words = [f"perplexity from {number(base.perplexity)} to {number(tuned.perplexity)}"]
    if base.exact_match is not None and tuned.exact_match is not None:
        words.insert(0, f"exact match from {percent(base.exact_match)} to {percent(tuned.exact_match)}")
    return f"Fine-tuning itself, in floats, took {' and '.join(words)}."


def _notes(compared: _Compared) -> list[str]:
    """What the figures themselves do not say."""
    notes = []
    worse = [row for row in (*compared.qat, *compared.ptq) if row.scored and not math.isfinite(row.perplexity)]
    if worse:
        notes.append("A perplexity is not finite: that model's output is unusable.")
    if all(row.target == "torch" for row in compared.qat):
        notes.append("The quantized model was measured in torch only, not in a runtime that ships.")
    return notes


def _chance(ptq: list[Measured], compared: _Compared) -> list[str]:
    """Say so where the difference in exact match is no larger than so few prompts can show."""
    for row in ptq:
        mine = _same_target(row, compared.qat)
        asked = min(row.prompts, mine.prompts)
        if asked and within_chance(mine, row):
            return [
                f"{asked} prompts cannot tell the exact match of QAT from that of {compared.rival.partition(',')[0]} "
                "with 95% certainty; ask more with --prompts."
            ]
    return []


def within_chance(one: Measured, other: Measured) -> bool:
    """Whether so few prompts cannot tell the exact match of two models apart with 95% certainty."""
    return _by_chance(_exact(one), _exact(other), min(one.prompts, other.prompts))


def _by_chance(one: float, other: float, asked: int) -> bool:
    """Whether two shares of so many differ by no more than chance explains, with 95% certainty."""
    spread = sum(share * (1 - share) / max(asked, 1) for share in (one, other))
    return abs(one - other) <= Z_95 * math.sqrt(spread)


def _exact(row: Measured) -> float:
    return row.exact_match or 0.0


def _same_target(row: Measured, rows: list[Measured]) -> Measured:
    return next(other for other in rows if other.target == row.target)


def _ratios(rows: list[Measured], ratio: Callable[[Measured], float]) -> list[float]:
    return [ratio(row) for row in rows]


def _shares(values: list[float]) -> str:
    return span(values, whole_percent)
