"""Run every artifact in its own runtime, in a process of its own, and compare it with the FP32 fine-tune.

Everything is compared in token ids, teacher-forced, on the tokens that training would put loss on. Beside
the comparison with FP32 stands `parity`: the same artifact against the frozen checkpoint in torch, which
an exact runtime matches down to the arithmetic noise floor (the checkpoint against itself, disturbed).
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path

from qat_edge import adapters, config, data, tokenizer
from qat_edge.config import FinetuneOptions, ValidateOptions
from qat_edge.errors import DataError, DeviceError, RunError
from qat_edge.gates import hold
from qat_edge.measure import Bench, Material
from qat_edge.results import Report, save
from qat_edge.rows import load_rows
from qat_edge.run import MANIFEST, Run, Variant, disk_errors, read_manifest, sha256
from qat_edge_devices import open_transport
from qat_edge_devices.errors import DeviceError as TransportLevelError
from qat_edge_devices.transport import Transport

Say = Callable[[str], None]
DEVICE = "local"


def validate(run: Run, options: ValidateOptions, say: Say, force: bool = False) -> Report:
    """Measure the run's artifacts and its baseline's on this machine; write RUN/reports/local.json.

    Raises:
        RunError: nothing exported, or a report exists and `force` is not set.
        DataError: no evaluation rows.
        DeviceError: a runtime failed.
    """
    path = run.reports / f"{DEVICE}.json"
    if path.exists() and not force:
        raise RunError(f"{path} exists already. Give --force to measure again.")
    artifacts = _artifacts(run, options)
    material = _material(run, options, say)
    with _scratch(run) as scratch, _device_errors(), closing(open_transport(DEVICE)) as transport:
        report = _measure(run, artifacts, transport, Bench(material, options, scratch, say))
    save(report, path)
    config.save(run.config, "validate", options)
    return report


def _measure(run: Run, artifacts: list[tuple[Variant, str]], transport: Transport, bench: Bench) -> Report:
    tuned = bench.fine_tuned(adapters.merged_model(run.reference, bench.say)[0])
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
    found: list[tuple[Variant, str]] = [(v, t) for v in (run, run.baseline) for t in wanted if t in v.targets()]
    for variant, target in found:
        made_of = read_manifest(variant.exports / target)["quantized_sha256"]
        if made_of != sha256(variant.quantized / MANIFEST):
            raise RunError(
                f"{variant.exports / target} was exported from an earlier {variant.quantized}. "
                f"Export again: `qat-edge export {run.path} --force`."
            )
    return found


def _material(run: Run, options: ValidateOptions, say: Say) -> Material:
    words = tokenizer.load(run.quantized)
    trained = config.load(FinetuneOptions, "finetune", run.config, {})
    source = options.text or options.eval_data or trained.eval_data
    if source is None:
        raise DataError("No evaluation rows: finetune had no --eval-data. Give validate --eval-data FILE.")
    rows = load_rows(source, "eval")
    sequences = data.scored_ids(rows, words, options.window, options.tokens)
    answered = options.eval_data or trained.eval_data
    if answered and answered != source:
        rows = load_rows(answered, "eval")
    prompts = list(islice(data.prompts(rows, words), options.prompts)) if answered else []
    eos_ids = tokenizer.end_tokens(run.quantized)
    pad_id = eos_ids[0] if words.pad_token_id is None else words.pad_token_id
    material = Material(sequences, prompts, eos_ids, pad_id, words)
    say(f"Comparing {material.tokens} tokens in {len(sequences)} sequences, and {len(prompts)} answers, from {source}")
    return material


@contextmanager
def _scratch(run: Run) -> Iterator[Path]:
    """A folder for logits on the run's own disk, gone at the end."""
    with disk_errors(run.path), tempfile.TemporaryDirectory(prefix=".validate-", dir=run.path) as name:
        yield Path(name)


@contextmanager
def _device_errors() -> Iterator[None]:
    """The devices package knows nothing of ours: translate the root of its error tree."""
    try:
        yield
    except TransportLevelError as error:
        raise DeviceError(str(error)) from error
