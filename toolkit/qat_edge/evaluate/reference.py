"""The torch side of validate: what the FP32 fine-tune and the frozen checkpoint say to the same token ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge.data.tokenization import ScoredIds
from qat_edge.evaluate.results import Speed, Spread
from qat_edge.quant import frozen, numerics

Logits = NDArray[np.float32]
DISTURBANCE = 1e-7  # relative, about the last bit of a float32
BATCH = 16


class LogitStore:
    """Logits of many sequences on disk, one float32 file (compared tokens, vocabulary) each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, index: int, logits: Logits) -> None:
        np.save(self.folder / f"{index:05d}.npy", logits)

    def get(self, index: int) -> Logits:
        return np.asarray(np.load(self.folder / f"{index:05d}.npy", mmap_mode="r"))


def score(model: Any, sequences: Sequence[ScoredIds], store: LogitStore, advance: Callable[[int], None]) -> None:
    """Put the model's logits at every compared position into `store`, in float32."""
    for index, logits in enumerate(rows(model, sequences)):
        store.put(index, logits)
        advance(index + 1)


def rows(model: Any, sequences: Sequence[ScoredIds]) -> Iterator[Logits]:
    """The model's logits at the compared positions of each sequence in turn: float32 (positions, vocabulary)."""
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids]), logits_to_keep=torch.tensor(sequence.positions)).logits[0]
        yield logits.float().numpy()


def read_rows(path: Path, positions: Sequence[int]) -> Logits:
    """The compared rows of a file of logits (tokens, vocabulary)."""
    return np.asarray(np.load(path, mmap_mode="r")[list(positions)])


def answer(
    model: Any, prompts: Sequence[Sequence[int]], eos_ids: Sequence[int], max_new_tokens: int, pad_id: int
) -> list[list[int]]:
    """Greedy continuations without their end tokens."""
    found: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        with torch.no_grad():
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=list(eos_ids), pad_token_id=pad_id,
            )  # fmt: skip
        found += [_until_end(row[width:].tolist(), eos_ids) for row in output]
    return found


def load_exact(folder: Path) -> Any:
    """The frozen model with its weights dequantized once: the same numbers as `frozen.load`, several times faster."""
    model, rounded = load_dequantized(folder)
    for name in rounded:
        model.get_submodule(name).register_forward_pre_hook(numerics.round_input)
    return model


def load_dequantized(folder: Path) -> tuple[Any, list[str]]:
    """The frozen model with its weights dequantized and no input rounded, and the modules whose input is to be."""
    model = frozen.load(folder)
    rounded = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        if weight.activation_quantization:
            rounded.append(name)
        module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model, rounded


@contextmanager
def disturbed(model: Any, seed: int = 0) -> Iterator[Any]:
    """The model with its embeddings off by one part in 10^7: whatever changes is arithmetic noise, not a fault."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + DISTURBANCE * torch.randn(output.shape, generator=generator))

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield model
    finally:
        handle.remove()


def speed(model: Any, prefill: int, decode: int, repeats: int, threads: int) -> Speed:
    """Prefill, decode and time to first token of a torch model, one warm-up and `repeats` timed rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounds = [_timed(model, prefill, decode) for _ in range(repeats + 1)][1:]
    finally:
        torch.set_num_threads(before)
    return Speed(
        threads=threads, prompt_tokens=prefill, new_tokens=decode, repeats=repeats,
        prefill=spread([prefill / first for first, _ in rounds]),
        decode=spread([decode / rest for _, rest in rounds]),
        first_token_ms=spread([first * 1e3 for first, _ in rounds]),
    )  # fmt: skip


def spread(values: Sequence[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(float(np.median(values)), min(values), max(values))


def size_by_part(model: Any) -> dict[str, int]:
    """Bytes of a torch model's weights: linears, embedding, head (0 where it shares the embedding's table), float."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = {"linears": 0, "embedding": embedding.nbytes, "head": 0 if head is embedding else head.nbytes, "float": 0}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        if parameter is not embedding and parameter is not head:
            sizes["linears" if id(parameter) in linears else "float"] += parameter.nbytes
    return sizes


def _until_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids


def _timed(model: Any, prefill: int, decode: int) -> tuple[float, float]:
    """Seconds to the first token, and for `decode` more."""
    token = torch.arange(prefill).unsqueeze(0) % model.config.vocab_size
    cache: Any = None
    times = [time.perf_counter()]
    with torch.no_grad():
        for step in range(decode + 1):
            output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            if step in (0, decode):
                times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]
