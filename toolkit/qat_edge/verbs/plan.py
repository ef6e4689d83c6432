"""Predict a training and its artifacts without loading weights: parameters, bits, memory, file sizes, device fit.

The model is built from its configuration on the meta device. Options, scheme and rotation are checked and chosen by the
functions that `finetune` uses, sizes by the targets.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qat_edge import config, option_paths, progress
from qat_edge.errors import ExportError, UsageError
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models import load
from qat_edge.models.layer_removal import keep_layers
from qat_edge.models.outline import Outline, read_outline
from qat_edge.models.positions import max_positions, require_positions
from qat_edge.options import (
    DEFAULT_CONTEXT,
    PROFILES,
    ExportOptions,
    FinetuneOptions,
    PlanOptions,
    ValidateOptions,
)
from qat_edge.quant import bits_file, scheme
from qat_edge.quant.codebook import SEQ
from qat_edge.quant.ptq.method_names import STORED
from qat_edge.quant.scheme import Scheme, shares_table
from qat_edge.run import Run
from qat_edge.train import model_options, prune, setup
from qat_edge.train.option_checks import check_combination, check_export_section, row_length
from qat_edge.train.rotated_outline import RotationOutcome, find_outcome
from qat_edge.train.training_memory import TrainingCount, count_training
from qat_edge.verbs import prediction
from qat_edge.verbs.frozen_outline import write_outline
from qat_edge.verbs.prediction import GIGABYTE, Parameters, Plan, PlannedArtifact, PlannedLayer, TrainingMemory
from qat_edge_exporters.planned_size import FrozenOutline
from qat_edge_exporters.targets import KV_CACHE_FLOAT, target_named

# Resident memory after the imports of finetune, before any tensor: torch 2.13 for the CPU, x86-64 Linux.
LIBRARIES_BYTES = 510_000_000
NOT_READ = "-"  # in the place of training rows, which a plan does not read


@dataclasses.dataclass(frozen=True)
class PlanRequest:
    """Resolved options of a plan.

    Attributes:
        training: Of finetune.
        exporting: Of export.
        profiles: Names or files of device profiles.
        bandwidth: Bytes per second; None where it is not known.
        kept_layers: Decoder layers that the run kept, if it is pruned; None otherwise.
    """

    training: FinetuneOptions
    exporting: ExportOptions
    profiles: tuple[str, ...]
    bandwidth: float | None
    kept_layers: list[int] | None = None


def resolve(
    source: str | None,
    own: PlanOptions,
    given: Mapping[str, Any],
    path: Path | None = None,
    write_flag: Callable[[str], str] | None = None,
) -> PlanRequest:
    """Resolve options from arguments, and from a configuration file or a run folder.

    Args:
        source: Hub id, model folder, .gguf file or run folder; None where the file has it.
        own: Options of the plan.
        given: Those of them that were given, by name; None for others.
        path: Configuration file with sections "finetune" and "export".
        write_flag: As in `config.load`.

    Raises:
        UsageError: An option is invalid, or a plan cannot be made with it.
    """
    run = None if source is None or not (Path(source) / "config.yaml").is_file() else Run.open(Path(source))
    if run is not None and path is not None:
        raise UsageError(f"{source} and --config {path}: the run has its own options. Give one of the two.")
    path = path if run is None else run.config
    sections = {} if path is None else config.read_sections(path)

    if source is None and "model" not in (sections.get("finetune") or {}):
        raise UsageError("No model to plan for: give MODEL or RUN, or 'finetune.model' in --config FILE.")

    # Training rows are not read, so nobody has to name them.
    training = {name: value for name, value in given.items() if name in _names(FinetuneOptions)}
    if source is not None and run is None:
        training["model"] = source
    if "data" not in (sections.get("finetune") or {}):
        training["data"] = NOT_READ
    options = config.load(FinetuneOptions, "finetune", path, training, write_flag)

    exported = {name: value for name, value in given.items() if name in _names(ExportOptions)}
    if "target" not in (sections.get("export") or {}) and exported.get("target") is None:
        exported["target"] = own.target
    exporting = config.load(ExportOptions, "export", path, exported, write_flag)
    check_export_section(options, exporting, path)
    bandwidth = None if own.bandwidth is None else own.bandwidth * GIGABYTE
    return PlanRequest(
        option_paths.absolute(options), exporting, own.profile or PROFILES, bandwidth, _recorded_layers(run)
    )


def plan(request: PlanRequest) -> Plan:
    """Predict a training and its artifacts.

    Raises:
        UsageError: An impossible combination of options, or one that a plan cannot be made for.
        ModelError: The model cannot be trained or exported, for any other reason than the values of its weights.
        ExportError: The model has fewer positions than the context length.
    """
    options = request.training
    _check(options, request.exporting)
    gates = {name: _gates(name) for name in request.profiles}
    prepared = _prepare(options, request.kept_layers)
    outline, weights, rotation = prepared.outline, prepared.weights, prepared.rotation
    context = _context_length(request.exporting, outline.model)

    with tempfile.TemporaryDirectory() as folder:
        frozen = write_outline(outline.model, outline.tokenizer, weights, rotation, Path(folder))
        artifacts = _artifacts(outline, frozen, weights, request, context)
    parts, layers = _parameters(outline.model, weights, frozen.tied), _layers(outline.model, weights)
    skipped = [prediction.SkippedModules(**dataclasses.asdict(m)) for m in scheme.float_modules(outline.model, layers)]

    # Last, because it changes the model.
    count = _count(prepared, options)
    return Plan(
        model=outline.name,
        context_length=context,
        bandwidth_bytes_per_s=request.bandwidth,
        parameters=dataclasses.replace(parts, adapters=count.adapter_parameters, scales=count.scale_parameters),
        layers=list(layers.values()),
        skipped=skipped,
        rotated=rotation.is_on,
        kept_layers=prepared.kept_layers,
        memory=_memory(count, options, prepared),
        artifacts=artifacts,
        fits=[fit for name, each in gates.items() for fit in prediction.compare(name, each, artifacts)],
    )


def training_memory(options: FinetuneOptions, kept_layers: list[int] | None = None) -> TrainingMemory:
    """Predict the memory of a training alone.

    Args:
        options: Of finetune, with absolute paths.
        kept_layers: Decoder layers that a run kept; None where it has none or is not known.

    Raises:
        UsageError: An impossible combination of options, or one that a plan cannot be made for.
        ModelError: The model cannot be trained, for any other reason than the values of its weights.
    """
    _check(options, ExportOptions())
    prepared = _prepare(options, kept_layers)
    return _memory(_count(prepared, options), options, prepared)


@dataclasses.dataclass(frozen=True)
class _PreparedModel:
    """A model without weights, prepared as finetune prepares its model.

    Attributes:
        outline: Model, tokenizer and name.
        weights: Bits and group size of each weight.
        rotation: Effect of the rotation at the start of QAT.
        kept_layers: Decoder layers that stay; None for all.
        row_tokens: Tokens of the longest row.
        device: "cpu" or "cuda".
        precision: Of the matrix products.
    """

    outline: Outline
    weights: Scheme
    rotation: RotationOutcome
    kept_layers: list[int] | None
    row_tokens: int
    device: str
    precision: str


def _prepare(options: FinetuneOptions, kept_layers: list[int] | None) -> _PreparedModel:
    """Read the outline of the model; choose its bits and its rotation as finetune does."""
    device = setup.choose_device(options.device)
    precision = setup.choose_precision(options.precision, device)
    outline = read_outline(options.model, options.trust_remote_code)
    setup.require_exportable(options, outline.model.config)
    choose = _scheme_chooser(options)
    model_options.check(outline.model, options, partial(choose, outline.model))
    row_tokens = row_length(options, outline.model.config)
    kept = _prune(outline.model, options, kept_layers)
    rotation = find_outcome(outline.model, options, choose)
    weights = setup.untie_trained_head(choose(outline.model), options)
    return _PreparedModel(outline, weights, rotation, kept, row_tokens, device, precision)


def _count(prepared: _PreparedModel, options: FinetuneOptions) -> TrainingCount:
    """Count the memory of all tensors; the model is of no use afterwards."""
    outline = prepared.outline
    return count_training(
        outline.model, prepared.weights, options, prepared.row_tokens, prepared.precision, prepared.rotation,
        outline.is_stored_in_16_bits,
    )  # fmt: skip


# --- options ------------------------------------------------------------------------------------------------


def _check(options: FinetuneOptions, exporting: ExportOptions) -> None:
    """Refuse what finetune refuses, and what a plan cannot be made for.

    Raises:
        UsageError: Names the option.
    """
    check_combination(options)
    refused = {
        "--frozen-base": options.frozen_base is not None,
        f"--ptq-init {STORED}": options.ptq_init == STORED,
        "--portable": exporting.portable,
        f"--optimizer {options.optimizer}": options.optimizer != FinetuneOptions.optimizer,
        f"--backend {exporting.backend}": exporting.backend != ExportOptions.backend,
    }
    for flag, is_given in refused.items():
        if is_given:
            raise UsageError(f"{flag}: plan has no prediction for it. Leave it out, or run the command itself.")
    if load.encoder_config(options.model, options.trust_remote_code) is not None:
        raise UsageError(f"{options.model}: an encoder, and plan is for models that generate text. Run finetune.")


def _names(options: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def _gates(profile: str) -> ValidateOptions:
    return config.load(ValidateOptions, "validate", None, {"profile": profile})


def _scheme_chooser(options: FinetuneOptions) -> Callable[[PreTrainedModel], Scheme]:
    """Return the function that chooses the scheme of a model."""
    bits = bits_file.load_bits(Path(options.bits)) if options.bits else {}
    levels = bits_file.requested_levels(options.bits, options.weight_levels) or SEQ

    def choose(model: PreTrainedModel) -> Scheme:
        # A stand-in of fewer layers has only some of the names.
        names = dict(model.named_modules())
        known = bits if model.device.type == "meta" else {n: width for n, width in bits.items() if n in names}
        tables = (options.embedding_bits, options.head_bits)
        codes = scheme.LinearCodes(options.weight_bits, levels)
        return scheme.choose_scheme(model, options.group_size, known, tables, codes)

    return choose


def _context_length(exporting: ExportOptions, model: PreTrainedModel) -> int:
    """Return the context length of the artifacts, as export chooses it.

    Raises:
        ExportError: The model has fewer positions.
    """
    most = max_positions(model.config)
    if exporting.context_length is not None:
        require_positions(exporting.context_length, most)
        return exporting.context_length
    return DEFAULT_CONTEXT if most is None else min(DEFAULT_CONTEXT, most)


def _recorded_layers(run: Run | None) -> list[int] | None:
    """Return the decoder layers that a run kept; None without a run, and where it kept all."""
    if run is None or not (run.adapter / MANIFEST).is_file():
        return None
    kept: list[int] | None = read_manifest(run.adapter).get("kept_layers")
    return kept


def _prune(model: PreTrainedModel, options: FinetuneOptions, kept: list[int] | None) -> list[int] | None:
    """Remove layers as --keep-layers requests, and return those that stay; None for all.

    Which layers are the least harmful is measured on rows, so that a plan takes the first ones.
    """
    if options.keep_layers is None:
        return None
    prune.require_layers(model, options.keep_layers)
    kept = kept or list(range(options.keep_layers))
    keep_layers(model, kept)
    return kept


# --- predictions --------------------------------------------------------------------------------------------


def _parameters(model: PreTrainedModel, weights: Scheme, tied: bool) -> Parameters:
    """Count the parameters of a model by part; adapters are counted later."""

    def count(name: str) -> int:
        module: Any = model.get_submodule(name)
        return int(module.weight.numel())

    embedding, linears = count(weights.embedding), sum(count(name) for name in weights.linears)
    head = 0 if tied and shares_table(model) else count(weights.head)
    total = sum(parameter.numel() for parameter in model.parameters())
    shared = count(weights.head) if shares_table(model) else 0
    stored = embedding + linears + (0 if shared else count(weights.head))
    return Parameters(embedding, linears, head, total - stored, 0, 0, tied)


def _layers(model: PreTrainedModel, weights: Scheme) -> dict[str, PlannedLayer]:
    """Return the scheme of every weight by its name."""
    layers = {}
    for name, spec in weights.weights.items():
        module: Any = model.get_submodule(name)
        rows, width = module.weight.shape
        layers[name] = PlannedLayer(name, rows, width, spec.bits, spec.group_size, spec.reason)
    return layers


def _artifacts(
    outline: Outline, frozen: FrozenOutline, weights: Scheme, request: PlanRequest, context_length: int
) -> list[PlannedArtifact]:
    """Predict the artifact of every target, or why it holds no such model."""
    found = []
    for name in dict.fromkeys(request.exporting.target):
        target = target_named(name)
        cache = request.exporting.kv_cache
        options = {"kv_cache": cache} if cache != KV_CACHE_FLOAT and "kv_cache" in target.options else {}
        try:
            reason = target.missing_for(outline.model.config) or target.missing_widths(weights.widths)
            if reason:
                raise ExportError(reason)
            planned = target.planned_files(frozen, context_length, **options)
        except ExportError as error:
            reason = str(error).removeprefix(f"{name}: ")
            progress.warn(f"{target.title}: {reason}")
            found.append(prediction.refused_artifact(name, target.title, reason))
            continue
        found.append(prediction.describe_artifact(name, target.title, planned, context_length, request.bandwidth))
    return found


def _memory(count: TrainingCount, options: FinetuneOptions, prepared: _PreparedModel) -> TrainingMemory:
    """Add the process's own memory to that of all tensors. On a GPU only tensors are there."""
    device = prepared.device
    libraries = LIBRARIES_BYTES if device == "cpu" else 0

    def with_libraries(peak: int | None) -> int | None:
        return None if peak is None else peak + libraries

    return TrainingMemory(
        device, prepared.precision, options.batch_size, prepared.row_tokens, libraries, count.base, count.trained,
        count.optimizer, count.step, with_libraries(count.phase_1), with_libraries(count.initialization),
        with_libraries(count.qat),
    )  # fmt: skip
