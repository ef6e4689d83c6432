"""Limits that make validate a step of CI: each is held against every QAT artifact and sets the exit code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as ET

from qat_edge.config import ValidateOptions, flag_name
from qat_edge.errors import GateError, UsageError
from qat_edge.measure.profiles import is_limit
from qat_edge.measure.results import Budget, Gate, Judgement, Measured, Report
from qat_edge.report.figures import plain


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
            # A figure that was not measured cannot pass a gate.
            passed = figure is not None and (figure <= limit if option.startswith("max_") else figure >= limit)
            written = math.nan if figure is None else figure
            why = judged[m.target].where if option == "max_fault_chance" and figure is not None else ""
            found.append(Gate(flag_name(option), limit, f"{m.name}, {m.target}", written, passed, why))
    return found


def require_gates(report: Report) -> None:
    """Raise where a limit was missed.

    Raises:
        GateError: names each missed limit and what was found.
    """
    missed = [f"{gate.measured}: {_missed(gate)}" for gate in report.gates if not gate.passed]
    if missed:
        raise GateError(f"{len(missed)} of {len(report.gates)} gates missed: " + "; ".join(missed))


def require_measurable(options: ValidateOptions) -> None:
    """Refuse a limit that nothing would be measured for.

    Raises:
        UsageError: the chance of a fault is limited, and no error budget was asked for.
    """
    if options.max_fault_chance is not None and not options.budget:
        raise UsageError("--max-fault-chance: only --budget looks for faults. Give it, too.")


def require_limits(options: ValidateOptions) -> None:
    """Refuse to write test results where nothing is tested: no test counts as passed in many a CI.

    Raises:
        UsageError: no limit was set.
    """
    if not limits(options):
        raise UsageError("--junit: no limit was set, so nothing would be tested. Give --profile, or limits as flags.")


def junit(reports: Sequence[Report], failures: Mapping[str, str]) -> str:
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
