"""The quantization_config of compressed-tensors: which layers have codes, of how many bits, and how inputs are rounded.

Inputs are rounded to int8 at run time with one asymmetric scale per token, as in training (`quant.numerics`). Compared
with torchao, compressed-tensors 0.20.1 divides by the scale instead of multiplying by its reciprocal, and adds the zero
point before it rounds: values within a float32 rounding error of a tie may get a neighboring code.

Layers are listed by name, so that one of other bits needs no exception. Tables in float are listed as ignored, the
embedding first.

Format: https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/quantization/quant_args.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qat_edge import readers
from qat_edge.errors import ArtifactError
from qat_edge.quant.scheme import Scheme, WeightScheme

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
HEAD_GROUP = "head"  # name of the group of the output head, which no reader but ours looks at
BITS = (4, 8)  # of codes
INPUTS: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
MOST_GROUPS = 1000  # of a file's configuration


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same form of codes.

    Attributes:
        name: of the group.
        layers: names of its modules.
        bits: of a code.
        group_size: weights per scale; None for one scale per row.
    """

    name: str
    layers: Sequence[str]
    bits: int
    group_size: int | None


def quantization_config(scheme: Scheme, in_float: Sequence[str]) -> dict[str, Any]:
    """Return the quantization_config of a frozen checkpoint.

    Args:
        scheme: of the checkpoint.
        in_float: names of the tables that are written in float, the embedding first.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, spec in scheme.weights.items():
        if name in in_float:
            continue
        key = HEAD_GROUP if name == scheme.head else _group_name(spec)
        # Without a format of its own, a group whose inputs are rounded to 8 bits is taken for unpacked int8.
        form = {"format": FORMAT, "weights": _weights(spec), "input_activations": INPUTS}
        group = groups.setdefault(key, {"targets": [], **form})
        group["targets"].append(name)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(in_float),
    }


def read_groups(settings: Mapping[str, Any], where: str) -> list[LayerGroup]:
    """Return the groups of a quantization_config that was read from a file.

    Raises:
        ArtifactError: it has no groups of the form that exports have.
    """
    stored = settings.get("config_groups")
    if settings.get("quant_method") != METHOD or not isinstance(stored, dict) or len(stored) > MOST_GROUPS:
        raise ArtifactError(f"{where} is no configuration of {METHOD} with groups of layers. Export again.")
    return [_read_group(name, group, f"{where}: group {readers.shorten(name)}") for name, group in stored.items()]


def _read_group(name: str, group: Any, where: str) -> LayerGroup:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ArtifactError(f"{where} has no weights. Export again.")
    layers, bits, size = group.get("targets"), weights.get("num_bits"), weights.get("group_size")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ArtifactError(f"{where} has targets that are no names of layers. Export again.")
    if bits not in BITS or type(bits) is not int:
        raise ArtifactError(f"{where} has codes of {readers.show(bits)} bits; exports have {BITS[0]} or {BITS[1]}.")
    if size is not None and (type(size) is not int or size < 1):
        raise ArtifactError(f"{where} has group_size {readers.show(size)}. Export again.")
    return LayerGroup(name, layers, bits, size)


def _group_name(spec: WeightScheme) -> str:
    return f"int{spec.bits}_group{spec.group_size}" if spec.has_groups else f"int{spec.bits}_channel"


def _weights(spec: WeightScheme) -> dict[str, Any]:
    form = {"num_bits": spec.bits, "type": "int", "symmetric": True, "dynamic": False}
    if spec.has_groups:
        return {**form, "strategy": "group", "group_size": spec.group_size}
    return {**form, "strategy": "channel"}
