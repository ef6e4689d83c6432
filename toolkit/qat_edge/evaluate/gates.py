"""Limits that make validate a step of CI: each is held against every QAT artifact and sets the exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol
from xml.etree import ElementTree as ET

from qat_edge.config import ValidateOptions, flag_name
from qat_edge.errors import GateError, UsageError
from qat_edge.evaluate.encoder_results import Answered
from qat_edge.evaluate.results import Budget, Gate, Judgement, Measured
from qat_edge.profiles import is_limit
from qat_edge.report.figures import plain

FOR_ENCODERS = ("min_quality", "min_cosine", "min_top1", "max_size_mb")
ENCODERS_ALONE = FOR_ENCODERS[:2]


class Held(Protocol):
    """What limits were held against: one validate on one device."""

    @property
    def created(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def gates(self) -> list[Gate]: ...


def limits(options: ValidateOptions) -> dict[str, float]:
    """The limits that were set, by option."""
    return {name: limit for name, limit in vars(options).items() if is_limit(name) and limit is not None}


def hold(options: ValidateOptions, measured: Sequence[Measured], budgets: Sequence[Budget] = ()) -> list[Gate]:
    """Every limit that was set, held against every QAT artifact."""
    reference_perplexity = next(m.perplexity for m in measured if m.name == "fp32 fine-tuned")
    judged = {budget.target: budget.judged for budget in budgets}
    found = []
    for m in (m for m in measured if m.name == "qat"):
        figures = _figures(m, reference_perplexity, judged.get(m.target))
        for option, limit in limits(options).items():
            figure = figures[option]
            why = judged[m.target].where if option == "max_fault_chance" and figure is not None else ""
            found.append(_gate(option, limit, f"{m.name}, {m.target}", figure, why))
    return found


def hold_answers(options: ValidateOptions, answered: Sequence[Answered]) -> list[Gate]:
    """Every limit that was set, each one of FOR_ENCODERS, held against an encoder's QAT artifact."""
    found = []
    for m in (m for m in answered if m.name == "qat"):
        figures = dict(zip(FOR_ENCODERS, (m.quality, m.cosine, m.agreement, m.total_bytes / 1e6), strict=True))
        held = limits(options).items()
        found += [_gate(option, limit, f"{m.name}, {m.target}", figures[option]) for option, limit in held]
    return found


def require_gates(report: Held) -> None:
    """Raise where a limit was missed.

    Raises:
        GateError: names each missed limit and what was found.
    """
    missed = [f"{gate.measured}: {_missed(gate)}" for gate in report.gates if not gate.passed]
    if missed:
        raise GateError(f"{len(missed)} of {len(report.gates)} gates missed: " + "; ".join(missed))


def require_measurable(options: ValidateOptions) -> None:
    """Refuse a limit that nothing would be measured for, of a model that generates text.

    Raises:
        UsageError: a limit for encoders, or the chance of a fault is limited and no error budget was asked for.
    """
    for name in limits(options):
        if name in ENCODERS_ALONE:
            raise UsageError(
                f"{flag_name(name)} is for classifiers and sentence encoders; of a model that generates text nothing "
                "of the kind is measured. Give --min-exact-match, --max-kl or --min-top1."
            )
    if options.max_fault_chance is not None and not options.error_budget:
        raise UsageError("--max-fault-chance: only --error-budget looks for faults. Give it, too.")


def require_limits(*options: ValidateOptions) -> None:
    """Refuse to write test results where nothing is tested: no test counts as passed in many a CI.

    Raises:
        UsageError: no limit was set, for any device.
    """
    if not any(map(limits, options)):
        raise UsageError("--junit: no limit was set, so nothing would be tested. Give --profile, or limits as flags.")


def junit(reports: Sequence[Held], failures: Mapping[str, str]) -> str:
    """Gates as JUnit XML: a suite a device, a case for each limit and artifact.

    A missed limit is a failure; a figure that was not measured, and a device that failed, is an error.
    """
    root = ET.Element("testsuites", {"name": "qat-edge validate"})
    for report in reports:
        suite = ET.SubElement(root, "testsuite", {"name": plain(report.device), "timestamp": report.created})
        for gate in report.gates:
            case = ET.SubElement(suite, "testcase", {"classname": gate.measured, "name": gate.flag})
            if not gate.passed:
                _found(case, "error" if math.isnan(gate.found) else "failure", _missed(gate))
    for device, reason in failures.items():
        suite = ET.SubElement(root, "testsuite", {"name": plain(device)})
        _found(ET.SubElement(suite, "testcase", {"classname": plain(device), "name": "measured"}), "error", reason)
    for counted in (*root, root):
        for noun, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error")):
            counted.set(noun, str(len(list(counted.iter(tag)))))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _gate(option: str, limit: float, measured: str, figure: float | None, why: str = "") -> Gate:
    """One limit against what was found; a figure that was not measured cannot pass."""
    passed = figure is not None and (figure <= limit if option.startswith("max_") else figure >= limit)
    return Gate(flag_name(option), limit, measured, math.nan if figure is None else figure, passed, why)


def _found(case: ET.Element, kind: str, message: str) -> None:
    ET.SubElement(case, kind, {"message": plain(message)})


def _missed(gate: Gate) -> str:
    found = "not measured" if math.isnan(gate.found) else f"measured {gate.found:.4g}"
    return f"{gate.flag} {gate.limit:g}, {found}{f'. {gate.why}' if gate.why else ''}"


def _figures(m: Measured, reference_perplexity: float, judged: Judgement | None) -> dict[str, float | None]:
    """What each limit is about, by option; None where it was not measured."""
    above_runtime = m.above_runtime_bytes
    return {
        "max_kl": None if m.agreement is None else m.agreement.kl_nats,
        "min_top1": None if m.agreement is None else m.agreement.top1,
        "max_perplexity_ratio": m.perplexity / reference_perplexity,
        "min_exact_match": m.exact_match,
        "max_size_mb": m.total_bytes / 1e6,
        "max_memory_mb": None if above_runtime is None else above_runtime / 1e6,
        "min_prefill": None if m.speed is None else m.speed.prefill.median,
        "min_decode": None if m.speed is None else m.speed.decode.median,
        "max_fault_chance": None if judged is None else judged.chance,
    }
