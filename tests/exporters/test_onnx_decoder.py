"""Decoders that onnxruntime-genai's builder does not know, traced from their own code into an ONNX folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import onnxruntime_genai
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from safetensors.torch import save_file
from tiny import CONTEXT, SIZES, TinyExport, export_to, freeze, llama, sqnr
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    GPTNeoXConfig,
    Ministral3Config,
    Olmo2Config,
    OPTConfig,
    PretrainedConfig,
)

from qat_edge.diagnose import parity
from qat_edge.diagnose.parity import FrozenReference
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.quant import frozen, scheme
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.onnx import decoder_graph, decoder_support, export_decoder, onnx_support, onnx_target
from qat_edge_exporters.onnx.onnx_diagnosis import diagnose_onnx
from qat_edge_exporters.targets import target_named

TARGET = target_named("onnx")
LEAST_DB = 100  # with float activations: what onnxruntime computes on x86 rounds them by block
# Norms behind the layers; windows, layers without rotary embeddings and scaled logits; a head under another name and
# layer norms with biases; a float table of positions; queries that grow with the position; a shared table.
SCALED = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], dict[str, Any]]] = {
    "olmo2": (lambda: Olmo2Config(**SIZES), {}),
    "cohere2": (
        lambda: Cohere2Config(
            **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"], logit_scale=0.0625
        ),
        {"bits": {"model.layers.0.mlp.up_proj": 8}},
    ),
    "gpt_neox": (lambda: GPTNeoXConfig(**{**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2}), {}),
    "opt": (
        lambda: OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, do_layer_norm_before=True),
        {},
    ),
    "ministral3": (lambda: Ministral3Config(**SIZES, head_dim=16, rope_parameters=SCALED), {}),
    "tied": (lambda: Olmo2Config(**{**SIZES, "tie_word_embeddings": True}), {"table_bits": (4, 4)}),
}


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyExport]:
    """Return a function that exports one of FAMILIES by name, once."""
    made: dict[str, TinyExport] = {}

    def make_one(name: str) -> TinyExport:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            config, given = FAMILIES[name]
            freeze(config(), 32, root / "frozen", **given)
            made[name] = export_to("onnx", root / "frozen", root / "export")
        return made[name]

    return make_one


@pytest.fixture
def copy(make: Callable[[str], TinyExport], tmp_path: Path) -> TinyExport:
    """A copy of the folder of `olmo2`, to be damaged."""
    exported = make("olmo2")
    return TinyExport(exported.frozen, Path(shutil.copytree(exported.folder, tmp_path / "export")), [])


@contextmanager
def edited(folder: Path) -> Iterator[onnx.ModelProto]:
    """Yield the graph of a folder, and write it back; tensors stay in the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    yield model
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def faults_of(exported: TinyExport) -> list[str]:
    return verify_folder(exported.folder, "onnx", exported.frozen).faults


def logits_of(folder: Path, ids: torch.Tensor, prompt: int) -> NDArray[np.float32]:
    """Return logits of all tokens with float activations: a prompt at once, then one token at a time."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    cache = {
        given.name: np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
        for given in session.get_inputs()
        if given.name.startswith("past_key_values.")
    }
    rows = []
    for end in range(prompt, ids.shape[1] + 1):
        begin = 0 if end == prompt else end - 1
        feeds = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end)[None],
        }
        found = dict(zip(names, session.run(names, feeds | cache), strict=True))
        rows.append(found.pop("logits")[0])
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    return np.concatenate(rows)


# --- what it computes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_builder_does_not_know_them(name: str) -> None:
    config = FAMILIES[name][0]()
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    assert "builder does not know" in onnx_support.missing(config)
    assert onnx_target.missing(config) == ""


@pytest.mark.parametrize("name", FAMILIES)
def test_the_graph_computes_the_frozen_model(make: Callable[[str], TinyExport], name: str) -> None:
    exported = make(name)
    ids = torch.randint(3, 250, (1, 23), generator=torch.Generator().manual_seed(1))
    model = frozen.load(exported.frozen)
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "activation_quantization"):  # torchao then rounds no inputs
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    with torch.no_grad():
        wanted = model(ids).logits[0]
    found = torch.from_numpy(logits_of(exported.folder, ids, prompt=17))
    assert sqnr(wanted, found) > LEAST_DB


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_and_norm_is_read_back(make: Callable[[str], TinyExport], name: str) -> None:
    exported = make(name)
    result = verify_folder(exported.folder, "onnx", exported.frozen)
    assert result.faults == []
    assert result.linears_equal == result.linears > 0 and result.embedding_equal and result.head_equal
    assert result.floats_equal == result.floats and result.floats


@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_genai_loads_the_folder_unchanged(make: Callable[[str], TinyExport], name: str) -> None:
    exported = make(name)
    prompt = [5, 9, 60, 61, 62, 77, 78]
    model = onnxruntime_genai.Model(str(exported.folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + 6, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    first = np.array(generator.get_logits())[0, -1]
    generator.generate_next_token()
    assert int(generator.get_next_tokens()[0]) == int(first.argmax())

    measured = parity.measure(exported.folder, "onnx", FrozenReference(exported.frozen), CONTEXT)
    assert not measured.fault and not measured.not_measured


def test_a_shared_table_is_stored_once(make: Callable[[str], TinyExport]) -> None:
    shared, apart = TARGET.read(make("tied").folder), TARGET.read(make("olmo2").folder)
    assert shared.size_bytes["head"] == 0 and shared.size_bytes["embedding"] > 0
    assert apart.size_bytes["head"] > 0


@pytest.mark.parametrize("levels", ["seq", "integer"])
def test_two_bits_keep_their_levels(levels: str, tmp_path: Path) -> None:

    freeze(Olmo2Config(**SIZES), 32, tmp_path / "frozen", codes=scheme.LinearCodes(2, levels))
    exported = export_to("onnx", tmp_path / "frozen", tmp_path / "export")
    assert faults_of(exported) == []
    ids = torch.randint(3, 250, (1, 9), generator=torch.Generator().manual_seed(1))
    measured = parity.measure(exported.folder, "onnx", FrozenReference(exported.frozen), CONTEXT)
    assert not measured.fault and np.isfinite(logits_of(exported.folder, ids, 5)).all()


def test_a_rotated_norm_is_a_constant_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Llama can be rotated and has a builder; its own code becomes a graph as well.
    frozen_model = freeze(llama(), 32, tmp_path / "frozen", rotated=True)
    assert any("turn" in name for name in frozen.read_floats(tmp_path / "frozen")) and frozen_model is not None
    folder = tmp_path / "export"
    folder.mkdir()
    export_decoder.export(tmp_path / "frozen", folder, CONTEXT)
    monkeypatch.setattr(onnx_support, "missing", lambda config: "no builder.")
    assert faults_of(TinyExport(tmp_path / "frozen", folder, [])) == []
    with edited(folder) as model:
        name = next(each.name for each in model.graph.initializer if each.name.endswith(".turn"))
        for node in model.graph.node:
            for index, read in enumerate(node.input):
                node.input[index] = "other" if read == name else read
        next(each for each in model.graph.initializer if each.name == name).name = "other"
    assert any("other" in fault for fault in faults_of(TinyExport(tmp_path / "frozen", folder, [])))


# --- faults that are found ----------------------------------------------------------------------------------


def _add(model: onnx.ModelProto, position: int, *nodes: onnx.NodeProto) -> None:
    for offset, node in enumerate(nodes):
        model.graph.node.insert(position + offset, node)


def test_a_node_that_reads_ids_is_found(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        _add(
            model, 0, helper.make_node("Cast", ["input_ids"], ["float_ids"], name="trigger", to=onnx.TensorProto.FLOAT)
        )
    assert any("'trigger' (Cast) reads input_ids" in fault for fault in faults_of(copy))


@pytest.mark.parametrize(
    ("value", "fault"),
    [("attention_mask", "reads attention_mask"), ("past_key_values.0.key", "reads the cache")],
)
def test_a_node_that_reads_mask_or_cache_is_found(copy: TinyExport, value: str, fault: str) -> None:
    with edited(copy.folder) as model:
        _add(model, 0, helper.make_node("Abs", [value], ["seen"], name="trigger"))
    assert any(f"'trigger' (Abs) {fault}" in found for found in faults_of(copy))


def test_an_operator_that_compares_is_found(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        logits = next(node for node in model.graph.node if "logits" in node.output)
        logits.output[0] = "own_logits"
        _add(
            model, len(model.graph.node), helper.make_node("Max", ["own_logits", "own_logits"], ["logits"], name="last")
        )
    assert any("its logits are not those of the head" in fault for fault in faults_of(copy))


def test_a_changed_attribute_of_attention_shows_when_it_runs(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        next(each for each in node.attribute if each.name == "scale").f *= 3
    measured = parity.measure(copy.folder, "onnx", FrozenReference(copy.frozen), CONTEXT)
    assert measured.fault


def test_a_changed_code_norm_and_frequency_are_named(copy: TinyExport) -> None:
    for name in ("model.layers.1.mlp.up_proj.MatMulNBits.qweight", "model.norm.weight", "model.rotary_emb.inv_freq"):
        folder = Path(shutil.copytree(copy.folder, copy.folder.with_name(name)))
        with edited(folder) as model:
            stored = next(each for each in model.graph.initializer if each.name == name)
            info = {entry.key: entry.value for entry in stored.external_data}
        with (folder / "model.onnx.data").open("r+b") as file:
            file.seek(int(info["offset"]) + 4)
            byte = file.read(1)
            file.seek(int(info["offset"]) + 4)
            file.write(bytes([byte[0] ^ 0x21]))
        faults = faults_of(TinyExport(copy.frozen, folder, []))
        module = name.removesuffix(".MatMulNBits.qweight")
        assert any(module in fault for fault in faults), (name, faults)


def test_a_folder_of_the_builder_is_not_taken_for_it(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        del model.metadata_props[:]
    text = "the files of a decoder of onnxruntime-genai's builder, but the export of this checkpoint writes"
    assert any(text in fault for fault in faults_of(copy))


def test_settings_of_the_runtime_are_compared(copy: TinyExport) -> None:
    path = copy.folder / "genai_config.json"
    document = json.loads(path.read_text())
    document["model"]["decoder"]["head_size"] = 8
    path.write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="head_size"):
        TARGET.held_options(copy.folder)
    assert any("model.decoder.head_size is 8, the export writes 16" in fault for fault in faults_of(copy))


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:

    AutoModelForCausalLM.from_config(Olmo2Config(**SIZES)).save_pretrained(tmp_path / "float")
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="holds float weights, and a graph traced from the model's code holds codes"):
        export_decoder.export(tmp_path / "float", tmp_path / "out", CONTEXT)


def test_an_unknown_argument_of_attention_is_refused(
    make: Callable[[str], TinyExport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = decoder_graph.CachedAttention.attend

    def with_sinks(self: Any, module: Any, *args: Any, **extras: Any) -> Any:
        return attend(self, module, *args, **extras, s_aux=torch.zeros(4))

    monkeypatch.setattr(decoder_graph.CachedAttention, "attend", with_sinks)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        ExportError, match="attends with s_aux, which onnxruntime's GroupQueryAttention does not compute"
    ):
        export_decoder.export(make("olmo2").frozen, tmp_path / "out", CONTEXT)


def test_layers_without_a_cache_are_named() -> None:
    config = Olmo2Config(**SIZES)
    config.layer_types = ["conv", "full_attention"]
    assert decoder_support.missing(config) == "layers of type conv have no plain key-value cache."


def test_inputs_and_outputs_of_matrices_can_be_observed(make: Callable[[str], TinyExport], tmp_path: Path) -> None:
    exported = make("olmo2")
    exposed = TARGET.expose_outputs(exported.folder, tmp_path)
    assert len(exposed.places) == 2 * 7 + 1 and "model.layers.1.mlp.down_proj" in exposed.places
    # onnxruntime follows no symbolic link out of a folder.
    (tmp_path / "model.onnx.data").unlink()
    shutil.copyfile(exported.folder / "model.onnx.data", tmp_path / "model.onnx.data")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    wanted = {name for before, after in exposed.places.values() for name in (before, *after)}
    assert wanted <= {output.name for output in session.get_outputs()}


# --- unmerged adapters --------------------------------------------------------------------------------------


def test_an_adapter_ships_next_to_the_traced_base(make: Callable[[str], TinyExport], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(make("olmo2").frozen, tmp_path / "frozen"))
    write_adapter(checkpoint, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], rank=3)
    exported = export_to("onnx", checkpoint, tmp_path / "export")
    result = verify_folder(exported.folder, "onnx", checkpoint)
    assert result.faults == [] and result.adapter == result.adapter_equal == 4
    measured = parity.measure(exported.folder, "onnx", FrozenReference(checkpoint), CONTEXT)
    assert not measured.fault and not measured.not_measured

    assert diagnose_onnx(exported.folder / "model.onnx", ["onnxruntime"]).faults == []

    # Another adapter of the same layers has the same base.
    write_adapter(checkpoint, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], rank=5)
    other = export_to("onnx", checkpoint, tmp_path / "other")
    for name in ("model.onnx", "model.onnx.data"):
        assert (exported.folder / name).read_bytes() == (other.folder / name).read_bytes()
    shutil.copyfile(other.folder / "adapter.onnx_adapter", exported.folder / "adapter.onnx_adapter")
    assert verify_folder(exported.folder, "onnx", checkpoint).faults == []

    damaged = (other.folder / "adapter.onnx_adapter").read_bytes()[:400]
    (exported.folder / "adapter.onnx_adapter").write_bytes(damaged)
    assert any(
        "onnx_adapter" in fault for fault in diagnose_onnx(exported.folder / "model.onnx", ["onnxruntime"]).faults
    )


def write_adapter(checkpoint: Path, modules: list[str], rank: int) -> None:
    """Write a random adapter of these layers, as peft saves it."""
    weights, folder = frozen.read_weights(checkpoint), checkpoint / "adapter"
    generator = torch.Generator().manual_seed(rank)
    tensors = {}
    for module in modules:
        rows, width = weights[module].codes.shape
        for part, shape in (("lora_A", (rank, width)), ("lora_B", (rows, rank))):
            tensors[f"base_model.model.{module}.{part}.weight"] = torch.randn(shape, generator=generator) * 0.2
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    document = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "value"),
    [("local_window_size", 40), ("softcap", 50.0), ("scale", 0.26), ("num_heads", 2), ("smooth_softmax", 1)],
)
def test_numbers_of_attention_are_compared_with_the_code_of_the_model(
    copy: TinyExport, name: str, value: float
) -> None:
    # A window of 40 tokens hides nothing of the prompts that verify runs.
    with edited(copy.folder) as model:
        node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        kept = [each for each in node.attribute if each.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])
    assert any("GroupQueryAttention) has" in fault and name in fault for fault in faults_of(copy))


def test_limits_of_positions_and_mask_are_found(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        limit = onnx.numpy_helper.from_array(np.array(100, np.int64), "limit")
        model.graph.initializer.append(limit)
        for name in ("position_ids", "attention_mask"):
            for node in model.graph.node:
                for index, read in enumerate(node.input):
                    node.input[index] = f"limited_{name}" if read == name else read
            _add(model, 0, helper.make_node("Min", [name, "limit"], [f"limited_{name}"], name=f"limit_{name}"))
    faults = faults_of(copy)
    for name in ("position_ids", "attention_mask"):
        assert any(f"'limit_{name}' (Min) reads {name}" in fault for fault in faults)


def change_constant(model: onnx.ModelProto, old: float, new: float) -> None:
    """Change the one constant of the graph that has a value."""
    (found,) = (each for each in model.graph.initializer if _is_scalar(each, old))
    found.CopyFrom(onnx.numpy_helper.from_array(np.full(found.dims, new, np.float32), found.name))


def _is_scalar(tensor: onnx.TensorProto, value: float) -> bool:
    if tensor.external_data or tensor.data_type != onnx.TensorProto.FLOAT:
        return False
    array = onnx.numpy_helper.to_array(tensor)
    return bool(array.size == 1 and np.isclose(array, value).all())


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            16384.0,
            64.0,
            "llama_4_scaling_beta 0.1 and original_max_position_embeddings 64, and the model",
        ),
        (0.1, 0.2, "llama_4_scaling_beta 0.2 and original_max_position_embeddings 16384, and the model's"),
    ],
)
def test_the_factor_of_queries_is_compared(
    make: Callable[[str], TinyExport], tmp_path: Path, old: float, new: float, fault: str
) -> None:
    # No prompt that verify runs is as long as 16384 tokens.
    made = make("ministral3")
    changed = TinyExport(made.frozen, Path(shutil.copytree(made.folder, tmp_path / "export")), [])
    with edited(changed.folder) as model:
        change_constant(model, old, new)
    (found,) = faults_of(changed)
    assert "(Floor) has the factor of" in found and fault in found


def test_other_floors_and_logarithms_are_named(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        last = next(node for node in model.graph.node if node.output[0] == "logits")
        value = last.input[0]
        last.input[0] = "changed"
        index = list(model.graph.node).index(last)
        _add(model, index, helper.make_node("Floor", ["logarithm"], ["changed"], name="floor"))
        _add(model, index, helper.make_node("Log", [value], ["logarithm"], name="log"))
    faults = "\n".join(faults_of(copy))
    assert "'floor' (Floor) is no part of a factor of queries that the exporter writes." in faults
    assert "the value 'logarithm' (Log) is no part of a factor of queries." in faults


def test_an_activation_that_compares_is_refused() -> None:
    sentence = decoder_support.missing(ApertusConfig(**SIZES))
    assert sentence == "its activation function xielu compares values, and verify accepts no graph that does."
