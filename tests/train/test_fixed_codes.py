"""`--codes fixed`: QAT trains scales alone, and the codes that ship are those of the PTQ initialization."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.models.merge import fake_quantized_model, merged_model
from qat_edge.options import ExportOptions, FinetuneOptions, QuantizeOptions
from qat_edge.quant import frozen, layer_functions, numerics
from qat_edge.quant.codebook import codebook_of
from qat_edge.run import Run
from qat_edge.train.option_checks import check_combination
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.verify import require_equal, verify


@pytest.fixture(scope="module")
def options(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"prompt": f"say {i} ", "completion": f"it is {i}"} for i in range(40)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FinetuneOptions(
        model=str(tiny_model_folder), data=str(folder / "train.jsonl"), eval_data=str(folder / "eval.jsonl"),
        steps=8, qat_start=0.5, batch_size=4, lora_rank=4, track=(), codes="fixed", scale_learning_rate=0.02,
        save_every=1,
    )  # fmt: skip


@pytest.fixture(scope="module", params=[4, 2])
def trained(options: FinetuneOptions, request: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("trained") / "run"
    finetune(dataclasses.replace(options, weight_bits=request.param), out)
    return Run(out)


def test_scales_alone_are_trained_and_codes_are_those_of_the_start(trained: Run) -> None:
    metadata = read_manifest(trained.adapter)
    assert metadata["fixed_codes"] and metadata["learned_scales"]
    assert metadata["qat_guard"]["moved"]["codes_changed"] == 0
    assert read_manifest(trained.reference)["fixed_codes"] is False

    start, merged = load_file(trained.path / "start" / "start.safetensors"), merged_model(trained.adapter)
    changed = 0
    for name, spec in merged.scheme.linears.items():
        weight, scales = merged.model.get_submodule(name).weight, merged.scales[name]
        assert isinstance(weight, torch.Tensor)
        before = start[f"{name}.scales"].float()
        changed += int((scales != before).sum())
        # The merged weight is a multiple of its scale, and the same multiple of the scale it began with.
        codes = numerics.quantize(weight, scales, spec.codebook)
        assert torch.equal(numerics.dequantize(codes, scales), weight)
    assert changed > 100


def test_the_adapters_stay_those_of_phase_1(trained: Run) -> None:
    checkpoints = sorted(trained.checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    last = load_file(checkpoints[-1] / "adapter_model.safetensors")
    kept = load_file(trained.adapter / "adapter_model.safetensors")
    factors = [name for name in kept if "scale_factor" in name]
    assert factors and all(torch.equal(last[name], kept[name]) for name in kept if name not in factors)
    assert any(bool((kept[name] != 1).any()) for name in factors)


def test_the_frozen_checkpoint_computes_what_training_did(trained: Run) -> None:
    quantize(trained, QuantizeOptions())
    ids = torch.arange(3, 43).unsqueeze(0)
    with torch.no_grad():
        expected = fake_quantized_model(trained.adapter)(ids).logits
        found = frozen.load(trained.quantized)(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    export(trained, ExportOptions(target=("onnx",), context_length=64))
    require_equal(verify(trained, []))


def test_a_resumed_training_ends_the_same(options: FinetuneOptions, tmp_path: Path) -> None:
    finetune(options, tmp_path / "whole")
    finetune(options, tmp_path / "run")
    run = Run(tmp_path / "run")
    for path in run.checkpoints.glob("checkpoint-[78]"):
        shutil.rmtree(path)
    shutil.rmtree(run.adapter)
    (run.path / "training.json").unlink()
    finetune(options, run.path, resume=True)
    expected, found = (load_file(Run(tmp_path / n).adapter / "adapter_model.safetensors") for n in ("whole", "run"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_manifest_that_does_not_say_so_is_refused(trained: Run, tmp_path: Path) -> None:
    """Merged as trained codes, some weights would round to other codes than those of training."""
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    path = run.adapter / MANIFEST
    entries = json.loads(path.read_text())
    del entries["fixed_codes"]
    path.write_text(json.dumps(entries))
    with pytest.raises(RunError, match=r"'fixed_codes' is false, and .* says true"):
        merged_model(run.adapter)


@pytest.mark.parametrize("codes", [codebook_of(4), codebook_of(2, "seq"), codebook_of(2)])
def test_gradients_equal_those_of_the_same_graph_in_float64(codes: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64, dtype=torch.float64)
    fixed = numerics.quantize(torch.randn(48, 64), torch.full((48, 2), 0.5), codes)
    scales = torch.rand(48, 2, dtype=torch.float64) + 0.5
    bias = torch.randn(48, dtype=torch.float64)
    grads = []
    for ours in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, scales, bias)]
        if ours:
            output = layer_functions.FixedCodesLinear.apply(
                leaves[0], layer_functions.rounded_input(x), fixed, leaves[1], leaves[2]
            )
        else:
            # Straight-through: the forward pass has the rounded values, the gradients are those of the values.
            rounded_x = leaves[0] + (numerics.fake_quantize_activation(x) - x).detach()
            rounded = leaves[1] + (numerics.representable(scales) - scales).detach()
            output = nn.functional.linear(rounded_x, numerics.dequantize(fixed, rounded), leaves[2])
        output.pow(2).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": "fixed"}, "--codes fixed and --scales fixed"),
        ({"method": "full"}, "--codes fixed and --method full"),
        ({"qat_learning_rate": 1e-4}, "--codes fixed and --qat-learning-rate 0.0001"),
    ],
)
def test_combinations_without_effect_are_refused(
    options: FinetuneOptions, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_combination(dataclasses.replace(options, **changes))


def test_two_bits_train_scales_alone_for_half_of_the_steps_by_default() -> None:
    four = FinetuneOptions(model="m", data="d", steps=10)
    assert (four.start_of_qat, four.has_fixed_codes) == (0.9, False)
    two = dataclasses.replace(four, weight_bits=2)
    assert (two.start_of_qat, two.has_fixed_codes) == (0.5, True)
    assert dataclasses.replace(two, qat_start=4.0).start_of_qat == 4
    assert (
        dataclasses.replace(four, codes="fixed").has_fixed_codes
        and not dataclasses.replace(two, codes="trained").has_fixed_codes
    )
    # Options that train weights, or no scales.
    for name, value in (
        ("method", "full"), ("scales", "fixed"), ("qat_learning_rate", 1e-4), ("scale_learning_rate", 0.0)
    ):  # fmt: skip
        assert not dataclasses.replace(two, **{name: value}).has_fixed_codes
