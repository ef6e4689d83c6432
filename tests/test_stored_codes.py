"""Models that torchao quantized: their codes and scales arrive in every artifact, or their numbers are rounded anew."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import FqnToConfig, Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType
from transformers import AutoModelForCausalLM, TorchAoConfig

import qat_edge
from conftest import in_hub_cache, make_model, make_tokenizer, plain_rows
from qat_edge import config
from qat_edge.cli import commands
from qat_edge.errors import ModelError, UsageError
from qat_edge.models.load import load_model
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge.train.option_checks import check_combination
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.quantize_model import quantize_model
from qat_edge.verbs.report import report

IDS = torch.arange(3, 43).unsqueeze(0)
WEIGHTS = "model.safetensors"
# torchao's published models have these: int4 in groups of 32, int8 rows of the embedding, scales in bfloat16.
LINEAR = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int4, weight_granularity=PerGroup(32), weight_scale_dtype=torch.bfloat16
)
INT8 = Int8DynamicActivationIntxWeightConfig(
    weight_dtype=torch.int8, weight_granularity=PerAxis(0), weight_scale_dtype=torch.bfloat16
)
EMBEDDING = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0), scale_dtype=torch.bfloat16)


def quantized_by_torchao(folder: Path, **configs: Any) -> Path:
    """Write a tiny model as torchao quantizes it.

    Args:
        folder: Where to.
        configs: "linear", "embedding", "head": torchao's configuration, or None for float; "layer": of one layer;
            "tied": one table for embedding and head; "dtype": of the floats, bfloat16 by default;
            "shard_size": of the largest file.
    """
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if not configs.pop("tied", False):
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())
    source = folder.with_name(f"{folder.name}-float")
    model.save_pretrained(source)
    layer, dtype = configs.pop("layer", None), configs.pop("dtype", torch.bfloat16)
    shard_size = configs.pop("shard_size", "5GB")
    parts = {"linear": LINEAR, "embedding": EMBEDDING, "head": LINEAR} | configs
    names = {
        **({} if layer is None else {"model.layers.1.mlp.up_proj": layer}),
        r"re:model\.layers\..*_proj": parts["linear"], "model.embed_tokens": parts["embedding"],
        "lm_head": parts["head"],
    }  # fmt: skip
    config = TorchAoConfig(
        FqnToConfig({name: value for name, value in names.items() if value is not None}),
        include_input_output_embeddings=True, modules_to_not_convert=[],
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    loaded.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_by_torchao(tmp_path_factory.mktemp("torchao") / "model")


@pytest.fixture
def model_copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in plain_rows(40)))
    return path


def options(rows: Path, **changes: Any) -> QuantizeOptions:
    return replace(QuantizeOptions(method="stored", calibration_data=str(rows)), **changes)


@pytest.fixture(scope="module")
def kept(model_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("kept") / "run"
    quantize_model(str(model_folder), out, options(rows))
    return Run.open(out)


def as_pickles(folder: Path, files: int = 1) -> None:
    """Store the weights of a folder as torch.save does, as transformers did before its version 5."""
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / WEIGHTS).unlink()
    names = list(state)
    if files == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    parts = [f"pytorch_model-{part + 1:05}-of-{files:05}.bin" for part in range(files)]
    for part, file in enumerate(parts):
        torch.save({name: state[name] for name in names[part::files]}, folder / file)
    weight_map = {name: parts[position % files] for position, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def assert_equal_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(commands.main, [str(argument) for argument in arguments])


# --- codes that stay -----------------------------------------------------------------------------------------


def test_codes_and_scales_are_those_of_the_file(kept: Run, model_folder: Path) -> None:
    theirs, ours = load_file(model_folder / WEIGHTS), load_file(kept.quantized / WEIGHTS)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        if name.endswith("_scale"):
            # A group of zeros has no scale that matters, and gets one that can be divided by.
            codes = theirs[name.replace("_scale", "_qdata")].unflatten(1, (tensor.shape[1], -1))
            used = (codes != 0).any(dim=-1)
            assert torch.equal(tensor.float()[used], ours[name][used]), name
        else:
            assert torch.equal(tensor.to(ours[name].dtype), ours[name]), name


def test_the_function_is_that_of_transformers(rows: Path, tmp_path: Path) -> None:
    model = quantized_by_torchao(tmp_path / "model", dtype=torch.float32)
    quantize_model(str(model), tmp_path / "run", options(rows))
    theirs = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(frozen.load(tmp_path / "run/quantized")(IDS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("files", [1, 3])
def test_pickles_have_the_same_codes(files: int, model_copy: Path, kept: Run, rows: Path, tmp_path: Path) -> None:
    as_pickles(model_copy, files)
    quantize_model(str(model_copy), tmp_path / "run", options(rows))
    assert_equal_tensors(tmp_path / "run/quantized", kept.quantized)


def test_shards_have_the_same_codes(kept: Run, rows: Path, tmp_path: Path) -> None:
    model = quantized_by_torchao(tmp_path / "model", shard_size="60KB")
    assert len(list(model.glob("model-*.safetensors"))) > 2
    quantize_model(str(model), tmp_path / "run", options(rows))
    assert_equal_tensors(tmp_path / "run/quantized", kept.quantized)


def test_pickles_of_other_kinds_have_them_too(model_copy: Path, kept: Run, rows: Path, tmp_path: Path) -> None:
    as_pickles(model_copy)
    path = model_copy / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    state["model.norm.weight"] = torch.nn.Parameter(state["model.norm.weight"])
    torch.save(state, path, _use_new_zipfile_serialization=False)
    (model_copy / "other.safetensors").write_bytes(b"")
    quantize_model(str(model_copy), tmp_path / "run", options(rows))
    assert_equal_tensors(tmp_path / "run/quantized", kept.quantized)


def test_a_model_of_int8_layers_alone_has_no_groups(rows: Path, tmp_path: Path) -> None:
    model = quantized_by_torchao(tmp_path / "model", linear=INT8, head=INT8)
    quantize_model(str(model), tmp_path / "run", options(rows))
    assert frozen.read_scheme(tmp_path / "run/quantized").widths == {8}


def test_every_artifact_has_them(kept: Run, rows: Path, tmp_path: Path) -> None:
    run = Run(Path(shutil.copytree(kept.path, tmp_path / "run")))
    qat_edge.export(run, target=["executorch", "onnx", "gguf", "hf"], context_length=64, ptq=("none",))
    verified = qat_edge.verify(run)
    assert len(verified) == 4 and all(not result.faults for result in verified)
    (measured,) = qat_edge.validate(
        run, target=["onnx"], eval_data=rows, tokens=64, prompts=2, max_new_tokens=4, prefill=8, decode=4, repeats=1
    )
    assert {row.name for row in measured.measured} == {"fp32 model", "quantized (stored codes)"}
    assert "Stored codes (this run)" in report([run]).read_text()


def test_settings_of_generation_are_those_of_the_file(model_copy: Path, rows: Path, tmp_path: Path) -> None:
    path = model_copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, 7]}))
    quantize_model(str(model_copy), tmp_path / "run", options(rows))
    found = json.loads((tmp_path / "run/quantized/generation_config.json").read_text())
    assert set(found["eos_token_id"]) == {2, 7}


def test_int8_layers_and_floats_are_named(rows: Path, tmp_path: Path) -> None:
    model = quantized_by_torchao(tmp_path / "model", layer=INT8, head=None)
    done = cli("quantize", model, "--out", tmp_path / "run", "--method", "stored", "--calibration-data", rows)
    assert done.exit_code == 0, done.output
    assert "Stored in float, and rounded to int8 here: lm_head" in done.output
    scheme = frozen.read_scheme(tmp_path / "run/quantized")
    assert scheme.weights["model.layers.1.mlp.up_proj"].bits == 8 and scheme.weights["lm_head"].bits == 8
    stem = "model.layers.1.mlp.up_proj._weight_"
    ours, theirs = load_file(tmp_path / "run/quantized" / WEIGHTS), load_file(model / WEIGHTS)
    assert torch.equal(ours[f"{stem}qdata"], theirs[f"{stem}qdata"])
    assert torch.equal(ours[f"{stem}scale"], theirs[f"{stem}scale"].float())


def test_a_shared_table_is_one(rows: Path, tmp_path: Path) -> None:
    model = quantized_by_torchao(tmp_path / "model", tied=True, head=EMBEDDING)
    done = cli("quantize", model, "--out", tmp_path / "run", "--method", "stored", "--calibration-data", rows)
    assert done.exit_code == 0, done.output
    assert "Stored for inputs in float, which are rounded to int8 per token here: lm_head" in done.output
    assert frozen.read_scheme(tmp_path / "run/quantized").tied


def test_groups_of_zeros_keep_their_numbers(model_copy: Path, rows: Path, tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.up_proj._weight_"

    def clear(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{stem}qdata"][0, :32], tensors[f"{stem}scale"][0, 0] = 0, 1e-30

    edit_tensors(model_copy, clear)
    quantize_model(str(model_copy), tmp_path / "run", options(rows))
    assert not bool(load_file(tmp_path / "run/quantized" / WEIGHTS)[f"{stem}qdata"][0, :32].any())


def test_adapters_are_trained_next_to_them(kept: Run, rows: Path, tmp_path: Path) -> None:
    given = {"frozen_base": str(kept.path), "data": str(rows), "steps": 2, "batch_size": 2, "track": ()}
    trained = Run.open(finetune(config.load(FinetuneOptions, "finetune", None, given), tmp_path / "run").run)
    quantize(trained, QuantizeOptions())
    assert_equal_tensors(trained.quantized, kept.quantized)


# --- numbers that are rounded anew ---------------------------------------------------------------------------


def test_the_model_is_read_as_the_numbers_of_its_codes(model_folder: Path) -> None:
    stored = load_file(model_folder / WEIGHTS)
    weights = load_model(str(model_folder)).model.state_dict()
    stem = "model.layers.0.self_attn.q_proj"
    scales = stored[f"{stem}._weight_scale"].float().repeat_interleave(32, dim=1)
    assert torch.equal(weights[f"{stem}.weight"], stored[f"{stem}._weight_qdata"].float() * scales)
    assert torch.equal(weights["model.norm.weight"], stored["model.norm.weight"].float())


def test_it_can_be_trained_and_quantized_by_another_method(model_folder: Path, rows: Path, tmp_path: Path) -> None:
    quantize_model(str(model_folder), tmp_path / "hqq", options(rows, method="hqq"))
    assert Run.open(tmp_path / "hqq").name == "quantized (HQQ)"
    given = FinetuneOptions(
        model=str(model_folder), data=str(rows), steps=2, batch_size=2, lora_rank=2, ptq_init="none", track=()
    )
    finetune(given, tmp_path / "run")
    quantize(Run.open(tmp_path / "run"), QuantizeOptions())


def test_a_model_of_the_hub_is_read_like_a_folder(model_copy: Path, tmp_path: Path) -> None:
    as_pickles(model_copy)
    in_hub_cache(model_copy, tmp_path)
    # The cache's place is read when the libraries are imported.
    code = "from qat_edge.models.load import load_model; print(load_model('someone/tiny').identity.revision)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")},
    )  # fmt: skip
    assert done.stdout.strip() == "0" * 40, done.stderr


# --- refusals ------------------------------------------------------------------------------------------------

Int4 = Int8DynamicActivationIntxWeightConfig


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"linear": Int4(weight_dtype=torch.int4, weight_granularity=PerGroup(32))}, "scales that bfloat16 does not"),
        ({"layer": Int4(weight_dtype=torch.int4, weight_granularity=PerGroup(16))}, "int4 in groups of 16, and groups"),
        ({"layer": Int4(weight_dtype=torch.int4, weight_granularity=PerGroup(64))}, "int4 in groups of 32, which no"),
        ({"layer": Int4(weight_dtype=torch.int2, weight_granularity=PerGroup(32))}, "int2, and int4 and int8 are kept"),
        ({"embedding": IntxWeightOnlyConfig(torch.int8, PerGroup(32))}, "int8 in groups of 32, and int8 with one"),
        (
            {"layer": Int4(torch.int4, PerGroup(32), weight_mapping_type=MappingType.ASYMMETRIC)},
            r"zero points other than 0 \(mapping type asymmetric\)",
        ),
    ],
)  # fmt: skip
def test_a_form_without_a_scheme_is_refused(configs: dict[str, Any], message: str, rows: Path, tmp_path: Path) -> None:
    dtypes = {"weight_scale_dtype": torch.bfloat16}
    if "scales" not in message:
        configs = {
            name: replace(made, **(dtypes if isinstance(made, Int4) else {"scale_dtype": torch.bfloat16}))
            for name, made in configs.items()
        }
    model = quantized_by_torchao(tmp_path / "model", **configs)
    if "scales" in message:
        edit_tensors(model, lambda tensors: _as_float32(tensors, "model.layers.0.self_attn.q_proj._weight_scale"))
    with pytest.raises(ModelError, match=message):
        quantize_model(str(model), tmp_path / "run", options(rows))
    assert not (tmp_path / "run").exists()


def _as_float32(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].float() * 1.001


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors["lm_head._weight_scale"].neg_(), "lm_head.weight has scales that are not positive"),
        (lambda tensors: tensors["lm_head._weight_qdata"].fill_(9), "lm_head.weight has codes from 9 to 9, and int4"),
        (lambda tensors: tensors.pop("lm_head._weight_scale"), "belongs to a quantized tensor that is not whole"),
        (lambda tensors: tensors.pop("model.norm.weight"), "1 tensor is missing"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(288, 64)}), "there as codes and as a float"),
        (
            lambda tensors: tensors["model.layers.0.self_attn.q_proj._weight_scale"].mul_(2**-30),
            "int4 with scales below 1.2e-07",
        ),
    ],
)
def test_a_damaged_tensor_is_refused(edit: Any, message: str, model_copy: Path, rows: Path, tmp_path: Path) -> None:
    edit_tensors(model_copy, edit)
    with pytest.raises(ModelError, match=message):
        quantize_model(str(model_copy), tmp_path / "run", options(rows))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_a_pickle_with_floats_of_another_type_is_refused(
    dtype: torch.dtype, model_copy: Path, rows: Path, tmp_path: Path
) -> None:
    as_pickles(model_copy)
    path = model_copy / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"model.norm.weight": state["model.norm.weight"].to(dtype)}, path)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as (int8|complex64)"):
        quantize_model(str(model_copy), tmp_path / "run", options(rows))


def test_adapters_of_a_frozen_checkpoint_are_not_left_out(kept: Run, rows: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(kept.quantized, tmp_path / "model"))
    quantize_model(str(model), tmp_path / "again", options(rows))
    (model / "adapter").mkdir()
    (model / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="model/adapter: holds an adapter"):
        quantize_model(str(model), tmp_path / "run", options(rows))


def test_a_shard_that_the_index_does_not_name_is_refused(model_copy: Path, rows: Path, tmp_path: Path) -> None:
    as_pickles(model_copy, files=2)
    shutil.copyfile(model_copy / "pytorch_model-00001-of-00002.bin", model_copy / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(ModelError, match=r"does not name pytorch_model-00003-of-00003\.bin"):
        quantize_model(str(model_copy), tmp_path / "run", options(rows))


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("content", ["code", "truncated", "not listed", "no weights"])
def test_a_pickle_that_is_no_model_is_refused(
    content: str, model_copy: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    as_pickles(model_copy, files=2 if content == "not listed" else 1)
    path = model_copy / "pytorch_model.bin"
    if content == "code":
        path.write_bytes(pickle.dumps(_Harmful()) + bytes(path.stat().st_size))
    elif content == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
    elif content == "not listed":
        (model_copy / "pytorch_model-00002-of-00002.bin").unlink()
    else:
        path.unlink()
    message = {
        "not listed": "1 of the 2 files that pytorch_model.bin.index.json names are missing",
        "no weights": "has neither",
    }.get(content, "cannot be read")
    with pytest.raises(ModelError, match=message):
        quantize_model(str(model_copy), tmp_path / "run", options(rows))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_another_model_is_refused_as_before(model_copy: Path) -> None:
    as_pickles(model_copy)
    path = model_copy / "config.json"
    settings = json.loads(path.read_text())
    del settings["quantization_config"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="Pickled weights can run code"):
        load_model(str(model_copy))


def test_a_float_model_has_no_codes_to_keep(tiny_model_folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--method stored: .* has no weights that torchao quantized"):
        quantize_model(str(tiny_model_folder), tmp_path / "run", options(rows))


def test_a_run_has_none_either(kept: Run) -> None:
    with pytest.raises(UsageError, match=r"--method stored: .* is a run"):
        quantize(kept, QuantizeOptions(method="stored"))


@pytest.mark.parametrize(
    "changes", [{"group_size": 32}, {"weight_bits": 4}, {"head_bits": 8}, {"calibration_tokens": 9}]
)
def test_bits_and_groups_are_not_chosen(
    changes: dict[str, Any], model_folder: Path, rows: Path, tmp_path: Path
) -> None:
    flag = f"--{next(iter(changes)).replace('_', '-')}"
    with pytest.raises(UsageError, match=f"{flag} and --method stored"):
        quantize_model(str(model_folder), tmp_path / "run", options(rows, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 3}, "--ptq-init stored and --steps 3: .* --frozen-base BASE"),
        ({"steps": 0, "keep_layers": 1}, "--keep-layers 1: codes that a model is stored with stay"),
        ({"steps": 0, "group_size": 64}, "--group-size 64: codes that a model is stored with stay"),
    ],
)
def test_nothing_is_trained_into_them(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_combination(FinetuneOptions(model="m", data="d", ptq_init="stored", **changes))
