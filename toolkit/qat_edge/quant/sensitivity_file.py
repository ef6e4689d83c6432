"""Read the measurement that `qat-edge sensitivity` wrote, and check every entry of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.field_types import check_types
from qat_edge.manifest import change_of, read_manifest
from qat_edge.models.decoder import layer_index
from qat_edge.options import LAYER_WIDTHS
from qat_edge.quant.bit_allocation import MEASURED, Cost, LayerCost, Sensitivity
from qat_edge.quant.codebook import LEVELS
from qat_edge.quant.scheme import describe_widths
from qat_edge.readers import show

ROUNDING = 1e-3  # nats: rounding moves a KL divergence that far below 0
LEAST = {
    **dict.fromkeys(("tokens", "compared", "rows", "group_size", "size_bytes"), 1),
    **dict.fromkeys(("seed", "float_bytes", "wall_s", "layer"), 0),
    "kl_nats": -ROUNDING,
}


def read_sensitivity(folder: Path) -> Sensitivity:
    """Read sensitivity.json of a folder.

    Raises:
        RunError: It is missing, damaged, or not as it was written.
    """
    path = folder / MEASURED
    try:
        document = readers.read_object(path, RunError)
        # JSON has no integer keys and no dataclasses.
        document["weights"] = {name: _read_layer(name, weight) for name, weight in document["weights"].items()}
        document["together"] = {int(bits): kl for bits, kl in document["together"].items()}
        found = Sensitivity(**document)
        check_types(found, Sensitivity, MEASURED, _check_figure)
        fault = next(_faults(found), None)
    except (RunError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise RunError(f"{path}: missing or damaged ({error}). Give --force to measure again.") from error

    # A weight that was added or removed is not to be seen in the rest.
    if fault is None and (entry := read_manifest(folder)["files"].get(MEASURED)) and change_of(path, entry):
        fault = "changed since it was written"
    if fault is not None:
        raise RunError(f"{path}: damaged ({fault}). Restore it, or give --force to measure again.")
    return found


def _read_layer(name: str, document: dict[str, Any]) -> LayerCost:
    shape = document["shape"]
    if not isinstance(shape, list) or len(shape) != 2:
        raise TypeError(f"weights['{readers.shorten(name)}'].shape is {show(shape)}, expected two numbers")
    costs = {int(bits): Cost(**cost) for bits, cost in document["costs"].items()}
    return LayerCost(document["layer"], document["kind"], (shape[0], shape[1]), costs)


def _check_figure(value: Any, field_name: str, name: str) -> None:
    """Check that a figure is within the range of its field.

    Raises:
        ValueError: names the field.
    """
    least = LEAST.get(field_name)
    if least is not None and value is not None and not least <= value < math.inf:
        raise ValueError(f"{name} is {show(value)}, expected a number of at least {least:g}")


def _faults(found: Sensitivity) -> Iterator[str]:
    """Yield entries that contradict others."""
    if found.levels not in (None, *LEVELS):
        yield f"levels is {show(found.levels)}, expected {' or '.join(LEVELS)}"
    if found.compared > found.tokens:
        yield f"compared is {found.compared}, more than the tokens, {found.tokens}"
    for bits, kl_nats in found.together.items():
        if kl_nats < -ROUNDING:
            yield f"together['{bits}'] is {kl_nats}, expected a number of at least {-ROUNDING:g}"
    for name, weight in found.weights.items():
        yield from _weight_faults(name, weight)

    widths = {bits for weight in found.weights.values() for bits in weight.costs}
    if widths != found.together.keys():
        yield f"together has {sorted(found.together)} bits, and weights have {sorted(widths)}"
    layers = {weight.layer for weight in found.weights.values() if weight.layer is not None}
    if layers != set(range(len(layers))):
        yield f"weights are of {len(layers)} layers, up to number {max(layers)}"


def _weight_faults(name: str, weight: LayerCost) -> Iterator[str]:
    """Yield entries of one weight that contradict its name and shape."""
    entry = f"weights['{readers.shorten(name)}']"
    if weight.layer != layer_index(name):
        yield f"{entry}.layer is {weight.layer}, and its name has {layer_index(name)}"
    if weight.kind != name.rpartition(".")[2]:
        yield f"{entry}.kind is {show(weight.kind)}, which is not the end of its name"
    if min(weight.shape) < 1:
        yield f"{entry}.shape is {weight.shape}, expected two numbers of at least 1"
    if not weight.costs:
        yield f"{entry}.costs is empty"
    for bits, cost in weight.costs.items():
        codes_bytes = math.prod(weight.shape) * bits // 8
        if bits not in LAYER_WIDTHS:
            yield f"{entry}.costs has {bits} bits; a weight can have {describe_widths()}"
        elif cost.size_bytes <= codes_bytes:
            yield f"{entry}.costs['{bits}'].size_bytes is {cost.size_bytes}; its codes alone have {codes_bytes}"
