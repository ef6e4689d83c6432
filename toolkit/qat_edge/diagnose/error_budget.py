"""The error budget: what each step from the FP32 fine-tune to an artifact on a device costs, and each part of rounding.

    fine-tune -> trained forward -> frozen checkpoint -> (inputs rounded as the runtime does) -> artifact here -> there

Log perplexities of the steps differ by nats per token that add up exactly; KL, top-1 and SQNR are given against the
step before and against the fine-tune. A part that is off is the fine-tune's own: its floats take the place of what was
rounded. Keys and values are float in the checkpoint; what an int8 cache costs is a step of its own.

All of it is streamed over the sequences: memory does not grow with the evaluation, disk does by one store a step.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from qat_edge import progress
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import fault_test
from qat_edge.diagnose.fault_test import Errors
from qat_edge.diagnose.runtime_rounding import Rounding, of_artifact, rounding_as
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import LOCAL
from qat_edge.evaluate.evaluator import FLOOR_TOKENS, Bench, agreement
from qat_edge.evaluate.metrics import Comparison, LogitComparison
from qat_edge.evaluate.reference import Logits, LogitStore
from qat_edge.evaluate.results import Agreement, Budget, Judgement, Measured, Part, Step
from qat_edge.models import merge
from qat_edge.quant import fake, frozen
from qat_edge.quant.scheme import Scheme
from qat_edge.run import Run
from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import DeviceError as TransportLevelError
from qat_edge_devices.transport import Transport

# The head's part is its weight and its input; weights and activations are those of every other linear layer. Norms and
# biases go with the weights: a method may have moved a factor from one to the other.
PARTS = ("weights", "activations", "embedding", "head")
SEEDS = 3  # of the noise floor
TRAINED, FROZEN = "trained forward, fake-quantized", "frozen checkpoint"
HOST, DEVICE = "artifact on this machine", "artifact on the device"


@dataclass(frozen=True)
class Expected:
    """Logits for each prompt, and the errors of the same model disturbed."""

    rows: list[Logits]
    floor: Errors


@dataclass(frozen=True)
class TorchSide:
    """What torch says once for all devices.

    steps: up to the frozen checkpoint. converted: see `Budget`. prompts: what `judge` asks; expected: what the
    checkpoint says to them where it rounds as the runtime of a target does, "" for as it was trained. roundings: by
    target whose runtime rounds otherwise; rounded: the checkpoint's logits then, where it is so on this machine.
    """

    steps: list[Step]
    converted: str
    prompts: list[ScoredIds]
    expected: dict[str, Expected]
    parts: list[Part]
    floor: list[Agreement]
    floor_nats: list[float]
    roundings: dict[str, Rounding]
    rounded: dict[str, LogitStore]


def torch_side(run: Run, bench: Bench, measured: Sequence[Measured], targets: Iterable[str]) -> TorchSide:
    """What no device is needed for. measured: the FP32 base and fine-tune, whose logits `bench` holds already.

    Raises:
        RunError: the adapter, the base model or the checkpoint is not as it was.
    """
    progress.info("  error budget: the trained forward, each part of the rounding switched off, the noise floor")
    base, tuned = measured
    steps = [
        Step("FP32 base", base.perplexity, base.agreement, None),
        Step("FP32 fine-tuned", tuned.perplexity, None, base.agreement),
    ]
    trained = merge.rounding_model(run.adapter)
    said = reference.rows(trained, bench.material.sequences)
    against_tuned, after_freezing = compare(bench, said, [bench.fp32, bench.exact])
    whole = compare_stores(bench, bench.fp32, bench.exact)
    steps.append(Step(TRAINED, against_tuned.perplexity, agreement(against_tuned), agreement(against_tuned)))
    steps.append(Step(FROZEN, whole.perplexity, agreement(whole), agreement(after_freezing)))
    floor = list(noise_floor(run.quantized, bench))
    beyond = after_freezing.kl_nats > max(found.kl_nats for found in floor)
    converted = _first_parting(run, trained, bench.material.sequences[0]) if beyond else ""
    del trained
    prompts = fault_test.probes(bench.material.sequences)
    roundings = {t: found for t in targets if (found := of_artifact(run.exports / t, t)) is not None}
    return TorchSide(
        steps=steps,
        converted=converted,
        prompts=prompts,
        expected={key: _expected(run, prompts, found) for key, found in {"": Rounding(), **roundings}.items()},
        parts=list(_parts_off(run, bench)),
        floor=[agreement(found) for found in floor],
        floor_nats=[math.log(found.perplexity / found.perplexity_reference) for found in floor],
        roundings=roundings,
        rounded={
            target: _rounded_store(run, bench, target, found)
            for target, found in roundings.items()
            if found.applies(platform.machine())
        },
    )


def score_here(run: Run, bench: Bench, targets: Iterable[str]) -> None:
    """Keep the logits of the run's own artifacts on this machine, where no report about it does.

    An artifact that does not run here leaves that step out of its budget: it is the other devices that were asked for.
    """
    with closing(open_transport(LOCAL)) as transport:
        for target in targets:
            progress.info(f"Scoring {run.exports / target} on this machine, for the error budget")
            try:
                for index, logits in bench.artifact_rows(run.exports / target, target, transport):
                    bench.kept(LOCAL, target).put(index, logits)
            except TransportLevelError as error:
                progress.info(f"  left out of the budget: {error}")


def judge(run: Run, bench: Bench, torch: TorchSide, target: str, transport: Transport) -> Judgement:
    """Whether the run's own artifact on a device does more than round otherwise than the frozen checkpoint."""
    asked = replace(bench, material=replace(bench.material, sequences=torch.prompts))
    rounding = torch.roundings.get(target)
    otherwise = rounding is not None and rounding.applies(transport.info().machine)
    expected = torch.expected[target if otherwise else ""]
    given = asked.artifact_rows(run.exports / target, target, transport, fault_test.DECODED_FROM)
    rows = (logits for _, logits in given)
    return fault_test.judge(fault_test.errors(expected.rows, rows), expected.floor)


def budget(bench: Bench, torch: TorchSide, target: str, device: str, judged: Judgement) -> Budget:
    """All steps of one artifact of the run on one device, whose logits `bench` has kept, as those on this machine."""
    stores = {FROZEN: bench.exact}
    if target in torch.rounded:
        stores[torch.roundings[target].name] = torch.rounded[target]
    here = bench.kept(LOCAL, target)
    if len(list(here.folder.iterdir())) == len(bench.material.sequences):  # it may have failed on this machine alone
        stores[HOST] = here
    if device != LOCAL:
        stores[DEVICE] = bench.kept(device, target)
    steps = list(torch.steps)
    for before, name in pairwise(stores):
        change = compare_stores(bench, stores[before], stores[name])
        whole = compare_stores(bench, bench.fp32, stores[name])
        steps.append(Step(name, whole.perplexity, agreement(whole), agreement(change)))
    return Budget(target, judged, torch.converted, steps, torch.parts, torch.floor, torch.floor_nats)


def compare(bench: Bench, rows: Iterable[Logits], against: Sequence[LogitStore]) -> list[Comparison]:
    """`rows`, the logits of each sequence in turn, against stores: the first is their reference, they the others'."""
    found = [LogitComparison() for _ in against]
    for index, (logits, sequence) in enumerate(zip(rows, bench.material.sequences, strict=True)):
        for place, (comparison, store) in enumerate(zip(found, against, strict=True)):
            pair = (store.get(index), logits) if place == 0 else (logits, store.get(index))
            comparison.add(*pair, sequence.targets)
    return [comparison.result() for comparison in found]


def compare_stores(bench: Bench, one: LogitStore, other: LogitStore) -> Comparison:
    """Two stores of all sequences, `one` the reference."""
    return compare(bench, (other.get(index) for index in range(len(bench.material.sequences))), [one])[0]


def noise_floor(quantized: Path, bench: Bench) -> Iterator[Comparison]:
    """The frozen checkpoint against itself, disturbed, on the first tokens; one comparison a seed."""
    model, part = reference.load_exact(quantized), bench.first_tokens(FLOOR_TOKENS)
    for seed in range(SEEDS):
        with reference.disturbed(model, seed):
            yield compare(part, reference.rows(model, part.material.sequences), [bench.exact])[0]


def _rounded_store(run: Run, bench: Bench, target: str, rounding: Rounding) -> LogitStore:
    """The frozen checkpoint's logits, rounded as the runtime of a target does."""
    store = LogitStore(bench.scratch / f"rounded-{target}")
    model, names = reference.load_dequantized(run.quantized)
    with rounding_as(model, names, rounding):
        reference.score(model, bench.material.sequences, store, lambda done: None)
    return store


def _expected(run: Run, prompts: Sequence[ScoredIds], rounding: Rounding) -> Expected:
    """What the frozen checkpoint says to prompts where it rounds so."""
    model, names = reference.load_dequantized(run.quantized)
    with rounding_as(model, names, rounding):
        rows = list(reference.rows(model, prompts))
        return Expected(rows, fault_test.noise(model, prompts, rows))


def _first_parting(run: Run, trained: Any, sequence: ScoredIds) -> str:
    """The first layer at which the frozen checkpoint parts from the trained forward, from equal inputs."""
    exact, ids = reference.load_exact(run.quantized), sequence.ids[: fault_test.LENGTH]
    names = frozen.read_scheme(run.quantized).linears
    candidate = fault_test.trace(fake.base_of(trained), names, lambda: next(reference.rows(trained, [sequence])))
    shown = {name: (x[: len(ids)], y[: len(ids)]) for name, (x, y) in candidate.items()}
    found = fault_test.first_parting(exact, [(ids, shown)])
    return str(found) if found else "no layer: what differs adds up from many"


def _parts_off(run: Run, bench: Bench) -> Iterator[Part]:
    """The frozen checkpoint with one part at a time as the fine-tune has it."""
    plan = frozen.read_scheme(run.quantized)
    model, names = reference.load_dequantized(run.quantized)
    tuned = merge.float_model(run.reference, run.quantized)
    for part in PARTS:
        with part_off(model, tuned, plan, part), rounding_as(model, rounded_without(names, plan, part), Rounding()):
            found = compare(bench, reference.rows(model, bench.material.sequences), [bench.fp32])[0]
        yield Part(part, found.perplexity, agreement(found))


def rounded_without(names: Sequence[str], plan: Scheme, part: str) -> list[str]:
    """Modules whose input is rounded while a part is off."""
    return [name for name in names if part != ("head" if name == plan.head else "activations")]


@contextmanager
def part_off(model: Any, tuned: Any, plan: Scheme, part: str) -> Iterator[None]:
    """Let the parameters of a part be those of the fine-tune, until the block ends."""
    owners = {f"{plan.embedding}.weight": "embedding", f"{plan.head}.weight": "head"}
    held = {name: p for name, p in model.named_parameters() if owners.get(name, "weights") == part}
    try:
        for name in held:
            _set(model, name, tuned.get_parameter(name))
        yield
    finally:
        for name, parameter in held.items():
            _set(model, name, parameter)


def _set(model: Any, name: str, parameter: Any) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
