"""A multimodal model is used for text through its text model alone, or refused in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from conftest import make_tokenizer, stored_tensors, train_run
from qat_edge.errors import ModelError
from qat_edge.models.load import load_model
from qat_edge.models.merge import merged_model

TEXT: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TOKENS = torch.tensor([[1, 40, 50, 60, 2]])


@pytest.fixture
def gemma3(tmp_path: Path) -> Path:
    """A tiny Gemma 3 with a vision tower, as transformers saves it."""
    torch.manual_seed(0)
    text = {**TEXT, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = Gemma3Config(
        text_config=text, vision_config=VISION, mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6,
        image_token_index=7, bos_token_id=1, eos_token_id=[2, 0], pad_token_id=2,
    )  # fmt: skip
    folder = tmp_path / "gemma3"
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def stored_names(folder: Path) -> list[str]:
    return sorted(load_file(folder / "model.safetensors"))


def test_the_text_model_of_gemma_3_computes_what_the_whole_model_does(gemma3: Path, messages: list[str]) -> None:
    whole = Gemma3ForConditionalGeneration.from_pretrained(gemma3, dtype=torch.float32).eval()
    model = load_model(str(gemma3)).model
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.config.architectures == ["Gemma3ForCausalLM"]
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, whole(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert model.config.eos_token_id == [2, 0]
    (line,) = [line for line in messages if "used for text alone" in line]
    assert re.search(r"left out: multi_modal_projector, vision_tower \(\d+ tensors\)", line)


def test_begin_and_end_tokens_that_no_file_states_are_not_those_of_the_class(gemma3: Path) -> None:
    config = json.loads((gemma3 / "config.json").read_text())
    for part in (config, config["text_config"]):
        del part["eos_token_id"], part["bos_token_id"]
    (gemma3 / "config.json").write_text(json.dumps(config))
    (gemma3 / "generation_config.json").unlink()
    loaded = load_model(str(gemma3)).model.config
    assert loaded.eos_token_id is loaded.bos_token_id is None


def test_the_other_form_of_names_is_read_as_well(gemma3: Path) -> None:
    expected = load_model(str(gemma3)).model.state_dict()
    with stored_tensors(gemma3) as tensors:
        for name in list(tensors):
            new = re.sub(r"^language_model\.model\.", "model.language_model.", name)
            new = re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", new)
            tensors[new] = tensors.pop(name)
    assert any(name.startswith("model.language_model.layers.") for name in stored_names(gemma3))
    found = load_model(str(gemma3)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_text_model_that_is_not_whole_is_refused(gemma3: Path) -> None:
    with stored_tensors(gemma3) as tensors:
        stored = dict(tensors)
        (name,) = (n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight") and "language_model" in n)
        del tensors[name]
    with pytest.raises(ModelError, match=r"1 tensor is missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_model(str(gemma3))

    extra = {**stored, name.replace("layers.1", "layers.2"): stored[name].clone()}
    save_file(extra, gemma3 / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 has no place in the model \(.*layers\.2\.mlp\.up_proj\.weight\)"):
        load_model(str(gemma3))


def test_a_run_on_the_text_model_merges_again(gemma3: Path, tmp_path: Path) -> None:
    run = train_run(gemma3, tmp_path)
    merged = merged_model(run.adapter).model
    assert type(merged).__name__ == "Gemma3ForCausalLM"


def test_a_model_whose_text_part_cannot_be_loaded_alone_is_refused_in_words(tmp_path: Path) -> None:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"a multimodal model \(Qwen2VL.*whose text model \(qwen2_vl_text\) .* alone"):
        load_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2_vl"


def test_layers_that_differ_in_their_settings_are_refused(tmp_path: Path) -> None:
    config = Gemma4TextConfig(**TEXT, head_dim=16, hidden_size_per_layer_input=16, vocab_size_per_layer_input=288)
    Gemma4ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"gemma4_text: its layers differ in head_dim \(per_layer_config\)"):
        load_model(str(tmp_path))
