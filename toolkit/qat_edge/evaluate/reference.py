"""Inference in torch, for comparison with artifacts: logits, generated text and speed of a Hugging Face model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge.data.tokenization import ScoredIds
from qat_edge.errors import DeviceError
from qat_edge.evaluate.results import Speed, Spread
from qat_edge.models.generation_settings import greedy_decoding
from qat_edge.quant import frozen, numerics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Logits = NDArray[np.float32]
DISTURBANCE = 1e-7  # relative, about the last bit of a float32
BATCH = 16  # prompts that are generated for at once


class LogitStore:
    """Logits on disk: one float32 .npy file (compared tokens, vocabulary) a sequence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, index: int, logits: Logits) -> None:
        np.save(self.folder / f"{index:05d}.npy", logits)

    def get(self, index: int) -> Logits:
        return np.asarray(np.load(self.folder / f"{index:05d}.npy", mmap_mode="r"))


def score(
    model: PreTrainedModel, sequences: Sequence[ScoredIds], store: LogitStore, advance: Callable[[int], None]
) -> None:
    """Write the model's logits at the compared positions of every sequence to `store`.

    advance: called after each sequence with the number that are done.
    """
    for index, logits in enumerate(compared_logits(model, sequences)):
        store.put(index, logits)
        advance(index + 1)


def compared_logits(model: PreTrainedModel, sequences: Sequence[ScoredIds]) -> Iterator[Logits]:
    """Yield the model's logits at the compared positions of each sequence: float32 (positions, vocabulary)."""
    for sequence in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([sequence.ids]), logits_to_keep=torch.tensor(sequence.positions)).logits[0]
        yield logits.float().numpy()


def read_rows(path: Path, positions: Sequence[int], width: int | None = None) -> Logits:
    """Read the rows at `positions` from a .npy file of logits (tokens, vocabulary) that a device returned.

    Args:
        path: of the file.
        positions: rows to read.
        width: expected size of the vocabulary; None where it is not known.

    Raises:
        DeviceError: it is no such file, or of another shape or type.
    """
    try:
        logits = np.load(path, mmap_mode="r", allow_pickle=False)
        found = f"{logits.dtype} {logits.shape}"
        is_right = logits.dtype == np.float32 and logits.ndim == 2 and len(logits) > max(positions, default=-1)
    except (OSError, ValueError, EOFError, SyntaxError, AttributeError, TypeError, OverflowError, MemoryError) as error:
        raise DeviceError(f"the logits that the device returned cannot be read ({type(error).__name__}).") from error
    if not is_right or (width is not None and logits.shape[1] != width):
        expected = f"float32 (at least {max(positions, default=-1) + 1}, {width or 'vocabulary'})"
        raise DeviceError(f"the device returned logits {found}, expected {expected}. Is the artifact this run's own?")
    return np.asarray(logits[list(positions)])


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    eos_ids: Sequence[int],
    max_new_tokens: int,
    pad_id: int,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, without its end token."""
    outputs: list[list[int]] = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]

        # Pad on the left, so that every continuation starts at the same column.
        width = max(map(len, batch))
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])

        with torch.no_grad(), greedy_decoding(model, eos_ids, pad_id, max_new_tokens):
            generated = model.generate(ids, attention_mask=mask)
        outputs += [_before_end(row[width:].tolist(), eos_ids) for row in generated]
    return outputs


def load_exact(folder: Path) -> PreTrainedModel:
    """Load the frozen model with its weights dequantized once: equal to `frozen.load` and several times faster."""
    model, rounded = load_dequantized(folder)
    for name in rounded:
        model.get_submodule(name).register_forward_pre_hook(numerics.round_input)
    return model


def load_dequantized(folder: Path) -> tuple[PreTrainedModel, list[str]]:
    """Load the frozen model with its weights dequantized.

    Returns:
        The model, which rounds no inputs, and the names of the modules whose input the frozen model rounds.
    """
    model = frozen.load(folder)
    rounded = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, IntxUnpackedToInt8Tensor):
            continue
        if weight.activation_quantization:
            rounded.append(name)
        # torchao would dequantize it again in every forward pass.
        module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model, rounded


@contextmanager
def disturbed(model: PreTrainedModel, seed: int = 0) -> Iterator[PreTrainedModel]:
    """Multiply the model's embeddings by 1 + 1e-7 times normal noise inside the block.

    What then changes in the outputs is floating-point noise, not a fault.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * (1 + DISTURBANCE * torch.randn(output.shape, generator=generator))

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield model
    finally:
        handle.remove()


def speed(model: PreTrainedModel, prefill: int, decode: int, repeats: int, threads: int) -> Speed:
    """Time a torch model: one warm-up, then `repeats` rounds of `prefill` prompt tokens and `decode` new tokens."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rounds = [_time_round(model, prefill, decode) for _ in range(repeats + 1)]
    finally:
        torch.set_num_threads(threads_before)

    timed = rounds[1:]  # the first is the warm-up
    return Speed(
        threads=threads, prompt_tokens=prefill, new_tokens=decode, repeats=repeats,
        prefill=spread([prefill / first for first, _ in timed]),
        decode=spread([decode / rest for _, rest in timed]),
        first_token_ms=spread([first * 1e3 for first, _ in timed]),
    )  # fmt: skip


def spread(values: Sequence[float]) -> Spread:
    """Return the median, the smallest and the largest of the values."""
    return Spread(float(np.median(values)), min(values), max(values))


def size_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Return the bytes of a torch model's weights: linears, embedding, head (0 where tied to the embedding), float."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    sizes = {"linears": 0, "embedding": embedding.nbytes, "head": 0 if head is embedding else head.nbytes, "float": 0}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    for parameter in model.parameters():
        # A tied head is the same parameter as the embedding, and is counted once.
        if parameter is not embedding and parameter is not head:
            sizes["linears" if id(parameter) in linears else "float"] += parameter.nbytes
    return sizes


def _before_end(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    """Return the ids before the first end token."""
    ends = [i for i, token in enumerate(ids) if token in eos_ids]
    return ids[: ends[0]] if ends else ids


def _time_round(model: PreTrainedModel, prefill: int, decode: int) -> tuple[float, float]:
    """Return the seconds until the first token, and the seconds for `decode` more."""
    token = torch.arange(prefill).unsqueeze(0) % model.config.vocab_size
    cache: Any = None
    times = [time.perf_counter()]
    with torch.no_grad():
        for step in range(decode + 1):
            output = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            # The first step reads the prompt, each later one a single token.
            if step in (0, decode):
                times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1]
