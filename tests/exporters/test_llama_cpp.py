"""GGUF files in llama.cpp itself: logits, tokenizer, generated text. Skipped where its package is not installed."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gguf import FAMILIES, export
from tiny import CONTEXT, freeze, llama
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from conftest import make_tokenizer
from qat_edge.data.conversation import text_prompt
from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError
from qat_edge.options import ExportOptions
from qat_edge.run import Variant
from qat_edge.verbs.export import export_one
from qat_edge_devices.agent import loaded_models
from qat_edge_devices.agent.llama_model import LlamaModel
from qat_edge_exporters import targets
from qat_edge_exporters.gguf.gguf_file import MODEL_FILE
from qat_edge_exporters.targets import target_named

ROOT = Path(__file__).parents[2]
TEXTS = (
    "the other one in an hour", "  two  spaces\n\n\tand a tab\r\n", "It's 12 345,678.90 or 1e-5, isn't it? WE'LL see.",
    "naïve café 日本語 Увидимся 😀", "<|im_start|>user\nhi there<|im_end|>\n", "def f(x): return x**2  # the square",
)  # fmt: skip


def is_installed() -> bool:
    try:
        LlamaModel()
    except ModuleNotFoundError:
        return False
    return True


runs = pytest.mark.skipif(
    not is_installed(), reason=f"{loaded_models.PIP_NAMES['xllamacpp']} is not installed (pip install qat-edge[gguf])"
)


@runs
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_the_frozen_model(name: str, tmp_path: Path) -> None:
    """With inputs rounded per block of 32, as llama.cpp does: measured 45 to 136 dB, -80 dB for a typical token."""
    freeze(FAMILIES[name](), 32, tmp_path / "frozen")
    folder = export(tmp_path / "frozen", tmp_path / "run/exports/gguf")
    found = parity.measure(folder, "gguf", FrozenReference(tmp_path / "frozen"), CONTEXT)
    assert found.fault == "" and found.not_measured == ""
    assert found.error_db is not None and found.error_db < -75
    assert found.sqnr_db is not None and found.sqnr_db > 40


@runs
def test_another_function_is_not_exported(tmp_path: Path) -> None:
    """A file whose rotary base is not that of the checkpoint is refused by the run, and its folder is not written."""
    variant = Variant(tmp_path / "run")
    freeze(llama(rope_theta=10000.0), 32, variant.quantized)
    target = target_named("gguf")
    written = export_one(variant, target, ExportOptions(target=("gguf",), context_length=CONTEXT))
    assert written.parity.fault == "" and written.parity.tokens > 0

    path = variant.exports / "gguf" / MODEL_FILE
    key = b"llama.rope.freq_base"
    data = bytearray(path.read_bytes())
    begin = data.index(key) + len(key) + 4
    data[begin : begin + 4] = bytes.fromhex("00007a44")  # 1000
    path.write_bytes(bytes(data))
    found = parity.measure(variant.exports / "gguf", "gguf", FrozenReference(variant.quantized), CONTEXT)
    assert "differ from the frozen checkpoint's by more than rounding" in found.fault


@runs
def test_text_is_generated_and_ends_at_every_end_token(tmp_path: Path) -> None:
    model = freeze(llama(), 32, tmp_path / "frozen")
    tokenizer, prompt = make_tokenizer(), text_prompt("the other", make_tokenizer())
    folder = export(tmp_path / "frozen", tmp_path / "export")
    expected = continued(model, prompt.ids, 6)
    pieces: list[str] = []
    with target_named("gguf").open_generator(folder, tokenizer) as generator:
        assert not generator.generate(prompt, pieces.append, 6)
    # Inputs are rounded otherwise than in torch, so a close second may win later on.
    text = "".join(pieces)
    assert tokenizer.decode(expected[:1]) and text.startswith(tokenizer.decode(expected[:1]))

    # Its first token ends a text from now on.
    path = tmp_path / "frozen/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, expected[0]]}))
    ended: list[str] = []
    again = export(tmp_path / "frozen", tmp_path / "again")
    with target_named("gguf").open_generator(again, tokenizer) as generator:
        assert generator.generate(prompt, ended.append, 6)
    assert "".join(ended) == ""


@runs
def test_a_prompt_continues_what_the_cache_holds(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen")
    path = export(tmp_path / "frozen", tmp_path / "export") / MODEL_FILE
    kept, fresh = LlamaModel(), LlamaModel()
    for model in (kept, fresh):
        model.load(path, {}, 1)
    first = list(range(10, 40))
    kept.start(first, CONTEXT)
    # All of it, a part, and the same prompt again.
    for prompt, length in (([*first, 50, 51], 30), ([*first[:12], 60], 12), ([*first[:12], 60], 12)):
        token, expected = kept.resume(prompt, length), fresh.start(prompt, CONTEXT)
        assert (token, kept.position) == (expected, len(prompt))
        assert kept.next(token) == fresh.next(expected)


def continued(model: Any, ids: list[int], count: int) -> list[int]:
    """Return the greedy continuation in torch."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


def byte_level(rule: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with merges of letters, digits and spaces, whose texts are split by a rule."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    document = json.loads(backend.to_str())
    pairs = [("Ġ", "Ġ"), ("1", "2"), ("3", "4"), ("'", "s"), ("Ċ", "Ċ"), ("Ġ", "t"), ("n", "'")]
    for left, right in pairs:
        document["model"]["vocab"].setdefault(left + right, len(document["model"]["vocab"]))
    document["model"]["merges"] += [list(pair) for pair in pairs]
    document["model"]["ignore_merges"] = rule in ("llama-bpe", "tekken")
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(document))
    steps: list[Any] = []
    if rule in GGUF_PRE_TOKENIZER_SPLITS:
        from tokenizers import Regex

        steps = [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[rule]), behavior="isolated")]
    elif rule == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in GGUF_PRE_TOKENIZER_SPLITS)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer as transformers converts those of SentencePiece: BPE with bytes for what it does not know."""
    words = ["<unk>", "<|im_start|>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [*"▁abcdefghijklmnopqrstuvwxyz0123456789.,?"]
    merges = [("t", "h"), ("▁", "th"), ("h", "e"), ("▁th", "e"), ("▁", "o"), ("i", "n"), ("▁", "▁"), ("o", "u")]
    tokens = [*words, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<unk>"
    )


RULES = ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "gpt-4o")


@runs
@pytest.mark.parametrize("rule", [*RULES, "sentencepiece"])
def test_llama_cpp_gives_texts_the_ids_of_training(rule: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece() if rule == "sentencepiece" else byte_level(rule)
    freeze(llama(vocab_size=320), 32, tmp_path / "frozen")
    tokenizer.save_pretrained(tmp_path / "frozen")
    folder = export(tmp_path / "frozen", tmp_path / "export")
    model = LlamaModel()
    model.load(folder / MODEL_FILE, {}, 1)
    assert [model.tokenize(text) for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


@runs
def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen")
    folder = export(tmp_path / "frozen", tmp_path / "export")
    (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes()[:-64])
    with pytest.raises(ArtifactError, match=r"model\.gguf: cannot be read"):
        target_named("gguf").open_generator(folder, make_tokenizer()).__enter__()


def test_without_the_package_it_is_named_and_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    freeze(llama(), 32, tmp_path / "frozen")
    folder = export(tmp_path / "frozen", tmp_path / "run/exports/gguf")
    # The agent runs in another process, from whose path the package is taken.
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "xllamacpp.py").write_text("raise ModuleNotFoundError('gone', name='xllamacpp')")
    monkeypatch.setenv("PYTHONPATH", f"{shadow}:{':'.join(sys.path)}")
    monkeypatch.setattr(targets, "find_spec", lambda name: name)
    found = parity.measure(folder, "gguf", FrozenReference(tmp_path / "frozen"), CONTEXT)
    assert "xllamacpp==" in found.not_measured and found.fault == ""

    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    assert re.search(r"xllamacpp is not installed.*'qat-edge\[gguf\]'", target_named("gguf").runs_elsewhere)
    found = parity.measure(folder, "gguf", FrozenReference(tmp_path / "frozen"), CONTEXT)
    assert found.not_measured == target_named("gguf").runs_elsewhere


def test_the_extra_installs_the_version_whose_interface_is_known() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    target = target_named("gguf")
    assert project["optional-dependencies"][target.extra] == [loaded_models.PIP_NAMES[target.packages[0]]]
