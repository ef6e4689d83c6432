"""Training on packed rows: the losses and gradients of the same rows in sequences of their own, in both phases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
)

from conftest import fill_adapters, make_model, make_tokenizer, plain_rows, short_training
from qat_edge.data.packed_rows import PackedRows
from qat_edge.data.token_table import IGNORED, TokenTable
from qat_edge.data.tokenization import Collator
from qat_edge.errors import UsageError
from qat_edge.models import packing_check
from qat_edge.quant import fake, scheme
from qat_edge.run import Run
from qat_edge.train.distill import CachedTeacher, LiveTeacher, write_cache
from qat_edge.train.next_token_loss import predict_targets
from qat_edge.verbs.finetune import finetune
from tools.sweep_architectures import make_config

CAPACITY = 64
# Windows of attention, of 8 tokens here, are in gemma2, gemma3_text, cohere2 and olmo3.
PACKABLE = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "cohere2", "olmo3", "starcoder2")


def make_rows(vocabulary: int) -> TokenTable:
    """Rows of 3 to 40 tokens, the first third of each without loss."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in (40, 3, 17, 29, 8, 33, 12, 5):
        ids = torch.randint(vocabulary, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * (length // 3) + ids[length // 3 :]})
    return TokenTable(rows)


def batches(vocabulary: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All rows as they are, and packed."""
    rows, collate = make_rows(vocabulary), Collator(make_tokenizer())
    packed = PackedRows(rows, CAPACITY)
    assert len(packed) < len(rows) / 2
    return collate(rows[:]), collate(packed[:])


def make_student(model: PreTrainedModel) -> tuple[Any, fake.Switch]:
    """The model with adapters and fake quantization."""
    model.config.use_cache = False  # as the trainer sets it
    switch = fake.insert(model, scheme.choose_scheme(model, 32))
    torch.manual_seed(0)
    adapted = fake.add_adapters(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    fill_adapters(adapted)
    return adapted.eval(), switch


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", PACKABLE)
def test_loss_and_gradients_are_those_of_unpacked_rows(name: str, attention: str) -> None:
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(make_config(name), attn_implementation=attention).float()
    except ValueError as error:
        assert name == "gemma2" and "scaled_dot_product_attention" in str(error)
        return
    packing_check.require_packing(model)
    model, switch = make_student(model)

    # Measured: 3e-7 of the loss and 8e-7 of the greatest gradient, in both phases. In QAT, a difference in the last bit
    # may move an activation to another int8 code on other machines.
    for switch.enabled, tolerance in ((False, 1e-6), (True, 1e-4)):
        (before, expected), (after, found) = (loss_and_gradients(model, batch) for batch in batches(256))
        torch.testing.assert_close(after, before, rtol=tolerance, atol=0)
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=10 * tolerance * float(one.abs().max()))


@pytest.mark.parametrize("name", ["opt", "bloom", "lfm2", "qwen3_next", "mamba"])
def test_models_that_mix_packed_rows_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name)).float()
    with pytest.raises(UsageError, match=r"--packing: the outputs of \w+ForCausalLM for a row depend on the other"):
        packing_check.require_packing(model)


def test_a_model_without_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model = make_model(make_tokenizer())
    forward = type(tiny_model).forward

    def without_positions(self: Any, input_ids: Tensor, use_cache: bool) -> Any:
        return forward(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(tiny_model), "forward", without_positions)
    with pytest.raises(UsageError, match="LlamaForCausalLM takes no positions of tokens"):
        packing_check.require_packing(tiny_model)


def test_teachers_give_the_divergence_of_unpacked_rows(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, switch = make_student(AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32))
    rows, file = make_rows(256), tmp_path / "teacher.safetensors"
    unpacked, packed = batches(256)
    live = LiveTeacher(model.eval(), switch, 1.0)
    write_cache(live, iter([unpacked]), 8, file, lambda done: None)
    switch.enabled = True
    with torch.no_grad():
        logits = [predict_targets(model, batch).logits for batch in (unpacked, packed)]
    for teacher in (live, CachedTeacher(rows, file, 1.0)):
        expected, found = (teacher.divergence(b, of_b) for b, of_b in zip((unpacked, packed), logits, strict=True))
        assert float(expected) > 1e-3
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def training_losses(run: Path) -> list[float]:
    return [row["loss"] for row in json.loads((run / "training.json").read_text())["curve"] if "loss" in row]


def test_a_training_on_packed_rows_resumes_to_the_same_losses(
    tiny_model_folder: Path, tmp_path: Path, messages: list[str]
) -> None:
    options = short_training(
        tiny_model_folder, tmp_path, plain_rows(40), batch_size=2, save_every=2, eval_rows=4, max_length=64,
        calibration_tokens=256, packing=True,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    finetune(options, run.path)
    shown = "\n".join(messages)
    assert "train: 40 rows packed into " in shown and "% without --packing" in shown and " sequences\n" in shown
    expected = training_losses(run.path)

    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.adapter)
    finetune(options, run.path, resume=True)
    assert training_losses(run.path) == expected and len(expected) == 6


def test_one_step_of_packed_rows_is_the_step_of_the_same_rows(tiny_model_folder: Path, tmp_path: Path) -> None:
    rows: Sequence[dict[str, str]] = plain_rows(8)
    options = short_training(
        tiny_model_folder, tmp_path, rows, steps=2, batch_size=8, qat_start=1, ptq_init="none", scales="absmax",
        eval_every=0, max_length=512,
    )  # fmt: skip
    finetune(options, tmp_path / "apart")
    finetune(replace(options, packing=True, batch_size=1), tmp_path / "packed")
    # All rows are in one batch, and in one sequence.
    assert training_losses(tmp_path / "packed") == pytest.approx(training_losses(tmp_path / "apart"), rel=1e-4)


def test_encoders_are_not_packed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 288, "dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 64}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": f"it is {i}", "label": i % 2} for i in range(8)]
    options = short_training(tmp_path / "model", tmp_path, rows, packing=True)
    with pytest.raises(UsageError, match="--packing is for models that generate text"):
        finetune(options, tmp_path / "run")
