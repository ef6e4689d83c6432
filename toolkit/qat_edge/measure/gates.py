"""Limits that make validate a step of CI: each is held against every QAT artifact and sets the exit code."""

from __future__ import annotations

from collections.abc import Sequence

from qat_edge.config import ValidateOptions
from qat_edge.errors import GateError
from qat_edge.measure.results import Gate, Measured, Report


def hold(options: ValidateOptions, measured: Sequence[Measured]) -> list[Gate]:
    """Every limit that was set, held against every QAT artifact."""
    reference_perplexity = next(m.perplexity for m in measured if m.name == "fp32 fine-tuned")
    found = []
    for m in (m for m in measured if m.name == "qat"):
        label = f"{m.name}, {m.target}"
        figures: list[tuple[str, float | None, float | None, bool]] = [
            ("--max-kl", options.max_kl, None if m.agreement is None else m.agreement.kl_nats, True),
            ("--min-top1", options.min_top1, None if m.agreement is None else m.agreement.top1, False),
            ("--max-perplexity-ratio", options.max_perplexity_ratio, m.perplexity / reference_perplexity, True),
            ("--min-exact-match", options.min_exact_match, m.exact_match, False),
            ("--max-size-mb", options.max_size_mb, m.total_bytes / 1e6, True),
            ("--min-decode", options.min_decode, None if m.speed is None else m.speed.decode.median, False),
        ]
        for flag, limit, figure, at_most in figures:
            if limit is None:
                continue
            # A figure that was not measured cannot pass a gate.
            passed = figure is not None and (figure <= limit if at_most else figure >= limit)
            found.append(Gate(flag, limit, label, float("nan") if figure is None else figure, passed))
    return found


def require_gates(report: Report) -> None:
    """Raise where a limit was missed.

    Raises:
        GateError: names each missed limit and what was found.
    """
    missed = [f"{g.measured}: {g.flag} {g.limit:g}, measured {g.found:.4g}" for g in report.gates if not g.passed]
    if missed:
        raise GateError(f"{len(missed)} of {len(report.gates)} gates missed: " + "; ".join(missed))
