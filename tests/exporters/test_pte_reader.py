"""Reading a .pte back: codes and scales as they were frozen, and errors that name the damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from executorch.exir.schema import Instruction, JumpFalseCall
from tiny import CONTEXT, MIXED, TinyExport, disturb_rotation, export_into, freeze, llama

from qat_edge.errors import ArtifactError
from qat_edge.quant import frozen
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch.compat import KernelCall, serialize_pte_binary
from qat_edge_exporters.executorch.graph.fused_projections import SEPARATOR
from qat_edge_exporters.executorch.pte import delegates, runner_contract
from qat_edge_exporters.executorch.pte.program_check import program_faults
from qat_edge_exporters.executorch.pte.pte_options import held_options
from qat_edge_exporters.executorch.pte.pte_reader import read


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    root = tmp_path_factory.mktemp("reader")
    freeze(llama(), 32, root / "frozen")
    return export_into(root / "frozen", root / "export")


@pytest.fixture
def copied(exported: TinyExport, tmp_path: Path) -> TinyExport:
    """Copy an export, to be damaged."""
    shutil.copytree(exported.folder, tmp_path / "copy")
    return TinyExport(exported.frozen, tmp_path / "copy", [])


def test_codes_and_scales_are_those_of_the_checkpoint(exported: TinyExport) -> None:
    artifact, wanted = read(exported.folder), frozen.read_weights(exported.frozen)
    assert artifact.faults == []
    assert artifact.weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(artifact.weights[name].codes, weight.codes.numpy())
        np.testing.assert_array_equal(artifact.weights[name].scales, weight.scales.numpy())
        assert artifact.weights[name].bits == weight.bits
    sizes = artifact.size_bytes
    assert sum(sizes.values()) == sum(p.stat().st_size for p in exported.folder.iterdir())
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # codes
    assert (sizes["linears"], sizes["scales"]) == (linears // 2, linears // 32 * 2)
    assert (sizes["embedding"], sizes["head"]) == (288 * (64 + 4), 0)  # one table for both


@pytest.mark.parametrize(("intermediate_size", "group_size"), [(96, 64), (72, 32)], ids=["mixed_groups", "int8_layers"])
def test_layers_with_other_groups_or_bits_are_read_back(
    intermediate_size: int, group_size: int, tmp_path: Path
) -> None:
    freeze(llama(intermediate_size=intermediate_size), group_size, tmp_path / "frozen")
    artifact = read(export_into(tmp_path / "frozen", tmp_path / "export").folder)
    for layer, weight in frozen.read_weights(tmp_path / "frozen").items():
        np.testing.assert_array_equal(artifact.weights[layer].codes, weight.codes.numpy())
        np.testing.assert_array_equal(artifact.weights[layer].scales, weight.scales.numpy())


def test_bits_chosen_by_layer_are_verified(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen", MIXED)
    made = export_into(tmp_path / "frozen", tmp_path / "export")
    assert {name: w.bits for name, w in read(made.folder).weights.items() if name in MIXED} == MIXED
    result = verify_folder(made.folder, "executorch", made.frozen)
    assert result.faults == [] and result.linears_equal == result.linears == 14
    layer, row, column = "model.layers.1.mlp.down_proj", 7, 100
    _, codes = named_constant(made.folder, layer)
    data = bytearray(made.pte.read_bytes())
    data[data.index(codes) + row * 128 + column] ^= 0x01
    made.pte.write_bytes(data)
    result = verify_folder(made.folder, "executorch", made.frozen)
    assert result.linears_equal == 13
    assert [f for f in result.faults if f.startswith(f"{layer}: 1 of") and f"row {row}, column {column}" in f]


def named_constant(folder: Path, layer: str) -> tuple[str, bytes]:
    """Return the key and the bytes of the codes of a layer's product."""
    pte = delegates.open_pte(folder / "model.pte")
    plan = next(p for p in pte.program.execution_plan if p.name == runner_contract.FORWARD)
    order = json.loads((folder / "layers.json").read_text())["linears"]
    place = next(place for place, name in enumerate(order) if layer in name.split(SEPARATOR))
    key = delegates.matrix_products(pte, plan)[place].codes_key
    return key, delegates.named_constants(pte)[key]


def test_one_flipped_nibble_is_named(copied: TinyExport) -> None:
    layer, product = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj+model.layers.1.mlp.up_proj"
    _, codes = named_constant(copied.folder, layer)
    data = bytearray(copied.pte.read_bytes())
    data[data.index(codes) + len(codes) // 2 + 17] ^= 0x20
    copied.pte.write_bytes(data)
    artifact = read(copied.folder)
    assert len(artifact.faults) == 1
    assert artifact.faults[0].startswith(f"{product}: its codes")
    differing = artifact.weights[layer].codes != frozen.read_weights(copied.frozen)[layer].codes.numpy()
    assert np.argwhere(differing).tolist() == [[0, 35]]  # the high nibble of byte 17


def test_layers_swapped_inside_the_file_differ(copied: TinyExport) -> None:
    names = [f"model.layers.{i}.mlp.gate_proj" for i in (0, 1)]
    first, second = (named_constant(copied.folder, name)[0].encode() for name in names)
    data = copied.pte.read_bytes()
    begin = int.from_bytes(data[data.index(b"eh00") + 8 :][:8], "little")  # end of the program, begin of the delegates
    swapped = data[begin:].replace(first, b"*" * 64).replace(second, first).replace(b"*" * 64, second)
    copied.pte.write_bytes(data[:begin] + swapped)
    artifact, wanted = read(copied.folder), frozen.read_weights(copied.frozen)
    assert artifact.faults == []
    for name, other in (names, names[::-1]):
        np.testing.assert_array_equal(artifact.weights[name].codes, wanted[other].codes.numpy())


def test_a_missing_method_is_a_fault(copied: TinyExport) -> None:
    copied.pte.write_bytes(copied.pte.read_bytes().replace(b"get_eos_ids", b"got_eos_ids"))
    assert read(copied.folder).faults == [
        "model.pte has no method get_eos_ids, which runners look for.",
        "model.pte: the method got_eos_ids is not one that the exporter writes.",
    ]


def another_method(plans: dict[str, Any]) -> None:
    plans["get_n_layers"].name = "forward_again"


def a_method_that_computes(plans: dict[str, Any]) -> None:
    plans["get_n_layers"].chains = plans["forward"].chains


def another_operator(plans: dict[str, Any]) -> None:
    operator = next(each for each in plans["forward"].operators if each.name == "aten::cos")
    operator.name, operator.overload = "aten::eq", "Tensor_out"


def another_delegate(plans: dict[str, Any]) -> None:
    plans["forward"].delegates[0].id = "QnnBackend"


def a_jump(plans: dict[str, Any]) -> None:
    calls = plans["forward"].chains[0].instructions
    calls.insert(1, Instruction(JumpFalseCall(cond_value_index=0, destination_instruction=len(calls))))


def sines_of_token_ids(plans: dict[str, Any]) -> None:
    plan = plans["forward"]
    call = next(c for c in delegates.kernel_calls(plan) if plan.operators[c.op_index].name == "aten::sin")
    call.args[0] = plan.inputs[0]


def changed_logits(plans: dict[str, Any]) -> None:
    calls = plans["forward"].chains[0].instructions
    calls.append(next(call for call in calls if isinstance(call.instr_args, KernelCall)))


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (another_method, "the method forward_again is not one that the exporter writes."),
        (a_method_that_computes, "the method get_n_layers computes, where the exporter writes a constant."),
        (another_operator, "the operator aten::eq.Tensor_out is not one that the exporter writes."),
        (another_delegate, "the delegate QnnBackend is not one that the exporter writes."),
        (a_jump, "the instruction JumpFalseCall is not one that the exporter writes."),
        (sines_of_token_ids, "aten::sin reads the token ids, which the exporter does not make."),
        (changed_logits, "the logits are not the output of the last delegate alone."),
    ],
)
def test_what_no_export_has_is_a_fault(
    exported: TinyExport, edit: Callable[[dict[str, Any]], None], fault: str
) -> None:
    plans = {plan.name: plan for plan in delegates.open_pte(exported.pte).program.execution_plan}
    edit(plans)
    plans = {plan.name: plan for plan in plans.values()}
    assert program_faults(plans, [], [delegates.XNNPACK]) == [fault]


def test_an_operator_of_a_delegate_that_no_export_has_is_a_fault(exported: TinyExport) -> None:
    pte = delegates.open_pte(exported.pte)
    plans = {plan.name: plan for plan in pte.program.execution_plan}
    graphs = delegates.delegate_graphs(pte, plans["forward"])
    assert program_faults(plans, graphs, [delegates.XNNPACK]) == []
    graphs[0]["xnodes"][0]["xnode_union_type"] = "XNNMaximum"
    (fault,) = program_faults(plans, graphs, [delegates.XNNPACK])
    assert fault == "the operator of XNNPACK XNNMaximum is not one that the exporter writes."


def test_two_methods_of_one_name_are_refused(copied: TinyExport) -> None:
    data = copied.pte.read_bytes()
    copied.pte.write_bytes(data.replace(b"get_eos_id\0", b"get_bos_id\0"))
    with pytest.raises(ArtifactError, match=r"model\.pte: it has two methods 'get_bos_id'\. Export again"):
        read(copied.folder)


def rewrite(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the methods of a .pte, by name."""
    pte = delegates.open_pte(path)
    edit({plan.name: plan for plan in pte.program.execution_plan})
    with path.open("wb") as file:
        serialize_pte_binary(pte).write_to_file(file)


def test_the_options_of_an_export_are_read_from_the_program(copied: TinyExport) -> None:
    assert {(option.name, option.value) for option in held_options(copied.folder)} == {
        ("context_length", CONTEXT), ("kv_cache", "float32"), ("portable", False),
    }  # fmt: skip

    def longer(plans: dict[str, Any]) -> None:
        for name in ("get_max_context_len", "get_max_seq_len"):
            plans[name].values[plans[name].outputs[0]].val.int_val = 2 * CONTEXT

    rewrite(copied.pte, longer)
    held = {option.where: option.value for option in held_options(copied.folder)}
    assert held["get_max_context_len of model.pte"] == 2 * CONTEXT
    assert held["the number of tokens in the cache of model.pte"] == CONTEXT
    copied.pte.write_bytes(copied.pte.read_bytes().replace(b"get_max_context_len", b"got_max_context_len"))
    with pytest.raises(ArtifactError, match=r"no method get_max_context_len, which runners look for\. Export again"):
        held_options(copied.folder)


def test_the_number_of_layers_is_checked(copied: TinyExport) -> None:
    layers = json.loads((copied.folder / "layers.json").read_text())
    layers["linears"].pop()
    (copied.folder / "layers.json").write_text(json.dumps(layers))
    assert "computes 9 quantized matrix products, layers.json names 8" in read(copied.folder).faults[0]


@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01, 0.0])
def test_a_truncated_file_is_an_error(copied: TinyExport, keep: float) -> None:
    data = copied.pte.read_bytes()
    copied.pte.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ArtifactError, match=r"model\.pte: .*Export again"):
        read(copied.folder)


@pytest.mark.parametrize("offset", [0, 40, 200, 2000])
def test_a_garbled_file_is_an_error_or_a_fault(copied: TinyExport, offset: int) -> None:
    data = bytearray(copied.pte.read_bytes())
    data[offset : offset + 64] = bytes(range(128, 192))
    copied.pte.write_bytes(data)
    try:
        artifact = read(copied.folder)
    except ArtifactError as error:
        assert "model.pte" in str(error)
    else:
        assert artifact.faults


@pytest.mark.parametrize("name", ["model.pte", "layers.json"])
def test_a_missing_file_is_named(copied: TinyExport, name: str) -> None:
    (copied.folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: not there"):
        read(copied.folder)


def test_a_changed_rotation_of_the_head_is_a_fault(tmp_path: Path) -> None:
    freeze(llama(num_hidden_layers=1), 32, tmp_path / "frozen", rotated=True)
    made = export_into(tmp_path / "frozen", tmp_path / "export")
    disturb_rotation(made.frozen)
    faults = verify_folder(made.folder, "executorch", made.frozen).faults
    assert faults == ["model.norm.turn: not in the artifact as it was frozen"]
