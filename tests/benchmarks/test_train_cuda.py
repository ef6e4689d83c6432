"""The CUDA benchmark, on a tiny model on the CPU: every variant trains, and the figures are of the right things."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import train_cuda
from benchmarks.train_cuda import LORA, MODELS, VARIANTS, Setting, Trainee, VariantCost, floor, make_batch
from qat_edge.quant import fake

ROOT = Path(__file__).parents[2]
TINY = Setting("tiny", "cpu", rows=2, length=16, steps=1, gradient_checkpointing=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", [LORA, *VARIANTS])
def test_every_variant_trains_its_adapters(variant: str, checkpointing: bool) -> None:
    setting = Setting("tiny", "cpu", 2, 16, 1, checkpointing)
    trainee = Trainee.lora(setting) if variant == LORA else Trainee.qat(setting, variant)
    trained = {name: p for name, p in trainee.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for index in range(2):  # the first step moves B alone, because A's gradient is that of B = 0
        trainee.step(make_batch(setting, index))
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    has_scales = any(fake.SCALE_FACTOR in name for name in trained)
    assert has_scales == (variant in ("learned", "distill", "torch"))
    base = {p.dtype for name, p in trainee.model.named_parameters() if name.endswith("base_layer.weight")}
    assert base == {torch.bfloat16}


def test_the_command_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cuda.json"
    flags = ["--device", "cpu", "--models", "tiny", "--rows", "1", "--length", "8", "--steps", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_cuda", *flags])
    train_cuda.main()
    costs = json.loads(out.read_text())["costs"]
    assert [(c["setting"]["gradient_checkpointing"], c["variant"]) for c in costs] == [
        (checkpointing, variant) for checkpointing in (False, True) for variant in VARIANTS
    ]
    assert all(c["memory_ratio"] is None and c["step_ratio"] > 0 for c in costs)
    assert capsys.readouterr().out.count("not measured") >= len(costs)


def test_ratios_are_to_the_mean_of_both_neighbors() -> None:
    cost = VariantCost(TINY, "qat", step_s=3.0, lora_s=2.0, peak_bytes=30, lora_peak_bytes=20)
    assert cost.step_ratio == 1.5 and cost.memory_ratio == 1.5


def test_the_page_states_the_floors_and_measures_nothing_yet() -> None:
    text = (ROOT / "docs/train-cuda.md").read_text()
    assert text.count("not measured") == 9
    for name in MODELS:
        if name != "tiny":
            found = floor(Setting(name, "cpu", 4, 512, 8, False))
            assert f"| {name} | {found['bytes'] / 1e9:.3g} GB | {found['operations'] / 1e9:.3g} billion |" in text
