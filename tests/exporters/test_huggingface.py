"""Hugging Face folders: codes and scales bit for bit, logits in plain transformers, refusals, faults that are found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CONTEXT, MIXED, SIZES, freeze, llama, sqnr
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    YoutuConfig,
)

from conftest import edit_config, stored_tensors
from qat_edge.data.conversation import Prompt
from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.manifest import write_manifest
from qat_edge.models.generation_settings import greedy_decoding
from qat_edge.models.tokenizer import load_tokenizer
from qat_edge.quant import frozen, numerics, scheme
from qat_edge.quant.packing import pack_int32, unpack_int32
from qat_edge.quant.scheme import LinearCodes
from qat_edge.verbs.verify import Verified, verify_folder
from qat_edge_exporters.huggingface import hf_support
from qat_edge_exporters.huggingface.compressed_config import INPUTS
from qat_edge_exporters.targets import target_named

ROOT = Path(__file__).parents[2]
TARGET = target_named("hf")
needs_compressed_tensors = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)


def export(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    TARGET.export(checkpoint, folder, CONTEXT)
    return folder


def check(folder: Path, checkpoint: Path) -> Verified:
    return verify_folder(folder, "hf", checkpoint)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A frozen llama whose table is shared and rotated, and its export."""
    root = tmp_path_factory.mktemp("hf")
    freeze(llama(), 32, root / "frozen", MIXED, rotated=True)
    return root / "frozen", export(root / "frozen", root / "export")


@pytest.fixture
def copied(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The same to be changed."""
    return made[0], Path(shutil.copytree(made[1], tmp_path / "export"))


def load(folder: Path) -> Any:
    """Load a folder as its users do."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: Any, tokens: int = 24) -> torch.Tensor:
    ids = torch.randint(3, SIZES["vocab_size"], (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


# --- packing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "width"), [(4, 32), (4, 96), (8, 64), (8, 30), (8, 33)])
def test_packing_is_undone(bits: int, width: int) -> None:
    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (5, width)).astype(np.int8)
    packed = pack_int32(codes, bits)
    assert packed.dtype == np.int32 and packed.shape == (5, -(-width * bits // 32))
    np.testing.assert_array_equal(unpack_int32(packed, bits, width), codes)


@needs_compressed_tensors
@pytest.mark.parametrize(("bits", "width"), [(4, 32), (4, 96), (8, 64), (8, 30), (8, 33)])
def test_packing_is_that_of_compressed_tensors(bits: int, width: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    codes = np.random.default_rng(0).integers(-half, half, (5, width)).astype(np.int8)
    expected = pack_to_int32(torch.from_numpy(codes), bits).numpy()
    np.testing.assert_array_equal(pack_int32(codes, bits), expected)


@needs_compressed_tensors
def test_inputs_are_rounded_as_in_training_but_for_ties() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    x = torch.randn(1, 2000, 576, generator=torch.Generator().manual_seed(0))
    args = QuantizationArgs(**INPUTS)
    scales, zeros = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    steps = (fake_quantize(x, scales, zeros, args) - numerics.fake_quantize_activation(x)).abs() / scales
    # Measured: 2.6 of a million values are one step apart, because a float32 sum rounds them over a tie.
    assert steps.max() < 1.001
    assert (steps > 0.5).float().mean() < 1e-5


# --- whole folders ------------------------------------------------------------------------------------------

MEASURED_DB = 50.0
CASES: dict[str, tuple[Callable[[], PretrainedConfig], dict[str, Any]]] = {
    "tied": (llama, {}),
    "untied, biases": (lambda: llama(tie_word_embeddings=False, attention_bias=True, mlp_bias=True), {}),
    "untied, rotated": (lambda: llama(tie_word_embeddings=False), {"rotated": True}),
    "layers of other bits": (llama, {"bits": MIXED}),
    "groups of 64": (llama, {"group_size": 64}),
    "groups of 128": (lambda: llama(hidden_size=128, intermediate_size=256), {"group_size": 128}),
    "a head of 4 bits": (llama, {"table_bits": (8, 4)}),
    "tables of 4 bits": (llama, {"table_bits": (4, 4)}),
    "one layer": (lambda: llama(num_hidden_layers=1), {}),
    "qwen2": (lambda: Qwen2Config(**SIZES, tie_word_embeddings=True), {}),
    "phi3": (lambda: Phi3Config(**SIZES, original_max_position_embeddings=128), {}),
    "gemma3": (
        lambda: Gemma3TextConfig(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folders_are_equal_and_compute_the_checkpoint(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    reference = freeze(make(), **{"group_size": 32, **options}, folder=tmp_path / "frozen")
    folder = export(tmp_path / "frozen", tmp_path / "export")
    result = check(folder, tmp_path / "frozen")
    assert result.faults == []
    assert (result.linears_equal, result.floats_equal) == (result.linears, result.floats)
    assert result.embedding_equal and result.head_equal
    if find_spec("compressed_tensors") is None:
        pytest.skip("compressed-tensors is not installed, so the folder was only read")
    # All of these are equal bit for bit but "untied, biases", where an input is rounded over a tie (69 dB).
    assert sqnr(logits(reference), logits(load(folder))) > MEASURED_DB


@needs_compressed_tensors
def test_a_shared_rotated_table_becomes_a_head_in_float(made: tuple[Path, Path]) -> None:
    checkpoint, folder = made
    tensors = load_file(folder / "model.safetensors")
    assert tensors["lm_head.weight"].dtype == tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert "lm_head.weight_packed" not in tensors and tensors["model.norm.weight"].dim() == 1
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    sizes = TARGET.read(folder).size_bytes
    assert sizes["head"] == sizes["embedding"] == 288 * 64 * 4

    reference, found = frozen.load(checkpoint), logits(load(folder))
    assert sqnr(logits(reference), found) > 40  # measured 45: the rounding of the head's input
    head = reference.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.dequantize(), requires_grad=False)
    assert sqnr(logits(reference), found) > 110  # measured 132: sums in another order


def test_the_sizes_of_a_folder_are_those_of_its_files(made: tuple[Path, Path]) -> None:
    sizes = TARGET.read(made[1]).size_bytes
    assert sum(sizes.values()) == sum(path.stat().st_size for path in made[1].iterdir())
    assert min(sizes.values()) > 0


def test_tensors_are_those_that_vllm_expects(made: tuple[Path, Path]) -> None:
    """Its loader was read, not run.

    https://github.com/vllm-project/vllm/blob/01063cd07bef167f37f6d25a96b1df7d97fe40eb/vllm/model_executor/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa8.py
    """
    checkpoint, folder = made
    tensors = load_file(folder / "model.safetensors")
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    shapes = {name: weight.codes.shape for name, weight in frozen.read_weights(checkpoint).items()}
    listed = []
    for group in groups.values():
        assert group["format"] == "pack-quantized"
        for name in group["targets"]:
            rows, width = shapes[name]
            bits, size = group["weights"]["num_bits"], group["weights"].get("group_size", width)
            expected = {
                "weight_packed": (torch.int32, (rows, -(-width * bits // 32))),
                "weight_scale": (torch.bfloat16, (rows, width // size)),
                "weight_shape": (torch.int64, (2,)),
            }
            found = {part: tensors[f"{name}.{part}"] for part in expected}
            assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in found.items()} == expected
            assert found["weight_shape"].tolist() == [rows, width]
            listed.append(name)
    assert sorted(listed) == sorted(shapes.keys() - {"model.embed_tokens", "lm_head"})


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64), "model.decoder.layers.0.fc1 of opt"),
        (YoutuConfig(**SIZES, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16), "kv_b_proj"),
        (BertConfig(), "bert is an encoder"),
        (LlamaConfig(auto_map={"AutoModelForCausalLM": "other.Model"}), "llama needs code of its own"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_are_refused_by_their_configuration(config: PretrainedConfig, message: str) -> None:
    assert message in hf_support.missing(config)


def test_a_llama_is_not_refused() -> None:
    assert hf_support.missing(llama()) == ""


@pytest.mark.parametrize("levels", ["seq", "integer"])
def test_weights_of_2_bits_are_refused_by_name(levels: str, tmp_path: Path) -> None:
    assert TARGET.missing_widths({2, 4}) == "Hugging Face has no operator for 2-bit weights."
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama(num_hidden_layers=1)).eval()
    chosen = scheme.choose_scheme(model, 32, default=LinearCodes(2, levels))
    frozen.freeze(model, chosen)
    model.save_pretrained(tmp_path / "frozen")
    write_manifest(tmp_path / "frozen", "quantized", scheme=frozen.scheme_metadata(chosen))
    with pytest.raises(ExportError, match=r"hf: model\.layers\.0\.\S+ has 2-bit weights"):
        export(tmp_path / "frozen", tmp_path / "export")


def test_float_checkpoints_and_unmerged_adapters_are_refused(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LlamaForCausalLM(llama()).save_pretrained(tmp_path / "float")
    with pytest.raises(ExportError, match="holds float weights"):
        export(tmp_path / "float", tmp_path / "export")
    monkeypatch.setattr("qat_edge_exporters.huggingface.export_hf.read_adapters", lambda folder: {"layer": None})
    with pytest.raises(ExportError, match="no adapters that stay unmerged"):
        export(made[0], tmp_path / "other")


# --- faults -------------------------------------------------------------------------------------------------


def change(folder: Path, name: str, change_values: Callable[[torch.Tensor], None]) -> None:
    with stored_tensors(folder) as tensors:
        change_values(tensors[name])


def add(amount: float) -> Callable[[torch.Tensor], None]:
    def apply(tensor: torch.Tensor) -> None:
        tensor.view(-1)[7] += amount

    return apply


@pytest.mark.parametrize(
    ("name", "amount", "message"),
    [
        ("model.layers.1.mlp.gate_proj.weight_packed", 1, "1 of 8192 codes differ, first at row 0, column 56"),
        ("model.layers.0.self_attn.q_proj.weight_scale", 1.0, "1 scale differs, first at row 3, group 1"),
        ("model.norm.weight", 0.25, "model.norm.weight: not in the artifact as it was frozen"),
        ("model.embed_tokens.weight", 0.25, "model.embed_tokens: 1 of 18432 numbers"),
        ("lm_head.weight", 1e-4, "lm_head: 1 of 18432 numbers of its constant lm_head.weight differ, first at row 0, "),
    ],
)
def test_a_changed_tensor_is_found(copied: tuple[Path, Path], name: str, amount: float, message: str) -> None:
    checkpoint, folder = copied
    change(folder, name, add(amount))
    result = check(folder, checkpoint)
    assert any(message in fault for fault in result.faults), result.faults
    assert result.head_equal == (name != "lm_head.weight")
    assert result.embedding_equal == (name != "model.embed_tokens.weight")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("input_activations", "symmetric"), True, "input_activations.symmetric is True, the export writes False."),
        (("input_activations",), None, "input_activations is None"),
        (("format",), "int-quantized", "format is 'int-quantized', the export writes 'pack-quantized'."),
        (("weights", "symmetric"), False, "weights.symmetric is False"),
    ],
)
def test_a_changed_quantization_config_is_found(
    copied: tuple[Path, Path], path: tuple[str, ...], value: object, message: str
) -> None:
    checkpoint, folder = copied
    document = json.loads((folder / "config.json").read_text())
    place: Any = document["quantization_config"]["config_groups"]["int4_group32"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(document))
    assert any(message in fault for fault in check(folder, checkpoint).faults)


def test_changed_settings_are_found(copied: tuple[Path, Path]) -> None:
    checkpoint, folder = copied
    edit_config(folder, rms_norm_eps=1e-3, tie_word_embeddings=True)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1]}))
    faults = "\n".join(check(folder, checkpoint).faults)
    assert "config.json: rms_norm_eps is 0.001, the export writes 1e-06." in faults
    assert "config.json: tie_word_embeddings is True, the export writes False." in faults
    assert "generation_config.json: eos_token_id is " in faults


@pytest.mark.parametrize(
    ("change_settings", "message"),
    [
        (lambda q: q.pop("config_groups"), "no configuration of compressed-tensors"),
        (lambda q: q["config_groups"]["int4_group32"]["weights"].update(num_bits=3), "codes of 3 bits"),
        (lambda q: q["config_groups"]["int4_group32"]["weights"].update(group_size=64), "weight_scale is"),
        (lambda q: q["config_groups"]["int4_group32"]["weights"].update(group_size=-1), "group_size -1"),
        (lambda q: q["config_groups"]["int4_group32"].update(targets=[7]), "no names of layers"),
        (lambda q: q["config_groups"]["int4_group32"]["targets"].append("other"), "no other.weight_packed"),
        (lambda q: q.update(ignore=["other"]), "names no tables of model.safetensors"),
    ],
)
def test_a_damaged_folder_is_named(
    copied: tuple[Path, Path], change_settings: Callable[[Any], object], message: str
) -> None:
    folder = copied[1]
    document = json.loads((folder / "config.json").read_text())
    change_settings(document["quantization_config"])
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=message):
        TARGET.read(folder)


def test_damaged_files_are_named(copied: tuple[Path, Path]) -> None:
    folder = copied[1]
    with stored_tensors(folder) as tensors:
        tensors["model.other.weight_packed"] = torch.zeros(2, dtype=torch.int32)
    assert any("model.other.weight_packed is int32" in fault for fault in TARGET.read(folder).faults)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="eos_token_id is None"):
        TARGET.read(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ArtifactError, match="missing or damaged"):
        TARGET.read(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "modeling.py", "custom_generate/a.py"])
def test_a_folder_with_more_than_an_export_is_not_run(copied: tuple[Path, Path], name: str) -> None:
    folder = copied[1]
    TARGET.check(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ArtifactError, match="is no file of an export"):
        TARGET.check(folder)


def test_a_folder_that_asks_for_code_is_not_run(copied: tuple[Path, Path]) -> None:
    edit_config(copied[1], auto_map={"AutoModelForCausalLM": "other.Model"})
    with pytest.raises(ArtifactError, match="auto_map asks for code"):
        TARGET.check(copied[1])


# --- text ---------------------------------------------------------------------------------------------------


@needs_compressed_tensors
def test_text_is_that_of_the_model(made: tuple[Path, Path]) -> None:
    folder = made[1]
    tokenizer, pieces = load_tokenizer(folder), []
    ids = tokenizer.encode("The committee will meet", add_special_tokens=False)
    with TARGET.open_generator(folder, tokenizer) as generator:
        generator.generate(Prompt("", ids), pieces.append, 8)
    model = load(folder)
    with torch.no_grad(), greedy_decoding(model, [2], 2, 8):
        expected = model.generate(torch.tensor([ids]))[0, len(ids) :]
    assert "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)


def test_what_is_missing_to_run_a_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qat_edge_exporters.targets.find_spec", lambda name: None)
    assert "compressed_tensors is not installed. `pip install 'qat-edge[hf]'`" in TARGET.runs_elsewhere


@needs_compressed_tensors
def test_the_artifact_runs_as_its_checkpoint(made: tuple[Path, Path]) -> None:
    # The checkpoint's head does not round its input there either, which the emulation knows.
    found = parity.measure(made[1], "hf", FrozenReference(made[0]), CONTEXT)
    assert (found.fault, found.not_measured) == ("", "")
    assert found.error_db is not None and found.error_db < -70
