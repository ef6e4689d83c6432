"""Which weight gets how many bits, and why some get others than asked. Decided from shapes alone."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat_edge.config import GROUP_SIZES
from qat_edge.errors import ModelError, UsageError

WIDTHS = (4, 8)  # bits a weight may be given: int4 in groups, int8 per channel


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
    """`8da4w` over a whole model, by module name. tied: the head's table is the embedding's."""

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

    def summary(self) -> str:
        """One line for people: `210 int4 (group 32), 2 int8 (per channel)`."""
        kinds = Counter(
            f"int{w.bits} ({'per channel' if w.bits == 8 else f'group {w.group_size}'})" for w in self.weights.values()
        )
        return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))


def choose(model: Any, group_size: int, bits: Mapping[str, int] | None = None) -> Scheme:
    """The scheme of a causal language model (a meta-device model will do).

    Linear layers get int4 groups, embedding and head int8 per channel. A layer whose width the group size does
    not divide gets the largest smaller group size that does, or int8 per channel where none does.
    bits: module name -> 4 or 8, for weights that are to get other bits than these.

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
            weights[name] = WeightScheme(8, module.embedding_dim, quantize_input=False)
        elif module is head:
            weights[name] = WeightScheme(8, module.in_features, quantize_input=True)
        elif isinstance(module, nn.Linear):
            weights[name] = _linear(module.in_features, group_size)
    if not any(w.bits == 4 and w.group_size == group_size for n, w in weights.items() if n not in tables):
        widths = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
        raise UsageError(
            f"--group-size {group_size} divides no layer of this model (widths {widths}). Try a smaller one."
        )
    for name, width in (bits or {}).items():
        _check_override(name, width, weights, tables)
        if width == 8 and name not in tables:
            weights[name] = WeightScheme(8, model.get_submodule(name).in_features, quantize_input=True)
    return Scheme(group_size, embedding.weight is head.weight, *tables, weights)


def _check_override(name: str, width: int, weights: Mapping[str, WeightScheme], tables: tuple[str, str]) -> None:
    """Refuse what `choose` was given for one weight, where it cannot be."""
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3)
        hint = f"Nearest: {', '.join(near)}." if near else f"Its weights are named like {next(iter(weights))}."
        raise UsageError(f"--bits: 'bits.{name}' names no weight of this model. {hint}")
    if width not in WIDTHS:
        raise UsageError(f"--bits: 'bits.{name}' is {width!r}; a weight can have {' or '.join(map(str, WIDTHS))} bits.")
    if width == 4 and name in tables:
        raise UsageError(f"--bits: 'bits.{name}' is 4, but embedding and head are exported as int8 only. Set it to 8.")


def _linear(width: int, group_size: int) -> WeightScheme:
    if width % group_size == 0:
        return WeightScheme(4, group_size, quantize_input=True)
    refused = f"width {width} is no multiple of {group_size}"
    for smaller in sorted((g for g in GROUP_SIZES if g < group_size), reverse=True):
        if width % smaller == 0:
            return WeightScheme(4, smaller, True, f"{refused}: int4 in groups of {smaller} instead")
    return WeightScheme(8, width, True, f"{refused}: int8 per channel instead")
