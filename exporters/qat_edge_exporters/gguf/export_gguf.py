"""Export a checkpoint to a GGUF file, which llama.cpp and what is built on it load. Nothing is rounded here.

int4 codes in groups become blocks of Q4_0, int8 codes per channel blocks of Q8_0 (`gguf_blocks`), and everything else
stays in float32. What such a file cannot hold exactly is refused before the first byte is written: 2-bit codes, scales
that float16 does not hold, a rotated head that shares the embedding's table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer
from qat_edge.quant.frozen import FrozenWeight, read_floats, read_scheme, read_weights
from qat_edge.quant.frozen_adapters import read_adapters
from qat_edge.quant.rotated_norm import ROTATION
from qat_edge.readers import counted
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.gguf import gguf_blocks, gguf_file, gguf_support
from qat_edge_exporters.gguf.gguf_blocks import BY_BITS, BlockType
from qat_edge_exporters.gguf.gguf_families import EMBEDDING, HEAD, Family, family_of, is_norm, module_names, row_order
from qat_edge_exporters.gguf.gguf_file import MODEL_FILE
from qat_edge_exporters.gguf.gguf_rope import rotary_settings
from qat_edge_exporters.gguf.gguf_settings import file_metadata, read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Stored = dict[str, tuple[NDArray[Any], BlockType | None]]  # values or blocks of each tensor, and the type of the blocks
ELSEWHERE = "Export to another --target."


def export(checkpoint: Path, out: Path, context_length: int) -> None:
    """Write model.gguf and the tokenizer's files into the empty folder `out`.

    Args:
        checkpoint: a frozen checkpoint, or a float one, which stays in float32.
        out: empty folder.
        context_length: tokens of prompt and completion together, which llama.cpp takes as the model's.

    Raises:
        ExportError: llama.cpp does not compute this model, or a GGUF file cannot hold it exactly.
    """
    # Everything is checked before the file is begun.
    source = _checked(checkpoint, context_length)
    config, family, weights, metadata = source.config, source.family, source.weights, source.metadata
    names = module_names(family, config.num_hidden_layers)

    progress.info(f"Packing {counted(len(weights), 'matrix', 'matrices')}")
    skipped = {HEAD} if source.is_shared else set()
    tensors: Stored = {
        f"{names[module]}.weight": _packed(module, weight, metadata, family)
        for module, weight in weights.items()
        if module not in skipped
    }
    tensors |= {
        f"{names[module]}.{kind}": (_as_stored(module, values.numpy(), metadata, family), None)
        for name, values in source.floats.items()
        for module, _, kind in [name.rpartition(".")]
        if module not in skipped
    }
    factors = rotary_settings(config, family.architecture).factors
    tensors |= {name: (values, None) for name, values in factors.items()}
    gguf_file.write(out / MODEL_FILE, family.architecture, metadata, tensors)
    tokenizer.copy_tokenizer_files(checkpoint, out)


def require_expressible(checkpoint: Path, context_length: int) -> None:
    """Require that llama.cpp computes a checkpoint, and that a GGUF file can hold it exactly.

    Raises:
        ExportError: names what it lacks.
    """
    _checked(checkpoint, context_length)


class _Source(NamedTuple):
    """A checkpoint that a GGUF file can hold.

    Attributes:
        config: of the model.
        family: of llama.cpp's graph.
        weights: quantized matrices by module; none of a float checkpoint.
        floats: other tensors by name.
        metadata: of the file.
        is_shared: the head has the embedding's table.
    """

    config: Any
    family: Family
    weights: dict[str, FrozenWeight]
    floats: dict[str, Tensor]
    metadata: dict[str, Any]
    is_shared: bool


def _checked(checkpoint: Path, context_length: int) -> _Source:
    """Read a checkpoint, and refuse one that a GGUF file cannot hold.

    Raises:
        ExportError: names what it cannot hold.
    """
    config, family = _require_family(checkpoint, context_length)
    weights = read_weights(checkpoint) if is_frozen(checkpoint) else {}
    floats = read_floats(checkpoint)
    _require_tensors(checkpoint, weights, floats, module_names(family, config.num_hidden_layers))
    is_shared = read_scheme(checkpoint).tied if weights else f"{HEAD}.weight" not in floats
    _require_tables(is_shared, family)
    for module, weight in weights.items():
        width = weight.codes.shape[1]
        _require_blocks(module, weight.bits, width, width // weight.scales.shape[1])
        gguf_blocks.require_float16(module, weight.scales.float().numpy())
    return _Source(config, family, weights, floats, file_metadata(checkpoint, context_length), is_shared)


class CheckedOutline(NamedTuple):
    """Configuration, family and metadata of a file whose checkpoint does not exist yet."""

    config: PretrainedConfig
    family: Family
    metadata: dict[str, Any]


def check_outline(
    folder: Path,
    context_length: int,
    weights: Mapping[str, tuple[int, int, int]],
    floats: Collection[str],
    is_shared: bool,
) -> CheckedOutline:
    """Refuse a checkpoint that a GGUF file could not hold, before it exists.

    Args:
        folder: its small files.
        context_length: as for `export`.
        weights: bits, width and group size of quantized matrices by module.
        floats: names of its other tensors.
        is_shared: the head has the embedding's table.

    Raises:
        ExportError: names what it cannot hold.
    """
    config, family = _require_family(folder, context_length)
    _require_tensors(folder, weights, floats, module_names(family, config.num_hidden_layers))
    _require_tables(is_shared, family)
    for module, (bits, width, group_size) in weights.items():
        _require_blocks(module, bits, width, group_size)
    return CheckedOutline(config, family, file_metadata(folder, context_length))


def _require_family(checkpoint: Path, context_length: int) -> tuple[PretrainedConfig, Family]:
    """Return the configuration of a model and its family.

    Raises:
        ExportError: llama.cpp does not compute it.
    """
    config = read_config(checkpoint)
    reason = gguf_support.missing(config)
    if reason:
        raise ExportError(f"gguf: {reason} Export to another --target.")
    family = family_of(config)
    window = gguf_support.window_gap(config, family, context_length)
    if window:
        raise ExportError(f"gguf: {window}")
    return config, family


def _require_tensors(
    checkpoint: Path, weights: Collection[str], floats: Collection[str], names: dict[str, str]
) -> None:
    """Refuse a checkpoint with a tensor that llama.cpp's graph has no place for.

    Raises:
        ExportError: names the tensor, and what to do.
    """
    if read_adapters(checkpoint):
        raise ExportError(
            "gguf: the checkpoint has unmerged adapters, and a GGUF file holds a whole model. Export them with "
            "--target onnx or --target executorch."
        )
    if any(name.endswith(f".{ROTATION}") for name in floats):
        raise ExportError(
            "gguf: embedding and head share a rotated table, so the head's input is multiplied by one more matrix, "
            "which no graph of llama.cpp has. Train for this target with `finetune --rotate off`; or keep the rotation "
            "and give the two ends tables of their own: `finetune --embedding-bits 8 --head-bits 4`. "
            f"{ELSEWHERE[:-1]} otherwise."
        )
    modules = [*weights, *(name.rpartition(".")[0] for name in floats)]
    unknown = [module for module in modules if module not in names and module != HEAD]
    if unknown:
        raise ExportError(f"gguf: {unknown[0]} has no counterpart in llama.cpp's graph of this model. {ELSEWHERE}")


def _require_tables(is_shared: bool, family: Family) -> None:
    """Refuse two tables where llama.cpp's graph has one.

    Raises:
        ExportError: embedding and head differ.
    """
    if family.shares_table and not is_shared:
        raise ExportError(
            f"gguf: llama.cpp's graph for {family.architecture} has one table for {EMBEDDING} and {HEAD}, and this "
            "model has two. Train with the same --embedding-bits and --head-bits, and with --rotate off. "
            f"{ELSEWHERE[:-1]} otherwise."
        )


def _require_blocks(module: str, bits: int, width: int, group_size: int) -> None:
    """Refuse a matrix that blocks cannot hold exactly.

    Raises:
        ExportError: names the matrix, and what to do.
    """
    if bits not in BY_BITS:
        raise ExportError(
            f"gguf: {module} has {bits}-bit codes, and Q4_0 and Q8_0, which GGUF holds exactly, have 4 and 8. "
            f"{ELSEWHERE}"
        )
    if width % gguf_blocks.WIDTH or group_size % gguf_blocks.WIDTH:
        raise ExportError(
            f"gguf: {module} has {width} input features in groups of {group_size}, and a GGUF file has blocks of "
            f"{gguf_blocks.WIDTH}. {ELSEWHERE}"
        )


def _packed(
    module: str, weight: FrozenWeight, metadata: dict[str, Any], family: Family
) -> tuple[NDArray[np.uint8], BlockType]:
    """Return a matrix in blocks, its rows in llama.cpp's order."""
    codes, scales, block = weight.codes.numpy(), weight.scales.float().numpy(), BY_BITS[weight.bits]
    order = row_order(module, len(codes), metadata, family)
    if order is not None:
        codes, scales = codes[order], scales[order]
    return gguf_blocks.pack(codes, scales, block), block


def _as_stored(
    module: str, values: NDArray[np.float32], metadata: dict[str, Any], family: Family
) -> NDArray[np.float32]:
    """Return a float tensor as llama.cpp has it."""
    if is_norm(module) and family.norm_offset:
        return values + np.float32(family.norm_offset)
    order = row_order(module, len(values), metadata, family)
    return values if order is None else values[order]
