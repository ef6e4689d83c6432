"""Tiny stand-ins that every test may use: a byte-level tokenizer with a chat template, a two-layer model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before transformers is imported anywhere: no test may reach for the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat_edge import progress
from qat_edge.evaluate.results import Parity
from qat_edge.manifest import MANIFEST, write_manifest
from qat_edge.options import FinetuneOptions
from qat_edge.quant import frozen, scheme
from qat_edge.run import Run
from qat_edge.stop_signals import STOP_SIGNALS
from qat_edge.verbs.finetune import finetune
from qat_edge_exporters.onnx import builder_process
from qat_edge_exporters.targets import target_named
from tests import warm_builder

if sys.platform == "win32":
    # They need signals, forks, limits of memory and a shell that Windows lacks.
    collect_ignore_glob = [
        "reliability/*", "fuzz/*", "test_finetune_reliability.py", "devices/test_remote*.py",
        "train/test_distributed*.py",
    ]  # fmt: skip

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2 as in SmolLM2
MERGES = (("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("o", "n"), ("r", "e"), ("o", "u"))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB_MULTIPLE = 32


def fill_adapters(model: nn.Module, std: float = 0.05) -> None:
    """Give the adapters of a peft model random values, so that they are not zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def make_tokenizer() -> Any:
    """256 bytes, eight merges, three special tokens; spells any text."""
    words = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    backend = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=list(MERGES)))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def in_hub_cache(folder: Path, home: Path) -> None:
    """Put a model folder into a Hub cache as `someone/tiny`, downloaded earlier."""
    repository = home / "hub/models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))


def make_model(tokenizer: Any, seed: int = 0) -> LlamaForCausalLM:
    """Two Llama layers, 64 wide, tied embeddings, random weights of `seed`, float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def export_frozen_llama(target: str, root: Path, context_length: int) -> Path:
    """Export a frozen Llama of one layer, 64 wide, with tied tables; return the folder of the artifact below `root`."""
    config = LlamaConfig(
        vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    chosen = scheme.choose_scheme(model, 32)
    frozen.freeze(model, chosen)
    model.save_pretrained(root / "frozen")
    make_tokenizer().save_pretrained(root / "frozen")
    write_manifest(root / "frozen", "quantized", scheme=frozen.scheme_metadata(chosen))
    folder = root / target
    folder.mkdir()
    target_named(target).export(root / "frozen", folder, context_length)
    return folder


def parts_of_a_run() -> set[str]:
    """Names of the files and folders that a run folder has a property for."""
    properties = {name: found for name in dir(Run) if isinstance(found := getattr(Run, name), property)}
    paths = [name for name, found in properties.items() if found.fget.__annotations__["return"] == "Path"]
    return {getattr(Run(Path("RUN")), name).name for name in paths}


def train_run(
    model: Path, folder: Path, rows: Sequence[dict[str, Any]] = (), steps: int = 4, learning_rate: float = 1e-2
) -> Run:
    """A run whose first half is LoRA and whose second is QAT, on `rows` or short chats, in `folder` with its data."""
    rows = rows or [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f'{{"n":{i}}}'}]}
        for i in range(40)
    ]
    made = Run(folder / "run")
    finetune(short_training(model, folder, rows, steps=steps, learning_rate=learning_rate), made.path)
    return made


def plain_rows(count: int) -> list[dict[str, str]]:
    """Short rows of prompt and completion."""
    return [{"prompt": f"say {i} ", "completion": f"it is {i}"} for i in range(count)]


def short_training(
    model: Path, folder: Path, rows: Sequence[dict[str, Any]], steps: int = 6, **options: Any
) -> FinetuneOptions:
    """Options of a training whose second half is QAT, on `rows`, which are written into `folder`."""
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneOptions(
        model=str(model), data=str(folder / "train.jsonl"), eval_data=str(folder / "eval.jsonl"), steps=steps,
        **{"qat_start": 0.5, "batch_size": 4, "lora_rank": 4, "track": (), **options},
    )  # fmt: skip


@contextmanager
def stored_tensors(checkpoint: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of a saved model, to be changed; their metadata is preserved."""
    path = checkpoint / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata)


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of a model's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def relist(folder: Path) -> None:
    """Enter the files of a folder into its manifest as they are now, as somebody would who alters both."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != path)
    manifest["files"] = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }
    path.write_text(json.dumps(manifest))


@pytest.fixture(autouse=True, scope="session")
def signals_arrive() -> Iterator[None]:
    """Receive the signals that tests send, also where the tests run in the background, under nohup or in CI."""
    ignored = [each for each in STOP_SIGNALS if signal.getsignal(each) is signal.SIG_IGN]
    for each in ignored:
        signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
    yield
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)


@pytest.fixture(autouse=True, scope="session")
def quick_builder() -> Iterator[None]:
    """The builder of ONNX graphs runs in forks, where the system has them; the process that ships has tests as well."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(os, "fork"):
            patch.setattr(builder_process, "_run", warm_builder.run)
        yield


@pytest.fixture
def stand_in_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporters are replaced by functions that write no artifact, so nothing can be run afterwards."""
    nothing = Parity(not_measured="A stand-in was exported.")
    monkeypatch.setattr("qat_edge.verbs.export._measure_parity", lambda *_: nothing)
    monkeypatch.setattr("qat_edge_exporters.targets.Target.held_options", lambda *_: [])
    monkeypatch.setattr("qat_edge_exporters.targets.Target.tokenizer_faults", lambda *_: [])


class Recorder(progress.LogReporter):
    """Reporter that keeps the lines it is given."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """Lines that the code under test reports, in order."""
    recorder = Recorder()
    with progress.report_to(recorder):
        yield recorder.lines


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the Hub serves it: config, safetensors, tokenizer, chat template."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for data; pytest's own has "test" in its name, which `datasets` takes for a part."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "rows"
    path.mkdir()
    return path


@pytest.fixture
def model_copy(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
