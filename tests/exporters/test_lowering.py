"""How a program is traced and lowered: in how few passes, with how few copies."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SHAPE, Exported, export_into, freeze, llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, PretrainedConfig

from qat_edge_exporters.executorch.graph import lowering, passes, tracing
from qat_edge_exporters.executorch.pte import delegates, runner_contract


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("lowering")
    freeze(llama(), 32, root / "frozen")
    return export_into(root / "frozen", root / "export")


def test_no_layer_copies_its_heads(exported: Exported) -> None:
    """Only the cosines and the sines, which all layers share, are laid out for heads behind positions."""
    pte = delegates.open_pte(exported.pte)
    plan = next(p for p in pte.program.execution_plan if p.name == runner_contract.FORWARD)
    kinds = Counter(node["xnode_union_type"] for graph in delegates.graphs(pte, plan) for node in graph["xnodes"])
    assert kinds["XNNStaticTranspose"] <= 2 and kinds["XNNReciprocalSquareRoot"] == 5
    assert kinds["XNNAdd"] == 2 * (2 + 2)  # of each of two layers: to the hidden states, and in its rotary embeddings


def tracings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nodes of every graph that is run from here on, as it is run: to trace it, to decompose it, for a pass."""
    found: list[int] = []
    run = torch.fx.Interpreter.run

    def counted(interpreter: torch.fx.Interpreter, *args: Any, **options: Any) -> Any:
        found.append(len(interpreter.graph.nodes))
        return run(interpreter, *args, **options)

    monkeypatch.setattr(torch.fx.Interpreter, "run", counted)
    return found


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
    found = tracings(monkeypatch)
    ours = export_into(tmp_path / "frozen", tmp_path / "ours", portable=portable)
    run_by_us, found[:] = sum(found), []
    # As the libraries are driven by default: every decomposition, one tracing a pass, copies of all constants.
    monkeypatch.setattr(passes.Undecomposed, "of", lambda program: program)
    monkeypatch.setattr(passes, "edge_operators_at_once", nullcontext)
    monkeypatch.setattr(passes, "ACTS_ON", {})
    monkeypatch.setattr(lowering, "_shared_constants", nullcontext)
    theirs = export_into(tmp_path / "frozen", tmp_path / "theirs", portable=portable)
    assert ours.pte.read_bytes() == theirs.pte.read_bytes()
    assert ours.messages == theirs.messages
    assert run_by_us < sum(found) / 3


def test_copies_share_their_constants_while_lowering() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * x

    program = torch.export.export(Scaled(), (torch.ones(3),))
    weight = program.state_dict["weight"]
    with lowering._shared_constants(program):
        assert copy.deepcopy(program.state_dict)["weight"] is weight
    assert copy.deepcopy(program.state_dict)["weight"] is not weight


class Largest(TorchDispatchMode):
    """Remembers how many numbers in float the largest result had."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


def test_no_table_is_put_in_float_to_trace_a_model(tmp_path: Path) -> None:
    model, tokens = freeze(llama(), 32, tmp_path / "frozen", table_bits=(4, 8)), torch.zeros(1, 1, dtype=torch.int64)
    tracing.prepare(model, {})
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad(), Largest() as whole:
        model(tokens)
    with torch.no_grad(), tracing._without_tables(model), Largest() as without:
        model(tokens)
    assert whole.numel == 288 * 64  # the head
    assert without.numel == 128 * 64  # a matrix of the MLP
    assert (model.get_input_embeddings(), model.get_output_embeddings()) == ends


def test_says_what_it_is_doing(exported: Exported) -> None:
    # One delegate a layer, and one each for positions, before the first attention and for the head.
    assert "  lowering partitions 5/5" in exported.messages
    assert exported.messages[0] == "loading the frozen checkpoint"
