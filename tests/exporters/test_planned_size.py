"""Predicted sizes of artifacts, compared with the files that the exporters write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import SIZES, freeze
from transformers import Gemma3TextConfig, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from conftest import make_tokenizer
from qat_edge.errors import ExportError
from qat_edge.models.meta_model import model_without_weights
from qat_edge.quant import scheme
from qat_edge.train.rotated_outline import RotationOutcome
from qat_edge.verbs.frozen_outline import write_outline
from qat_edge_exporters.planned_size import PlannedFiles
from qat_edge_exporters.targets import target_named

CONTEXT = 64
# Wide enough for the graph, which measured constants stand for, to be a small part as in real models.
WIDE = {**SIZES, "hidden_size": 256, "intermediate_size": 768, "vocab_size": 2048, "max_position_embeddings": 256}
HEADS = {"head_dim": 64}
MODELS: dict[str, tuple[type[PretrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}, {}),
    "rotated": (LlamaConfig, {"tie_word_embeddings": True}, {"rotated": True}),
    "two tables": (LlamaConfig, {"tie_word_embeddings": False}, {}),
    "4-bit head": (LlamaConfig, {"tie_word_embeddings": True}, {"table_bits": (8, 4)}),
    "groups of 64": (LlamaConfig, {"tie_word_embeddings": True}, {"group_size": 64}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}, {}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, **HEADS}, {}),
    "gemma3": (
        Gemma3TextConfig,
        {"tie_word_embeddings": True, **HEADS, "sliding_window": 32, "layer_types": ["sliding_attention"] * 2},
        {},
    ),
}


def predicted(config: PretrainedConfig, options: dict[str, Any], target: str, folder: Path) -> PlannedFiles:
    """Return the prediction for a model, from its configuration alone."""
    model = model_without_weights(config)
    tables = options.get("table_bits", (8, 8))
    chosen = scheme.choose_scheme(model, options.get("group_size", 32), None, tables)
    norms = ("model.norm",) if options.get("rotated") else ()
    folder.mkdir()
    outline = write_outline(model, make_tokenizer(), chosen, RotationOutcome(bool(norms), norms), folder)
    return target_named(target).planned_files(outline, CONTEXT)


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_folders_are_predicted_within_1_percent(name: str, tmp_path: Path) -> None:
    cls, changes, options = MODELS[name]
    config = cls(**{**WIDE, **changes})
    group_size = options.get("group_size", 32)
    others = {key: value for key, value in options.items() if key != "group_size"}
    freeze(config, group_size, tmp_path / "frozen", **others)
    for target in ("hf", "gguf", "onnx", "executorch"):
        try:
            planned = predicted(cls(**{**WIDE, **changes}), options, target, tmp_path / f"outline-{target}")
        except ExportError as refused:
            # The export refuses it for the same reason.
            with pytest.raises(ExportError) as error:
                target_named(target).export(tmp_path / "frozen", tmp_path, CONTEXT)
            assert str(error.value) == str(refused)
            continue
        folder = tmp_path / target
        folder.mkdir()
        target_named(target).export(tmp_path / "frozen", folder, CONTEXT)
        written = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert planned.files.keys() == written.keys()
        assert planned.size_bytes == pytest.approx(sum(written.values()), rel=0.01)
        assert planned.size_bytes == pytest.approx(sum(target_named(target).read(folder).size_bytes.values()), rel=0.01)
