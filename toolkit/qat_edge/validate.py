"""Run every artifact in its own runtime, in a process of its own, and compare it with the FP32 fine-tune.

Everything is compared in token ids, teacher-forced, on the tokens that training would put loss on. Beside
the comparison with FP32 stands `parity`: the same artifact against the frozen checkpoint in torch, which
an exact runtime matches down to the arithmetic noise floor (the checkpoint against itself, disturbed).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime

from qat_edge import adapters, config
from qat_edge.config import ValidateOptions
from qat_edge.errors import RunError
from qat_edge.measure.bench import Bench, device_errors, gather_material, scratch_folder
from qat_edge.measure.gates import hold
from qat_edge.measure.results import Report, save
from qat_edge.run import MANIFEST, Run, Variant, read_manifest, sha256
from qat_edge_devices import open_transport
from qat_edge_devices.transport import Transport

Say = Callable[[str], None]
DEVICE = "local"


def validate(run: Run, options: ValidateOptions, say: Say, force: bool = False) -> Report:
    """Measure the artifacts of the run and of its PTQ variants on this machine; write RUN/reports/local.json.

    Raises:
        RunError: nothing exported, or a report exists and `force` is not set.
        DataError: no evaluation rows.
        DeviceError: a runtime failed.
    """
    path = run.reports / f"{DEVICE}.json"
    if path.exists() and not force:
        raise RunError(f"{path} exists already. Give --force to measure again.")
    artifacts = _artifacts(run, options)
    material = gather_material(run, options, say)
    with scratch_folder(run) as scratch, device_errors(), closing(open_transport(DEVICE)) as transport:
        report = _measure(run, artifacts, transport, Bench(material, options, scratch, say))
    save(report, path)
    config.save(run.config, "validate", options)
    return report


def _measure(run: Run, artifacts: list[tuple[Variant, str]], transport: Transport, bench: Bench) -> Report:
    tuned = bench.fine_tuned(adapters.merged_model(run.reference, bench.say).model)
    measured = [bench.base(adapters.base_model(run.reference)), tuned]
    floor = bench.noise_floor(run.quantized)
    measured += [bench.artifact(variant, target, transport, own=variant is run) for variant, target in artifacts]
    return Report(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        device=DEVICE,
        machine=dataclasses.asdict(transport.info()),
        options=config.plain(bench.options),
        tokens=bench.material.tokens,
        noise_floor=floor,
        measured=measured,
        gates=hold(bench.options, measured),
    )


def _artifacts(run: Run, options: ValidateOptions) -> list[tuple[Variant, str]]:
    wanted = options.target or run.targets()
    missing = [t for t in wanted if t not in run.targets()]
    if missing or not wanted:
        raise RunError(f"{run.exports}: {', '.join(missing) or 'nothing'} exported. Do `qat-edge export {run.path}`.")
    found = [(v, t) for v in run.variants() for t in wanted if t in v.targets()]
    for variant, target in found:
        made_of = read_manifest(variant.exports / target)["quantized_sha256"]
        if made_of != sha256(variant.quantized / MANIFEST):
            raise RunError(
                f"{variant.exports / target} was exported from an earlier {variant.quantized}. "
                f"Export again: `qat-edge export {run.path} --force`."
            )
    return found
