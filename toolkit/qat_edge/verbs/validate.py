"""Run every artifact in its own runtime, in a process of its own, and compare it with the FP32 fine-tune.

Models are compared in token ids, teacher-forced, on the tokens that carry loss in training. Next to the comparison with
FP32 there is `parity`: the same artifact against the frozen checkpoint in torch, which an exact runtime matches down to
the arithmetic noise floor (the checkpoint against itself with a disturbance of 1e-7 in its embeddings). Torch results
are computed once, on this machine, and shared by all devices.

    validate_run      the command: gates first, encoder or decoder, JUnit
    validate_devices  a model that generates text: evaluation set -> torch side -> every device -> reports
    _measure          one device: every artifact (`evaluate.evaluator`), error budgets (`artifact_budget`), gates
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qat_edge import config, progress
from qat_edge.errors import ArtifactError, DeviceError, GateError, RunError, UsageError
from qat_edge.evaluate.devices import LOCAL, connect, report_paths, require_programs, require_runtimes, run_on_devices
from qat_edge.evaluate.evaluator import EvalSet, Evaluator, device_errors, load_eval_set, scratch_folder
from qat_edge.evaluate.gates import check_gates, require_any_gate, require_gates, require_measurable, require_prompts
from qat_edge.evaluate.prompts import Context
from qat_edge.evaluate.results import FINE_TUNED, UNTRAINED, Agreement, Measurement, Report, save
from qat_edge.export_command import export_targets
from qat_edge.manifest import MANIFEST, check_files, read_manifest, sha256
from qat_edge.models import merge, tasks
from qat_edge.models.artifact_options import context_of_artifact, options_of_artifact
from qat_edge.options import ValidateOptions
from qat_edge.run import Run, Variant
from qat_edge.run_lock import writes_run
from qat_edge.storage import write_text
from qat_edge_devices.transport import Transport
from qat_edge_exporters.targets import require_known, target_named

# Encoders, error budgets and native runners are imported where they are used: most validations need none of them.
if TYPE_CHECKING:
    from qat_edge.diagnose.error_budget import TorchBudget
    from qat_edge.evaluate.encoder_results import EncoderReport

Artifacts = list[tuple[Variant, str]]  # variants, each with the target of one of its artifacts
NOT_THERE = "speed not given: torch ran on the machine that validates, not on this device"


@dataclass(frozen=True)
class Validated:
    """Result on every device.

    Attributes:
        reports: one per device that was measured, or the one of an encoder.
        failures: by device, why there is no report.
        paths: by device, where its report was written.
    """

    reports: Sequence[Report | EncoderReport]
    failures: dict[str, str]
    paths: dict[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class TorchResults:
    """Results of the models that run in torch on this machine, shared by the reports of all devices.

    Attributes:
        identities: digests of what two reports must share to be compared; see `Report`.
        models: the FP32 base model and the FP32 fine-tune, or one model where nothing was trained.
        noise_floor: the frozen checkpoint against itself, disturbed.
        budget: torch side of the error budget; None without --error-budget.
    """

    identities: dict[str, str]
    models: list[Measurement]
    noise_floor: Agreement
    budget: TorchBudget | None


@writes_run("validate")
def validate_run(
    run: Run,
    options: ValidateOptions,
    force: bool = False,
    by_device: Mapping[str, ValidateOptions] | None = None,
    junit: Path | None = None,
) -> Validated:
    """Validate a run of any task, on every device of `options`, and write the gates' results as JUnit XML.

    Args:
        run: a run with exports.
        options: what to measure and where.
        force: replace reports that exist.
        by_device: options of devices with a profile of their own, in place of `options`.
        junit: file for the results of the gates, or None.

    Raises:
        UsageError: an impossible combination of options; `junit` without a gate.
        RunError: nothing was exported, or a report exists and `force` is not set.
        DataError: there are no evaluation rows.
    """
    # A test report without a test would count as passed in many CI systems.
    if junit is not None:
        of_devices = by_device or {}
        require_any_gate(*(of_devices.get(device, options) for device in options.device))
        junit.unlink(missing_ok=True)  # an earlier result must not be taken for this one

    # Encoders have a report of their own, measured on this machine.
    if tasks.task_of_run(run).is_encoder:
        from qat_edge.evaluate import encoders

        encoder = encoders.validate_encoder(run, options, force=force)
        result = Validated([encoder], {}, {encoder.device: run.answers})
    else:
        paths = report_paths(run.reports, options.device)
        result = dataclasses.replace(validate_devices(run, options, force=force, own=by_device), paths=paths)

    if junit is not None:
        from qat_edge.evaluate.junit import junit_xml

        write_text(junit, junit_xml(result.reports, result.failures))
    return result


def validate(run: Run, options: ValidateOptions, force: bool = False) -> Report:
    """Measure the artifacts of a run that generates text, on the one device of `options`.

    The report is also written to RUN/reports/DEVICE.json.

    Raises:
        RunError: nothing was exported, or a report exists and `force` is not set.
        DataError: there are no evaluation rows.
        DeviceError: the device cannot be reached, or a runtime failed there.
    """
    if len(options.device) != 1:
        raise UsageError(f"--device: expected one device, found {len(options.device)}.")
    validated = validate_devices(run, options, force=force)
    if validated.failures:
        require_success(validated)
    report = validated.reports[0]
    assert isinstance(report, Report)
    return report


@writes_run("validate")
def validate_devices(
    run: Run, options: ValidateOptions, force: bool = False, own: Mapping[str, ValidateOptions] | None = None
) -> Validated:
    """Measure the artifacts on every device of `options` at the same time; a failing device does not stop the others.

    Args:
        run: a run that generates text, with exports.
        options: what to measure and where.
        force: replace reports that exist.
        own: options of devices with a profile of their own, in place of `options` (`config.for_devices`).

    Raises:
        UsageError: a device is named twice, or is of an unknown type.
        RunError, DataError: as `validate`.
    """
    # Check all options before computing anything.
    tasks.require_causal_lm(run, "validate")
    options_of = {**dict.fromkeys(options.device, options), **(own or {})}
    paths = report_paths(run.reports, options.device)
    require_programs(options.device)
    if any(each.error_budget for each in options_of.values()) and run.frozen_base is not None:
        raise UsageError(
            f"--error-budget: the adapters of {run.path} are not merged, so it has no weights between its FP32 "
            f"fine-tune and its codes. Leave it out, or measure the base: `qat-edge validate {run.frozen_base}`."
        )
    _require_possible(options_of.values(), paths.values(), force)
    artifacts = _artifacts_by_target(run, options_of.values())
    require_runtimes(options_of, lambda each: {target for _, target in artifacts[each.target]})
    for each in options_of.values():
        _require_timing_fits(artifacts[each.target], each)
    eval_set = load_eval_set(run, options, _shortest_context(artifacts.values()))
    for each in options_of.values():
        require_prompts(each, len(eval_set.prompts))
        if each.runner_binary is None:  # a runner reads as much of a sequence as it takes
            _require_sequences_fit(artifacts[each.target], eval_set)

    with scratch_folder(run) as scratch, device_errors(), ExitStack() as stack:
        transports, failures = connect(options, stack)
        for device, reason in failures.items():
            progress.warn(f"Left out {device}: {reason}")
        if not transports:
            return Validated([], failures)

        # The torch side is computed once, with an error budget if any device needs one.
        shared = dataclasses.replace(options, error_budget=any(each.error_budget for each in options_of.values()))
        evaluator = Evaluator(eval_set, shared, scratch)
        torch_results = _run_torch(run, evaluator, artifacts.values(), is_reported=LOCAL in transports)

        def measure(device: str, transport: Transport) -> Report:
            own_evaluator = dataclasses.replace(evaluator, options=options_of[device])
            # Several devices report at the same time: each line then begins with its device's name.
            reporter = progress.current()
            reporter = reporter if len(transports) == 1 else progress.PrefixedReporter(device, reporter)
            with progress.report_to(reporter):
                report = _measure(
                    run, artifacts[options_of[device].target], device, transport, own_evaluator, torch_results
                )
            save(report, paths[device])
            return report

        reports, failed = run_on_devices(transports, measure)

    config.save(run.config, "validate", options, left_out=_set_by_profiles(options, options_of.values()))
    return Validated(list(reports.values()), failures | failed)


def require_success(validated: Validated) -> None:
    """Raise where a device failed or missed a gate.

    Raises:
        DeviceError: a device failed; missed gates of the others follow.
        ArtifactError: an artifact computed numbers that are not finite, whatever the gates say.
        GateError: gates were missed, by device.
    """
    missed = [text for report in validated.reports for text in _not_finite(report)]
    is_broken = bool(missed)
    for report in validated.reports:
        try:
            require_gates(report)
        except GateError as error:
            missed.append(f"{report.device}: {error}" if isinstance(report, Report) else str(error))

    if validated.failures:
        if len(validated.failures) == 1 and not validated.reports:
            raise DeviceError(*validated.failures.values())
        count = len(validated.failures)
        failed = [f"{device}: {reason}" for device, reason in validated.failures.items()]
        lines = "\n".join([*failed, *missed])
        raise DeviceError(f"{count} of {count + len(validated.reports)} devices failed.\n{lines}")
    if missed:
        raise (ArtifactError if is_broken else GateError)("\n".join(missed))


def _not_finite(report: Report | EncoderReport) -> list[str]:
    """Return a line for each artifact with outputs that are not finite."""
    results = report.measured if isinstance(report, Report) else report.results
    return [
        f"{report.device}: {result.name}, {result.target}: {result.not_finite}. Its figures have no meaning; "
        "`qat-edge verify` compares it with the frozen checkpoint."
        for result in results
        if result.not_finite
    ]


def _require_possible(options_by_device: Iterable[ValidateOptions], paths: Iterable[Path], force: bool) -> None:
    """Refuse what cannot be measured, or would replace a report."""
    for options in options_by_device:
        require_measurable(options)
        if options.runner_binary is not None:
            from qat_edge.evaluate import native_runner

            native_runner.require_supported(options)
    for path in paths:
        if path.exists() and not force:
            raise RunError(f"{path} exists already. Give --force to measure again.")


def _require_timing_fits(artifacts: Artifacts, options: ValidateOptions) -> None:
    """Refuse a speed measurement that is longer than an artifact's context, before anything is computed.

    Raises:
        UsageError: names the options and the artifact.
    """
    if options.runner_binary is not None:
        return  # it has a timing of its own
    timed = options.prefill + options.decode + 1  # the first new token, too
    for variant, target in artifacts:
        folder = variant.exports / target
        context = context_of_artifact(folder)
        if timed > context:
            raise UsageError(
                f"--prefill {options.prefill} and --decode {options.decode}: timing takes {timed} tokens, and {folder} "
                f"holds {context}. Give smaller ones, or export with a longer --context-length."
            )


def _shortest_context(artifacts: Iterable[Artifacts]) -> Context:
    """Return the shortest context of all artifacts: every one of them answers the same prompts."""
    folders = [variant.exports / target for found in artifacts for variant, target in found]
    return min((Context(context_of_artifact(folder), str(folder)) for folder in folders), key=lambda each: each.tokens)


def _require_sequences_fit(artifacts: Artifacts, eval_set: EvalSet) -> None:
    """Refuse evaluation sequences that are longer than an artifact's context.

    Raises:
        UsageError: names the artifact.
    """
    longest = max(len(sequence.ids) for sequence in eval_set.sequences)
    for variant, target in artifacts:
        folder = variant.exports / target
        context = context_of_artifact(folder)
        if longest > context:
            raise UsageError(
                f"--window: the longest evaluation sequence has {longest} tokens, and {folder} holds {context}. Give a "
                "smaller one, or export with a longer --context-length."
            )


def _set_by_profiles(options: ValidateOptions, options_by_device: Iterable[ValidateOptions]) -> set[str]:
    """Return the options that differ between devices. config.yaml leaves them out: --device-profile sets them again."""
    shared = vars(options)
    return {k for each in options_by_device for k, value in vars(each).items() if value != shared[k]} - {"profile"}


def _run_torch(run: Run, evaluator: Evaluator, artifacts: Iterable[Artifacts], is_reported: bool) -> TorchResults:
    """Run everything that needs no device.

    Args:
        run: the run.
        evaluator: measures the models.
        artifacts: those of each device.
        is_reported: whether this machine has a report of its own, and so measures the artifacts anyway.
    """
    name = FINE_TUNED if run.is_trained else UNTRAINED
    reference = evaluator.measure_reference(merge.merged_model(run.reference).model, name)
    models = [evaluator.measure_base(merge.base_model(run.reference)), reference] if run.is_trained else [reference]
    floor = evaluator.measure_noise_floor(run.quantized)

    # The error budget needs the trained forward pass, and the artifacts' logits on this machine as a step of their own.
    side = None
    if evaluator.options.error_budget:
        from qat_edge.diagnose.error_budget import compute_torch_budget, score_on_this_machine

        own = list(dict.fromkeys(target for found in artifacts for variant, target in found if variant is run))
        side = compute_torch_budget(run, evaluator, models, own)
        if not is_reported:
            score_on_this_machine(run, evaluator, own)
    return TorchResults(_identities(run, evaluator), models, floor, side)


def _measure(
    run: Run, artifacts: Artifacts, device: str, transport: Transport, evaluator: Evaluator, torch_results: TorchResults
) -> Report:
    """Measure every artifact on one device and check the gates."""
    options = evaluator.options
    # The torch models ran once, on this machine: reports of other devices have them without their speed.
    measured = [model if device == LOCAL else _without_speed(model) for model in torch_results.models]
    measured += [_artifact(variant, target, transport, evaluator, own=variant is run) for variant, target in artifacts]

    # Only the run's own artifacts have an error budget: PTQ variants were not trained.
    budgets = []
    if torch_results.budget is not None and options.error_budget:
        from qat_edge.verbs.artifact_budget import artifact_budget

        own = [target for variant, target in artifacts if variant is run]
        budgets = [artifact_budget(run, target, transport, evaluator, torch_results.budget) for target in own]

    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        machine=dataclasses.asdict(transport.info()),
        options=config.plain(options),
        tokens=evaluator.eval_set.tokens,
        noise_floor=torch_results.noise_floor,
        measured=measured,
        gates=check_gates(options, measured, budgets, evaluator.eval_set.notes),
        budgets=budgets,
        identities=torch_results.identities,
    )


def _artifact(variant: Variant, target: str, transport: Transport, evaluator: Evaluator, own: bool) -> Measurement:
    """Measure one artifact on one device, in the device's runtime or in the runner that the user built."""
    artifact_sha256 = sha256(variant.exports / target / MANIFEST)
    if evaluator.options.runner_binary is None:
        measured = evaluator.measure_artifact(variant, target, transport, own)
    else:
        from qat_edge.evaluate import native_runner

        binary = native_runner.require_supported(evaluator.options)
        measured = native_runner.measure(evaluator, binary, variant, target, transport, own)
    return dataclasses.replace(measured, artifact_sha256=artifact_sha256)


def _identities(run: Run, evaluator: Evaluator) -> dict[str, str]:
    """Return digests of what the figures of two runs must share to be compared; see `Report`."""
    eval_set, manifest = evaluator.eval_set, read_manifest(run.reference)
    weights = {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}
    base = manifest["model"]["identity"]
    parts = {
        "tokens": [(sequence.ids, sequence.positions) for sequence in eval_set.sequences],
        "prompts": [eval_set.identity, evaluator.options.max_new_tokens],
        "reference": [base.get("files") or base, manifest.get("kept_layers"), weights],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _without_speed(model: Measurement) -> Measurement:
    """Return a torch model for the report of a device that it did not run on."""
    if model.speed is None:
        return model
    return dataclasses.replace(model, speed=None, notes=(*model.notes, NOT_THERE))


def _why_not(target: str, options: ValidateOptions) -> str:
    """Return why an artifact cannot be measured with these options, as a sentence; empty where it can."""
    if options.runner_binary is not None:
        from qat_edge.evaluate import native_runner

        return native_runner.unsupported_reason(target)
    return target_named(target).runs_elsewhere


def _artifacts_by_target(run: Run, options_by_device: Iterable[ValidateOptions]) -> dict[tuple[str, ...], Artifacts]:
    """Return the artifacts to measure, by the value of --target: profiles may choose different ones."""
    chosen = {options.target: options for options in options_by_device}
    return {target: _artifacts(run, options) for target, options in chosen.items()}


def _artifacts(run: Run, options: ValidateOptions) -> Artifacts:
    """Return the artifacts to measure: those of --target, or all that can run.

    Raises:
        RunError: one of --target cannot run or was not exported, none is left, or a folder is not as it was written.
        ArtifactError: an artifact was exported with other options than its manifest says.
    """
    chosen = options.target or run.targets()
    for target in () if options.target else chosen:
        require_known(run.exports / target)
    reasons = {target: reason for target in chosen if (reason := _why_not(target, options))}
    for reason in reasons.values():
        if options.target:
            raise RunError(f"{reason} Leave it out of --target.")
        progress.warn(f"Left out {reason}")

    wanted = [target for target in chosen if target not in reasons]
    missing = [target for target in wanted if target not in run.targets()]
    if missing or not wanted:
        what = f"{', '.join(missing)} not exported yet" if missing else "nothing exported yet"
        raise RunError(f"{run.exports}: {what}. Run `{export_targets(run.path, missing)}`.")

    found = [(variant, target) for variant in run.variants() for target in wanted if target in variant.targets()]
    for variant, target in found:
        variant.require_current(target)
        check_files(variant.quantized)
        check_files(variant.exports / target)
        options_of_artifact(variant.exports / target)
    return found
