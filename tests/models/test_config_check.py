"""Odd keys and values of a model's JSON files are refused by file and key, before anything is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, BertConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import edit_config
from qat_edge.errors import ModelError
from qat_edge.models import config_check, config_keys
from qat_edge.models.load import load_model
from tools.sweep_architectures import ARCHITECTURES, make_config

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_key_that_is_there_twice_is_refused(model_copy: Path, name: str) -> None:
    path = model_copy / name
    path.write_text('{"transformers_version": "5", ' + path.read_text().lstrip().removeprefix("{"))
    path.write_text('{"transformers_version": "5", ' + path.read_text().removeprefix("{"))
    with pytest.raises(ModelError, match=rf"model: {name}: not usable JSON \(key 'transformers_version' twice"):
        load_model(str(model_copy))


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_broken_file_of_generation_settings_is_named(model_copy: Path, text: str) -> None:
    (model_copy / "generation_config.json").write_text(text)
    with pytest.raises(ModelError, match=r"model: generation_config\.json: (not JSON|expected a JSON object)"):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (lambda path: path.mkdir(), "not a file"),
        (os.mkfifo, "not a file"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf{}"), "byte-order mark"),
        (lambda path: path.write_bytes(b"\xff{}"), "not UTF-8"),
    ],
)
def test_a_configuration_that_is_no_file_is_refused(
    model_copy: Path, make: Callable[[Path], Any], message: str
) -> None:
    (model_copy / "config.json").unlink()
    make(model_copy / "config.json")
    with pytest.raises(ModelError, match=rf"config\.json.*{message}"):
        load_model(str(model_copy))


# --- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-5, 0, True, "512", 512.0])
@pytest.mark.parametrize("key", ["max_position_embeddings", "num_hidden_layers", "head_dim", "intermediate_size"])
def test_a_size_is_a_whole_number_of_1_or_more(model_copy: Path, key: str, value: Any) -> None:
    edit_config(model_copy, **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json has {key} .*, expected a whole number of 1 or more"):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": -1}, "has rms_norm_eps -1, expected a number of 0 or more"),
        ({"rms_norm_eps": float("nan")}, "has rms_norm_eps nan, expected a finite number"),
        ({"rms_norm_eps": "1e-6"}, "has rms_norm_eps '1e-6', expected a number"),
        ({"attention_dropout": 2.0}, "has attention_dropout 2.0, expected a number from 0 to below 1"),
        ({"initializer_range": -1.0}, "has initializer_range -1.0, expected a number of 0 or more"),
        ({"rope_parameters": {**ROPE, "rope_theta": 0}}, "rope_parameters has rope_theta 0, expected a number above"),
        ({"rope_parameters": {**ROPE, "rope_theta": float("inf")}}, "has rope_theta inf, expected a finite number"),
        ({"rope_parameters": None, "rope_theta": -1.0}, r"has rope_theta -1\.0, expected a number above 0"),
        ({"rope_theta": 5.0}, "has rope_theta 5.0, and 10000.0 in rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has rope_parameters and rope_scaling, which differ"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2.0}}, "rope_parameters has factor -2.0, expected"),
        ({"rope_parameters": {**ROPE, "rope_type": "typo"}}, "rope_parameters has rope_type 'typo'.*Known: .*yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "typo"}}, "rope_scaling has rope_type 'typo'.*Known: "),
        ({"rope_parameters": {**ROPE, "factr": 2.0}}, "rope_parameters has factr 2.0, which .* does not read"),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5, which .* not"),
        ({"rope_parameters": None, "rope_scaling": {**LLAMA3, "type": "linear"}},
         "rope_scaling has type 'linear' and rope_type 'llama3', which contradict each other"),
        ({"rope_parameters": {**ROPE, "type": "yarn"}}, "rope_parameters has type 'yarn' and rope_type 'default'"),
        ({"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 5.0}, "rope_theta 5.0, .* in rope_scaling"),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 32}, "embeddings 32, and 64 in rope_para"),
        ({"rope_scaling": [1]}, r"has rope_scaling \[1\], expected an object"),
        ({"hidden_act": "sillu"}, "has hidden_act 'sillu', which transformers does not know. Known: .*silu"),
        ({"quantization_config": [1]}, r"has quantization_config \[1\], expected an object"),
        ({"dtype": "float23"}, "has dtype 'float23', expected float32"),
        ({"dtype": "int8"}, "has dtype 'int8', expected float32"),
        ({"pad_token_id": 9999}, "has pad_token_id 9999, but vocab_size is 288"),
        ({"is_causal": False}, "has is_causal false"),
        ({"use_return_dict": False}, "use_return_dict is no setting of a model"),
        ({"to_dict": 1}, "to_dict is no setting of a model"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "model_type 'llama', .*LlamaForCausalLM, .* Qwen2ForCausalLM"),
        ({"architectures": ["LlamaModel", "LlamaForCausalLM"]}, "model_type 'llama', .* LlamaModel, LlamaForCausalLM"),
        ({"model_type": 3}, "has model_type 3, expected a name"),
        ({"eos_token_id": -7}, "config.json has eos_token_id -7, expected the id of a token"),
        ({"eos_token_id": [2, True]}, r"has eos_token_id \[2, True\], expected the id of a token"),
        ({"_auto_class": "x"}, "_auto_class is no setting of a model"),
        ({"attribute_map": {"hidden_size": "vocab_size"}}, "attribute_map is no setting of a model"),
        ({"num_labels": 10**9}, "has num_labels 1000000000, expected a whole number from 1 to 100000"),
        ({"id2label": ["a"]}, "has id2label list of 1, expected an object"),
        ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters has full_attention dict of 2, which .* not"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor 4.0 and high_freq_factor 4.0, exp"),
        ({"rope_parameters": {**LONGROPE, "short_factor": [1.0]}}, r"has short_factor \[1.0\], expected 8 numbers"),
        ({"rope_parameters": {**LONGROPE, "long_factor": [0.0] * 8}}, "has long_factor list of 8, expected 8 numbers"),
        ({"model_type": "gemma"}, "model_type 'gemma', .*GemmaForCausalLM, .* LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_a_value_that_no_model_can_have_is_refused(model_copy: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(model_copy, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    "changes",
    [
        {"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False},
        {"_attn_implementation": "flash_attention_2"}, {"attn_implementation": "nothing of that name"},
    ],
)  # fmt: skip
def test_what_forward_returns_is_as_everywhere(
    model_copy: Path, tiny_model_folder: Path, changes: dict[str, Any]
) -> None:
    edit_config(model_copy, **changes)
    model = load_model(str(model_copy)).model
    with torch.no_grad():
        found = model(torch.tensor([[1, 5]]))
        expected = load_model(str(tiny_model_folder)).model(torch.tensor([[1, 5]]))
    assert found.attentions is None and found.hidden_states is None
    assert torch.equal(found.logits, expected.logits)


# --- keys that the class does not read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_logit_softcapping", 30.0), ("attn_logit_softcapping", 50.0), ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22), ("logits_scaling", 8.0), ("logit_scale", 0.5), ("sliding_window", 8),
        ("layer_types", ["sliding_attention"] * 2), ("clip_qkv", 2.0), ("layer_norm_eps", 1e-3), ("use_qk_norm", True),
        ("use_bidirectional_attention", True), ("alibi", True), ("rotary_pct", 0.25), ("norm_type", "layer_norm"),
        ("position_embedding_type", "relative_key"), ("text_config", {"model_type": "llama"}), ("use_qkv_bias", True),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_function_elsewhere_is_refused(model_copy: Path, key: str, value: Any) -> None:
    edit_config(model_copy, **{key: value})
    with pytest.raises(ModelError, match=rf"config\.json has {key} .*, and LlamaForCausalLM does not read it"):
        load_model(str(model_copy))


def test_layers_with_settings_of_their_own_are_refused(model_copy: Path) -> None:
    edit_config(model_copy, per_layer_config={"0": {"hidden_act": "relu"}})
    with pytest.raises(ModelError, match=r"llama: its layers differ in hidden_act \(per_layer_config\)"):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_logit_softcapping", None), ("embedding_multiplier", 1.0), ("layer_types", ["full_attention"] * 2),
        ("sliding_window", 4096), ("alibi", False),
        ("layer_norm_eps", 1e-6), ("norm_type", "rms_norm"), ("position_embedding_type", "absolute"),
        ("is_llama_config", True), ("rope_interleaved", False), ("temperature", 0.7),
    ],
)  # fmt: skip
def test_a_key_without_an_effect_is_not_mentioned(model_copy: Path, messages: list[str], key: str, value: Any) -> None:
    edit_config(model_copy, **{key: value})
    load_model(str(model_copy))
    assert not any("does not read" in line for line in messages)


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3, LONGROPE, {**ROPE, "rope_type": "linear", "factor": 2.0}, {**LLAMA3, "type": "llama3"},
        {**LONGROPE, "type": "su"}, {**ROPE, "type": "mrope"},
    ],
)  # fmt: skip
def test_scalings_of_the_rotary_embedding_are_read(model_copy: Path, rope: dict[str, Any]) -> None:
    edit_config(model_copy, rope_parameters=rope)
    assert load_model(str(model_copy)).model.config.rope_parameters["rope_type"] == rope["rope_type"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": [[2]]}, "generation_config.json has eos_token_id list of 1, expected the id of a token"),
        ({"eos_token_id": "2"}, "generation_config.json has eos_token_id '2', expected the id of a token"),
        ({"to_dict": 1}, "generation_config.json: to_dict is no setting of a model"),
    ],
)
def test_odd_settings_of_generation_are_refused(model_copy: Path, settings: dict[str, Any], message: str) -> None:
    (model_copy / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=message):
        load_model(str(model_copy))


@pytest.mark.parametrize("make", [lambda path: path.symlink_to(path.name), lambda path: path.mkdir(), os.mkfifo])
def test_weights_that_are_no_file_are_refused(model_copy: Path, make: Callable[[Path], Any]) -> None:
    (model_copy / "model.safetensors").unlink()
    make(model_copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.safetensors: a link to nowhere, or no file"):
        load_model(str(model_copy))


def test_other_keys_that_the_class_does_not_read_are_named_once(model_copy: Path, messages: list[str]) -> None:
    edit_config(model_copy, **{"my_setting": 1, "other\nsetting": "on"})
    load_model(str(model_copy))
    found = [line for line in messages if "does not read" in line]
    assert len(found) == 1
    assert found[0].endswith("model: config.json: LlamaForCausalLM does not read my_setting, 'other\\nsetting'")


def unread(config: PretrainedConfig, folder: Path) -> None:
    """Save a configuration, read it again and check its keys."""
    config.save_pretrained(folder)
    config_keys.check_keys(AutoConfig.from_pretrained(folder), config_check.read_config(folder, "x"), "x")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_of_the_table_is_refused(name: str, tmp_path: Path) -> None:
    unread(make_config(name), tmp_path)


@pytest.mark.parametrize("name", sorted({name.partition(":")[0] for name in ARCHITECTURES}))
def test_a_file_that_transformers_saved_has_no_unread_keys(name: str, tmp_path: Path, messages: list[str]) -> None:
    assert name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    unread(CONFIG_MAPPING[name](), tmp_path)
    assert messages == []


def test_keys_that_old_versions_saved_for_encoders_are_read_or_harmless(tmp_path: Path, messages: list[str]) -> None:
    unread(BertConfig(position_embedding_type="absolute", gradient_checkpointing=False), tmp_path)
    assert messages == []
