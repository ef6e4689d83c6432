"""Gates: limits on the figures of the QAT artifacts. A missed gate sets the exit code, for use as a step of CI."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from qat_edge.config import flag_name
from qat_edge.errors import GateError, UsageError
from qat_edge.evaluate.encoder_results import EncoderResult
from qat_edge.evaluate.results import REFERENCES, Budget, FaultTest, Gate, Measurement
from qat_edge.options import ValidateOptions
from qat_edge.profiles import is_gate
from qat_edge.quant.ptq.method_names import is_own

ENCODER_GATES = ("min_quality", "min_cosine", "min_top1", "max_size_mb")  # options
ENCODER_ONLY_GATES = ENCODER_GATES[:2]
NOT_FINITE = "The figure is not a finite number"


class GatedReport(Protocol):
    """A report with gates: of one device, from `results` or `encoder_results`."""

    @property
    def created(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def gates(self) -> list[Gate]: ...


def limits_set(options: ValidateOptions) -> dict[str, float]:
    """Return the limit of every gate that is set, by option."""
    return {name: value for name, value in vars(options).items() if is_gate(name) and value is not None}


def check_gates(
    options: ValidateOptions,
    measured: Sequence[Measurement],
    budgets: Sequence[Budget] = (),
    exact_match_notes: Sequence[str] = (),
) -> list[Gate]:
    """Check every gate that is set against every artifact of the run's own model.

    Args:
        options: whose gates are checked.
        measured: the FP32 reference, which the perplexity ratio refers to, and artifacts.
        budgets: error budgets of the artifacts, for --max-fault-chance.
        exact_match_notes: sentences that explain misses of --min-exact-match.
    """
    reference_perplexity = next(m.perplexity for m in measured if m.name in REFERENCES)
    fault_tests = {budget.target: budget.fault_test for budget in budgets}

    gates = []
    for artifact in measured:
        if not is_own(artifact.name):
            continue  # FP32 and PTQ models are there for comparison
        fault_test = fault_tests.get(artifact.target)  # None without --error-budget
        figures = _figures(artifact, reference_perplexity, fault_test)
        for option, limit in limits_set(options).items():
            why = ". ".join(exact_match_notes) if option == "min_exact_match" else ""
            if option == "max_fault_chance" and fault_test is not None:
                why = fault_test.location
            gates.append(_gate(option, limit, f"{artifact.name}, {artifact.target}", figures[option], why))
    return gates


def check_encoder_gates(options: ValidateOptions, results: Sequence[EncoderResult]) -> list[Gate]:
    """Check every gate that is set, each one of ENCODER_GATES, against an encoder's own artifact."""
    gates = []
    for result in results:
        if not is_own(result.name):
            continue
        figures = {
            "min_quality": result.quality,
            "min_cosine": result.cosine,
            "min_top1": result.agreement,
            "max_size_mb": result.total_bytes / 1e6,
        }
        for option, limit in limits_set(options).items():
            gates.append(_gate(option, limit, f"{result.name}, {result.target}", figures[option]))
    return gates


def require_gates(report: GatedReport) -> None:
    """Require that every gate of a report passed.

    Raises:
        GateError: names each missed gate with its limit and the measured figure.
    """
    missed = [f"{gate.measured}: {describe_miss(gate)}" for gate in report.gates if not gate.passed]
    if missed:
        raise GateError(f"{len(missed)} of {len(report.gates)} gates missed: " + "; ".join(missed))


def describe_miss(gate: Gate) -> str:
    """Describe a missed gate: flag, limit, measured figure and, where known, the cause."""
    measured = not math.isnan(gate.found) or gate.why == NOT_FINITE
    figure = f"measured {gate.found:.4g}" if measured else "not measured"
    cause = f". {gate.why}" if gate.why else ""
    return f"{gate.flag} {gate.limit:g}, {figure}{cause}"


def require_measurable(options: ValidateOptions) -> None:
    """Refuse gates on figures that are not measured for a model that generates text.

    Raises:
        UsageError: a gate for encoders is set, or one whose figure other options leave out.
    """
    for name in limits_set(options):
        if name in ENCODER_ONLY_GATES:
            raise UsageError(
                f"{flag_name(name)} is for classifiers and sentence encoders; it is not measured for a model that "
                "generates text. Use --min-exact-match, --max-kl or --min-top1."
            )
    if options.min_exact_match is not None and options.prompts == 0:
        raise UsageError("--min-exact-match and --prompts 0: without outputs it is not measured. Give --prompts, too.")
    if options.max_fault_chance is not None and not options.error_budget:
        raise UsageError("--max-fault-chance: faults are tested with --error-budget only. Give --error-budget, too.")


def require_prompts(options: ValidateOptions, prompts: int) -> None:
    """Refuse --min-exact-match where the evaluation data has no prompts.

    Raises:
        UsageError: there is none.
    """
    if options.min_exact_match is not None and prompts == 0:
        raise UsageError(
            "--min-exact-match: no evaluation row has an expected output, so it is not measured. Give --eval-data with "
            "conversations or prompts, or leave the gate out."
        )


def require_any_gate(*options: ValidateOptions) -> None:
    """Refuse to write test results without a test: many CI systems count no test as passed.

    Raises:
        UsageError: no gate is set for any device.
    """
    if not any(limits_set(one) for one in options):
        raise UsageError("--junit: no gate was set, so nothing would be tested. Give --profile, or gates as flags.")


def _gate(option: str, limit: float, measured: str, figure: float | None, why: str = "") -> Gate:
    """Check one figure against its limit; a figure that was not measured, or is not finite, fails."""
    if figure is None:
        # A figure that should be checked but is missing must not look like a success in CI.
        return Gate(flag_name(option), limit, measured, math.nan, passed=False, why=why)
    if not math.isfinite(figure):
        return Gate(flag_name(option), limit, measured, figure, passed=False, why=NOT_FINITE)
    passed = figure <= limit if option.startswith("max_") else figure >= limit
    return Gate(flag_name(option), limit, measured, figure, passed, why)


def _figures(
    artifact: Measurement, reference_perplexity: float, fault_test: FaultTest | None
) -> dict[str, float | None]:
    """Return the figure that each gate checks, by option; None where it was not measured."""
    agreement, speed, memory = artifact.agreement, artifact.speed, artifact.above_runtime_bytes
    return {
        "max_kl": None if agreement is None else agreement.kl_nats,
        "min_top1": None if agreement is None else agreement.top1,
        "max_perplexity_ratio": _ratio(artifact.perplexity, reference_perplexity) if artifact.scored else None,
        "min_exact_match": artifact.exact_match,
        "max_size_mb": artifact.total_bytes / 1e6,
        "max_memory_mb": None if memory is None else memory / 1e6,
        "min_prefill": None if speed is None else speed.prefill.median,
        "min_decode": None if speed is None else speed.decode.median,
        "max_fault_chance": None if fault_test is None else fault_test.chance,
    }


def _ratio(perplexity: float, reference: float) -> float:
    """Return the ratio of two perplexities; nan for a reference that overflows, which any figure would be below."""
    return perplexity / reference if math.isfinite(reference) else math.nan
