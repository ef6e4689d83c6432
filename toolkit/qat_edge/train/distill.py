"""Self-distillation: the quantized model learns from what it was before fake quantization began.

    loss = (1 - w) cross_entropy + w T^2 KL(teacher || student), both at temperature T, mean over tokens with loss

(https://arxiv.org/abs/1503.02531). The teacher is the same base with the adapters of the end of phase 1 and no
rounding, so there is no second copy of the model. Where the base is changed for phase 2, or to save the teacher's
forward pass, its `top_k` most likely tokens are kept for every row of the training data instead; what lies beyond them
counts as one more choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from qat_edge.data.tokenization import IGNORED
from qat_edge.errors import RunError
from qat_edge.quant import fake

Batch = Mapping[str, Tensor]
CHUNK = 64  # tokens whose probabilities exist at once
NEGLIGIBLE = 1e-9  # least probability of the choice that stands for all beyond the top k


class Teacher(Protocol):
    """Gives the divergence of a batch, summed over its tokens with loss."""

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        """Sum of KL(teacher || student) in nats. logits: the student's, (rows, length, vocabulary)."""


class LiveTeacher:
    """The model as it was at the end of phase 1, asked anew for every batch."""

    def __init__(self, model: Any, switch: fake.Switch, temperature: float) -> None:
        self.model, self.switch, self.temperature = model, switch, temperature
        self.snapshot = {name: p.detach().clone() for name, p in _adapters(model)}

    def load(self, adapter: Path) -> None:
        """Take the adapters of the end of phase 1 from the run folder, for a resume."""
        saved = load_file(adapter / "adapter_model.safetensors")
        for name in self.snapshot:
            self.snapshot[name] = saved[name.replace(f".{fake.ADAPTER}.", ".")].to(self.snapshot[name].device)

    def logits(self, batch: Batch) -> Tensor:
        """(rows, length, vocabulary)."""
        with torch.no_grad(), self._in_place():
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return torch.as_tensor(output.logits)

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        wanted = batch["labels"][:, 1:] != IGNORED
        rows = zip(self.logits(batch)[:, :-1], logits[:, :-1], wanted, strict=True)
        chunks = [part for row in rows for part in zip(*(of_row.split(CHUNK) for of_row in row), strict=True)]
        # Recomputed in the backward pass: probabilities of all tokens at once are larger than the rest of a step.
        parts = [checkpoint(_divergence, *part, self.temperature, use_reentrant=False) for part in chunks]
        return torch.stack(parts).sum()

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The snapshot in the adapters' place, rounding and dropout off."""
        enabled, training = self.switch.enabled, self.model.training
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
    """The `k` most likely tokens of every training row, kept in a file.

    choices: int32 (tokens, k), log_probs: float16 (tokens, k), of all rows one after the other; offsets: int64
    (rows + 1,) into them, in the order of the rows.
    """

    def __init__(self, rows: Sequence[Mapping[str, list[int]]], file: Path, temperature: float) -> None:
        self.index = {tuple(row["input_ids"]): i for i, row in enumerate(rows)}
        if not file.is_file():
            raise RunError(f"{file} is missing: the teacher's answers for --distill-top-k. Train again with --force.")
        tensors = load_file(file)
        self.choices, self.log_probs, self.offsets = tensors["choices"], tensors["log_probs"], tensors["offsets"]
        self.temperature = temperature

    def divergence(self, batch: Batch, logits: Tensor) -> Tensor:
        wanted = batch["labels"][:, 1:] != IGNORED
        student = (logits[:, :-1][wanted].float() / self.temperature).log_softmax(-1)
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = [self.index[tuple(ids[:n])] for ids, n in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        places = torch.cat([torch.arange(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows])
        log_p = self.log_probs[places].float().to(student.device)
        log_q = student.gather(1, self.choices[places].long().to(student.device))
        return (log_p.exp() * (log_p - log_q)).sum() + _beyond(log_p, log_q)


def write_cache(
    teacher: LiveTeacher, batches: Iterator[Batch], top_k: int, file: Path, advance: Callable[[int], None]
) -> None:
    """Ask the teacher about all rows in order and keep its `top_k` choices at every token with loss."""
    choices, log_probs, offsets, done = [], [], [0], 0
    for batch in batches:
        wanted = batch["labels"][:, 1:] != IGNORED
        likely = (teacher.logits(batch)[:, :-1].float() / teacher.temperature).log_softmax(-1).topk(top_k)
        for row in range(len(wanted)):
            choices.append(likely.indices[row][wanted[row]].to(torch.int32).cpu())
            log_probs.append(likely.values[row][wanted[row]].to(torch.float16).cpu())
            offsets.append(offsets[-1] + len(choices[-1]))
        done += len(wanted)
        advance(done)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"choices": torch.cat(choices), "log_probs": torch.cat(log_probs), "offsets": torch.tensor(offsets)}, file
    )


def _divergence(teacher: Tensor, student: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Sum of KL(teacher || student) over the `wanted` (tokens,) of logits (tokens, vocabulary)."""
    log_p, log_q = ((logits[wanted].float() / temperature).log_softmax(-1) for logits in (teacher, student))
    return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def _beyond(log_p: Tensor, log_q: Tensor) -> Tensor:
    """What the tokens that were not kept add to the divergence, as one choice."""
    p = (1 - log_p.exp().sum(1)).clamp(min=NEGLIGIBLE)
    q = (1 - log_q.exp().sum(1)).clamp(min=NEGLIGIBLE)
    return (p * (p.log() - q.log())).sum()


def _adapters(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
