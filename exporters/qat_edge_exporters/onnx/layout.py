"""The frozen checkpoint in the pre-quantized layout that the onnxruntime-genai builder calls `olive`.

X.qweight: uint8 (out, in * bits // 8), q + 2^(bits-1), low nibble first. X.scales: float32 (out, blocks). The builder
copies both into MatMulNBits nodes without touching a code; its `gptq` and `awq` layouts are rounded again.

MatMulNBits has blocks of 16 to 256 weights and no per-channel form. A row with one scale becomes blocks that
all repeat it, which is the same function.
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

from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.rotated_norm import GAIN, WEIGHT
from qat_edge_exporters.onnx import names

BLOCK_SIZES = (16, 32, 64, 128, 256)  # of MatMulNBits on the CPU


def block_size(weight: FrozenWeight) -> int:
    """Block that expresses the weight's groups exactly: its group, or what divides a row that has one scale."""
    width, groups = weight.codes.shape[1], weight.scales.shape[1]
    if width // groups in BLOCK_SIZES:
        return width // groups
    dividing = [block for block in BLOCK_SIZES if width % block == 0]
    return max(dividing, default=BLOCK_SIZES[0])


def packed_codes(weight: FrozenWeight) -> Tensor:
    """Codes as MatMulNBits holds them: uint8 (out, whole blocks * bits // 8), what pads the last block being 0."""
    padding = -weight.codes.shape[1] % block_size(weight)
    unsigned = F.pad(weight.codes, (0, padding)).view(torch.uint8)
    if weight.bits == 8:
        return unsigned ^ 0x80  # two's complement to q + 128
    unsigned = unsigned & 0xF ^ 0x8  # and to q + 8
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def block_scales(weight: FrozenWeight) -> Tensor:
    """Scales by block, float32 (out, blocks)."""
    blocks = -(-weight.codes.shape[1] // block_size(weight))
    repeats = blocks // weight.scales.shape[1]
    return weight.scales.float().repeat_interleave(repeats, dim=1).contiguous()


def write_layout(
    frozen: Path, folder: Path, config: dict[str, Any], group_size: int, weights: Mapping[str, FrozenWeight]
) -> None:
    """Write what the builder reads, the tokenizer aside: one safetensors file and a config.json."""
    tensors = float_tensors(frozen)
    overrides: dict[str, dict[str, int]] = {}
    for name, weight in weights.items():
        if name == names.EMBEDDING:
            continue
        block = block_size(weight)
        tensors[f"{name}.qweight"] = packed_codes(weight).contiguous()
        tensors[f"{name}.scales"] = block_scales(weight)
        if (weight.bits, block) != (4, group_size):
            overrides[name] = {"bits": weight.bits, "group_size": block}
    # The table itself is shared with the head or added by the repairs; the builder only wants to see one.
    tensors[f"{names.EMBEDDING}.weight"] = torch.zeros(1, config["hidden_size"])
    save_file(tensors, folder / "model.safetensors")
    quantization = {
        "quant_method": "olive",
        "bits": 4,
        "symmetric": True,
        "group_size": group_size,
        "lm_head": True,
        "overrides": overrides,
    }
    document = config | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")


def float_tensors(frozen: Path) -> dict[str, Tensor]:
    """What was not quantized and has a place in the builder's graph, by tensor name, in float32: norms and biases."""
    found: dict[str, Tensor] = {}
    for path in sorted(frozen.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if "._weight_" not in key]  # noqa: SIM118 (no mapping: no __iter__)
            found |= {key: file.get_tensor(key).float() for key in keys}
    for key in [key for key in found if key.endswith(f".{GAIN}")]:
        # Of a turned norm the builder is given the norm's own weight; repairs add what turns its output.
        found[key.removesuffix(GAIN) + WEIGHT] = found.pop(key)
    return found
