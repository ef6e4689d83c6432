"""Loss at the positions with a target: the value and the gradients of the model's own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from conftest import fill_adapters, make_model, make_tokenizer
from qat_edge.data.token_table import IGNORED
from qat_edge.quant import fake
from qat_edge.quant.scheme import choose_scheme
from qat_edge.train import next_token_loss
from qat_edge.train.next_token_loss import ChunkedCrossEntropy, is_loss_of, predict_targets


def make_batch() -> dict[str, torch.Tensor]:
    """Three rows with prompts and answers of different lengths, one of them padded, and one without an answer."""
    ids = torch.randint(3, 200, (4, 20), generator=torch.Generator().manual_seed(2))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :12] = labels[1, :5] = labels[1, 16:] = labels[3] = IGNORED
    mask[1, 16:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_adapters(model: Any) -> Any:
    fake.insert(model, choose_scheme(model, 32)).enabled = True
    adapted = fake.add_adapters(
        model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    fill_adapters(adapted)
    return adapted.eval()


def gemma() -> Gemma2ForCausalLM:
    """A model that caps its logits after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=288, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, final_logit_softcapping=2.0,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [lambda: make_model(make_tokenizer()), gemma])
def test_loss_and_gradients_are_those_of_the_model(build: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token_loss, "CHUNK", 7)
    model, batch = with_adapters(build()), make_batch()
    seen: list[int] = []
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda _, arguments, output: seen.append(output.shape[:-1].numel()))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(**batch).loss
        predictions = predict_targets(model, batch)
        found = next_token_loss.next_token_loss(predictions) / len(predictions.targets)
    # Of 80 positions, the head computed those before a target alone.
    assert seen == [80, len(predictions.targets)] and len(predictions.targets) == 8 + 11 + 19
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # With bfloat16, products of fewer rows are summed in another order.
    tolerance = {"rtol": 0.05, "atol": 2e-3} if autocast else {"rtol": 1e-4, "atol": 1e-7}
    for ours, theirs in zip(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_cross_entropy_and_its_gradient_are_exact_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_token_loss, "CHUNK", 3)
    logits = (torch.randn(8, 11, dtype=torch.float64) * 30).requires_grad_()
    targets = torch.randint(0, 11, (8,))
    found = ChunkedCrossEntropy.apply(logits, targets)
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(3 * loss, logits)[0] for loss in (found, expected)))


def test_rows_without_a_target_have_no_loss() -> None:
    model, batch = with_adapters(make_model(make_tokenizer())), make_batch()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss = next_token_loss.next_token_loss(predict_targets(model, batch))
    loss.backward()
    assert loss.item() == 0


def test_the_logits_keep_no_float32_copy_for_the_backward_pass() -> None:
    kept: list[tuple[torch.dtype, int]] = []
    logits = torch.randn(130, 64).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t):
        ChunkedCrossEntropy.apply(logits, torch.zeros(130, dtype=torch.int64))
    assert sorted(kept, key=str) == sorted(
        [(torch.bfloat16, 130 * 64), (torch.float32, 130), (torch.int64, 130)], key=str
    )


class TwoHeads(LlamaForCausalLM):
    """A model that does not call its head with the hidden states of all positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.pop("labels", None)
        hidden = self.model(*args, **kwargs).last_hidden_state
        logits = torch.cat([self.lm_head(part) for part in hidden.split(2, dim=1)], dim=1)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return type("Output", (), {"logits": logits, "loss": loss})


def test_a_model_that_calls_its_head_otherwise_is_computed_at_all_positions() -> None:
    model = TwoHeads(make_model(make_tokenizer()).config).eval()
    batch = make_batch()
    found = predict_targets(model, batch)
    mask = functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    assert torch.equal(found.logits, model(input_ids=batch["input_ids"]).logits[mask])
    assert is_loss_of(model)


def test_a_model_that_adds_to_its_loss_keeps_it() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=False,
    )  # fmt: skip
    torch.manual_seed(0)
    assert is_loss_of(MixtralForCausalLM(config))
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    assert not is_loss_of(MixtralForCausalLM(config))
