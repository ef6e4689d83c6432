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
    """`8da4w` over a whole model, by module name. tied: embedding and head are one table, rounded alike."""

    group_size: int
    tied: bool
    embedding: str
    head: str
    weights: dict[str, WeightScheme]

    @property
    def linears(self) -> dict[str, WeightScheme]:
        """The weights that are neither embedding nor head."""
        return {k: v for k, v in self.weights.items() if k not in (self.embedding, self.head)}

    @property
    def exceptions(self) -> dict[str, str]:
        """Weights that got something else than asked: name -> reason."""
        return {name: w.reason for name, w in self.weights.items() if w.reason}

    @property
    def table_bits(self) -> tuple[int, int]:
        """Of embedding and head."""
        return self.weights[self.embedding].bits, self.weights[self.head].bits

    def summary(self) -> str:
        """One line for people: `210 int4 (group 32), 2 int8 (per channel)`."""
        return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(map(_kind, self.weights.values())).items()))

    def tables(self) -> str:
        """Embedding and head in words: whether they share a table, or how each is stored."""
        embedding, head = (_kind(self.weights[name]) for name in (self.embedding, self.head))
        return f"embedding and head share a table: {head}" if self.tied else f"embedding {embedding}, head {head}"


def choose(
    model: Any, group_size: int, bits: Mapping[str, int] | None = None, table_bits: tuple[int, int] = (8, 8)
) -> Scheme:
    """The scheme of a causal language model (a meta-device model will do).

    Linear layers get int4 groups, embedding and head what `table_bits` says, int8 being per channel. A weight whose
    width the group size does not divide gets the largest smaller group size that does, or int8 where none does.
    bits: module name -> 4 or 8, for linear layers that are to get other bits than these.

    Raises:
        UsageError: the group size divides no layer at all; `bits` names no weight of this model, or a width it
            cannot have.
        ModelError: the model has no token embedding or no output head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__}: no token embedding and linear output head found; "
            "qat-edge quantizes causal language models that have both."
        )
    names = {id(module): name for name, module in model.named_modules()}
    tables = names[id(embedding)], names[id(head)]
    weights = {}
    for name, module in model.named_modules():
        if module is embedding:
            weights[name] = _weight(module.embedding_dim, group_size, table_bits[0], quantize_input=False)
        elif isinstance(module, nn.Linear):
            weights[name] = _weight(module.in_features, group_size, table_bits[1] if module is head else 4)
    if not any(w.bits == 4 and w.group_size == group_size for n, w in weights.items() if n not in tables):
        widths = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
        raise UsageError(
            f"--group-size {group_size} divides no layer of this model (widths {widths}). Try a smaller one."
        )
    for name, width in (bits or {}).items():
        _check_override(name, width, weights, tables)
        if width == 8 and name not in tables:
            weights[name] = WeightScheme(8, model.get_submodule(name).in_features, quantize_input=True)
    tied = share_table(model) and weights[tables[0]].bits == weights[tables[1]].bits
    return Scheme(group_size, tied, *tables, weights)


def share_table(model: Any) -> bool:
    """Whether embedding and head are one tensor."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def _check_override(name: str, width: int, weights: Mapping[str, WeightScheme], tables: tuple[str, str]) -> None:
    """Refuse what `choose` was given for one weight, where it cannot be."""
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3)
        hint = f"Nearest: {', '.join(near)}." if near else f"Its weights are named like {next(iter(weights))}."
        raise UsageError(f"--bits: 'bits.{name}' names no weight of this model. {hint}")
    if width not in WIDTHS:
        raise UsageError(f"--bits: 'bits.{name}' is {width!r}; a weight can have {' or '.join(map(str, WIDTHS))} bits.")
    if width == 4 and name in tables:
        flag = "--embedding-bits" if name == tables[0] else "--head-bits"
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
