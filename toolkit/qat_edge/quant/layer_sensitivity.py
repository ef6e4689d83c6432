"""What each weight costs when it alone is rounded: KL divergence from the unrounded model, in nats per token.

    cost(w, b) = mean over tokens of KL(p || q),   p: logits of the float model, q: with w at b bits

The rounding is the deployed one: codes under bfloat16 group scales, the layer's input as int8 per token. A weight of
decoder layer i leaves everything before that layer as it was, so only layers i and later run again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat_edge.errors import ModelError
from qat_edge.quant import numerics
from qat_edge.quant.scheme import Scheme, WeightScheme

LOGIT_ROWS = 128  # taken at once: 128 rows of a 152k vocabulary are 78 MB

Candidates = Mapping[str, Mapping[int, WeightScheme]]  # module name -> bits -> scheme
Progress = Callable[[str, int], None]  # module name, bits


@dataclass(frozen=True)
class Batch:
    """Ids and mask, int64 (rows, length), padded on the right. compared: bool (rows, length), where KL is taken."""

    input_ids: Tensor
    attention_mask: Tensor
    compared: Tensor


@dataclass(frozen=True)
class Probed:
    """KL in nats per token. alone: module name -> bits -> KL. together: bits -> KL of every weight at those bits."""

    alone: dict[str, dict[int, float]]
    together: dict[int, float]
    compared: int


def candidates(plan: Scheme) -> dict[str, dict[int, WeightScheme]]:
    """The widths each weight can have: int4 groups where `plan` has them, int8 per channel for every one.

    Embedding and head have one in a plan of int8 tables: options of their own set theirs.
    """
    found: dict[str, dict[int, WeightScheme]] = {}
    for name, spec in plan.weights.items():
        found[name] = {4: spec, 8: WeightScheme(8, 0, spec.quantize_input)} if spec.bits == 4 else {8: spec}
    return found


def probe(model: Any, schemes: Candidates, batches: Sequence[Batch], progress: Progress) -> Probed:
    """Round every weight of `schemes` alone at every width, then all at once. The model is left as it was.

    Raises:
        ModelError: the model's decoder layers are not where its configuration has them.
    """
    layers = decoder_layers(model)
    alone = {name: dict.fromkeys(by_bits, 0.0) for name, by_bits in schemes.items()}
    together = dict.fromkeys(sorted({bits for by_bits in schemes.values() for bits in by_bits}), 0.0)
    compared = sum(int(batch.compared.sum()) for batch in batches)
    for batch in batches:
        with torch.no_grad(), _compared_only(model, batch):
            kept = _Kept.of(model, layers, batch)
            for name, by_bits in schemes.items():
                for bits, spec in by_bits.items():
                    with kept.up_to(_first_layer(model, layers, name)), rounded(model, {name: spec}):
                        alone[name][bits] += kept.divergence(model, batch) / compared
                    progress(name, bits)
            for bits in together:
                whole = {name: by_bits.get(bits, by_bits[max(by_bits)]) for name, by_bits in schemes.items()}
                with rounded(model, whole):
                    together[bits] += kept.divergence(model, batch) / compared
    # Where nothing is lost, float32 sums may end a hundred-millionth below zero.
    alone = {name: {bits: max(kl, 0.0) for bits, kl in by_bits.items()} for name, by_bits in alone.items()}
    return Probed(alone, together, compared)


def decoder_layers(model: Any) -> list[Any]:
    """The decoder layers, first to last.

    Raises:
        ModelError: none, or another number than the configuration says.
    """
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != model.config.num_hidden_layers:
        raise ModelError(
            f"{type(model).__name__}: no list of {model.config.num_hidden_layers} decoder layers found; "
            "qat-edge measures layer by layer in models that have one."
        )
    return list(layers)


def layer_index(name: str) -> int | None:
    """Number of the decoder layer a module belongs to, None for embedding and head."""
    found = re.search(r"\.layers\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None


@contextmanager
def rounded(model: Any, schemes: Mapping[str, WeightScheme]) -> Iterator[None]:
    """Let these weights and the inputs of their layers be rounded as deployed, in place, until the block ends."""
    with ExitStack() as stack:
        for name, spec in schemes.items():
            stack.enter_context(_rounded(model.get_submodule(name), spec))
        yield


@contextmanager
def _rounded(module: Any, spec: WeightScheme) -> Iterator[None]:
    # A new parameter, not new values: a table that embedding and head share stays float in the other.
    weight = module.weight
    group_size = weight.shape[1] if spec.bits == 8 else spec.group_size
    values = numerics.fake_quantize_weight(weight.detach(), spec.bits, group_size)
    module.weight = nn.Parameter(values, requires_grad=False)
    hook = module.register_forward_pre_hook(numerics.round_input) if spec.quantize_input else None
    try:
        yield
    finally:
        module.weight = weight
        if hook is not None:
            hook.remove()


@contextmanager
def _compared_only(model: Any, batch: Batch) -> Iterator[None]:
    """Let the head see the compared tokens only: logits (1, compared, vocabulary)."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.compared].unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class _Kept:
    """The float model's run over one batch: what each decoder layer returned, and log p (compared, vocabulary)."""

    layers: list[Any]
    outputs: list[Any]
    log_p: Tensor

    @classmethod
    def of(cls, model: Any, layers: list[Any], batch: Batch) -> _Kept:
        outputs: list[Any] = []
        hooks = [layer.register_forward_hook(lambda module, args, out: outputs.append(out)) for layer in layers]
        try:
            log_p = functional.log_softmax(_logits(model, batch), dim=-1)
        finally:
            for hook in hooks:
                hook.remove()
        return cls(layers, outputs, log_p)

    @contextmanager
    def up_to(self, first: int) -> Iterator[None]:
        """Until the block ends, the layers before `first` return what they did, without computing it."""
        skipped = self.layers[:first]
        try:
            for layer in skipped:
                layer.forward = lambda *args, **kwargs: self.outputs[first - 1]
            yield
        finally:
            for layer in skipped:
                del layer.forward

    def divergence(self, model: Any, batch: Batch) -> float:
        """KL(p || q) of the model as it is now, summed over the compared tokens, nats."""
        total = 0.0
        logits = _logits(model, batch)
        for start in range(0, len(logits), LOGIT_ROWS):
            log_q = functional.log_softmax(logits[start : start + LOGIT_ROWS], dim=-1)
            log_p = self.log_p[start : start + LOGIT_ROWS]
            total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        return total


def _first_layer(model: Any, layers: list[Any], name: str) -> int:
    """Number of decoder layers that come before a module."""
    if model.get_submodule(name) is model.get_output_embeddings():
        return len(layers)
    return layer_index(name) or 0


def _logits(model: Any, batch: Batch) -> Tensor:
    """float32 (compared, vocabulary)."""
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    logits: Tensor = out.logits[0].float()
    return logits
