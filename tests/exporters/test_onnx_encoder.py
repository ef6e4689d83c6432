"""Encoders as an ONNX folder: what plain onnxruntime computes with the tokenizer alone, and how faults are found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from tiny import CONTEXT, TinyExport, export_to, freeze, llama, sqnr
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PretrainedConfig, RobertaConfig

from conftest import make_tokenizer
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.evaluate.encoders import cosines
from qat_edge.manifest import write_manifest
from qat_edge.models.tasks import ModelTask, SentenceEncoder, SequenceClassifier
from qat_edge.quant import frozen
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.artifact import Artifact
from qat_edge_exporters.onnx import encoder_graph, names
from qat_edge_exporters.targets import target_named

TARGET = target_named("onnx")
POSITIONS = 48
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}  # fmt: skip
LAYER = "bert.encoder.layer"
MIXED = {f"{LAYER}.0.attention.self.key": 8, f"{LAYER}.1.output.dense": 8}
TEXTS = ["Set an alarm for seven", "lights", "play some music that I like, and then call home", "?"]


def bert(**changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: BertConfig(**SIZES | changes)


# Branches that the families of test_encoder do not reach: bits by layer and of tables, rows that no block size
# divides, labels found by a pair's separator, other activations.
VARIANTS: dict[str, dict[str, Any]] = {
    "mixed_bits": {"config": bert(num_labels=3), "task": SequenceClassifier(), "bits": MIXED},
    "int4_table": {"config": bert(), "task": SentenceEncoder(), "table_bits": (4, 8)},
    "odd_rows": {
        "config": bert(hidden_size=72, intermediate_size=64, hidden_act="silu"), "task": SentenceEncoder(), "group": 64,
    },
    "pairs": {"config": bert(num_labels=2, text_pairs=True), "task": SequenceClassifier(pairs=True)},
    "relu": {"config": lambda: RobertaConfig(**SIZES | {"hidden_act": "relu"}), "task": SentenceEncoder()},
}  # fmt: skip


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[TinyExport, ModelTask]]:
    """Return a function that exports one of VARIANTS by name, once."""
    made: dict[str, tuple[TinyExport, ModelTask]] = {}

    def make_one(name: str) -> tuple[TinyExport, ModelTask]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            given = dict(VARIANTS[name])
            config, group = given.pop("config"), given.pop("group", 32)
            freeze(config(), group, root / "frozen", **given)
            made[name] = export_to("onnx", root / "frozen", root / "export"), given["task"]
        return made[name]

    return make_one


@pytest.fixture
def copy(make: Callable[[str], tuple[TinyExport, ModelTask]], tmp_path: Path) -> TinyExport:
    """A copy of the folder of `mixed_bits`, to be damaged."""
    exported, _ = make("mixed_bits")
    return TinyExport(exported.frozen, Path(shutil.copytree(exported.folder, tmp_path / "export")), [])


@contextmanager
def edited(folder: Path) -> Iterator[onnx.ModelProto]:
    """Yield the graph of a folder, and write it back; tensors stay in the data file."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    yield model
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def graph_of(exported: TinyExport) -> onnx.ModelProto:
    return onnx.load(exported.folder / "model.onnx", load_external_data=False)


def run(folder: Path, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return torch.from_numpy(session.run(None, {"input_ids": ids, "attention_mask": mask})[0])


def faults_of(exported: TinyExport) -> list[str]:
    return verify_folder(exported.folder, "onnx", exported.frozen).faults


# --- what it computes ---------------------------------------------------------------------------------------


# On x86, onnxruntime rounds inputs by block instead of by token: 0.99995 was the lowest cosine measured, BERT's.
LEAST_COSINE = 0.9998
LEAST_DB = 100


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_onnxruntime_needs_the_tokenizer_alone(
    make: Callable[[str], tuple[TinyExport, ModelTask]], name: str
) -> None:
    exported, task = make(name)
    tokenizer = AutoTokenizer.from_pretrained(exported.folder)
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=POSITIONS - 2, return_tensors="np")
    found = run(exported.folder, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        ids, mask = (torch.from_numpy(batch[part]) for part in ("input_ids", "attention_mask"))
        expected = task.predict(frozen.load(exported.frozen), ids, mask)
    assert cosines(found.numpy(), expected.numpy()).min() > LEAST_COSINE
    if isinstance(task, SentenceEncoder):
        assert found.norm(dim=1).tolist() == pytest.approx([1] * len(TEXTS), abs=1e-5)


# Rounding works on one token and block at a time, so padding and other texts can change the order of float sums alone.
# On x86 they changed no bit of any output.
@pytest.mark.parametrize("name", ["mixed_bits", "int4_table", "pairs"])
def test_outputs_depend_on_no_padding_and_no_other_text(
    make: Callable[[str], tuple[TinyExport, ModelTask]], name: str
) -> None:
    exported, _ = make(name)
    lengths = (5, 17, 2, POSITIONS)
    ids = np.random.default_rng(0).integers(2, 288, (len(lengths), POSITIONS))
    mask = (np.arange(POSITIONS) < np.array(lengths)[:, None]).astype(np.int64)
    together = run(exported.folder, ids, mask)
    for row, length in enumerate(lengths):
        alone = run(exported.folder, ids[row : row + 1, :length], mask[row : row + 1, :length])
        assert sqnr(alone, together[row : row + 1]) > LEAST_DB
        other = ids.copy()
        other[mask == 0] = 7
        assert sqnr(alone, run(exported.folder, other, mask)[row : row + 1]) > LEAST_DB


def test_a_text_of_one_token_is_computed(make: Callable[[str], tuple[TinyExport, ModelTask]]) -> None:
    exported, _ = make("int4_table")
    one = np.array([[5]])
    assert run(exported.folder, one, np.ones_like(one)).norm() == pytest.approx(1, abs=1e-5)


def test_the_process_that_runs_a_graph_imports_no_torch() -> None:
    heavy = ("torch", "transformers", "onnx")
    code = f"import sys, qat_edge_exporters.onnx.encoder_session; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --- the folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_matrix_is_bit_equal_to_the_frozen_one(
    make: Callable[[str], tuple[TinyExport, ModelTask]], name: str
) -> None:
    exported, _ = make(name)
    result = verify_folder(exported.folder, "onnx", exported.frozen)
    assert result.faults == [] and result.linears_equal == result.linears > 0
    assert result.embedding_equal and result.floats_equal == result.floats
    found, weights = TARGET.read(exported.folder), frozen.read_weights(exported.frozen)
    assert found.weights.keys() == weights.keys()
    assert {name: weight.bits for name, weight in found.weights.items()} == {n: w.bits for n, w in weights.items()}


def test_the_folder_and_its_graph(make: Callable[[str], tuple[TinyExport, ModelTask]]) -> None:
    exported, _ = make("mixed_bits")
    files = {path.name for path in exported.folder.iterdir()}
    tokenizer = {path.name for path in exported.frozen.iterdir()} & {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json",
    }  # fmt: skip
    assert files == {"model.onnx", "model.onnx.data", "config.json", *tokenizer}

    graph = graph_of(exported)
    weights = frozen.read_weights(exported.frozen)
    nodes = [node for node in graph.graph.node if node.domain == "com.microsoft"]
    linear, table = "MatMulNBits", "GatherBlockQuantized"
    is_table = {name: "embeddings" in name for name in weights}
    assert {node.name for node in nodes} == {f"/{n}/{table if is_table[n] else linear}" for n in weights}
    settings = {name: {a.name: a.i for a in node.attribute} for node in nodes for name in [node.name.split("/")[1]]}
    assert all(settings[name]["bits"] == weight.bits for name, weight in weights.items())
    assert all(settings[name]["accuracy_level"] == 4 for name in weights if not is_table[name])
    assert settings[f"{LAYER}.0.attention.self.query"]["block_size"] == 32
    assert settings[f"{LAYER}.1.output.dense"] | {"block_size": 64} == settings[f"{LAYER}.1.output.dense"]

    # Apps read names, and the two sizes that are free.
    signature = [
        (each.name, [size.dim_param or size.dim_value for size in each.type.tensor_type.shape.dim])
        for each in (*graph.graph.input, *graph.graph.output)
    ]
    free = ["batch", "tokens"]
    assert signature == [("input_ids", free), ("attention_mask", free), ("logits", ["batch", 3])]
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert metadata == {"max_length": str(POSITIONS), "output_width": "3"}
    assert not any(node.metadata_props or node.doc_string for node in graph.graph.node)


def test_sizes_by_part(make: Callable[[str], tuple[TinyExport, ModelTask]]) -> None:
    exported, _ = make("int4_table")
    found: Artifact = TARGET.read(exported.folder)
    scheme_of = frozen.read_scheme(exported.frozen)
    weights = {name: weight for name, weight in found.weights.items() if name in scheme_of.linears}
    tables = [found.weights[name] for name in scheme_of.embeddings]
    assert found.size_bytes["linears"] == sum(w.codes.size * w.bits // 8 for w in weights.values())
    assert found.size_bytes["head"] == 0
    rows = sum(w.codes.shape[0] for w in tables if w.bits == 8)
    # An int8 row of 64 is one block; an int4 row has groups of 32.
    int4 = next(w for w in tables if w.bits == 4)
    expected = sum(w.codes.size * w.bits // 8 for w in tables) + 4 * (rows + int4.scales.size)
    assert found.size_bytes["embedding"] == expected
    assert sum(found.size_bytes.values()) == sum(p.stat().st_size for p in exported.folder.iterdir())


# --- faults -------------------------------------------------------------------------------------------------


def test_a_changed_code_is_one_other_code(copy: TinyExport) -> None:
    initializer = next(
        i for i in graph_of(copy).graph.initializer if i.name == f"{LAYER}.0.intermediate.dense.MatMulNBits.qweight"
    )
    offset = int(next(entry.value for entry in initializer.external_data if entry.key == "offset"))
    data = bytearray((copy.folder / "model.onnx.data").read_bytes())
    data[offset] ^= 0x01
    (copy.folder / "model.onnx.data").write_bytes(data)
    (fault,) = faults_of(copy)
    assert f"{LAYER}.0.intermediate.dense: 1 of {192 * 64} codes differ, first at row 0, column 0" in fault


def swap_matrices(model: onnx.ModelProto) -> None:
    one, other = (
        n
        for n in model.graph.node
        if n.op_type == "MatMulNBits" and ".output.dense/" in n.name and ".attention." in n.name
    )
    for index in (1, 2):
        one.input[index], other.input[index] = other.input[index], one.input[index]


def rename_node(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "MatMulNBits").name = "/other"


def rename_table(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized").name = "/other"


def keep_inputs_in_float(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    next(a for a in node.attribute if a.name == "accuracy_level").i = 0


def decide_on_a_token(model: onnx.ModelProto) -> None:
    """Add 1 to the logits of texts whose first token is 5."""
    logits = next(n for n in model.graph.node if "logits" in n.output)
    logits.output[0] = "before"
    make_node, to = onnx.helper.make_node, onnx.TensorProto.FLOAT
    model.graph.initializer.extend(
        [onnx.numpy_helper.from_array(np.array(value), name) for name, value in (("five", 5), ("zero", 0))]
    )
    model.graph.node.extend(
        [
            make_node("Gather", ["input_ids", "zero"], ["first"], axis=1),
            make_node("Equal", ["first", "five"], ["is_five"]),
            make_node("Cast", ["is_five"], ["one"], to=to),
            make_node("ReduceSum", ["one"], ["sum"], keepdims=0),
            make_node("Add", ["before", "sum"], ["logits"]),
        ]
    )


def replace_a_token(model: onnx.ModelProto) -> None:
    """Read token 5 as 0."""
    make_node = onnx.helper.make_node
    table = next(n for n in model.graph.node if "input_ids" in n.input)
    table.input[1] = "replaced"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(5), "five"))
    for node in (
        make_node("Mul", ["input_ids", "is_other"], ["replaced"]),
        make_node("Cast", ["is_not"], ["is_other"], to=onnx.TensorProto.INT64),
        make_node("Not", ["is_five"], ["is_not"]),
        make_node("Equal", ["input_ids", "five"], ["is_five"]),
    ):
        model.graph.node.insert(0, node)


def measure_tokens(model: onnx.ModelProto) -> None:
    """Make a number of the size of a list as long as the first token's id."""
    decide_on_a_token(model)
    make_node = onnx.helper.make_node
    cast = next(n for n in model.graph.node if n.op_type == "Cast" and "is_five" in n.input)
    cast.input[0] = "size"
    index = list(model.graph.node).index(cast)
    model.graph.node.insert(index, make_node("Shape", ["list"], ["size"]))
    model.graph.node.insert(index, make_node("Expand", ["five", "first"], ["list"]))


def compare_numbers(model: onnx.ModelProto) -> None:
    logits = next(n for n in model.graph.node if "logits" in n.output)
    logits.output[0] = "before"
    model.graph.node.extend(
        [
            onnx.helper.make_node("Greater", ["before", "before"], ["is_more"]),
            onnx.helper.make_node("Where", ["is_more", "before", "before"], ["logits"]),
        ]
    )


def change_positions(model: onnx.ModelProto) -> None:
    tensor = next(i for i in model.graph.initializer if i.name.endswith("position_ids"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 3] = 2
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def add_a_float_matrix(model: onnx.ModelProto) -> None:
    logits = next(n for n in model.graph.node if "logits" in n.output)
    logits.output[0] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(3, dtype=np.float32), "matrix"))
    model.graph.node.append(onnx.helper.make_node("MatMul", ["before", "matrix"], ["logits"], name="extra"))


def rename_output(model: onnx.ModelProto) -> None:
    next(n for n in model.graph.node if "logits" in n.output).output[0] = "scores"
    model.graph.output[0].name = "scores"


def change_a_norm(model: onnx.ModelProto) -> None:
    tensor = next(i for i in model.graph.initializer if i.name.endswith("LayerNorm.weight"))
    values = np.full(list(tensor.dims), 0.5, np.float32)
    values[0] = 2
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def set_metadata(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == key).value = value

    return change


def give_ids_a_default(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([[1, 2]]), "input_ids"))


FAULTS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "swapped matrices": (swap_matrices, "in place of"),
    "unknown node": (rename_node, "multiplies by the matrix of no layer"),
    "unknown table": (rename_table, "reads the table of no layer"),
    "inputs in float": (keep_inputs_in_float, "accuracy_level 0 leaves its input in float"),
    "a decision on a token": (decide_on_a_token, "(Cast) turns tokens into numbers"),
    "another token": (replace_a_token, "not by the ids of a text"),
    "a size by tokens": (measure_tokens, "(Cast) turns tokens into numbers"),
    "a comparison": (compare_numbers, "(Greater) is no operator that the exporter writes"),
    "other positions": (change_positions, "has indices that the exporter does not write"),
    "a float matrix": (add_a_float_matrix, "a matrix that is not quantized"),
    "a default": (give_ids_a_default, "the input 'input_ids' has a default"),
    "another output": (rename_output, "its outputs are"),
    "another norm": (change_a_norm, "LayerNorm.weight: not in the artifact as it was frozen"),
    "longer texts": (set_metadata("max_length", "49"), f"max_length is '49', the model has {POSITIONS} positions"),
    "another width": (set_metadata("output_width", "4"), "the export writes logits of type 1 (batch, 4)"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_changed_graph_is_a_fault(copy: TinyExport, what: str) -> None:
    change, message = FAULTS[what]
    with edited(copy.folder) as model:
        change(model)
    found = faults_of(copy)
    assert any(message in fault for fault in found), found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "config.json: not the file of"),
        ("tokenizer.json", "tokenizer.json: not the tokenizer the model was trained with"),
    ],
)
def test_another_copied_file_is_a_fault(copy: TinyExport, name: str, message: str) -> None:
    document = json.loads((copy.folder / name).read_text())
    (copy.folder / name).write_text(json.dumps(document | {"added": 1}))
    assert any(message in fault for fault in faults_of(copy))


def test_a_missing_tokenizer_is_a_fault(copy: TinyExport) -> None:
    (copy.folder / "tokenizer.json").unlink()
    assert "tokenizer.json: missing." in TARGET.read(copy.folder).faults


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("rest", [0, 100])
def test_a_truncated_file_is_named(copy: TinyExport, name: str, rest: int) -> None:
    path = copy.folder / name
    path.write_bytes(path.read_bytes()[:rest])
    with pytest.raises(ArtifactError, match=f"{name}: .*Export again"):
        TARGET.read(copy.folder)


@pytest.mark.parametrize("value", ["", "-1", "many", "9" * 12, "١٢"])
def test_metadata_that_is_no_number_is_named(copy: TinyExport, value: str) -> None:
    with edited(copy.folder) as model:
        set_metadata("max_length", value)(model)
    for use in (TARGET.read, TARGET.held_options):
        with pytest.raises(ArtifactError, match="its metadata has max_length"):
            use(copy.folder)


def test_a_folder_that_loads_other_code_is_refused_before_it_runs(copy: TinyExport) -> None:
    with edited(copy.folder) as model:
        model.graph.node.append(onnx.helper.make_node("Any", ["logits"], ["x"], domain="com.other"))
        model.opset_import.add(domain="com.other", version=1)
    with pytest.raises(ArtifactError, match=r"operators of 'com\.other' need a native library"):
        TARGET.run_encoder(copy.folder, [[5, 6]])


def test_the_folder_of_a_decoder_is_none_of_an_encoder(copy: TinyExport, tmp_path: Path) -> None:
    (copy.folder / names.GENAI_CONFIG).write_text("{}")
    (fault,) = TARGET.setting_faults(copy.folder, copy.frozen)
    decoder = "a decoder of onnxruntime-genai's builder"
    assert (
        fault == f"{copy.folder}: the files of {decoder}, but the export of this checkpoint writes those of an encoder."
    )
    (copy.folder / names.GENAI_CONFIG).unlink()
    freeze(llama(), 32, tmp_path / "decoder")
    (fault,) = TARGET.setting_faults(copy.folder, tmp_path / "decoder")
    assert (
        fault == f"{copy.folder}: the files of an encoder, but the export of this checkpoint writes those of {decoder}."
    )


# --- refusals -----------------------------------------------------------------------------------------------


def test_a_float_checkpoint_is_refused(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**SIZES)).save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    write_manifest(tmp_path / "float", "quantized")
    with pytest.raises(ExportError, match="of a sequence classifier only frozen checkpoints export"):
        export_to("onnx", tmp_path / "float", tmp_path / "export")


def test_attention_with_arguments_of_its_own_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(bert()(), 32, tmp_path / "frozen", task=SentenceEncoder())
    attend = encoder_graph.BatchedAttention.attend

    def with_bias(self: Any, *args: Any, **extras: Any) -> Any:
        return attend(self, *args, **extras, position_bias=torch.zeros(1))

    monkeypatch.setattr(encoder_graph.BatchedAttention, "attend", with_bias)
    with pytest.raises(ExportError, match="attends with position_bias, and onnx export computes plain attention"):
        export_to("onnx", tmp_path / "frozen", tmp_path / "export")


def test_an_embedding_that_does_more_than_look_up_rows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(bert()(), 32, tmp_path / "frozen", task=SentenceEncoder())
    model = frozen.load(tmp_path / "frozen")

    class ScaledEmbedding(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    model.get_input_embeddings().__class__ = ScaledEmbedding
    with pytest.raises(ExportError, match="ScaledEmbedding does more than look up rows"):
        encoder_graph.build(model, SentenceEncoder(), frozen.read_weights(tmp_path / "frozen"), CONTEXT)
