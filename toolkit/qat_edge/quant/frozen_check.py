"""Check that the tensors of a frozen checkpoint are those that its scheme says, and that they are codes and scales.

A manifest only lists hashes, and whoever changes a tensor can change those too. Readers of codes and scales, torchao
and the exporters would each make something else of a scale of 0, a code outside of its range or a wrong group size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, how_to_restore, sha256
from qat_edge.quant.codebook import SEQ, SEQ_TYPE_BITS, Codebook
from qat_edge.quant.scheme import Scheme, WeightScheme

SHOWN_FAULTS = 3
# Ends of the names of floats that may be infinite in no model: parameters, not masks.
PARAMETERS = (".weight", ".bias", ".gain")


class StoredWeight(NamedTuple):
    """One quantized matrix as it is stored.

    Attributes:
        codes: int8, shape (out, in).
        scales: float32, shape (out, in // group).
        zero_point: int8, shape of the scales; only zeros.
        code_bits: Bits of torchao's type of the codes.
        block_size: Torchao's: 1 and the group size.
        input_rounding: Torchao's name of it; None where the input is not rounded.
    """

    codes: Tensor
    scales: Tensor
    zero_point: Tensor
    code_bits: int
    block_size: Sequence[int]
    input_rounding: str | None


_checked: set[tuple[Any, ...]] = set()  # checkpoints of this process, so that each is checked once


def is_checked(folder: Path) -> bool:
    """Return whether a checkpoint, as its files are now, has passed all checks in this process."""
    return _stamp(folder) in _checked


def require_sound(folder: Path, scheme: Scheme, weights: Mapping[str, StoredWeight], floats: Iterator[Any]) -> None:
    """Refuse a checkpoint whose tensors are not what its scheme says.

    Args:
        folder: Its folder.
        scheme: Read from its manifest.
        weights: The quantized matrices in its files, by module name.
        floats: Name and tensor of everything else in its files.

    Raises:
        RunError: Names tensors and what is wrong with them.
    """
    faults = [f"{name} is missing" for name in scheme.weights if name not in weights]
    faults += [f"{name} is quantized, but not in the scheme" for name in weights if name not in scheme.weights]
    ends = (scheme.embedding, *([scheme.head] if scheme.head else []), *scheme.apart)
    faults += [f"{readers.shorten(name)}, an end of the model, has no codes" for name in ends if name not in weights]
    both = [name for name in scheme.weights if name in weights]
    faults += [f"{name}: {fault}" for name in both if (fault := _fault(weights[name], scheme.weights[name]))]
    if not faults:
        faults += _tied_faults(scheme, weights)
    faults += [f"{name}: {fault}" for name, tensor in floats if (fault := _float_fault(name, tensor))]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise RunError(
            f"{folder}: the tensors are not those of a frozen checkpoint with this {MANIFEST}: "
            f"{'; '.join(faults[:SHOWN_FAULTS])}{more}. {how_to_restore(folder)}"
        )


def remember(folder: Path) -> None:
    """Note that a checkpoint passed all checks, so that `is_checked` knows it."""
    _checked.add(_stamp(folder))


def _tied_faults(scheme: Scheme, weights: Mapping[str, StoredWeight]) -> list[str]:
    """Compare `tied` of the scheme with the tables of embedding and head; both are known to be there."""
    if not scheme.head:
        return ["'scheme.tied' is true, and the model has no head"] if scheme.tied else []
    one, other = weights[scheme.embedding], weights[scheme.head]
    are_equal = torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
    ends = f"{scheme.embedding} and {scheme.head}"
    if scheme.tied and not are_equal:
        return [f"{ends} are one table in the scheme ('scheme.tied' is true), but differ"]
    return [f"{ends} are equal, but 'scheme.tied' is false"] if are_equal and not scheme.tied else []


def _stamp(folder: Path) -> tuple[Any, ...]:
    files = [path.stat() for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]]
    return sha256(folder / MANIFEST), *((file.st_ino, file.st_size, file.st_mtime_ns) for file in files)


def _fault(weight: StoredWeight, spec: WeightScheme) -> str:
    """Return what is wrong with a quantized matrix; empty if nothing is."""
    codes, scales = weight.codes, weight.scales
    if codes.dtype != torch.int8 or codes.dim() != 2 or codes.numel() == 0:
        return f"its codes are {_describe(codes)}, expected int8 (out, in)"
    type_bits = SEQ_TYPE_BITS if spec.levels == SEQ else spec.bits
    if weight.code_bits != type_bits:
        return f"its codes are int{weight.code_bits}, the scheme says {spec.bits} bits"
    if spec.group_size < 1 or codes.shape[1] % spec.group_size:
        return f"groups of {spec.group_size} do not divide {codes.shape[1]} columns"
    shape = (codes.shape[0], codes.shape[1] // spec.group_size)
    if scales.dtype != torch.float32 or tuple(scales.shape) != shape:
        return f"its scales are {_describe(scales)}, expected float32 {list(shape)}"
    if list(weight.block_size) != [1, spec.group_size]:
        return f"torchao's block size is {readers.shorten(list(weight.block_size))}, expected [1, {spec.group_size}]"
    if (weight.input_rounding is not None) != spec.quantize_input:
        return f"the rounding of its input is {readers.show(weight.input_rounding)}, which the scheme does not say"
    return _value_fault(weight, spec.codebook)


def _value_fault(weight: StoredWeight, codebook: Codebook) -> str:
    """Return what is wrong with codes, scales or zero points of the right shapes; empty if nothing is."""
    codes, scales = weight.codes, weight.scales
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        return "scales are not positive numbers"
    if not torch.equal(scales, scales.to(torch.bfloat16).to(torch.float32)):
        return "scales are no bfloat16 numbers"
    low, high = codebook.low, codebook.high
    if int(codes.min()) < low or int(codes.max()) > high:
        return f"codes from {int(codes.min())} to {int(codes.max())}, permitted are {low} to {high}"
    if bool(((codes - low) % codebook.step).any()):
        return f"codes between those of the levels, which are {low} to {high} in steps of {codebook.step}"
    if weight.zero_point.shape != scales.shape or bool(weight.zero_point.any()):
        return "zero points are not zeros"
    return ""


def _float_fault(name: str, tensor: Tensor) -> str:
    """Return what is wrong with a tensor that is not quantized; empty if nothing is."""
    if name.endswith(PARAMETERS) and (not tensor.is_floating_point() or tensor.numel() == 0):
        return f"is {_describe(tensor)}, expected floats"
    if not tensor.is_floating_point():
        return ""
    if bool(torch.isnan(tensor).any()) or (name.endswith(PARAMETERS) and bool(torch.isinf(tensor).any())):
        return "holds values that are not finite"
    return ""


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
