"""ONNX exports of a base and an unmerged adapter: two parts, each proven alone, loaded by both runtimes unchanged."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PretrainedConfig

from conftest import make_tokenizer
from qat_edge.data.conversation import Prompt
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.evaluate.reference import load_exact
from qat_edge.manifest import write_manifest
from qat_edge.quant import frozen, scheme
from qat_edge.quant.frozen_adapters import ADAPTER, read_adapters
from qat_edge.verbs.verify import require_equal, verify_folder
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.agent import active_adapter
from qat_edge_exporters.onnx import adapter_format, names
from qat_edge_exporters.onnx.matrix_outputs import expose
from qat_edge_exporters.onnx.onnx_reader import read
from qat_edge_exporters.targets import target_named
from tests.docs.doc_pages import code_blocks

CONTEXT = 64
LAYERS = 14  # linear layers, which all have an adapter
UP = "model.layers.0.mlp.up_proj"
UP_A, UP_B = "model.layers.0.mlp.up_proj.lora_A.MatMul.weight", "model.layers.0.mlp.up_proj.lora_B.MatMul.weight"
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
IDS = [3, 40, 77, 120, 9, 250, 31, 64, 5, 18, 200, 4]


def llama() -> PretrainedConfig:
    return LlamaConfig(**SIZES, tie_word_embeddings=True)


@dataclass(frozen=True)
class Pair:
    """A frozen checkpoint with an adapter, and its ONNX folder."""

    checkpoint: Path
    folder: Path


def save_adapter(
    config: PretrainedConfig, folder: Path, rank: int, seed: int, layers: str | list[str] = "all-linear"
) -> None:
    """Save random adapters on linear layers, large enough to change the output; "all-linear" excludes the head."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=rank, lora_alpha=6, target_modules=layers)
    adapted = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder, save_embedding_layers=False)


def freeze(config: PretrainedConfig, folder: Path, codes: scheme.LinearCodes = scheme.INT4) -> None:
    """Write a frozen checkpoint of random weights."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    chosen = scheme.choose_scheme(model, 32, None, (8, 8), codes)
    frozen.freeze(model, chosen)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(chosen))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """Return a function that exports a checkpoint by name, once. All are of the same frozen base."""
    root = tmp_path_factory.mktemp("pairs")
    ranks = {"base": 0, "rank4": 4, "rank7": 7}

    def export_one(name: str) -> Pair:
        pair = Pair(root / name / "checkpoint", root / name / "onnx")
        if not pair.folder.is_dir():
            freeze(llama(), pair.checkpoint)
            if ranks[name]:
                save_adapter(llama(), pair.checkpoint / ADAPTER, ranks[name], seed=ranks[name])
            pair.folder.mkdir()
            target_named("onnx").export(pair.checkpoint, pair.folder, CONTEXT)
        return pair

    return export_one


@pytest.fixture(scope="module")
def pair(export: Callable[[str], Pair]) -> Pair:
    return export("rank4")


@pytest.fixture
def folder(pair: Pair, tmp_path: Path) -> Path:
    """A copy of the exported folder that a test may damage."""
    return Path(shutil.copytree(pair.folder, tmp_path / "onnx"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != names.ADAPTER_FILE}


def run(folder: Path, ids: Sequence[int] = IDS) -> NDArray[np.float32]:
    """Return the logits (tokens, vocabulary) of an artifact in the agent, with the folder's adapter if it has one."""
    with closing(open_transport("local")) as transport:
        runtime = open_runtime("onnx", transport, 1)
        runtime.prepare(folder)
        # The file of a sequence is deleted when the next one is taken.
        found: list[NDArray[np.float32]] = [np.load(scored.logits) for scored in runtime.score([list(ids)])]
    return found[0]


def load_base(checkpoint: Path) -> Any:
    """Load a checkpoint without its adapter."""
    with TemporaryDirectory() as name:
        folder = Path(shutil.copytree(checkpoint, Path(name) / "base", ignore=shutil.ignore_patterns(ADAPTER)))
        return load_exact(folder)


def emulated(checkpoint: Path, scaling: float) -> NDArray[np.float32]:
    """Return torch's logits of fq(W) x + s B (A x), computed with hooks and without the exporters' code."""
    model: Any = load_base(checkpoint)
    tensors = load_file(checkpoint / ADAPTER / "adapter_model.safetensors")
    inputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        down, up = (tensors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "AB")
        if down is None or up is None:
            continue

        def keep(_: Any, args: Any, name: str = name) -> None:
            inputs[name] = args[0]

        def add(_: Any, args: Any, y: Tensor, name: str = name, a: Tensor = down, b: Tensor = up) -> Tensor:
            return y + scaling * (inputs[name] @ a.T) @ b.T

        # Before the hook that rounds the input of a frozen layer: an adapter gets it unrounded.
        module.register_forward_pre_hook(keep, prepend=True)
        module.register_forward_hook(add)
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.tensor([IDS])).logits[0].numpy()
    return logits


def sqnr(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the signal-to-noise ratio in dB."""
    return float(10 * np.log10(np.square(wanted).sum() / max(np.square(wanted - found).sum(), 1e-30)))


def test_the_agent_has_the_same_name_of_the_file() -> None:
    assert active_adapter.ADAPTER_FILE == names.ADAPTER_FILE


# --- the two parts ---------------------------------------------------------------------------------------------


def test_adapters_of_any_rank_have_the_same_base_files(export: Callable[[str], Pair]) -> None:
    one, other = export("rank4").folder, export("rank7").folder
    assert files(one) == files(other)
    adapters = [(folder / names.ADAPTER_FILE).read_bytes() for folder in (one, other)]
    assert adapters[0] != adapters[1]


def test_the_base_alone_computes_what_an_export_without_adapter_does(
    export: Callable[[str], Pair], folder: Path
) -> None:
    with_adapter = run(folder)
    (folder / names.ADAPTER_FILE).unlink()
    np.testing.assert_array_equal(run(folder), run(export("base").folder), strict=True)
    assert sqnr(run(folder), with_adapter) < 20, "the adapter changes the function"


@pytest.mark.parametrize(("name", "rank"), [("rank4", 4), ("rank7", 7)])
def test_base_and_adapter_compute_the_emulation(name: str, rank: int, export: Callable[[str], Pair]) -> None:
    made = export(name)
    # onnxruntime on x86 rounds activations per block, torch per token.
    assert sqnr(emulated(made.checkpoint, 6 / rank), run(made.folder)) > 25


def test_an_adapter_runs_on_the_base_files_of_another(export: Callable[[str], Pair], folder: Path) -> None:
    other = export("rank7").folder
    shutil.copy(other / names.ADAPTER_FILE, folder / names.ADAPTER_FILE)
    np.testing.assert_array_equal(run(folder), run(other), strict=True)


def test_the_adapter_file_depends_on_its_matrices_alone(pair: Pair, tmp_path: Path) -> None:
    written = (pair.folder / names.ADAPTER_FILE).read_bytes()
    parameters = adapter_format.read(pair.folder / names.ADAPTER_FILE)
    assert len(parameters) == 2 * LAYERS
    adapter_format.write(tmp_path / "again", dict(reversed(parameters.items())))
    assert (tmp_path / "again").read_bytes() == written


# --- in software that is not ours, by the commands of the guide ---------------------------------------------------


def run_block(title: str, folder: Path, work: Path) -> dict[str, Any]:
    """Run a block of the guide in a folder where `folder` is the export; return its variables."""
    (block,) = [each for each in code_blocks("python") if each.title == title]
    assert block.page.name == "apps.md"
    (work / "runs/mine/exports").mkdir(parents=True)
    (work / "runs/mine/exports/onnx").symlink_to(folder)
    variables: dict[str, Any] = {"__name__": "documentation"}
    with contextlib.chdir(work):
        exec(compile(block.code, block.name, "exec"), variables)
    return variables


def test_the_guide_loads_both_parts_in_onnxruntime(pair: Pair, tmp_path: Path) -> None:
    found = run_block("onnxruntime", pair.folder, tmp_path)
    np.testing.assert_array_equal(found["logits"][0], run(pair.folder, found["ids"][0].tolist()))
    assert sqnr(found["base_logits"], found["logits"]) < 20


def test_the_guide_loads_both_parts_in_onnxruntime_genai(pair: Pair, tmp_path: Path) -> None:
    found = run_block("onnxruntime-genai", pair.folder, tmp_path)
    ids = found["generator"].get_sequence(0).tolist()
    prompt = found["tokenizer"].encode("Hello").tolist()
    assert ids[: len(prompt)] == prompt and len(ids) > len(prompt)
    # Greedily, so that each id is the most likely one with the adapter.
    assert run(pair.folder, ids)[len(prompt) - 1 : -1].argmax(1).tolist() == ids[len(prompt) :]


# --- in ours -----------------------------------------------------------------------------------------------------


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt by the most likely ids, reading the whole text each time."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(run(folder, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_generated_text_is_that_of_the_adapter(pair: Pair, folder: Path) -> None:
    (folder / names.ADAPTER_FILE).unlink()
    tokenizer, texts = make_tokenizer(), {}
    for name, each in {"pair": pair.folder, "base": folder}.items():
        pieces: list[str] = []
        with target_named("onnx").open_generator(each, tokenizer) as generator:
            for _ in range(2):  # the second turn begins from the cache of the first
                generator.generate(Prompt("hi", tokenizer.encode("hi")), pieces.append, 4)
        expected = tokenizer.decode(greedy(each, tokenizer.encode("hi"), 4))
        assert "".join(pieces) == 2 * expected
        texts[name] = expected
    assert texts["pair"] != texts["base"]


def test_the_agent_uses_the_adapter_of_the_artifact_that_was_sent_last(pair: Pair, folder: Path) -> None:
    """Files of earlier artifacts stay in the work folder, an adapter too."""
    (folder / names.ADAPTER_FILE).unlink()
    prompt = make_tokenizer().encode("hi")
    expected = {each: greedy(each, prompt, 3) for each in (pair.folder, folder)}
    assert expected[pair.folder] != expected[folder]
    with closing(open_transport("local")) as transport:
        runtime = open_runtime("onnx", transport, 1)
        for each in (pair.folder, folder, pair.folder):
            runtime.prepare(each)
            generated = runtime.generate([prompt], [2], 3)  # in onnxruntime-genai, since there is an end token
            assert generated.load.runtime == "onnxruntime-genai"
            assert list(generated.completions[0].ids) == expected[each]
            assert list(runtime.generate([prompt], [], 3).completions[0].ids) == expected[each]  # in onnxruntime
        assert runtime.speed(4, 2, 1).step_ms


def test_outputs_of_layers_have_the_adapter_in_them(pair: Pair, tmp_path: Path) -> None:
    exposed = expose(pair.folder, tmp_path)
    with closing(open_transport("local")) as transport:
        runtime = open_runtime("onnx", transport, 1)
        runtime.prepare(tmp_path)
        for traced in runtime.trace([IDS], 6):
            with np.load(traced.outputs) as arrays:
                values = dict(zip(traced.names, arrays.values(), strict=True))
    passages = exposed.passages(values)
    model: Any = load_base(pair.checkpoint)
    for name, adapter in read_adapters(pair.checkpoint).items():
        inputs, outputs = passages[name].inputs, passages[name].outputs
        assert inputs is not None and outputs is not None
        x = torch.from_numpy(inputs)
        with torch.no_grad():
            base = model.get_submodule(name)(x)
        assert sqnr((base + x @ adapter.down.T @ adapter.up.T).numpy(), outputs) > 25 > sqnr(base.numpy(), outputs)


# --- verify ------------------------------------------------------------------------------------------------------


def test_verify_compares_base_and_adapter_bit_for_bit(pair: Pair) -> None:
    result = verify_folder(pair.folder, "onnx", pair.checkpoint)
    require_equal([result])
    assert (result.linears_equal, result.adapter, result.adapter_equal) == (LAYERS, 2 * LAYERS, 2 * LAYERS)
    assert "5 of 5 norms and biases equal, adapter: 28 of 28 matrices equal;" in result.describe()


def test_a_base_has_no_line_about_adapters(export: Callable[[str], Pair]) -> None:
    made = export("base")
    result = verify_folder(made.folder, "onnx", made.checkpoint)
    assert result.faults == [] and result.adapter == 0 and "adapter" not in result.describe()


def test_sizes_have_the_adapter_as_a_part(export: Callable[[str], Pair]) -> None:
    for name in ("base", "rank4"):
        folder = export(name).folder
        sizes = read(folder).size_bytes
        assert sum(sizes.values()) == sum(path.stat().st_size for path in folder.iterdir())
        has_file = (folder / names.ADAPTER_FILE).is_file()
        assert sizes.get("adapter") == ((folder / names.ADAPTER_FILE).stat().st_size if has_file else None)


Parameters = dict[str, NDArray[np.float32]]


def changed(values: NDArray[np.float32], number: float) -> NDArray[np.float32]:
    copy = np.array(values)
    copy[1, 2] = number
    return copy


DAMAGES: dict[str, tuple[Callable[[Parameters], object], str, int]] = {
    "missing": (lambda p: p.pop(UP_B), rf"no parameter '{UP_B}', which model.onnx has an input for", 26),
    "extra": (lambda p: p.update({"more": p[UP_A]}), r"'more' is no input for an adapter of model.onnx", 28),
    "transposed": (lambda p: p.update({UP_A: p[UP_A].T}), rf"'{UP_A}' \(4, 64\) and '{UP_B}' \(4, 128\) are no", 27),
    "other rank": (lambda p: p.update({UP_A: p[UP_A][:, :3]}), r"\(64, 3\) and .* \(4, 128\) are no adapter", 27),
    "no rank": (
        lambda p: p.update({UP_A: p[UP_A][:, :0], UP_B: p[UP_B][:0]}),
        r"\(64, 0\) .* are no adapter of a layer with 64 inputs and 128 outputs",
        26,
    ),
    "not a number": (
        lambda p: p.update({UP_A: changed(p[UP_A], np.nan)}),
        rf"'{UP_A}' has numbers that are not f",
        27,
    ),
    "infinite": (lambda p: p.update({UP_B: changed(p[UP_B], -np.inf)}), rf"'{UP_B}' has numbers that are not f", 27),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parameters_are_named_and_not_run(damage: str, pair: Pair, folder: Path) -> None:
    change, pattern, equal = DAMAGES[damage]
    parameters = dict(adapter_format.read(folder / names.ADAPTER_FILE))
    change(parameters)
    adapter_format.write(folder / "new", parameters)
    (folder / "new").replace(folder / names.ADAPTER_FILE)
    result = verify_folder(folder, "onnx", pair.checkpoint)
    assert result.adapter_equal == equal and result.linears_equal == LAYERS
    with pytest.raises(ArtifactError, match=pattern):
        require_equal([result])
    with pytest.raises(ArtifactError, match=pattern):
        target_named("onnx").check(folder)


def test_one_changed_number_is_named(pair: Pair, folder: Path) -> None:
    parameters = dict(adapter_format.read(folder / names.ADAPTER_FILE))
    parameters[UP_B] = changed(parameters[UP_B], 0.5)
    (folder / names.ADAPTER_FILE).unlink()
    adapter_format.write(folder / names.ADAPTER_FILE, parameters)
    target_named("onnx").check(folder)  # it is a good adapter, of another training
    result = verify_folder(folder, "onnx", pair.checkpoint)
    assert result.adapter_equal == 2 * LAYERS - 1
    (fault,) = result.faults
    assert fault.startswith(
        f"{UP}, adapter s B: 1 of 512 numbers differ, first at row 2, column 1: 0.5 in the artifact"
    )


def test_another_adapter_and_none_are_named(export: Callable[[str], Pair], folder: Path) -> None:
    other = verify_folder(folder, "onnx", export("rank7").checkpoint)
    assert other.adapter_equal == 0 and "(4, 128) in the artifact, (7, 128) was trained" in other.faults[0]
    unadapted = verify_folder(folder, "onnx", export("base").checkpoint)
    assert "in the artifact's adapter, but not in the checkpoint's" in unadapted.faults[0]
    (folder / names.ADAPTER_FILE).unlink()
    gone = verify_folder(folder, "onnx", export("rank4").checkpoint)
    assert gone.adapter_equal == 0 and "adapter A: not in the artifact" in gone.faults[0]
    assert verify_folder(folder, "onnx", export("base").checkpoint).faults == []


def test_a_file_cut_anywhere_or_with_any_bit_flipped_is_read_or_refused(pair: Pair, tmp_path: Path) -> None:
    data, path = (pair.folder / names.ADAPTER_FILE).read_bytes(), tmp_path / "adapter"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        garbled = bytearray(data)
        # Offsets and sizes are at the beginning, and in front of each matrix.
        garbled[rng.integers(0, 2000 if rng.random() < 0.7 else len(data))] ^= 1 << rng.integers(0, 8)
        path.write_bytes(garbled)
        with contextlib.suppress(ArtifactError):
            adapter_format.read(path)
            continue
        refused += 1
    assert refused > 5
    for size in (0, 1, 4, 8, 100, len(data) // 2, len(data) - 64):
        path.write_bytes(data[:size])
        with pytest.raises(ArtifactError, match="no readable adapter of onnxruntime"):
            adapter_format.read(path)
    with pytest.raises(ArtifactError, match="missing"):
        adapter_format.read(tmp_path / "nothing")


def test_our_reader_finds_what_onnxruntime_does(pair: Pair) -> None:
    import onnxruntime

    path = pair.folder / names.ADAPTER_FILE
    theirs = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    ours = adapter_format.read(path)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value.numpy(), strict=True)


# --- graphs of somebody else -------------------------------------------------------------------------------------


@contextlib.contextmanager
def edited(folder: Path) -> Iterator[onnx.GraphProto]:
    """The graph of a folder, to be changed."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    yield model.graph
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(each for each in graph.node if each.name == name)


def read_input_elsewhere(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Mul", [UP_A, UP_A], ["squared"], name="spy"))


def return_product(graph: onnx.GraphProto) -> None:
    graph.output.append(onnx.ValueInfoProto(name="/model/layers.0/mlp/up_proj/lora_B/MatMul/output_0"))


def leave_product_out(graph: onnx.GraphProto) -> None:
    total = node(graph, "/model/layers.0/mlp/up_proj/lora/Add")
    total.input[1] = total.input[0]


def take_another_layer(graph: onnx.GraphProto) -> None:
    node(graph, "/model/layers.0/mlp/up_proj/lora_A/MatMul").input[0] = "/model/layers.0/attn/q_proj/lora/base"


def give_effect_by_default(graph: onnx.GraphProto) -> None:
    for name, shape in {UP_A: (64, 1), UP_B: (1, 128)}.items():
        tensor = next(each for each in graph.initializer if each.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))


def add_input_with_default(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("gain", onnx.TensorProto.FLOAT, [1]))
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "gain"))


def give_cache_a_default(graph: onnx.GraphProto) -> None:
    cache = onnx.numpy_helper.from_array(np.ones((1, 2, 1, 16), np.float32), "past_key_values.0.key")
    graph.initializer.append(cache)


GRAPHS: dict[str, tuple[Callable[[onnx.GraphProto], None], str]] = {
    "read elsewhere": (read_input_elsewhere, f"{UP}: the inputs for its adapter reach something else"),
    "returned": (return_product, f"{UP}: the inputs for its adapter reach something else"),
    "left out": (leave_product_out, f"{UP}: the inputs for its adapter reach something else"),
    "another layer's input": (take_another_layer, f"{UP}: the inputs for its adapter reach something else"),
    "an effect by default": (give_effect_by_default, f"{UP}: the inputs for its adapter have no default of rank 0"),
    "input with a default": (add_input_with_default, "the input 'gain' is not one that the exporter writes"),
    "cache with a default": (give_cache_a_default, "the input 'past_key_values.0.key' has a default, which only ad"),
}


@pytest.mark.parametrize("change", GRAPHS)
def test_graphs_that_use_such_inputs_otherwise_are_faults(change: str, pair: Pair, folder: Path) -> None:
    edit, sentence = GRAPHS[change]
    with edited(folder) as graph:
        edit(graph)
    faults = verify_folder(folder, "onnx", pair.checkpoint).faults
    assert any(fault.startswith(f"model.onnx: {sentence}") for fault in faults), faults


# --- other layers, and what is refused ---------------------------------------------------------------------------


def test_fused_projections_two_bits_and_the_head_have_adapters(tmp_path: Path) -> None:
    """The builder separates the parts of a fused projection: each gets all of A, and its rows of B."""
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Phi3Config(**sizes, tie_word_embeddings=False)
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "onnx"
    freeze(deepcopy(config), checkpoint, scheme.LinearCodes(2, "seq"))
    layers = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"]
    save_adapter(config, checkpoint / ADAPTER, 4, 1, layers)
    folder.mkdir()
    target_named("onnx").export(checkpoint, folder, CONTEXT)

    result = verify_folder(folder, "onnx", checkpoint)
    require_equal([result])
    assert (result.linears, result.adapter, result.adapter_equal) == (8, 18, 18)
    assert sqnr(emulated(checkpoint, 6 / 4), run(folder)) > 25
    (tmp_path / "exposed").mkdir()
    inputs, outputs = expose(folder, tmp_path / "exposed").places["model.layers.0.self_attn.qkv_proj"]
    assert inputs and outputs == [f"/model/layers.0/attn/{part}_proj/MatMulNBits/output_0" for part in "qkv"]

    # Parts with different matrices A are no adapter of the fused projection.
    parameters = dict(adapter_format.read(folder / names.ADAPTER_FILE))
    name = "model.layers.1.attn.k_proj.lora_A.MatMul.weight"
    parameters[name] = changed(parameters[name], 9.0)
    (folder / names.ADAPTER_FILE).unlink()
    adapter_format.write(folder / names.ADAPTER_FILE, parameters)
    faults = verify_folder(folder, "onnx", checkpoint).faults
    assert any("the parts of model.layers.1.self_attn.qkv_proj do not share a matrix A" in each for each in faults)


@contextlib.contextmanager
def edited_adapter(checkpoint: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint's adapter, to be changed."""
    path = checkpoint / ADAPTER / "adapter_model.safetensors"
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_adapters_that_cannot_be_exported_are_refused_before_any_work(target: str, pair: Pair, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(pair.checkpoint, tmp_path / "checkpoint"))
    export, key = target_named(target).export, f"base_model.model.{UP}.lora_A.weight"
    with edited_adapter(checkpoint) as tensors:
        tensors[key][0, 0] = float("nan")
    with pytest.raises(ExportError, match=rf"the adapter of {UP} has numbers that are not finite. Train it again"):
        export(checkpoint, tmp_path, CONTEXT)
    (checkpoint / ADAPTER / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors: cannot be read"):
        export(checkpoint, tmp_path, CONTEXT)
    (checkpoint / ADAPTER / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"adapter_model\.safetensors: cannot be read"):
        export(checkpoint, tmp_path, CONTEXT)


def test_an_adapter_of_another_width_is_refused(pair: Pair, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(pair.checkpoint, tmp_path / "checkpoint"))
    with edited_adapter(checkpoint) as tensors:
        key = f"base_model.model.{UP}.lora_A.weight"
        tensors[key] = tensors[key][:, :32].contiguous()
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=rf"the adapter of {UP} is for a weight of \(128, 32\), not \(128, 64\)"):
        target_named("onnx").export(checkpoint, tmp_path / "out", CONTEXT)
    assert list((tmp_path / "out").iterdir()) == [], "nothing half-written"
