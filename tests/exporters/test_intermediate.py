"""Fault localization: a planted fault is found at its layer, and a correct artifact shows no divergence."""

from __future__ import annotations

import io
import json
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

from qat_edge.data.tokenization import ScoredIds
from qat_edge.diagnose import error_budget, fault_test, locate_fault
from qat_edge.diagnose.fault_test import Divergence
from qat_edge.diagnose.locate_fault import Localization
from qat_edge.diagnose.runtime_rounding import Rounding, artifact_rounding
from qat_edge.evaluate.evaluator import EvalSet, Evaluator
from qat_edge.evaluate.results import FaultTest
from qat_edge.options import ValidateOptions
from qat_edge_devices.agent import agent, loaded_models, machine
from qat_edge_devices.local import LocalTransport
from qat_edge_devices.transport import CompletedProgram
from qat_edge_exporters.artifact import Passage
from qat_edge_exporters.executorch.pte import delegates
from qat_edge_exporters.onnx import export_onnx as onnx_export
from qat_edge_exporters.onnx import graph_file

# The head's input of 96 features is three blocks in ONNX Runtime, although each row has one scale.
WIDTH, HEAD = 96, 16
LINEAR = "model.layers.1.mlp.up_proj"
FIRST_ATTENTION, SECOND_ATTENTION = (f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))


IS_CAUSAL = 6  # index of that argument of the attention operator


@dataclass(frozen=True)
class Made:
    frozen: Path
    folders: dict[str, Path]
    prompts: list[ScoredIds]

    def torch_side(self, target: str) -> Any:
        rounding = artifact_rounding(self.folders[target], target)
        return SimpleNamespace(roundings={} if rounding is None else {target: rounding}, prompts=self.prompts)

    def look(self, target: str, folder: Path | None = None) -> Localization:
        with closing(LocalTransport()) as transport:
            exported = folder or self.folders[target]
            return locate_fault.locate(exported, target, self.frozen, self.torch_side(target), transport, threads=1)

    def passages(self, target: str, ids: list[int]) -> dict[str, Passage]:
        with closing(LocalTransport()) as transport:
            (found,) = locate_fault.trace_artifact(self.folders[target], target, [ids], transport, threads=1)
            return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("intermediate")
    freeze(llama(hidden_size=WIDTH, num_attention_heads=WIDTH // HEAD), 32, root / "frozen")
    onnx_folder = root / "onnx"
    onnx_folder.mkdir()
    onnx_export.export(root / "frozen", onnx_folder, CONTEXT)
    pte_folder = export_into(root / "frozen", root / "executorch").folder
    for folder in (onnx_folder, pte_folder):
        (folder / "manifest.json").write_text(json.dumps({"format": 2, "options": {"context_length": CONTEXT}}))
    text = np.random.default_rng(0).integers(3, 250, 4000)
    prompts = fault_test.short_prompts([ScoredIds(text.tolist(), [])])
    return Made(root / "frozen", {"onnx": onnx_folder, "executorch": pte_folder}, prompts)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the agent in this process: a new one imports the runtimes again, which takes longer than all else."""

    def run(self: LocalTransport, argv: Sequence[str], *_: object, **__: object) -> CompletedProgram:
        with chdir(self.folder), redirect_stderr(io.StringIO()) as stderr:
            return CompletedProgram(agent.main(list(argv[2:])), "", stderr.getvalue())

    monkeypatch.setattr(LocalTransport, "run", run)
    monkeypatch.setattr(machine, "pin", lambda threads, backend: threads)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_correct_artifact_diverges_at_no_layer(made: Made, target: str) -> None:
    assert made.look(target) == Localization(None)


def test_intermediate_values_of_an_artifact_equal_those_of_the_checkpoint(made: Made) -> None:
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


def test_rows_of_a_table_stored_in_the_order_of_the_head_are_returned_in_their_own(tmp_path: Path) -> None:
    model = freeze(llama(), 32, tmp_path / "frozen", table_bits=(4, 4))
    folder = export_into(tmp_path / "frozen", tmp_path / "executorch").folder
    with closing(LocalTransport()) as transport:
        (found,) = locate_fault.trace_artifact(folder, "executorch", [[5, 6, 7]], transport, threads=1)
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
    """Give the second layer at every position the key of the position before."""
    return one_late(graph, 1, [0, 1, 0, 0, -1, 0])


def cache_one_late(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """Read the second layer's cache one position late; tokens given at once are not affected."""
    return one_late(graph, 3, [0, 0, 1, 0, 0, 0, -1, 0])


def one_late(graph: onnx.ModelProto, keys_input: int, pads: list[int]) -> dict[str, Any]:
    (attention,) = (n for n in graph.graph.node if n.name == "/model/layers.1/attn/GroupQueryAttention")
    keys = attention.input[keys_input]
    # A row of zeros before the first, and the last row removed.
    constants = {"late_pads": np.array(pads), "late_zero": np.array(0, np.float32)}
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(values))
        for name, values in constants.items()
    ]
    nodes.append(onnx.helper.make_node("Pad", [keys, *constants], ["late_keys"]))
    index = list(graph.graph.node).index(attention)
    for node in reversed(nodes):
        graph.graph.node.insert(index, node)
    attention.input[keys_input] = "late_keys"
    return {}


def doubled_scale(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    scales = scales_of(graph, folder, "model.layers.1.mlp.up_proj")
    next(iter(scales.values()))[5, 1] *= 2
    return scales


def truncated_scales(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """Truncate scales to one bit of mantissa less than bfloat16 has, without rounding."""
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
    ("plant", "expected"),
    [
        (rotary_angle, Divergence(FIRST_ATTENTION, at_input=True)),
        (keys_one_late, Divergence(SECOND_ATTENTION, at_input=True)),
        (cache_one_late, Divergence(SECOND_ATTENTION, at_input=True)),
        (doubled_scale, Divergence(LINEAR, at_input=False)),
        (truncated_scales, Divergence("model.layers.0.self_attn.q_proj", at_input=False)),
    ],
)
def test_a_fault_in_an_onnx_folder_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[onnx.ModelProto, Path], dict[str, Any]], expected: Divergence
) -> None:
    folder = planted(made, plant, tmp_path / "onnx")
    assert made.look("onnx", folder) == Localization(expected)


def judged(made: Made, target: str, exports: Path, scratch: Path) -> FaultTest:
    """Return the judgement of `--error-budget` on the artifact below `exports`."""
    run: Any = SimpleNamespace(exports=exports, quantized=made.frozen)
    torch_side = made.torch_side(target)
    kinds = {"": Rounding(), **torch_side.roundings}
    torch_side.expected = {key: error_budget._fault_reference(run, made.prompts, one) for key, one in kinds.items()}
    evaluator = Evaluator(EvalSet([], [], [0], 0, None), ValidateOptions(threads=1), scratch)
    with closing(LocalTransport()) as transport:
        return error_budget.run_fault_test(run, evaluator, torch_side, target, transport)


def test_a_fault_of_decoding_alone_is_flagged_in_an_onnx_folder(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(made, cache_one_late, tmp_path / "onnx")
    found = judged(made, "onnx", tmp_path, tmp_path)
    assert found.exceeds_noise and found.position == fault_test.DECODED_FROM
    correct = judged(made, "onnx", made.folders["onnx"].parent, tmp_path)
    assert not correct.exceeds_noise, correct
    monkeypatch.setattr(fault_test, "DECODED_FROM", fault_test.LENGTH)
    assert not judged(made, "onnx", tmp_path, tmp_path).exceeds_noise, "a prompt processed at once does not show it"


# --- faults planted in a .pte ------------------------------------------------------------------------------


def write_one_late(pte: PTEFile) -> None:
    """Write the second layer's cache one position after the one at which attention begins."""
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
    """Let tokens that are processed at once attend to later ones."""
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
    ("plant", "expected"),
    [
        (pte_rotary_angle, Divergence(FIRST_ATTENTION, at_input=True)),
        (write_one_late, Divergence(SECOND_ATTENTION, at_input=True)),
        (look_ahead, Divergence(FIRST_ATTENTION, at_input=True)),
    ],
)
def test_a_fault_in_a_pte_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[PTEFile], None], expected: Divergence
) -> None:
    assert made.look("executorch", planted_in_pte(made, plant, tmp_path)) == Localization(expected)


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
    assert found.exceeds_noise and found.position == 1, "its first token, alone, sees no other"
    correct = judged(made, "executorch", made.folders["executorch"].parent, tmp_path)
    assert not correct.exceeds_noise, correct
    monkeypatch.setattr(fault_test, "DECODED_FROM", 0)
    assert not judged(made, "executorch", tmp_path, tmp_path).exceeds_noise, "tokens given one at a time do not show it"


def test_a_pte_without_known_attention_is_reported(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "executorch"
    shutil.copytree(made.folders["executorch"], folder)
    content = (folder / "model.pte").read_bytes()
    assert content.count(b"llama::custom_sdpa\0") == 1
    (folder / "model.pte").write_bytes(content.replace(b"llama::custom_sdpa\0", b"llama::my_own_sdpa\0"))
    assert "its layers cannot be identified" in made.look("executorch", folder).reason


# --- a device that computes differently --------------------------------------------------------------------


@pytest.fixture
def phone() -> Iterator[LocalTransport]:
    """A transport of this machine with another name."""
    with closing(LocalTransport()) as transport:
        transport.name = "ssh:phone"
        yield transport


def first_words(made: Made, transport: LocalTransport, folder: Path | None = None) -> str:
    folder = folder or made.folders["onnx"]
    return locate_fault.describe_location(folder, "onnx", made.frozen, made.torch_side("onnx"), transport, threads=1)


def test_a_fault_of_the_file_is_reported_once_for_the_device_and_this_machine(
    made: Made, phone: LocalTransport, tmp_path: Path
) -> None:
    assert first_words(made, phone) == "On ssh:phone and on this machine, no layer diverges given equal inputs"
    text = first_words(made, phone, planted(made, doubled_scale, tmp_path / "onnx"))
    assert text.startswith(
        f"On ssh:phone and on this machine, the first layer that diverges is {LINEAR}: its output differs"
    )
    with closing(LocalTransport()) as here:
        assert first_words(made, here) == "On this machine, no layer diverges given equal inputs"


def test_a_runtime_that_computes_differently_is_distinguished_from_a_fault_of_the_file(
    made: Made, phone: LocalTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiplied(model: loaded_models.OnnxModel, ids: list[int], decode_from: int | None) -> Iterator[dict[str, Any]]:
        (name,) = (o for o in model.outputs if o.startswith("/model/layers.1/mlp/up_proj/"))
        for piece in read(model, ids, decode_from):
            yield piece | ({name: piece[name] * 1.01} if Path.cwd() == phone.folder else {})

    read = loaded_models.OnnxModel.read
    monkeypatch.setattr(loaded_models.OnnxModel, "read", multiplied)
    on_the_phone, _, here = first_words(made, phone).partition(". ")
    assert on_the_phone == f"On ssh:phone, the first layer that diverges is {Divergence(LINEAR, at_input=False)}"
    assert here == ("On this machine, no layer diverges given equal inputs: the cause is the runtime on ssh:phone")


def test_a_copy_that_does_not_run_is_reported(
    made: Made, phone: LocalTransport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = LocalTransport.run

    def crash(self: LocalTransport, *arguments: Any, **options: Any) -> CompletedProgram:
        return CompletedProgram(-11, "", "") if self is phone else run(self, *arguments, **options)

    monkeypatch.setattr(LocalTransport, "run", crash)
    text = first_words(made, phone)
    assert "On ssh:phone, the layers cannot be compared: ssh:phone: " in text and "ended by SIGSEGV" in text
    assert text.endswith("On this machine, no layer diverges given equal inputs: the cause is the runtime on ssh:phone")
    assert f"{tmp_path}/genai_config.json: no such file" in first_words(made, phone, tmp_path)
