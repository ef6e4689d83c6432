"""Options of every verb: one frozen dataclass each, the only home of a default, its help text and its permitted values.

The command line makes its flags from these fields (`cli.flags`), tools/write_api.py the Python API, and `config` reads
them from YAML.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from qat_edge import remote_code
from qat_edge.quant.codebook import FEWEST, LEVELS
from qat_edge.quant.ptq.method_names import PTQ_METHODS, RENAMED_METHODS, STORED
from qat_edge_exporters import targets

FORMATS = targets.FORMATS  # what `export --target` can write
DEFAULT_FORMATS = targets.DEFAULT_FORMATS
EXPORT_BACKENDS = targets.EXPORT_BACKENDS
ARTIFACTS = tuple(targets.TARGETS)  # every kind of artifact: a format lowered to one of its backends
GROUP_SIZES = (32, 64, 128)
WIDTHS = (4, 8)  # bits of a table: int4 in groups, int8 per channel
LAYER_WIDTHS = (FEWEST, *WIDTHS)  # bits that a bits file can give a linear layer; int2 has groups, too
WEIGHT_BITS = (FEWEST, 4)  # bits of all linear layers without such a file
# Options of finetune that a frozen base decides, besides `scales`.
OF_FROZEN_BASE = (
    "model", "keep_layers", "prune", "weight_bits", "weight_levels", "group_size", "bits", "embedding_bits",
    "head_bits", "ptq_init", "rotate",
)  # fmt: skip
TRAINER_ROWS = "(rows of the trainer)"  # value of `data` of `prepare` until the trainer has tokenized its rows
# Options of finetune that a trainer of transformers or TRL decides in its place, and those of our own trainer alone.
TRAINER_OPTIONS = (
    "max_length", "streaming", "packing", "method", "steps", "batch_size", "gradient_accumulation", "learning_rate",
    "lr_schedule", "warmup_steps", "weight_decay", "keep_layers", "prune", "distill_weight", "distill_temperature",
    "distill_top_k", "eval_every", "eval_rows", "frozen_base", "clip_gradients", "device", "precision",
    "optimizer", "gradient_checkpointing", "shard_base", "save_every", "track",
)  # fmt: skip
# Share of the steps before QAT; of scales alone, which needs more steps; of adapters on a frozen base.
QAT_START, SCALES_START, ADAPTERS_START = 0.9, 0.5, 0.5
RUNTIMES = targets.TARGETS[targets.EXECUTORCH].runtimes  # of a .pte
DOCTOR_RUNTIMES = tuple(name for target in targets.TARGETS.values() for name in target.runtimes)
# Storage of frozen base weights: that which changes no value, that which rounds them, in 16 bits and in fewer.
EXACT_BASES, BF16_BASE, QLORA_BASES = ("checkpoint", "fp32"), "bf16", ("int8", "nf4")
BASES = (*EXACT_BASES, BF16_BASE, *QLORA_BASES)
ADAMW_8BIT = "adamw-8bit"
OPTIMIZERS = ("adamw", ADAMW_8BIT)
KV_CACHES = ("float32", "int8")
DEPLOYMENTS = ("base", "lora", "naive", "merged", "ptq", "qat")
PROFILES = ("laptop", "minimal", "phone-flagship", "phone-midrange", "pi5")
PUBLIC_TASKS = (
    "bfcl", "bfcl_simple", "bfcl_multiple", "bfcl_parallel", "bfcl_live_simple", "bfcl_live_multiple",
    "chain_sum", "gsm_symbolic", "gsm8k", "hellaswag", "truthfulqa", "python_docs",
)  # fmt: skip
EVAL_TASKS = (*PUBLIC_TASKS, "rows", "rows_loss")  # and the user's own rows
CALLS = ("auto", "template", "text")
SWEEP_OPTIONS = "sweep.yaml"  # the options that a sweep began with, in its folder
PRUNERS = ("median", "halving", "none")  # of the trials of a sweep
PTQ_INITS = ("none", *(method for method in PTQ_METHODS if method != "rtn"), STORED)

# Values renamed since 0.1.0; the old ones still work.
RENAMED_VALUES = RENAMED_METHODS

TOOLS = "tools"  # value of `export --schema`: the schema of the tools in the training rows

CHAT_TOKENS = 512  # of the longest answer in `chat`, unless --max-new-tokens gives another

# Greatest permitted values. They refuse mistyped figures before anything is loaded; no real use reaches them.
DEFAULT_CONTEXT = 1024  # tokens of an artifact, if the model has as many positions
MOST_TOKENS = 1_048_576  # of one sequence: prompt, answer, window, KV cache
MOST_PROMPT = 1_000_000  # characters
MOST_STEPS = 10_000_000
MOST_ROWS = 10_000_000
MOST_DATA_TOKENS = 1_000_000_000  # of calibration or evaluation
MOST_LAYERS = 10_000
MOST_RANK = 65_536
MOST_BATCH = 65_536
MOST_REPEATS = 10_000
MOST_TRIALS = 10_000
MOST_WORKERS = 1024
MOST_THREADS = 1024
LARGEST_SEED = 2**32 - 1  # numpy takes no larger one
HIGHEST_RATE = 10.0  # learning rates and weight decay
MOST_MEGABYTES = 1e9
MOST_PER_SECOND = 1e9
HIGHEST_KL = 1e9  # nats

# Headings of `--help`, in this order.
SEARCH, DATA, TRAINING, QUANTIZATION = "Search", "Model and data", "Training", "Quantization"
MEASURING, GATES, HARDWARE, OUTPUT = "What to measure", "Gates", "Hardware", "Output"
GROUPS = (SEARCH, DATA, TRAINING, QUANTIZATION, MEASURING, GATES, HARDWARE, OUTPUT)


def option(
    help: str,
    default: Any = MISSING,
    choices: tuple[Any, ...] = (),
    bounds: tuple[float, float] | None = None,
    group: str = OUTPUT,
    old_name: str = "",
    may_be_empty: bool = True,
) -> Any:
    """Return a dataclass field that carries what its flag needs.

    Args:
        help: text for `--help` and the reference.
        default: none makes the option required.
        choices: permitted values; empty for any.
        bounds: least and greatest permitted value; every number has both.
        group: heading of `--help` that the flag stands under.
        old_name: the field's name in 0.1.0, where it was renamed since.
        may_be_empty: whether a list may have no entries, where that means something.
    """
    metadata = {
        "help": help, "choices": choices, "bounds": bounds, "group": group, "old_name": old_name,
        "may_be_empty": may_be_empty,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of `finetune`. Steps are optimizer steps; lengths are in tokens."""

    model: str = option("Hub id, local folder or .gguf file of a causal language model or an encoder.", group=DATA)
    data: str = option("Training rows: a .jsonl file, or anything datasets.load_dataset reads.", group=DATA)
    eval_data: str | None = option(
        "Held-out rows for validate and the loss curve; NAME:PART picks a split.", None, group=DATA
    )
    streaming: bool = option(
        "Read training rows as they are needed, in shuffled blocks of 10,000, instead of all of them before the first "
        "step.",
        False, group=DATA,
    )  # fmt: skip
    max_length: int = option(
        "Longest row; longer rows are truncated, counted and reported.", 512, bounds=(8, MOST_TOKENS), group=DATA
    )
    trust_remote_code: bool = option(remote_code.HELP, False, group=DATA)

    packing: bool = option(
        "Put several rows into one sequence of --max-length, without attention from one row to another; a batch then "
        "has so many sequences.",
        False, group=TRAINING,
    )  # fmt: skip
    method: str = option("Train LoRA adapters, or all weights.", "lora", ("lora", "full"), group=TRAINING)
    steps: int = option(
        "Optimizer steps of both phases together; 0 quantizes the model as it is.",
        200, bounds=(0, MOST_STEPS), group=TRAINING,
    )  # fmt: skip
    batch_size: int = option(
        "Rows per device and batch; sequences with --packing.", 8, bounds=(1, MOST_BATCH), group=TRAINING
    )
    gradient_accumulation: int = option("Batches per optimizer step.", 1, bounds=(1, MOST_BATCH), group=TRAINING)
    learning_rate: float = option(
        "Peak learning rate of AdamW; with --method full, try about a twentieth of the default.",
        1e-3, bounds=(0, HIGHEST_RATE), group=TRAINING,
    )  # fmt: skip
    lr_schedule: str = option(
        "Learning rate after warm-up.", "cosine", ("cosine", "constant", "linear"), group=TRAINING
    )
    warmup_steps: int = option(
        "Steps to reach the peak learning rate; at most a fifth of a phase.", 5, bounds=(0, MOST_STEPS), group=TRAINING
    )
    weight_decay: float = option("AdamW weight decay.", 0.0, bounds=(0, HIGHEST_RATE), group=TRAINING)
    lora_rank: int = option("Rank of the adapters.", 16, bounds=(1, MOST_RANK), group=TRAINING)
    lora_alpha: int = option("Adapters are scaled by alpha / rank.", 32, bounds=(1, MOST_RANK), group=TRAINING)
    lora_dropout: float = option("Dropout on the adapters' input.", 0.0, bounds=(0, 0.99), group=TRAINING)
    target_modules: tuple[str, ...] = option(
        "Linear layers that get adapters.", ("all-linear",), group=TRAINING, may_be_empty=False
    )
    keep_layers: int | None = option(
        "Decoder layers to keep; all by default.", None, bounds=(1, MOST_LAYERS), group=TRAINING
    )
    prune: str = option(
        "Which layers --keep-layers keeps: the first, or those whose removal raises the loss most.",
        "least-harmful", ("least-harmful", "first"), group=TRAINING,
    )  # fmt: skip
    distill_weight: float = option(
        "Share of the loss that is KL divergence from the model at the end of phase 1, 0 to 1.",
        0.0, bounds=(0, 1), group=TRAINING,
    )  # fmt: skip
    distill_temperature: float = option("Temperature of that divergence.", 1.0, bounds=(0.01, 100), group=TRAINING)
    distill_top_k: int = option(
        "Tokens per position of the teacher's prediction to precompute; 0 runs the teacher at every step.",
        0, bounds=(0, MOST_TOKENS), group=TRAINING,
    )  # fmt: skip
    eval_every: int = option(
        "Steps between evaluations on --eval-data; 0 evaluates at the end of each phase only.",
        0, bounds=(0, MOST_STEPS), group=TRAINING,
    )  # fmt: skip
    eval_rows: int = option(
        "Rows of --eval-data in each of those evaluations.", 128, bounds=(1, MOST_ROWS), group=TRAINING
    )
    seed: int = option("Seed of initialization, shuffling and dropout.", 0, bounds=(0, LARGEST_SEED), group=TRAINING)

    qat_start: float | None = option(
        "Start of QAT (phase 2): a fraction of the steps (< 1), or a step; 0.9 by default, 0.5 with --weight-bits 2 or "
        "--frozen-base.",
        None, bounds=(0, MOST_STEPS), group=QUANTIZATION,
    )  # fmt: skip
    weight_bits: int = option(
        "Bits of linear layers; 2 bits run in ONNX folders only.", 4, WEIGHT_BITS, group=QUANTIZATION
    )
    weight_levels: str | None = option(
        "Levels of 2-bit weights: -1.5 -0.5 0.5 1.5 times the scale (seq), or -2 to 1 (integer); by default those of "
        "the file of --bits, or seq.",
        None, LEVELS, group=QUANTIZATION,
    )  # fmt: skip
    group_size: int = option(
        "Weights in groups, of fewer than 8 bits, that share one scale.", 32, GROUP_SIZES, group=QUANTIZATION
    )
    bits: str | None = option("Bits by layer: a file written by `qat-edge sensitivity`.", None, group=QUANTIZATION)
    embedding_bits: int = option(
        "Bits of the token embedding, whatever --bits says: 8, or 4 in groups.", 8, WIDTHS, group=QUANTIZATION
    )
    head_bits: int = option(
        "Bits of the output head, whatever --bits says: 8, or 4 in groups.", 8, WIDTHS, group=QUANTIZATION
    )
    ptq_init: str = option(
        "PTQ method that initializes weights and scales at the start of QAT.",
        "coordinate-descent", PTQ_INITS, group=QUANTIZATION, old_name="ptq_start",
    )  # fmt: skip
    rotate: str = option(
        "Rotate the hidden states before PTQ initialization, which removes outlier channels; auto rotates where the "
        "model and the method allow it.",
        "auto", ("auto", "on", "off"), group=QUANTIZATION,
    )  # fmt: skip
    frozen_base: str | None = option(
        "Run of `quantize MODEL --out` whose quantized weights stay as they are: adapters are trained next to them and "
        "stay unmerged. It decides model, bits and rotation.",
        None, group=QUANTIZATION,
    )  # fmt: skip
    calibration_tokens: int | None = option(
        "Tokens of the training rows for PTQ initialization; by default 49152, or all if there are fewer.",
        None, bounds=(1, MOST_DATA_TOKENS), group=QUANTIZATION,
    )  # fmt: skip
    scales: str = option(
        "Group scales during QAT: learned, fixed as initialized, or the largest weight at each step.",
        "learned", ("absmax", "fixed", "learned"), group=QUANTIZATION,
    )  # fmt: skip
    codes: str | None = option(
        "Codes of weights in groups during QAT: trained, or fixed as initialized, which trains their scales alone. "
        "Trained by default; fixed with --weight-bits 2, unless another option excludes it.",
        None, ("trained", "fixed"), group=QUANTIZATION,
    )  # fmt: skip
    scale_learning_rate: float = option(
        "Peak learning rate of learned scales, relative to a scale.", 1e-3, bounds=(0, HIGHEST_RATE), group=QUANTIZATION
    )
    qat_learning_rate: float | None = option(
        "Peak learning rate of QAT, for all but scales. By default a fraction of --learning-rate: 0.1 after gptq, "
        "gptaq and coordinate-descent, 0.3 after others; all of it with --no-lr-restart.",
        None, bounds=(0, HIGHEST_RATE), group=QUANTIZATION,
    )  # fmt: skip
    lr_restart: bool = option(
        "Give QAT a warm-up and schedule of its own; otherwise one schedule spans both phases.",
        True, group=QUANTIZATION,
    )  # fmt: skip
    clip_gradients: str = option(
        "Clip the gradients of weights and learned scales by their common norm, or each by its own, with those of "
        "scales reduced as in LSQ.",
        "together", ("together", "apart"), group=QUANTIZATION,
    )  # fmt: skip

    device: str = option("Where to train.", "auto", ("auto", "cpu", "cuda"), group=HARDWARE)
    precision: str = option(
        "Autocast of matrix products; weights and rounding stay float32. 'auto' is bf16 where the GPU or CPU has "
        "instructions for it.",
        "auto", ("auto", "bf16", "fp32"), group=HARDWARE,
    )  # fmt: skip
    base: str = option(
        "Storage of the frozen base weights under the adapters: in 16 bits where the values allow it (checkpoint), as "
        "float32, rounded to bfloat16, or in few bits (QLoRA).",
        "checkpoint", BASES, group=HARDWARE,
    )  # fmt: skip
    optimizer: str = option(
        "AdamW with a state of 32 bits, or of 8 bits: 2 instead of 8 bytes for each trained weight.",
        "adamw", OPTIMIZERS, group=HARDWARE,
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        "Recompute activations in the backward pass to save memory.", False, group=HARDWARE
    )
    shard_base: bool = option(
        "Hold a share of the frozen base weights in each of several processes (FSDP2).", False, group=HARDWARE
    )

    save_every: int = option("Steps between checkpoints for --resume.", 50, bounds=(1, MOST_STEPS))
    track: tuple[str, ...] = option("Experiment trackers, by the Trainer's names.", ("tensorboard",))

    @property
    def narrows_base(self) -> bool:
        """Return whether frozen weights are stored in 16 bits where that changes no value."""
        return self.base in ("checkpoint", BF16_BASE) and self.method == "lora" and self.steps > 0

    @property
    def on_frozen_base(self) -> dict[str, Any]:
        """Return the options that adapters on a frozen base need, if these are the options of that base."""
        decided = {name: getattr(self, name) for name in OF_FROZEN_BASE}
        return {**decided, "scales": "absmax" if self.scales == "absmax" else "fixed"}

    @property
    def start_of_qat(self) -> float:
        """Start of QAT as `qat_start` gives it, or the default for the bits; docs/frontier.md compares them."""
        if self.qat_start is not None:
            return self.qat_start
        if self.frozen_base is not None:
            return ADAPTERS_START
        return SCALES_START if self.weight_bits == FEWEST else QAT_START

    @property
    def qat_start_step(self) -> int:
        """Last step of phase 1: below 1, `qat_start` is a fraction of the steps; from 1 on, a step."""
        start = self.start_of_qat
        return min(round(start * self.steps if start < 1 else start), self.steps)

    @property
    def has_qat(self) -> bool:
        """Steps are left for phase 2."""
        return self.qat_start_step < self.steps

    @property
    def has_fixed_codes(self) -> bool:
        """QAT trains scales alone: as `codes` says, or by default at 2 bits where nothing excludes it."""
        if self.codes is not None:
            return self.codes == "fixed"
        if self.frozen_base is not None:
            return False
        trains_scales = self.scales == "learned" and self.scale_learning_rate > 0
        trains_weights = self.method != "lora" or self.qat_learning_rate is not None
        return self.weight_bits == FEWEST and trains_scales and not trains_weights


@dataclass(frozen=True)
class SweepOptions:
    """Options of `sweep`: the search space and the trials. Those of `finetune` hold for every trial."""

    search: tuple[str, ...] = option(
        "Option of finetune to search over, repeatable: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C. By default "
        "learning rates, rank, alpha and the start of QAT.",
        (), group=SEARCH,
    )  # fmt: skip
    trials: int = option(
        "Trials of the sweep, those before --resume included.", 20, bounds=(1, MOST_TRIALS), group=SEARCH
    )
    pruner: str | None = option(
        "Ends trials whose loss in phase 1 is high, at each --eval-every: above the median of earlier ones, or by "
        "successive halving. By default median with --eval-every, none without.",
        None, PRUNERS, group=SEARCH,
    )  # fmt: skip
    score_rows: int | None = option(
        "Rows of --eval-data that score a trial, from the first on; all by default.",
        None, bounds=(1, MOST_ROWS), group=SEARCH,
    )  # fmt: skip
    workers: int = option(
        "Trials at the same time, each in a process of its own.", 1, bounds=(1, MOST_WORKERS), group=HARDWARE
    )
    keep_all: bool = option("Keep the weights of all trials, instead of those of the best one.", False)


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of `quantize`: the method and its calibration data."""

    method: str = option(
        "qat freezes the trained adapters; stored, with --out, keeps the codes of a model that torchao quantized; the "
        "others quantize the FP32 fine-tune without training (PTQ).",
        "qat", ("qat", *PTQ_METHODS, STORED), group=QUANTIZATION,
    )  # fmt: skip
    bits: str | None = option(
        "Bits by layer, instead of those of finetune; not with --method qat.", None, group=QUANTIZATION
    )
    weight_bits: int | None = option(
        "Bits of linear layers, instead of those of finetune; not with --method qat.",
        None, WEIGHT_BITS, group=QUANTIZATION,
    )  # fmt: skip
    weight_levels: str | None = option(
        "Levels of 2-bit weights; by default those of the file of --bits, or of finetune. Not with --method qat.",
        None, LEVELS, group=QUANTIZATION,
    )  # fmt: skip
    rotate: bool = option(
        "Rotate the hidden states first, as finetune --rotate does; not with --method qat.",
        False, group=QUANTIZATION,
    )  # fmt: skip
    group_size: int | None = option(
        "With --out: weights in groups, of fewer than 8 bits, that share one scale; 32 by default.",
        None, GROUP_SIZES, group=QUANTIZATION,
    )  # fmt: skip
    embedding_bits: int | None = option(
        "With --out: bits of the token embedding, 8 by default.", None, WIDTHS, group=QUANTIZATION
    )
    head_bits: int | None = option(
        "With --out: bits of the output head, 8 by default.", None, WIDTHS, group=QUANTIZATION
    )
    calibration_data: str | None = option(
        "Calibration rows for gptq, gptaq, coordinate-descent and awq, instead of the training rows.",
        None, group=DATA,
    )  # fmt: skip
    calibration_tokens: int | None = option(
        "Tokens of those rows; by default 49152, or all if there are fewer.",
        None,
        bounds=(1, MOST_DATA_TOKENS),
        group=DATA,
    )
    seed: int = option("Seed for choosing the rows.", 0, bounds=(0, LARGEST_SEED), group=DATA)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `export`: the artifacts to write, and their context length."""

    target: tuple[str, ...] = option("Format to write.", DEFAULT_FORMATS, FORMATS, may_be_empty=False)
    context_length: int | None = option(
        f"Tokens in the KV cache, prompt and answer together; by default {DEFAULT_CONTEXT}, or the model's positions "
        "if it has fewer.",
        None, bounds=(16, MOST_TOKENS),
    )  # fmt: skip
    ptq: tuple[str, ...] = option(
        "PTQ methods to export next to QAT, for comparison; none for no comparison.",
        ("rtn",), (*PTQ_METHODS, "none"),
    )  # fmt: skip
    portable: bool = option(
        "Write a .pte of ATen operators only, for a runtime without ExecuTorch's LLM and quantized operators.", False
    )
    backend: str = option(
        "Backend that a .pte is lowered to; others than xnnpack go to exports/executorch-BACKEND.",
        EXPORT_BACKENDS[0], EXPORT_BACKENDS,
    )  # fmt: skip
    kv_cache: str = option(
        "Storage of keys and values in a .pte; int8 takes about a quarter of the memory.", "float32", KV_CACHES
    )
    schema: str | None = option(
        "JSON schema of the answers, shipped with the artifacts and as the grammar that their runtimes take: a file, "
        f"or {TOOLS} for calls of the tools in the training rows.",
        None,
    )  # fmt: skip


def option_of(options: Any, name: str) -> Any:
    """Return a dataclass field that carries the default, the help and the bounds of another verb's option."""
    known = next(each for each in fields(options) if each.name == name)
    return field(default=known.default, metadata={**known.metadata, "old_name": ""})


@dataclass(frozen=True)
class PlanOptions:
    """Options of `plan`: those of `finetune` and `export` that change a prediction, and the devices to compare with."""

    max_length: int = option_of(FinetuneOptions, "max_length")
    trust_remote_code: bool = option_of(FinetuneOptions, "trust_remote_code")
    method: str = option_of(FinetuneOptions, "method")
    steps: int = option_of(FinetuneOptions, "steps")
    batch_size: int = option_of(FinetuneOptions, "batch_size")
    gradient_accumulation: int = option_of(FinetuneOptions, "gradient_accumulation")
    lora_rank: int = option_of(FinetuneOptions, "lora_rank")
    target_modules: tuple[str, ...] = option_of(FinetuneOptions, "target_modules")
    keep_layers: int | None = option_of(FinetuneOptions, "keep_layers")
    distill_weight: float = option_of(FinetuneOptions, "distill_weight")
    distill_top_k: int = option_of(FinetuneOptions, "distill_top_k")
    qat_start: float | None = option_of(FinetuneOptions, "qat_start")
    weight_bits: int = option_of(FinetuneOptions, "weight_bits")
    weight_levels: str | None = option_of(FinetuneOptions, "weight_levels")
    group_size: int = option_of(FinetuneOptions, "group_size")
    bits: str | None = option_of(FinetuneOptions, "bits")
    embedding_bits: int = option_of(FinetuneOptions, "embedding_bits")
    head_bits: int = option_of(FinetuneOptions, "head_bits")
    ptq_init: str = option_of(FinetuneOptions, "ptq_init")
    rotate: str = option_of(FinetuneOptions, "rotate")
    calibration_tokens: int | None = option_of(FinetuneOptions, "calibration_tokens")
    scales: str = option_of(FinetuneOptions, "scales")
    codes: str | None = option_of(FinetuneOptions, "codes")
    device: str = option_of(FinetuneOptions, "device")
    precision: str = option_of(FinetuneOptions, "precision")
    base: str = option_of(FinetuneOptions, "base")
    gradient_checkpointing: bool = option_of(FinetuneOptions, "gradient_checkpointing")
    target: tuple[str, ...] = option(
        "Formats to predict the files of.", FORMATS, FORMATS, group=MEASURING, may_be_empty=False
    )
    context_length: int | None = option_of(ExportOptions, "context_length")
    kv_cache: str = option_of(ExportOptions, "kv_cache")
    profile: tuple[str, ...] = option(
        f"Classes of devices to compare with: {', '.join(PROFILES)}, or a FILE.toml; all of the former by default.",
        (), group=MEASURING,
    )  # fmt: skip
    bandwidth: float | None = option(
        "Memory bandwidth of a device, GB/s (10^9 bytes): gives an upper bound of the decode speed.",
        None, bounds=(0.001, 100_000), group=MEASURING,
    )  # fmt: skip


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `doctor`: the runtimes that a file has to load in."""

    runtime: tuple[str, ...] = option(
        "Runtimes that must load the file: onnxruntime and onnxruntime-genai an ONNX graph, llama.cpp a GGUF file, the "
        "others a .pte; without this, all of its format are checked and one must load it.", (), DOCTOR_RUNTIMES,
    )  # fmt: skip


@dataclass(frozen=True)
class PushOptions:
    """Options of `push`: what a repository gets."""

    target: tuple[str, ...] = option("Artifacts to upload; all of the run by default.", (), ARTIFACTS)
    private: bool = option("Make a new repository private.", False)
    dry_run: bool = option("Write the model card into the run folder, and upload nothing.", False)


@dataclass(frozen=True)
class ValidateOptions:
    """Options of `validate`: measurements, devices, and the gates that set the exit code."""

    target: tuple[str, ...] = option(
        "Artifacts to measure; by default all that run here.", (), ARTIFACTS, group=MEASURING
    )
    eval_data: str | None = option("Evaluation rows, instead of finetune's --eval-data.", None, group=MEASURING)
    text: str | None = option(
        "Rows or a .txt file for perplexity, instead of the evaluation rows.", None, group=MEASURING
    )
    tokens: int = option("Tokens compared with the reference.", 2048, bounds=(64, MOST_DATA_TOKENS), group=MEASURING)
    window: int = option("Tokens of context in each compared sequence.", 128, bounds=(16, MOST_TOKENS), group=MEASURING)
    prompts: int = option(
        "Evaluation rows to generate answers for, for exact match; 0 for none.",
        64,
        bounds=(0, MOST_ROWS),
        group=MEASURING,
    )
    max_new_tokens: int = option("Longest generated answer.", 96, bounds=(1, MOST_TOKENS), group=MEASURING)
    prefill: int = option("Prompt tokens of the speed measurement.", 128, bounds=(1, MOST_TOKENS), group=MEASURING)
    decode: int = option("Generated tokens of the speed measurement.", 64, bounds=(2, MOST_TOKENS), group=MEASURING)
    repeats: int = option("Timed repeats after the warm-up.", 5, bounds=(1, MOST_REPEATS), group=MEASURING)
    error_budget: bool = option(
        "Measure the loss of each step and of each part of the rounding, and tell a fault from rounding noise; "
        "takes many more passes.",
        False, group=MEASURING, old_name="budget",
    )  # fmt: skip

    device: tuple[str, ...] = option(
        "Where the artifacts run: local, browser, ssh:USER@HOST, adb:SERIAL; several run at the same time.",
        ("local",), group=HARDWARE, may_be_empty=False,
    )  # fmt: skip
    device_python: str | None = option(
        "Python with numpy and the runtimes on ssh and adb devices; python3 by default.", None, group=HARDWARE
    )
    device_folder: str | None = option(
        "Folder on those devices for artifacts and results; by default a cache folder of the user.",
        None, group=HARDWARE,
    )  # fmt: skip
    ssh_config: str | None = option("OpenSSH configuration file to use instead of your own.", None, group=HARDWARE)
    runner_binary: str | None = option(
        "executor_runner or llama_main built for the device, to run the .pte instead of Python.",
        None, group=HARDWARE,
    )  # fmt: skip
    profile: str | None = option(
        f"Gates and timing for a class of device: {', '.join(PROFILES)}, or a FILE.toml; flags override it.",
        None, group=HARDWARE,
    )  # fmt: skip
    device_profile: tuple[str, ...] = option(
        "DEVICE=PROFILE: profile of one of several devices, instead of --profile; repeat for each.",
        (), group=HARDWARE,
    )  # fmt: skip
    threads: int = option("CPU threads each runtime may use.", 2, bounds=(1, MOST_THREADS), group=HARDWARE)

    max_kl: float | None = option(
        "Largest mean KL divergence from the FP32 reference, nats per token.", None, bounds=(0, HIGHEST_KL), group=GATES
    )
    min_top1: float | None = option(
        "Least share of tokens (encoders: texts) with the reference's first choice, 0 to 1.",
        None, bounds=(0, 1), group=GATES,
    )  # fmt: skip
    max_perplexity_ratio: float | None = option(
        "Largest ratio of perplexity to the reference's.", None, bounds=(0, 1e9), group=GATES
    )
    min_exact_match: float | None = option(
        "Least share of prompts answered exactly, 0 to 1.", None, bounds=(0, 1), group=GATES
    )
    max_size_mb: float | None = option(
        "Largest artifact, in megabytes (10^6 bytes).", None, bounds=(0, MOST_MEGABYTES), group=GATES
    )
    max_memory_mb: float | None = option(
        "Most memory above the runtime's own, in megabytes (10^6 bytes).", None, bounds=(0, MOST_MEGABYTES), group=GATES
    )
    min_prefill: float | None = option(
        "Least prefill speed, tokens per second.", None, bounds=(0, MOST_PER_SECOND), group=GATES
    )
    min_decode: float | None = option(
        "Least decode speed, tokens per second.", None, bounds=(0, MOST_PER_SECOND), group=GATES
    )
    max_fault_chance: float | None = option(
        "With --error-budget: largest probability that a token's error exceeds rounding noise; a fault is above 0.75.",
        None, bounds=(0, 1), group=GATES,
    )  # fmt: skip
    min_quality: float | None = option(
        "Encoders: least accuracy, retrieval or rank correlation, whichever the rows allow; 0 to 1.",
        None, bounds=(0, 1), group=GATES,
    )  # fmt: skip
    min_cosine: float | None = option(
        "Encoders: least mean cosine with the FP32 reference's outputs, 0 to 1.", None, bounds=(0, 1), group=GATES
    )


@dataclass(frozen=True)
class CompareOptions:
    """Options of `compare`: the deployments. The validate section of --config, or of the run, says how to measure."""

    model: str | None = option("Train first, with --out: the base model, as for finetune.", None, group=DATA)
    data: str | None = option("Train first: training rows, as for finetune.", None, group=DATA)
    eval_data: str | None = option("Train first: held-out rows, as for finetune.", None, group=DATA)
    target: tuple[str, ...] = option(
        "Formats to compare in.", DEFAULT_FORMATS, DEFAULT_FORMATS, group=MEASURING, may_be_empty=False
    )
    deployment: tuple[str, ...] = option(
        "Rows of the table.", DEPLOYMENTS, DEPLOYMENTS, group=MEASURING, may_be_empty=False
    )
    method: tuple[str, ...] = option(
        "PTQ methods of the merged PTQ rows.",
        tuple(PTQ_METHODS),
        tuple(PTQ_METHODS),
        group=MEASURING,
        may_be_empty=False,
    )


@dataclass(frozen=True)
class SensitivityOptions:
    """Options of `sensitivity`: the data to measure each layer on, and the limit that picks its bits."""

    data: str | None = option(
        "Training rows, where they are no longer in the place that finetune read.", None, group=DATA
    )
    tokens: int = option(
        "Tokens of the training rows to measure on.", 1024, bounds=(16, MOST_DATA_TOKENS), group=MEASURING
    )
    seed: int = option("Seed for choosing the rows.", 0, bounds=(0, LARGEST_SEED), group=MEASURING)
    width: int | None = option(
        "Fewest bits to measure each layer at, besides 8: 4, or 2 as well. By default finetune --weight-bits.",
        None, WEIGHT_BITS, group=MEASURING,
    )  # fmt: skip
    max_size_mb: float | None = option(
        "Pick bits: lowest KL while the weights stay within this size, in megabytes (10^6 bytes).",
        None, bounds=(0, MOST_MEGABYTES), group=QUANTIZATION, old_name="budget_mb",
    )  # fmt: skip
    max_kl: float | None = option(
        "Pick bits: smallest size with a predicted KL within this, nats per token.",
        None, bounds=(0, HIGHEST_KL), group=QUANTIZATION,
    )  # fmt: skip


@dataclass(frozen=True)
class EvalOptions:
    """Options of `eval`: a task, and how its questions are put."""

    task: str = option(
        "Public task; or rows: answers to your own held-out rows, rows_loss: their loss.",
        choices=EVAL_TASKS, group=MEASURING,
    )  # fmt: skip
    data: str | None = option(
        "Rows of --task rows and rows_loss; by default those of finetune --eval-data.", None, group=DATA
    )
    limit: int | None = option(
        "Questions to ask, a fixed random sample; all by default.", None, bounds=(1, MOST_ROWS), group=MEASURING
    )
    context_length: int = option(
        "Tokens of prompt and answer together; longer questions are left out, longer rows of rows_loss cut; both are "
        "counted.",
        1024, bounds=(16, MOST_TOKENS), group=MEASURING,
    )  # fmt: skip
    max_new_tokens: int | None = option(
        "Longest generated answer; by default the task's own limit.", None, bounds=(1, MOST_TOKENS), group=MEASURING
    )
    calls: str = option(
        "How functions are described in prompts: as tools of the chat template, or as text in the system message; auto "
        "uses the template where it takes tools.",
        "auto", CALLS, group=MEASURING,
    )  # fmt: skip
    threads: int = option("CPU threads each runtime may use.", 2, bounds=(1, MOST_THREADS), group=HARDWARE)
