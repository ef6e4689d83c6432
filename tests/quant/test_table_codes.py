"""A head in 4 bits whose codes a calibrated method chose, alone or in one table with the embedding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import fill_adapters
from qat_edge.manifest import read_manifest
from qat_edge.models.merge import fake_quantized_model
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions
from qat_edge.quant import fake, frozen, numerics, qat_init
from qat_edge.quant.ptq import methods, table_codes
from qat_edge.quant.scheme import Scheme, choose_scheme
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.verify import require_equal, verify

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def calibration(rows: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 200, (rows, 48), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    return [{"input_ids": ids, "attention_mask": mask}]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def untied() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=211, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def head_inputs(model: Any) -> Tensor:
    """Return the head's inputs at the tokens of the calibration, rounded as deployed."""
    batch = calibration()[0]
    with torch.no_grad():
        hidden = model.model(**batch, use_cache=False).last_hidden_state
    return numerics.fake_quantize_activation(hidden[batch["attention_mask"].bool()])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "gptaq", "coordinate-descent"])
def test_outputs_of_the_head_are_closer_than_rounded_to_nearest(
    tiny_model_folder: Path, tied: bool, method: str
) -> None:
    model = load(tiny_model_folder) if tied else untied()
    scheme = choose_scheme(model, 32, table_bits=(4, 4))
    assert scheme.tied == tied
    inputs, before = head_inputs(model), model.lm_head.weight.detach().clone()
    scales = methods.apply(model, scheme, method, calibration())
    assert (EMBEDDING in scales) == tied and HEAD in scales
    codes = numerics.quantize(model.lm_head.weight.detach(), scales[HEAD], 4)
    rounded = numerics.dequantize(codes, scales[HEAD])
    nearest = numerics.fake_quantize_weight(before, 4, 32)
    errors = [float(((inputs @ (weight - before).T) ** 2).sum()) for weight in (rounded, nearest)]
    assert errors[0] < 0.75 * errors[1]  # of random weights and inputs; real inputs have few directions
    # The embedding's rows stay about as close to the float ones.
    assert float((rounded - before).norm()) < 1.2 * float((nearest - before).norm())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_rows_are_independent_of_how_many_are_quantized_at_once(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rows in (16384, 50):
        monkeypatch.setattr(table_codes, "ROWS", rows)
        model = load(tiny_model_folder)
        scales = methods.apply(model, choose_scheme(model, 32, table_bits=(4, 4)), "gptq", calibration())
        found.append(numerics.quantize(model.lm_head.weight.detach(), scales[HEAD], 4))
    assert float((found[0] != found[1]).float().mean()) < 0.001  # products of other shapes round differently


@pytest.mark.parametrize(
    ("bits", "words"), [((8, 8), None), ((4, 8), None), ((8, 4), "shares a table with an embedding of other bits")]
)
def test_other_tables_are_rounded_to_nearest(
    tiny_model_folder: Path, bits: tuple[int, int], words: str | None, messages: list[str]
) -> None:
    model = load(tiny_model_folder)
    before = model.lm_head.weight.detach().clone()
    scales = methods.apply(model, choose_scheme(model, 32, table_bits=bits), "gptq", calibration())
    assert not scales.keys() & {HEAD, EMBEDDING} and torch.equal(model.lm_head.weight, before)
    assert any("The head " in line for line in messages) == (words is not None)
    assert words is None or any(words in line for line in messages)


@pytest.mark.parametrize("rotation_seed", [None, 0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_trained_function_is_the_frozen_one(
    tiny_model_folder: Path, tmp_path: Path, tied: bool, rotation_seed: int | None
) -> None:
    """In training, after the start was saved and loaded, and frozen: the same codes, and logits bit for bit."""

    def adapted() -> tuple[Any, fake.Switch, Scheme]:
        model = load(tiny_model_folder) if tied else untied()
        scheme = choose_scheme(model, 32, table_bits=(4, 4))
        switch = fake.insert(model, scheme, learned_scales=True)
        torch.manual_seed(0)
        made = fake.add_adapters(model, LORA)
        fill_adapters(made)
        return made.eval(), switch, scheme

    ids = torch.randint(0, 200, (2, 33), generator=torch.Generator().manual_seed(1))
    model, switch, scheme = adapted()
    start = qat_init.prepare(model, scheme, "coordinate-descent", calibration(), rotation_seed)
    switch.enabled = True
    digest = start.save(tmp_path / "start", method="coordinate-descent")
    saved = qat_init.QatInit.load(tmp_path / "start", digest)
    again, again_switch, _ = adapted()
    qat_init.repeat(again, scheme, "coordinate-descent", saved, rotation_seed)
    again_switch.enabled = True
    with torch.no_grad():
        trained = model(ids).logits
        torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=0)
    merged, scales = fake.merge_adapters(model)
    assert HEAD in scales and (EMBEDDING in scales) == tied
    switch.enabled = False
    stored = frozen.freeze(merged, scheme, scales)
    assert stored.tied == tied
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, trained, rtol=0, atol=0)


def test_the_whole_line_with_tables_of_4_bits(tiny_model_folder: Path, tmp_path: Path, messages: list[str]) -> None:
    """Trained, exported to both targets and read back; PTQ alone prepares the tables, too."""
    rows = "".join(json.dumps({"prompt": f"say {i} ", "completion": f"it is {i}"}) + "\n" for i in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    options = FinetuneOptions(
        model=str(tiny_model_folder), data=str(tmp_path / "rows.jsonl"), eval_data=str(tmp_path / "rows.jsonl"),
        steps=4, qat_start=0.5, batch_size=4, lora_rank=4, track=(), embedding_bits=4, head_bits=4,
    )  # fmt: skip
    finetune(options, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert any(line.startswith("Outputs of the head are off by") for line in messages)
    export(run, ExportOptions(ptq=("gptq",), context_length=64))
    require_equal(verify(run, []))
    quantize(run, QuantizeOptions())
    for folder in (run.quantized, run.ptq("gptq").quantized):
        scheme, weights = frozen.read_scheme(folder), frozen.read_weights(folder)
        assert scheme.tied and scheme.table_bits == (4, 4)
        absmax = numerics.choose_scales(frozen.load(folder).lm_head.weight.dequantize(), 4, 32)
        assert not torch.equal(weights[HEAD].scales, absmax), "the method chose them"
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected, found = fake_quantized_model(run.adapter)(ids).logits, frozen.load(run.quantized)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert read_manifest(run.quantized)["scheme"]["tied"]
