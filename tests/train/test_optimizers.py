"""AdamW in 32 and in 8 bits: steps, learning rates, checkpoints, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import plain_rows, short_training
from qat_edge.errors import UsageError
from qat_edge.models.merge import WHOLE_MODEL
from qat_edge.options import ADAMW_8BIT, PlanOptions
from qat_edge.run import Run
from qat_edge.train import optimizers
from qat_edge.train.training_log import TRAINING_LOG
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.plan import plan, resolve

try:
    optimizers.require_compiler("cpu")
    NO_COMPILER = ""
except UsageError as error:
    NO_COMPILER = str(error)
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)


def losses_of(name: str, steps: int = 6) -> list[float]:
    """Fit a matrix of 4096 elements, and return the losses."""
    torch.manual_seed(0)
    layer, x, y = nn.Linear(64, 64, bias=False), torch.randn(256, 64), torch.randn(256, 64)
    optimizer = optimizers.make_optimizer([{"params": [layer.weight], "lr": 1e-2, "weight_decay": 0.0}], name, "cpu")
    losses = []
    for _ in range(steps):
        loss = (layer(x) - y).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@needs_compiler
def test_8_bits_take_the_steps_of_32_within_their_precision() -> None:
    wide, narrow = losses_of("adamw"), losses_of(ADAMW_8BIT)
    assert wide[-1] < wide[0]
    assert narrow == pytest.approx(wide, rel=0.01)


@needs_compiler
def test_the_averages_of_a_matrix_take_a_byte_a_weight() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = optimizers.make_optimizer([{"params": [weight], "lr": 1e-2}], ADAMW_8BIT, "cpu")
    weight.pow(2).sum().backward()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].codes.dtype == torch.uint8


@needs_compiler
def test_learning_rates_reach_the_compiled_step() -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    optimizer = optimizers.make_optimizer([{"params": [weight], "lr": 1e-2, "weight_decay": 0.0}], ADAMW_8BIT, "cpu")
    for rate in (1e-2, 0.0):
        before = weight.detach().clone()
        optimizers.set_learning_rate(optimizer.param_groups[0], rate)
        optimizer.zero_grad()
        weight.pow(2).sum().backward()
        optimizer.step()
        assert torch.equal(before, weight) is (rate == 0)


@needs_compiler
def test_a_training_in_8_bits_resumes_bit_for_bit(tiny_model_folder: Path, tmp_path: Path) -> None:
    options = short_training(
        tiny_model_folder,
        tmp_path,
        plain_rows(8),
        steps=4,
        method="full",
        lora_rank=16,
        ptq_init="hqq",
        optimizer=ADAMW_8BIT,
    )
    run = Run(tmp_path / "run")
    finetune(options, run.path)
    whole, losses = load_file(run.adapter / WHOLE_MODEL), curve(run)
    assert losses[-1] < losses[0]

    # As if it had been stopped after its second step.
    shutil.rmtree(run.adapter)
    for late in sorted(run.checkpoints.glob("checkpoint-[34]")):
        shutil.rmtree(late)
    assert (run.checkpoints / "checkpoint-2").is_dir()
    finetune(options, run.path, resume=True)
    again = load_file(run.adapter / WHOLE_MODEL)
    assert curve(run) == losses
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def curve(run: Run) -> list[float]:
    """Return the losses of all steps."""
    log = json.loads((run.path / TRAINING_LOG).read_text())
    return [row["loss"] for row in log["curve"] if row.get("loss") is not None]


def test_plan_refuses_what_it_cannot_count(tiny_model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(f"finetune: {{model: {tiny_model_folder}, data: rows.jsonl, optimizer: {ADAMW_8BIT}}}\n")
    with pytest.raises(UsageError, match="--optimizer adamw-8bit: plan has no prediction"):
        plan(resolve(None, PlanOptions(), {}, path))


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def fail() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    with pytest.raises(UsageError, match=r"--optimizer adamw-8bit: .* there is not a C\+\+ compiler"):
        optimizers.require_compiler("cpu")
    monkeypatch.setattr(optimizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="Triton"):
        optimizers.require_compiler("cuda")
