"""Write the frozen checkpoint in the pre-quantized format that the onnxruntime-genai builder calls `olive`.

X.qweight: uint8 (out, in * bits // 8), code + 2^(bits-1), lowest bits first. X.scales: float32 (out, blocks). The
builder copies both into MatMulNBits nodes without changing a code; its `gptq` and `awq` formats are rounded again.

MatMulNBits has blocks of 16 to 256 weights and no per-channel form. A row with one scale becomes several blocks that
all repeat it, which computes the same function.

The odd codes -3 -1 1 3 of `seq` levels become -2 -1 0 1 under twice their scale: half a step less than they stand for,
which nodes around MatMulNBits add again (`half_steps`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from qat_edge.quant.codebook import FEWEST, codebook_of
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.packing import pack_int2, pack_int4
from qat_edge.quant.rotated_norm import GAIN, WEIGHT
from qat_edge_exporters.onnx import names

BLOCK_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits on the CPU
DEFAULT_BITS = 4  # of the checkpoint's quantization_config; other matrices are listed as overrides


def block_size(weight: FrozenWeight) -> int:
    """Return the block size that expresses the weight's groups exactly.

    That is the group size itself, or, for a row with one scale, the largest block size that divides the row. If none
    does, the last block is padded.
    """
    width, groups = weight.codes.shape[1], weight.scales.shape[1]
    if width // groups in BLOCK_SIZES:
        return width // groups
    dividing = [block for block in BLOCK_SIZES if width % block == 0]
    return max(dividing, default=BLOCK_SIZES[0])


def packed_codes(weight: FrozenWeight) -> Tensor:
    """Return codes as MatMulNBits stores them: uint8 (out, whole blocks * bits // 8); padding is code 0."""
    padding = -weight.codes.shape[1] % block_size(weight)
    codes = F.pad(weight.codes, (0, padding))
    if weight.bits == FEWEST:
        codebook = codebook_of(weight.bits, weight.levels)
        positions = (codes - codebook.low) // codebook.step
        return torch.from_numpy(pack_int2(positions.to(torch.uint8).numpy()))
    return torch.from_numpy(pack_int4(codes.numpy())) if weight.bits == 4 else _pack_int8(codes)


def _pack_int8(codes: Tensor) -> Tensor:
    """Convert int8 codes to unsigned ones, code + 128: flipping the sign bit of two's complement does that."""
    return codes.view(torch.uint8) ^ 0x80


def block_scales(weight: FrozenWeight) -> Tensor:
    """Return the scales of all blocks, float32 (out, blocks): distances between neighboring levels."""
    blocks = -(-weight.codes.shape[1] // block_size(weight))
    repeats = blocks // weight.scales.shape[1]
    steps = weight.scales.float() * codebook_of(weight.bits, weight.levels).step  # 1 or 2, so exactly
    return steps.repeat_interleave(repeats, dim=1).contiguous()


def write_checkpoint(
    frozen: Path, folder: Path, config: dict[str, Any], group_size: int, weights: Mapping[str, FrozenWeight]
) -> None:
    """Write what the builder reads, except the tokenizer: one safetensors file and a config.json.

    Args:
        frozen: the frozen checkpoint, for its norms and biases.
        folder: folder to write into.
        config: content of the model's config.json.
        group_size: group size of most matrices.
        weights: matrices by module name.
    """
    tensors = float_tensors(frozen)
    overrides: dict[str, dict[str, int]] = {}
    for name, weight in weights.items():
        if name == names.EMBEDDING:
            continue
        block = block_size(weight)
        tensors[f"{name}.qweight"] = packed_codes(weight).contiguous()
        tensors[f"{name}.scales"] = block_scales(weight)
        if (weight.bits, block) != (DEFAULT_BITS, group_size):
            overrides[name] = {"bits": weight.bits, "group_size": block}

    # The builder requires an embedding. The real table is shared with the head, or added by `repair`.
    tensors[f"{names.EMBEDDING}.weight"] = torch.zeros(1, config["hidden_size"])
    save_file(tensors, folder / "model.safetensors")

    quantization = {
        "quant_method": "olive",
        "bits": DEFAULT_BITS,
        "symmetric": True,
        "group_size": group_size,
        "lm_head": True,
        "overrides": overrides,
    }
    document = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8", newline="\n")


def float_tensors(frozen: Path) -> dict[str, Tensor]:
    """Read the tensors that are not quantized, norms and biases, as float32 by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(frozen.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            # Quantized weights are stored as several tensors "X._weight_...".
            keys = [key for key in file.keys() if "._weight_" not in key]  # noqa: SIM118 (no mapping: no __iter__)
            found |= {key: file.get_tensor(key).float() for key in keys}

    # A rotated norm stores its rotation under the name of the weight. The builder gets the norm's own weight, and
    # `repair` adds the rotation as a node.
    for key in [key for key in found if key.endswith(f".{GAIN}")]:
        found[key.removesuffix(GAIN) + WEIGHT] = found.pop(key)
    return found
