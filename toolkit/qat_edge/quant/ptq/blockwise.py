"""Quantize a model one block at a time on calibration data, each block with the inputs of the deployed model.

The inputs of a block went through the rounded blocks before it: codes for their weights, int8 for the input of every
linear layer. Only one block's statistics exist at a time, and one hidden state per token: memory does not grow with
depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qat_edge import progress
from qat_edge.errors import DataError, ModelError
from qat_edge.quant import numerics
from qat_edge.quant.codebook import Codebook
from qat_edge.quant.ptq.activation_cache import ActivationCache
from qat_edge.quant.ptq.block_calls import BatchState, KeptTokens, StopForward, blocks_return_tuple, enter_blocks
from qat_edge.quant.scheme import Scheme, WeightScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME = 0.02  # of a shift by one standard deviation: bfloat16 sums are off by up to 2^-8
STRIP = 128  # rows of x x^T summed at once; at width 1536, strips take 60% of the time of one product
Calibration = Mapping[str, Tensor]  # "input_ids", "attention_mask": (rows, length), padded on the right
Observer = Callable[[str, Tensor], None]  # called with a layer's name and its input


@dataclass(frozen=True)
class Block:
    """A block and the linear layers of the scheme inside it, by their names in the model.

    Attributes:
        module: The block.
        index: Its number.
        linears: Layers by name.
        specs: Their schemes.
        batches: The calibration data, as far as this block.
        cache: Outputs of layers that a method marks as finished; used by passes under `quantized`.
    """

    module: nn.Module
    index: int
    linears: dict[str, Any]
    specs: dict[str, WeightScheme]
    batches: list[BatchState]
    cache: ActivationCache

    def weights(self, names: list[str]) -> Tensor:
        """Return the weights of layers that share an input, one below the other: (sum of out, in), float32."""
        return torch.cat([self.linears[name].weight.detach().float() for name in names])

    def run(self, batch: BatchState, hidden: Tensor | None = None) -> Tensor:
        """Return the hidden states after the block, from `batch.hidden` or from `hidden`: (rows, length, width)."""
        arguments, keywords = batch.others[self.index]
        self.cache.start_pass(batch if hidden is None else None)
        output = self.module(batch.hidden if hidden is None else hidden, *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def observe(self, batch: BatchState, observer: Observer, hidden: Tensor | None = None) -> Tensor:
        """Run the block, calling `observer(name, input)` at every linear layer in the order of execution."""
        with ExitStack() as stack:
            for name, module in self.linears.items():
                hook = _observing(name, observer)
                stack.callback(module.register_forward_pre_hook(hook).remove)
            return self.run(batch, hidden)

    def input_of(self, batch: BatchState, name: str) -> Tensor:
        """Return the input of one linear layer; the block is run no further."""
        seen: list[Tensor] = []

        def stop_at(found: str, x: Tensor) -> None:
            if found == name:
                seen.append(x)
                raise StopForward

        with suppress(StopForward):
            self.observe(batch, stop_at)
        return seen[0]

    def is_output_layer(self, name: str) -> bool:
        """Return True if the layer's output is added unchanged to the block's, so that it can correct all of it."""
        return self._shifts_output(name, 1.0)

    def adds_to_stream(self, name: str) -> bool:
        """Return whether a layer's output is added to the hidden states, even if the block reads them afterwards."""
        # The shift outweighs everything that the block adds afterwards, which its norms bound.
        return self._shifts_output(name, 1000.0)

    @cached_property
    def first_output(self) -> Tensor:
        """Hidden states after the block for the first batch, computed once: (rows, length, width)."""
        return self.run(self.batches[0])

    def _shifts_output(self, name: str, size: float) -> bool:
        """Return whether the block's output moves by the same vector as the layer's.

        size: of the vector, in standard deviations of the block's output.
        """
        # Test empirically: a module does not record where its output is used.
        batch, module, before = self.batches[0], self.linears[name], self.first_output
        if module.weight.shape[0] != before.shape[-1]:
            return False
        shift = size * before.float().std(dim=(0, 1))
        handle = module.register_forward_hook(lambda _, arguments, output: output + shift.to(output.dtype))
        try:
            moved = self.run(batch).float() - before.float()
        finally:
            handle.remove()
        return bool(((moved - shift).abs().mean() < SAME * shift.mean()).all())

    def input_groups(self) -> list[list[str]]:
        """Return the names of the linear layers in the order of execution, grouped where they share an input."""
        seen: list[tuple[Tensor, list[str]]] = []  # keeps the tensors alive, so that no id is used twice

        def group(name: str, x: Tensor) -> None:
            names = next((names for tensor, names in seen if tensor is x), None)
            if names is None:
                seen.append((x, [name]))
            elif name not in names:
                names.append(name)

        self.observe(self.batches[0], group)
        return [names for _, names in seen]

    def input_groups_in_few_bits(self) -> list[list[str]]:
        """Return `input_groups` without the int8 weights, which are not rounded column by column."""
        groups = ([n for n in names if self.specs[n].has_groups] for names in self.input_groups())
        return [names for names in groups if names]

    def by_codes(self, names: list[str]) -> list[list[str]]:
        """Return layers that share an input, split where their codes differ."""
        found: dict[Codebook, list[str]] = {}
        for name in names:
            found.setdefault(self.specs[name].codebook, []).append(name)
        return list(found.values())

    @contextmanager
    def quantized_inputs(self) -> Iterator[None]:
        """Round the inputs of linear layers to int8 where the scheme says so, while the context is open."""
        with ExitStack() as stack:
            hook = _rounding_once(self.cache)
            for name, module in self.linears.items():
                if self.specs[name].quantize_input:
                    stack.callback(module.register_forward_pre_hook(hook).remove)
            yield

    @contextmanager
    def quantized(self, scales: Mapping[str, Tensor], finished: bool = False) -> Iterator[None]:
        """Round weights and inputs as deployed while the context is open; the weights are floats again afterwards.

        Args:
            scales: By name; the other layers get those of `numerics.choose_scales`.
            finished: Round only the weights of finished layers. All inputs are rounded in any case.
        """
        names = self.cache.finished if finished else self.linears
        kept = {name: self.linears[name].weight.detach().clone() for name in names}
        try:
            # Modify in place: hooks and caches reference these layers.
            for name, original in kept.items():
                spec, weight = self.specs[name], original.float()
                given = scales.get(name)
                used = numerics.choose_scales(weight, spec.codebook, spec.group_size) if given is None else given
                rounded = numerics.dequantize(numerics.quantize(weight, used, spec.codebook), used)
                self.linears[name].weight.data.copy_(rounded)
            with self.quantized_inputs(), self.cache.enabled():
                yield
        finally:
            for name, original in kept.items():
                self.linears[name].weight.data.copy_(original)


def quantize_blocks(
    model: PreTrainedModel,
    scheme: Scheme,
    calibration: Sequence[Calibration],
    quantize_block: Callable[[Block], dict[str, Tensor]],
    title: str,
    quantize_tables: Callable[[], dict[str, Tensor]] = dict,
) -> dict[str, Tensor]:
    """Pass every block to `quantize_block`, first to last, each with inputs from the rounded blocks before it.

    Args:
        model: A float model with repeated blocks.
        scheme: Bits and group size by module name.
        calibration: Batches of texts.
        quantize_block: Changes the block's weights in place and returns scales by module name.
        title: Of the progress bar.
        quantize_tables: Changes tables in place and returns their scales by module name. The blocks are quantized for
            the embedding that it leaves, and towards the float model's outputs with the embedding before it.

    Returns:
        The scales of all blocks and tables by module name.

    Raises:
        ModelError: No repeated blocks are found.
        DataError: There is no calibration data.
    """
    if not calibration:
        raise DataError(
            "No calibration data: gptq, gptaq, coordinate-descent and awq look at the inputs of the layers. "
            "Give some rows."
        )
    prefix = find_blocks(scheme, model)
    block_list: Any = model.get_submodule(prefix)
    modules: list[nn.Module] = list(block_list)
    with _autocast_cache_off():
        returns_tuple = blocks_return_tuple(model, modules[0], calibration[0])
        batches = [enter_blocks(model, modules, texts, returns_tuple) for texts in calibration]
        scales = quantize_tables()
        with _rounded_embeddings(model, scheme, scales):
            for state, texts in zip(batches, calibration, strict=True):
                state.hidden = enter_blocks(model, modules, texts, returns_tuple).hidden
        with progress.bar(title, len(modules)) as shown:
            for index in range(len(modules)):
                block = _block(model, scheme, prefix, index, batches)
                found = quantize_block(block)

                # The next block's inputs.
                with block.quantized(found):
                    for batch in batches:
                        batch.hidden = block.run(batch)
                scales |= found
                shown.update(index + 1)
    return scales


def _block(model: PreTrainedModel, scheme: Scheme, prefix: str, index: int, batches: list[BatchState]) -> Block:
    """Collect the linear layers of one block. prefix: name of the module list."""
    name = f"{prefix}.{index}"
    module = model.get_submodule(name)
    specs = {n: spec for n, spec in scheme.linears.items() if n.startswith(f"{name}.")}
    linears: dict[str, Any] = {n: model.get_submodule(n) for n in specs}
    return Block(module, index, linears, specs, batches, ActivationCache(module, linears))


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    # Weights change from pass to pass: a cast that autocast kept of an earlier one would be used instead.
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def token_sum_precision(device: torch.device) -> Iterator[None]:
    """Set the precision for products of float32 matrices that sum over tokens, while the context is open.

    Sums are float32; on a CPU, factors are rounded to bfloat16. Of 1024 random tokens it took 40% of the time, and the
    sums were off by 0.2%. A sum of x x^T stays positive, because both factors are rounded alike.
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
    """Return rows^T rows, (width, width), in `token_sum_precision`."""
    found = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(found, rows)
    return mirrored(found)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of rows^T rows to `total` (width, width), in place; `mirrored` completes the sum."""
    with token_sum_precision(rows.device):
        # Strips of rows as far as the diagonal: half of the products.
        for start in range(0, rows.shape[1], STRIP):
            end = min(start + STRIP, rows.shape[1])
            total[start:end, :end].add_(rows[:, start:end].T @ rows[:, :end])


def mirrored(total: Tensor) -> Tensor:
    """Return the symmetric matrix with this lower triangle, (width, width)."""
    return total.tril() + total.tril(-1).T


def find_blocks(scheme: Scheme, model: nn.Module) -> str:
    """Return the name of the module list that holds the blocks: the outermost of those with the most linear layers.

    Raises:
        ModelError: No linear layer is inside a module list.
    """
    # Count the linear layers under every module list, inner ones (of experts, say) included.
    counts: Counter[str] = Counter()
    for name in scheme.linears:
        parts = name.split(".")
        for depth in range(1, len(parts)):
            prefix = ".".join(parts[:depth])
            counts[prefix] += isinstance(model.get_submodule(prefix), nn.ModuleList)
    best = max(counts, key=lambda name: (counts[name], -len(name)), default="")
    if not counts[best]:
        raise ModelError(
            f"{type(model).__name__}: no list of blocks found, which gptq, gptaq, coordinate-descent and awq go "
            "through. Use rtn or hqq."
        )
    return best


@contextmanager
def _rounded_embeddings(model: nn.Module, scheme: Scheme, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Round the rows of embeddings while the context is open.

    scales: of those that have their own; the others get those of `numerics.choose_scales`.
    """
    with ExitStack() as stack:
        for name in scheme.embeddings:
            module: Any = model.get_submodule(name)
            if name in scales:
                kept, spec = module.weight.detach().clone(), scheme.weights[name]
                rounded = numerics.fake_quantize_weight(kept.float(), spec.codebook, spec.group_size, scales[name])
                module.weight.data.copy_(rounded)
                stack.callback(module.weight.data.copy_, kept)
            else:
                hook = _rounding_rows(scheme.weights[name])
                stack.callback(module.register_forward_hook(hook).remove)
        yield


def _observing(name: str, observer: Observer) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        observer(name, arguments[0])

    return hook


def _rounding_once(cache: ActivationCache) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """Return `numerics.round_input` for several layers.

    A tensor that they share is rounded once, and none for a layer whose output is cached.
    """
    latest: Tensor | None = None
    rounded: Tensor | None = None

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal latest, rounded
        if cache.returns_cached(module):
            return arguments
        if arguments[0] is not latest:
            latest, rounded = arguments[0], numerics.fake_quantize_activation(arguments[0])
        return rounded, *arguments[1:]

    return hook


def _rounding_rows(spec: WeightScheme) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """Return a forward hook that rounds the rows of an embedding."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], rows: Tensor) -> Tensor:
        return numerics.fake_quantize_weight(rows.float(), spec.codebook, spec.group_size)

    return hook


def token_rows(x: Tensor, keep: KeptTokens) -> Tensor:
    """Return inputs (..., width) as (tokens, width) in float32, without padding if there still is a row per token.

    Experts, for one, are given a selection of tokens.
    """
    rows = x.detach().flatten(0, -2).float()
    return rows[keep.positions] if rows.shape[0] == keep.total else rows


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor, energy: Tensor | None = None) -> float:
    """Return `|| (W - R) X ||^2 / || W X ||^2` from the sum of x x^T: weights (out, in), hessian (in, in).

    energy: `|| W X ||^2`, where it is known.
    """
    energy = output_energy(weight, hessian) if energy is None else energy
    return float(output_energy(weight - rounded, hessian) / energy.clamp(min=torch.finfo(energy.dtype).tiny))


def output_energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return `|| W X ||^2` from the sum of x x^T: weight (out, in), hessian (in, in)."""
    return ((weight @ hessian) * weight).sum()
