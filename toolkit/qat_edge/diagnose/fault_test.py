"""Is a model's difference from the frozen checkpoint rounding or a fault, and where do the two part first.

No two runtimes agree exactly: a last-bit difference flips a rounded activation now and then, and that flips others. So
the difference is held against what the checkpoint makes of a disturbance of every layer by one part in 10^6, as sums of
a thousand floats in another order differ, token by token:

    error(t)  = 10 log10(sum (r - c)^2 / sum r^2) over the logits of token t, dB; below -100 dB it is float rounding
    chance(p) = P(error of the candidate > error of the disturbed checkpoint), both at position p, ties counting half

(Mann and Whitney's U over the number of pairs.) Another draw of the same noise has a chance of 0.5. Short prompts are
compared at their first positions, where little noise has gathered yet: attention hands every flip on to later tokens.
The very first does not decide: trained models keep massive activations there (https://arxiv.org/abs/2402.17762), and
correct runtimes were up to 5 dB further apart than the disturbance explains (SmolLM2-135M, ONNX Runtime).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qat_edge.data.tokenization import ScoredIds
from qat_edge.evaluate import reference
from qat_edge.evaluate.reference import Logits
from qat_edge.evaluate.results import Judgement

PROMPTS, LENGTH = 48, 8
DECODED_FROM = LENGTH // 2  # position: an artifact is asked both ways, prompts at once and tokens one at a time
JUDGED_FROM = 1  # position; the one before only tells where a fault begins
DISTURBANCE = 1e-6  # of a layer's outputs, root mean square
SEEDS = 3  # of the disturbed checkpoint
EQUAL_DB = -100.0
# Two layers, 32 to 48 prompts: correct implementations, both artifacts among them, 0.40 to 0.62 (SmolLM2: 0.50, 0.52);
# faults 0.80 and more.
BEYOND = 0.75
FAULT_DB = -95.0  # from equal inputs float sums differ by -112 dB at most (SmolLM2-135M, both runtimes)
AGREEING = 0.3  # of the tokens, where something is rounded in between; a fault errs at three of four and more

Errors = NDArray[np.float64]  # (prompts, LENGTH), dB
# Module name -> its inputs (tokens, in) and outputs (tokens, out), None where they were not seen.
Trace = Mapping[str, tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Parting:
    """The first module at which two models part from equal inputs: in what goes into it, or in what comes out."""

    module: str
    at_input: bool

    def __str__(self) -> str:
        if self.at_input:
            return f"{self.module}: another input, from equal outputs before it (norm, rotary angles, mask or cache)"
        return f"{self.module}: another output from an equal input (its weights, its scales or how it rounds)"


def probes(sequences: Sequence[ScoredIds]) -> list[ScoredIds]:
    """Short prompts out of the middle of longer ones, evenly spread: their first tokens are not all of one template."""
    ids = np.concatenate([np.asarray(s.ids) for s in sequences])
    starts = np.linspace(0, len(ids) - LENGTH - 1, min(PROMPTS, len(ids) - LENGTH)).astype(int)
    return [ScoredIds(ids[start : start + LENGTH + 1].tolist(), list(range(LENGTH))) for start in starts]


def errors(expected: Iterable[Logits], found: Iterable[Logits]) -> Errors:
    """Error of every token of every prompt in dB; both give (LENGTH, vocabulary) for each prompt in turn."""
    rows = []
    for one, other in zip(expected, found, strict=True):
        signal = np.square(one, dtype=np.float64).sum(axis=-1)
        noise = np.square(one.astype(np.float64) - other).sum(axis=-1)
        # A padding token's logits may all be zero: then any other answer is an error of 0 dB.
        share = np.divide(noise, signal, out=np.sign(noise), where=signal > 0)
        rows.append(10 * np.log10(np.maximum(share, 10 ** (EQUAL_DB / 10))))
    return np.stack(rows)


def noise(model: Any, prompts: Sequence[ScoredIds], expected: Sequence[Logits]) -> Errors:
    """Errors of the model itself, disturbed: (SEEDS * prompts, LENGTH)."""
    found = []
    for seed in range(SEEDS):
        with _each_layer_disturbed(model, seed):
            found.append(errors(expected, reference.rows(model, prompts)))
    return np.concatenate(found)


def judge(found: Errors, floor: Errors) -> Judgement:
    """Whether errors are beyond those of the disturbed checkpoint, and from which position on."""
    more, equal = (compared(found[:, None], floor[None]) for compared in (np.greater, np.isclose))
    chances = (more & ~equal).mean(axis=(0, 1)) + equal.mean(axis=(0, 1)) / 2
    chance = float(chances[JUDGED_FROM:].max())
    beyond = chance > BEYOND
    return Judgement(beyond, chance, int(np.flatnonzero(chances > BEYOND)[0]) if beyond else None, "")


@contextmanager
def _each_layer_disturbed(model: Any, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def disturb(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        size = DISTURBANCE * output.square().mean(dim=-1, keepdim=True).sqrt()
        return output + size * torch.randn(output.shape, generator=generator)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                stack.callback(module.register_forward_hook(disturb).remove)
        yield


def trace(model: Any, names: Iterable[str], run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor]]:
    """What goes into the named modules, not yet rounded, and what comes out while `run` runs them in batches of one."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    with ExitStack() as stack:
        for name in found:
            module, (inputs, outputs) = model.get_submodule(name), found[name]

            def before(module: nn.Module, args: Any, inputs: list[Tensor] = inputs) -> None:
                inputs.append(args[0][0].detach().float())

            def after(module: nn.Module, args: Any, output: Tensor, outputs: list[Tensor] = outputs) -> None:
                outputs.append(output[0].detach().float())

            stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        run()
    return {name: (torch.cat(inputs), torch.cat(outputs)) for name, (inputs, outputs) in found.items()}


def first_parting(
    model: Any, candidates: Sequence[tuple[Sequence[int], Trace]], every_linear: bool = True
) -> Parting | None:
    """The first place at which the model, given what the candidate gave everywhere before, says otherwise.

    That is asked of tokens that were read at once and of those decoded, each for themselves: a fault may be in one way.

    Each input and output is replaced by the candidate's, so that everything is compared from equal inputs and no error
    is carried on; what lies between two modules shows in the input of the second.

    candidates: what passed through the candidate, by prompt. every_linear: it shows every linear layer, so that nothing
    between two modules rounds.
    """
    errors_db: dict[Parting, list[Tensor]] = {}  # by token, in the order in which the model computes
    for ids, candidate in candidates:
        _follow(model, ids, candidate, lambda place, error_db: errors_db.setdefault(place, []).append(error_db))
    for place, error_db in errors_db.items():
        # Of float arithmetic alone not one token may differ. A value on a rounding tie may fall to either side, and
        # attention hands that on to later tokens of its prompt: then most others must agree.
        share = 1.0 if place.at_input and every_linear else AGREEING
        ways = [torch.cat([e[part] for e in error_db]) for part in (slice(DECODED_FROM), slice(DECODED_FROM, None))]
        if any(len(way) and float(way.quantile(share)) > FAULT_DB for way in ways):
            return place
    return None


def _follow(model: Any, ids: Sequence[int], candidate: Trace, told: Callable[[Parting, Tensor], None]) -> None:
    """Run the model on one prompt and tell the error at every place, each time from the candidate's values."""
    with ExitStack() as stack:
        for name, (inputs, outputs) in candidate.items():

            def before(module: nn.Module, args: Any, name: str = name, inputs: Tensor | None = inputs) -> Any:
                if inputs is None:
                    return None
                told(Parting(name, at_input=True), _error_db(inputs, args[0][0]))
                return (inputs[None], *args[1:])

            def after(
                module: nn.Module, args: Any, output: Any, name: str = name, outputs: Tensor | None = outputs
            ) -> Any:
                if outputs is None:
                    return None
                ours, *rest = output if isinstance(output, tuple) else (output,)
                told(Parting(name, at_input=False), _error_db(outputs, ours[0]))
                return (outputs[None], *rest) if isinstance(output, tuple) else outputs[None]

            module = model.get_submodule(name)
            # Before the hook that rounds the input.
            stack.callback(module.register_forward_pre_hook(before, prepend=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        with torch.no_grad():
            model(torch.tensor([list(ids)]))


def _error_db(expected: Tensor, found: Tensor) -> Tensor:
    """By token, of two (tokens, features)."""
    noise, signal = (expected - found).square().sum(-1), expected.square().sum(-1)
    return 10 * torch.log10((noise / signal.clamp(min=1e-30)).clamp(min=1e-20))
