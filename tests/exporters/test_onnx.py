"""The ONNX exporter and its reader, on two-layer models that cover every branch of the exporter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from numpy.typing import NDArray
from onnx import external_data_helper
from tiny import MIXED, disturb_rotation
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from conftest import make_tokenizer
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.manifest import write_manifest
from qat_edge.quant import frozen, numerics, rotation, scheme
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.onnx import export_onnx as onnx_export
from qat_edge_exporters.onnx.expected_config import setting_faults
from qat_edge_exporters.onnx.onnx_matrices import unpack
from qat_edge_exporters.onnx.onnx_reader import read

CONTEXT = 64
IDS = np.array([1, 40, 17, 90, 5, 61, 200, 33, 8, 12])
PREFILL = 6  # of IDS; the rest are decoded one by one
NEW_TOKENS = 12


@dataclass(frozen=True)
class Exported:
    """One tiny model: its frozen checkpoint, its artifact, and the float model of its dequantized weights."""

    frozen: Path
    folder: Path
    dequantized: Any
    scheme: scheme.Scheme


def llama(**changes: Any) -> PretrainedConfig:
    return LlamaConfig(**{**SHAPE, "tie_word_embeddings": True, **changes})


SHAPE: dict[str, Any] = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": [2, 0],
    "pad_token_id": 2,
}
ODD = {"hidden_size": 72, "intermediate_size": 72, "head_dim": 16, "tie_word_embeddings": False}
MODELS: dict[str, tuple[Callable[[], PretrainedConfig], int]] = {
    "llama_tied": (llama, 32),
    "llama_biases": (lambda: llama(attention_bias=True, mlp_bias=True), 32),
    "qwen2_untied": (lambda: Qwen2Config(**SHAPE, tie_word_embeddings=False), 32),
    "qwen3": (lambda: Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True), 32),
    # down_proj in groups of 32 while the others have 64; then rows of 72, int8 per channel, whose last block is padded.
    "mixed_groups": (lambda: llama(intermediate_size=96), 64),
    "padded_blocks": (lambda: llama(**ODD), 64),
    # Bits chosen by layer, see tiny.MIXED; rows of 192 with one scale become three blocks that repeat it.
    "mixed_bits": (lambda: llama(intermediate_size=192), 32),
    "int4_embedding": (llama, 32),
    "int4_head_untied": (lambda: llama(tie_word_embeddings=False), 64),
    "int4_tables": (llama, 32),
    "int4_tables_untied": (lambda: llama(tie_word_embeddings=False), 32),
    "rotated": (llama, 32),
    # Half steps behind biased layers, and layers of 2, 4 and 8 bits that share an input; levels without half steps.
    "int2_seq": (lambda: llama(attention_bias=True, mlp_bias=True), 32),
    "int2_integer": (lambda: Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=False), 64),
}
BITS = {"mixed_bits": MIXED, "int2_seq": {"model.layers.0.self_attn.k_proj": 4, "model.layers.0.self_attn.v_proj": 8}}
CODES = {"int2_seq": scheme.LinearCodes(2, "seq"), "int2_integer": scheme.LinearCodes(2, "integer")}
TABLES = {  # bits of embedding and head
    "int4_embedding": (4, 8), "int4_head_untied": (8, 4), "int4_tables": (4, 4), "int4_tables_untied": (4, 4),
}  # fmt: skip


def freeze(
    config: PretrainedConfig,
    group_size: int,
    folder: Path,
    bits: dict[str, int] | None = None,
    table_bits: tuple[int, int] = (8, 8),
    rotated: bool = False,
    codes: scheme.LinearCodes = scheme.INT4,
) -> tuple[Any, scheme.Scheme]:
    """Write a frozen checkpoint of random weights; return a float model of its dequantized weights, and its scheme."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    chosen = scheme.choose_scheme(model, group_size, bits, table_bits, codes)
    if rotated:
        rotation.rotate(model, chosen, 0)
    plain = deepcopy(model)
    # A copy: the head is rounded differently from the embedding if their bits differ.
    plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    for name, spec in chosen.weights.items():
        weight = plain.get_submodule(name).weight
        own = model.get_submodule(name).weight.data
        weight.data = numerics.fake_quantize_weight(own, spec.codebook, spec.group_size)
    frozen.freeze(model, chosen)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(chosen))
    return plain, chosen


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Return a function that exports a model of MODELS by name, once."""
    made: dict[str, Exported] = {}

    def make_one(name: str) -> Exported:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            config, group_size = MODELS[name]
            bits, table_bits = BITS.get(name), TABLES.get(name, (8, 8))
            rotated, codes = name.startswith("rotated"), CODES.get(name, scheme.INT4)
            plain, chosen = freeze(config(), group_size, root / "frozen", bits, table_bits, rotated, codes)
            (root / "onnx").mkdir()
            onnx_export.export(root / "frozen", root / "onnx", CONTEXT)
            made[name] = Exported(root / "frozen", root / "onnx", plain, chosen)
        return made[name]

    return make_one


@pytest.fixture(params=MODELS)
def exported(request: pytest.FixtureRequest, make: Callable[[str], Exported]) -> Exported:
    return make(request.param)


class PlainRuntime:
    """onnxruntime without its generation library, with the KV cache held here."""

    def __init__(self, model: Path | bytes, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.outputs = [o.name for o in self.session.get_outputs()]
        width = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
        self.length = 0
        self.cache = {
            i.name: np.zeros((1, i.shape[1], 0, width), np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }

    def step(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the logits (tokens, vocabulary) of the next tokens (tokens,)."""
        self.length += len(ids)
        mask = np.ones((1, self.length), np.int64)
        values = self.session.run(self.outputs, {"input_ids": ids[None], "attention_mask": mask, **self.cache})
        found = dict(zip(self.outputs, values, strict=True))
        logits: NDArray[np.float32] = found.pop("logits")[0]
        self.cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        return logits


def run_logits(model: Path | bytes, folder: Path) -> NDArray[np.float32]:
    """Return the logits (tokens, vocabulary) of IDS: a prefill, then one token at a time."""
    runtime = PlainRuntime(model, folder)
    return np.concatenate([runtime.step(ids) for ids in np.split(IDS, range(PREFILL, len(IDS)))])


def torch_logits(model: Any) -> NDArray[np.float32]:
    with torch.no_grad():
        return model(torch.from_numpy(IDS[None])).logits[0].numpy()


def with_float_inputs(folder: Path) -> bytes:
    """Return the same graph without activation rounding: accuracy_level 1."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    return model.SerializeToString()


def copy(exported: Exported, to: Path) -> Path:
    return Path(shutil.copytree(exported.folder, to / "copy"))


def offset_of(folder: Path, tensor: str) -> int:
    """Return the offset of a tensor in the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    found = next(i for i in model.graph.initializer if i.name == tensor)
    return external_data_helper.ExternalDataInfo(found).offset


def flip(path: Path, offset: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def test_every_matrix_is_bit_equal_to_the_frozen_one(exported: Exported) -> None:
    artifact, expected = read(exported.folder), frozen.read_weights(exported.frozen)
    assert artifact.faults == []
    assert artifact.weights.keys() == expected.keys()
    for name, weight in expected.items():
        found = artifact.weights[name]
        assert (found.bits, found.levels) == (weight.bits, weight.levels), name
        np.testing.assert_array_equal(found.codes, weight.codes.numpy(), err_msg=name, strict=True)
        np.testing.assert_array_equal(found.scales, weight.scales.numpy(), err_msg=name, strict=True)


def test_another_rotation_of_the_head_is_a_fault(make: Callable[[str], Exported], tmp_path: Path) -> None:
    made = make("rotated")
    assert verify_folder(made.folder, "onnx", made.frozen).faults == []
    other = Path(shutil.copytree(made.frozen, tmp_path / "other"))
    disturb_rotation(other)
    assert verify_folder(made.folder, "onnx", other).faults == ["model.norm.turn: not in the artifact as it was frozen"]


def test_the_mixed_models_are_mixed(make: Callable[[str], Exported]) -> None:
    mixed = {(w.bits, w.group_size) for w in make("mixed_groups").scheme.linears.values()}
    padded = {(w.bits, w.group_size) for w in make("padded_blocks").scheme.linears.values()}
    assert mixed == {(4, 64), (4, 32)}
    assert padded == {(4, 64), (8, 72)}


def test_bits_chosen_by_layer_are_verified(make: Callable[[str], Exported], tmp_path: Path) -> None:
    exported = make("mixed_bits")
    assert {name for name, spec in exported.scheme.linears.items() if spec.bits == 8} == set(MIXED)
    assert {name: w.bits for name, w in read(exported.folder).weights.items() if name in MIXED} == MIXED
    result = verify_folder(exported.folder, "onnx", exported.frozen)
    assert result.faults == [] and result.linears_equal == result.linears == 14
    folder, row, column = copy(exported, tmp_path), 7, 130
    offset = offset_of(folder, "model.layers.1.mlp.down_proj.MatMulNBits.qweight") + row * 192 + column
    flip(folder / "model.onnx.data", offset, 0x01)
    result = verify_folder(folder, "onnx", exported.frozen)
    assert result.linears_equal == 13
    assert [fault for fault in result.faults if "down_proj: 1 of" in fault and f"row {row}, column {column}" in fault]


def test_two_bits_take_a_quarter_of_a_byte_and_half_steps_none(make: Callable[[str], Exported]) -> None:
    weights = 2 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 128)  # of q, o; k, v; gate, up, down in heads of 32
    integer = read(make("int2_integer").folder)
    assert integer.size_bytes["linears"] == weights // 4
    assert integer.size_bytes["scales"] == weights // 64 * 4
    assert {len(np.unique(w.codes)) for name, w in integer.weights.items() if "layers" in name} == {4}

    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    four, eight = 32 * 64, 32 * 64  # weights of k and v of the first layer
    seq = read(make("int2_seq").folder)
    assert seq.size_bytes["linears"] == (weights - four - eight) // 4 + four // 2 + eight
    assert seq.size_bytes["scales"] == weights // 32 * 4 - 32 * 4, "v has one scale a row, so one block of 64"
    assert seq.weights["model.layers.1.mlp.up_proj"].codes.max() == 3


STEP = "/model/layers.1/mlp/down_proj/half_step"
OTHER_STEPS: dict[str, tuple[str, Callable[[onnx.NodeProto], object]]] = {
    "another factor": (f"{STEP}/FusedMatMul", lambda node: node.attribute[0].__setattr__("f", 0.25)),
    "other scales": (
        f"{STEP}/FusedMatMul",
        lambda node: node.input.__setitem__(1, "model.layers.0.mlp.down_proj.MatMulNBits.scales"),
    ),
    "other blocks": (f"{STEP}/sums/Constant", lambda node: node.attribute[0].ints.__setitem__(3, 64)),
    "no half step": (f"{STEP}/Add", lambda node: node.__setattr__("name", "/elsewhere")),
    "no inputs": (f"{STEP}/Add", lambda node: node.ClearField("input")),
}


@pytest.mark.parametrize("what", OTHER_STEPS)
def test_another_half_step_is_a_fault(make: Callable[[str], Exported], tmp_path: Path, what: str) -> None:
    exported = make("int2_seq")
    assert verify_folder(exported.folder, "onnx", exported.frozen).faults == []
    folder = copy(exported, tmp_path)
    edit(folder, *OTHER_STEPS[what])
    assert verify_folder(folder, "onnx", exported.frozen).faults == [
        "model.layers.1.mlp.down_proj: integer levels in the artifact, seq levels were frozen"
    ]


def test_layers_with_one_input_share_its_sums(make: Callable[[str], Exported]) -> None:
    nodes = onnx.load(make("int2_seq").folder / "model.onnx", load_external_data=False).graph.node
    sums = [node.name for node in nodes if node.op_type == "ReduceSum" and "half_step" in node.name]
    products = [node.name for node in nodes if node.op_type == "FusedMatMul"]
    assert len(sums) == 8, "inputs of q k v, of o, of gate and up, and of down"
    assert len(products) == 12, "14 matrices, of which one has 4 and one 8 bits"


def test_without_activation_rounding_the_graph_computes_the_torch_model(exported: Exported) -> None:
    """Prefill and decode with a KV cache, with all biases and norms."""
    found = run_logits(with_float_inputs(exported.folder), exported.folder)
    # Measured on these models, x86-64: 1.5e-7 to 3.6e-7, logits up to 1.3.
    np.testing.assert_allclose(found, torch_logits(exported.dequantized), rtol=0, atol=2e-6)


def test_with_activation_rounding_the_graph_stays_close_to_the_frozen_model(exported: Exported) -> None:
    found, expected = (
        run_logits(exported.folder / "model.onnx", exported.folder),
        torch_logits(frozen.load(exported.frozen)),
    )
    # x86 rounds activations per block and symmetrically, torch per token and asymmetrically. Measured 36 to 42 dB, the
    # distance of either from no rounding at all (39 to 45 dB); top-1 100%.
    assert 10 * np.log10((expected**2).mean() / ((found - expected) ** 2).mean()) > 33
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9


def test_genai_generates_the_ids_that_plain_onnxruntime_does(make: Callable[[str], Exported]) -> None:
    folder = make("llama_tied").folder
    expected: list[int] = []
    runtime, ids = PlainRuntime(folder / "model.onnx", folder), IDS
    for _ in range(NEW_TOKENS):
        ids = runtime.step(ids)[-1:].argmax(1)
        expected.append(int(ids[0]))
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(IDS) + NEW_TOKENS)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(IDS.astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[len(IDS) :].tolist() == expected


def test_genai_config_and_tokenizer(make: Callable[[str], Exported]) -> None:
    exported = make("llama_tied")
    genai = read(exported.folder).metadata["genai_config"]
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == CONTEXT
    assert genai["model"]["eos_token_id"] == [2, 0]  # both of the configuration; the tokenizer has one of them
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (exported.folder / name).read_bytes() == (exported.frozen / name).read_bytes()
    assert {p.name for p in exported.folder.iterdir()} == {
        "model.onnx", "model.onnx.data", "genai_config.json",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_sizes_by_part(make: Callable[[str], Exported]) -> None:
    tied, untied = read(make("llama_tied").folder), read(make("qwen2_untied").folder)
    linears = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)  # weights of q, o; k, v; gate, up, down
    table = 288 * 64 + 4 * 288  # bytes: codes, and one scale per row
    assert tied.size_bytes["linears"] == untied.size_bytes["linears"] == linears // 2
    assert tied.size_bytes["scales"] == linears // 32 * 4
    assert (tied.size_bytes["embedding"], tied.size_bytes["head"]) == (table, 0)
    assert (untied.size_bytes["embedding"], untied.size_bytes["head"]) == (table, table)
    small = 288 * 64 // 2 + 288 * 2 * 4  # bytes: codes, and two scales per row
    for name, parts in {"int4_tables": (small, 0), "int4_tables_untied": (small, small)}.items():
        sizes = read(make(name).folder).size_bytes
        assert (sizes["embedding"], sizes["head"]) == parts
    apart = read(make("int4_embedding").folder).size_bytes
    assert (apart["embedding"], apart["head"]) == (small, table)
    for name, artifact in (("llama_tied", tied), ("qwen2_untied", untied)):
        files = [p for p in make(name).folder.iterdir() if p.name != "manifest.json"]
        assert sum(artifact.size_bytes.values()) == sum(p.stat().st_size for p in files)


def test_unpack_takes_the_low_nibble_first() -> None:
    assert unpack(np.array([[0x80, 0x1F]], np.uint8), 4).tolist() == [[-8, 0, 7, -7]]
    assert unpack(np.array([[0, 128, 255]], np.uint8), 8).tolist() == [[-128, 0, 127]]


def test_a_flipped_nibble_is_one_other_code(make: Callable[[str], Exported], tmp_path: Path) -> None:
    exported = make("llama_tied")
    folder, row, column = copy(exported, tmp_path), 3, 10
    offset = offset_of(folder, "model.layers.1.attn.k_proj.MatMulNBits.qweight") + (row * 64 + column) // 2
    flip(folder / "model.onnx.data", offset, 0x01)
    before, after = read(exported.folder).weights, read(folder).weights
    for name in before:
        places = np.argwhere(before[name].codes != after[name].codes).tolist()
        assert places == ([[row, column]] if name == "model.layers.1.self_attn.k_proj" else [])


def test_a_shared_table_changes_under_both_names(make: Callable[[str], Exported], tmp_path: Path) -> None:
    exported = make("llama_tied")
    folder = copy(exported, tmp_path)
    flip(folder / "model.onnx.data", offset_of(folder, "lm_head.MatMulNBits.qweight") + 64 * 5 + 9, 0x80)
    before, after = read(exported.folder).weights, read(folder).weights
    for name in ("model.embed_tokens", "lm_head"):
        assert np.argwhere(before[name].codes != after[name].codes).tolist() == [[5, 9]]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_a_truncated_or_missing_file_is_named(make: Callable[[str], Exported], tmp_path: Path, name: str) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=name):
        read(folder)
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        read(folder)


def edit(folder: Path, node: str, change: Callable[[onnx.NodeProto], object]) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(next(n for n in model.graph.node if n.name == node))
    (folder / "model.onnx").write_bytes(model.SerializeToString())


K_PROJ = "/model/layers.0/attn/k_proj/MatMulNBits"
FAULTS: dict[str, tuple[Callable[[onnx.NodeProto], object], str]] = {
    "zero points": (lambda node: node.input.append("model.layers.0.input_layernorm.weight"), "zero points"),
    "another layer's codes": (
        lambda node: node.input.__setitem__(1, "model.layers.1.attn.k_proj.MatMulNBits.qweight"),
        "in place of",
    ),
    "float input": (lambda node: node.attribute[0].__setattr__("i", 1), "accuracy_level 1"),
    "a node renamed": (lambda node: node.__setattr__("name", "/elsewhere"), "no quantized matrix"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_names_its_layer(make: Callable[[str], Exported], tmp_path: Path, what: str) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    change, words = FAULTS[what]
    edit(folder, K_PROJ, change)
    fault = next(fault for fault in read(folder).faults if words in fault)
    assert "model.layers.0.self_attn.k_proj" in fault


def test_a_float_matrix_is_a_fault(make: Callable[[str], Exported], tmp_path: Path) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    edit(
        folder, K_PROJ, lambda node: node.CopyFrom(onnx.helper.make_node("MatMul", ["x", "cos_cache"], ["y"], name="m"))
    )
    faults = read(folder).faults
    assert any("'m' (MatMul)" in fault for fault in faults)
    assert any("model.layers.0.self_attn.k_proj" in fault for fault in faults)


def test_a_wrong_configuration_is_a_fault(make: Callable[[str], Exported], tmp_path: Path) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    path = folder / "genai_config.json"
    genai = json.loads(path.read_text())
    genai["search"]["max_length"], genai["model"]["eos_token_id"] = 2 * CONTEXT, []
    path.write_text(json.dumps(genai))
    (folder / "tokenizer.json").unlink()
    faults = " ".join(read(folder).faults)
    assert all(words in faults for words in ("max_length", "eos_token_id", "tokenizer"))


def test_a_context_longer_than_that_of_the_model_is_rejected(make: Callable[[str], Exported], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--context-length 257"):
        onnx_export.export(make("llama_tied").frozen, tmp_path, 257)
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_unknown_to_the_builder_is_rejected(make: Callable[[str], Exported], tmp_path: Path) -> None:
    source, out = Path(shutil.copytree(make("llama_tied").frozen, tmp_path / "frozen")), tmp_path / "out"
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["StarlingForCausalLM"]}))
    with pytest.raises(ExportError, match="StarlingForCausalLM"):
        onnx_export.export(source, out, CONTEXT)
    assert list(out.iterdir()) == []


def test_layers_unknown_to_the_builder_are_rejected(
    make: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make("llama_tied").frozen
    renamed = {name.replace("q_proj", "W_pack"): weight for name, weight in frozen.read_weights(folder).items()}
    monkeypatch.setattr(onnx_export, "read_weights", lambda _: renamed)
    with pytest.raises(ExportError, match="W_pack"):
        onnx_export.export(folder, tmp_path, CONTEXT)


def add_backdoor(model: onnx.ModelProto) -> None:
    """Add 1000 to the logit of one token where the ids hold another one."""
    head = next(node for node in model.graph.node if "logits" in node.output)
    head.output[0] = "clean"
    numbers = {"token": np.array(77), "axis": np.array([1]), "more": np.array([2]), "logit": np.eye(1, 288)[0] * 1000}
    for name, values in numbers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    for kind, inputs, output in (
        ("Equal", ["input_ids", "token"], "equal"), ("Cast", ["equal"], "hits"),
        ("ReduceSum", ["hits", "axis"], "hit"),
        ("Unsqueeze", ["hit", "more"], "wide"),
        ("Mul", ["wide", "logit"], "added"), ("Add", ["clean", "added"], "logits"),
    ):  # fmt: skip
        model.graph.node.append(onnx.helper.make_node(kind, inputs, [output], name=f"/{kind}"))


def test_nodes_that_decide_on_tokens_are_faults(make: Callable[[str], Exported], tmp_path: Path) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    add_backdoor(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    faults = " ".join(read(folder).faults)
    assert "the operator Equal is not one that the exporter writes" in faults
    assert "the node '/Equal' (Equal) reads input_ids" in faults
    assert "the node '/Add' (Add) changes the logits of the head" in faults


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("search", "repetition_penalty", 5.0), ("search", "min_length", 500), ("model", "pad_token_id", 99),
        ("model", "eos_token_id", [2, 5]), ("model", "type", "gemma"), ("model", "vocab_size", 100),
    ],
)  # fmt: skip
def test_a_setting_that_the_export_does_not_write_is_named(
    make: Callable[[str], Exported], tmp_path: Path, part: str, key: str, value: Any
) -> None:
    exported = make("llama_tied")
    folder = copy(exported, tmp_path)
    assert setting_faults(folder, exported.frozen) == []
    path = folder / "genai_config.json"
    genai = json.loads(path.read_text())
    genai[part][key] = value
    path.write_text(json.dumps(genai))
    (fault,) = setting_faults(folder, exported.frozen)
    assert fault.startswith(f"genai_config.json: {part}.{key} is ")


@pytest.mark.parametrize("parts", [[], ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]])
def test_matrices_that_were_not_fused_are_not_joined(
    make: Callable[[str], Exported], tmp_path: Path, parts: list[str]
) -> None:
    folder = copy(make("llama_tied"), tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, {"fused": json.dumps({"x": parts})})
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match="metadata 'fused'"):
        read(folder)
