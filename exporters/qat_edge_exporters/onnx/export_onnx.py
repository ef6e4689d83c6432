"""Checkpoint -> ONNX folder for onnxruntime-genai, through its own model builder. Nothing is rounded here.

The builder knows each architecture's graph; it is given the codes and scales in a layout it copies
(layout.py), or a float checkpoint as it is, and its known faults are put right afterwards (repair.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig

from qat_edge import progress
from qat_edge.errors import ExportError
from qat_edge.models import tokenizer
from qat_edge.quant.frozen import FrozenWeight, read_scheme, read_weights
from qat_edge.quant.rotated_norm import stored_turns
from qat_edge_exporters.checkpoint import is_frozen, read_adapters
from qat_edge_exporters.onnx import architecture, names, onnx_support
from qat_edge_exporters.onnx.layout import write_layout
from qat_edge_exporters.onnx.repair import repair

ACCURACY_LEVEL = 4  # int8 activations, as trained; 8-bit nodes at any other level run about 100 times slower
# A cache of the window alone would need buffers that only onnxruntime-genai makes; plain onnxruntime grows its own.
BUILDER_OPTIONS = (
    f"accuracy_level={ACCURACY_LEVEL}", "fuse_qkv=false", "hf_token=false", "windowed_kv_cache=false",
)  # fmt: skip
LOG_LINES = 5  # of a failed builder, that the error quotes


def export(frozen: Path, out: Path, context_length: int) -> None:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer into the empty folder `out`.

    frozen: a frozen checkpoint, or a float one, which stays in float32; adapters in it stay beside its weights.
    context_length: tokens of prompt and answer together; onnxruntime-genai allocates its KV cache for as many.
    say: told about each stage.

    Raises:
        ExportError: the builder cannot express this model, or failed.
    """
    config: dict[str, Any] = json.loads((frozen / "config.json").read_text(encoding="utf-8"))
    adapters = read_adapters(frozen)
    _check_support(frozen, config, context_length)
    facts = architecture.read(frozen, context_length)
    with TemporaryDirectory(prefix=".building-", dir=out) as scratch:
        built = Path(scratch) / "built"
        if is_frozen(frozen):
            scheme, weights = read_scheme(frozen), architecture.split(read_weights(frozen), facts.fused)
            _check_names(config, weights)
            shared = scheme.tied and _equal(weights[names.EMBEDDING], weights[names.HEAD])
            progress.info(f"Packing {len(weights)} matrices for the builder")
            _build_frozen(frozen, built, config | {"tie_word_embeddings": shared}, scheme.group_size, weights)
        else:
            _check_names(config, adapters)
            weights, shared = {}, True
            progress.info("Building the graph with onnxruntime-genai's builder")
            run_builder(frozen, built, "fp32", Path(scratch) / "cache")
        progress.info("Repairing the graph")
        turn = next((turn.numpy() for turn in stored_turns(frozen).values()), None)
        repair(built, out, weights, adapters, shared, facts, turn)
        genai = json.loads((built / names.GENAI_CONFIG).read_text(encoding="utf-8"))
    genai["model"]["context_length"] = genai["search"]["max_length"] = context_length
    genai["model"]["eos_token_id"] = tokenizer.end_tokens(frozen)
    (out / names.GENAI_CONFIG).write_text(json.dumps(genai, indent=2) + "\n", encoding="utf-8")
    tokenizer.copy_files(frozen, out)


def _build_frozen(
    frozen: Path,
    built: Path,
    config: dict[str, Any],
    group_size: int,
    weights: Mapping[str, FrozenWeight],
) -> None:
    layout = built.with_name("layout")
    layout.mkdir()
    write_layout(frozen, layout, config, group_size, weights)
    tokenizer.copy_files(frozen, layout)
    progress.info("Building the graph with onnxruntime-genai's builder")
    run_builder(layout, built, "int4", layout / "cache")
    shutil.rmtree(layout)


def run_builder(source: Path, built: Path, precision: str, cache: Path) -> None:
    """Run the model builder on a folder, in a process of its own: it prints, and it holds all weights twice.

    precision: "int4" for a layout folder, "fp32" for a float checkpoint.

    Raises:
        ExportError: it failed; its last lines are quoted.
    """
    command = [
        sys.executable, "-m", "qat_edge_exporters.onnx.builder", "--input", str(source), "--output", str(built),
        "--precision", precision, "--execution_provider", "cpu", "--cache_dir", str(cache),
        "--extra_options", *BUILDER_OPTIONS,
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=offline, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode == 0 and (built / names.MODEL_FILE).is_file():
        return
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    ending = " | ".join(lines[-LOG_LINES:])
    raise ExportError(f"onnx: onnxruntime-genai's builder failed with exit code {done.returncode}: {ending}")


def _check_support(frozen: Path, config: dict[str, Any], context_length: int) -> None:
    lacking = onnx_support.missing(AutoConfig.from_pretrained(frozen, local_files_only=True))
    if lacking:
        raise ExportError(f"onnx: {lacking} Leave this target out with --target executorch.")
    longest = config.get("max_position_embeddings")
    if longest is not None and context_length > longest:
        raise ExportError(
            f"onnx: --context-length {context_length} is more than the {longest} positions the model was trained for. "
            f"Give at most {longest}."
        )


def _check_names(config: dict[str, Any], modules: Iterable[str]) -> None:
    unknown = [name for name in modules if not names.is_known(name)]
    if unknown:
        raise ExportError(
            f"onnx: {config.get('architectures')} has layers this target cannot name: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}. Leave it out with --target executorch."
        )


def _equal(one: FrozenWeight, other: FrozenWeight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
