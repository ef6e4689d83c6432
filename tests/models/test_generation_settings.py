"""Greedy decoding whatever a model's generation_config.json sets, and what an export reports of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from conftest import make_model, make_tokenizer
from qat_edge.errors import ModelError
from qat_edge.evaluate import reference
from qat_edge.models import generation_settings

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.5, "encoder_repetition_penalty": 0.5},
    "n-grams": {"no_repeat_ngram_size": 1},
    "forbidden": {"suppress_tokens": list(range(20, 250)), "begin_suppress_tokens": [5], "bad_words_ids": [[9]]},
    "forced": {"forced_bos_token_id": 40, "forced_eos_token_id": 41},
    "lengths": {"max_length": 4, "min_new_tokens": 30, "max_time": 0.0},
    "bias": {"sequence_bias": [[[33], 100.0]]},
    "beams": {"num_beams": 3, "length_penalty": 3.0},
    "samples": {"do_sample": True, "temperature": 5.0, "num_return_sequences": 2},
    "text": {"stop_strings": ["e"]},
    "other methods": {"guidance_scale": 2.0, "penalty_alpha": 0.6, "top_k": 4, "prompt_lookup_num_tokens": 3},
    "end": {"eos_token_id": list(range(200))},
    "cache": {"cache_implementation": "static", "use_cache": False, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_model_s_own_settings_change_no_generation(settings: dict[str, Any]) -> None:
    model = make_model(make_tokenizer())
    expected = reference.generate(model, PROMPTS, [2], 12, 2)
    # By hand: the most probable token, one after the other.
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert expected[0] == ids[3:] and 2 not in ids

    own = model.generation_config = GenerationConfig.from_dict({"eos_token_id": 0, **settings})
    assert reference.generate(model, PROMPTS, [2], 12, 2) == expected
    assert model.generation_config is own


def write_settings(folder: Path, **settings: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "max_length": 40, **settings}))
    return folder


def test_settings_that_change_texts_are_described_by_name_and_value(tmp_path: Path) -> None:
    assert generation_settings.describe_left_out(tmp_path, ["onnx"]) == ""
    folder = write_settings(tmp_path, repetition_penalty=1.1, suppress_tokens=[4, 5], temperature=0.6, top_k=3)
    text = generation_settings.describe_left_out(folder, ["onnx", "executorch"])
    # Without sampling, temperature and top_k have no effect in transformers either.
    assert "sets repetition_penalty 1.1, suppress_tokens [4, 5]. generate and validate decode greedily" in text
    assert text.endswith("The ONNX folder keeps repetition_penalty in genai_config.json for its app.")
    assert "ONNX" not in generation_settings.describe_left_out(folder, ["executorch"])


def test_settings_without_effect_are_not_described(tmp_path: Path) -> None:
    neutral = {"repetition_penalty": 1.0, "num_beams": 1, "do_sample": False, "min_length": 0, "early_stopping": True}
    folder = write_settings(tmp_path, **neutral, bad_words_ids=None, suppress_tokens=[], use_cache=True)
    assert generation_settings.settings_left_out(folder) == {}


def test_the_onnx_folder_keeps_values_that_its_runtime_takes(tmp_path: Path) -> None:
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    assert generation_settings.kept_by_onnx(write_settings(tmp_path, **sampling, num_beams=2)) == sampling
    odd = {"do_sample": True, "temperature": -1.0, "top_k": "x", "top_p": 7, "repetition_penalty": 0}
    folder = write_settings(tmp_path, **odd)
    assert generation_settings.kept_by_onnx(folder) == {"do_sample": True}
    assert generation_settings.settings_left_out(folder) == odd


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"generation_config\.json: expected a JSON object"):
        generation_settings.settings_left_out(tmp_path)
