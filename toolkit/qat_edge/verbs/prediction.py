"""Predictions of `plan`, with units, and the comparison of artifacts with device profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qat_edge.options import ValidateOptions
from qat_edge_exporters.planned_size import PlannedFiles

MEGABYTE, GIGABYTE = 1e6, 1e9  # bytes


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by part.

    Attributes:
        embedding: Of the token embedding.
        linears: Weights of the linear layers between the ends.
        head: Of the output head; 0 where it shares the embedding's table.
        other: Norms, biases and everything else that stays float32.
        adapters: Of LoRA; 0 without.
        scales: Factors of learned scales; 0 without.
        tied: Embedding and head share a table in the artifacts.
    """

    embedding: int
    linears: int
    head: int
    other: int
    adapters: int
    scales: int
    tied: bool

    @property
    def model(self) -> int:
        """Parameters of the model itself."""
        return self.embedding + self.linears + self.head + self.other


@dataclass(frozen=True)
class PlannedLayer:
    """Scheme of one weight.

    Attributes:
        name: Module name.
        rows: Output features, or tokens of a table.
        width: Input features.
        bits: 2, 4 or 8.
        group_size: Weights per scale; the width means one scale per row.
        reason: Why it got something else than requested; empty where it did not.
    """

    name: str
    rows: int
    width: int
    bits: int
    group_size: int
    reason: str


@dataclass(frozen=True)
class SkippedModules:
    """Modules of one class that stay float32, since only linear layers and embeddings are quantized.

    Attributes:
        module_class: Name of the class.
        example: Name of one of them.
        parameters: Of all of them.
        share: The same as a part of the model's parameters, 0 to 1.
    """

    module_class: str
    example: str
    parameters: int
    share: float


@dataclass(frozen=True)
class TrainingMemory:
    """Peak memory of the training, in bytes.

    Attributes:
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the matrix products.
        batch_size: Rows of a batch.
        row_tokens: Tokens of a row.
        libraries: Memory of the process without any tensor; 0 on a GPU.
        base: Weights that are not trained, as they are stored, and buffers.
        trained: Adapters or weights that are trained, with factors of learned scales.
        optimizer: State of AdamW.
        step: Everything else at the peak: gradients, activations, temporaries; in QAT scales, codes and teacher, too.
        phase_1: Peak of a step of phase 1, libraries included; None without phase 1.
        initialization: Peak of a calibrated PTQ initialization, libraries included; None without one.
        qat: Peak of a step of QAT, libraries included; None without QAT.
    """

    device: str
    precision: str
    batch_size: int
    row_tokens: int
    libraries: int
    base: int
    trained: int
    optimizer: int
    step: int
    phase_1: int | None
    initialization: int | None
    qat: int | None

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return self.libraries + self.base + self.trained + self.optimizer + self.step


@dataclass(frozen=True)
class PlannedArtifact:
    """Predicted artifact of one target.

    Attributes:
        target: Its name.
        title: As reports write it.
        refused: Why the target cannot hold the model, as a sentence; empty where it can. Sizes are 0 then.
        files: Sizes in bytes by name, without the manifest.
        size_bytes: Of all files, as the gate --max-size-mb counts them.
        weight_bytes: Weights that computing one token reads.
        cache_bytes: KV cache of a full context.
        least_memory_bytes: Weights and cache: the memory of a runtime above its own is not less.
        most_tokens_per_s: Upper bound of the decode speed at a full context, from the bandwidth; None without one.
    """

    target: str
    title: str
    refused: str
    files: dict[str, int]
    size_bytes: int
    weight_bytes: int
    cache_bytes: int
    least_memory_bytes: int
    most_tokens_per_s: float | None


@dataclass(frozen=True)
class DeviceFit:
    """Comparison of one artifact with the gates of a device profile. A margin below 0 misses the gate.

    Attributes:
        profile: Its name.
        target: Of the artifact.
        size_margin_bytes: Largest permitted size less the predicted one; None without such a gate.
        memory_margin_bytes: Most permitted memory less the least that is needed; None without such a gate.
        decode_margin_tokens_per_s: Upper bound of the speed less the least permitted one; None without bandwidth.
        fits: No margin is below 0. Memory and speed are bounds: the device itself may still miss them.
    """

    profile: str
    target: str
    size_margin_bytes: int | None
    memory_margin_bytes: int | None
    decode_margin_tokens_per_s: float | None
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Everything that `plan` predicts.

    Attributes:
        model: Name of its source.
        context_length: Tokens of the KV cache, prompt and answer together.
        bandwidth_bytes_per_s: Memory bandwidth that decode speeds are for; None without one.
        parameters: By part.
        layers: Scheme of every quantized weight.
        skipped: Modules that stay float32.
        rotated: The weights are rotated at the start of QAT.
        kept_layers: Indices of the decoder layers after pruning; None without it. Those of a plan are the first ones.
        memory: Of the training.
        artifacts: By target.
        fits: Of each artifact with each device profile that names its target.
    """

    model: str
    context_length: int
    bandwidth_bytes_per_s: float | None
    parameters: Parameters
    layers: list[PlannedLayer]
    skipped: list[SkippedModules]
    rotated: bool
    kept_layers: list[int] | None
    memory: TrainingMemory
    artifacts: list[PlannedArtifact]
    fits: list[DeviceFit]


def describe_artifact(
    target: str, title: str, planned: PlannedFiles, context_length: int, bandwidth: float | None
) -> PlannedArtifact:
    """Return the prediction for one target.

    Args:
        target: Its name.
        title: As reports write it.
        planned: Its files.
        context_length: Tokens of the KV cache.
        bandwidth: Bytes per second; None where it is not known.
    """
    cache = planned.cache_bytes * context_length
    read = planned.read_bytes + cache
    return PlannedArtifact(
        target, title, "", planned.files, planned.size_bytes, planned.read_bytes, cache, read,
        None if bandwidth is None else bandwidth / read,
    )  # fmt: skip


def refused_artifact(target: str, title: str, reason: str) -> PlannedArtifact:
    """Return the record of a target that cannot hold the model."""
    return PlannedArtifact(target, title, reason, {}, 0, 0, 0, 0, None)


def compare(profile: str, gates: ValidateOptions, artifacts: Sequence[PlannedArtifact]) -> list[DeviceFit]:
    """Compare artifacts with the gates of a device profile."""
    found = []
    for each in artifacts:
        if each.refused or (gates.target and each.target not in gates.target):
            continue
        size = None if gates.max_size_mb is None else round(gates.max_size_mb * MEGABYTE) - each.size_bytes
        memory = gates.max_memory_mb
        room = None if memory is None else round(memory * MEGABYTE) - each.least_memory_bytes
        speed = None
        if gates.min_decode is not None and each.most_tokens_per_s is not None:
            speed = each.most_tokens_per_s - gates.min_decode
        fits = all(margin is None or margin >= 0 for margin in (size, room, speed))
        found.append(DeviceFit(profile, each.target, size, room, speed, fits))
    return found
