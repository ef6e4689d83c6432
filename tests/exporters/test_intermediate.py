"""Artifacts looked into: a planted fault is found at the layer it was planted in, a correct artifact parts nowhere."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.schema import EValue, Instruction, Int, KernelCall, Operator
from tiny import CONTEXT, export_into, freeze, llama
from transformers import AutoModelForCausalLM

from qat_edge.data import ScoredIds
from qat_edge.errors import ArtifactError
from qat_edge.measure import faults, layers
from qat_edge.measure.faults import Parting
from qat_edge.measure.rounding import Rounding, of_artifact
from qat_edge_exporters.executorch import delegates
from qat_edge_exporters.executorch import intermediate as pte_intermediate
from qat_edge_exporters.onnx import export as onnx_export
from qat_edge_exporters.onnx import intermediate as onnx_intermediate
from qat_edge_exporters.onnx import storage

# The head's input of 96 features is three blocks in ONNX Runtime, though its scales are one a row.
WIDTH, HEAD = 96, 16
LINEAR = "model.layers.1.mlp.up_proj"
FIRST_ATTENTION, SECOND_ATTENTION = (f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))


@dataclass(frozen=True)
class Made:
    frozen: Path
    folders: dict[str, Path]
    prompts: list[ScoredIds]

    def parting(self, target: str, folder: Path | None = None) -> Parting | None:
        place = folder or self.folders[target]
        rounding = of_artifact(place, target)
        applies = rounding is not None and rounding.applies(platform.machine())
        return layers.first_layer(
            place, target, self.frozen, rounding if rounding and applies else Rounding(), self.prompts
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("looked-into")
    freeze(llama(hidden_size=WIDTH, num_attention_heads=WIDTH // HEAD), 32, root / "frozen")
    onnx_folder = root / "onnx"
    onnx_folder.mkdir()
    onnx_export.export(root / "frozen", onnx_folder, CONTEXT, lambda text: None)
    pte_folder = export_into(root / "frozen", root / "executorch").folder
    for folder in (onnx_folder, pte_folder):
        (folder / "manifest.json").write_text('{"format": 2, "options": {}}')
    text = np.random.default_rng(0).integers(3, 250, 4000)
    prompts = faults.probes([ScoredIds(text.tolist(), [])])
    return Made(root / "frozen", {"onnx": onnx_folder, "executorch": pte_folder}, prompts)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own imports the runtimes anew, which takes longer than all the rest."""
    monkeypatch.setattr(layers, "_in_own_process", layers._trace)


@pytest.mark.parametrize("target", ["onnx", "executorch"])
def test_a_correct_artifact_parts_at_no_layer(made: Made, target: str) -> None:
    assert made.parting(target) is None


def test_what_passes_through_an_artifact_is_what_passes_through_the_checkpoint(made: Made) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.frozen)
    ids = made.prompts[0].ids[:8]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    expected = faults.trace(model, names, lambda: model(torch.tensor([ids])))
    (in_onnx,) = onnx_intermediate.trace(made.folders["onnx"], [ids])
    (in_pte,) = pte_intermediate.trace(made.folders["executorch"], [ids])
    assert set(in_onnx) == set(names)
    assert list(in_pte) == ["model.embed_tokens", FIRST_ATTENTION, "model.layers.0", SECOND_ATTENTION, "lm_head"]
    assert all(in_onnx[name].inputs.shape == expected[name][0].shape for name in names)  # type: ignore[union-attr]
    for passages, name in ((in_onnx, FIRST_ATTENTION), (in_pte, FIRST_ATTENTION), (in_pte, "lm_head")):
        inputs = passages[name].inputs
        assert inputs is not None
        noise = np.square(inputs - expected[name][0].numpy()).sum() / np.square(inputs).sum()
        assert noise < 1e-3, (name, noise)


# --- faults planted in an ONNX folder ----------------------------------------------------------------------


def rotary_angle(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    tables = {t.name: np.array(storage.tensor(t, folder)) for t in graph.graph.initializer if t.name.endswith("_cache")}
    angles = np.arange(tables["cos_cache"].shape[0]) * 0.5
    tables["cos_cache"][:, 1], tables["sin_cache"][:, 1] = np.cos(angles), np.sin(angles)
    return tables


def keys_one_late(graph: onnx.ModelProto, folder: Path) -> dict[str, Any]:
    """The second layer's cache holds at every position the key of the one before."""
    (attention,) = (n for n in graph.graph.node if n.name == "/model/layers.1/attn/GroupQueryAttention")
    keys = attention.input[1]
    # A row of zeros before the first, and none of the last.
    constants = {"late_pads": np.array([0, 1, 0, 0, -1, 0]), "late_zero": np.array(0, np.float32)}
    nodes = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(values))
        for name, values in constants.items()
    ]
    nodes.append(onnx.helper.make_node("Pad", [keys, *constants], ["late_keys"]))
    place = list(graph.graph.node).index(attention)
    for node in reversed(nodes):
        graph.graph.node.insert(place, node)
    attention.input[1] = "late_keys"
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
        t.name: np.array(storage.tensor(t, folder))
        for t in graph.graph.initializer
        if t.name.startswith(start) and t.name.endswith(".scales")
    }


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        (rotary_angle, Parting(FIRST_ATTENTION, at_input=True)),
        (keys_one_late, Parting(SECOND_ATTENTION, at_input=True)),
        (doubled_scale, Parting(LINEAR, at_input=False)),
        (truncated_scales, Parting("model.layers.0.self_attn.q_proj", at_input=False)),
    ],
)
def test_a_fault_in_an_onnx_folder_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[onnx.ModelProto, Path], dict[str, Any]], place: Parting
) -> None:
    source, folder = made.folders["onnx"], tmp_path / "onnx"
    shutil.copytree(source, folder)
    graph = storage.load_graph(source / "model.onnx")
    storage.save(graph, plant(graph, source), source, folder)
    assert made.parting("onnx", folder) == place


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
    ],
)
def test_a_fault_in_a_pte_is_found_at_its_layer(
    made: Made, tmp_path: Path, plant: Callable[[PTEFile], None], place: Parting
) -> None:
    folder = tmp_path / "executorch"
    shutil.copytree(made.folders["executorch"], folder)
    pte = delegates.open_pte(folder / "model.pte")
    plant(pte)
    with (folder / "model.pte").open("wb") as file:
        serialize_pte_binary(pte).write_to_file(file)
    assert made.parting("executorch", folder) == place


def test_a_pte_without_attention_to_look_at_says_so(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "executorch"
    shutil.copytree(made.folders["executorch"], folder)
    content = (folder / "model.pte").read_bytes()
    assert content.count(b"llama::custom_sdpa\0") == 1
    (folder / "model.pte").write_bytes(content.replace(b"llama::custom_sdpa\0", b"llama::my_own_sdpa\0"))
    with pytest.raises(ArtifactError, match="its layers cannot be told"):
        made.parting("executorch", folder)


@pytest.mark.parametrize(
    ("device", "words"),
    [("local", "From equal inputs no layer parts"), ("ssh:pi", "it is what the runtime makes of it on ssh:pi")],
)
def test_where_no_layer_parts_the_runtime_is_left(made: Made, device: str, words: str) -> None:
    rounding = of_artifact(made.folders["onnx"], "onnx")
    torch_side: Any = SimpleNamespace(roundings={"onnx": rounding}, prompts=made.prompts)
    assert words in layers.first_words(made.folders["onnx"], "onnx", made.frozen, torch_side, device)
    assert "cannot be compared" in layers.first_words(made.frozen, "onnx", made.frozen, torch_side, device)
