"""Sensitivity of a model to rounding single weights: KL divergence from the float model, in nats per token.

    cost(w, b) = mean over tokens of KL(p || q),   p: logits of the float model, q: with w at b bits

The rounding is the deployed one: codes under bfloat16 group scales, the layer's input as int8 per token. A weight of
decoder layer i leaves everything before that layer as it was, so that only layers i and later run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.models.decoder import decoder_layers, layer_index
from qat_edge.quant import numerics
from qat_edge.quant.scheme import INT4, LinearCodes, Scheme, WeightScheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ROWS = 128  # compared at once: 128 rows of a 152k vocabulary are 78 MB

Candidates = Mapping[str, Mapping[int, WeightScheme]]  # module name -> bits -> scheme
Progress = Callable[[str, int], None]  # module name, bits


@dataclass(frozen=True)
class ProbeBatch:
    """One batch of texts to measure on.

    Attributes:
        input_ids: int64, shape (rows, length), padded on the right.
        attention_mask: int64, shape (rows, length).
        compared: bool, shape (rows, length); KL is measured at these tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    compared: Tensor


@dataclass(frozen=True)
class LayerDivergences:
    """Measured KL divergences, in nats per token.

    Attributes:
        alone: Module name -> bits -> KL with only that weight rounded.
        together: Bits -> KL with every weight at those bits.
        compared: Number of tokens that the means are taken over.
    """

    alone: dict[str, dict[int, float]]
    together: dict[int, float]
    compared: int


def candidate_schemes(scheme: Scheme, narrow: LinearCodes = INT4) -> dict[str, dict[int, WeightScheme]]:
    """Return the schemes that each weight can have: int4 groups where `scheme` has them, int8 per channel always.

    Embedding and head have int8 alone if they have it in `scheme`: options of their own set their bits. Where `narrow`
    has 2 bits, linear layers between them can have these in the same groups.
    """
    found: dict[str, dict[int, WeightScheme]] = {}
    for name, spec in scheme.weights.items():
        found[name] = {4: spec, 8: WeightScheme(8, 0, spec.quantize_input)} if spec.bits == 4 else {8: spec}
        if spec.bits == 4 and narrow.bits < 4 and name in scheme.linears:
            found[name] = {narrow.bits: replace(spec, bits=narrow.bits, levels=narrow.levels)} | found[name]
    return found


def measure_layers(
    model: PreTrainedModel, schemes: Candidates, batches: Sequence[ProbeBatch], progress: Progress
) -> LayerDivergences:
    """Round every weight of `schemes` alone at each of its widths, then all at once, and measure KL each time.

    Args:
        model: The float model; unchanged afterwards.
        schemes: Schemes to measure, by module name and bits.
        batches: Texts, on the model's device.
        progress: Called after each weight and width of each batch.

    Raises:
        ModelError: The model has no list of decoder layers as its configuration describes it.
    """
    # Each batch adds its share of the mean over all compared tokens.
    layers = decoder_layers(model)
    alone = {name: dict.fromkeys(by_bits, 0.0) for name, by_bits in schemes.items()}
    together = dict.fromkeys(sorted({bits for by_bits in schemes.values() for bits in by_bits}), 0.0)
    compared = sum(int(batch.compared.sum()) for batch in batches)

    for batch in batches:
        with torch.no_grad(), _compared_only(model, batch):
            float_run = _FloatRun.of(model, layers, batch)

            # One weight at a time, from the first layer on that it changes.
            for name, by_bits in schemes.items():
                first = _first_changed_layer(model, layers, name)
                for bits, spec in by_bits.items():
                    with float_run.cached_up_to(first), fake_quantized(model, {name: spec}):
                        alone[name][bits] += float_run.divergence(model, batch) / compared
                    progress(name, bits)

            # All weights; those that cannot have these bits get their widest.
            for bits in together:
                whole = {name: by_bits.get(bits, by_bits[max(by_bits)]) for name, by_bits in schemes.items()}
                with fake_quantized(model, whole):
                    together[bits] += float_run.divergence(model, batch) / compared

    # Where nothing is lost, float32 sums may end a hundred-millionth below zero.
    alone = {name: {bits: max(kl, 0.0) for bits, kl in by_bits.items()} for name, by_bits in alone.items()}
    return LayerDivergences(alone, together, compared)


@contextmanager
def fake_quantized(model: nn.Module, schemes: Mapping[str, WeightScheme]) -> Iterator[None]:
    """Round these weights and the inputs of their layers as deployed, in place, while the context is open."""
    with ExitStack() as stack:
        for name, spec in schemes.items():
            stack.enter_context(_fake_quantized(model.get_submodule(name), spec))
        yield


@contextmanager
def _fake_quantized(module: Any, spec: WeightScheme) -> Iterator[None]:
    # A new parameter, not new values: a table that embedding and head share stays float in the other.
    weight = module.weight
    group_size = spec.group_size if spec.has_groups else weight.shape[1]
    values = numerics.fake_quantize_weight(weight.detach(), spec.codebook, group_size)
    module.weight = nn.Parameter(values, requires_grad=False)
    hook = module.register_forward_pre_hook(numerics.round_input) if spec.quantize_input else None
    try:
        yield
    finally:
        module.weight = weight
        if hook is not None:
            hook.remove()


@contextmanager
def _compared_only(model: PreTrainedModel, batch: ProbeBatch) -> Iterator[None]:
    """Pass only the compared tokens to the head: logits (1, compared, vocabulary)."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.compared].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _FloatRun:
    """Results of the float model on one batch.

    Attributes:
        layers: The decoder layers.
        outputs: Output of each decoder layer.
        log_p: Log-probabilities, shape (compared, vocabulary).
    """

    layers: list[nn.Module]
    outputs: list[Any]
    log_p: Tensor

    @classmethod
    def of(cls, model: PreTrainedModel, layers: list[nn.Module], batch: ProbeBatch) -> _FloatRun:
        outputs: list[Any] = []
        hooks = [layer.register_forward_hook(lambda module, args, out: outputs.append(out)) for layer in layers]
        try:
            log_p = functional.log_softmax(_logits(model, batch), dim=-1)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(layers, outputs, log_p)

    @contextmanager
    def cached_up_to(self, first: int) -> Iterator[None]:
        """Make the layers before `first` return their cached outputs while the context is open."""
        skipped: list[Any] = self.layers[:first]
        try:
            for layer in skipped:
                # The output of the last skipped layer serves all of them: nothing reads the others.
                layer.forward = lambda *args, **kwargs: self.outputs[first - 1]
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def divergence(self, model: PreTrainedModel, batch: ProbeBatch) -> float:
        """Return KL(p || q) of the model as it is now, summed over the compared tokens, in nats."""
        # Some rows at a time: log-probabilities of a whole batch twice would be the largest tensors of all.
        total = 0.0
        logits = _logits(model, batch)
        for start in range(0, len(logits), LOGIT_ROWS):
            log_q = functional.log_softmax(logits[start : start + LOGIT_ROWS], dim=-1)
            log_p = self.log_p[start : start + LOGIT_ROWS]
            total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        return total


def _first_changed_layer(model: PreTrainedModel, layers: list[nn.Module], name: str) -> int:
    """Return the number of decoder layers that come before a module."""
    # The head runs after all layers, the embedding before all.
    if model.get_submodule(name) is model.get_output_embeddings():
        return len(layers)
    return layer_index(name) or 0


def _logits(model: PreTrainedModel, batch: ProbeBatch) -> Tensor:
    """Return the logits as float32 (compared, vocabulary)."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits
