"""Tiny random models, frozen and exported to a .pte, for the tests of that exporter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from conftest import Recorder, make_tokenizer, stored_tensors
from qat_edge import progress
from qat_edge.models.tasks import CAUSAL_LM, Kind
from qat_edge.quant import frozen, rotation, scheme
from qat_edge.run import write_manifest
from qat_edge_exporters.executorch.export_pte import export

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

MIXED = {  # of kinds that are int4 in the other layer, and of one that is int8 in both
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
class Exported:
    """One tiny model: frozen checkpoint, export folder, and the lines the exporter reported."""

    frozen: Path
    folder: Path
    messages: list[str]
    prompt: str = ""
    answer: tuple[int, ...] = ()  # greedily, to `prompt`; its last token is an end token

    @property
    def pte(self) -> Path:
        return self.folder / "model.pte"


def freeze(
    config: PretrainedConfig,
    group_size: int,
    folder: Path,
    bits: dict[str, int] | None = None,
    table_bits: tuple[int, int] = (8, 8),
    kind: Kind = CAUSAL_LM,
    turned: bool = False,
) -> Any:
    torch.manual_seed(0)
    model = kind.auto.from_config(config).eval()
    kind.settle(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    plan = scheme.choose(model, group_size, bits, table_bits)
    if turned:
        rotation.rotate(model, plan, 0)
    frozen.freeze(model, plan)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_facts(plan))
    return frozen.load(folder)


def disturb_turn(checkpoint: Path) -> None:
    """Change one number of what turns the head's input, in a frozen checkpoint."""
    with stored_tensors(checkpoint) as tensors:
        tensors["model.norm.weight"][3, 5] += 1e-3


def export_into(checkpoint: Path, folder: Path, **options: Any) -> Exported:
    recorder = Recorder()
    folder.mkdir()
    with progress.report_to(recorder):
        export(checkpoint, folder, CONTEXT, **options)
    return Exported(checkpoint, folder, recorder.lines)


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Signal to noise in dB."""
    noise = (reference.double() - other.double()).square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / noise))
