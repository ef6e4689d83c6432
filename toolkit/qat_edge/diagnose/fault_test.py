"""Decide whether a model differs from the frozen checkpoint by rounding noise or by a fault, and where it diverges.

No two runtimes agree exactly: a difference in the last bit flips a rounded activation now and then, and that flips
others. So the difference is compared with the effect of disturbing the output of every layer of the checkpoint by one
part in 10^6, as much as sums of a thousand floats in another order differ, and its embeddings by one part in 10^7,
which moves those of int8 tables off the ties that many of them lie on. Token by token:

    error(t)  = 10 log10(sum (r - c)^2 / sum r^2) over the logits of token t, dB; below -100 dB it is float rounding
    chance(p) = P(error of the candidate > error of the disturbed checkpoint), both at position p, ties counting half

This is the U statistic of Mann and Whitney (https://doi.org/10.1214/aoms/1177730491) divided by the number of pairs.
Another sample of the same noise has a chance of 0.5. Short prompts are compared at their first positions, where little
noise has accumulated yet: attention passes every flip on to later tokens. The very first position does not decide:
trained models keep massive activations there (https://arxiv.org/abs/2402.17762), and correct runtimes differed by up
to 5 dB more than the disturbance explains (SmolLM2-135M, ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat_edge.data.tokenization import ScoredIds
from qat_edge.evaluate import reference
from qat_edge.evaluate.reference import Logits
from qat_edge.evaluate.results import FaultTest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPTS, LENGTH = 48, 8
DECODED_FROM = LENGTH // 2  # position: earlier tokens are prefilled at once, later ones decoded one at a time
DECISIVE_FROM = 1  # position; the one before it only helps to locate a fault
DISTURBANCE = 1e-6  # of a layer's outputs, relative to their root mean square
SEEDS = 3  # of the disturbed checkpoint
EQUAL_DB = -100.0
# Two layers, 32 to 48 prompts: correct implementations, both artifacts among them, 0.40 to 0.62 (SmolLM2: 0.50, 0.52);
# faults 0.80 and more.
MAX_CHANCE = 0.75
FAULT_DB = -95.0  # given equal inputs, float sums differ by at most -112 dB (SmolLM2-135M, both runtimes)
AGREEING = 0.3  # least share of correct tokens after a rounding step; a fault affects three of four tokens and more

Errors = NDArray[np.float64]  # (prompts, LENGTH), dB
# Module name -> its inputs (tokens, in) and outputs (tokens, out), None where they were not recorded.
Trace = Mapping[str, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Divergence:
    """The first module at which two models diverge although all values before it are equal.

    Attributes:
        module: name of the module.
        at_input: True if its input differs, False if its output does.
    """

    module: str
    at_input: bool

    def __str__(self) -> str:
        if self.at_input:
            return f"{self.module}: its input differs, given equal outputs before it (norm, rotary angles, mask, cache)"
        return f"{self.module}: its output differs, given an equal input (its weights, its scales or how it rounds)"


def short_prompts(sequences: Sequence[ScoredIds]) -> list[ScoredIds]:
    """Cut evenly spaced prompts of LENGTH tokens out of the sequences.

    They come from the middle as well, because the first tokens of all sequences may be those of one template.
    """
    ids = np.concatenate([np.asarray(s.ids) for s in sequences])
    starts = np.linspace(0, len(ids) - LENGTH - 1, min(PROMPTS, len(ids) - LENGTH)).astype(int)
    return [ScoredIds(ids[start : start + LENGTH + 1].tolist(), list(range(LENGTH))) for start in starts]


def errors_db(expected: Iterable[Logits], found: Iterable[Logits]) -> Errors:
    """Return the error of every token of every prompt in dB; both arguments yield (LENGTH, vocabulary) a prompt."""
    rows = []
    for reference_logits, logits in zip(expected, found, strict=True):
        signal = np.square(reference_logits, dtype=np.float64).sum(axis=-1)
        noise = np.square(reference_logits.astype(np.float64) - logits).sum(axis=-1)
        # A padding token's logits may all be zero: then any other logits are an error of 0 dB.
        ratio = np.divide(noise, signal, out=np.sign(noise), where=signal > 0)
        rows.append(10 * np.log10(np.maximum(ratio, 10 ** (EQUAL_DB / 10))))
    return np.stack(rows)


def noise_db(model: PreTrainedModel, prompts: Sequence[ScoredIds], expected: Sequence[Logits]) -> Errors:
    """Return the errors of the model itself under disturbance: (SEEDS * prompts, LENGTH)."""
    samples = []
    for seed in range(SEEDS):
        with layers_disturbed(model, seed):
            samples.append(errors_db(expected, reference.compared_logits(model, prompts)))
    return np.concatenate(samples)


def compare_errors(errors: Errors, noise: Errors, decisive_from: int = DECISIVE_FROM) -> FaultTest:
    """Test whether errors exceed those of the disturbed checkpoint, and from which position on.

    Args:
        errors: of the candidate, (prompts, positions), dB.
        noise: of the disturbed checkpoint, (draws, positions), dB.
        decisive_from: position from which on an excess counts.
    """
    # Every error is paired with every sample of the noise at the same position.
    pairs = errors[:, None], noise[None]
    equal = np.isclose(*pairs)
    larger = np.greater(*pairs) & ~equal
    chances = larger.mean(axis=(0, 1)) + equal.mean(axis=(0, 1)) / 2  # (LENGTH,)

    chance = float(chances[decisive_from:].max())
    exceeds = chance > MAX_CHANCE
    first = int(np.flatnonzero(chances > MAX_CHANCE)[0]) if exceeds else None
    return FaultTest(exceeds, chance, position=first, location="")


@contextmanager
def layers_disturbed(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Add normal noise to the embeddings and to the output of every linear layer inside the block."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        size = DISTURBANCE * output.square().mean(dim=-1, keepdim=True).sqrt()
        return output + size * torch.randn(output.shape, generator=generator)

    with ExitStack() as stack:
        stack.enter_context(reference.disturbed(model, seed))
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(disturb).remove)
        yield


def trace(model: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """Record the inputs, before rounding, and the outputs of modules during `run`.

    Args:
        model: that `run` calls, in batches of one.
        names: of its modules.
        run: called once.

    Returns:
        By module its inputs (tokens, in) and outputs (tokens, out), float32.
    """
    recorded: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    with ExitStack() as stack:
        for name, (inputs, outputs) in recorded.items():
            module = model.get_submodule(name)

            def before(module: nn.Module, args: Any, inputs: list[Tensor] = inputs) -> None:
                inputs.append(args[0][0].detach().float())

            def after(module: nn.Module, args: Any, output: Tensor, outputs: list[Tensor] = outputs) -> None:
                outputs.append(output[0].detach().float())

            # First among the hooks: another one rounds the input.
            stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        run()
    return {name: (torch.cat(inputs), torch.cat(outputs)) for name, (inputs, outputs) in recorded.items()}


def find_divergence(
    model: PreTrainedModel, candidates: Sequence[tuple[Sequence[int], Trace]], every_linear: bool = True
) -> Divergence | None:
    """Find the first input or output at which a candidate diverges from the model.

    Every input and output in the model is replaced by the candidate's, so that everything is compared given equal
    inputs and no error is carried on. A difference between two modules shows in the input of the second. Prefilled
    and decoded tokens are tested separately, because a fault may affect only one of the two.

    Args:
        model: the frozen checkpoint, rounding as the runtime does.
        candidates: ids of a prompt and what the candidate computed for it.
        every_linear: True if the traces contain every linear layer, so that nothing is rounded between two modules.

    Returns:
        The first divergence in the order of computation, None if there is none.
    """
    errors: dict[Divergence, list[Tensor]] = {}  # dB by token, one tensor a prompt, in the order of computation
    for ids, candidate in candidates:
        for divergence, error_db in _compare_modules(model, ids, candidate):
            errors.setdefault(divergence, []).append(error_db)

    for divergence, by_prompt in errors.items():
        # Pure float arithmetic must agree for every token. A value at a rounding tie may go either way, and attention
        # passes that on to later tokens of its prompt: then a share of the others must agree.
        share = 1.0 if divergence.at_input and every_linear else AGREEING
        prefilled = torch.cat([error_db[:DECODED_FROM] for error_db in by_prompt])
        decoded = torch.cat([error_db[DECODED_FROM:] for error_db in by_prompt])
        for tokens in (prefilled, decoded):
            if len(tokens) and float(tokens.quantile(share)) > FAULT_DB:
                return divergence
    return None


def _compare_modules(model: PreTrainedModel, ids: Sequence[int], candidate: Trace) -> list[tuple[Divergence, Tensor]]:
    """Run the model on one prompt, replacing each input and output by the candidate's.

    Returns:
        The error of each in dB by token, (tokens,), in the order of computation.
    """
    errors: list[tuple[Divergence, Tensor]] = []
    with ExitStack() as stack:
        for name, (inputs, outputs) in candidate.items():

            def before(module: nn.Module, args: Any, name: str = name, inputs: Tensor | None = inputs) -> Any:
                if inputs is None:
                    return None
                errors.append((Divergence(name, at_input=True), _error_db(inputs, args[0][0])))
                return (inputs[None], *args[1:])

            def after(
                module: nn.Module, args: Any, output: Any, name: str = name, outputs: Tensor | None = outputs
            ) -> Any:
                if outputs is None:
                    return None
                ours, *rest = output if isinstance(output, tuple) else (output,)
                errors.append((Divergence(name, at_input=False), _error_db(outputs, ours[0])))
                return (outputs[None], *rest) if isinstance(output, tuple) else outputs[None]

            module = model.get_submodule(name)
            # First among the hooks: another one rounds the input.
            stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        with torch.no_grad():
            model(torch.tensor([list(ids)]))
    return errors


def _error_db(expected: Tensor, found: Tensor) -> Tensor:
    """Return the error by token in dB, of two tensors (tokens, features)."""
    noise, signal = (expected - found).square().sum(-1), expected.square().sum(-1)
    return 10 * torch.log10((noise / signal.clamp(min=1e-30)).clamp(min=1e-20))
