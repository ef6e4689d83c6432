"""Artifacts looked into: a planted fault is found at the layer it was planted in, a correct artifact parts nowhere."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, closing, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.schema import Bool, EValue, Instruction, Int, KernelCall, Operator
from tiny import CONTEXT, export_into, freeze, llama
from transformers import AutoModelForCausalLM

from qat_edge.config import ValidateOptions
from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import error_budget, fault_test, locate_fault
from qat_edge.diagnose.fault_test import Parting
from qat_edge.diagnose.locate_fault import Looked
from qat_edge.diagnose.runtime_rounding import Rounding, of_artifact
from qat_edge.evaluate.evaluator import Bench, Material
from qat_edge.evaluate.results import Judgement
from qat_edge_devices.agent import agent, loaded_models, machine
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.transport import Completed
from qat_edge_exporters.artifact import Passage
from qat_edge_exporters.executorch.pte import delegates
from qat_edge_exporters.onnx import export_onnx as onnx_export
from qat_edge_exporters.onnx import graph_file

# The head's input of 96 features is three blocks in ONNX Runtime, though its scales are one a row.
WIDTH, HEAD = 96, 16
LINEAR = "model.layers.1.mlp.up_proj"
FIRST_ATTENTION, SECOND_ATTENTION = (f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))


IS_CAUSAL = 6  # which argument of attention says so


@dataclass(frozen=True)
class Made:
    frozen: Path
    folders: dict[str, Path]
    prompts: list[ScoredIds]

    def torch_side(self, target: str) -> Any:
        rounding = of_artifact(self.folders[target], target)
        return SimpleNamespace(roundings={} if rounding is None else {target: rounding}, prompts=self.prompts)

    def look(self, target: str, folder: Path | None = None) -> Looked:
        with closing(LocalTransport()) as transport:
            place = folder or self.folders[target]
            return locate_fault.look(place, target, self.frozen, self.torch_side(target), transport, threads=1)

    def passages(self, target: str, ids: list[int]) -> dict[str, Passage]:
        with closing(LocalTransport()) as transport:
            (found,) = locate_fault.passages(self.folders[target], target, [ids], transport, threads=1)
            return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("looked-into")
    freeze(llama(hidden_size=WIDTH, num_attention_heads=WIDTH // HEAD), 32, root / "frozen")
    onnx_folder = root / "onnx"
    onnx_folder.mkdir()
    onnx_export.export(root / "frozen", onnx_folder, CONTEXT)
    pte_folder = export_into(root / "frozen", root / "executorch").folder
    for folder in (onnx_folder, pte_folder):
        (folder / "manifest.json").write_text('{"format": 2, "options": {}}')
    text = np.random.default_rng(0).integers(3, 250, 4000)
    prompts = fault_test.probes([ScoredIds(text.tolist(), [])])
    return Made(root / "frozen", {"onnx": onnx_folder, "executorch": pte_folder}, prompts)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own imports the runtimes anew, which takes longer than all the rest."""

    def run(self: LocalTransport, argv: Sequence[str], *_: object, **__: object) -> Completed:
        with chdir(self.folder), redirect_stderr(io.StringIO()) as said:
            return Completed(agent.main(list(argv[2:])), "", said.getvalue())

    monkeypatch.setattr(LocalTransport, "run", run)
    monkeypatch.setattr(machine, "pin", lambda threads, backend: threads)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_correct_artifact_parts_at_no_layer(made: Made, target: str) -> None:
    assert made.look(target) == Looked(None)


def test_what_passes_through_an_artifact_is_what_passes_through_the_checkpoint(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.frozen)
    ids = made.prompts[0].ids[:8]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected = fault_test.trace(model, names, lambda: model(torch.tensor([ids])))
    in_onnx, in_pte = made.passages("onnx", ids), made.passages("executorch", ids)
    assert set(in_onnx) == set(names)
    assert list(in_pte) == ["model.embed_tokens", FIRST_ATTENTION, "model.layers.0", SECOND_ATTENTION, "lm_head"]
    assert all(in_onnx[name].inputs.shape == expected[name][0].shape for name in names)  # type: ignore[union-attr]
    for passages, name in ((in_onnx, FIRST_ATTENTION), (in_pte, FIRST_ATTENTION), (in_pte, "lm_head")):
        inputs = passages[name].inputs
        assert inputs is not None
        noise = np.square(inputs - expected[name][0].numpy()).sum() / np.square(inputs).sum()
        assert noise < 1e-3, (name, noise)


def test_rows_of_a_table_in_the_heads_order_are_seen_in_theirs(tmp_path: Path) -> None:
    model = freeze(llama(), 32, tmp_path / "frozen", table_bits=(4, 4))
    folder = export_into(tmp_path / "frozen", tmp_path / "executorch").folder
    with closing(LocalTransport()) as transport:
        (found,) = locate_fault.passages(folder, "executorch", [[5, 6, 7]], transport, threads=1)
    rows = model.get_input_embeddings()(torch.tensor([[5, 6, 7]])).detach()[0]
    np.testing.assert_allclose(found["model.embed_tokens"].outputs, rows, atol=1e-6)  # type: ignore[arg-type]


# --- faults planted in an ONNX folder ----------------------------------------------------------------------


def rotary_angle(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    tables = {
        t.name: np.array(graph_file.tensor(t, folder)) for t in graph.graph.initializer if t.name.endswith("_cache")
    }
    angles = np.arange(tables["cos_cache"].shape[0]) * 0.5
    tables["cos_cache"][:, 1], tables["sin_cache"][:, 1] = np.cos(angles), np.sin(angles)
    return tables


def keys_one_late(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """The second layer is given at every position the key of the one before."""
    return one_late(graph, 1, [0, 1, 0, 0, -1, 0])


def cache_one_late(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """The second layer's cache is read one position late, and what is given at once is not."""
    return one_late(graph, 3, [0, 0, 1, 0, 0, 0, -1, 0])


def one_late(graph: onnx.ModelProto, place_of_keys: int, pads: list[int]) -> dict[str, Any]:
    (attention,) = (n for n in graph.graph.node if n.name == "/model/layers.1/attn/GroupQueryAttention")
    keys = attention.input[place_of_keys]
    # A row of zeros before the first, and none of the last.
    constants = {"late_pads": np.array(pads), "late_zero": np.array(0, np.float32)}
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(values))
        for name, values in constants.items()
    ]
    nodes.append(onnx.helper.make_node("Pad", [keys, *constants], ["late_keys"]))
    place = list(graph.graph.node).index(attention)
    for node in reversed(nodes):
        graph.graph.node.insert(place, node)
    attention.input[place_of_keys] = "late_keys"
    return {}


def doubled_scale(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    scales = scales_of(graph, folder, "model.layers.1.mlp.up_proj")
    next(iter(scales.values()))[5, 1] *= 2
    return scales


def truncated_scales(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """One bit of the mantissa less than bfloat16 has, cut off and not rounded."""
    found = scales_of(graph, folder, "model.layers")
    return {name: (values.view(np.int32) & ~0x1FFFF).view(np.float32) for name, values in found.items()}


def scales_of(graph: onnx.ModelProto, folder: Path, start: str) -> dict[str, Any]:
    return {
        t.name: np.array(graph_file.tensor(t, folder))
        for t in graph.graph.initializer
        if t.name.startswith(start) and t.name.endswith(".scales")
    }


def planted(made: Made, plant: Callable[[onnx.ModelProto, Path], dict[str, Any]], folder: Path) -> Path:
    source = made.folders["onnx"]
    shutil.copytree(source, folder)
    graph = graph_file.load_graph(source / "model.onnx")
    graph_file.save(graph, plant(graph, source), source, folder)
    return folder


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (rotary_angle, Parting(FIRST_ATTENTION, at_input=True)),
        (keys_one_late, Parting(SECOND_ATTENTION, at_input=True)),
        (cache_one_late, Parting(SECOND_ATTENTION, at_input=True)),
        (doubled_scale, Parting(LINEAR, at_input=False)),
        (truncated_scales, Parting("model.layers.0.self_attn.q_proj", at_input=False)),
    ],
)
def test_a_fault_in_an_onnx_folder_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[onnx.ModelProto, Path], dict[str, Any]], place: Parting
) -> None:
    folder = planted(made, plant, tmp_path / "onnx")
    assert made.look("onnx", folder) == Looked(place)


def judged(made: Made, target: str, exports: Path, scratch: Path) -> Judgement:
    """What `--error-budget` thinks of the artifact below `exports`."""
    run: Any = SimpleNamespace(exports=exports, quantized=made.frozen)
    torch_side = made.torch_side(target)
    kinds = {"": Rounding(), **torch_side.roundings}
    torch_side.expected = {key: error_budget._expected(run, made.prompts, one) for key, one in kinds.items()}
    bench = Bench(Material([], [], [0], 0, None), ValidateOptions(threads=1), scratch)
    with closing(LocalTransport()) as transport:
        return error_budget.judge(run, bench, torch_side, target, transport)


def test_a_fault_of_decoding_alone_is_flagged_in_an_onnx_folder(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(made, cache_one_late, tmp_path / "onnx")
    found = judged(made, "onnx", tmp_path, tmp_path)
    assert found.beyond and found.position == fault_test.DECODED_FROM
    correct = judged(made, "onnx", made.folders["onnx"].parent, tmp_path)
    assert not correct.beyond, correct
    monkeypatch.setattr(fault_test, "DECODED_FROM", fault_test.LENGTH)
    assert not judged(made, "onnx", tmp_path, tmp_path).beyond, "a prompt read at once does not show it"


# --- faults planted in a .pte ------------------------------------------------------------------------------


def write_one_late(pte: PTEFile) -> None:
    """The second layer's cache is written one position after the one that attention begins at."""
    plan = next(plan for plan in pte.program.execution_plan if plan.name == "forward")
    one, late = len(plan.values), len(plan.values) + 1
    plan.values += [EValue(Int(1)), EValue(Int(0))]
    plan.operators.append(Operator("executorch_prim::add", "Scalar"))
    calls = plan.chains[0].instructions
    writes = [
        (index, call.instr_args)
        for index, call in enumerate(calls)
        if isinstance(call.instr_args, KernelCall)
        and plan.operators[call.instr_args.op_index].name == "llama::update_cache"
    ]
    begin = writes[2][1].args[2]
    for _, write in writes[2:]:
        write.args[2] = late
    calls.insert(writes[2][0], Instruction(KernelCall(len(plan.operators) - 1, [begin, one, late])))


def look_ahead(pte: PTEFile) -> None:
    """Tokens that are read at once see those after them."""
    plan = next(plan for plan in pte.program.execution_plan if plan.name == "forward")
    plan.values.append(EValue(Bool(False)))
    for call in (instruction.instr_args for instruction in plan.chains[0].instructions):
        if isinstance(call, KernelCall) and plan.operators[call.op_index].name == "llama::custom_sdpa":
            assert plan.values[call.args[IS_CAUSAL]].val == Bool(True)
            call.args[IS_CAUSAL] = len(plan.values) - 1


def pte_rotary_angle(pte: PTEFile) -> None:
    frequencies = 1.0 / 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    constants: list[bytes] = pte.named_data.buffers  # type: ignore[union-attr]
    for index, data in enumerate(constants):
        found = np.frombuffer(data, np.float32).copy() if len(data) == 4 * len(frequencies) else np.zeros(1)
        if found.shape == frequencies.shape and np.allclose(found, frequencies):
            found[1] *= 1.5
            constants[index] = found.tobytes()
            return
    raise AssertionError("no rotary frequencies among the constants")


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (pte_rotary_angle, Parting(FIRST_ATTENTION, at_input=True)),
        (write_one_late, Parting(SECOND_ATTENTION, at_input=True)),
        (look_ahead, Parting(FIRST_ATTENTION, at_input=True)),
    ],
)
def test_a_fault_in_a_pte_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[PTEFile], None], place: Parting
) -> None:
    assert made.look("executorch", planted_in_pte(made, plant, tmp_path)) == Looked(place)


def planted_in_pte(made: Made, plant: Callable[[PTEFile], None], exports: Path) -> Path:
    folder = exports / "executorch"
    shutil.copytree(made.folders["executorch"], folder)
    pte = delegates.open_pte(folder / "model.pte")
    plant(pte)
    with (folder / "model.pte").open("wb") as file:
        serialize_pte_binary(pte).write_to_file(file)
    return folder


def test_a_fault_of_prompts_alone_is_flagged_in_a_pte(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted_in_pte(made, look_ahead, tmp_path)
    found = judged(made, "executorch", tmp_path, tmp_path)
    assert found.beyond and found.position == 1, "its first token sees no other, alone"
    correct = judged(made, "executorch", made.folders["executorch"].parent, tmp_path)
    assert not correct.beyond, correct
    monkeypatch.setattr(fault_test, "DECODED_FROM", 0)
    assert not judged(made, "executorch", tmp_path, tmp_path).beyond, "tokens given one at a time do not show it"


def test_a_pte_without_attention_to_look_at_says_so(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "executorch"
    shutil.copytree(made.folders["executorch"], folder)
    content = (folder / "model.pte").read_bytes()
    assert content.count(b"llama::custom_sdpa\0") == 1
    (folder / "model.pte").write_bytes(content.replace(b"llama::custom_sdpa\0", b"llama::my_own_sdpa\0"))
    assert "its layers cannot be told" in made.look("executorch", folder).reason


# --- where it runs otherwise than here ---------------------------------------------------------------------


@pytest.fixture
def phone() -> Iterator[LocalTransport]:
    """This machine under another name."""
    with closing(LocalTransport()) as transport:
        transport.name = "ssh:phone"
        yield transport


def words(made: Made, transport: LocalTransport, folder: Path | None = None) -> str:
    folder = folder or made.folders["onnx"]
    return locate_fault.first_words(folder, "onnx", made.frozen, made.torch_side("onnx"), transport, threads=1)


def test_a_fault_of_the_file_is_named_once_for_the_device_and_this_machine(
    made: Made, phone: LocalTransport, tmp_path: Path
) -> None:
    assert words(made, phone) == "On ssh:phone as on this machine no layer parts from equal inputs"
    said = words(made, phone, planted(made, doubled_scale, tmp_path / "onnx"))
    assert said.startswith(f"On ssh:phone as on this machine the first layer at which outputs part: {LINEAR}: another")
    with closing(LocalTransport()) as here:
        assert words(made, here) == "On this machine no layer parts from equal inputs"


def test_a_runtime_that_computes_otherwise_is_told_from_a_fault_of_the_file(
    made: Made, phone: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiplied(model: loaded_models.OnnxModel, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        (name,) = (o for o in model.outputs if o.startswith("/model/layers.1/mlp/up_proj/"))
        for piece in read(model, ids, decode_from):
            yield piece | ({name: piece[name] * 1.01} if Path.cwd() == phone.folder else {})

    read = loaded_models.OnnxModel.read
    monkeypatch.setattr(loaded_models.OnnxModel, "read", multiplied)
    on_the_phone, _, here = words(made, phone).partition(". ")
    assert on_the_phone == f"On ssh:phone the first layer at which outputs part: {Parting(LINEAR, at_input=False)}"
    assert here == ("On this machine no layer parts from equal inputs: it is what the runtime makes of the file there")


def test_a_copy_that_does_not_run_is_a_reason(
    made: Made, phone: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalTransport.run

    def crash(self: LocalTransport, *asked: Any, **more: Any) -> Completed:
        return Completed(-11, "", "") if self is phone else run(self, *asked, **more)

    monkeypatch.setattr(LocalTransport, "run", crash)
    said = words(made, phone)
    assert "On ssh:phone its layers cannot be compared: ssh:phone: " in said and "ended by SIGSEGV" in said
    assert said.endswith(
        "On this machine no layer parts from equal inputs: it is what the runtime makes of the file there"
    )
    assert "no readable" in words(made, phone, made.frozen) or "missing" in words(made, phone, made.frozen)
