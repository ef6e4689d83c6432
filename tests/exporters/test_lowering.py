"""Tracing and lowering a program, in few passes and with few copies."""

from __future__ import annotations

import copy
import re
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPE, TinyExport, export_into, freeze, llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, PretrainedConfig

from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.graph import passes, quantized_modules, tracing
from qat_edge_exporters.executorch.pte import delegates, runner_contract


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyExport:
    root = tmp_path_factory.mktemp("lowering")
    freeze(llama(), 32, root / "frozen")
    return export_into(root / "frozen", root / "export")


def test_no_layer_transposes_its_heads(exported: TinyExport) -> None:
    """Only cosines and sines, which all layers share, are transposed."""
    pte = delegates.open_pte(exported.pte)
    plan = next(p for p in pte.program.execution_plan if p.name == runner_contract.FORWARD)
    operators = Counter(
        node["xnode_union_type"] for graph in delegates.delegate_graphs(pte, plan) for node in graph["xnodes"]
    )
    assert operators["XNNStaticTranspose"] <= 2 and operators["XNNReciprocalSquareRoot"] == 5
    assert operators["XNNAdd"] == 2 * (2 + 2)  # in each of two layers: to the hidden states, and in rotary embeddings


def record_tracings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the number of nodes of each graph that is run from now on.

    A graph is run to trace it, to decompose it, and once for a pass.
    """
    found: list[int] = []
    run = torch.fx.Interpreter.run

    def counted(interpreter: torch.fx.Interpreter, *args: Any, **options: Any) -> Any:
        found.append(len(interpreter.graph.nodes))
        return run(interpreter, *args, **options)

    monkeypatch.setattr(torch.fx.Interpreter, "run", counted)
    return found


def without_estimates(messages: list[str]) -> list[str]:
    """Return lines without the time that is left, which depends on the machine."""
    return [re.sub(r" +\d+ (s|min) left$", "", line) for line in messages]


@pytest.mark.parametrize(
    ("config", "portable"),
    [
        (llama(num_hidden_layers=1, attention_bias=True), False),
        (Gemma2Config(**SHAPE, head_dim=16, sliding_window=8, attn_logit_softcapping=2.0), True),
    ],
    ids=["llama", "gemma2_portable"],
)
def test_fewer_tracings_write_the_same_file(
    config: PretrainedConfig, portable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze(config, 32, tmp_path / "frozen")
    found = record_tracings(monkeypatch)
    ours = export_into(tmp_path / "frozen", tmp_path / "ours", portable=portable)
    our_nodes, found[:] = sum(found), []
    # The libraries' default: every decomposition, one tracing a pass, copies of all constants.
    monkeypatch.setattr(passes.DecomposedOnce, "of", lambda program: program)
    monkeypatch.setattr(passes, "edge_operators_at_once", nullcontext)
    monkeypatch.setattr(passes, "ACTS_ON", {})
    monkeypatch.setattr(compat, "share_constants", nullcontext)
    theirs = export_into(tmp_path / "frozen", tmp_path / "theirs", portable=portable)
    assert ours.pte.read_bytes() == theirs.pte.read_bytes()
    assert without_estimates(ours.messages) == without_estimates(theirs.messages)
    assert our_nodes < sum(found) / 3


def test_copies_share_their_constants_while_lowering() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x

    program = torch.export.export(Scaled(), (torch.ones(3),))
    weight = program.state_dict["weight"]
    with compat.share_constants(program):
        assert copy.deepcopy(program.state_dict)["weight"] is weight
    assert copy.deepcopy(program.state_dict)["weight"] is not weight


class LargestResult(TorchDispatchMode):
    """Records the number of elements of the largest result in float."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


def test_no_table_is_converted_to_float_to_trace_a_model(tmp_path: Path) -> None:
    model, tokens = freeze(llama(), 32, tmp_path / "frozen", table_bits=(4, 8)), torch.zeros(1, 1, dtype=torch.int64)
    quantized_modules.prepare(model, {})
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad(), LargestResult() as whole:
        model(tokens)
    with torch.no_grad(), tracing._without_tables(model), LargestResult() as without:
        model(tokens)
    assert whole.numel == 288 * 64  # the head
    assert without.numel == 128 * 64  # a matrix of the MLP
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == ends


def test_progress_is_reported(exported: TinyExport) -> None:
    # One delegate a layer, and one each for the positions, the part before the first attention, and the head.
    assert "  lowering partitions 5/5" in exported.messages
    assert exported.messages[0] == "loading the frozen checkpoint"
