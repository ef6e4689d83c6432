"""Codes and scales of a model that torchao quantized, kept as they are: `quantize MODEL --method stored --out`.

The model is loaded as the numbers that its codes stand for (`models.torchao_checkpoint`). Under the stored scales these
numbers have the stored codes again, so that scales and bits are all that a run needs of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from qat_edge import progress, readers
from qat_edge.errors import ModelError, UsageError
from qat_edge.models import config_check, load, torchao_checkpoint
from qat_edge.models.load_config import TORCHAO
from qat_edge.models.torchao_checkpoint import TorchaoWeight
from qat_edge.options import GROUP_SIZES, FinetuneOptions
from qat_edge.quant import numerics
from qat_edge.quant.codebook import PER_CHANNEL
from qat_edge.quant.qat_init import QatInit
from qat_edge.quant.scheme import Scheme, shares_table

ANOTHER = "Quantize it anew with another --method, which rounds the numbers that its codes stand for."


@dataclass(frozen=True)
class StoredCodes:
    """Quantization of a model as it was stored.

    Attributes:
        weights: Quantized matrices by module name; a head that shares the embedding's table has its codes.
        bits: Bits of the linear layers that are not int4: int8, also of layers that are stored in float.
        table_bits: Bits of embedding and head.
        group_size: Weights per scale of int4.
    """

    weights: dict[str, TorchaoWeight]
    bits: dict[str, int]
    table_bits: tuple[int, int]
    group_size: int

    def options(self, options: FinetuneOptions) -> FinetuneOptions:
        """Return the options of a run with this quantization."""
        embedding, head = self.table_bits
        return replace(options, group_size=self.group_size, embedding_bits=embedding, head_bits=head)

    def start(self, scheme: Scheme) -> QatInit:
        """Return the stored scales as the initialization of a run.

        Raises:
            ModelError: A weight would get other bits or groups than it is stored with.
        """
        for name, weight in self.weights.items():
            spec = scheme.weights.get(name)
            if spec is None:
                raise ModelError(
                    f"{name} is stored as codes, and the model has no linear layer or embedding of that name. Save the "
                    f"model again with its head, under the names of its class. {ANOTHER}"
                )
            if (spec.bits, spec.group_size) != (weight.bits, weight.group_size):
                raise ModelError(
                    f"{name} is stored as int{weight.bits} in groups of {weight.group_size}, which no scheme of "
                    f"qat-edge has for it next to the other weights. {ANOTHER}"
                )
        return QatInit({name: weight.scales for name, weight in self.weights.items()}, {})


def read_stored_codes(identity: load.ModelIdentity, model: PreTrainedModel) -> StoredCodes:
    """Read how a loaded model is stored.

    Args:
        identity: Of the model.
        model: The same model, with the numbers that its codes stand for.

    Raises:
        UsageError: torchao did not quantize it.
        ModelError: A weight is stored in a form that no target has.
    """
    folder = load.folder_of(identity)
    stored = {} if folder is None else _read(folder, identity.name)
    if not stored:
        raise UsageError(
            f"--method stored: {identity.name} has no weights that torchao quantized (quantization_config of "
            "config.json). Give another --method."
        )
    stored = {name: _with_usable_scales(weight) for name, weight in stored.items()}
    names = {id(module): name for name, module in model.named_modules()}
    ends = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    # One name is enough for a table that both share.
    for name, other in (ends, ends[::-1]) if shares_table(model) else ():
        if name in stored:
            stored.setdefault(other, stored[name])
    for name, weight in stored.items():
        _require_form(name, weight)

    groups = {weight.group_size for weight in stored.values() if weight.bits != PER_CHANNEL}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in ends]
    others = {name: PER_CHANNEL for name in linears if name not in stored or stored[name].bits == PER_CHANNEL}
    embedding, head = (stored[name].bits if name in stored else PER_CHANNEL for name in ends)
    _report(stored, [name for name in (*linears, *ends) if name not in stored], [*linears, ends[1]])
    return StoredCodes(stored, others, (embedding, head), max(groups, default=FinetuneOptions.group_size))


def _read(folder: Path, source: str) -> dict[str, TorchaoWeight]:
    settings = config_check.read_config(folder, source).get("quantization_config") or {}
    if settings.get("quant_method") != TORCHAO:
        return {}
    return torchao_checkpoint.read(folder, source)[0]


def _with_usable_scales(weight: TorchaoWeight) -> TorchaoWeight:
    """Return a weight whose groups of zeros have the least scale that can be divided by, which changes no number."""
    is_zero = (weight.codes.unflatten(1, (weight.scales.shape[1], -1)) == 0).all(dim=-1)
    return weight._replace(scales=torch.where(is_zero, numerics.representable(weight.scales), weight.scales))


def _require_form(name: str, weight: TorchaoWeight) -> None:
    """Refuse a weight that no scheme has.

    Raises:
        ModelError: Names it.
    """
    width, group, fault = weight.codes.shape[1], weight.group_size, ""
    if weight.bits not in (4, PER_CHANNEL):
        fault = f"int{weight.bits}, and int4 and int8 are kept"
    elif weight.bits == PER_CHANNEL and group != width:
        fault = f"int8 in groups of {group}, and int8 with one scale a row is kept"
    elif weight.bits != PER_CHANNEL and group not in GROUP_SIZES:
        fault = f"int4 in groups of {group}, and groups of {', '.join(map(str, GROUP_SIZES))} are kept"
    elif float(weight.scales.min()) < torch.finfo(torch.float32).eps:
        fault = f"int{weight.bits} with scales below {torch.finfo(torch.float32).eps:.2g}, the least that is kept"
    elif not torch.equal(numerics.representable(weight.scales), weight.scales):
        fault = (
            f"int{weight.bits} with scales that bfloat16 does not hold, as runtimes store them (torchao's "
            "weight_scale_dtype and scale_dtype set their type)"
        )
    if fault:
        raise ModelError(f"{name} is stored as {fault}. {ANOTHER}")


def _report(stored: dict[str, TorchaoWeight], floats: list[str], layers: list[str]) -> None:
    """Report what is not as it was stored: floats that become int8, and inputs that are rounded now."""
    if floats:
        progress.warn(f"Stored in float, and rounded to int8 here: {readers.first_few(floats)}")
    unrounded = [name for name in layers if name in stored and not stored[name].rounds_input]
    if unrounded:
        progress.warn(
            f"Stored for inputs in float, which are rounded to int8 per token here: {readers.first_few(unrounded)}"
        )
