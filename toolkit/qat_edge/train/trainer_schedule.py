"""Learning rates of the two phases in a trainer that is not ours, by its own schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_scheduler

from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions
from qat_edge.readers import shorten
from qat_edge.train.trainer import qat_learning_rate

Factor = Callable[[int], float]  # step, counted from 0 -> share of the peak learning rate


def set_learning_rates(schedule: Any, optimizer: Any, options: FinetuneOptions, args: TrainingArguments) -> Factor:
    """Give the trainer's schedule the learning rates of QAT, and return the factor of the scales' peak rate.

    As in `trainer.learning_rate_factor`, QAT begins with a warm-up and the schedule of its own, at a lower peak, unless
    one schedule spans both phases.

    Args:
        schedule: Of the trainer.
        optimizer: Of the trainer; its rates are set for the next step.
        options: Learning rates, and the steps of both phases.
        args: The trainer's arguments, which name the schedule.

    Raises:
        UsageError: The schedule depends on the loss, or the optimizer has a learning rate of its own.
    """
    if not isinstance(schedule, LambdaLR):
        raise UsageError(
            f"lr_scheduler_type={shorten(str(args.lr_scheduler_type))}: QAT has a learning rate of its own, which "
            "needs a schedule by steps. Give cosine, linear or constant."
        )
    peaks = {*schedule.base_lrs}
    if options.qat_learning_rate is not None and peaks != {options.learning_rate}:
        raise UsageError(
            f"qat_learning_rate={options.qat_learning_rate:g}: the trainer's optimizer has other learning rates "
            f"({', '.join(f'{rate:g}' for rate in sorted(peaks))}) than its arguments ({options.learning_rate:g}). "
            "Leave it out, and QAT has a share of each of them."
        )
    start, left = options.qat_start_step, options.steps - options.qat_start_step
    ratio = 1.0 if options.learning_rate == 0 else qat_learning_rate(options) / options.learning_rate
    again = _schedule(args, left) if options.lr_restart and left else None

    def of_qat(own: Factor, step: int) -> float:
        return own(step) if again is None else again(step - start)

    def with_qat(own: Factor) -> Factor:
        return lambda step: own(step) if step < start else ratio * of_qat(own, step)

    first = schedule.lr_lambdas[0]
    schedule.lr_lambdas = [with_qat(own) for own in schedule.lr_lambdas]
    # The schedule has set the rates of the next step already.
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
    return lambda step: of_qat(first, step)


def _schedule(args: TrainingArguments, steps: int) -> Factor:
    """Return the schedule of the trainer's arguments over `steps` steps, with a warm-up of at most a fifth.

    Raises:
        UsageError: It has arguments that these steps do not allow.
    """
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=min(args.get_warmup_steps(steps), steps // 5),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"lr_scheduler_kwargs={shorten(str(args.lr_scheduler_kwargs))}: not possible for the {steps} steps of QAT "
            f"({shorten(str(error))}). Change them, or give prepare(..., lr_restart=False)."
        ) from error
    factor: Factor = schedule.lr_lambdas[0]
    return factor
