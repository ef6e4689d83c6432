"""Tiny random models, frozen and exported to a .pte, for the tests of that exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from conftest import Recorder, make_tokenizer, stored_tensors
from qat_edge import progress
from qat_edge.manifest import write_manifest
from qat_edge.models.tasks import CAUSAL_LM, ModelTask
from qat_edge.quant import frozen, rotation, scheme
from qat_edge_exporters.executorch.export_pte import export
from qat_edge_exporters.targets import target_named

CONTEXT = 64
SIZES: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
SHAPE = {**SIZES, "tie_word_embeddings": True}

MIXED = {  # layers in int8: of types that are int4 in the other layer, and of one that is int8 in both
    "model.layers.0.self_attn.k_proj": 8,
    "model.layers.1.self_attn.o_proj": 8,
    "model.layers.0.mlp.gate_proj": 8,
    "model.layers.0.mlp.up_proj": 8,
    "model.layers.1.mlp.up_proj": 8,
    "model.layers.1.mlp.down_proj": 8,
}


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SHAPE, **changes})


@dataclass(frozen=True)
class TinyExport:
    """One tiny model.

    Attributes:
        frozen: its checkpoint.
        folder: of the export.
        messages: lines that the exporter reported.
        prompt: a text whose greedy completion is `completion`.
        completion: token ids, the last of which is an end token.
    """

    frozen: Path
    folder: Path
    messages: list[str]
    prompt: str = ""
    completion: tuple[int, ...] = ()

    @property
    def pte(self) -> Path:
        return self.folder / "model.pte"


def freeze(
    config: PretrainedConfig,
    group_size: int,
    folder: Path,
    bits: dict[str, int] | None = None,
    table_bits: tuple[int, int] = (8, 8),
    task: ModelTask = CAUSAL_LM,
    rotated: bool = False,
    codes: scheme.LinearCodes | None = None,
    adjust: Callable[[Any], None] | None = None,
) -> Any:
    """Write a frozen checkpoint of random weights, and return it as it is loaded.

    Args:
        config: of the model.
        group_size: features that share a scale.
        folder: of the checkpoint.
        bits: of single layers.
        table_bits: of embedding and head.
        task: of the model.
        rotated: rotate the hidden states.
        codes: of linear layers without bits of their own.
        adjust: changes the random weights.
    """
    torch.manual_seed(0)
    model = task.auto_class.from_config(config).eval()
    task.prepare(model)
    # Large enough for an int8 input to differ from a float one, and norms that are not all 1.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)

    if adjust is not None:
        adjust(model)
    chosen = scheme.choose_scheme(model, group_size, bits, table_bits, codes or scheme.LinearCodes())
    if rotated:
        rotation.rotate(model, chosen, 0)
    frozen.freeze(model, chosen)
    model.save_pretrained(folder, save_original_format=False)  # as in freezing
    make_tokenizer().save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(chosen))
    return frozen.load(folder)


def disturb_rotation(checkpoint: Path) -> None:
    """Change one number of the rotation of the head's input, in a frozen checkpoint."""
    with stored_tensors(checkpoint) as tensors:
        tensors["model.norm.weight"][3, 5] += 1e-3


def export_into(checkpoint: Path, folder: Path, **options: Any) -> TinyExport:
    """Export a checkpoint into a new folder, with options of `export`."""
    recorder = Recorder()
    folder.mkdir()
    with progress.report_to(recorder):
        export(checkpoint, folder, CONTEXT, **options)
    return TinyExport(checkpoint, folder, recorder.lines)


def export_to(target: str, checkpoint: Path, folder: Path) -> TinyExport:
    """Export a checkpoint to a target into a new folder."""
    recorder = Recorder()
    folder.mkdir()
    with progress.report_to(recorder):
        target_named(target).export(checkpoint, folder, CONTEXT)
    return TinyExport(checkpoint, folder, recorder.lines)


def prefill_and_decode(prompt: int, total: int) -> list[tuple[int, int]]:
    """Return begin and end of each call: `prompt` tokens at once, then one at a time up to `total`."""
    return [(0, prompt), *((i, i + 1) for i in range(prompt, total))]


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return the signal-to-noise ratio in dB."""
    noise = (reference.double() - other.double()).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / noise))
