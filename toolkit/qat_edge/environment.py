"""Refuse what the environment asks of transformers and accelerate, and this package does not do.

Both obey variables in silence, or end with an error of their own after minutes. Those that change how a training runs
are refused by name, and so are values that neither library can read. Values that change nothing are permitted.

Reference: accelerate 1.15, state.py, accelerator.py and utils/dataclasses.py
"""

from __future__ import annotations

import os
import sys

from qat_edge import readers
from qat_edge.errors import UsageError
from qat_edge.launched import COUNT, RANK

ON, OFF = ("1", "y", "yes", "t", "true", "on"), ("0", "n", "no", "f", "false", "off")  # as accelerate reads them
LEVELS = ("CRITICAL", "FATAL", "ERROR", "WARN", "WARNING", "INFO", "DEBUG", "NOTSET")  # of Python's logging

# Numbers of processes, as accelerate reads them.
PROCESS_COUNTS = (COUNT, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANK = "LOCAL_RANK"
# What torchrun and accelerate set for each of the processes of a training.
RANKS = (LOCAL_RANK, RANK)
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")

# Switches of another way to train, with what it does to weights; each one is off, or refused.
SHARDS = "which cuts weights into shards, and the start of QAT rotates and replaces whole weights"
TRAINERS = {
    "ACCELERATE_USE_DEEPSPEED": f"DeepSpeed, {SHARDS}",
    "ACCELERATE_USE_FSDP": f"accelerate's FSDP, {SHARDS}; --shard-base cuts frozen weights alone",
    "ACCELERATE_USE_MEGATRON_LM": f"Megatron-LM, {SHARDS}",
    "ACCELERATE_USE_PARALLELISM_CONFIG": f"tensor or context parallelism, {SHARDS}",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's processes, which other libraries connect",
}
# Choices with the one value that changes nothing. Any compiler but NO also has a GPU multiply in TF32.
CHOICES = {"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_FP8_BACKEND": "NO"}
# Switches that matter on a GPU alone: there, training would run on the CPU, or need another package.
GPU_SWITCHES = ("ACCELERATE_USE_CPU", "ACCELERATE_CPU_AFFINITY")
# Switches without an effect on the result of a training.
NEUTRAL_SWITCHES = (
    "ACCELERATE_DEBUG_MODE", "ACCELERATE_DYNAMO_USE_FULLGRAPH", "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION",
    "ACCELERATE_DYNAMO_USE_DYNAMIC", "FORK_LAUNCHED",
)  # fmt: skip
# Read while accelerate is imported.
IMPORT_SWITCHES = ("USE_TORCH_XLA", "ACCELERATE_ENABLE_RICH")
DEVICE, LOG_LEVEL, MIXED_PRECISION = "ACCELERATE_TORCH_DEVICE", "ACCELERATE_LOG_LEVEL", "ACCELERATE_MIXED_PRECISION"


def require_importable() -> None:
    """Refuse what transformers and accelerate cannot be imported with.

    Raises:
        UsageError: Python runs without docstrings, or a variable has a value that the import fails at.
    """
    if sys.flags.optimize > 1:
        raise UsageError(
            "Python runs without docstrings (-OO, or PYTHONOPTIMIZE=2), and transformers builds its classes from them. "
            "Leave -OO out, or unset PYTHONOPTIMIZE."
        )
    for name in IMPORT_SWITCHES:
        _require_readable(name)
    if os.environ.get(LOG_LEVEL, "INFO").upper() not in LEVELS:
        raise UsageError(f"{_found(LOG_LEVEL)}, which is no level of logging. Unset {LOG_LEVEL}, or set it to INFO.")


def require_plain_training(device: str, precision: str) -> None:
    """Refuse variables with which the Trainer would not train as chosen.

    Args:
        device: "cpu" or "cuda".
        precision: "bf16" or "fp32", of the matrix products.

    Raises:
        UsageError: The training would wait for other processes, run on another device or in another precision, or use
            a library that is not supported; or a value cannot be read.
    """
    require_launch()
    for name, title in TRAINERS.items():
        _require_readable(name)
        harmless = name.endswith("SAGEMAKER") and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") == "NO"
        if _is_on(name) and not harmless:
            raise UsageError(f"{_found(name)}, and qat-edge does not train with {title}. Unset {name}; DDP needs none.")
    for name, neutral in CHOICES.items():
        found = os.environ.get(name, neutral)
        # accelerate reads one of them in capital letters only.
        if (found if "FP8" in name else found.upper()) != neutral:
            raise UsageError(f"{_found(name)}, and qat-edge trains without. Unset {name}, or set it to {neutral}.")
    for name in (*GPU_SWITCHES, *NEUTRAL_SWITCHES):
        _require_readable(name)
        if name in GPU_SWITCHES and device == "cuda" and _is_on(name):
            raise UsageError(f"{_found(name)}, and the training is on the GPU. Unset {name}, or give --device cpu.")
    _require_same_machine(device, precision)


def require_launch() -> None:
    """Refuse variables of a launcher that belong to no training of one or several processes.

    Raises:
        UsageError: A number of processes or a rank cannot be read, or a part is missing: the training would wait for
            processes that nobody has started.
    """
    for name in PROCESS_COUNTS:
        if name in os.environ and (_number(name) or 0) < 1:
            raise UsageError(f"{_found(name)}, which is no number of processes. Unset {name}.")
    processes = _number(COUNT) or 1
    for name in PROCESS_COUNTS[1:]:
        if (_number(name) or 1) > 1 and _number(name) != processes:
            raise UsageError(
                f"{_found(name)}, and {COUNT} is {os.environ.get(COUNT, 'not set')}: the training would wait for the "
                f"others. Start it with torchrun or `accelerate launch`, or unset {name}."
            )
    if processes == 1 and os.environ.get(LOCAL_RANK, "-1") == "-1":
        return
    missing = [name for name in (COUNT, *RANKS, *RENDEZVOUS) if name not in os.environ]
    name = COUNT if processes > 1 else LOCAL_RANK
    if missing:
        raise UsageError(
            f"{_found(name)}, and {', '.join(missing)} not set: the training would wait for other processes. Start it "
            f"with torchrun or `accelerate launch`, or unset {name}."
        )
    for name in RANKS:
        if not 0 <= (-1 if (found := _number(name)) is None else found) < processes:
            raise UsageError(
                f"{_found(name)}, and there are {processes} processes ({COUNT}). Start the training with torchrun or "
                f"`accelerate launch`, or unset {name}."
            )


def local_rank() -> int:
    """Return the rank of this process on its machine; 0 without a launcher."""
    return _number(LOCAL_RANK) or 0


def _require_same_machine(device: str, precision: str) -> None:
    """Refuse another device and another precision than those chosen."""
    found = os.environ.get(DEVICE, device)
    if found != device and not (device == "cuda" and found == "cuda:0"):
        raise UsageError(
            f"{_found(DEVICE)}, and the training is on {device}. Unset {DEVICE}, or give another --device."
        )
    own = "bf16" if precision == "bf16" else "no"
    if os.environ.get(MIXED_PRECISION, "") not in ("", own):
        raise UsageError(
            f"{_found(MIXED_PRECISION)}, and the training has --precision {precision}. Unset {MIXED_PRECISION}, or "
            "give another --precision."
        )


def _require_readable(name: str) -> None:
    """Refuse a switch that is neither on nor off."""
    if os.environ.get(name, "0").lower() not in (*ON, *OFF):
        raise UsageError(f"{_found(name)}, which is neither on nor off. Unset {name}, or set it to 1 or 0.")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ON


def _number(name: str) -> int | None:
    """Return the number in a variable; None for anything else."""
    try:
        return int(os.environ.get(name, ""))
    except ValueError:
        return None


def _found(name: str) -> str:
    """Return the beginning of a message about a variable."""
    return f"{name} is {readers.shorten(os.environ[name]) or 'empty'} in the environment"
