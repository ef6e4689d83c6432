"""Export a checkpoint to an ONNX folder for onnxruntime-genai, through its own model builder. Nothing is rounded here.

The builder knows the graph of each architecture. It gets codes and scales in a checkpoint format that it copies
(`olive_checkpoint`), or a float checkpoint as it is, and the known faults of its graph are corrected afterwards
(`repair`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import AutoConfig

from qat_edge import progress, readers, remote_code
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer
from qat_edge.models.generation_settings import kept_by_onnx
from qat_edge.quant.frozen import read_scheme, read_weights
from qat_edge.quant.frozen_adapters import Adapter, read_adapters
from qat_edge.quant.rotated_norm import stored_rotations
from qat_edge.readers import counted
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.onnx import names, onnx_support
from qat_edge_exporters.onnx.architecture import Architecture, read_architecture, split_fused
from qat_edge_exporters.onnx.builder_process import run_builder
from qat_edge_exporters.onnx.genai_config import NEUTRAL_SEARCH
from qat_edge_exporters.onnx.olive_checkpoint import write_checkpoint
from qat_edge_exporters.onnx.repair import FrozenModel, repair
from qat_edge_exporters.onnx.unmerged_adapters import split_fused_adapters

ERRORS_ONLY = 3  # for a graph with inputs for an adapter: onnxruntime warns about every input that has a default


def export(frozen: Path, out: Path, context_length: int) -> None:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer into the empty folder `out`.

    Where the checkpoint has an adapter, model.onnx has inputs for it and computes the base without them, and
    adapter.onnx_adapter holds its matrices: other adapters of the same layers fit the same base.

    Args:
        frozen: a frozen checkpoint, or a float one, which stays in float32; its adapters are exported unmerged.
        out: empty folder.
        context_length: tokens of prompt and completion together; onnxruntime-genai allocates its KV cache for them.

    Raises:
        ExportError: the builder does not support this model, or failed.
    """
    config = readers.read_object(frozen / "config.json", ExportError)
    adapters = read_adapters(frozen)

    # Reject what cannot be exported before the slow steps.
    _check_support(frozen, config, context_length)
    architecture = read_architecture(frozen, context_length)

    with TemporaryDirectory(prefix=".building-", dir=out) as scratch:
        built = Path(scratch) / "built"
        if is_frozen(frozen):
            model = _build_frozen(frozen, built, config, adapters, architecture)
        else:
            model = _build_float(frozen, built, config, adapters, architecture)
        progress.info("Repairing the graph")
        repair(built, out, model)
        genai = readers.read_object(built / names.GENAI_CONFIG, ExportError)

    # The builder has written the longest context of the model; end tokens are those of all files of the checkpoint.
    genai["search"] = _search(genai["search"], frozen, context_length)
    genai["model"]["context_length"] = context_length
    genai["model"]["eos_token_id"] = tokenizer.end_tokens(frozen)
    if adapters:
        genai["model"]["decoder"]["session_options"]["log_severity_level"] = ERRORS_ONLY
    (out / names.GENAI_CONFIG).write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8", newline="\n")
    tokenizer.copy_tokenizer_files(frozen, out)


def _search(built: Mapping[str, Any], frozen: Path, context_length: int) -> dict[str, Any]:
    """Return genai_config.json's `search`: the model's own settings that onnxruntime-genai has, others neutral.

    The builder reads four of them from generation_config.json, and takes others from config.json unchecked.
    """
    return {**built, **NEUTRAL_SEARCH, **kept_by_onnx(frozen), "max_length": context_length}


def _build_frozen(
    frozen: Path, built: Path, config: dict[str, Any], adapters: dict[str, Adapter], architecture: Architecture
) -> FrozenModel:
    """Build the graph of a frozen checkpoint into the folder `built`."""
    scheme = read_scheme(frozen)
    weights = split_fused(read_weights(frozen), architecture.fused)
    _check_names(config, weights)
    # One table for both saves its bytes, if rounding has left the two equal.
    is_table_shared = scheme.tied and weights[names.EMBEDDING].equals(weights[names.HEAD])

    progress.info(f"Packing {counted(len(weights), 'matrix', 'matrices')} for the builder")
    source = built.with_name("layout")
    source.mkdir()
    write_checkpoint(frozen, source, config | {"tie_word_embeddings": is_table_shared}, scheme.group_size, weights)
    tokenizer.copy_tokenizer_files(frozen, source)

    progress.info("Building the graph with onnxruntime-genai's builder")
    run_builder(source, built, "int4", source / "cache")
    shutil.rmtree(source)  # as large as the model, and no longer needed

    # Only the norm before the head can be rotated.
    rotation = next((rotation.numpy() for rotation in stored_rotations(frozen).values()), None)
    return FrozenModel(weights, adapters, is_table_shared, architecture, rotation)


def _build_float(
    source: Path, built: Path, config: dict[str, Any], adapters: dict[str, Adapter], architecture: Architecture
) -> FrozenModel:
    """Build the graph of a float checkpoint into the folder `built`."""
    _check_names(config, split_fused_adapters(adapters, architecture.fused))
    progress.info("Building the graph with onnxruntime-genai's builder")
    run_builder(source, built, "fp32", built.with_name("cache"))
    rotation = next((rotation.numpy() for rotation in stored_rotations(source).values()), None)
    return FrozenModel({}, adapters, True, architecture, rotation)


def _check_support(frozen: Path, config: dict[str, Any], context_length: int) -> None:
    with remote_code.refusals(frozen):
        known = AutoConfig.from_pretrained(frozen, local_files_only=True, trust_remote_code=remote_code.permitted())
    reason = onnx_support.missing(known)
    if reason:
        raise ExportError(f"onnx: {reason} Leave this target out with --target executorch.")
    longest = config.get("max_position_embeddings")
    if longest is not None and context_length > longest:
        raise ExportError(
            f"onnx: --context-length {context_length} is more than the {longest} positions the model was trained for. "
            f"Give at most {longest}."
        )


def _check_names(config: dict[str, Any], modules: Iterable[str]) -> None:
    """Require that the builder's graph has a node for every module."""
    unknown = [name for name in modules if not names.is_known(name)]
    if unknown:
        raise ExportError(
            f"onnx: {config.get('architectures')} has layers that this target does not know: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}. Leave it out with --target executorch."
        )
