"""Error budget: the cost of each step from the FP32 fine-tune to an artifact on a device, and of each quantized part.

    fine-tune -> trained forward -> frozen checkpoint -> (the runtime's own rounding) -> artifact here -> on the device

The log perplexities of the steps differ by nats per token that add up exactly; KL, top-1 and SQNR are given relative to
the previous step and to the fine-tune. A part that is unquantized has the fine-tune's float parameters in place of the
rounded ones. Keys and values are float in the checkpoint; the cost of an int8 cache is a step of its own.

Logits are streamed by sequence: memory does not grow with the evaluation data, and disk use does by one store a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qat_edge import progress
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import fault_test
from qat_edge.diagnose.fault_test import Errors
from qat_edge.diagnose.runtime_rounding import Rounding, artifact_rounding, emulate_rounding
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import LOCAL, transport_name
from qat_edge.evaluate.evaluator import FLOOR_TOKENS, Evaluator, as_agreement
from qat_edge.evaluate.metrics import LogitComparison, LogitMetrics
from qat_edge.evaluate.reference import Logits, LogitStore
from qat_edge.evaluate.results import Agreement, Budget, FaultTest, Measurement, Part, Step
from qat_edge.models import merge
from qat_edge.quant import fake, frozen
from qat_edge.quant.scheme import Scheme
from qat_edge.run import Run
from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import DeviceLayerError
from qat_edge_devices.processor import Processor, this_processor
from qat_edge_devices.transport import Transport
from qat_edge_exporters.targets import target_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# "head" is the weight and the input of the head; "weights" and "activations" are those of every other linear layer.
# Norms and biases belong to "weights": a method may have moved a factor from one to the other.
PARTS = ("weights", "activations", "embedding", "head")
SEEDS = 3  # of the noise floor
TRAINED, FROZEN = "trained forward, fake-quantized", "frozen checkpoint"
HOST, DEVICE = "artifact on this machine", "artifact on the device"
# Transport -> kinds of processors behind it; others can have each of REMOTE, which shows when they are connected.
PROCESSORS = {"browser": {Processor.WASM}, "browser-webgpu": {Processor.OTHER}}
REMOTE = {Processor.X86, Processor.ARM, Processor.ARM_WITHOUT_DOT_PRODUCT, Processor.OTHER}


@dataclass(frozen=True)
class FaultReference:
    """Reference of the fault test for one kind of rounding.

    Attributes:
        logits: of the frozen checkpoint, one array per prompt.
        noise: errors of the same model under disturbance.
    """

    logits: list[Logits]
    noise: Errors


@dataclass(frozen=True)
class TorchBudget:
    """The parts of the error budget that are computed in torch, once for all devices.

    Attributes:
        steps: from the base model to the frozen checkpoint.
        frozen_divergence: see `Budget`.
        prompts: of the fault test.
        expected: references of the fault test, by `_reference_key`; "" for as trained.
        parts: see `Budget`.
        floor: see `Budget`.
        floor_nats: see `Budget`.
        roundings: by target whose runtime rounds differently, on some machine.
        rounded: by target whose runtime rounds differently on this machine, the checkpoint's logits with that rounding.
    """

    steps: list[Step]
    frozen_divergence: str
    prompts: list[ScoredIds]
    expected: dict[str, FaultReference]
    parts: list[Part]
    floor: list[Agreement]
    floor_nats: list[float]
    roundings: dict[str, Rounding]
    rounded: dict[str, LogitStore]


def compute_torch_budget(
    run: Run, evaluator: Evaluator, measured: Sequence[Measurement], targets: Iterable[str]
) -> TorchBudget:
    """Compute everything in the error budget that needs no device.

    Args:
        run: whose checkpoint and artifacts are explained.
        evaluator: has the logits of the FP32 fine-tune and of the frozen checkpoint.
        measured: the FP32 base and the FP32 fine-tune, or one model where nothing was trained.
        targets: of the run's own artifacts.

    Raises:
        RunError: the adapter, the base model or the checkpoint has changed.
    """
    progress.info(
        "Error budget, in torch: the trained forward, the checkpoint with one part unquantized at a time, and the "
        f"noise floor of {SEEDS} seeds"
    )
    # Measured already, before the error budget: their logits are in the evaluator's stores.
    base, tuned = measured[0], measured[-1]
    steps = [
        Step("FP32 base", base.perplexity, base.agreement, None),
        Step("FP32 fine-tuned", tuned.perplexity, None, base.agreement),
    ]
    floor = list(noise_floor(run.quantized, evaluator))
    checkpoint_steps, frozen_divergence = _checkpoint_steps(run, evaluator, floor)

    # The fault test compares with the checkpoint as trained, and as each runtime rounds it.
    prompts = fault_test.short_prompts(evaluator.eval_set.sequences)
    roundings = _runtime_roundings(run, targets)
    references = {
        _reference_key(target, rounding, processor): rounding.on(processor)
        for target, rounding in roundings.items()
        for processor in _processors(evaluator.options.device)
    }
    references[""] = Rounding()
    return TorchBudget(
        steps=steps + checkpoint_steps,
        frozen_divergence=frozen_divergence,
        prompts=prompts,
        expected={key: _fault_reference(run, prompts, one) for key, one in references.items()},
        parts=list(_measure_parts(run, evaluator)),
        floor=[as_agreement(metrics) for metrics in floor],
        floor_nats=[math.log(metrics.perplexity / metrics.perplexity_reference) for metrics in floor],
        roundings=roundings,
        rounded=_rounded_logits(run, evaluator, roundings),
    )


def score_on_this_machine(run: Run, evaluator: Evaluator, targets: Iterable[str]) -> None:
    """Record the logits of the run's own artifacts on this machine, for reports about other devices only.

    An artifact that does not run here leaves this step out of its budget instead of failing the other devices.
    """
    with closing(open_transport(LOCAL)) as transport:
        for target in targets:
            folder = run.exports / target
            progress.info(f"Scoring {folder} on this machine, a step of the error budget")
            try:
                target_named(target).check(folder)
                for index, logits in evaluator.score_artifact(folder, target, transport):
                    evaluator.artifact_logits(LOCAL, target).put(index, logits)
            except DeviceLayerError as error:
                progress.warn(f"  left out of the error budget: {error}")


def run_fault_test(run: Run, evaluator: Evaluator, torch: TorchBudget, target: str, transport: Transport) -> FaultTest:
    """Test whether the run's own artifact on a device differs from the frozen checkpoint by more than rounding."""
    # The reference rounds as the runtime does on that device's processor.
    rounding = torch.roundings.get(target, Rounding())
    expected = torch.expected[_reference_key(target, rounding, transport.info().processor)]

    prompts = replace(evaluator, eval_set=replace(evaluator.eval_set, sequences=torch.prompts))
    scored = prompts.score_artifact(run.exports / target, target, transport, fault_test.DECODED_FROM)
    errors = fault_test.errors_db(expected.logits, (logits for _, logits in scored))
    return fault_test.compare_errors(errors, expected.noise)


def _processors(devices: Iterable[str]) -> set[Processor]:
    """Return the kinds of processors that devices can have, given as --device names them."""
    names = {transport_name(device) for device in devices} - {LOCAL}
    return {this_processor()}.union(*(PROCESSORS.get(name, REMOTE) for name in names))


def _reference_key(target: str, rounding: Rounding, processor: Processor) -> str:
    """Return the key in `TorchBudget.expected` of a target's artifact on a processor of that kind."""
    if rounding.on(processor).is_as_trained:
        return ""
    return f"{target}, {processor}" if processor in rounding.others else target


def budget(evaluator: Evaluator, torch: TorchBudget, target: str, device: str, result: FaultTest) -> Budget:
    """Assemble the error budget of one of the run's own artifacts on one device.

    Args:
        evaluator: has the artifact's logits on the device and on this machine.
        torch: the parts computed in torch.
        target: of the artifact.
        device: as --device names it.
        result: of the artifact's fault test.
    """
    # The logits of every state from the frozen checkpoint on, in order.
    stores = {FROZEN: evaluator.frozen_logits}
    if target in torch.rounded:
        stores[torch.roundings[target].on(this_processor()).name] = torch.rounded[target]
    here = evaluator.artifact_logits(LOCAL, target)
    if len(list(here.folder.iterdir())) == len(evaluator.eval_set.sequences):  # else it failed on this machine
        stores[HOST] = here
    if device != LOCAL:
        stores[DEVICE] = evaluator.artifact_logits(device, target)

    # Each change is relative to the previous store, so that the nats of all steps add up.
    steps = list(torch.steps)
    for before, name in pairwise(stores):
        change = compare_stores(evaluator, stores[before], stores[name])
        total = compare_stores(evaluator, evaluator.fp32_logits, stores[name])
        steps.append(Step(name, total.perplexity, as_agreement(total), as_agreement(change)))
    return Budget(target, result, torch.frozen_divergence, steps, torch.parts, torch.floor, torch.floor_nats)


def compare(evaluator: Evaluator, logits: Iterable[Logits], stores: Sequence[LogitStore]) -> list[LogitMetrics]:
    """Compare the logits of each sequence with those in several stores.

    Args:
        evaluator: has the sequences.
        logits: one array a sequence, read once.
        stores: the first is the reference of `logits`; `logits` are the reference of the others.
    """
    comparisons = [LogitComparison() for _ in stores]
    for index, (rows, sequence) in enumerate(zip(logits, evaluator.eval_set.sequences, strict=True)):
        for number, (comparison, store) in enumerate(zip(comparisons, stores, strict=True)):
            stored = store.get(index)
            # KL is not symmetric: the earlier state is always the reference.
            if number == 0:
                comparison.add(stored, rows, sequence.targets)
            else:
                comparison.add(rows, stored, sequence.targets)
    return [comparison.result() for comparison in comparisons]


def compare_stores(evaluator: Evaluator, one: LogitStore, other: LogitStore) -> LogitMetrics:
    """Compare two stores of all sequences; `one` is the reference."""
    logits = (other.get(index) for index in range(len(evaluator.eval_set.sequences)))
    return compare(evaluator, logits, [one])[0]


def noise_floor(quantized: Path, evaluator: Evaluator) -> Iterator[LogitMetrics]:
    """Compare the frozen checkpoint with itself under disturbance, on the first tokens; yield metrics per seed."""
    model, part = reference.load_exact(quantized), evaluator.first_tokens(FLOOR_TOKENS)
    for seed in range(SEEDS):
        with reference.disturbed(model, seed):
            logits = reference.compared_logits(model, part.eval_set.sequences)
            yield compare(part, logits, [evaluator.frozen_logits])[0]


def inputs_rounded_without(names: Sequence[str], scheme: Scheme, part: str) -> list[str]:
    """Return the modules whose input is rounded while a part is unquantized."""
    return [name for name in names if part != ("head" if name == scheme.head else "activations")]


@contextmanager
def part_unquantized(model: nn.Module, tuned: nn.Module, scheme: Scheme, part: str) -> Iterator[None]:
    """Replace the parameters of a part by the fine-tune's inside the block.

    Args:
        model: from `reference.load_dequantized`.
        tuned: the fine-tune, with parameters of the same names and shapes.
        scheme: of the model.
        part: one of PARTS; "activations" has no parameters, see `inputs_rounded_without`.
    """
    part_of = {f"{scheme.embedding}.weight": "embedding", f"{scheme.head}.weight": "head"}
    replaced = {name: p for name, p in model.named_parameters() if part_of.get(name, "weights") == part}
    try:
        for name in replaced:
            _set_parameter(model, name, tuned.get_parameter(name))
        yield
    finally:
        for name, parameter in replaced.items():
            _set_parameter(model, name, parameter)


def _checkpoint_steps(run: Run, evaluator: Evaluator, floor: Sequence[LogitMetrics]) -> tuple[list[Step], str]:
    """Measure the trained forward and the frozen checkpoint.

    Returns:
        Both steps, and `Budget.frozen_divergence`.
    """
    # One pass over the trained forward is compared with both neighbours: its logits are never on disk.
    trained = merge.fake_quantized_model(run.adapter)
    logits = reference.compared_logits(trained, evaluator.eval_set.sequences)
    stores = [evaluator.fp32_logits, evaluator.frozen_logits]
    training, freezing = compare(evaluator, logits, stores)
    total = compare_stores(evaluator, evaluator.fp32_logits, evaluator.frozen_logits)
    steps = [
        Step(TRAINED, training.perplexity, as_agreement(training), as_agreement(training)),
        Step(FROZEN, total.perplexity, as_agreement(total), as_agreement(freezing)),
    ]

    # Freezing changes nothing but float rounding: a larger difference is located.
    if freezing.kl_nats <= max(metrics.kl_nats for metrics in floor):
        return steps, ""
    return steps, _first_divergence(run, trained, evaluator.eval_set.sequences[0])


def _runtime_roundings(run: Run, targets: Iterable[str]) -> dict[str, Rounding]:
    """Return the rounding of each target whose runtime rounds differently from the checkpoint."""
    roundings: dict[str, Rounding] = {}
    for target in targets:
        rounding = artifact_rounding(run.exports / target, target)
        if rounding is not None:
            roundings[target] = rounding
    return roundings


def _rounded_logits(run: Run, evaluator: Evaluator, roundings: Mapping[str, Rounding]) -> dict[str, LogitStore]:
    """Compute the frozen checkpoint's logits with each rounding that runtimes apply on this machine."""
    stores: dict[str, LogitStore] = {}
    for target, rounding in roundings.items():
        # Between checkpoint and artifact on this machine: elsewhere its runtime may round otherwise.
        here = rounding.on(this_processor())
        if here.is_as_trained:
            continue
        stores[target] = LogitStore(evaluator.scratch / f"rounded-{target}")
        model, names = reference.load_dequantized(run.quantized)
        with emulate_rounding(model, names, here):
            reference.score(model, evaluator.eval_set.sequences, stores[target], lambda done: None)
    return stores


def _fault_reference(run: Run, prompts: Sequence[ScoredIds], rounding: Rounding) -> FaultReference:
    """Compute the frozen checkpoint's logits for the prompts, and its noise, under the given rounding."""
    model, names = reference.load_dequantized(run.quantized)
    with emulate_rounding(model, names, rounding):
        logits = list(reference.compared_logits(model, prompts))
        return FaultReference(logits, fault_test.noise_db(model, prompts, logits))


def _first_divergence(run: Run, trained: PreTrainedModel, sequence: ScoredIds) -> str:
    """Describe the first layer at which the frozen checkpoint diverges from the trained forward."""
    exact, ids = reference.load_exact(run.quantized), sequence.ids[: fault_test.LENGTH]
    names = frozen.read_scheme(run.quantized).linears

    def compute() -> None:
        next(reference.compared_logits(trained, [sequence]))

    # The fake-quantized model runs `sequence` once; only its first tokens are compared.
    recorded = fault_test.trace(fake.base_of(trained), names, compute)
    candidate = {name: (inputs[: len(ids)], outputs[: len(ids)]) for name, (inputs, outputs) in recorded.items()}
    divergence = fault_test.find_divergence(exact, [(ids, candidate)])
    return str(divergence) if divergence else "no single layer: the difference accumulates over many"


def _measure_parts(run: Run, evaluator: Evaluator) -> Iterator[Part]:
    """Measure the frozen checkpoint with one part at a time as in the fine-tune."""
    scheme = frozen.read_scheme(run.quantized)
    model, names = reference.load_dequantized(run.quantized)
    tuned = merge.float_model(run.reference, run.quantized)
    for part in PARTS:
        # Weights are replaced by the fine-tune's; inputs are simply not rounded.
        rounded = inputs_rounded_without(names, scheme, part)
        with part_unquantized(model, tuned, scheme, part), emulate_rounding(model, rounded, Rounding()):
            logits = reference.compared_logits(model, evaluator.eval_set.sequences)
            metrics = compare(evaluator, logits, [evaluator.fp32_logits])[0]
        yield Part(part, metrics.perplexity, as_agreement(metrics))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
