"""Setup of a training: device, model, data, bits of each weight, and what is trained. All before the first step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qat_edge import environment, progress, readers
from qat_edge.data import changed_rows, training_examples
from qat_edge.data.formats import RowStream
from qat_edge.data.tokenization import TokenizedRows
from qat_edge.errors import ModelError, UsageError
from qat_edge.models import load, sentence_modules
from qat_edge.models.layer_removal import keep_layers
from qat_edge.models.positions import max_positions, require_positions
from qat_edge.models.tasks import CAUSAL_LM, ModelTask, SentenceEncoder
from qat_edge.options import BF16_BASE, FinetuneOptions
from qat_edge.quant import base_storage, bits_file, fake, numerics, qlora_base, rotation, scheme
from qat_edge.quant.autocast import gains_from_bfloat16
from qat_edge.quant.codebook import FEWEST, SEQ
from qat_edge.quant.ptq.method_names import STORED
from qat_edge.quant.qat_init import QatInit
from qat_edge.quant.scheme import Scheme
from qat_edge.train import distributed, model_options, prune
from qat_edge.train.frozen_base import FrozenBase, read_frozen_base
from qat_edge.train.option_checks import requested_widths
from qat_edge.train.stored_codes import read_stored_codes
from qat_edge.train.training_rows import RowReader, TrainingData
from qat_edge_exporters.targets import DEFAULT_FORMATS, FORMATS, GGUF, target_named

# Name on PyPI of the trackers that are one package.
TRACKER_PACKAGES = {
    "comet_ml": "comet-ml",
    **{name: name for name in ("clearml", "codecarbon", "dvclive", "mlflow", "neptune", "swanlab", "trackio", "wandb")},
}


@dataclass(frozen=True)
class TrainingJob:
    """Everything that is loaded and chosen before training.

    Attributes:
        task: The task the model is trained for.
        model: The base model, its layers removed already if it is pruned.
        tokenizer: The model's tokenizer.
        scheme: Bits and group size of each weight.
        rows: Training rows; of a stream, those of the first block.
        data: What the Trainer draws from: these rows, packed with --packing, or the stream.
        eval_rows: Rows of --eval-data; None without.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the matrix products.
        rotation_seed: Seed of the rotation; None without one.
        frozen_base: Quantized model that adapters are trained next to; None for adapters that are merged.
        start: Weights and scales of the frozen base, or of a model that is quantized already; None where QAT chooses
            its own, and for a base that has only its weights.
        metadata: Entries of the manifests of RUN/reference and RUN/adapter.
    """

    task: ModelTask
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheme: Scheme
    rows: TokenizedRows
    data: TrainingData
    eval_rows: TokenizedRows | None
    device: str
    precision: str
    rotation_seed: int | None
    frozen_base: FrozenBase | None
    start: QatInit | None
    metadata: dict[str, Any]


def prepare_training(
    options: FinetuneOptions, kept_layers: list[int] | None = None, context_length: int | None = None
) -> TrainingJob:
    """Load model and data, choose what the options leave open, and report all of it.

    Args:
        options: All options of finetune.
        kept_layers: The layers that a resumed run kept, if it is pruned.
        context_length: Of the export to come; None where it is not known.

    Raises:
        ExportError: The model has fewer positions than `context_length`.
        UsageError: An option does not fit the machine or the model.
        ModelError: The model cannot be loaded or exported.
        DataError: The data cannot be read, or does not fit the model.
    """
    device, precision = _choose_machine(options)

    # The task decides which class of model is loaded. That of an encoder depends on the rows.
    task = _choose_task(options)
    model, tokenizer, identity = load_base(options, task)
    base = dataclasses.asdict(identity)
    frozen_base = None if options.frozen_base is None else read_frozen_base(options.frozen_base, base)
    kept_layers = frozen_base.kept_layers if frozen_base else kept_layers
    bits_file.require_model(options.bits, base, kept_layers or options.keep_layers)
    bits = bits_file.load_bits(Path(options.bits)) if options.bits else {}
    levels = bits_file.requested_levels(options.bits, options.weight_levels) or SEQ
    stored = read_stored_codes(identity, model) if options.ptq_init == STORED else None
    if stored is not None:
        options, bits = stored.options(options), stored.bits
    choose_scheme = partial(
        scheme.choose_scheme, model, options.group_size, bits, (options.embedding_bits, options.head_bits),
        scheme.LinearCodes(options.weight_bits, levels),
    )  # fmt: skip
    if context_length is not None and not task.is_encoder:
        require_positions(context_length, max_positions(model.config))
    model_options.check(model, options, choose_scheme)
    if options.rotate == "on":
        model_options.require_rotatable(model, choose_scheme())

    if options.eval_data:
        # The first row alone: a file that is missing or has other rows is reported before all training rows are read.
        next(iter(RowStream(options.eval_data, "eval", report=False)))

    # Rows are tokenized before layers are removed, because the choice of layers is measured on them.
    reader = RowReader(options, task, model, tokenizer, identity)
    stream = RowStream(options.data, "train", streamed=options.streaming)
    rows = reader.read(stream)
    eval_stream = RowStream(options.eval_data, "eval") if options.eval_data else None
    eval_rows = reader.read(eval_stream) if eval_stream else None
    reader.report(rows, eval_rows)

    if options.keep_layers is not None:
        if not kept_layers:
            count, method = options.keep_layers, options.prune
            kept_layers = distributed.on_first(
                lambda: prune.choose_layers(model, count, method, rows, tokenizer, options.seed, device)
            )
            bits_file.require_model(options.bits, base, kept_layers)
        keep_layers(model, kept_layers)
        progress.info(f"Pruned to {len(kept_layers)} layers, {_millions(model)} M parameters")
    weights = untie_trained_head(choose_scheme(), options)
    report_scheme(model, weights)
    # A frozen base of stored codes has their scales already.
    stored_start = None if stored is None else stored.start(weights)
    start = stored_start if frozen_base is None else frozen_base.start

    metadata = describe_inputs(options, task, identity, rows, eval_rows)
    data = reader.training_data(stream, rows, eval_rows, metadata["conversation"])
    for entry, read_from in ((changed_rows.DATA, stream), (changed_rows.EVAL_DATA, eval_stream)):
        if read_from is not None and not read_from.streamed:
            metadata[entry][changed_rows.ROWS] = read_from.sha256
    metadata |= {"device": device, "precision": precision}
    metadata |= {"bits": bits, "weight_levels": levels, "kept_layers": kept_layers}
    metadata["max_position_embeddings"] = max_positions(model.config)
    metadata["frozen_base"] = frozen_base and {"source": options.frozen_base, "sha256": frozen_base.sha256}
    rotation_seed = None if task.is_encoder else choose_rotation(model, weights, options, frozen_base)
    return TrainingJob(
        task, model, tokenizer, weights, rows, data, eval_rows, device, precision, rotation_seed, frozen_base, start,
        metadata,
    )  # fmt: skip


def untie_trained_head(weights: Scheme, options: FinetuneOptions) -> Scheme:
    """Return the scheme with a head of its own, and report it, where an adapter changes the head of a shared table."""
    is_trained = options.method == "lora" and model_options.is_named(weights.head, options.target_modules)
    if not weights.tied or not is_trained:
        return weights
    progress.info(
        f"{weights.head} becomes a table of its own: --target-modules trains it, and not the embedding that shares it"
    )
    return dataclasses.replace(weights, tied=False)


def report_scheme(model: PreTrainedModel, weights: Scheme) -> None:
    """Report bits and group size of the weights, those that are not as requested, and those that stay float."""
    progress.info(f"Quantization: {weights.summary()}; {weights.describe_tables()}")
    # Weights that could not be quantized as requested, each with its reason.
    for name, reason in weights.exceptions.items():
        progress.info(f"  {name}: {reason}")
    for modules in scheme.float_modules(model, weights.weights):
        if modules.share > scheme.NOTABLE_SHARE:
            share = f"{modules.share:.1%} of the parameters"
            progress.info(f"  stays float32: {modules.module_class}, {share} (such as {modules.example})")


def make_trainable(
    model: PreTrainedModel, weights: Scheme, task: ModelTask, options: FinetuneOptions
) -> tuple[PreTrainedModel | PeftModel, fake.Switch]:
    """Insert fake quantization, switched off, and what is trained: adapters, or all weights.

    Args:
        model: The base model, changed in place.
        weights: Bits and group size of each weight.
        task: The task the model is trained for.
        options: Of finetune.

    Returns:
        The model to train and the switch of its fake quantization.

    Raises:
        UsageError: A target module does not exist, or its adapters cannot be merged before rounding.
        ModelError: The model cannot have adapters.
    """
    # First, because fake quantization has another layer class over a base in few bits.
    if options.base == BF16_BASE:
        base_storage.round_to_bfloat16(model, weights)
    elif options.base in qlora_base.FORMATS:
        before, after = qlora_base.quantize_base(model, weights.linears, options.base)
        progress.info(f"Base: linear layers as {options.base}, {after / 1e6:.0f} MB instead of {before / 1e6:.0f} MB")

    if options.method == "lora":
        model_options.check_targets(model, options.target_modules)
    switch = fake.insert(model, weights, options.scales == "learned", options.frozen_base is not None)
    torch.manual_seed(options.seed)  # adapters begin at random values
    if options.method == "full":
        progress.info(
            f"Training all {_millions(model)} M weights at a learning rate of {options.learning_rate:g}, "
            "without adapters"
        )
        return fake.train_weights(model), switch
    adapted = fake.add_adapters(model, _lora_config(options, weights, task))
    if options.has_fixed_codes and not any(fake.SCALE_FACTOR in name for name, _ in adapted.named_parameters()):
        raise UsageError(model_options.NOTHING_TO_TRAIN)
    if options.narrows_base:
        progress.info(base_storage.narrow(adapted, weights).describe())
    return adapted, switch


# --- device and precision ----------------------------------------------------------------------------------


def _choose_machine(options: FinetuneOptions) -> tuple[str, str]:
    """Choose and report device and precision; options that this machine cannot meet are refused here, at once."""
    device = choose_device(options.device)
    _check_trackers(options.track)
    precision = choose_precision(options.precision, device)
    environment.require_plain_training(device, precision)
    verb = "Training" if options.steps else "Quantizing"
    progress.info(f"{verb} on {describe_device(device)}, matrix products in {precision}, rounding in fp32")
    if distributed.count() > 1:
        progress.info(f"{distributed.count()} processes, each of which computes an equal share of every batch")
    if precision == "bf16" and not gains_from_bfloat16(device):
        progress.warn("--precision bf16: this CPU only emulates bfloat16, which is many times slower than fp32.")
    return device, precision


def choose_device(requested: str) -> str:
    """Return "cuda" or "cpu" for a requested "auto", "cuda" or "cpu".

    Raises:
        UsageError: CUDA is requested and there is no GPU.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise UsageError("--device cuda: torch finds no CUDA GPU here. Use --device auto or --device cpu.")
    return "cuda" if requested != "cpu" and available else "cpu"


def choose_precision(requested: str, device: str) -> str:
    """Return "bf16" or "fp32" for a requested "auto", "bf16" or "fp32".

    Raises:
        UsageError: bfloat16 is requested and the GPU does not support it.
    """
    gains = gains_from_bfloat16(device)
    if requested == "bf16" and device == "cuda" and not gains:
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name()} does not support bfloat16. Use --precision auto or fp32."
        )
    return requested if requested != "auto" else "bf16" if gains else "fp32"


def describe_device(device: str) -> str:
    """Return the name of the GPU, or "CPU" with the number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _check_trackers(names: Sequence[str]) -> None:
    """Check the experiment trackers first: the trainer would report a missing one after minutes of loading.

    Raises:
        UsageError: The trainer does not know a tracker, or its package is not installed.
    """
    if "none" in names and len(names) > 1:
        raise UsageError("--track none: stands alone, since it turns tracking off. Remove it, or the others.")
    available = get_available_reporting_integrations()
    unknown = [name for name in names if name not in (*available, "none")]
    if not unknown:
        return
    name, installed = unknown[0], f"Installed: {', '.join(available)}; 'none' turns tracking off."
    # Only a known name may be suggested to pip: anybody can register a package under a misspelled one.
    if name in INTEGRATION_TO_CALLBACK:
        pip = f" (`pip install {TRACKER_PACKAGES[name]}`)" if name in TRACKER_PACKAGES else ""
        raise UsageError(f"--track {name}: its package is not installed{pip}. {installed}")
    known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
    raise UsageError(f"--track {readers.shorten(name)}: not known to the trainer. Known: {known}. {installed}")


# --- task, data, rotation ----------------------------------------------------------------------------------


def _choose_task(options: FinetuneOptions) -> ModelTask:
    """Return the task to train for: for an encoder the one of its rows, for any other model text generation.

    Raises:
        UsageError: An option is for text generation and the model is an encoder.
        ModelError: No target supports the encoder.
        DataError: An encoder cannot be trained on such rows.
    """
    config = load.encoder_config(options.model, options.trust_remote_code)
    if config is None:
        return CAUSAL_LM

    # An encoder that no target supports has no use here.
    gaps = load.export_gaps(config)
    if len(gaps) == len(DEFAULT_FORMATS):
        raise ModelError(f"{options.model}: an encoder that could not be exported: {gaps[DEFAULT_FORMATS[0]]}")

    # These work on decoder layers, next-token logits and the residual stream of a decoder.
    refused = {
        "--keep-layers": options.keep_layers is not None,
        "--distill-weight": options.distill_weight > 0,
        "--rotate on": options.rotate == "on",
        "--weight-bits 2": options.weight_bits == FEWEST,
        "--frozen-base": options.frozen_base is not None,
        "--packing": options.packing,
        "--streaming": options.streaming,
        "--shard-base": options.shard_base,
    }
    for flag, given in refused.items():
        if given:
            raise UsageError(f"{flag} is for models that generate text; {options.model} is an encoder. Leave it out.")

    task = training_examples.task_for_rows(config, RowStream(options.data, report=False), options.data)
    if task == SentenceEncoder(scored=False) and options.batch_size < 2:
        raise UsageError(
            "--batch-size 1: with rows of 'anchor' and 'positive', the other texts of a batch are the wrong answers, "
            "so a batch of one teaches nothing. Give at least 2."
        )
    if task == SentenceEncoder(scored=False) and distributed.count() > 1:
        raise UsageError(
            f"Rows of 'anchor' and 'positive' and {distributed.count()} processes: the other texts of a batch are the "
            "wrong answers, and each process would have those of its share alone. Start it without a launcher."
        )
    progress.info(f"{config.model_type} is an encoder; with these rows it is trained as {task.title}")
    return task


def load_base(options: FinetuneOptions, task: ModelTask) -> load.LoadedModel:
    """Load the base model, and report its size and the targets it cannot be exported to.

    Raises:
        ModelError: No target can express the model. Training would work, but its result could be used nowhere.
    """
    loaded = load.load_model(options.model, options.trust_remote_code, task=task)
    progress.info(f"Model: {loaded.identity.name}, {_millions(loaded.model)} M parameters")
    if isinstance(task, SentenceEncoder):
        for difference in sentence_modules.differences(options.model, options.max_length, loaded.identity.revision):
            progress.warn(difference)
    for target, reason in require_exportable(options, loaded.model.config).items():
        progress.warn(f"This model cannot be exported to {target}: {reason}")
    return loaded


def require_exportable(options: FinetuneOptions, config: PretrainedConfig) -> dict[str, str]:
    """Require a target that can express the model with the bits of the options.

    Returns:
        Those of the default targets that cannot, with the reason.

    Raises:
        ModelError: There is none.
    """
    gaps = load.export_gaps(config)
    if len(gaps) == len(DEFAULT_FORMATS) and len(load.export_gaps(config, FORMATS)) == len(FORMATS):
        reasons = " ".join(f"To {target}: {reason}" for target, reason in gaps.items())
        raise ModelError(
            f"{options.model}: a model that no target can express, so it is not trained. {reasons} Use a model of an "
            "architecture that docs/reference/architectures.md lists as exported."
        )
    require_width(options, gaps)
    return gaps


def require_width(options: FinetuneOptions, gaps: Mapping[str, str]) -> None:
    """Refuse bits for which no target is left.

    gaps: formats that cannot express the model, with the reason.

    Raises:
        ModelError: The bits need a target that cannot express the model.
    """
    widths = requested_widths(options)
    able = [name for name in FORMATS if not target_named(name).missing_widths(widths)]
    if gaps.keys() >= set(able):
        raise ModelError(
            f"{options.model}: weights of 2 bits can be exported to {', '.join(able)} alone, which cannot express this "
            f"model: {gaps[able[0]]} Train it with 4 or 8 bits."
        )


def choose_rotation(
    model: PreTrainedModel, weights: Scheme, options: FinetuneOptions, frozen_base: FrozenBase | None
) -> int | None:
    """Return the seed if the PTQ initialization is to rotate what the model allows, None otherwise.

    Raises:
        UsageError: The rotation is requested, and the model allows none.
    """
    if frozen_base is not None:
        return frozen_base.rotation_seed
    if not model_options.requests_rotation(options):
        return None

    try:
        found = rotation.find_rotatable(model, weights)
    except ModelError as error:
        if options.rotate == "on":
            raise UsageError(f"--rotate on: {error} Use --rotate auto.") from error
        progress.warn(f"Rotation is off: {error}")
        return None
    progress.info(found.describe())
    if found.stream is not None and weights.tied and not target_named(GGUF).missing_for(model.config):
        progress.info(
            "To export it to gguf as well, train with --embedding-bits 8 --head-bits 4 or --rotate off: llama.cpp has "
            "no place for the rotation of a table that embedding and head share"
        )
    return options.seed


# --- what the manifests record -----------------------------------------------------------------------------


def describe_inputs(
    options: FinetuneOptions,
    task: ModelTask,
    identity: load.ModelIdentity,
    rows: TokenizedRows,
    eval_rows: TokenizedRows | None,
) -> dict[str, Any]:
    """Return the entries of the manifests that identify model, data and quantization."""
    source = {"source": options.model, "trust_remote_code": options.trust_remote_code}
    return {
        "model": {**source, "identity": dataclasses.asdict(identity), **task.metadata()},
        "data": {"source": options.data, "sha256": rows.rows.sha256},
        "eval_data": eval_rows and {"source": options.eval_data, "sha256": eval_rows.rows.sha256},
        # Carried to the frozen checkpoint, where the tokens join the end tokens, and to every artifact.
        "conversation": {"end_of_turn": rows.end_of_turn, "template_arguments": rows.template_arguments},
        "seed": options.seed,
        "quantizer": numerics.QUANTIZER,
        "group_size": options.group_size,
        "table_bits": [options.embedding_bits, options.head_bits],
        "weight_bits": options.weight_bits,
        "method": options.method,
        "base": options.base,
        # These change at the start of QAT, see `PhaseTransition.metadata`.
        "learned_scales": False,
        "fixed_codes": False,
        "unmerged": False,
        "start": None,
    }


def _lora_config(options: FinetuneOptions, weights: Scheme, task: ModelTask) -> LoraConfig:
    """Return peft's configuration. An encoder's head is trained itself, since it may be new and random."""
    targets = list(options.target_modules)
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        # peft knows "all-linear" as a string; in a list it would be the name of a module.
        target_modules=targets[0] if targets == [model_options.ALL_LINEAR] else targets,
        task_type=None if task.is_encoder else "CAUSAL_LM",
        modules_to_save=weights.heads if task.is_encoder else None,
    )


def _millions(model: nn.Module) -> str:
    """Return the number of a model's parameters in millions, rounded."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}"
