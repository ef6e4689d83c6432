"""Fake quantization: the merged forward, its gradients, and its equality with the frozen model."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from conftest import fill_adapters
from qat_edge.options import FinetuneOptions
from qat_edge.quant import fake, frozen, layer_functions, numerics
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme
from qat_edge.run import Run
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize_if_missing

SPEC = WeightScheme(bits=4, group_size=32, quantize_input=True)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def adapted(folder: Path, table_bits: tuple[int, int] = (8, 8)) -> tuple[PeftModel, fake.Switch, Scheme]:
    """Return a tiny model with adapters that are not zero."""
    model = load(folder)
    scheme = choose_scheme(model, 32, table_bits=table_bits)
    switch = fake.insert(model, scheme)
    torch.manual_seed(0)
    peft_model = fake.add_adapters(model, LORA)
    fill_adapters(peft_model)
    return peft_model.eval(), switch, scheme


class RoundedForward(torch.autograd.Function):
    """Returns `rounded`, and passes the gradient to `value` unchanged."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return grads[0], None


def naive(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Compute the same layer as an ordinary graph, whose gradients autograd derives."""
    merged = weight + scaling * (b @ a)
    rounded_weight = RoundedForward.apply(merged, numerics.fake_quantize_weight(merged.detach(), 4, 32))
    rounded_x = RoundedForward.apply(x, numerics.fake_quantize_activation(x.detach()).double())
    return nn.functional.linear(rounded_x, rounded_weight, bias)


def test_gradients_equal_the_naive_graph_in_float64() -> None:
    torch.manual_seed(0)
    shapes = {"x": (2, 5, 64), "weight": (48, 64), "bias": (48,), "a": (4, 64), "b": (48, 4)}
    values = {k: torch.randn(s, dtype=torch.float64) for k, s in shapes.items()}
    grads = []
    for layer in ("naive", "ours"):
        x, a, b = (values[k].clone().requires_grad_() for k in ("x", "a", "b"))
        if layer == "naive":
            output = naive(x, values["weight"], values["bias"], a, b, 0.5)
        else:
            output = layer_functions.MergedFakeQuantLinear.apply(
                x, layer_functions.rounded_input(x), values["weight"], values["bias"], a, b, None, 0.5, SPEC
            )
        output.pow(2).sum().backward()
        grads.append((output.detach(), x.grad, a.grad, b.grad))
    for ours, expected in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_no_merged_weight_is_kept_for_the_backward_pass() -> None:
    weight, a, b = torch.randn(64, 64), torch.randn(4, 64, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.data_ptr(), *t.shape)) or t, lambda t: t):
        x = torch.randn(3, 64)
        rounded = layer_functions.rounded_input(x)
        layer_functions.MergedFakeQuantLinear.apply(x, rounded, weight, None, a, b, None, 1.0, SPEC)
    matrices = [pointer for pointer, *shape in kept if shape == [64, 64]]
    assert matrices == [weight.data_ptr()]


def test_switched_off_it_is_plain_lora(tiny_model_folder: Path) -> None:
    model, switch, _ = adapted(tiny_model_folder)
    ids = torch.arange(20).unsqueeze(0)
    plain = load(tiny_model_folder)
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert not switch.enabled


@pytest.mark.parametrize("table_bits", [(8, 8), (4, 8), (8, 4), (4, 4)])
def test_the_trained_function_equals_the_frozen_one(
    tiny_model_folder: Path, tmp_path: Path, table_bits: tuple[int, int]
) -> None:
    """Fake-quantized training model -> merged -> frozen -> plain transformers: the same logits, bit for bit."""
    model, switch, scheme = adapted(tiny_model_folder, table_bits)
    assert scheme.table_bits == table_bits
    ids = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))
    switch.enabled = True
    with torch.no_grad():
        trained = model(ids).logits
    merged, _ = fake.merge_adapters(model)
    switch.enabled = False
    frozen.freeze(merged, scheme)
    merged.save_pretrained(tmp_path / "quantized")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, trained, rtol=0, atol=0)


def test_every_adapter_learns_under_fake_quantization(tiny_model_folder: Path) -> None:
    model, switch, _ = adapted(tiny_model_folder)
    switch.enabled = True
    ids = torch.arange(24).unsqueeze(0)
    model(ids, labels=ids).loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable.values())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_keeps_the_bits_of_embedding_and_head(
    tiny_model_folder: Path, tmp_path: Path, method: str, messages: list[str]
) -> None:
    """From the options through both phases and the merge into the checkpoints of QAT and of PTQ."""
    rows = [{"prompt": f"say {i}", "completion": f"{i}!"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = FinetuneOptions(
        model=str(tiny_model_folder), data=str(tmp_path / "rows.jsonl"), method=method, embedding_bits=4, head_bits=4,
        steps=4, qat_start=0.5, ptq_init="hqq", batch_size=2, track=(),
    )  # fmt: skip
    finetune(options, tmp_path / "run")
    assert [line for line in messages if "embedding and head share a table: int4 (group 32)" in line]
    for name in ("qat", "rtn"):
        folder = quantize_if_missing(Run(tmp_path / "run"), name).quantized
        scheme, weights = frozen.read_scheme(folder), frozen.read_weights(folder)
        assert scheme.table_bits == (4, 4) and scheme.tied
        embedding, head = weights[scheme.embedding], weights[scheme.head]
        assert torch.equal(embedding.codes, head.codes) and torch.equal(embedding.scales, head.scales)
        assert embedding.bits == 4 and embedding.scales.shape == (embedding.codes.shape[0], 2)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_scales_of_an_int4_head_are_not_learned(tiny_model_folder: Path, method: str) -> None:
    model = load(tiny_model_folder)
    scheme = choose_scheme(model, 32, table_bits=(4, 4))
    fake.insert(model, scheme, learned_scales=True)
    trained = fake.add_adapters(model, LORA) if method == "lora" else fake.train_weights(model)
    factors = [name for name, _ in trained.named_parameters() if fake.SCALE_FACTOR in name]
    assert len(factors) == len(scheme.linears) and not any("lm_head" in name for name in factors)


def test_a_tied_head_stays_tied(tiny_model_folder: Path) -> None:
    model, _, scheme = adapted(tiny_model_folder)
    assert scheme.tied
    base = model.get_base_model()
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight


def test_a_scaled_embedding_keeps_its_scale() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 8.0

    model = nn.Sequential(Scaled(10, 32))
    spec = WeightScheme(8, 32, quantize_input=False)
    switch = fake.insert(model, Scheme(32, False, "0", "", {"0": spec}))
    switch.enabled = True
    expected = 8.0 * numerics.fake_quantize_weight(model[0].weight.detach(), 8, 32)
    assert torch.equal(model(torch.arange(10)), expected)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_masks_columns_of_a(tiny_model_folder: Path, training: bool) -> None:
    model = load(tiny_model_folder)
    switch = fake.insert(model, choose_scheme(model, 32))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted_model = fake.add_adapters(model, config).train(training)
    fill_adapters(adapted_model, 0.5)
    switch.enabled = True
    ids = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        same = torch.equal(adapted_model(ids).logits, adapted_model(ids).logits)
    assert same is not training


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_cuda_codes_equal_those_frozen_on_cuda(tiny_model_folder: Path) -> None:
    model, switch, scheme = adapted(tiny_model_folder)
    model = model.to("cuda")
    switch.enabled = True
    ids = torch.arange(24, device="cuda").unsqueeze(0)
    with torch.no_grad():
        trained = model(ids).logits
    merged, _ = fake.merge_adapters(model)
    switch.enabled = False
    frozen.freeze(merged, scheme)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_tensor_round_it_once_and_keep_one_copy() -> None:
    shared, x = layer_functions.SharedInput(), torch.randn(3, 64)
    first = shared.rounded(x)
    assert shared.rounded(x) is first
    # Another tensor of the same values, and the same tensor with other values, are rounded anew.
    assert shared.rounded(x.clone()) is not first
    again = shared.rounded(x)
    x.mul_(2)
    torch.testing.assert_close(shared.rounded(x), 2 * again)


def test_a_shared_input_is_rounded_again_for_another_dtype() -> None:
    shared, x = layer_functions.SharedInput(), torch.randn(3, 64)
    assert shared.rounded(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert shared.rounded(x).dtype == torch.bfloat16


def test_a_rounded_input_is_kept_no_longer_than_its_source() -> None:
    shared, x = layer_functions.SharedInput(), torch.randn(3, 64)
    rounded = weakref.ref(shared.rounded(x))
    del x
    assert rounded() is None
