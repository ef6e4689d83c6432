"""One frozen dataclass per verb: the only home of a default, its help text and its permitted values.

`cli.py` makes its flags from these fields, `load` reads them from YAML, `save` writes them back resolved.
The precedence is flag, then configuration file, then default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qat_edge import profiles, run
from qat_edge.errors import UsageError

Options = TypeVar("Options")
TARGETS = ("executorch", "onnx")
BACKENDS = ("xnnpack", "vulkan", "coreml")  # of a .pte; artifacts for others than the first run on other machines only
ARTIFACTS = (*TARGETS, *(f"executorch-{name}" for name in BACKENDS[1:]))
GROUP_SIZES = (32, 64, 128)
WIDTHS = (4, 8)  # bits a weight may be given: int4 in groups, int8 per channel
RUNTIMES = ("python-wheel", "android-app", "android-vulkan-app", "ios-app", "minimal")
BASES = ("fp32", "nf4", "int8")
KV_CACHES = ("float32", "int8")
DEPLOYMENTS = ("base", "lora", "naive", "merged", "ptq", "qat")
PROFILES = ("laptop", "minimal", "phone-flagship", "phone-midrange", "pi5")
PTQ_INITS = ("none", "hqq", "gptq", "gptaq", "coordinate-descent", "awq")


def option(help: str, default: Any = MISSING, choices: tuple[Any, ...] = (), minimum: float | None = None) -> Any:
    """A dataclass field that carries what its flag needs: help, permitted values, lower bound."""
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class FinetuneOptions:
    """How to train. Steps are optimizer steps; lengths are tokens."""

    model: str = option("Hub id, local folder or .gguf file of a causal language model, or of an encoder.")
    data: str = option("Training rows: a .jsonl file, or what datasets.load_dataset reads.")
    eval_data: str | None = option(
        "Rows never trained on, for validate and the loss curve; NAME:PART picks a split.", None
    )
    group_size: int = option("Weights that share one int4 scale.", 32, GROUP_SIZES)
    bits: str | None = option("Bits by layer: a file that `qat-edge sensitivity` wrote.", None)
    embedding_bits: int = option("Bits of the token embedding, whatever --bits says: 8, or 4 in groups.", 8, WIDTHS)
    head_bits: int = option("Bits of the output head, whatever --bits says: 8, or 4 in groups.", 8, WIDTHS)
    method: str = option("Train adapters, or the weights themselves.", "lora", ("lora", "full"))
    base: str = option("How the frozen weights under the adapters are held while they train.", "fp32", BASES)
    keep_layers: int | None = option("Decoder layers to keep; all by default.", None, minimum=1)
    prune: str = option(
        "Which layers --keep-layers keeps: the first, or those whose lack costs most.",
        "least-harmful", ("least-harmful", "first"),
    )  # fmt: skip
    lora_rank: int = option("Rank of the adapters.", 16, minimum=1)
    lora_alpha: int = option("Adapters are scaled by alpha / rank.", 32, minimum=1)
    lora_dropout: float = option("Dropout on the adapters' input.", 0.0, minimum=0)
    target_modules: tuple[str, ...] = option("Linear layers that get adapters.", ("all-linear",))
    steps: int = option("Optimizer steps in all.", 200, minimum=1)
    qat_start: float = option(
        "Where fake quantization starts: a fraction of the steps (< 1) or a step.", 0.9, minimum=0
    )
    ptq_init: str = option(
        "What prepares weights and scales when fake quantization starts.", "coordinate-descent", PTQ_INITS
    )
    rotate: str = option(
        "Turn the hidden states before the start, so that no channel stands out; auto where model and start allow it.",
        "auto", ("auto", "on", "off"),
    )  # fmt: skip
    calibration_tokens: int | None = option(
        "Tokens of the training rows that the start looks at; 49152 or all there are by default.",
        None, minimum=1,
    )  # fmt: skip
    scales: str = option(
        "Group scales from then on: of the largest weight at each step, as --ptq-init left them, or learned.",
        "learned", ("absmax", "fixed", "learned"),
    )  # fmt: skip
    scale_learning_rate: float = option("Peak learning rate of learned scales, relative to a scale.", 1e-3, minimum=0)
    distill_weight: float = option(
        "Share of the loss that is divergence from the model at the end of plain LoRA, 0 to 1.", 0.0, minimum=0
    )
    distill_temperature: float = option("Temperature of that divergence.", 1.0, minimum=0.01)
    distill_top_k: int = option(
        "Tokens of that model's answer kept beforehand for every row; 0 to ask it at every step.", 0, minimum=0
    )
    batch_size: int = option("Rows a device takes at once.", 8, minimum=1)
    gradient_accumulation: int = option("Batches summed before a step.", 1, minimum=1)
    gradient_checkpointing: bool = option("Recompute activations in the backward pass to save memory.", False)
    learning_rate: float = option(
        "Peak learning rate of AdamW; --method full wants about a twentieth of the default.", 1e-3, minimum=0
    )
    qat_learning_rate: float | None = option(
        "Peak learning rate after --qat-start, of all but scales; where it restarts, by default 0.1 times "
        "--learning-rate after gptq, gptaq and coordinate-descent, 0.3 times after other starts.",
        None, minimum=0,
    )  # fmt: skip
    lr_restart: bool = option("Warm up and schedule anew at --qat-start; otherwise one schedule spans both.", True)
    lr_schedule: str = option("Learning rate after warm-up.", "cosine", ("cosine", "constant", "linear"))
    warmup_steps: int = option("Steps to reach the peak learning rate.", 5, minimum=0)
    weight_decay: float = option("AdamW weight decay on the adapters.", 0.0, minimum=0)
    max_length: int = option("Longest row; what is cut is counted and reported.", 512, minimum=8)
    eval_every: int = option(
        "Steps between evaluations on --eval-data; 0 for the end of each phase only.", 0, minimum=0
    )
    eval_rows: int = option("Rows of --eval-data in each of those evaluations.", 128, minimum=1)
    save_every: int = option("Steps between checkpoints for --resume.", 50, minimum=1)
    device: str = option("Where to train.", "auto", ("auto", "cpu", "cuda"))
    precision: str = option(
        "Autocast of the matrix products; weights and rounding stay float32.", "auto", ("auto", "bf16", "fp32")
    )
    track: tuple[str, ...] = option("Experiment trackers, by the trainer's names.", ("tensorboard",))
    seed: int = option("Seed of initialization, shuffling and dropout.", 0, minimum=0)
    trust_remote_code: bool = option("Run Python code that comes with the model.", False)


@dataclass(frozen=True)
class QuantizeOptions:
    """What to quantize, how, and what to calibrate on."""

    method: str = option(
        "qat freezes the trained adapters; the others quantize the FP32 fine-tune without training.",
        "qat",
        ("qat", *run.PTQ_METHODS),
    )
    bits: str | None = option("Bits by layer, where not those of finetune; not with --method qat.", None)
    rotate: bool = option("Turn the hidden states first, as finetune --rotate does; not with --method qat.", False)
    calibration_data: str | None = option(
        "Rows that gptq, gptaq, coordinate-descent and awq look at, where not those of finetune.", None
    )
    calibration_tokens: int | None = option("Tokens of those rows; 49152 or all there are by default.", None, minimum=1)
    seed: int = option("Seed of the choice of rows.", 0, minimum=0)


@dataclass(frozen=True)
class ExportOptions:
    """What to write, and for how long a conversation."""

    target: tuple[str, ...] = option("What to write.", TARGETS, TARGETS)
    context_length: int = option("Tokens the KV cache holds, prompt and answer together.", 1024, minimum=16)
    ptq: tuple[str, ...] = option(
        "Post-training quantization of the FP32 fine-tune to export beside it, to show what QAT gains; none for none.",
        ("rtn",),
        (*run.PTQ_METHODS, "none"),
    )
    portable: bool = option(
        "A .pte of ATen operators only, for a runtime without ExecuTorch's LLM and quantized operators.", False
    )
    backend: str = option(
        "What a .pte is lowered to; beside xnnpack, each has a folder of its own, exports/executorch-BACKEND.",
        BACKENDS[0], BACKENDS,
    )  # fmt: skip
    kv_cache: str = option(
        "How a .pte keeps keys and values; int8 takes about a quarter of the memory.", "float32", KV_CACHES
    )


@dataclass(frozen=True)
class DoctorOptions:
    """Which runtimes a program has to load in."""

    runtime: tuple[str, ...] = option(
        "Runtimes that must load it; without this all are looked at, and one must.", (), RUNTIMES
    )


@dataclass(frozen=True)
class ValidateOptions:
    """What to measure, where, and the limits that set the exit code."""

    device: tuple[str, ...] = option(
        "Where the artifacts run: local, ssh:USER@HOST, adb:SERIAL; several are measured side by side.", ("local",)
    )
    device_python: str | None = option(
        "Python with numpy and the runtimes on devices reached by ssh or adb; python3 by default.", None
    )
    device_folder: str | None = option(
        "Folder on those devices for artifacts and results; a cache folder of the user there by default.", None
    )
    ssh_config: str | None = option("OpenSSH configuration file in place of your own.", None)
    runner_binary: str | None = option(
        "executor_runner or llama_main that you built for the device, to run the .pte in place of Python.", None
    )
    profile: str | None = option(
        f"Limits and timing for a kind of device: {', '.join(PROFILES)}, or a FILE.toml; flags win over it.",
        None,
    )
    device_profile: tuple[str, ...] = option(
        "DEVICE=PROFILE: what one of several devices has in place of --profile; once for each.", ()
    )
    target: tuple[str, ...] = option("Artifacts to measure; all that run here where not given.", (), ARTIFACTS)
    eval_data: str | None = option("Evaluation rows, where not those of finetune.", None)
    text: str | None = option("UTF-8 text for perplexity, where not the evaluation rows.", None)
    tokens: int = option("Tokens compared against the reference.", 2048, minimum=64)
    window: int = option("Tokens of context in each compared sequence.", 128, minimum=16)
    prompts: int = option("Evaluation rows answered by generation for exact match; 0 for none.", 64, minimum=0)
    max_new_tokens: int = option("Longest generated answer.", 96, minimum=1)
    threads: int = option("CPU threads each runtime may use.", 2, minimum=1)
    prefill: int = option("Prompt tokens of the speed measurement.", 128, minimum=1)
    decode: int = option("Generated tokens of the speed measurement.", 64, minimum=2)
    repeats: int = option("Timed repeats after the warm-up.", 5, minimum=1)
    error_budget: bool = option(
        "Tell what each step and each part of the rounding costs, and a fault from rounding; many more passes.", False
    )
    max_kl: float | None = option("Gate: largest mean KL divergence from the FP32 reference, nats.", None, minimum=0)
    min_top1: float | None = option(
        "Gate: least share of tokens with the reference's first choice, of texts with its label; 0 to 1.",
        None, minimum=0,
    )  # fmt: skip
    max_perplexity_ratio: float | None = option("Gate: largest perplexity over the reference's.", None, minimum=0)
    min_exact_match: float | None = option("Gate: least share of prompts answered exactly, 0 to 1.", None, minimum=0)
    max_size_mb: float | None = option("Gate: largest artifact, in megabytes (10^6 bytes).", None, minimum=0)
    max_memory_mb: float | None = option(
        "Gate: most memory above the runtime's own, in megabytes (10^6 bytes).", None, minimum=0
    )
    min_prefill: float | None = option("Gate: least speed of reading the prompt, tokens per second.", None, minimum=0)
    min_decode: float | None = option("Gate: least decode speed, tokens per second.", None, minimum=0)
    max_fault_chance: float | None = option(
        "Gate, with --error-budget: largest chance that a token errs more than rounding does; a fault is above 0.75.",
        None, minimum=0,
    )  # fmt: skip
    min_quality: float | None = option(
        "Gate, encoders: least accuracy, retrieval or rank correlation, as the rows have it; 0 to 1.", None, minimum=0
    )
    min_cosine: float | None = option(
        "Gate, encoders: least mean cosine with the FP32 reference's answers, 0 to 1.", None, minimum=0
    )


@dataclass(frozen=True)
class CompareOptions:
    """Which ways of shipping to compare. How to measure them is validate's section of --config, or of the run."""

    model: str | None = option("Train first, with --out: the base model, as finetune takes it.", None)
    data: str | None = option("Train first: training rows, as finetune takes them.", None)
    eval_data: str | None = option("Train first: rows never trained on, as finetune takes them.", None)
    target: tuple[str, ...] = option("Runtimes to compare in.", TARGETS, TARGETS)
    deployment: tuple[str, ...] = option("Rows of the table.", DEPLOYMENTS, DEPLOYMENTS)
    method: tuple[str, ...] = option("Methods of the merged PTQ rows.", tuple(run.PTQ_METHODS), tuple(run.PTQ_METHODS))


@dataclass(frozen=True)
class SensitivityOptions:
    """What to measure each layer on, and what to pick its bits by."""

    tokens: int = option("Tokens of the training rows to measure on.", 1024, minimum=16)
    seed: int = option("Seed of the choice of rows.", 0, minimum=0)
    max_size_mb: float | None = option(
        "Pick bits: most KL saved while the weights stay within this, in megabytes (10^6 bytes).", None, minimum=0
    )
    max_kl: float | None = option(
        "Pick bits: least size with a predicted KL within this, nats per token.", None, minimum=0
    )


def load(cls: type[Options], section: str, path: Path | None, flags: dict[str, Any]) -> Options:
    """Options of one verb: `flags` (None where not given) over the file's `section` over a profile over the defaults.

    Raises:
        UsageError: an unreadable file, an unknown key (the nearest is named), a wrong type or value,
            or a required option that nobody gave.
    """
    values = _section(section, path)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            raise UsageError(f"{path}: unknown key '{section}.{key}'.{_nearest(key, list(fields))}")
    values.update({k: v for k, v in flags.items() if v is not None})
    checked = _checked(cls, values, f"{section}.")
    resolved = all(n in checked for n in fields if profiles.permitted(n))  # as in a run's config.yaml
    if checked.get("profile") is not None and not resolved:
        checked = _of_profile(cls, checked["profile"]) | checked
    missing = [n for n, f in fields.items() if f.default is MISSING and n not in checked]
    if missing:
        flag = flag_name(missing[0])
        raise UsageError(f"{flag} is missing. Give it as a flag, or as '{section}.{missing[0]}' in --config FILE.")
    return cls(**checked)


def of_devices(options: ValidateOptions, path: Path | None, flags: dict[str, Any]) -> dict[str, ValidateOptions]:
    """What holds for devices with a profile of their own; `options` were loaded from the same file and flags.

    Raises:
        UsageError: a profile for no device of `options`, or one that cannot be; names the device, too.
    """
    found = {}
    for device, name in profiles.by_device(options.device_profile, options.device).items():
        try:
            found[device] = load(ValidateOptions, "validate", path, {**flags, "profile": name})
        except UsageError as error:
            raise UsageError(f"--device-profile {device}={name}: {error}") from error
    return found


def flag_name(name: str) -> str:
    """Spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def read_sections(path: Path) -> dict[str, Any]:
    """All sections of a configuration file.

    Raises:
        UsageError: the file is missing, is no YAML, or names a verb that takes no configuration.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError as error:
        raise UsageError(f"--config {path}: no such file.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise UsageError(f"--config {path}: expected sections such as 'finetune:', found {type(document).__name__}.")
    known = ["finetune", "quantize", "export", "validate", "sensitivity", "compare"]
    for key, value in document.items():
        if key not in known:
            raise UsageError(f"{path}: unknown section '{key}'.{_nearest(str(key), known)}")
        if value is not None and not isinstance(value, dict):
            raise UsageError(f"{path}: section '{key}' must hold 'key: value' lines.")
    return document


def save(path: Path, section: str, options: Any, left_out: Collection[str] = ()) -> None:
    """Write the resolved options of one verb but those left out into the run's config.yaml, beside other sections."""
    document = read_sections(path) if path.is_file() else {}
    document[section] = {name: value for name, value in plain(options).items() if name not in left_out}
    run.write_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def plain(options: Any) -> dict[str, Any]:
    """Options as YAML and JSON hold them: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}


def _of_profile(cls: type, name: str) -> dict[str, Any]:
    """Options that a device profile sets.

    Raises:
        UsageError: no such profile, or one with a key or a value that cannot be; names the file and the key.
    """
    path, values = profiles.read(name)
    known = [f.name for f in dataclasses.fields(cls) if profiles.permitted(f.name)]
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: unknown key '{key}'.{_nearest(key, known)}")
    return _checked(cls, values, f"{path}: ")


def _checked(cls: type, values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Values as the fields have them; prefix: what an error puts before the field's name."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    return {k: _coerce(v, hints[k], fields[k], f"{prefix}{k}") for k, v in values.items()}


def _section(section: str, path: Path | None) -> dict[str, Any]:
    return {} if path is None else dict(read_sections(path).get(section) or {})


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."


def _coerce(value: Any, hint: Any, spec: dataclasses.Field[Any], name: str) -> Any:
    """`value` as the field's type, checked against its choices and minimum."""
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, str | list | tuple):
            raise UsageError(f"{name}: expected a list, found {value!r}.")
        items = [value] if isinstance(value, str) else list(value)
        return tuple(_coerce(v, typing.get_args(hint)[0], spec, name) for v in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is float and isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not hint:
        raise UsageError(f"{name}: expected {hint.__name__}, found {value!r}.")
    choices, minimum = spec.metadata["choices"], spec.metadata["minimum"]
    if choices and value not in choices:
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(map(str, choices))}.")
    if minimum is not None and value < minimum:
        raise UsageError(f"{name}: {value} is below the least permitted value, {minimum:g}.")
    return value
