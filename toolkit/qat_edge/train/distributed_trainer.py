"""Trainer of one of several processes: the steps of `QatTrainer`, each process on its share of every batch.

All processes draw the same batches in the same order as a single one would, and each computes the loss of every n-th
row of a batch (`ShareOfBatch`). With N the tokens of a step over all processes, process r computes

    loss_r = n / N * sum over its tokens of the cross entropy

DistributedDataParallel takes the mean over the n processes, of the gradients, and the log takes it of the losses: both
are then those of the whole batch, whatever number of tokens a process has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import EvalLoopOutput

from qat_edge.data.token_table import IGNORED
from qat_edge.errors import UsageError
from qat_edge.quant import fake
from qat_edge.train import checkpoints, distributed
from qat_edge.train.objectives import Objective
from qat_edge.train.sharded_base import ShardedBase
from qat_edge.train.trainer import QatTrainer

RANDOM_STATES = "rng_state.pth"
OTHERS = "others"  # key of the states of the other processes, next to those of process 0


class ShareOfBatch:
    """Collator that takes the rows of this process out of a batch of all processes.

    Attributes:
        collate: Makes tensors of rows.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Mapping[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Any]) -> Mapping[str, Tensor]:
        """Return the tensors of every n-th row. Where there is none, one row without a token that has a loss."""
        own = rows[distributed.rank() :: distributed.count()]
        if own:
            return self.collate(own)
        # The last batch of the data may have fewer rows than there are processes, and each of them has to take part.
        batch = dict(self.collate(rows[:1]))
        return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


class DistributedTrainer(QatTrainer):
    """A `QatTrainer` that trains with the other processes of a launcher."""

    data_collator: Any
    current_flos: float
    sharded: ShardedBase | None = None  # the base weights, with --shard-base
    _states: Sequence[dict[str, Any]] = ()  # of the random generators, by process, while a checkpoint is written

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.data_collator = ShareOfBatch(self.data_collator)

    def set_objective(self, objective: Objective | None) -> None:
        """Train on an encoder's objective; on next-token prediction where it is None.

        Raises:
            UsageError: The model's own loss is not a sum over tokens, so shares of a batch do not add up to it.
        """
        super().set_objective(objective)
        if objective is None and not self.at_targets:
            raise UsageError(
                f"{type(fake.base_of(self.model)).__name__} computes a loss of its own, which is no mean over tokens: "
                f"{distributed.count()} processes would train another loss than one. Start it without a launcher."
            )

    # --- base weights --------------------------------------------------------------------------------------

    def shard_base(self) -> None:
        """Cut the frozen base weights into shards when the training begins."""
        assert self.model is not None
        self.sharded = ShardedBase(self.model)

    def whole_base(self) -> AbstractContextManager[None]:
        """Return a context in which all base weights are whole."""
        return nullcontext() if self.sharded is None else self.sharded.whole()

    def gather_base(self) -> None:
        """Make all base weights whole, once the steps are done."""
        if self.sharded is not None:
            self.sharded.gather()

    # --- rows ----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of all processes, in the order of a single one; the collator takes its share."""
        if self.stream is not None:
            return super().get_train_dataloader()
        rows: Any = self.train_dataset
        loader: DataLoader[Any] = DataLoader(
            rows,
            self.args.per_device_train_batch_size,
            sampler=RandomSampler(rows),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return prepare_data_loader(
            loader, self.args.device, num_processes=1, process_index=0, put_on_device=True, use_seedable_sampler=True,
            data_seed=self.args.seed,
        )  # fmt: skip

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the batches of a step and the number of tokens in them, over all processes.

        Raises:
            QatEdgeError: A process cannot read its rows.
        """
        batches, failure = [], None
        try:
            batches = list(islice(epoch_iterator, num_batches))
        except Exception as error:
            failure = error
        if self.stream is not None:
            distributed.require_all(failure)  # each process reads the stream itself, and one may fail alone
        elif failure is not None:
            raise failure
        return batches, self._get_num_items_in_batch(batches, device)

    # --- loss ----------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the share of this process; in training, such that the mean over processes is the loss."""
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        if self.objective is not None and not bool((inputs["labels"] != IGNORED).any()):
            loss = loss * 0  # no row of this process
        if model.training:
            loss = loss * distributed.count()
        return (loss, {}) if return_outputs else loss

    def step_loss(self) -> Tensor:
        """Return the loss of this step over all batches and processes."""
        return torch.as_tensor(self.accelerator.gather(self._tr_loss)).mean()

    def batch_losses(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
        """Return the loss of each batch of rows, summed over all processes, with the number of its tokens or rows."""
        own = torch.tensor(super().batch_losses(rows), dtype=torch.float64)
        return [(loss, int(weight)) for loss, weight in distributed.total(own).tolist()]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return the loss on the evaluation rows: the mean over rows of the mean of their batch, as the Trainer's."""
        rows: Any = self.eval_dataset
        size, total = self.args.per_device_eval_batch_size, 0.0
        for i, (loss, weight) in enumerate(self.batch_losses(rows)):
            total += loss / weight * min(size, len(rows) - i * size) if weight else float("nan")
        metrics = {f"{metric_key_prefix}_loss": total / len(rows)}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(rows))

    def store_flos(self) -> None:
        """Count operations as if each process had done as many: process 0 may be alone when it writes a checkpoint."""
        self.state.total_flos += self.current_flos * distributed.count()
        self.current_flos = 0

    # --- checkpoints ---------------------------------------------------------------------------------------

    def _prepare_for_training(self, *arguments: Any) -> Any:
        if self.sharded is not None:
            self.sharded.exclude_from_ddp()
        prepared = super()._prepare_for_training(*arguments)
        if self.sharded is not None:
            self.sharded.shard()
        # Order and initial values are the same in all processes; dropout should not be. Process 0 is as one alone.
        if distributed.rank():
            torch.manual_seed(self.args.seed + distributed.rank())
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint from process 0, with the random generators of all."""
        assert self.model is not None
        self._states = distributed.gather(random_states())
        distributed.on_first(lambda: QatTrainer._save_checkpoint(self, self.model, trial))

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random generators in the file of a single process, which can be resumed from it."""
        torch.save({**self._states[0], OTHERS: list(self._states[1:])}, Path(output_dir, RANDOM_STATES))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random generators; a process that the saved training did not have begins new ones."""
        if checkpoint is None:
            return
        with safe_globals():
            saved = torch.load(Path(checkpoint, RANDOM_STATES), map_location="cpu", weights_only=True)
        states = [saved, *saved.get(OTHERS, ())]
        if distributed.rank() < len(states):
            set_random_states(states[distributed.rank()])
        else:
            step = checkpoints.step_of(Path(checkpoint))
            torch.manual_seed(hash((self.args.seed, distributed.rank(), step)) % 2**63)


def random_states() -> dict[str, Any]:
    """Return the states of the random generators of this process, as the Trainer saves those of a single one."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    return states | ({"cuda": torch.cuda.random.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore what `random_states` returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and isinstance(states.get("cuda"), Tensor):
        torch.cuda.random.set_rng_state(states["cuda"])
