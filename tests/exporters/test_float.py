"""Float checkpoints, and unmerged adapters with float or quantized weights, through both exporters and runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import numpy as np
import onnxruntime
import pytest
import torch
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  operators of the .pte
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import make_model, make_tokenizer
from qat_edge.errors import ExportError
from qat_edge.evaluate.reference import load_exact
from qat_edge.models.tokenizer import TOKENIZER_FILES
from qat_edge.quant import frozen, scheme
from qat_edge.quant.frozen_adapters import ADAPTER, read_adapters
from qat_edge.verbs.verify import require_equal, verify_folder
from qat_edge_exporters.onnx.names import ADAPTER_FILE
from qat_edge_exporters.targets import DEFAULT_FORMATS, target_named

CONTEXT = 32
RANK = 4
LINEARS = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # parameters of both layers' matrices
ADAPTERS = 2 * RANK * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
TABLE = 288 * 64
KINDS = ("float", "adapted", "quantized_adapted")
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Made:
    """One checkpoint and the torch model of the function it defines."""

    checkpoint: Path
    reference: Any


def save_adapter(folder: Path) -> None:
    """Save random adapters on every linear layer, large enough to change the output."""
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=6, target_modules="all-linear")
    adapted = get_peft_model(make_model(make_tokenizer()), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)


def with_adapters(model: Any, checkpoint: Path) -> Any:
    """Make `model` compute W x + s B (A x) with hooks, independently of the exporters' code."""
    tensors = load_file(checkpoint / ADAPTER / "adapter_model.safetensors")
    for name, module in model.named_modules():
        down, up = (tensors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        if down is not None and up is not None:

            def add(_: Any, args: Any, kwargs: Any, y: Tensor, a: Tensor = down, b: Tensor = up) -> Tensor:
                return y + 6 / RANK * (inputs[id(_)] @ a.T) @ b.T

            def keep(_: Any, args: Any) -> None:
                inputs[id(_)] = args[0]

            # Before the hook that rounds the input of a frozen layer: an adapter gets it unrounded.
            module.register_forward_pre_hook(keep, prepend=True)
            module.register_forward_hook(add, with_kwargs=True)
    inputs: dict[int, Tensor] = {}
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Made]:
    root = tmp_path_factory.mktemp("checkpoints")
    checkpoints = {}
    for kind in KINDS:
        folder = root / kind
        model = make_model(make_tokenizer())
        if kind == "quantized_adapted":
            frozen.freeze(model, chosen := scheme.choose_scheme(model, 32))
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        if kind == "quantized_adapted":
            from qat_edge.manifest import write_manifest

            write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(chosen))
        # Loaded without an adapter, so that the reference computes it by itself.
        loaded = load_exact(folder) if kind == "quantized_adapted" else frozen.load(folder)
        if kind != "float":
            save_adapter(folder / ADAPTER)
        checkpoints[kind] = Made(folder, loaded if kind == "float" else with_adapters(loaded, folder))
    return checkpoints


@pytest.fixture(scope="module")
def artifacts(made: Mapping[str, Made], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function that exports a kind of checkpoint to a target, once."""
    root = tmp_path_factory.mktemp("exports")

    def export(kind: str, target: str) -> Path:
        folder = root / kind / target
        if not folder.is_dir():
            folder.mkdir(parents=True)
            target_named(target).export(made[kind].checkpoint, folder, CONTEXT)
        return folder

    return export


def run_pte(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits (S, V) token by token, through the cache."""
    program = _load_for_executorch(str(folder / "model.pte"))
    rows = [program.forward((tokens[:, i : i + 1].contiguous(), torch.tensor([i])))[0] for i in range(tokens.shape[1])]
    return torch.cat(rows)[:, 0].clone()


def run_onnx(folder: Path, tokens: Tensor) -> Tensor:
    """Return the logits (S, V) of the whole text at once, with the folder's adapter if it has one."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones_like(tokens.numpy())}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            feeds[value.name] = np.zeros((1, 2, 0, 16), np.float32)
    options = onnxruntime.RunOptions()
    adapter = onnxruntime.LoraAdapter()
    if (folder / ADAPTER_FILE).is_file():
        adapter.Load(str(folder / ADAPTER_FILE))
        options.add_active_adapter(adapter)
    (logits,) = session.run(["logits"], feeds, options)
    return torch.from_numpy(logits)[0]


RUN = {"executorch": run_pte, "onnx": run_onnx}


def sqnr(wanted: Tensor, found: Tensor) -> float:
    """Return the signal-to-noise ratio in dB."""
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum().clamp(min=1e-30)))


def text(length: int = 12) -> Tensor:
    return torch.randint(3, 260, (1, length), generator=torch.Generator().manual_seed(2))


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(tokens).logits[0])


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
@pytest.mark.parametrize("kind", ["float", "adapted"])
def test_float_artifacts_compute_the_float_function(
    kind: str, target: str, made: Mapping[str, Made], artifacts: Callable[[str, str], Path]
) -> None:
    found = RUN[target](artifacts(kind, target), text())
    torch.testing.assert_close(found, logits(made[kind].reference, text()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
def test_unmerged_adapters_compute_the_merged_model(
    target: str, made: Mapping[str, Made], artifacts: Callable[[str, str], Path]
) -> None:
    merged = frozen.load(made["adapted"].checkpoint, with_adapters=False)
    with torch.no_grad():
        for name, adapter in read_adapters(made["adapted"].checkpoint).items():
            merged.get_submodule(name).weight += adapter.up @ adapter.down
    wanted = logits(merged, text())
    assert sqnr(logits(made["float"].reference, text()), wanted) < 20  # the adapters change the function
    torch.testing.assert_close(RUN[target](artifacts("adapted", target), text()), wanted, rtol=1e-4, atol=1e-4)


def test_adapters_with_quantized_weights_compute_the_emulation(
    made: Mapping[str, Made], artifacts: Callable[[str, str], Path]
) -> None:
    wanted = logits(made["quantized_adapted"].reference, text())
    # Float rounding error, except where it moves an activation to another int8 code.
    assert sqnr(wanted, run_pte(artifacts("quantized_adapted", "executorch"), text())) > 40
    # onnxruntime on x86 rounds activations per block, torch and ExecuTorch per token.
    assert sqnr(wanted, run_onnx(artifacts("quantized_adapted", "onnx"), text())) > 25
    assert sqnr(logits(made["adapted"].reference, text()), wanted) < 25  # quantization is not a small change


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
def test_quantized_weights_are_read_back_with_adapters(
    target: str, made: Mapping[str, Made], artifacts: Callable[[str, str], Path]
) -> None:
    wanted = frozen.read_weights(made["quantized_adapted"].checkpoint)
    found = target_named(target).read(artifacts("quantized_adapted", target)).weights
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name].codes, weight.codes.numpy())


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
def test_verify_compares_the_adapter_with_the_checkpoint(
    target: str, made: Mapping[str, Made], artifacts: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder, checkpoint = artifacts("quantized_adapted", target), made["quantized_adapted"].checkpoint
    result = verify_folder(folder, target, checkpoint)
    require_equal([result])
    assert "adapter: 28 of 28 matrices equal" in result.describe()

    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    path = other / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"][3, 1] += 1
    save_file(tensors, path)
    changed = verify_folder(folder, target, other)
    assert (changed.adapter_equal, changed.linears_equal) == (27, 14)
    (fault,) = changed.faults
    assert fault.startswith("model.layers.0.mlp.up_proj, adapter s B: ")


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_by_part(kind: str, target: str, artifacts: Callable[[str, str], Path]) -> None:
    folder = artifacts(kind, target)
    sizes = target_named(target).read(folder).size_bytes
    assert sum(sizes.values()) == sum(p.stat().st_size for p in folder.iterdir())
    own_file = folder / ADAPTER_FILE  # of an ONNX folder
    expected = own_file.stat().st_size if own_file.is_file() else 4 * ADAPTERS
    assert sizes.get("adapter", 0) == (0 if kind == "float" else expected)
    assert sizes["linears"] == (LINEARS // 2 if kind == "quantized_adapted" else 4 * LINEARS)
    if kind != "quantized_adapted":
        assert (sizes["embedding"], sizes["head"]) == (4 * TABLE, 0)  # the model is tied
    assert {name for name in TOKENIZER_FILES if (folder / name).is_file()} >= {
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
def test_unsupported_adapters_are_rejected(target: str, made: Mapping[str, Made], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(made["adapted"].checkpoint, checkpoint)
    path = checkpoint / ADAPTER / "adapter_config.json"
    export = target_named(target).export
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"use_dora": True}))
    with pytest.raises(ExportError, match="use_dora"):
        export(checkpoint, tmp_path, CONTEXT)
    path.write_text(json.dumps(settings))
    file = path.with_name("adapter_model.safetensors")
    tensors = load_file(file)
    moved = {k.replace("layers.1.mlp.up_proj", "layers.9.mlp.up_proj"): v for k, v in tensors.items()}
    save_file(moved, file)
    with pytest.raises(ExportError, match=r"model\.layers\.9\.mlp\.up_proj"):
        export(checkpoint, tmp_path, CONTEXT)


def test_rank_stabilized_adapters_use_their_own_scale(made: Mapping[str, Made], tmp_path: Path) -> None:
    shutil.copytree(made["adapted"].checkpoint / ADAPTER, tmp_path / ADAPTER)
    path = tmp_path / ADAPTER / "adapter_config.json"
    name = "model.layers.0.mlp.up_proj"
    plain = read_adapters(tmp_path)[name]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    torch.testing.assert_close(read_adapters(tmp_path)[name].up, plain.up * RANK**0.5)
