"""Run every artifact in its own runtime, in a process of its own, and compare it with the FP32 fine-tune.

Everything is compared in token ids, teacher-forced, on the tokens that training would put loss on. Beside
the comparison with FP32 stands `parity`: the same artifact against the frozen checkpoint in torch, which
an exact runtime matches down to the arithmetic noise floor (the checkpoint against itself, disturbed).
The torch side is computed here, once, whatever devices the artifacts run on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from qat_edge import config, progress
from qat_edge.config import ValidateOptions
from qat_edge.diagnose import locate_fault
from qat_edge.diagnose.error_budget import TorchSide, budget, judge, score_here, torch_side
from qat_edge.errors import DeviceError, GateError, RunError, UsageError
from qat_edge.evaluate import native_runner
from qat_edge.evaluate.devices import LOCAL, connect, report_paths, side_by_side
from qat_edge.evaluate.evaluator import Bench, device_errors, gather_material, scratch_folder
from qat_edge.evaluate.gates import hold, require_gates, require_measurable
from qat_edge.evaluate.results import Agreement, Budget, Judgement, Measured, Report, save
from qat_edge.models import merge, tasks
from qat_edge.run import Run, Variant, read_manifest
from qat_edge.verbs.verify import verify_folder
from qat_edge_devices.transport import Transport
from qat_edge_exporters.executorch.backends.registry import runs_elsewhere

Say = Callable[[str], None]
Artifacts = list[tuple[Variant, str]]  # by their targets
DEVICE = LOCAL  # where nothing else is asked for
NOT_THERE = "speed not given: torch ran on the machine that validates, not on this device"


@dataclass(frozen=True)
class Validated:
    """What became of every device. failures: why there is no report, by device."""

    reports: list[Report]
    failures: dict[str, str]


@dataclass(frozen=True)
class Torch:
    """What torch said on this machine: the FP32 models, how far the frozen checkpoint parts from itself, and, where
    it was asked for, the torch side of the error budget. identities: see `Report`."""

    identities: dict[str, str]
    models: list[Measured]
    noise_floor: Agreement
    budget: TorchSide | None


def validate(run: Run, options: ValidateOptions, force: bool = False) -> Report:
    """Measure the artifacts of the run and of its PTQ variants on the one device of `options`.

    The report is RUN/reports/DEVICE.json.

    Raises:
        RunError: nothing exported, or a report exists and `force` is not set.
        DataError: no evaluation rows.
        DeviceError: the device cannot be reached, or a runtime failed there.
    """
    if len(options.device) != 1:
        raise UsageError(f"--device: expected one device, found {len(options.device)}.")
    validated = validate_devices(run, options, force=force)
    if validated.failures:
        require_success(validated)
    return validated.reports[0]


def validate_devices(
    run: Run, options: ValidateOptions, force: bool = False, own: Mapping[str, ValidateOptions] | None = None
) -> Validated:
    """The same on every device of `options`, side by side; a device that fails does not stop the others.

    own: by device what holds for it in place of `options`, by a profile of its own (`config.for_devices`).

    Raises:
        UsageError: a device is named twice, or is of no known kind.
        RunError, DataError: as `validate`.
    """
    tasks.require_generating(run, "validate")
    asked = {**dict.fromkeys(options.device, options), **(own or {})}
    paths = report_paths(run.reports, options.device)
    _require_possible(asked.values(), paths.values(), force)
    artifacts = _artifacts_by_target(run, asked.values())
    material = gather_material(run, options)
    with scratch_folder(run) as scratch, device_errors(), ExitStack() as stack:
        transports, failures = connect(options, stack)
        for device, reason in failures.items():
            progress.info(f"Left out {device}: {reason}")
        if not transports:
            return Validated([], failures)
        shared = dataclasses.replace(options, error_budget=any(one.error_budget for one in asked.values()))
        bench = Bench(material, shared, scratch)
        torch = _torch(run, bench, artifacts.values(), is_reported=LOCAL in transports)

        def measure(device: str, transport: Transport) -> Report:
            own_bench = dataclasses.replace(bench, options=asked[device])
            # Several devices report at the same time: each line then begins with its device's name.
            reporter = progress.current()
            reporter = reporter if len(transports) == 1 else progress.PrefixedReporter(device, reporter)
            with progress.report_to(reporter):
                report = _measure(run, artifacts[asked[device].target], device, transport, own_bench, torch)
            save(report, paths[device])
            return report

        reports, broken = side_by_side(transports, measure)
    config.save(run.config, "validate", options, left_out=_set_by_profiles(options, asked.values()))
    return Validated(list(reports.values()), failures | broken)


def require_success(validated: Validated) -> None:
    """Raise where a device failed or a limit was missed on one.

    Raises:
        DeviceError, GateError: all of it, by device.
    """
    missed = []
    for report in validated.reports:
        try:
            require_gates(report)
        except GateError as error:
            missed.append(f"{report.device}: {error}")
    if validated.failures:
        if len(validated.failures) == 1 and not validated.reports:
            raise DeviceError(*validated.failures.values())
        count = len(validated.failures)
        failed = [f"{device}: {reason}" for device, reason in validated.failures.items()]
        found = "\n".join([*failed, *missed])
        raise DeviceError(f"{count} of {count + len(validated.reports)} devices failed.\n{found}")
    if missed:
        raise GateError("\n".join(missed))


def _require_possible(asked: Iterable[ValidateOptions], paths: Iterable[Path], force: bool) -> None:
    """Refuse before any work what cannot be measured, or would replace a report."""
    for options in asked:
        require_measurable(options)
        if options.runner_binary is not None:
            native_runner.require_possible(options)
    for path in paths:
        if path.exists() and not force:
            raise RunError(f"{path} exists already. Give --force to measure again.")


def _set_by_profiles(options: ValidateOptions, asked: Iterable[ValidateOptions]) -> set[str]:
    """Options that are one device's own: left out of the run's configuration, its --device-profile gives them again."""
    shared = vars(options)
    return {k for one in asked for k, value in vars(one).items() if value != shared[k]} - {"profile"}


def _torch(run: Run, bench: Bench, artifacts: Iterable[Artifacts], is_reported: bool) -> Torch:
    """All that needs no device; is_reported: this machine has a report of its own, and so measures the artifacts."""
    own = list(dict.fromkeys(target for found in artifacts for variant, target in found if variant is run))
    tuned = bench.fine_tuned(merge.merged_model(run.reference).model)
    models = [bench.base(merge.base_model(run.reference)), tuned]
    floor = bench.noise_floor(run.quantized)
    side = torch_side(run, bench, models, own) if bench.options.error_budget else None
    if side is not None and not is_reported:
        score_here(run, bench, own)
    return Torch(_identities(run, bench), models, floor, side)


def _measure(run: Run, artifacts: Artifacts, device: str, transport: Transport, bench: Bench, torch: Torch) -> Report:
    measured = [model if device == LOCAL else _elsewhere(model) for model in torch.models]
    measured += [_artifact(variant, target, transport, bench, own=variant is run) for variant, target in artifacts]
    budgets = [
        _budget(run, target, transport, bench, torch.budget)
        for variant, target in artifacts
        if torch.budget is not None and bench.options.error_budget and variant is run
    ]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        machine=dataclasses.asdict(transport.info()),
        options=config.plain(bench.options),
        tokens=bench.material.tokens,
        noise_floor=torch.noise_floor,
        measured=measured,
        gates=hold(bench.options, measured, budgets),
        budgets=budgets,
        identities=torch.identities,
    )


def _artifact(variant: Variant, target: str, transport: Transport, bench: Bench, own: bool) -> Measured:
    """One artifact on one device, in the runtime there or in the user's own runner."""
    if bench.options.runner_binary is None:
        return bench.artifact(variant, target, transport, own)
    binary = native_runner.require_possible(bench.options)
    return native_runner.measure(bench, binary, variant, target, transport, own)


def _identities(run: Run, bench: Bench) -> dict[str, str]:
    """Digests of what figures of two runs must share to be compared; see `Report`."""
    material, reference = bench.material, read_manifest(run.reference)
    weights = {name: facts["sha256"] for name, facts in reference["files"].items() if name.endswith(".safetensors")}
    base = reference["model"]["identity"]
    parts = {
        "tokens": [(sequence.ids, sequence.positions) for sequence in material.sequences],
        "prompts": [material.prompts, bench.options.max_new_tokens],
        "reference": [base.get("files") or base, reference.get("kept_layers"), weights],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _budget(run: Run, target: str, transport: Transport, bench: Bench, torch: TorchSide) -> Budget:
    """The error budget of one artifact, with the place of a fault where there is one."""
    judged = judge(run, bench, torch, target, transport)
    if judged.beyond:
        judged = dataclasses.replace(judged, where=_fault(run, bench, torch, target, transport, judged))
        progress.info(f"  {target}: differs from the frozen checkpoint beyond rounding. {judged.where}")
    return budget(bench, torch, target, transport.name, judged)


def _fault(run: Run, bench: Bench, torch: TorchSide, target: str, transport: Transport, judged: Judgement) -> str:
    """What is known of the place of a fault: the file is read back, then looked into layer by layer."""
    folder = run.exports / target
    found = verify_folder(folder, target, run.quantized)
    told = f"The file is not what was frozen: {found.faults[0]}" if found.faults else ""
    if found.linears_equal < found.linears or not (found.embedding_equal and found.head_equal):
        return told
    # Position 0 has nothing to attend to.
    what = "attention (rotary angles, mask or cache)" if judged.position else "what the runtime makes of them"
    told = told or "Its codes and scales are those that were frozen"
    first = locate_fault.first_words(folder, target, run.quantized, torch, transport, bench.options.threads)
    return f"{told}. It parts at position {judged.position} of a prompt: {what}. {first}"


def _elsewhere(model: Measured) -> Measured:
    """A torch model in the report of a device it did not run on."""
    if model.speed is None:
        return model
    return dataclasses.replace(model, speed=None, notes=(*model.notes, NOT_THERE))


def _why_not(target: str, options: ValidateOptions) -> str:
    """Why an artifact cannot be measured as was asked, a sentence; empty where it can."""
    return runs_elsewhere(target) if options.runner_binary is None else native_runner.why_not(target)


def _artifacts_by_target(run: Run, asked: Iterable[ValidateOptions]) -> dict[tuple[str, ...], Artifacts]:
    """What to measure, by what --target was where: profiles may choose."""
    chosen = {options.target: options for options in asked}
    return {target: _artifacts(run, options) for target, options in chosen.items()}


def _artifacts(run: Run, options: ValidateOptions) -> Artifacts:
    elsewhere = {t: reason for t in options.target or run.targets() if (reason := _why_not(t, options))}
    for reason in elsewhere.values():
        if options.target:
            raise RunError(f"{reason} Leave it out of --target; verify reads its codes back.")
        progress.info(f"Left out {reason}")
    wanted = [t for t in options.target or run.targets() if t not in elsewhere]
    missing = [t for t in wanted if t not in run.targets()]
    if missing or not wanted:
        raise RunError(f"{run.exports}: {', '.join(missing) or 'nothing'} exported. Do `qat-edge export {run.path}`.")
    found = [(v, t) for v in run.variants() for t in wanted if t in v.targets()]
    for variant, target in found:
        variant.require_current(target, f"qat-edge export {run.path} --force")
    return found
