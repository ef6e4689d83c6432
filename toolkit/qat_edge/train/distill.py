"""Self-distillation: train the quantized model towards the predictions it made before fake quantization began.

    loss = (1 - w) cross_entropy + w T^2 KL(teacher || student)

Both distributions have temperature T, and the mean is over tokens with loss (https://arxiv.org/abs/1503.02531).

The teacher is the same base model with the adapters of the end of phase 1 and without rounding, so there is no second
copy of the model (`LiveTeacher`). Where phase 2 changes the base weights, or to save the teacher's forward pass, its
`top_k` most likely tokens are computed for every training row beforehand and read from a file (`CachedTeacher`). All
other tokens then count as one more choice.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qat_edge.data.packed_rows import POSITIONS
from qat_edge.data.token_table import IGNORED
from qat_edge.errors import RunError
from qat_edge.quant import fake
from qat_edge.storage import replace_file
from qat_edge.train.next_token_loss import CHUNK, predict_targets

Batch = Mapping[str, Tensor]
MADE_OF = "made_of"  # key in the file of predictions: the teacher that made them
NEGLIGIBLE = 1e-9  # least probability of the choice that stands for all tokens after the top k


class Teacher(Protocol):
    """Source of the predictions that the student is trained towards."""

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of KL(teacher || student) over the tokens with loss, in nats.

        Args:
            batch: From `tokenization.Collator`, int64 (rows, length).
            logits: The student's at the positions with a target, row after row: (positions, vocabulary).
        """


class LiveTeacher:
    """The model as it was at the end of phase 1, computed again for every batch."""

    def __init__(self, model: PreTrainedModel | PeftModel, switch: fake.Switch, temperature: float) -> None:
        self.model, self.switch, self.temperature = model, switch, temperature
        self.snapshot = {name: p.detach().clone() for name, p in _adapters(model)}

    def load(self, adapter: Path) -> None:
        """Read the adapters of the end of phase 1 from the run folder, to resume a training."""
        saved = load_file(adapter / "adapter_model.safetensors")
        for name in self.snapshot:
            # peft leaves the adapter's name out of the names in the file.
            self.snapshot[name] = saved[name.replace(f".{fake.ADAPTER}.", ".")].to(self.snapshot[name].device)

    def logits(self, batch: Batch) -> Tensor:
        """Run the teacher and return its logits where the next token is a target, (positions, vocabulary)."""
        with torch.no_grad(), self._snapshot_in_model():
            return predict_targets(self.model, batch).logits

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of KL(teacher || student) over the tokens with loss; see `Teacher`."""
        chunks = zip(self.logits(batch).split(CHUNK), logits.split(CHUNK), strict=True)
        # Recomputed in the backward pass: the probabilities of all tokens at once take more memory than the rest of a
        # step.
        parts = [checkpoint(_divergence, *chunk, self.temperature, use_reentrant=False) for chunk in chunks]
        return torch.stack(parts).sum()

    @contextmanager
    def _snapshot_in_model(self) -> Iterator[None]:
        """Put the snapshot into the model inside the block, with rounding and dropout off."""
        enabled, training = self.switch.enabled, self.model.training
        # Exchanging `data` copies nothing, and the parameters stay the objects that the optimizer has.
        current = {name: p.data for name, p in _adapters(self.model)}
        for name, parameter in _adapters(self.model):
            parameter.data = self.snapshot[name]
        self.switch.enabled = False
        self.model.eval()
        try:
            yield
        finally:
            for name, parameter in _adapters(self.model):
                parameter.data = current[name]
            self.switch.enabled = enabled
            self.model.train(training)


class CachedTeacher:
    """The `k` most likely tokens at every token with loss of every training row, read from a file.

    Attributes:
        choices: Token ids, int32 (tokens, k), all rows one after another.
        log_probs: Their log-probabilities, float16 (tokens, k).
        offsets: Beginning of each row in the two, int64 (rows + 1,), in the order of the training rows.
        index: Digest of a row's token ids -> its index.
    """

    def __init__(self, rows: Sequence[Mapping[str, list[int]]], file: Path, temperature: float) -> None:
        # A batch does not say which rows it has, so rows are found by their token ids.
        self.index = {_digest(row["input_ids"]): i for i, row in enumerate(rows)}
        if not file.is_file():
            raise RunError(
                f"{file} is missing: the teacher's predictions for --distill-top-k. Train again with --force."
            )
        tensors = load_file(file)
        self.choices, self.log_probs, self.offsets = tensors["choices"], tensors["log_probs"], tensors["offsets"]
        self.temperature = temperature

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return the sum of KL(teacher || student) over the tokens with loss; see `Teacher`."""
        student = (logits.float() / self.temperature).log_softmax(-1)

        # Both sides at the k tokens that the teacher finds most likely.
        positions = self._positions(batch)
        log_p = self.log_probs[positions].float().to(student.device)
        log_q = student.gather(1, self.choices[positions].long().to(student.device))
        return (log_p.exp() * (log_p - log_q)).sum() + _remaining_divergence(log_p, log_q)

    def _positions(self, batch: Batch) -> Tensor:
        """Return the positions of a batch's tokens with loss in the file, row after row."""
        # Batches come in random order, so a row is found by its token ids.
        rows = [self.index[_digest(ids)] for ids in _rows_of(batch)]
        return torch.cat([torch.arange(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows])


def write_cache(
    teacher: LiveTeacher,
    batches: Iterator[Batch],
    top_k: int,
    file: Path,
    advance: Callable[[int], None],
    made_of: str = "",
) -> None:
    """Run the teacher on all rows in order and write its `top_k` most likely tokens at every token with loss.

    Args:
        teacher: The model at the end of phase 1.
        batches: All training rows, in order.
        top_k: Number of tokens to keep.
        file: Read by `CachedTeacher`.
        advance: Called with the number of rows done.
        made_of: Identity of the teacher, for `cache_made_of`.
    """
    choices, log_probs, offsets, done = [], [], [0], 0
    for batch in batches:
        for chunk in teacher.logits(batch).split(CHUNK):
            likely = (chunk.float() / teacher.temperature).log_softmax(-1).topk(top_k)
            choices.append(likely.indices.to(torch.int32).cpu())
            log_probs.append(likely.values.to(torch.float16).cpu())
        for count in (batch["labels"][:, 1:] != IGNORED).sum(1).tolist():
            offsets.append(offsets[-1] + count)
        done += len(batch["labels"])
        advance(done)

    tensors = {"choices": torch.cat(choices), "log_probs": torch.cat(log_probs), "offsets": torch.tensor(offsets)}
    with replace_file(file) as work:
        save_file(tensors, work, metadata={MADE_OF: made_of})


def cache_made_of(file: Path) -> str | None:
    """Return the identity of the teacher whose predictions a file holds; None where it has none."""
    try:
        with safe_open(file, framework="pt") as tensors:
            made_of: str | None = (tensors.metadata() or {}).get(MADE_OF)
            return made_of
    except (OSError, SafetensorError):
        return None


def _digest(ids: Sequence[int]) -> bytes:
    """Return 16 bytes that stand for a row: the ids themselves would take more memory than the rest of a training."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def _rows_of(batch: Batch) -> Iterator[list[int]]:
    """Yield the token ids of each row of a batch, in order and without padding."""
    for i, ids in enumerate(batch["input_ids"].tolist()):
        if POSITIONS not in batch:
            yield ids[: int(batch["attention_mask"][i].sum())]
            continue
        begins = (batch[POSITIONS][i] == 0).nonzero().flatten().tolist()
        for begin, end in pairwise([*begins, len(ids)]):
            # Padding begins at position 0 too, and has no loss; every row has.
            if bool((batch["labels"][i, begin:end] != IGNORED).any()):
                yield ids[begin:end]


def _divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return the sum of KL(teacher || student).

    Args:
        teacher: Logits, (tokens, vocabulary).
        student: Logits, (tokens, vocabulary).
        temperature: Divides both logits.
    """
    log_p = (teacher.float() / temperature).log_softmax(-1)
    log_q = (student.float() / temperature).log_softmax(-1)
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _remaining_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the part of the divergence from all tokens that were not kept, taken as one choice.

    Args:
        log_p: The teacher's log-probabilities of the kept tokens, (tokens, k).
        log_q: The student's for the same tokens, (tokens, k).
    """
    # Clamped: by rounding, the probabilities of the kept tokens may sum to 1 or more.
    p = (1 - log_p.exp().sum(1)).clamp(min=NEGLIGIBLE)
    q = (1 - log_q.exp().sum(1)).clamp(min=NEGLIGIBLE)
    return (p * (p.log() - q.log())).sum()


def _adapters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the LoRA matrices of a model by name."""
    return [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
