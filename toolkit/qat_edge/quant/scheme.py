"""Quantization scheme: the bits and the group size of every weight, chosen from the shapes alone.

If a request cannot be met, the scheme records the fallback and the reason.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from qat_edge import readers
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.models import tasks
from qat_edge.models.experts import refuse_experts
from qat_edge.options import GROUP_SIZES, LAYER_WIDTHS, WEIGHT_BITS
from qat_edge.quant.codebook import FEWEST, INTEGER, LEVELS, PER_CHANNEL, SEQ, Codebook, codebook_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shown next to the layer in `Scheme.exceptions`.
HEAD_REASON = "after the blocks, where nothing compensates for its rounding: int8 per channel"
LEAST_QUANTIZED = 0.5  # share of the parameters without which a model gets hardly smaller
NOTABLE_SHARE = 0.01  # of the parameters, from which a module class that stays float is worth a line
DEFAULT_GROUP_SIZE = 32


@dataclass(frozen=True)
class WeightScheme:
    """Quantization of one weight (out, in).

    Attributes:
        bits: 2, 4 or 8.
        group_size: Weights per scale; `group_size == in` means one scale per row.
        quantize_input: Round the layer's input to int8 per token as well. False for an embedding.
        reason: Why the weight got something else than requested; empty where it did not.
        levels: "seq" or "integer" at 2 bits; "integer" at all others.
    """

    bits: int
    group_size: int
    quantize_input: bool
    reason: str = ""
    levels: str = INTEGER

    @property
    def codebook(self) -> Codebook:
        """Codes that the weight can have."""
        return codebook_of(self.bits, self.levels)

    @property
    def has_groups(self) -> bool:
        """True for a weight in groups, whose scales PTQ methods choose and training learns; False for int8."""
        return self.bits != PER_CHANNEL


@dataclass(frozen=True)
class Scheme:
    """The `8da4w` scheme of a whole model, by module name.

    Attributes:
        group_size: The requested one; single weights may have a smaller one.
        tied: Embedding and head are one table and are rounded alike.
        embedding: Name of the token embedding.
        head: Name of the output head; empty for a model that ends with its blocks.
        weights: Scheme of every quantized weight.
        apart: An encoder's other embeddings, and the linear layers between its blocks and its head.
    """

    group_size: int
    tied: bool
    embedding: str
    head: str
    weights: dict[str, WeightScheme]
    apart: tuple[str, ...] = ()

    @property
    def widths(self) -> set[int]:
        """Bits that at least one weight has."""
        return {spec.bits for spec in self.weights.values()}

    @property
    def linears(self) -> dict[str, WeightScheme]:
        """Weights that belong neither to the embeddings nor to the head."""
        ends = (self.embedding, self.head, *self.apart)
        return {name: spec for name, spec in self.weights.items() if name not in ends}

    @property
    def embeddings(self) -> list[str]:
        """Names of the token embedding and of an encoder's other embeddings."""
        return [name for name in (self.embedding, *self.apart) if not self.weights[name].quantize_input]

    @property
    def heads(self) -> list[str]:
        """Names of the layers between the last block and the output, in order; none where the blocks end the model."""
        return [name for name in (*self.apart, self.head) if name and self.weights[name].quantize_input]

    @property
    def exceptions(self) -> dict[str, str]:
        """Weights that got something else than requested: name -> reason."""
        return {name: spec.reason for name, spec in self.weights.items() if spec.reason}

    @property
    def table_bits(self) -> tuple[int, int]:
        """Bits of the embedding and of the head; 8 for a missing head."""
        return self.weights[self.embedding].bits, self.weights[self.head].bits if self.head else 8

    def summary(self) -> str:
        """Return one line for people: `210 int4 (group 32), 2 int8 (per channel)`."""
        counts = Counter(map(_format, self.weights.values()))
        return ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))

    def describe_tables(self) -> str:
        """Return one line about embedding and head: whether they share a table, or how each is stored."""
        embedding, head = (_format(self.weights[name]) if name else "none" for name in (self.embedding, self.head))
        return f"embedding and head share a table: {head}" if self.tied else f"embedding {embedding}, head {head}"


@dataclass(frozen=True)
class LinearCodes:
    """Codes of linear layers between the ends, unless others are requested for one of them.

    Attributes:
        bits: 2 or 4.
        levels: Of weights that get 2 bits, by this default or by name.
    """

    bits: int = 4
    levels: str = SEQ

    @classmethod
    def of_training(cls, metadata: Mapping[str, Any]) -> LinearCodes:
        """Read them from the manifest of an adapter; those from before 2 bits do not mention them.

        Raises:
            RunError: The manifest has values that no training writes.
        """
        codes = cls(metadata.get("weight_bits", INT4.bits), metadata.get("weight_levels", INT4.levels))
        if codes.bits not in WEIGHT_BITS or codes.levels not in LEVELS:
            raise RunError(
                f"The manifest of the adapter is damaged: weight_bits is {readers.show(codes.bits)} and weight_levels "
                f"{readers.show(codes.levels)}. Restore it, or train again."
            )
        return codes


INT4 = LinearCodes()


@dataclass(frozen=True)
class _Ends:
    """Modules before and after the blocks.

    Attributes:
        embeddings: Names, the token embedding first.
        heads: Names, the output head last.
    """

    embeddings: list[str]
    heads: list[str]

    @property
    def names(self) -> list[str]:
        return [*self.embeddings, *self.heads]


def choose_scheme(
    model: PreTrainedModel,
    group_size: int,
    bits: Mapping[str, int] | None = None,
    table_bits: tuple[int, int] = (8, 8),
    default: LinearCodes = INT4,
) -> Scheme:
    """Choose the scheme of a causal language model or an encoder.

    Linear layers get groups of `default`. Embedding and head get `table_bits`. int8 is per channel. A weight whose
    width the group size does not divide gets the largest smaller group size that does, or int8 where none does. An
    encoder's head, its pooling layer and its tables of positions and token types are always int8.

    Args:
        model: May be on the meta device.
        group_size: Weights per scale of int4 and int2 layers.
        bits: Module name -> 2, 4 or 8, for single linear layers.
        table_bits: Bits of the embedding and of the head.
        default: Codes of the linear layers that `bits` does not name.

    Raises:
        UsageError: The group size divides no layer at all; `bits` names no weight of this model, or a width that it
            cannot have; an encoder's head is requested in 4 bits, or any of its layers in 2.
        ModelError: The model has no token embedding, is a causal language model without an output head, a mixture of
            experts, or has most of its parameters in modules that cannot be quantized.
    """
    refuse_experts(model)
    encodes = tasks.task_of_model(model).is_encoder
    ends = _encoder_ends(model, table_bits[1]) if encodes else _decoder_ends(model)

    weights = _default_weights(model, group_size, table_bits, default, ends, encodes)
    _require_quantizable(model, weights)
    _require_group_size(model, group_size, weights, ends, bits or {})
    _override(model, bits or {}, weights, ends, group_size, default.levels)
    if encodes:
        _require_no_2_bits(model, weights)

    first, last = ends.embeddings[0], ends.heads[-1] if ends.heads else ""
    # One table in memory is one table in the artifact only where both ends round it alike. Embedding and head of an
    # encoder are never the same matrix.
    tied = not encodes and shares_table(model) and weights[first].bits == weights[last].bits
    return Scheme(group_size, tied, first, last, weights, (*ends.embeddings[1:], *ends.heads[:-1]))


@dataclass(frozen=True)
class FloatModules:
    """Modules of one class whose parameters stay in float.

    Attributes:
        module_class: Name of the class.
        example: Name of one of them.
        parameters: Number of parameters of all of them.
        share: The same as a part of the model's parameters.
    """

    module_class: str
    example: str
    parameters: int
    share: float


def float_modules(model: nn.Module, weights: Container[str]) -> list[FloatModules]:
    """Return the modules whose parameters are not quantized, by class, the largest share first.

    Args:
        model: May be on the meta device.
        weights: Names of the modules whose weights are quantized.
    """
    # A shared parameter counts once, and as quantized if one of its owners is.
    owners = {name: module for name, module in model.named_modules() if name in weights}
    seen = {id(module.weight) for module in owners.values()}
    total = sum({id(p): p.numel() for p in model.parameters()}.values())

    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                counts[type(module).__name__] += parameter.numel()
                examples.setdefault(type(module).__name__, name)
    return [FloatModules(kind, examples[kind], count, count / total) for kind, count in counts.most_common()]


def shares_table(model: PreTrainedModel) -> bool:
    """Return whether embedding and head are one tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return embedding.weight is head.weight


def _decoder_ends(model: PreTrainedModel) -> _Ends:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"{type(model).__name__}: no token embedding and linear output head found; "
            "qat-edge quantizes causal language models that have both, and encoders."
        )
    # Models give the modules, not their names.
    names = {id(module): name for name, module in model.named_modules()}
    return _Ends([names[id(embedding)]], [names[id(head)]])


def _encoder_ends(model: PreTrainedModel, head_bits: int) -> _Ends:
    if not isinstance(model.get_input_embeddings(), nn.Embedding):
        raise ModelError(f"{type(model).__name__}: no token embedding found, which an encoder needs to have.")
    if head_bits != 8:
        raise UsageError(f"--head-bits {head_bits}: {type(model).__name__} is an encoder, whose head stays at 8 bits.")
    return _Ends(tasks.embedding_tables(model), tasks.head_layers(model))


def _default_weights(
    model: PreTrainedModel,
    group_size: int,
    table_bits: tuple[int, int],
    default: LinearCodes,
    ends: _Ends,
    encodes: bool,
) -> dict[str, WeightScheme]:
    """Choose the scheme of every weight without regard to bits that were requested for single layers."""
    weights: dict[str, WeightScheme] = {}
    for name, module in model.named_modules():
        if name in ends.embeddings and isinstance(module, nn.Embedding):
            # Tables of positions and token types are small: 4 bits would save nothing.
            requested = table_bits[0] if name == ends.embeddings[0] else 8
            weights[name] = _weight_scheme(module.embedding_dim, group_size, requested, quantize_input=False)
        elif isinstance(module, nn.Linear):
            if name in ends.heads and encodes:
                # An encoder's head decides the output at once: its few weights keep 8 bits.
                weights[name] = WeightScheme(8, module.in_features, quantize_input=True, reason=HEAD_REASON)
            else:
                requested = table_bits[1] if name in ends.heads else default.bits
                weights[name] = _weight_scheme(module.in_features, group_size, requested, levels=default.levels)
    return weights


def _require_quantizable(model: PreTrainedModel, weights: Mapping[str, WeightScheme]) -> None:
    """Refuse a model most of whose parameters would stay float."""
    left = float_modules(model, weights)
    share = sum(modules.share for modules in left)
    if share > 1 - LEAST_QUANTIZED:
        shown = ", ".join(f"{m.module_class} {m.share:.0%} (such as {m.example})" for m in left[:3])
        raise ModelError(
            f"{type(model).__name__}: {share:.0%} of its parameters are in modules that cannot be quantized: {shown}. "
            "Only linear layers and embeddings can; use a model that is made of them."
        )


def _require_group_size(
    model: PreTrainedModel,
    group_size: int,
    weights: Mapping[str, WeightScheme],
    ends: _Ends,
    bits: Mapping[str, int],
) -> None:
    """Refuse a group size that no linear layer between the ends can have, unless `bits` leaves none with groups."""
    linears = {name: spec for name, spec in weights.items() if name not in ends.names}
    if any(spec.has_groups and spec.group_size == group_size for spec in linears.values()):
        return
    if all(bits.get(name) == PER_CHANNEL for name in linears):
        return
    widths = sorted({m.in_features for m in model.modules() if isinstance(m, nn.Linear)})
    default = "the default " if group_size == DEFAULT_GROUP_SIZE else ""
    raise UsageError(
        f"{default}--group-size {group_size} divides no layer of this model (widths {widths}). Try a smaller one."
    )


def _require_no_2_bits(model: PreTrainedModel, weights: Mapping[str, WeightScheme]) -> None:
    """Refuse 2 bits for an encoder, which only a target without such an operator exports."""
    found = next((name for name, spec in weights.items() if spec.bits == FEWEST), "")
    if found:
        raise UsageError(
            f"{found} in 2 bits: {type(model).__name__} is an encoder, which runs as a .pte alone, and ExecuTorch has "
            "no operator for 2-bit weights. Give 4 or 8 bits."
        )


def _override(
    model: PreTrainedModel,
    bits: Mapping[str, int],
    weights: dict[str, WeightScheme],
    ends: _Ends,
    group_size: int,
    levels: str,
) -> None:
    """Apply the bits that were requested for single layers, in place."""
    for name, width in bits.items():
        _check_override(name, width, weights, ends)
        module = model.get_submodule(name)
        # Embeddings and heads have what their flags say already.
        if name in ends.names or not isinstance(module, nn.Linear):
            continue
        weights[name] = _weight_scheme(module.in_features, group_size, width, levels=levels)
        if width == FEWEST and weights[name].bits != width:
            raise UsageError(
                f"--bits: 'bits.{name}' is 2, which needs groups of {', '.join(map(str, GROUP_SIZES))}, and none of "
                f"them up to --group-size {group_size} divides its width of {module.in_features}. Give 8 for it."
            )


def _check_override(name: str, width: int, weights: Mapping[str, WeightScheme], ends: _Ends) -> None:
    """Refuse bits for one weight that it does not have or cannot get."""
    # A misspelled name would otherwise leave the layer at 4 bits without a word.
    if name not in weights:
        near = difflib.get_close_matches(name, weights, n=3)
        hint = f"Nearest: {', '.join(near)}." if near else f"Its weights are named like {next(iter(weights))}."
        raise UsageError(f"--bits: 'bits.{name}' names no weight of this model. {hint}")
    if width not in LAYER_WIDTHS:
        raise UsageError(f"--bits: 'bits.{name}' is {width!r}; a weight can have {describe_widths()} bits.")

    # Embeddings and heads get their bits from flags of their own; here they may only be listed with what they have.
    if width == FEWEST and name in ends.names:
        raise UsageError(f"--bits: 'bits.{name}' is 2; embedding and head have 8 or 4 bits. Leave the line out.")
    if width == 4 and name in (*ends.embeddings[1:], *ends.heads[:-1]):
        raise UsageError(f"--bits: 'bits.{name}' is 4; this part of an encoder stays at 8 bits. Leave the line out.")
    if width == 4 and name in ends.names:
        flag = "--embedding-bits" if name == ends.embeddings[0] else "--head-bits"
        raise UsageError(f"--bits: 'bits.{name}' is 4, and only finetune {flag} 4 sets it. Leave the line out.")


def describe_widths() -> str:
    """Return the bits that a bits file can give, for messages: `2, 4 or 8`."""
    *fewer, widest = map(str, LAYER_WIDTHS)
    return f"{', '.join(fewer)} or {widest}"


def _format(weight: WeightScheme) -> str:
    if not weight.has_groups:
        return f"int{weight.bits} (per channel)"
    levels = f", {weight.levels} levels" if weight.bits == FEWEST else ""
    return f"int{weight.bits} (group {weight.group_size}{levels})"


def _weight_scheme(
    width: int, group_size: int, bits: int, quantize_input: bool = True, levels: str = INTEGER
) -> WeightScheme:
    """Choose the scheme of a weight (out, width): the requested one, or the nearest that its width allows."""
    if bits == PER_CHANNEL:
        return WeightScheme(bits, width, quantize_input)
    levels = levels if bits == FEWEST else INTEGER
    if width % group_size == 0:
        return WeightScheme(bits, group_size, quantize_input, levels=levels)

    # Smaller groups cost more scales but keep the bits per weight; int8 costs two or four times the size.
    refused = f"width {width} is no multiple of {group_size}"
    for smaller in sorted((g for g in GROUP_SIZES if g < group_size), reverse=True):
        if width % smaller == 0:
            reason = f"{refused}: int{bits} in groups of {smaller} instead"
            return WeightScheme(bits, smaller, quantize_input, reason, levels)
    return WeightScheme(PER_CHANNEL, width, quantize_input, f"{refused}: int8 per channel instead")
