"""Export a frozen checkpoint to a Hugging Face folder in the format pack-quantized of compressed-tensors.

For a linear layer X: X.weight_packed, int32 (out, in * bits / 32), X.weight_scale, bfloat16 (out, groups), which holds
the trained scales exactly, and X.weight_shape. vLLM's loader expects the same names, types and shapes [1]. Everything
else is in float32 as in the checkpoint; embedding and head are stored separately (`float_tables`).

Nothing of compressed-tensors is needed to write the files.

[1] https://github.com/vllm-project/vllm/blob/01063cd07bef167f37f6d25a96b1df7d97fe40eb/vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa8.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer
from qat_edge.quant import frozen, frozen_config
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.frozen_adapters import read_adapters
from qat_edge.quant.packing import pack_int32
from qat_edge.quant.rotated_norm import ROTATION
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.huggingface import hf_settings, hf_support
from qat_edge_exporters.huggingface.compressed_config import BITS
from qat_edge_exporters.huggingface.float_tables import FloatTable, float_tables
from qat_edge_exporters.huggingface.hf_settings import CONFIG, MODEL_FILE

LEAVE_OUT = "Leave it out with --target executorch."


def export(checkpoint: Path, out: Path, context_length: int) -> None:
    """Write model.safetensors, the two configurations and the tokenizer into the empty folder `out`.

    Args:
        checkpoint: frozen.
        out: empty folder.
        context_length: tokens of prompt and answer together, where a generation ends by default.

    Raises:
        ExportError: the checkpoint is not frozen, or has something that the format cannot hold.
    """
    require_expressible(checkpoint, context_length)
    weights = frozen.read_weights(checkpoint)
    tables = float_tables(checkpoint, weights)
    for table in tables:
        progress.info(_describe(table))

    in_float = {table.module for table in tables}
    tensors = _floats(checkpoint, [name for table in tables for name in table.replaces])
    for name, weight in weights.items():
        if name not in in_float:
            tensors |= packed_tensors(name, weight)
    tensors |= {f"{table.module}.weight": table.values for table in tables}
    save_file(tensors, out / MODEL_FILE, {"format": "pt"})

    documents = {
        CONFIG: hf_settings.expected_config(checkpoint),
        tokenizer.GENERATION_CONFIG: hf_settings.expected_generation(checkpoint, context_length),
    }
    for file, document in documents.items():
        (out / file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8", newline="\n")
    tokenizer.copy_tokenizer_files(checkpoint, out)


def packed_tensors(name: str, weight: FrozenWeight) -> dict[str, Tensor]:
    """Return the tensors of one linear layer by name."""
    packed = pack_int32(weight.codes.numpy(), weight.bits)
    return {
        f"{name}.weight_packed": torch.from_numpy(packed),
        f"{name}.weight_scale": weight.scales.to(torch.bfloat16).contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }


def _floats(checkpoint: Path, replaced: Sequence[str]) -> dict[str, Tensor]:
    """Return norms, biases and other float tensors, without those that a table stands for."""
    found = {name: tensor for name, tensor in frozen.read_floats(checkpoint).items() if name not in replaced}
    rotated = [name for name in found if name.endswith(f".{ROTATION}")]
    if rotated:
        raise ExportError(f"hf: {rotated[0]} multiplies the output of a norm, and no layer behind it holds it.")
    return {name: tensor.contiguous() for name, tensor in found.items()}


def require_expressible(checkpoint: Path, context_length: int) -> None:
    """Require a checkpoint that the format can hold.

    Raises:
        ExportError: names what it cannot hold.
    """
    _require_support(checkpoint)
    bits = {name: weight.bits for name, weight in frozen.read_scheme(checkpoint).weights.items()}
    name = next((name for name, each in bits.items() if each not in BITS), "")
    if name:
        raise ExportError(
            f"hf: {name} has {bits[name]}-bit weights, which this target does not pack. Give --target onnx."
        )


def _require_support(checkpoint: Path) -> None:
    if not is_frozen(checkpoint):
        raise ExportError(
            f"hf: {checkpoint} holds float weights, so it is a Hugging Face folder already. Use it as it is."
        )
    if read_adapters(checkpoint):
        raise ExportError(f"hf: compressed-tensors has no adapters that stay unmerged. {LEAVE_OUT}")
    reason = hf_support.missing(frozen_config.read(checkpoint))
    if reason:
        raise ExportError(f"hf: {reason} {LEAVE_OUT}")


def _describe(table: FloatTable) -> str:
    size = f"{table.values.nbytes / 1e6:.1f} MB in float32"
    if table.is_folded:
        return (
            f"{table.module}: {size}, because the rotation of its input is multiplied into it; the input is not rounded"
        )
    return f"{table.module}: {size}, because transformers cannot load packed codes of an embedding"
