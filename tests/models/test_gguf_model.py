"""Every setting in a GGUF file is used, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_gguf import write_gguf
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from conftest import make_model, make_tokenizer
from qat_edge.errors import ModelError
from qat_edge.models import gguf_keys, gguf_metadata, gguf_model, gguf_rotary, gguf_tokenizer
from qat_edge.models.load import load_model
from qat_edge.models.tokenizer import model_end_tokens

Add = Callable[[gguf.GGUFWriter], None]
TOKENS = torch.randint(3, 250, (1, 48), generator=torch.Generator().manual_seed(0))
THETA = 10000.0


def make(tmp_path: Path, add: Add | None = None, **changes: Any) -> tuple[Path, LlamaForCausalLM]:
    """Return a GGUF file, and the model it was made from with `changes` of the configuration.

    The file has the metadata of a model without the changes, and what `add` adds.
    """
    tokenizer = make_tokenizer()
    plain = make_model(tokenizer)
    plain.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_gguf(tmp_path / "model", tmp_path / "tiny.gguf", add)

    changed = LlamaForCausalLM(LlamaConfig.from_dict({**plain.config.to_dict(), **changes})).eval()
    changed.load_state_dict(plain.state_dict())
    return path, changed


def kl(path: Path, expected: LlamaForCausalLM) -> float:
    """Return the KL divergence of the loaded file's predictions from those of the expected model, nats per token."""
    model = load_model(str(path)).model
    with torch.no_grad():
        wanted, found = expected(TOKENS).logits.log_softmax(-1), model(TOKENS).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def legacy_linear(writer: gguf.GGUFWriter) -> None:
    writer.add_float32("llama.rope.scale_linear", 4.0)


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(8.0)
    writer.add_rope_scaling_orig_ctx_len(64)


def llama3(writer: gguf.GGUFWriter) -> None:
    frequencies = THETA ** -(torch.arange(0, 16, 2) / 16)
    factors = gguf_rotary.llama3_factors(frequencies, 8.0, 64)
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_tensor("rope_freqs.weight", factors.numpy().astype(np.float32))


SHORT, LONG = [1 + i / 8 for i in range(8)], [2 + i / 8 for i in range(8)]


def longrope_factors(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_orig_ctx_len(64)
    writer.add_tensor("rope_factors_short.weight", np.array(SHORT, np.float32))
    writer.add_tensor("rope_factors_long.weight", np.array(LONG, np.float32))


def longrope(writer: gguf.GGUFWriter) -> None:
    longrope_factors(writer)
    writer.add_rope_scaling_attn_factors(1.25)


LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 64,
}  # fmt: skip


def scaled(*others: Add, **keys: Any) -> Add:
    """Return what adds keys of rotary scaling, and what the others add."""

    def add(writer: gguf.GGUFWriter) -> None:
        for other in others:
            other(writer)
        for name, value in keys.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.rope.scaling.{name}", value)

    return add


SCALINGS: dict[str, tuple[Add, dict[str, Any]]] = {
    "longrope": (longrope, {**LONGROPE, "attention_factor": 1.25}),
    "linear": (linear, {"rope_type": "linear", "factor": 4.0}),
    "longrope by name, without a factor of its own": (
        scaled(longrope_factors, type="longrope"),
        {**LONGROPE, "attention_factor": 1.0},
    ),
    "yarn with a ramp": (
        scaled(yarn, yarn_beta_fast=4.0, yarn_beta_slow=2.0, yarn_ext_factor=1.0),
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 2.0,
        },
    ),
    "linear, old key": (legacy_linear, {"rope_type": "linear", "factor": 4.0}),
    "yarn": (yarn, {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}),
    "llama3": (
        llama3,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_of_the_rotary_embedding_is_applied(tmp_path: Path, name: str) -> None:
    add, parameters = SCALINGS[name]
    path, expected = make(tmp_path, add, rope_parameters={"rope_theta": THETA, **parameters})
    # The models differ without the scaling, and agree to float rounding with it.
    with torch.no_grad():
        plain = make_model(make_tokenizer())(TOKENS).logits
        assert (plain - expected(TOKENS).logits).abs().max() > 1e-3
    assert abs(kl(path, expected)) < 1e-9


@pytest.mark.parametrize(
    ("key", "value", "changes"),
    [
        ("llama.rope.freq_base", 500000.0, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("llama.attention.layer_norm_rms_epsilon", 1e-2, {"rms_norm_eps": 1e-2}),
    ],
)
def test_numbers_of_the_file_are_those_of_the_model(
    tmp_path: Path, key: str, value: float, changes: dict[str, Any]
) -> None:
    def replace(writer: gguf.GGUFWriter) -> None:
        del writer.kv_data[0][key]
        writer.add_float32(key, value)

    path, expected = make(tmp_path, replace, **changes)
    assert abs(kl(path, expected)) < 1e-9


ROTARY_REFUSED: dict[str, tuple[Add, str]] = {
    "attention factor alone": (scaled(attn_factor=1.5), r"rope\.scaling\.attn_factor = 1\.5 is not"),
    "negative attention factor": (scaled(attn_factor=-1.0), r"rope\.scaling\.attn_factor = -1\.0 is not"),
    "linear with attention factor": (scaled(linear, attn_factor=1.5), r"rope\.scaling\.attn_factor = 1\.5 is not"),
    "yarn with attention factor": (scaled(yarn, attn_factor=1.5), r"rope\.scaling\.attn_factor = 1\.5 is not"),
    "llama3 with attention factor": (scaled(llama3, attn_factor=1.5), r"rope\.scaling\.attn_factor = 1\.5 is not"),
    "no yarn, its factor": (scaled(yarn_attn_factor=1.5), r"rope\.scaling\.yarn_attn_factor = 1\.5 is not"),
    "no yarn, mixed in": (scaled(linear, yarn_ext_factor=1.0), r"rope\.scaling\.yarn_ext_factor = 1\.0 is not"),
    "no yarn, its ramp": (scaled(linear, yarn_beta_fast=16.0), r"rope\.scaling\.yarn_beta_fast = 16\.0 is not"),
    "yarn in part": (scaled(yarn, yarn_ext_factor=0.5), r"rope\.scaling\.yarn_ext_factor = 0\.5 is not"),
    "factors and linear": (scaled(llama3, type="linear", factor=4.0), r"rope_freqs\.weight and a factor of 4 \(rope"),
    "factors and a factor": (scaled(llama3, factor=4.0), r"rope_freqs\.weight and a factor of 4 \(rope"),
    "factors and yarn": (scaled(llama3, type="yarn"), r"rope_freqs\.weight and rope\.scaling\.type = yarn, and"),
    "factors and other": (scaled(llama3, type="other"), r"rope\.scaling\.type = other is not"),
    "long factors and yarn": (
        scaled(longrope, type="yarn"),
        r"long\.weight, .*short\.weight and rope\.scaling\.type = ",
    ),
    "long factors and a factor": (scaled(longrope, type="longrope", factor=4.0), r"short\.weight and a factor of 4"),
    "long factors and factors": (
        scaled(longrope, lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))),
        r"short\.weight and rope_freqs\.weight, and transformers cannot",
    ),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_a_scaling_that_was_not_applied_is_found(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = make(tmp_path, SCALINGS[name][0])
    monkeypatch.setattr(gguf_rotary, "_apply_scaling", lambda *_: None)
    with pytest.raises(ModelError, match="rotary frequencies are not those of the file"):
        load_model(str(path))


REFUSED: dict[str, tuple[Add, str]] = {
    "unknown key": (lambda w: w.add_float32("llama.new_factor", 2.0), r"llama\.new_factor = 2\.0 is not known"),
    "logit scale": (lambda w: w.add_logit_scale(8.0), r"logit_scale is 8\.0, and LlamaConfig has no such setting"),
    "embedding scale": (lambda w: w.add_embedding_scale(12.0), r"embedding_scale is 12\.0"),
    "residual scale": (lambda w: w.add_residual_scale(0.22), r"residual_scale is 0\.2"),
    "attention scale": (lambda w: w.add_attention_scale(0.01), r"attention\.scale is 0\.0"),
    "score cap": (lambda w: w.add_attn_logit_softcapping(50.0), r"attn_logit_softcapping is 50\.0"),
    "logit cap": (lambda w: w.add_final_logit_softcapping(30.0), r"final_logit_softcapping is 30\.0"),
    "window": (lambda w: w.add_sliding_window(8), r"attention\.sliding_window is 8"),
    "head width": (lambda w: w.add_key_length(32), r"attention\.key_length is 32, but .* 16"),
    "clipping": (lambda w: w.add_clamp_kqv(3.0), r"attention\.clamp_kqv is 3\.0"),
    "experts": (lambda w: w.add_expert_count(8), r"llama\.expert_count = 8 is not known"),
    "bidirectional": (lambda w: w.add_causal_attention(False), r"llama\.attention\.causal = False"),
    "scaling type": (
        lambda w: w.add_string("llama.rope.scaling.type", "other"),
        r"llama\.rope\.scaling\.type = other is not known",
    ),
    "rotary factors": (
        lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 3, 8, dtype=np.float32)),
        r"rope_freqs\.weight scales the rotary frequencies by 1 to 3",
    ),
    "unknown tensor": (
        lambda w: w.add_tensor("blk.0.post_ffw_norm.weight", np.ones(64, np.float32)),
        r"1 has no place in the model \(blk\.0\.post_ffw_norm\.weight\)",
    ),
    "part": (lambda w: w.add_uint16("split.count", 2), r"part 1 of 2 of a model"),
    "adapter": (lambda w: w.add_type("adapter"), r"general\.type is 'adapter'"),
    "adapter by its keys": (lambda w: w.add_string("adapter.type", "lora"), r"adapter\.type = lora is not used by"),
    "images": (lambda w: w.add_bool("clip.has_vision_encoder", True), r"clip\.has_vision_encoder = True is not used"),
    "diffusion": (lambda w: w.add_bool("diffusion.shift_logits", True), r"diffusion\.shift_logits = True is not used"),
    "spaces": (lambda w: w.add_remove_extra_whitespaces(True), r"remove_extra_whitespaces = True is not used"),
    "unknown key of the tokenizer": (
        lambda w: w.add_bool("tokenizer.ggml.lowercase", True),
        r"lowercase = True is not",
    ),
    "end tokens": (
        lambda w: w.add_array("tokenizer.ggml.eog_token_ids", ["a"]),
        r"eog_token_ids is 1, expected ids of",
    ),
    "end token": (
        lambda w: w.add_array("tokenizer.ggml.eog_token_ids", [9999]),
        r"end token 9999 is none of the model's",
    ),
}


@pytest.mark.parametrize(
    ("add", "message"), [*REFUSED.values(), *ROTARY_REFUSED.values()], ids=[*REFUSED, *ROTARY_REFUSED]
)
def test_what_changes_the_function_and_cannot_be_applied_is_refused_by_name(
    tmp_path: Path, add: Add, message: str
) -> None:
    path, _ = make(tmp_path, add)
    with pytest.raises(ModelError, match=message):
        load_model(str(path))


@pytest.mark.parametrize("key", ["context_length", "attention.head_count", "attention.layer_norm_rms_epsilon"])
def test_a_number_that_the_file_lacks_is_not_taken_from_the_class(tmp_path: Path, key: str) -> None:
    path, _ = make(tmp_path, lambda writer: writer.kv_data[0].pop(f"llama.{key}") and None)
    with pytest.raises(ModelError, match=rf"the metadata has no llama\.{re.escape(key)}.*another model's number"):
        load_model(str(path))


def test_values_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_logit_scale(1.0)
        writer.add_attn_logit_softcapping(0.0)
        writer.add_sliding_window(0)
        writer.add_expert_count(0)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_count(16)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_finetuned(True)
        writer.add_string("general.url", "somewhere")
        writer.add_remove_extra_whitespaces(False)
        writer.add_uint32("tokenizer.ggml.fim_pad_token_id", 0)
        writer.add_array("tokenizer.ggml.eog_token_ids", [2])
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))

    path, expected = make(tmp_path, add)
    assert abs(kl(path, expected)) < 1e-9


@pytest.mark.parametrize("given", [True, False])
def test_the_begin_of_a_text_is_what_the_file_says(tmp_path: Path, given: bool) -> None:
    path, _ = make(tmp_path, lambda writer: writer.add_add_bos_token(given))
    tokenizer = load_model(str(path)).tokenizer
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) is given


def test_a_tokenizer_that_differs_from_the_file_is_refused(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    tokenizer, metadata = load_model(str(path)).tokenizer, gguf_metadata.read_metadata(path)
    gguf_tokenizer.check_tokenizer(tokenizer, metadata, path)
    for key, value in {
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.eos_token_id": 7,
        "tokenizer.chat_template": "{{ messages }}",
    }.items():
        other = dataclasses.replace(metadata, values={**metadata.values, key: value})
        with pytest.raises(ModelError, match=key.replace(".", r"\.")):
            gguf_tokenizer.check_tokenizer(tokenizer, other, path)


def test_texts_are_split_as_the_file_says(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    tokenizer, metadata = load_model(str(path)).tokenizer, gguf_metadata.read_metadata(path)

    def split(rule: str) -> list[str]:
        values = {**metadata.values, "tokenizer.ggml.pre": rule}
        gguf_tokenizer.check_tokenizer(tokenizer, dataclasses.replace(metadata, values=values), path)
        return [part for part, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")]

    # Without tokens of several digits, both rules give the same ids, and the tokenizer stays as it is.
    assert split("gpt-2") == split("smollm") == ["a", "Ġ12"]
    # "default" is a rule of llama.cpp with parts of three digits; it has no "gpt2".
    for rule in ("other-bpe", "default", "gpt2"):
        with pytest.raises(ModelError, match=rf"tokenizer\.ggml\.pre is '{rule}', which names no known rule"):
            split(rule)
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.pre is missing: transformers would split"):
        split("")
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"]["vocab"]["12"] = len(tokenizer)
    document["model"]["merges"].append(["1", "2"])
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))
    assert split("smollm") == ["a", "Ġ", "1", "2"]


def test_the_rules_are_those_that_transformers_does_not_know() -> None:
    known = GGUF_PRE_TOKENIZER_SPLITS.keys()
    assert known >= gguf_tokenizer.IGNORE_MERGES, "a rule that is refused needs no flags"
    assert not known & (gguf_tokenizer.SPLIT_LIKE_GPT2 | gguf_tokenizer.SPLIT_AT_DIGITS)
    assert not gguf_tokenizer.SPLIT_LIKE_GPT2 & gguf_tokenizer.SPLIT_AT_DIGITS


@pytest.mark.parametrize(("rule", "begins"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("olmo", False)])
@pytest.mark.parametrize("given", [None, False])
def test_a_rule_decides_on_merges_and_on_the_begin_of_a_text(
    tmp_path: Path, rule: str, begins: bool, given: bool | None
) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop("tokenizer.ggml.pre")
        writer.add_tokenizer_pre(rule)
        if given is not None:
            writer.add_add_bos_token(given)

    path, _ = make(tmp_path, add)
    tokenizer = load_model(str(path)).tokenizer
    assert tokenizer.backend_tokenizer.model.ignore_merges is begins
    assert (tokenizer("a").input_ids[0] == tokenizer.bos_token_id) is (begins and given is None)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a b").input_ids == tokenizer("a b").input_ids


def test_named_chat_templates_are_reported_as_not_used(tmp_path: Path, messages: list[str]) -> None:
    path, _ = make(tmp_path, lambda writer: writer.add_string("tokenizer.chat_template.tool_use", "{{ tools }}"))
    load_model(str(path))
    assert any("tokenizer.chat_template.tool_use" in line for line in messages)


def test_settings_without_a_use_here_are_named_in_one_line(tmp_path: Path, messages: list[str]) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_float32("general.sampling.temp", 0.7)
        writer.add_array("tokenizer.ggml.suppress_tokens", [7])
        writer.add_string("somebody.remark", "x")
        writer.add_string("general.license", "mit")

    path, _ = make(tmp_path, add)
    load_model(str(path))
    assert [line for line in messages if "not used" in line] == [
        f"{path}: not used: general.sampling.temp, somebody.remark, tokenizer.ggml.suppress_tokens"
    ]


def test_every_key_of_the_format_has_a_kind() -> None:
    def keys(owner: type) -> Iterator[str]:
        for value in vars(owner).values():
            if isinstance(value, str) and "." in value and not value.startswith("{arch}"):
                yield re.sub(r"\{\w+\}", "0", value)
            elif isinstance(value, type):
                yield from keys(value)

    found = [key for key in keys(gguf.constants.Keys) if key != gguf.constants.Keys.__module__]
    assert len(found) > 100
    assert [key for key in found if not any(re.fullmatch(pattern, key) for pattern, _ in gguf_keys.KINDS)] == []


@pytest.mark.parametrize("key", ["eog_token_ids", "eos_token_ids"])
def test_all_listed_end_tokens_are_end_tokens(tmp_path: Path, key: str) -> None:
    path, _ = make(tmp_path, lambda writer: writer.add_array(f"tokenizer.ggml.{key}", [2, 5, 0]))
    assert load_model(str(path)).model.generation_config.eos_token_id == [2, 5, 0]


def test_the_space_before_a_text_is_what_the_file_says(tmp_path: Path) -> None:
    path, _ = make(tmp_path)
    tokenizer, metadata = load_model(str(path)).tokenizer, gguf_metadata.read_metadata(path)
    values = {**metadata.values, "tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}
    gguf_tokenizer.check_tokenizer(tokenizer, dataclasses.replace(metadata, values=values), path)
    other = dataclasses.replace(metadata, values={**values, "tokenizer.ggml.add_space_prefix": True})
    with pytest.raises(ModelError, match=r"add_space_prefix is 'True', but the tokenizer made from the file has False"):
        gguf_tokenizer.check_tokenizer(tokenizer, other, path)


def test_tokens_at_which_a_turn_ends_are_end_tokens(tmp_path: Path) -> None:
    path, _ = make(tmp_path, lambda writer: writer.add_eot_token_id(0))
    assert load_model(str(path)).model.generation_config.eos_token_id == [2, 0]


@pytest.mark.parametrize("turn", [None, 0])
def test_a_file_without_an_end_token_gets_none_from_the_class(tmp_path: Path, turn: int | None) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        for name in ("bos", "eos"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id")
        if turn is not None:
            writer.add_eot_token_id(turn)

    path, _ = make(tmp_path, add)
    model, tokenizer, _ = load_model(str(path))
    assert model_end_tokens(model, tokenizer) == ([] if turn is None else [turn])
    assert model.config.bos_token_id is tokenizer.bos_token_id is None


def test_llama3_factors_are_those_of_transformers() -> None:
    parameters = {
        "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, **gguf_rotary.LLAMA3,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    shape = make_model(make_tokenizer()).config.to_dict()
    rotary = LlamaForCausalLM(LlamaConfig.from_dict({**shape, "rope_parameters": parameters})).model.rotary_emb
    frequencies = THETA ** -(torch.arange(0, 16, 2) / 16)
    expected = frequencies / gguf_rotary.llama3_factors(frequencies, 8.0, 64)
    torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-5, atol=0)
    assert expected[0] == frequencies[0] and torch.isclose(expected[-1], frequencies[-1] / 8)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("attention.layer_norm_rms_epsilon", float("nan"), "a number of 0 or more"),
        ("attention.layer_norm_rms_epsilon", -1.0, "a number of 0 or more"),
        ("rope.freq_base", 0.0, "a number above 0"),
        ("rope.scaling.attn_factor", float("inf"), "a finite number"),
        ("context_length", 0, "a whole number of 1 or more"),
    ],
)
def test_numbers_that_no_model_can_have_are_refused_by_name(key: str, value: float, expected: str) -> None:
    metadata = gguf_metadata.GgufMetadata("llama", {f"llama.{key}": value}, frozenset())
    with pytest.raises(ModelError, match=rf"llama\.{re.escape(key)} is .*, expected {expected}"):
        gguf_model.check_ranges(metadata, Path("tiny.gguf"))
