"""Several processes of one training: which of them works, and how they agree.

Each process computes the same training on its share of every batch. What decides how a training goes on has to be the
same in all of them, or one would wait for the others for ever. So there are three ways to do things:

    in every process     what depends on the options, the model and the rows alone
    `on_first`           what writes files, or takes long: process 0 does it, and the others get its result or its error
    `largest`, `total`   what each process knows a part of: signals, losses, errors of reading

A single process needs none of this, and they do nothing there. They use a group of processes of their own, over TCP and
without a time limit: process 0 may take hours for the start of QAT. When a process ends, its connections close, and
every wait for it ends with an error.
"""

from __future__ import annotations

import atexit
import os
import platform
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from qat_edge import environment, launched, readers
from qat_edge.errors import DataError, QatEdgeError, RunError, UsageError

T = TypeVar("T")

ENDLESS = timedelta(days=30)  # of the group in which the others wait for process 0
ERROR_KEY = "qat_edge_error"
# Texts of the errors of gloo, NCCL and the store at a process that is gone.
LOST = re.compile(r"gloo/|NCCL|TCPStore|connection (closed|reset|refused)", re.IGNORECASE)

_control: Any = None  # group of all processes; None in a single one


def join(device: str) -> None:
    """Connect the processes that a launcher started; without one, do nothing.

    Args:
        device: "cpu" or "cuda".

    Raises:
        UsageError: This machine has fewer GPUs than processes.
        RunError: The others cannot be reached.
    """
    global _control
    environment.require_launch()
    if launched.count() == 1 or _control is not None:
        return
    if device == "cuda":
        torch.cuda.set_device(_gpu())
    try:
        if not dist.is_initialized():
            store, rank, count = next(rendezvous("env://"))
            launched.decide_reports_by(lambda: _is_first_error(store))
            dist.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                store=PrefixStore("qat_edge", store), rank=rank, world_size=count,
            )  # fmt: skip
        _control = dist.new_group(backend="gloo", timeout=ENDLESS)
    except RuntimeError as error:
        address = ":".join(os.environ[name] for name in environment.RENDEZVOUS)
        raise RunError(
            f"The {launched.count()} processes of this training cannot connect over {address}: "
            f"{readers.shorten(str(error), 300)}. Start all of them, and let this machine reach that one."
        ) from error


def leave() -> None:
    """Close the connections when this process ends: all others have reached this, too."""
    if _control is not None:
        dist.barrier(_control)
        atexit.unregister(_close)
        atexit.register(_close)


def count() -> int:
    """Return the number of processes."""
    return 1 if _control is None else dist.get_world_size()


def rank() -> int:
    """Return the rank of this process."""
    return 0 if _control is None else dist.get_rank()


def is_first() -> bool:
    """Return whether this process writes the run folder."""
    return rank() == 0


def on_first(make: Callable[[], T]) -> T:
    """Call `make` in process 0 alone, and return its result in all of them.

    Raises:
        QatEdgeError: The error of process 0.
    """
    if _control is None:
        return make()
    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            outcome[0] = make()
        except Exception as error:
            failure = error
            outcome[1] = error if isinstance(error, QatEdgeError) else RunError(f"Process 0 failed: {error!r}")
    dist.broadcast_object_list(outcome, src=0, group=_control, device=torch.device("cpu"))
    if failure is not None or outcome[1] is not None:
        raise failure or outcome[1]
    result: T = outcome[0]
    return result


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank."""
    if _control is None:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_control)
    return values


def largest(number: int) -> int:
    """Return the largest number that a process has."""
    if _control is None:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_control)
    return int(found)


def total(tensor: Tensor) -> Tensor:
    """Return the sum of the tensors of all processes, on the CPU."""
    found = tensor.detach().cpu().clone()
    if _control is not None:
        dist.all_reduce(found, group=_control)
    return found


# --- agreement ---------------------------------------------------------------------------------------------


def require_divisible(batch_size: int) -> None:
    """Refuse a batch that cannot be shared equally.

    Raises:
        UsageError: Has both numbers.
    """
    processes = launched.count()
    if batch_size % processes:
        above = -(-batch_size // processes) * processes
        raise UsageError(
            f"--batch-size {batch_size} and {processes} processes: it is the number of rows of a step over all "
            f"processes, so that the same command gives the same training with any number of them. Give a multiple of "
            f"{processes}, such as {above}."
        )


def require_shared(path: Path) -> None:
    """Refuse a run folder that other processes do not see. path: a file in it that names process 0.

    Raises:
        RunError: Names the machines.
    """
    seen = gather((platform.node(), path.read_text(encoding="utf-8") if path.is_file() else ""))
    blind = sorted({host for host, text in seen if text != seen[0][1]})
    if blind:
        raise RunError(
            f"{path.parent} is not visible on {', '.join(blind)}: all processes of a training read the run folder that "
            "process 0 writes. Give --out a path on a file system that all machines mount."
        )


def require_same(value: str, what: str, remedy: str) -> None:
    """Refuse to go on where processes have different things.

    Args:
        value: Identity of what this process has.
        what: Name of it, for the message.
        remedy: What to do.

    Raises:
        RunError: Names the processes that differ from process 0.
    """
    values = gather(value)
    others = [str(i) for i, each in enumerate(values) if each != values[0]]
    if others:
        raise RunError(f"{what} of process {', '.join(others)} differ from those of process 0. {remedy}")


def require_all(error: Exception | None) -> None:
    """Raise an error in every process if one of them has met it.

    Args:
        error: Of this process; None if it has met none.

    Raises:
        QatEdgeError: The error of the first process that has one.
    """
    if _control is None:
        if error is not None:
            raise error
        return
    if not largest(int(error is not None)):
        return
    found = next(each for each in gather(error and (isinstance(error, QatEdgeError), str(error))) if each)
    if error is not None:
        raise error
    raise DataError(found[1] if found[0] else f"Another process failed: {found[1]}")


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error was raised because another process has ended."""
    return _control is not None and (isinstance(error, dist.DistError) or bool(LOST.search(str(error))))


def _is_first_error(store: Store) -> bool:
    """Return whether no other process has met an error before this one, or that cannot be found out."""
    try:
        return store.add(ERROR_KEY, 1) == 1
    except RuntimeError:
        return True  # without torchrun, the store ends with process 0


def _gpu() -> int:
    """Return the number of the GPU of this process."""
    local, found = environment.local_rank(), torch.cuda.device_count()
    if local >= found:
        raise UsageError(
            f"Process {local} of this machine has no GPU: torch finds {found} here. Start at most {found} processes "
            "a machine (--nproc-per-node of torchrun), or give --device cpu."
        )
    return local


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
