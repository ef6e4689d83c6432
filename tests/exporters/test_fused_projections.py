"""Layers of one input as one product: which ones, the same numbers, one delegate, and what the reader makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MIXED, SIZES, TinyExport, export_into, freeze, llama
from transformers import GPTNeoXConfig

from qat_edge.quant import frozen
from qat_edge_exporters.executorch.graph.fused_projections import FusedLinear, fuse_projections
from qat_edge_exporters.executorch.graph.quantized_modules import QuantizedLinear, prepare
from qat_edge_exporters.executorch.pte import delegates, inspection
from qat_edge_exporters.executorch.pte.pte_reader import read, read_layers

ATTENTION = ["q_proj", "k_proj", "v_proj"]
FIRST = "model.layers.0."


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    root = tmp_path_factory.mktemp("fused")
    freeze(llama(), 32, root / "frozen")
    return export_into(root / "frozen", root / "export")


def prepared(folder: Path) -> tuple[Any, dict[str, str]]:
    """Return a frozen model with exportable layers, and the names of its weights."""
    model = frozen.load(folder)
    return model, prepare(model, {})


def fused_layers(rows: dict[str, dict[str, int]]) -> list[list[str]]:
    """Return the layers of each product of the first block, without their path."""
    return [[name.rpartition(".")[2] for name in each] for title, each in rows.items() if title.startswith(FIRST)]


def test_layers_that_read_one_tensor_are_fused(exported: TinyExport) -> None:
    model, names = prepared(exported.frozen)
    rows = fuse_projections(model, names)
    assert fused_layers(rows) == [ATTENTION, ["gate_proj", "up_proj"]]
    assert next(iter(rows.values())) == {
        f"{FIRST}self_attn.{name}": n for name, n in zip(ATTENTION, (64, 32, 32), strict=True)
    }
    assert set(rows) < set(names.values())
    # Every buffer that is named is there.
    buffers = {f"model.{name}" for name, _ in model.named_buffers()}
    assert set(names) <= buffers


def test_layers_of_other_bits_stay_by_themselves(tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "frozen", MIXED)
    model, names = prepared(tmp_path / "frozen")
    # k is int8 between q and v, and gate and up are both int8 here.
    assert fused_layers(fuse_projections(model, names)) == [["gate_proj", "up_proj"]]


def test_layers_with_adapters_stay_by_themselves(exported: TinyExport) -> None:
    model, names = prepared(exported.frozen)
    assert fused_layers(fuse_projections(model, names, {f"{FIRST}mlp.up_proj"})) == [ATTENTION]


def test_a_model_whose_code_has_one_matrix_is_left_alone(tmp_path: Path) -> None:
    config = GPTNeoXConfig(**{**SIZES, "tie_word_embeddings": False})
    freeze(config, 32, tmp_path / "frozen")
    model, names = prepared(tmp_path / "frozen")
    assert fuse_projections(model, names) == {}
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_the_model_computes_the_same_numbers(exported: TinyExport) -> None:
    ids = torch.randint(3, 288, (1, 9), generator=torch.Generator().manual_seed(0))
    model, names = prepared(exported.frozen)
    with torch.no_grad():
        before = model(ids).logits
        fuse_projections(model, names)
        assert torch.equal(model(ids).logits, before)
    alone = [name for name, module in model.named_modules() if type(module) is QuantizedLinear]
    assert {name.rpartition(".")[2] for name in alone} == {"o_proj", "down_proj", "lm_head"}


def test_the_program_has_no_more_delegates_and_no_slices_outside(exported: TinyExport) -> None:
    found = inspection.inspect(exported.folder / "model.pte")
    # The embedding's rows to the first attention, a delegate between two attentions, one after the last.
    assert sum(found.delegates.values()) == 2 + 3
    assert found.operators.get("aten::slice_copy.Tensor_out", 0) <= 1  # of the table of positions
    products = read_layers(exported.folder / "layers.json").linears
    assert len(products) == 2 * 4 + 1


def test_rows_that_do_not_sum_up_are_a_fault(exported: TinyExport, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "copy"))
    path = folder / "layers.json"
    layers = json.loads(path.read_text())
    title = f"{FIRST}mlp.gate_proj+{FIRST}mlp.up_proj"
    layers["fused"][title][f"{FIRST}mlp.up_proj"] = 127
    path.write_text(json.dumps(layers))
    assert any("has 256 rows of it, layers.json has 255" in fault for fault in read(folder).faults)


def test_swapped_layers_of_one_product_differ_from_the_checkpoint(exported: TinyExport, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported.folder, tmp_path / "copy"))
    path = folder / "layers.json"
    layers = json.loads(path.read_text())
    title = f"{FIRST}mlp.gate_proj+{FIRST}mlp.up_proj"
    layers["fused"][title] = dict(reversed(layers["fused"][title].items()))
    path.write_text(json.dumps(layers))
    weights, wanted = read(folder).weights, frozen.read_weights(exported.frozen)
    assert (weights[f"{FIRST}mlp.up_proj"].codes == wanted[f"{FIRST}mlp.gate_proj"].codes.numpy()).all()
    assert delegates.open_pte(folder / "model.pte")
