"""A model one block at a time on calibration data: what each linear layer sees once the blocks before are rounded.

Only one block's statistics exist at a time, and one hidden state a token: memory does not grow with depth. A
block's inputs are what the deployed model computes: codes for the weights before it, int8 for every linear input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_edge import progress
from qat_edge.errors import DataError, ModelError
from qat_edge.quant import numerics
from qat_edge.quant.ptq.activation_cache import Replay
from qat_edge.quant.scheme import Scheme, WeightScheme

SAME = 0.02  # of a shift by one standard deviation: bfloat16 sums are off by up to 2^-8
STRIP = 256  # columns of a sum of x x^T at once; of 1536 it took 70% of the time that all at once did
Calibration = Mapping[str, Tensor]  # "input_ids", "attention_mask": (rows, length), padded on the right
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(Exception):
    """Ends a forward pass at the last block: the head's logits would be the largest tensor of all."""


@dataclass
class Batch:
    """One calibration batch on its way. hidden: (rows, length, width); keep: (rows * length,), False at padding;
    others: what each block is called with besides the hidden states; unrounded: `hidden` of the float model."""

    hidden: Tensor
    keep: Tensor
    others: list[Arguments]
    unrounded: Tensor


@dataclass(frozen=True)
class Block:
    """A block with the linear layers of the scheme that lie in it, by their names in the model.

    replay: layers that `treat` calls finished are not computed again by the passes to come under `rounded`.
    """

    module: nn.Module
    index: int
    linears: dict[str, Any]
    specs: dict[str, WeightScheme]
    batches: list[Batch]
    replay: Replay

    def weights(self, names: list[str]) -> Tensor:
        """Weights of layers that share an input, their rows one below the other: (sum of out, in), float32."""
        return torch.cat([self.linears[name].weight.detach().float() for name in names])

    def run(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """Hidden states after the block, from `batch.hidden` or those given: (rows, length, width)."""
        arguments, keywords = batch.others[self.index]
        self.replay.begin(batch if hidden is None else None)
        output = self.module(batch.hidden if hidden is None else hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def observe(self, batch: Batch, see: Callable[[str, Tensor], None], hidden: Tensor | None = None) -> Tensor:
        """`run`, with `see(name, input)` at every linear layer in the order of execution."""
        with ExitStack() as stack:
            for name, module in self.linears.items():
                hook = _observing(name, see)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            return self.run(batch, hidden)

    def input_of(self, batch: Batch, name: str) -> Tensor:
        """What one linear layer is given; the block is run no further."""
        seen: list[Tensor] = []

        def see(found: str, x: Tensor) -> None:
            if found == name:
                seen.append(x)
                raise _Stop

        with suppress(_Stop):
            self.observe(batch, see)
        return seen[0]

    def ends_with(self, name: str) -> bool:
        """Whether a linear layer's output is added to the block's as it is, so that it can correct all of it."""
        return self._adds(name, 1.0)

    def adds_to_stream(self, name: str) -> bool:
        """Whether a linear layer's output is added to the hidden states, whatever in the block reads them after."""
        return self._adds(name, 1000.0)  # what a block adds to hidden states of any size is bounded by its norms

    def _adds(self, name: str, size: float) -> bool:
        """Whether the block's output moves with a shift of the layer's, of `size` standard deviations of the former."""
        batch, module = self.batches[0], self.linears[name]
        before = self.run(batch)
        if module.weight.shape[0] != before.shape[-1]:
            return False
        shift = size * before.float().std(dim=(0, 1))
        handle = module.register_forward_hook(lambda _, arguments, output: output + shift.to(output.dtype))
        try:
            moved = self.run(batch).float() - before.float()
        finally:
            handle.remove()
        return bool(((moved - shift).abs().mean() < SAME * shift.mean()).all())

    def shared_inputs(self) -> list[list[str]]:
        """Names of the linear layers in order of execution, together where they are given the very same tensor."""
        seen: list[tuple[Tensor, list[str]]] = []  # holds the tensors, so that no id is used twice

        def see(name: str, x: Tensor) -> None:
            names = next((names for tensor, names in seen if tensor is x), None)
            if names is None:
                seen.append((x, [name]))
            elif name not in names:
                names.append(name)

        self.observe(self.batches[0], see)
        return [names for _, names in seen]

    def compensated(self) -> list[list[str]]:
        """`shared_inputs` of int4 weights alone: those that are rounded column by column."""
        groups = ([n for n in names if self.specs[n].bits == 4] for names in self.shared_inputs())
        return [names for names in groups if names]

    @contextmanager
    def rounded_inputs(self) -> Iterator[None]:
        """Linear layers get their inputs as int8 represents them, where the scheme says so."""
        with ExitStack() as stack:
            hook = _rounding_once()
            for name, module in self.linears.items():
                if self.specs[name].quantize_input:
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def rounded(self, scales: Mapping[str, Tensor], finished: bool = False) -> Iterator[None]:
        """The block as it will be deployed, under these scales or those of the largest weights; floats afterwards.

        finished: of layers that are, the weights alone; all inputs in any case.
        """
        names = self.replay.finished if finished else self.linears
        kept = {name: self.linears[name].weight.detach().clone() for name in names}
        try:
            for name, original in kept.items():
                spec, weight = self.specs[name], original.float()
                given = scales.get(name)
                used = numerics.choose_scales(weight, spec.bits, spec.group_size) if given is None else given
                rounded = numerics.dequantize(numerics.quantize(weight, used, spec.bits), used)
                self.linears[name].weight.data.copy_(rounded)
            with self.rounded_inputs(), self.replay.on():
                yield
        finally:
            for name, original in kept.items():
                self.linears[name].weight.data.copy_(original)


def walk(
    model: Any,
    scheme: Scheme,
    calibration: Sequence[Calibration],
    treat: Callable[[Block], dict[str, Tensor]],
    title: str,
) -> dict[str, Tensor]:
    """Give every block to `treat`, first to last, each with inputs that went through the rounded blocks before it.

    Returns what `treat` returned of all blocks: scales by module name.

    Raises:
        ModelError: no repeated blocks are found.
        DataError: no calibration data.
    """
    # Weights change from pass to pass: a cast that autocast kept of an earlier one would be used instead.
    with _no_kept_casts():
        return _walk(model, scheme, calibration, treat, title)


@contextmanager
def _no_kept_casts() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def summing(device: torch.device) -> Iterator[None]:
    """For products of float32 matrices that sum over tokens: sums in float32, factors rounded to bfloat16 on a CPU.

    Of 1024 random tokens it took 40% of the time, and the sums were off by 0.2%. A sum of x x^T stays positive, as both
    factors are rounded alike.
    """
    library: Any = torch.backends.mkldnn
    before = library.matmul.fp32_precision
    library.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        library.matmul.fp32_precision = before


def gram(rows: Tensor) -> Tensor:
    """rows^T rows (width, width), as `summing` takes it: what lies above the diagonal is copied, not computed."""
    width = rows.shape[1]
    found = rows.new_empty(width, width)
    with summing(rows.device):
        for start in range(0, width, STRIP):
            end = min(start + STRIP, width)
            found[start:, start:end] = rows[:, start:].T @ rows[:, start:end]
            found[start:end, end:] = found[end:, start:end].T
    return found


def _walk(
    model: Any,
    scheme: Scheme,
    calibration: Sequence[Calibration],
    treat: Callable[[Block], dict[str, Tensor]],
    title: str,
) -> dict[str, Tensor]:
    if not calibration:
        raise DataError(
            "No calibration data: GPTQ, GPTAQ, CD and AWQ look at what the layers are given. Give some rows."
        )
    prefix = find_blocks(scheme, model)
    modules = list(model.get_submodule(prefix))
    batches = [_enter(model, scheme, modules, batch) for batch in calibration]
    scales: dict[str, Tensor] = {}
    with progress.bar(title, len(modules)) as shown:
        for index, module in enumerate(modules):
            specs = {n: s for n, s in scheme.linears.items() if n.startswith(f"{prefix}.{index}.")}
            linears = {name: model.get_submodule(name) for name in specs}
            block = Block(module, index, linears, specs, batches, Replay(module, linears))
            found = treat(block)
            with block.rounded(found):
                for batch in batches:
                    batch.hidden = block.run(batch)
            scales |= found
            shown.update(index + 1)
    return scales


def find_blocks(scheme: Scheme, model: Any) -> str:
    """Name of the module list that holds the blocks: the outermost of those with the most linear layers.

    Raises:
        ModelError: the linear layers lie in no module list.
    """
    counts: Counter[str] = Counter()
    for name in scheme.linears:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth])
            counts[prefix] += isinstance(model.get_submodule(prefix), nn.ModuleList)
    best = max(counts, key=lambda name: (counts[name], -len(name)), default="")
    if not counts[best]:
        raise ModelError(
            f"{type(model).__name__}: no list of blocks found, which GPTQ, GPTAQ, CD and AWQ go through. "
            "Use rtn or hqq."
        )
    return best


def _enter(model: Any, scheme: Scheme, modules: list[nn.Module], batch: Calibration) -> Batch:
    """The float model's way into its blocks: the first one's input, and what each is called with besides.

    No block but the first is computed; the others hand on what they are given.
    """
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    others: list[Arguments] = []
    in_tuple: list[bool] = []  # how blocks of this model answer

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        keywords = dict(keywords)
        first = keywords.pop("hidden_states") if not arguments else arguments[0]
        others.append((arguments[1:], keywords))
        if len(others) == 1:
            hidden.append(first)
        if len(others) == len(modules):
            raise _Stop

    def hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if in_tuple[-1] else hidden_states

    mask = batch["attention_mask"].to(device)
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": mask, "use_cache": False}
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        hook = modules[0].register_forward_hook(lambda _, __, output: in_tuple.append(isinstance(output, tuple)))
        stack.callback(hook.remove)
        for module in modules[1:]:
            vars(module)["forward"] = hand_on
            stack.callback(vars(module).pop, "forward")
        with suppress(_Stop):
            model(**inputs)
        unrounded = hidden.pop()
        others.clear()
        for name in scheme.embeddings:
            rounding = _rounding_rows(scheme.weights[name])
            stack.callback(model.get_submodule(name).register_forward_hook(rounding).remove)
        with suppress(_Stop):
            model(**inputs)
    return Batch(hidden[0], mask.flatten().bool(), others, unrounded)


def _observing(name: str, see: Callable[[str, Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        see(name, arguments[0])

    return hook


def _rounding_once() -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """`numerics.round_input` for layers of which several are given the very same tensor in turn."""
    given: Tensor | None = None
    rounded: Tensor | None = None

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal given, rounded
        if arguments[0] is not given:
            given, rounded = arguments[0], numerics.fake_quantize_activation(arguments[0])
        return rounded, *arguments[1:]

    return hook


def _rounding_rows(spec: WeightScheme) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def hook(module: nn.Module, arguments: tuple[Any, ...], rows: Tensor) -> Tensor:
        return numerics.fake_quantize_weight(rows.float(), spec.bits, spec.group_size)

    return hook


def tokens_of(x: Tensor, keep: Tensor) -> Tensor:
    """Inputs (..., width) as (tokens, width) in float32, without padding where they still lie token by token."""
    rows = x.detach().flatten(0, -2).float()
    return rows[keep] if rows.shape[0] == keep.shape[0] else rows


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """`|| (W - R) X ||^2 / || W X ||^2` from the sum of x x^T: weights (out, in), hessian (in, in)."""
    error = weight - rounded
    energy = ((weight @ hessian) * weight).sum()
    return float(((error @ hessian) * error).sum() / energy.clamp(min=torch.finfo(energy.dtype).tiny))
