"""Base weights in 16 bits: the same numbers as in float32, in half the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from conftest import fill_adapters, make_model, make_tokenizer, plain_rows, short_training
from qat_edge.manifest import read_manifest
from qat_edge.options import QuantizeOptions
from qat_edge.quant import base_storage, fake
from qat_edge.quant.scheme import Scheme, choose_scheme
from qat_edge.run import Run
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
IDS = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))


def bfloat16_folder(folder: Path) -> Path:
    """Return a folder with the tiny model as most checkpoints are stored."""
    tokenizer = make_tokenizer()
    make_model(tokenizer).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted(model: Any) -> tuple[Any, fake.Switch, Scheme]:
    scheme = choose_scheme(model, 32)
    switch = fake.insert(model, scheme, learned_scales=True)
    torch.manual_seed(0)
    peft_model = fake.add_adapters(model, LORA)
    fill_adapters(peft_model)
    return peft_model.eval(), switch, scheme


def dtypes(model: Any, scheme: Scheme) -> set[torch.dtype]:
    base = fake.base_of(model)
    modules = (base.get_submodule(name) for name in scheme.weights)
    return {getattr(module, "base_layer", module).weight.dtype for module in modules}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_fit_are_stored_in_16_bits(dtype: torch.dtype) -> None:
    model, _, scheme = adapted(make_model(make_tokenizer()).to(dtype).float())
    found = base_storage.narrow(model, scheme)
    # Embedding and head are one table.
    assert found.narrow == found.total == 15 and found.before_bytes == 2 * found.after_bytes
    assert dtypes(model, scheme) == {dtype}
    base_storage.widen(model, scheme)
    assert dtypes(model, scheme) == {torch.float32}


def test_weights_with_more_bits_stay_as_they_are() -> None:
    model, _, scheme = adapted(make_model(make_tokenizer()))
    found = base_storage.narrow(model, scheme)
    assert found.narrow == 0 and found.after_bytes == found.before_bytes
    assert dtypes(model, scheme) == {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_outputs_and_gradients_are_those_of_float32(autocast: bool, enabled: bool) -> None:
    results = []
    for narrow in (False, True):
        model, switch, scheme = adapted(make_model(make_tokenizer()).to(torch.bfloat16).float())
        if narrow:
            base_storage.narrow(model, scheme)
        switch.enabled = enabled
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(IDS, labels=IDS)
        output.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients) >= 2 * 14
        results.append([output.logits, output.loss, *gradients])
    for wide, narrow_result in zip(*results, strict=True):
        assert torch.equal(wide, narrow_result)


def test_a_module_that_computes_in_the_dtype_of_its_weight_keeps_float32() -> None:
    config = Gemma3TextConfig(
        vocab_size=288, hidden_size=72, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    original = Gemma3ForCausalLM(config)
    for parameter in original.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    model, _, scheme = adapted(original)
    base_storage.narrow(model, scheme)
    base = model.get_base_model()
    # Its embedding multiplies by sqrt(72) in the dtype of the table, which the head shares.
    assert base.get_input_embeddings().weight.dtype == torch.float32
    linears = {base.get_submodule(name).base_layer.weight.dtype for name in scheme.linears}
    assert linears == {torch.bfloat16}


class CastingLlama(LlamaForCausalLM):
    """A model that computes its logits in the dtype of the head's weight."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return type(output)(logits=output.logits.to(self.lm_head.weight.dtype).float())


def test_a_model_whose_outputs_would_change_keeps_float32(messages: list[str]) -> None:
    original = make_model(make_tokenizer()).to(torch.bfloat16).float()
    casting = CastingLlama(original.config).eval()
    casting.load_state_dict(original.state_dict())
    model, _, scheme = adapted(casting)
    found = base_storage.narrow(model, scheme)
    assert found.narrow == 0 and dtypes(model, scheme) == {torch.float32}
    assert any("CastingLlama computes something else" in message for message in messages)


def codes_of_training(model: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """Train for four steps, freeze, and return all tensors of both."""
    run = Run(folder)
    finetune(short_training(model, folder.parent, plain_rows(24), steps=4, **options), run.path)
    quantize(run, QuantizeOptions())
    assert read_manifest(run.adapter)["base"] == options["base"]
    return load_file(run.quantized / "model.safetensors") | load_file(run.adapter / "adapter_model.safetensors")


def require_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("method", "rotate"), [("coordinate-descent", "on"), ("hqq", "off"), ("none", "off")])
def test_a_training_over_a_bfloat16_checkpoint_is_that_of_float32(method: str, rotate: str, tmp_path: Path) -> None:
    model, recipe = bfloat16_folder(tmp_path / "model"), {"ptq_init": method, "rotate": rotate}
    narrow = codes_of_training(model, tmp_path / "narrow", base="checkpoint", **recipe)
    require_equal(narrow, codes_of_training(model, tmp_path / "wide", base="fp32", **recipe))


def test_bf16_rounds_the_base_that_training_and_freezing_see(tiny_model_folder: Path, tmp_path: Path) -> None:
    rounded = bfloat16_folder(tmp_path / "model")  # the same model, saved in bfloat16
    expected = codes_of_training(rounded, tmp_path / "expected", base="checkpoint")
    norms_too = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert all(torch.equal(p, p.bfloat16()) for p in norms_too.parameters() if p.dim() == 1)
    require_equal(expected, codes_of_training(tiny_model_folder, tmp_path / "found", base="bf16"))


def test_a_merged_model_is_float32_again() -> None:
    model, _, scheme = adapted(make_model(make_tokenizer()).to(torch.bfloat16).float())
    base_storage.narrow(model, scheme)
    merged, _ = fake.merge_adapters(model)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
