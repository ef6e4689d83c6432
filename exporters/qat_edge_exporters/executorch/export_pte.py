"""Export a checkpoint, frozen or float, to a folder with model.pte and the files that the LLM runner needs.

Load, prepare the modules, trace, lower, write. `export` is the entry point of the target "executorch".
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executorch.exir import EdgeProgramManager
from torch import nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from qat_edge import progress
from qat_edge.errors import ExportError, RunError
from qat_edge.models import tasks, tokenizer
from qat_edge.models.tasks import ModelTask
from qat_edge.quant import frozen as checkpoint
from qat_edge.quant.codebook import FEWEST
from qat_edge.quant.frozen_adapters import Adapter, read_adapters
from qat_edge.storage import disk_errors, write_text
from qat_edge_exporters import encoder_support
from qat_edge_exporters.checkpoint import is_frozen
from qat_edge_exporters.executorch import encoder, pte_support
from qat_edge_exporters.executorch.backends import registry
from qat_edge_exporters.executorch.graph import attention, lowering, quantized_modules, tracing
from qat_edge_exporters.executorch.graph.fused_projections import fuse_projections
from qat_edge_exporters.executorch.pte import runner_contract, shared_table
from qat_edge_exporters.rotary_frequencies import fix_rotary_frequencies
from qat_edge_exporters.targets import COPIED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL = "model.pte"
# Names of the modules whose matrices the .pte holds; frozen linear layers are in the order of computation.
LAYERS = "layers.json"


def export(
    frozen: Path,
    out: Path,
    context_length: int,
    *,
    portable: bool = False,
    kv_cache: str = "float32",
    backend: str = registry.XNNPACK,
) -> None:
    """Write a checkpoint as a .pte into an empty folder.

    Args:
        frozen: a frozen checkpoint, or a float one, which stays in float32. Adapters in it stay separate from its
            weights.
        out: the folder.
        context_length: tokens of the longest conversation; of the longest text for an encoder, if the model has
            positions for as many.
        portable: use ATen operators only, for a runtime without ExecuTorch's quantized and LLM operators.
        kv_cache: "float32" or "int8".
        backend: XNNPACK, or one of `registry.BACKENDS`, which take frozen checkpoints only and have their own caches.

    Raises:
        ExportError: ExecuTorch cannot compute the architecture, its cache or the context length.
        RunError: there is no checkpoint, or no space to write.
    """
    settings = _Settings(context_length, portable, kv_cache, backend)
    # A missing compiler is reported before minutes are spent on loading.
    compiler = None if backend == registry.XNNPACK else registry.compiler(backend)
    source = _load(frozen)

    task = tasks.task_of_model(source.model)
    if task.is_encoder:
        lowered = _lower_encoder(source, task, settings)
    elif compiler is None:
        lowered = _lower_decoder(source, settings)
    else:
        lowered = _compile_decoder(source, compiler, settings)

    # One table for embedding and head was only tested with XNNPACK alone; an encoder has no such head.
    _write(lowered, frozen, out, may_share=compiler is None and not task.is_encoder)


@dataclass(frozen=True)
class _Settings:
    """Arguments of `export`."""

    context_length: int
    portable: bool
    kv_cache: str
    backend: str


@dataclass(frozen=True)
class _Source:
    """A loaded checkpoint.

    Attributes:
        folder: of the checkpoint.
        model: with float or frozen weights.
        adapters: that were not merged, by the name of their module.
    """

    folder: Path
    model: PreTrainedModel
    adapters: dict[str, Adapter]


@dataclass(frozen=True)
class _LoweredModel:
    """A program that is not yet written.

    Attributes:
        edge: the program.
        names: modules of frozen weights, by the name of their buffer.
        layers: content of layers.json, without the linear layers.
    """

    edge: EdgeProgramManager
    names: dict[str, str]
    layers: dict[str, Any]


def _lower_decoder(source: _Source, settings: _Settings) -> _LoweredModel:
    """Lower a model that generates text to XNNPACK."""
    model, adapters = source.model, source.adapters
    methods = _runner_methods(source, settings)
    # Names and sizes first: preparing replaces the modules.
    layers: dict[str, Any] = _layer_names(model) | {"float_bytes": _float_bytes(model, adapters)}
    cache = tracing.choose_cache(model.config, settings.context_length, settings.portable, settings.kv_cache)
    names = quantized_modules.prepare(model, adapters, settings.portable)
    layers |= {"fused": fuse_projections(model, names, adapters)}

    progress.info("exporting the graph")
    program = tracing.trace(tracing.Decoder(model, cache))
    progress.info(cache.describe())  # tracing creates its buffers

    progress.info("preparing the graph for XNNPACK")
    return _LoweredModel(lowering.lower(program, methods), names, layers)


def _compile_decoder(source: _Source, compiler: registry.Compiler, settings: _Settings) -> _LoweredModel:
    """Lower a model that generates text to another backend.

    Raises:
        ExportError: a checkpoint that is not frozen, or has adapters.
    """
    model = source.model
    if source.adapters or not is_frozen(source.folder):
        raise ExportError(
            f"--backend {settings.backend} is for frozen checkpoints; {source.folder} holds float weights or adapters."
        )
    methods = _runner_methods(source, settings)
    # Names and sizes first: preparing replaces the modules.
    layers = _layer_names(model) | {"float_bytes": _float_bytes(model, {})}
    names = compiler.prepare(model)

    progress.info("exporting the graph")
    program = compiler.trace(model, settings.context_length)
    return _LoweredModel(compiler.lower(program, methods), names, layers)


def _runner_methods(source: _Source, settings: _Settings) -> dict[str, Any]:
    """Check the context length, fix what depends on it, and return the constant methods for the LLM runner.

    Raises:
        ExportError: the model does not reach the context length.
    """
    config = source.model.config
    attention.check_length(config, settings.context_length)
    fix_rotary_frequencies(source.model, settings.context_length)

    end_tokens, bos = tokenizer.end_tokens(source.folder), tokenizer.load_tokenizer(source.folder).bos_token_id
    methods = runner_contract.constant_methods(config, settings.context_length, end_tokens, bos)
    methods["use_sdpa_with_kv_cache"] = not settings.portable
    return methods


def _lower_encoder(source: _Source, task: ModelTask, settings: _Settings) -> _LoweredModel:
    """Lower a model that computes one output for a whole text.

    Raises:
        ExportError: a flag, or a checkpoint, that is for models that generate text.
    """
    model, folder = source.model, source.folder
    # There is no cache whose type could be chosen, and other backends compile decoders only.
    given = {"--backend": settings.backend != registry.XNNPACK, "--kv-cache": settings.kv_cache != "float32"}
    flags = [flag for flag, is_given in given.items() if is_given]
    if flags:
        raise ExportError(f"{flags[0]} is for models that generate text; {model.config.model_type} is {task.title}.")
    encoder_support.require_frozen(folder, task)

    scheme = checkpoint.read_scheme(folder)
    longest = min(settings.context_length, tasks.max_text_tokens(model, tokenizer.load_tokenizer(folder)))
    edge, names = encoder.lower(model, task, longest, settings.portable)
    # An encoder has several tables (tokens, positions, types), which readers tell apart by their order.
    tables = [names[buffer] for buffer in lowering.table_order(edge) if buffer in names]
    return _LoweredModel(edge, names, {"embedding": scheme.embedding, "head": scheme.head, "tables": tables})


def _write(lowered: _LoweredModel, frozen: Path, out: Path, *, may_share: bool) -> None:
    """Write the program, layers.json and the other files of the folder.

    Args:
        lowered: the program.
        frozen: the checkpoint, whose small files are copied.
        out: the folder.
        may_share: whether the head may use the embedding's table.
    """
    # Readers find a matrix by its position in the order of computation.
    linears = [lowered.names[b] for b in lowering.linear_order(lowered.edge) if b in lowered.names]

    progress.info("writing model.pte")
    with disk_errors(out), (out / MODEL).open("wb") as file:
        lowering.emit(lowered.edge).write_to_file(file)
    with disk_errors(out):
        saved = shared_table.share(out / MODEL) if may_share else 0

    layers = lowered.layers | {"linears": linears}
    if saved:
        # The embedding has the bytes of a shared table.
        progress.info(f"stored once for embedding and head: {saved / 1e6:.1f} MB")
        if "head" in layers["float_bytes"]:
            layers["float_bytes"] = layers["float_bytes"] | {"head": 0}
    write_text(out / LAYERS, json.dumps(layers, indent=1) + "\n")
    _copy_files(frozen, out)


def _require_expressible(source: _Source) -> None:
    """Refuse a model that cannot become a .pte.

    Raises:
        ExportError: it has no tokenizer.json, or an architecture that ExecuTorch cannot compute.
    """
    if not (source.folder / "tokenizer.json").is_file():
        raise ExportError(
            f"{source.folder}: no tokenizer.json, and ExecuTorch's runner reads no other kind of tokenizer."
        )
    lacking = pte_support.missing(source.model.config)
    if lacking:
        raise ExportError(f"executorch: {lacking} Leave this target out with --target onnx.")


def _copy_files(frozen: Path, out: Path) -> None:
    """Copy the tokenizer and the configurations, which runners and readers need."""
    tokenizer.copy_tokenizer_files(frozen, out)
    for name in COPIED:
        if (frozen / name).is_file():
            with disk_errors(out):
                shutil.copyfile(frozen / name, out / name)


def _load(folder: Path) -> _Source:
    """Load a checkpoint that can become a .pte."""
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no checkpoint here. `qat-edge export` makes one.")
    progress.info(f"loading the {'frozen' if is_frozen(folder) else 'float'} checkpoint")
    if is_frozen(folder) and FEWEST in checkpoint.read_scheme(folder).widths:
        raise ExportError(
            "executorch: ExecuTorch has no operator for the 2-bit weights of this checkpoint. Leave this target out "
            "with --target onnx."
        )
    source = _Source(folder, checkpoint.load(folder, with_adapters=False), read_adapters(folder))
    _require_expressible(source)
    return source


def _float_bytes(model: PreTrainedModel, adapters: dict[str, Adapter]) -> dict[str, int]:
    """Return bytes of matrices that the .pte will hold in float, by part; a tied table counts twice."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    sizes = {}
    # A checkpoint is frozen as a whole or not at all.
    if not any(isinstance(module.weight, IntxUnpackedToInt8Tensor) for module in linears):
        ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
        sizes = {part: module.weight.nbytes for part, module in ends.items()}
        # The head is a linear layer as well.
        sizes["linears"] = sum(module.weight.nbytes for module in linears) - sizes["head"]
    if adapters:
        sizes["adapter"] = sum(adapter.size_bytes for adapter in adapters.values())
    return sizes


def _layer_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the module names of the token embedding and of the output head."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        "embedding": names[id(model.get_input_embeddings())],
        "head": names[id(model.get_output_embeddings())],
    }
