"""Loading a source gives model, tokenizer and identity, or an error that says what was found and what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from tiny_gguf import write_gguf
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from conftest import edit_config, in_hub_cache, make_tokenizer, stored_tensors
from qat_edge.errors import ModelError
from qat_edge.manifest import sha256
from qat_edge.models import hub, load
from qat_edge.models.load import load_model
from qat_edge.models.tokenizer import end_tokens, model_end_tokens

TOKENS = torch.tensor([[1, 40, 50, 60, 2]])


@pytest.fixture(scope="session")
def gguf_file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an unquantized GGUF file."""
    return write_gguf(tiny_model_folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


# --- sources that load -------------------------------------------------------------------------------------


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
    expected, original, _ = load_model(str(tiny_model_folder))
    assert identity == load.ModelIdentity("gguf", "tiny.gguf", files={"tiny.gguf": sha256(gguf_file)})
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=1e-5, atol=1e-5)
    text = "the other<|im_end|>\n"
    assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
    assert tokenizer.chat_template == original.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _, _ = load_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_only_ids_that_a_file_states_are_begin_and_end_tokens(model_copy: Path, tmp_path: Path) -> None:
    # The class has 1 and 2 by default, which may be any tokens here.
    (model_copy / "generation_config.json").unlink()
    path = model_copy / "config.json"
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in ids}))
    path = model_copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": "<|endoftext|>"}))
    model, tokenizer, _ = load_model(str(model_copy))
    assert model.config.bos_token_id is model.config.eos_token_id is model.generation_config.eos_token_id is None
    assert model_end_tokens(model, tokenizer) == [0]
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert end_tokens(tmp_path / "saved") == [0]
    edit_config(model_copy, eos_token_id=7)
    assert model_end_tokens(*load_model(str(model_copy))[:2]) == [7, 0]


# --- sources that are refused ------------------------------------------------------------------------------


def test_a_truncated_gguf_is_refused_as_damaged(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    for size in (10, 200, 2000, len(whole) // 2, len(whole) - 1000):
        path = tmp_path / "cut.gguf"
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"cut\.gguf: cannot be loaded: damaged.*Download it again"):
            load_model(str(path))


def test_a_file_in_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(ModelError, match="not a GGUF file"):
        load_model(str(path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "nowhere.gguf"])
def test_a_missing_path_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=r"no such file or folder\. Give a Hub id"):
        load_model(source)


def test_a_name_unknown_to_disk_and_hub_is_refused() -> None:
    with pytest.raises(ModelError, match=r"someone/no-such-model: no such local folder, and the Hub cannot be reached"):
        load_model("someone/no-such-model")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").touch()
    with pytest.raises(ModelError, match=r"not a model folder, it has no config\.json.*found: readme\.txt"):
        load_model(str(tmp_path))


def test_pickled_weights_are_not_read(model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"no \*\.safetensors here \(found: pytorch_model\.bin\)"):
        load_model(str(model_copy))


def test_damaged_safetensors_are_refused(model_copy: Path) -> None:
    path = model_copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        load_model(str(model_copy))


def test_a_damaged_config_is_refused(model_copy: Path) -> None:
    (model_copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: not JSON"):
        load_model(str(model_copy))


@pytest.mark.parametrize("model_type", ["bert", "t5"])
def test_other_models_than_causal_language_models_are_refused(tmp_path: Path, model_type: str) -> None:
    small = {"vocab_size": 32, "num_hidden_layers": 1}
    model: Any = (
        BertForMaskedLM(BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=16, **small))
        if model_type == "bert"
        else T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32))
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"not a causal language model \\(model type {model_type}, architecture"):
        load_model(str(tmp_path))


def test_a_quantized_model_is_refused(model_copy: Path) -> None:
    edit_config(model_copy, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"is quantized already \(gptq\)"):
        load_model(str(model_copy))


def test_a_model_without_its_tokenizer_is_refused(model_copy: Path) -> None:
    for path in model_copy.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no usable tokenizer.*tokenizer\.json"):
        load_model(str(model_copy))


def test_remote_code_is_not_run_without_permission(model_copy: Path) -> None:
    marker = model_copy / "ran"
    (model_copy / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise ValueError('own code ran')\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_config(model_copy, model_type="own-model", architectures=["Model"], auto_map=auto_map)
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(str(model_copy))
    assert not marker.exists()


# --- the Hub -----------------------------------------------------------------------------------------------


LOAD = "from qat_edge.models.load import load_model; print(load_model('someone/tiny').identity)"


class RefusingHub(BaseHTTPRequestHandler):
    """A Hub that has a gated model, and no other."""

    def do_HEAD(self) -> None:
        gated = "/someone/gated/" in self.path
        self.send_response(200 if self.path == "/" else 403 if gated else 401)
        if self.path != "/":
            self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *given: object) -> None:
        pass


@pytest.mark.parametrize(
    ("name", "token", "wanted"),
    [
        (
            "someone/gated",
            "",
            "the model is gated, and no token is set. Accept its terms at URL/someone/gated, then",
        ),
        ("someone/gated", "hf_x", "the model is gated, and the token in use has no access. Accept its terms"),
        (
            "someone/none",
            "",
            "there is no such model, or it is private, and no token is set. Check the name, or run",
        ),
    ],
)
def test_a_refusal_of_the_hub_names_the_token(name: str, token: str, wanted: str, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), RefusingHub)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path)} | ({"HF_TOKEN": token} if token else {})
    code = LOAD.replace("someone/tiny", name)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    thread.join()
    assert wanted.replace("URL", url) in done.stderr, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        ("", f"ModelIdentity(kind='hub', name='someone/tiny', revision='{'0' * 40}', files={{}}, settings={{}})"),
        ("adapter", "someone/tiny: holds an adapter (adapter_config.json)"),
        ("tensor", "someone/tiny: the weights are not those of a LlamaForCausalLM: 1 tensor is missing"),
        ("token", "someone/tiny: the tokenizer has"),
    ],
)
def test_a_model_of_the_hub_is_checked_like_a_folder(
    model_copy: Path, tmp_path: Path, damage: str, wanted: str
) -> None:
    if damage == "adapter":
        (model_copy / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/other"}')
    elif damage == "tensor":
        with stored_tensors(model_copy) as tensors:
            del tensors["model.norm.weight"]
    elif damage == "token":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<more_{i}>" for i in range(40)])
        tokenizer.save_pretrained(model_copy)
    in_hub_cache(model_copy, tmp_path)
    # The cache's place is read when the libraries are imported.
    done = subprocess.run(
        [sys.executable, "-c", LOAD],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert wanted in done.stdout + done.stderr


def test_a_model_of_the_hub_is_read_at_the_commit_of_the_training(model_copy: Path, tmp_path: Path) -> None:
    """Code and weights of a newer commit are not touched."""
    in_hub_cache(model_copy, tmp_path)
    newer = tmp_path / "hub/models--someone--tiny/snapshots" / ("1" * 40)
    shutil.copytree(model_copy, newer)
    (newer / "config.json").write_text("{}")
    (tmp_path / "hub/models--someone--tiny/refs/main").write_text("1" * 40)

    code = LOAD.replace("'someone/tiny')", f"'someone/tiny', revision='{'0' * 40}')")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"revision='{'0' * 40}'" in done.stdout, done.stderr


def test_an_unreachable_hub_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        timeouts.append(timeout)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert "no route to host" in hub.unreachable_reason()
    assert "offline" in hub.unreachable_reason()
    assert timeouts == [hub.PROBE_TIMEOUT_S]
