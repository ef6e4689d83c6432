"""Check a whole checkpoint before the Trainer reads it: that its files are data alone, and fit this training.

    adapter_model.safetensors or model.safetensors   every trained tensor, and no other
    optimizer.pt, scheduler.pt, rng_state.pth        pickles: read by torch's loader that runs nothing (weights_only)
    trainer_state.json                               the step, and the log of losses

training_args.bin, the tokenizer and README.md are not read. The Trainer prefers some other names to these, so a
checkpoint that has them is refused.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import safe_globals

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.models.adapter_files import ADAPTER_WEIGHTS, read_tensors
from qat_edge.models.merge import WHOLE_MODEL, whole_state
from qat_edge.train.checkpoints import STATE, step_of

# Files that the Trainer would read in place of those that it writes here.
FOREIGN = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin", "optimizer.bin", "scaler.pt",
    "*/adapter_model.*", "*pytorch_model_fsdp*", "optimizer_*",
)  # fmt: skip
OWN_KEYS = ("lr", "fused")  # of a group of parameters: not compared with those of a checkpoint
STATE_TYPES = {
    "train_batch_size": int | None,
    "best_model_checkpoint": str | None,
    "stateful_callbacks": dict | None,
}
LOGGED = ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm")
# Raised by torch.load for a file that is damaged or holds more than data.
UNREADABLE = (
    pickle.UnpicklingError, struct.error, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    AssertionError, OverflowError, EOFError, OSError, ImportError,
)  # fmt: skip


class _Trainer(Protocol):
    """The part of the Trainer that a checkpoint has to fit."""

    model: Any
    optimizer: Any
    lr_scheduler: Any


def require_resumable(checkpoint: Path, trainer: _Trainer, steps: int) -> None:
    """Refuse a checkpoint that is whole, but not one of this training.

    Args:
        checkpoint: RUN/checkpoints/checkpoint-STEP.
        trainer: Has the model, the optimizer and the schedule.
        steps: Optimizer steps of the whole training.

    Raises:
        RunError: Names the file and what is wrong with it.
    """
    for pattern in FOREIGN:
        for path in checkpoint.glob(pattern):
            raise _refused(path, "finetune does not write it, and it would be read in place of what it writes")
    _check_state(checkpoint / STATE, step_of(checkpoint), steps)
    _check_weights(checkpoint, trainer.model)
    _check_optimizer(checkpoint / "optimizer.pt", trainer.optimizer)
    _check_schedule(checkpoint / "scheduler.pt", trainer.lr_scheduler, step_of(checkpoint))
    _check_generators(checkpoint / "rng_state.pth")


def _refused(path: Path, reason: str) -> RunError:
    """Return the error for a file that cannot be resumed from."""
    return RunError(
        f"--resume: {path} is not of this training: {reason}. Nothing was read from it. Restore {path.parent}, or "
        "remove that folder to continue from an earlier checkpoint or from the beginning."
    )


def _check_state(path: Path, step: int, steps: int) -> None:
    """Check the Trainer's own record: its step, and a log of numbers.

    Raises:
        RunError: Names the entry.
    """
    state = readers.read_object(path, RunError, allow_nan=True)
    for key, expected in (("global_step", step), ("max_steps", steps)):
        if type(state.get(key)) is not int or state[key] != expected:
            raise _refused(path, f"'{key}' is {readers.show(state.get(key))}, expected {expected}")
    for key in ("epoch", "num_input_tokens_seen", "total_flos"):
        if not _is_number(state.get(key, 0)) or state.get(key, 0) < 0:
            raise _refused(path, f"'{key}' is {readers.show(state[key])}, expected a number")

    unknown = sorted(state.keys() - {entry.name for entry in dataclasses.fields(TrainerState)})
    if unknown:
        raise _refused(path, f"'{readers.shorten(unknown[0])}' is none of its entries")
    for key, types in STATE_TYPES.items():
        if not isinstance(state.get(key), types):
            raise _refused(path, f"'{key}' is {readers.show(state[key])}, which the trainer does not write")
    _check_log(path, state.get("log_history"), step)


def _check_log(path: Path, log: Any, step: int) -> None:
    """Check that the log has the loss of every step, and numbers where the report reads them.

    Raises:
        RunError: Names the entry.
    """
    if not isinstance(log, list) or not all(isinstance(row, dict) for row in log):
        raise _refused(path, "'log_history' is not a list of objects")
    wrong = [key for row in log for key in LOGGED if key in row and not _is_number(row[key])]
    if wrong:
        raise _refused(path, f"'log_history' holds a '{readers.shorten(wrong[0])}' that is no number")
    logged = [row["step"] for row in log if "loss" in row and "step" in row]
    if logged != list(range(1, step + 1)):
        raise _refused(
            path, f"'log_history' has the losses of {len(logged)} steps, expected those of steps 1 to {step}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_weights(checkpoint: Path, model: PreTrainedModel | PeftModel) -> None:
    """Check that every trained tensor is in the file.

    Raises:
        RunError: Names the file and the tensors.
    """
    written, other = (ADAPTER_WEIGHTS, WHOLE_MODEL) if isinstance(model, PeftModel) else (WHOLE_MODEL, ADAPTER_WEIGHTS)
    if (checkpoint / other).exists():
        raise _refused(checkpoint / other, "a training of this --method does not write it")
    if isinstance(model, PeftModel):
        # peft saves the embedding as well where an adapter is on the head tied to it.
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        optional = get_peft_model_state_dict(model, save_embedding_layers=True)
    else:
        # Of a tensor with several names, one is in the file.
        expected, optional = whole_state(model.state_dict()), model.state_dict()
    read_tensors(checkpoint / written, expected, optional)


def _load(path: Path) -> dict[str, Any]:
    """Read a file that torch.save wrote, without running anything in it.

    Raises:
        RunError: It is missing, damaged, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise _refused(path, "it is missing")
    try:
        with safe_globals():
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise _refused(path, "it is damaged, or holds code in place of tensors and numbers") from error
    if not isinstance(found, dict):
        raise _refused(path, f"it holds a {type(found).__name__}")
    return found


def _check_optimizer(path: Path, optimizer: Optimizer) -> None:
    """Check settings and averages of the optimizer.

    Raises:
        RunError: Names the setting or the tensor.
    """
    saved, own = _load(path), optimizer.state_dict()
    groups, state = saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict) or len(groups) != len(own["param_groups"]):
        raise _refused(path, "it has other groups of parameters")
    for group, expected in zip(groups, own["param_groups"], strict=True):
        # The learning rate follows the schedule, and a GPU has another implementation than a CPU.
        differing = [key for key, value in expected.items() if key not in OWN_KEYS and _value(group, key) != value]
        if differing or not _is_rate(_value(group, "lr")):
            raise _refused(path, f"'{(differing or ['lr'])[0]}' of the optimizer is another one")

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, averages in state.items():
        known = isinstance(number, int) and 0 <= number < len(parameters)
        if not known or not isinstance(averages, dict) or averages.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise _refused(path, f"its entry {readers.show(number)} is not the average of a parameter's gradients")
        for name, tensor in averages.items():
            shape = () if name == "step" else parameters[number].shape
            if not isinstance(tensor, Tensor) or tensor.shape != shape or not _is_finite(tensor):
                raise _refused(path, f"'{name}' of parameter {number} has another shape, or is not finite")


def _is_finite(average: Tensor) -> bool:
    """Return whether all numbers are finite; those of averages in 8 bits are codes times scales."""
    stored: Any = getattr(average, "scale", average)
    return bool(torch.isfinite(stored).all())


def _is_rate(value: Any) -> bool:
    """Return whether a learning rate is a number; the optimizer in 8 bits has it as a tensor."""
    return _is_number(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)


def _value(group: Any, key: str) -> Any:
    """Return an entry of a group of parameters, with lists for tuples made equal to them."""
    value = group.get(key) if isinstance(group, Mapping) else None
    return tuple(value) if key == "betas" and isinstance(value, list) else value


def _check_schedule(path: Path, schedule: LRScheduler, step: int) -> None:
    """Check that a learning-rate schedule is at the step of its checkpoint.

    Raises:
        RunError: Names the entry.
    """
    saved, own = _load(path), schedule.state_dict()
    differing = sorted(saved.keys() ^ own.keys()) + [
        key for key, value in (("last_epoch", step), ("base_lrs", own["base_lrs"])) if saved.get(key) != value
    ]
    rates = saved.get("_last_lr")
    known = isinstance(rates, list) and len(rates) == len(own["base_lrs"]) and all(map(_is_rate, rates))
    if differing or not known or not all(math.isfinite(rate) for rate in rates or ()):
        raise _refused(path, f"'{(differing or ['_last_lr'])[0]}' of the schedule is another one")


def _check_generators(path: Path) -> None:
    """Check that states of random generators can be set.

    Raises:
        RunError: Names the generator.
    """
    states = _load(path)
    # Generators of their own, so that the random numbers of this process stay what they are.
    setters: dict[str, Callable[[Any], Any]] = {
        "python": random.Random().setstate,
        "numpy": np.random.RandomState().set_state,
        "cpu": torch.Generator().set_state,
    }
    for name, set_state in setters.items():
        try:
            set_state(states.get(name))
        except (TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
            raise _refused(path, f"the state of the generator '{name}' cannot be set") from error
