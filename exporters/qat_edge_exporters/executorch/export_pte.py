"""Checkpoint, frozen or float -> folder with model.pte and all that the LLM runner needs beside it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir import EdgeProgramManager
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge import progress
from qat_edge.errors import ExportError, RunError
from qat_edge.models import tasks, tokenizer
from qat_edge.models.tasks import Kind
from qat_edge.quant import frozen as checkpoint
from qat_edge.run import disk_errors, write_text
from qat_edge_exporters.checkpoint import Adapter, is_frozen, read_adapters
from qat_edge_exporters.executorch import encoder, pte_support
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.graph import attention, lowering, tracing
from qat_edge_exporters.executorch.pte import runner_contract, shared_table

MODEL = "model.pte"
LAYERS = "layers.json"  # module names, those of rounded linear layers in the order the .pte computes them


def export(
    frozen: Path,
    out: Path,
    context_length: int,
    *,
    portable: bool = False,
    kv_cache: str = "float32",
    backend: str = registry.XNNPACK,
) -> None:
    """Write a checkpoint into the empty folder `out` as a .pte for conversations of `context_length` tokens.

    An encoder becomes a program for texts of up to as many, or of all that it has positions for.

    frozen: a frozen checkpoint, or a float one, which stays in float32; adapters in it stay beside its weights.
    portable: of ATen's operators only, for a runtime without ExecuTorch's quantized and LLM operators.
    kv_cache: how keys and values are kept, "float32" or "int8".
    backend: what computes it; beside XNNPACK, of frozen checkpoints only, and with a cache of its own.

    Raises:
        ExportError: the architecture, its cache or the context length is beyond what ExecuTorch computes.
        RunError: no checkpoint, or no space to write.
    """
    compiler = None if backend == registry.XNNPACK else registry.compiler(backend)
    model, adapters = _load(frozen)
    _require_expressible(model, frozen)
    kind = tasks.of_model(model)
    if kind.encodes:
        asked = {"--backend": compiler is not None, "--kv-cache": kv_cache != "float32"}
        flags = [flag for flag, given in asked.items() if given]
        lowered = _encoder(model, kind, frozen, context_length, portable, flags)
    else:
        if compiler is not None and (adapters or not is_frozen(frozen)):
            raise ExportError(
                f"--backend {backend} is for frozen checkpoints; {frozen} holds float weights or adapters."
            )
        lowered = _decoder(model, adapters, frozen, context_length, portable, kv_cache, compiler)
    _write(lowered, frozen, out, shares=compiler is None and not kind.encodes)


@dataclass(frozen=True)
class _Lowered:
    """A program still to be written. names: of frozen weights by their buffers; layers: of layers.json, without the
    linear layers."""

    edge: EdgeProgramManager
    names: dict[str, str]
    layers: dict[str, Any]


def _decoder(
    model: Any,
    adapters: dict[str, Adapter],
    frozen: Path,
    context_length: int,
    portable: bool,
    kv_cache: str,
    compiler: Any,
) -> _Lowered:
    """A model that generates text; compiler: None for XNNPACK."""
    attention.check_length(model.config, context_length)
    attention.settle_rotary(model, context_length)
    methods = runner_contract.constant_methods(
        model.config, context_length, tokenizer.end_tokens(frozen), tokenizer.load(frozen).bos_token_id
    )
    methods["use_sdpa_with_kv_cache"] = not portable
    embedding, head = _ends(model)
    floats = _float_bytes(model, adapters)
    if compiler is None:
        cache = tracing.choose_cache(model.config, context_length, portable, kv_cache)
        names = tracing.prepare(model, adapters, portable)
        progress.info("exporting the graph")
        program = tracing.trace(tracing.Decoder(model, cache))
        progress.info(cache.describe())
        progress.info("preparing the graph for XNNPACK")
        edge = lowering.lower(program, methods)
    else:
        names = compiler.prepare(model)
        progress.info("exporting the graph")
        edge = compiler.lower(compiler.trace(model, context_length), methods)
    return _Lowered(edge, names, {"embedding": embedding, "head": head, "float_bytes": floats})


def _encoder(
    model: Any,
    kind: Kind,
    frozen: Path,
    length: int,
    portable: bool,
    flags: list[str],
) -> _Lowered:
    """A model that answers a text as a whole; flags: those given that it has no use for."""
    if flags:
        raise ExportError(f"{flags[0]} is for models that generate text; {model.config.model_type} is {kind.title}.")
    if not is_frozen(frozen) or read_adapters(frozen):
        raise ExportError(f"{frozen} holds float weights or adapters; of {kind.title} only frozen checkpoints export.")
    plan, longest = checkpoint.read_scheme(frozen), tasks.longest_text(model, tokenizer.load(frozen))
    edge, names = encoder.lower(model, kind, min(length, longest), portable)
    tables = [names[buffer] for buffer in lowering.table_order(edge) if buffer in names]
    return _Lowered(edge, names, {"embedding": plan.embedding, "head": plan.head, "tables": tables})


def _write(lowered: _Lowered, frozen: Path, out: Path, *, shares: bool) -> None:
    """Program, layers.json and what else belongs beside it; shares: whether the head may use the embedding's table."""
    linears = [lowered.names[b] for b in lowering.linear_order(lowered.edge) if b in lowered.names]
    progress.info("writing model.pte")
    with disk_errors(out), (out / MODEL).open("wb") as file:
        lowering.emit(lowered.edge).write_to_file(file)
    with disk_errors(out):
        saved = shared_table.share(out / MODEL) if shares else 0
    if saved:
        progress.info(f"stored once for embedding and head: {saved / 1e6:.1f} MB")
        if "head" in lowered.layers["float_bytes"]:
            lowered.layers["float_bytes"]["head"] = 0
    write_text(out / LAYERS, json.dumps(lowered.layers | {"linears": linears}, indent=1) + "\n")
    _copy_files(frozen, out)


def _require_expressible(model: Any, frozen: Path) -> None:
    """Refuse what no .pte can be made of."""
    if not (frozen / "tokenizer.json").is_file():
        raise ExportError(f"{frozen}: no tokenizer.json, and ExecuTorch's runner reads no other kind of tokenizer.")
    lacking = pte_support.missing(model.config)
    if lacking:
        raise ExportError(f"executorch: {lacking} Leave this target out with --target onnx.")


def _copy_files(frozen: Path, out: Path) -> None:
    """What runners and readers want beside the program."""
    tokenizer.copy_files(frozen, out)
    for name in runner_contract.OTHER_FILES:
        if (frozen / name).is_file():
            with disk_errors(out):
                shutil.copyfile(frozen / name, out / name)


def _load(folder: Path) -> tuple[Any, dict[str, Adapter]]:
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no checkpoint here. `qat-edge export` makes one.")
    progress.info(f"loading the {'frozen' if is_frozen(folder) else 'float'} checkpoint")
    return checkpoint.load(folder), read_adapters(folder)


def _float_bytes(model: Any, adapters: dict[str, Adapter]) -> dict[str, int]:
    """Bytes of matrices that the .pte will hold in float, by part, a tied table as two."""
    if any(isinstance(m.weight, IntxUnpackedToInt8Tensor) for m in model.modules() if isinstance(m, nn.Linear)):
        sizes = {}
    else:
        ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        linears = sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
        sizes = {part: module.weight.nbytes for part, module in ends.items()}
        sizes["linears"] = linears - sizes["head"]
    if adapters:
        sizes["adapters"] = sum(adapter.size_bytes for adapter in adapters.values())
    return sizes


def _ends(model: Any) -> tuple[str, str]:
    """Module names of the token embedding and of the output head."""
    names = {id(module): name for name, module in model.named_modules()}
    return names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
