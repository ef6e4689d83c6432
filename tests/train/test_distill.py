"""Teachers of self-distillation: live, or cached beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from conftest import fill_adapters
from qat_edge.data.token_table import IGNORED
from qat_edge.quant import fake, scheme
from qat_edge.train import distill
from qat_edge.train.distill import CachedTeacher, LiveTeacher, write_cache

ROWS = [
    {"input_ids": list(range(10 * i, 10 * i + 12 - i)), "labels": list(range(10 * i, 10 * i + 12 - i))}
    for i in range(4)
]


def student(folder: Path) -> tuple[Any, fake.Switch]:
    """A tiny model with fake quantization, switched off, and random adapters."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    switch = fake.insert(model, scheme.choose_scheme(model, 32))
    torch.manual_seed(0)
    adapted = fake.add_adapters(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    fill_adapters(adapted)
    return adapted.eval(), switch


def batch() -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in ROWS)
    ids = [row["input_ids"] + [0] * (length - len(row["input_ids"])) for row in ROWS]
    labels = [row["labels"] + [IGNORED] * (length - len(row["labels"])) for row in ROWS]
    mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in ROWS]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


def has_target(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions whose next token has a loss: bool (rows, length)."""
    return torch.nn.functional.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))


def test_the_live_teacher_is_the_model_before_rounding_and_further_steps(tiny_model_folder: Path) -> None:
    model, switch = student(tiny_model_folder)
    inputs = batch()
    with torch.no_grad():
        before = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[
            has_target(inputs)
        ]
    teacher = LiveTeacher(model, switch, temperature=1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01)
    switch.enabled = True
    changed = {n: p.clone() for n, p in model.named_parameters()}
    torch.testing.assert_close(teacher.logits(inputs), before, rtol=0, atol=0)
    assert switch.enabled and all(torch.equal(p, changed[n]) for n, p in model.named_parameters())
    assert float(teacher.divergence(inputs, before)) == pytest.approx(0, abs=1e-4)


def test_divergence_is_summed_over_the_tokens_with_loss(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "CHUNK", 7)
    model, switch = student(tiny_model_folder)
    inputs = batch()
    teacher = LiveTeacher(model, switch, temperature=2.0)
    logits = torch.randn(int(has_target(inputs).sum()), model.config.vocab_size, requires_grad=True)
    p = (teacher.logits(inputs) / 2).softmax(-1)
    q = (logits / 2).softmax(-1)
    expected = (p * (p / q).log()).sum()
    found = teacher.divergence(inputs, logits)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, expected)))


def test_a_cache_of_all_tokens_equals_the_live_teacher(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, switch = student(tiny_model_folder)
    live, inputs, file = LiveTeacher(model, switch, 1.0), batch(), tmp_path / "teacher.safetensors"
    write_cache(live, iter([inputs]), model.config.vocab_size, file, lambda done: None)
    logits = torch.randn(*inputs["input_ids"].shape, model.config.vocab_size)
    logits = logits[has_target(inputs)]
    cached = CachedTeacher(ROWS, file, 1.0).divergence(inputs, logits)
    torch.testing.assert_close(cached, live.divergence(inputs, logits), rtol=2e-3, atol=1e-2)  # float16 of log p


def test_a_cache_of_few_tokens_is_a_lower_bound_and_finds_its_rows(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Merging choices can only lower a divergence. Batches have the rows in another order than the cache."""
    model, switch = student(tiny_model_folder)
    live, inputs, file = LiveTeacher(model, switch, 1.0), batch(), tmp_path / "teacher.safetensors"
    write_cache(live, iter([inputs]), 16, file, lambda done: None)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: tensor[order] for name, tensor in inputs.items()}
    logits = torch.randn(*inputs["input_ids"].shape, model.config.vocab_size)
    cached = CachedTeacher(ROWS, file, 1.0)
    one = cached.divergence(inputs, logits[has_target(inputs)])
    other = cached.divergence(shuffled, logits[order][has_target(shuffled)])
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    assert 0 < float(one) < float(live.divergence(inputs, logits[has_target(inputs)]))
