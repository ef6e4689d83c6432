"""GGUF: codes and scales bit for bit, llama.cpp's order of rows, what is refused, and faults that are found."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import CONTEXT, SIZES, disturb_rotation, freeze, llama
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from conftest import CHAT_TEMPLATE, edit_config, make_model, make_tokenizer, stored_tensors
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.models.load import load_model
from qat_edge.quant import frozen
from qat_edge.verbs.verify import Verified, verify_folder
from qat_edge_exporters.gguf import gguf_blocks, gguf_file, gguf_rope
from qat_edge_exporters.gguf.gguf_blocks import Q4_0, Q8_0
from qat_edge_exporters.gguf.gguf_file import MODEL_FILE
from qat_edge_exporters.targets import DEFAULT_FORMATS, FORMATS, target_named

TARGET = target_named("gguf")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
    "partial_rotary_factor": 0.5, "short_factor": [1 + i / 10 for i in range(8)], "long_factor": [2.0] * 8,
}  # fmt: skip
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": llama,
    "llama3": lambda: llama(rope_parameters=LLAMA3, head_dim=32, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=64, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "smollm3": lambda: SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, **CAPS),
    "gemma3": lambda: Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6}, head_dim=32, query_pre_attn_scalar=32, sliding_window=8
    ),
    "phi3": lambda: Phi3Config(**SIZES, original_max_position_embeddings=128),
    "phi4": lambda: Phi3Config(
        **{**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256},
        original_max_position_embeddings=256, rope_parameters=LONGROPE,
    ),
}  # fmt: skip


def export(checkpoint: Path, folder: Path, context_length: int = CONTEXT) -> Path:
    folder.mkdir(parents=True)
    TARGET.export(checkpoint, folder, context_length)
    return folder


def check(folder: Path, checkpoint: Path) -> Verified:
    return verify_folder(folder, "gguf", checkpoint)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A frozen llama and its export."""
    root = tmp_path_factory.mktemp("gguf")
    freeze(llama(), 32, root / "frozen")
    return root / "frozen", export(root / "frozen", root / "export")


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same to be changed."""
    return made[0], Path(shutil.copytree(made[1], tmp_path / "export"))


# --- blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [Q4_0, Q8_0], ids=lambda block: block.name)
def test_blocks_are_those_of_ggml(block: gguf_blocks.BlockType) -> None:
    """Against the `gguf` package, which dequantizes blocks with its own code."""
    rng = np.random.default_rng(0)
    half = 2 ** (block.bits - 1)
    codes = rng.integers(-half, half, (6, 128)).astype(np.int8)
    scales = (rng.random((6, 4)) + 0.1).astype(np.float16).astype(np.float32)
    packed = gguf_blocks.pack(codes, scales, block)
    values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType(block.number))
    np.testing.assert_array_equal(values, codes * np.repeat(scales, 32, axis=1))
    for found, expected in zip(gguf_blocks.unpack(packed, block), (codes, scales), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("scale", "is_exact"),
    [
        (1.0, True), (2.0**-24, True), (1.5 * 2.0**-23, True), (65504.0, True),
        (2.0**-25, False), (1.0078125 * 2.0**-18, False), (65536.0, False), (1.0001, False),
    ],
)  # fmt: skip
def test_scales_that_float16_does_not_hold_are_refused_by_name(scale: float, is_exact: bool) -> None:
    scales = np.ones((2, 3), np.float32)
    scales[1, 2] = scale
    if is_exact:
        gguf_blocks.require_float16("layer", scales)
        return
    with pytest.raises(ExportError, match=rf"layer has 1 scale .* row 1, group 2: {scale:g}.*--target"):
        gguf_blocks.require_float16("layer", scales)


# --- families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_and_read_bit_for_bit(name: str, tmp_path: Path) -> None:
    assert TARGET.missing_for(FAMILIES[name]()) == ""
    freeze(FAMILIES[name](), 32, tmp_path / "frozen", table_bits=(8, 8))
    folder = export(tmp_path / "frozen", tmp_path / "export")
    result = check(folder, tmp_path / "frozen")
    assert result.faults == []
    assert result.linears_equal == result.linears > 0 and result.embedding_equal and result.head_equal
    assert result.floats_equal == result.floats
    sizes = TARGET.read(folder).size_bytes
    assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert [option.value for option in TARGET.held_options(folder)] == [CONTEXT]


@pytest.mark.parametrize(
    ("group_size", "table_bits", "rotated"), [(64, (8, 8), False), (32, (4, 4), False), (32, (8, 4), True)]
)
def test_larger_groups_int4_tables_and_untied_rotated_tables_are_exact(
    group_size: int, table_bits: tuple[int, int], rotated: bool, tmp_path: Path
) -> None:
    freeze(llama(), group_size, tmp_path / "frozen", table_bits=table_bits, rotated=rotated)
    result = check(export(tmp_path / "frozen", tmp_path / "export"), tmp_path / "frozen")
    assert result.faults == [] and result.linears_equal == result.linears and result.floats_equal == result.floats


def alone(folder: Path, tmp_path: Path) -> str:
    """Return a copy of the file without the tokenizer's files, which transformers would read as well."""
    return str(shutil.copy(folder / MODEL_FILE, tmp_path / "alone.gguf"))


def test_rows_of_queries_and_keys_are_in_the_order_of_llama_cpp(made: tuple[Path, Path], tmp_path: Path) -> None:
    """transformers, which reads GGUF files with code of its own, undoes the order and gets the frozen weights."""
    loaded = load_model(alone(made[1], tmp_path))
    expected, weights = frozen.read_weights(made[0]), dict(loaded.model.named_modules())
    for name, weight in expected.items():
        values = weight.codes.float() * weight.scales.float().repeat_interleave(
            weight.codes.shape[1] // weight.scales.shape[1], dim=1
        )
        torch.testing.assert_close(weights[name].weight, values, rtol=0, atol=0)
    for name, tensor in frozen.read_floats(made[0]).items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert (
        loaded.tokenizer("the other one <|im_end|>").input_ids == make_tokenizer()("the other one <|im_end|>").input_ids
    )


def test_a_float_checkpoint_stays_in_float32(tmp_path: Path) -> None:
    model = make_model(make_tokenizer())
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "export")
    loaded = load_model(alone(folder, tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_scaled_frequencies_have_factors_that_transformers_reads_as_the_same_scaling() -> None:
    config = llama(rope_parameters=LLAMA3)
    factors = gguf_rope.rotary_settings(config, "llama").factors["rope_freqs.weight"]
    assert factors.min() == 1 and factors.max() == 8 and len(factors) == 8


def test_the_formats_of_a_plain_export_are_as_before() -> None:
    assert DEFAULT_FORMATS == ("executorch", "onnx") and {*FORMATS} == {*DEFAULT_FORMATS, "gguf", "hf"}


# --- what is refused ----------------------------------------------------------------------------------------

GAPS: dict[str, tuple[Callable[[], PretrainedConfig], str]] = {
    "family": (lambda: GraniteConfig(**SIZES), "granite is not known"),
    "class": (lambda: LlamaConfig(**SIZES, architectures=["StarlingForCausalLM"]), "StarlingForCausalLM is not"),
    "biases": (lambda: llama(attention_bias=True), "attention_bias"),
    "activation": (lambda: llama(hidden_act="gelu"), "gelu, and llama.cpp's graph has silu"),
    "dynamic": (lambda: llama(rope_parameters={**YARN, "rope_type": "dynamic"}), "type dynamic"),
    "unrotated": (lambda: SmolLM3Config(**SIZES, no_rope_layers=[1, 0]), "each 4th layer is not rotated"),
    "windows": (
        lambda: Gemma3TextConfig(**SIZES, head_dim=32, layer_types=["sliding_attention", "full_attention"]),
        "each 6th layer sees everything",
    ),
    "scale": (lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=24, **CAPS), "root of 24"),
    "cap": (
        lambda: Gemma2Config(**SIZES, head_dim=16, query_pre_attn_scalar=16, final_logit_softcapping=None),
        "soft caps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GAPS)
def test_a_configuration_tells_what_llama_cpp_lacks(name: str) -> None:
    config, words = GAPS[name]
    assert words in TARGET.missing_for(config())


def test_a_rotated_shared_table_is_refused_with_what_to_do(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen", rotated=True)
    disturb_rotation(tmp_path / "frozen")
    with pytest.raises(ExportError, match=r"finetune --rotate off.*--embedding-bits 8 --head-bits 4"):
        export(tmp_path / "frozen", tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def test_scales_and_bits_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen")
    with stored_tensors(tmp_path / "frozen") as tensors:
        name = next(key for key in tensors if "layers.1.mlp.up_proj" in key and key.endswith("scale"))
        tensors[name][3, 1] = 2.0**-40
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.up_proj has 1 scale .* row 3, group 1"):
        export(tmp_path / "frozen", tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []
    assert "2-bit" in TARGET.missing_widths([2, 4]) and TARGET.missing_widths([4, 8]) == ""


def test_a_context_longer_than_a_window_is_refused(tmp_path: Path) -> None:
    freeze(MistralConfig(**SIZES, sliding_window=16), 32, tmp_path / "frozen")
    with pytest.raises(ExportError, match=r"--context-length 17: .* last 16 tokens.* Give 16 or less"):
        export(tmp_path / "frozen", tmp_path / "export", 17)
    export(tmp_path / "frozen", tmp_path / "short", 16)


def test_tables_of_their_own_are_refused_for_a_graph_with_one(tmp_path: Path) -> None:
    freeze(FAMILIES["gemma2"](), 32, tmp_path / "frozen", table_bits=(8, 4))
    with pytest.raises(ExportError, match=r"gemma2 has one table"):
        export(tmp_path / "frozen", tmp_path / "export")


def test_adapters_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(made[0], tmp_path / "frozen"))
    (checkpoint / "adapter").mkdir()
    (checkpoint / "adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    from safetensors.torch import save_file

    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{stem}A.weight": torch.ones(1, 64), f"{stem}B.weight": torch.ones(64, 1)},
        checkpoint / "adapter/adapter_model.safetensors",
    )
    with pytest.raises(ExportError, match=r"unmerged adapters"):
        export(checkpoint, tmp_path / "export")


# --- tokenizer ----------------------------------------------------------------------------------------------


def test_end_tokens_template_and_types_of_tokens_are_stored(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(made[0], tmp_path / "frozen"))
    edit_generation(checkpoint, [2, 0])
    metadata = gguf_file.read(export(checkpoint, tmp_path / "export") / MODEL_FILE).metadata
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert [metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot")] == [1, 2, 0]
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1] and metadata["tokenizer.ggml.token_type"][-1] == 5
    assert len(metadata["tokenizer.ggml.tokens"]) == 288 and len(metadata["tokenizer.ggml.merges"]) == 8


def edit_generation(checkpoint: Path, ends: list[int]) -> None:
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))


def test_more_end_tokens_than_the_file_can_name_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(made[0], tmp_path / "frozen"))
    edit_generation(checkpoint, [2, 0, 5, 6])
    with pytest.raises(ExportError, match=r"4 end tokens .* names 3"):
        export(checkpoint, tmp_path / "export")


OTHER_TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "split": (
        {"pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}},
        r"splits texts is not known",
    ),
    "capitals": ({"normalizer": {"type": "Lowercase"}}, r"changes texts before it splits them"),
    "parts around a text": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }
        },
        r"puts other tokens around a text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    name: str, made: tuple[Path, Path], tmp_path: Path
) -> None:
    changes, words = OTHER_TOKENIZERS[name]
    checkpoint = Path(shutil.copytree(made[0], tmp_path / "frozen"))
    path = checkpoint / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ExportError, match=words):
        export(checkpoint, tmp_path / "export")


def test_a_normalization_that_llama_cpp_leaves_out_is_named(made: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(made[0], tmp_path / "frozen"))
    path = checkpoint / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    assert "NFC" in TARGET.tokenizer_faults(export(checkpoint, tmp_path / "export"))[0]
    assert TARGET.tokenizer_faults(made[1]) == []


# --- planted faults -----------------------------------------------------------------------------------------


def change_bytes(folder: Path, tensor: str, position: int, byte: int) -> None:
    """Flip bits of one byte of a tensor."""
    path = folder / MODEL_FILE
    data = bytearray(path.read_bytes())
    begin = np.asarray(gguf_file.read(path).tensors[tensor].data).ravel().view(np.uint8)
    offset = data.index(begin[:64].tobytes())
    data[offset + position] ^= byte
    path.write_bytes(bytes(data))


def replace_bytes(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / MODEL_FILE
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def entry(key: str, value: int) -> bytes:
    """Return the bytes of an entry of metadata."""
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<II", 4, value)


@pytest.mark.parametrize(
    ("tensor", "position", "words"),
    [
        ("blk.1.attn_q.weight", 5, "model.layers.1.self_attn.q_proj: 1 of 4096 codes differ"),
        ("blk.0.ffn_down.weight", 1, "model.layers.0.mlp.down_proj: 1 scale differs"),
        ("token_embd.weight", 7, "model.embed_tokens: 1 of 18432 codes differ"),
        ("blk.1.ffn_norm.weight", 8, "model.layers.1.post_attention_layernorm.weight: not in the artifact"),
    ],
)
def test_a_changed_tensor_is_found(tensor: str, position: int, words: str, copied: tuple[Path, Path]) -> None:
    change_bytes(copied[1], tensor, position, 1)
    faults = check(copied[1], copied[0]).faults
    assert any(words in fault for fault in faults), faults


def test_a_changed_end_token_and_template_are_found(copied: tuple[Path, Path]) -> None:
    key = "tokenizer.ggml.eos_token_id"
    replace_bytes(copied[1], entry(key, 2), entry(key, 7))
    replace_bytes(copied[1], b"'<|im_start|>assistant", b"'<|im_start|>Assistant")
    faults = check(copied[1], copied[0]).faults
    assert any(f"{key} is 7, the export writes 2" in fault for fault in faults), faults
    assert any("tokenizer.chat_template is" in fault for fault in faults), faults


def test_a_changed_number_of_the_architecture_is_found(copied: tuple[Path, Path]) -> None:
    key = "llama.rope.dimension_count"
    replace_bytes(copied[1], entry(key, 16), entry(key, 8))
    assert any(f"{key} is 8, the export writes 16" in fault for fault in check(copied[1], copied[0]).faults)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_file_is_an_error_by_name(part: float, copied: tuple[Path, Path]) -> None:
    path = copied[1] / MODEL_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ArtifactError, match=r"model.gguf"):
        TARGET.read(copied[1])


def test_a_count_beyond_the_file_is_an_error_and_takes_no_time(copied: tuple[Path, Path]) -> None:
    path = copied[1] / MODEL_FILE
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack("<Q", 2**60)
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"ends at byte"):
        TARGET.read(copied[1])


def test_a_file_that_names_further_files_reaches_no_runtime(copied: tuple[Path, Path]) -> None:
    contents = gguf_file.read(copied[1] / MODEL_FILE)
    tensors: dict[str, Any] = {name: (stored.data.copy(), stored.block) for name, stored in contents.tensors.items()}
    architecture = contents.metadata.pop("general.architecture")
    gguf_file.write(copied[1] / MODEL_FILE, architecture, {**contents.metadata, "split.count": 2}, tensors)
    with pytest.raises(ArtifactError, match=r"split.count says that there are further files"):
        TARGET.check(copied[1])


def test_a_model_that_its_files_describe_otherwise_is_found(copied: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(copied[0], tmp_path / "frozen"))
    edit_config(checkpoint, rms_norm_eps=1e-3)
    faults = check(copied[1], checkpoint).faults
    assert any("layer_norm_rms_epsilon" in fault for fault in faults), faults
