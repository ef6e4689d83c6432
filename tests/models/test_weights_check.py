"""Everything in a model's files is used, and everything that the model needs comes out of them; else it is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from conftest import edit_config, make_model, make_tokenizer, stored_tensors, train_run
from qat_edge.errors import ModelError, RunError
from qat_edge.models import weights_check
from qat_edge.models.load import load_model
from qat_edge.models.merge import merged_model
from qat_edge.models.tasks import ModelTask, SentenceEncoder, SequenceClassifier

Tensors = dict[str, Tensor]
TOKENS = torch.tensor([[1, 40, 50, 60, 2]])
SHAPE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return save(LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)), tmp_path / "untied")


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def rename(pattern: str, new: str) -> Callable[[Tensors], None]:
    """Return a change that replaces the beginning of names."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(pattern)]:
            tensors[new + name.removeprefix(pattern)] = tensors.pop(name)

    return change


def remove(pattern: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if pattern in name]:
            del tensors[name]

    return change


def add(name: str, tensor: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


# --- names ---------------------------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "compiled": (
        rename("", "_orig_mod."),
        r"2\d tensors are missing .*2\d have no place in the model \(_orig_mod\..*and \d+ more\).*torch\.compile",
    ),
    "distributed": (rename("", "module."), r"have no place .*module\..*DDP"),
    "renamed": (
        rename("model.layers.1.", "model.h.1."),
        r"9 tensors are missing \(model\.layers\.1\..*9 have no place in the model \(model\.h\.1\.",
    ),
    "layer left out": (remove("layers.1."), r"9 tensors are missing \(model\.layers\.1\..*random values"),
    "one tensor": (remove("layers.0.mlp.up_proj"), r"1 tensor is missing \(model\.layers\.0\.mlp\.up_proj\.weight\)"),
    "everything tied": (remove("embed_tokens"), r"missing \(.*embed_tokens\.weight"),
    "a layer too many": (
        add("model.layers.2.mlp.up_proj.weight", torch.zeros(128, 64)),
        r"1 has no place in the model \(model\.layers\.2\.mlp\.up_proj\.weight\)",
    ),
    "another shape": (
        add("model.norm.weight", torch.zeros(32)),
        r"1 has another shape \(model\.norm\.weight: \[32\] in the file, \[64\] in the model\)",
    ),
    "adapters inside": (
        add("model.layers.0.self_attn.q_proj.lora_A.default.weight", torch.zeros(4, 64)),
        r"lora_A.*adapters that were not merged",
    ),
    "two tables where one is configured": (
        add("lm_head.weight", torch.zeros(288, 64)), r"embedding and head are one table .*tie_word_embeddings to false",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_names_that_do_not_match_are_refused_with_the_likely_cause(model_copy: Path, name: str) -> None:
    change, message = DAMAGES[name]
    with stored_tensors(model_copy) as tensors:
        change(tensors)
    with pytest.raises(ModelError, match=message):
        load_model(str(model_copy))


def test_an_untied_model_without_its_head_is_refused(untied: Path) -> None:
    assert load_model(str(untied)).model.lm_head.weight.shape == (288, 64)
    with stored_tensors(untied) as tensors:
        del tensors["lm_head.weight"]
    with pytest.raises(ModelError, match=r"1 tensor is missing \(lm_head\.weight\).*tie_word_embeddings to true"):
        load_model(str(untied))
    # What the message says helps.
    edit_config(untied, tie_word_embeddings=True)
    model = load_model(str(untied)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_run_is_not_merged_into_other_weights_than_it_was_trained_on(model_copy: Path, tmp_path: Path) -> None:
    """The file's hash shows every change; one that leaves tensors out is refused before the hash is compared."""
    run = train_run(model_copy, tmp_path)
    with stored_tensors(model_copy) as tensors:
        tensors["model.norm.weight"] += 1
    with pytest.raises(RunError, match="is not the model that was trained: files is"):
        merged_model(run.adapter)
    with stored_tensors(model_copy) as tensors:
        del tensors["model.norm.weight"]
    with pytest.raises(ModelError, match=r"1 tensor is missing \(model\.norm\.weight\)"):
        merged_model(run.adapter)


# --- what is right as it is ----------------------------------------------------------------------------------


def test_a_stored_copy_of_a_tied_table_is_accepted(model_copy: Path) -> None:
    with stored_tensors(model_copy) as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = load_model(str(model_copy)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_buffers_that_the_class_computes_need_not_be_stored(tmp_path: Path) -> None:
    made = GemmaForCausalLM(GemmaConfig(**SHAPE, head_dim=16)).eval()
    model = load_model(str(save(made, tmp_path / "gemma"))).model
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, made(TOKENS).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_rotary_frequencies_are_accepted_if_they_are_those_in_use(model_copy: Path, dtype: torch.dtype) -> None:
    frequencies = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    with stored_tensors(model_copy) as tensors:
        tensors[FREQUENCIES] = frequencies.to(dtype)
    load_model(str(model_copy))
    # Old checkpoints store them without the scaling of the configuration.
    edit_config(model_copy, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    load_model(str(model_copy))


@pytest.mark.parametrize("base", [500000.0, 10500.0])
def test_stored_rotary_frequencies_that_are_not_in_use_are_refused(model_copy: Path, base: float) -> None:
    with stored_tensors(model_copy) as tensors:
        tensors[FREQUENCIES] = base ** -(torch.arange(0, 16, 2) / 16)
    with pytest.raises(ModelError, match=r"the buffer model\.layers\.0\.self_attn\.rotary_emb\.inv_freq differs"):
        load_model(str(model_copy))


# --- encoders ------------------------------------------------------------------------------------------------

BERT: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("task", [SequenceClassifier(("a", "b")), SentenceEncoder()])
def test_an_encoder_may_get_a_new_head_and_nothing_else(tmp_path: Path, task: ModelTask) -> None:
    folder = save(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "bert")
    first, again = (load_model(str(folder), task=task).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)

    with stored_tensors(folder) as tensors:
        stored = dict(tensors)
        del tensors["bert.encoder.layer.1.output.dense.weight"]
    with pytest.raises(ModelError, match=r"1 tensor is missing \(.*encoder\.layer\.1\.output\.dense\.weight\)"):
        load_model(str(folder), task=task)

    with stored_tensors(folder) as tensors:
        tensors.update(stored)
        tensors["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(64, 128)
    with pytest.raises(ModelError, match=r"1 has no place in the model \(bert\.encoder\.layer\.2"):
        load_model(str(folder), task=task)


def test_a_classifier_for_other_labels_gets_a_new_head_and_a_line(tmp_path: Path, messages: list[str]) -> None:
    folder = save(BertForSequenceClassification(BertConfig(**BERT, num_labels=3)), tmp_path / "bert")
    model = load_model(str(folder), task=SequenceClassifier(("yes", "no"))).model
    assert model.classifier.out_features == 2
    assert any("its head is for other labels (classifier." in line for line in messages)


# --- files ---------------------------------------------------------------------------------------------------


def shard(folder: Path) -> tuple[Path, Path]:
    """Store the model in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    paths = folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"
    parts = names[: len(names) // 2], names[len(names) // 2 :]
    for path, part in zip(paths, parts, strict=True):
        save_file({name: tensors[name] for name in part}, path, {"format": "pt"})
    index = {name: path.name for path, part in zip(paths, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def test_a_model_in_several_files_is_read_whole(model_copy: Path) -> None:
    before = load_model(str(model_copy)).model.state_dict()
    shard(model_copy)
    after = load_model(str(model_copy)).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_file_of_the_index_is_named(model_copy: Path) -> None:
    shard(model_copy)[1].unlink()
    with pytest.raises(ModelError, match=r"1 of the 2 files .* are missing \(model-00002-of-00002\.safetensors\)"):
        load_model(str(model_copy))


def test_a_file_that_the_index_does_not_name_is_refused(model_copy: Path) -> None:
    first, _ = shard(model_copy)
    shutil.copy(first, model_copy / "model-00003-of-00003.safetensors")
    with pytest.raises(ModelError, match=r"does not name model-00003-of-00003\.safetensors"):
        load_model(str(model_copy))


def test_two_sets_of_weights_are_refused(model_copy: Path) -> None:
    whole = (model_copy / "model.safetensors").read_bytes()
    shard(model_copy)
    (model_copy / "model.safetensors").write_bytes(whole)
    with pytest.raises(
        ModelError, match=r"two sets of weights: model\.safetensors and model\.safetensors\.index\.json"
    ):
        load_model(str(model_copy))


def test_a_tensor_in_two_files_is_refused(model_copy: Path) -> None:
    first, second = shard(model_copy)
    tensors = load_file(second) | {"model.embed_tokens.weight": load_file(first)["model.embed_tokens.weight"] * 2}
    save_file(tensors, second, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensor is in more than one file \(model\.embed_tokens\.weight\)"):
        load_model(str(model_copy))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin"])
def test_an_index_names_files_of_its_folder_only(model_copy: Path, name: str) -> None:
    shard(model_copy)
    path = model_copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no \.safetensors file of this folder"):
        load_model(str(model_copy))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_refused(model_copy: Path, text: str) -> None:
    shard(model_copy)
    (model_copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_model(str(model_copy))


def test_weights_under_another_name_are_refused_and_named(model_copy: Path) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "weights.safetensors")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor .*found: weights\.safetensors"):
        load_model(str(model_copy))


def test_other_safetensors_in_the_folder_are_named(model_copy: Path, messages: list[str]) -> None:
    save_file({"a": torch.zeros(1)}, model_copy / "optimizer.safetensors")
    load_model(str(model_copy))
    assert any("not read: optimizer.safetensors" in line for line in messages)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_with_an_adapter_is_refused(model_copy: Path, name: str) -> None:
    """transformers would load the adapter on top, or another base model, or leave it out."""
    (model_copy / name).write_text("{}")
    with pytest.raises(ModelError, match=rf"holds an adapter \({name.replace('.', chr(92) + '.')}\).*Merge it first"):
        load_model(str(model_copy))


def test_an_adapter_in_place_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"holds an adapter \(adapter_config\.json, adapter_model\.safetensors\)"):
        load_model(str(tmp_path))


# --- values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(model_copy: Path, value: float) -> None:
    with stored_tensors(model_copy) as tensors:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5:8] = value
    with pytest.raises(ModelError, match=r"1 tensor holds values .* \(model\.layers\.1\.mlp\.up_proj\.weight: 3\)"):
        load_model(str(model_copy))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(model_copy: Path, name: str) -> None:
    (model_copy / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    with pytest.raises(ModelError, match=rf"{name}: a Git LFS pointer, not the file itself\. Run `git lfs pull`"):
        load_model(str(model_copy))


def test_codes_in_place_of_weights_are_refused(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = torch.ones(tensors[name].shape, dtype=torch.int8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 weight is stored as integers \({name}\)"):
        load_model(str(model_copy))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e8m0fnu, "F8_E8M0"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
    ],
)
@pytest.mark.parametrize("scales", [False, True])
def test_weights_that_are_no_floats_of_16_bits_are_refused(
    model_copy: Path, dtype: torch.dtype, name: str, scales: bool
) -> None:
    with stored_tensors(model_copy) as tensors:
        key = "model.layers.1.mlp.up_proj.weight"
        tensors[key] = torch.zeros(tensors[key].shape, dtype=torch.float32).to(dtype)
        if scales:
            tensors[f"{key}_scale_inv"] = torch.ones(1)
    with pytest.raises(ModelError, match=rf"1 weight is of a type .* \({key}: {name}\): codes that need scales"):
        load_model(str(model_copy))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_are_read(model_copy: Path, dtype: torch.dtype) -> None:
    with stored_tensors(model_copy) as tensors:
        for key, tensor in tensors.items():
            tensors[key] = tensor.to(dtype)
    assert load_model(str(model_copy)).model.dtype == torch.float32


def test_another_file_of_weights_in_the_configuration_is_refused(model_copy: Path) -> None:
    shutil.copy(model_copy / "model.safetensors", model_copy / "other.safetensors")
    edit_config(model_copy, transformers_weights="other.safetensors")
    with pytest.raises(ModelError, match=r"transformers_weights names 'other\.safetensors'"):
        load_model(str(model_copy))


def test_large_weights_are_finite() -> None:
    """Their sum overflows; they do not."""
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.fill_(3e38)
    weights_check.check_finite(layer, "here")


# --- vocabulary ----------------------------------------------------------------------------------------------


def test_tokens_beyond_the_embedding_are_refused_by_name(model_copy: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<tool_{i}>" for i in range(30)])
    tokenizer.save_pretrained(model_copy)
    beyond = len(tokenizer) - 288
    with pytest.raises(ModelError, match=rf"{beyond} tokens beyond the 288 rows .*'<tool_\d+>' = 288, .*resize_token"):
        load_model(str(model_copy))

    # What the message says helps.
    model = make_model(make_tokenizer())
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(model_copy)
    assert load_model(str(model_copy)).model.config.vocab_size == len(tokenizer)


def test_a_placeholder_of_an_image_may_lie_outside_and_is_named(model_copy: Path, messages: list[str]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<unused_{i}>" for i in range(288 - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(model_copy)
    path = model_copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "image_token": "<image_soft_token>"}))
    load_model(str(model_copy))
    assert any("no text may contain <image_soft_token>" in line for line in messages)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_special_ids_outside_of_the_table_are_refused(model_copy: Path, file: str, name: str) -> None:
    path = model_copy / file
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 300}))
    with pytest.raises(ModelError, match=rf"{name} = 300.*has 288 rows"):
        load_model(str(model_copy))
