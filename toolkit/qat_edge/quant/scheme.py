"""Which weight gets how many bits, and why some get others than asked. Decided from shapes alone."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat_edge.config import GROUP_SIZES, WIDTHS
from qat_edge.errors import ModelError, UsageError
from qat_edge.models import tasks

HEAD_REASON = "after the blocks, where nothing makes up for its rounding: int8 per channel"


@dataclass(frozen=True)
class WeightScheme:
    """How one weight (out, in) is quantized. `group_size == in` means one scale a row.

    quantize_input: the layer's input is rounded to int8 per token as well; an embedding has none.
    reason: empty where the weight gets what was asked.
    """

    bits: int
    group_size: int
    quantize_input: bool
    reason: str = ""


@dataclass(frozen=True)
class Scheme:
    """`8da4w` over a whole model, by module name. tied: embedding and head are one table, rounded alike.

    head: empty for a model that ends with its blocks. apart: an encoder's other embeddings, and linear layers between
    its blocks and its head.
    """

    group_size: int
    tied: bool
    embedding: str
    head: str
    weights: dict[str, WeightScheme]
    apart: tuple[str, ...] = ()

    @property
    def linears(self) -> dict[str, WeightScheme]:
        """The weights that belong neither to the embeddings nor to the head."""
        return {k: v for k, v in self.weights.items() if k not in (self.embedding, self.head, *self.apart)}

    @property
    def embeddings(self) -> list[str]:
        """The tokens' table and an encoder's others."""
        return [name for name in (self.embedding, *self.apart) if not self.weights[name].quantize_input]

    @property
    def heads(self) -> list[str]:
        """The layers that make an answer of the blocks' last states, in order; none where that is the answer."""
        return [name for name in (*self.apart, self.head) if name and self.weights[name].quantize_input]

    @property
    def exceptions(self) -> dict[str, str]:
        """Weights that got something else than asked: name -> reason."""
        return {name: w.reason for name, w in self.weights.items() if w.reason}

    @property
    def table_bits(self) -> tuple[int, int]:
        """Of embedding and head; 8 for a head that is not there."""
        return self.weights[self.embedding].bits, self.weights[self.head].bits if self.head else 8

    def summary(self) -> str:
        """One line for people: `210 int4 (group 32), 2 int8 (per channel)`."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(map(_kind, self.weights.values())).items()))

    def tables(self) -> str:
        """Embedding and head in words: whether they share a table, or how each is stored."""
        embedding, head = (_kind(self.weights[name]) if name else "none" for name in (self.embedding, self.head))
        return f"embedding and head share a table: {head}" if self.tied else f"embedding {embedding}, head {head}"


@dataclass(frozen=True)
class _Ends:
    """Where a model begins and ends, by module name. embeddings: the tokens' own first; heads: the last one last."""

    embeddings: list[str]
    heads: list[str]

    @property
    def names(self) -> list[str]:
        return [*self.embeddings, *self.heads]


def choose(
    model: Any, group_size: int, bits: Mapping[str, int] | None = None, table_bits: tuple[int, int] = (8, 8)
) -> Scheme:
    """The scheme of a causal language model or an encoder (a meta-device model will do).

    Linear layers get int4 groups, embedding and head what `table_bits` says, int8 being per channel. A weight whose
    width the group size does not divide gets the largest smaller group size that does, or int8 where none does.
    An encoder's head, its pooling layer and its tables of positions and token types are int8 always.
    bits: module name -> 4 or 8, for linear layers that are to get other bits than these.

    Raises:
        UsageError: the group size divides no layer at all; `bits` names no weight of this model, or a width it
            cannot have; an encoder's head is to have 4 bits.
        ModelError: the model has no token embedding, or is a causal language model without an output head.
    """
    encodes = tasks.of_model(model).encodes
    ends = _encoder_ends(model, table_bits[1]) if encodes else _decoder_ends(model)
    weights = {}
    for name, module in model.named_modules():
        if name in ends.embeddings:
            asked = table_bits[0] if name == ends.embeddings[0] else 8
            weights[name] = _weight(module.embedding_dim, group_size, asked, quantize_input=False)
        elif name in ends.heads and encodes:
            weights[name] = WeightScheme(8, module.in_features, quantize_input=True, reason=HEAD_REASON)
        elif isinstance(module, nn.Linear):
            weights[name] = _weight(module.in_features, group_size, table_bits[1] if name in ends.heads else 4)
    if not any(w.bits == 4 and w.group_size == group_size for n, w in weights.items() if n not in ends.names):
        widths = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
        raise UsageError(
            f"--group-size {group_size} divides no layer of this model (widths {widths}). Try a smaller one."
        )
    for name, width in (bits or {}).items():
        _check_override(name, width, weights, ends)
        if width == 8 and name not in ends.names:
            weights[name] = WeightScheme(8, model.get_submodule(name).in_features, quantize_input=True)
    first, last = ends.embeddings[0], ends.heads[-1] if ends.heads else ""
    tied = not encodes and share_table(model) and weights[first].bits == weights[last].bits
    return Scheme(group_size, tied, first, last, weights, (*ends.embeddings[1:], *ends.heads[:-1]))


def _decoder_ends(model: Any) -> _Ends:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__}: no token embedding and linear output head found; "
            "qat-edge quantizes causal language models that have both, and encoders."
        )
    names = {id(module): name for name, module in model.named_modules()}
    return _Ends([names[id(embedding)]], [names[id(head)]])


def _encoder_ends(model: Any, head_bits: int) -> _Ends:
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise ModelError(f"{type(model).__name__}: no token embedding found, which an encoder needs to have.")
    if head_bits != 8:
        raise UsageError(f"--head-bits {head_bits}: {type(model).__name__} is an encoder, whose head stays at 8 bits.")
    return _Ends(tasks.tables(model), tasks.head_layers(model))


def share_table(model: Any) -> bool:
    """Whether embedding and head are one tensor."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _check_override(name: str, width: int, weights: Mapping[str, WeightScheme], ends: _Ends) -> None:
    """Refuse what `choose` was given for one weight, where it cannot be."""
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3)
        hint = f"Nearest: {', '.join(near)}." if near else f"Its weights are named like {next(iter(weights))}."
        raise UsageError(f"--bits: 'bits.{name}' names no weight of this model. {hint}")
    if width not in WIDTHS:
        raise UsageError(f"--bits: 'bits.{name}' is {width!r}; a weight can have {' or '.join(map(str, WIDTHS))} bits.")
    if width == 4 and name in (*ends.embeddings[1:], *ends.heads[:-1]):
        raise UsageError(f"--bits: 'bits.{name}' is 4; this part of an encoder stays at 8 bits. Leave the line out.")
    if width == 4 and name in ends.names:
        flag = "--embedding-bits" if name == ends.embeddings[0] else "--head-bits"
        raise UsageError(f"--bits: 'bits.{name}' is 4, and only finetune {flag} 4 sets it. Leave the line out.")


def _kind(weight: WeightScheme) -> str:
    return f"int{weight.bits} ({'per channel' if weight.bits == 8 else f'group {weight.group_size}'})"


def _weight(width: int, group_size: int, bits: int, quantize_input: bool = True) -> WeightScheme:
    if bits == 8:
        return WeightScheme(8, width, quantize_input)
    if width % group_size == 0:
        return WeightScheme(4, group_size, quantize_input)
    refused = f"width {width} is no multiple of {group_size}"
    for smaller in sorted((g for g in GROUP_SIZES if g < group_size), reverse=True):
        if width % smaller == 0:
            return WeightScheme(4, smaller, quantize_input, f"{refused}: int4 in groups of {smaller} instead")
    return WeightScheme(8, width, quantize_input, f"{refused}: int8 per channel instead")
