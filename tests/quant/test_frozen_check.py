"""Frozen checkpoints whose tensors or scheme were changed, with new hashes in the manifest, are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import make_model, make_tokenizer, relist, stored_tensors
from qat_edge.diagnose import parity
from qat_edge.errors import ModelError, RunError
from qat_edge.manifest import MANIFEST, write_manifest
from qat_edge.quant import frozen, frozen_check, frozen_config, rotation
from qat_edge.quant.scheme import Scheme, WeightScheme, choose_scheme

UP = "model.layers.0.mlp.up_proj"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    model = make_model(make_tokenizer())
    scheme = choose_scheme(model, 32)
    frozen.freeze(model, scheme)
    model.save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(scheme), model={"source": "tiny"})
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "quantized"))


def test_a_checkpoint_as_it_was_frozen_is_read(folder: Path) -> None:
    assert len(frozen.read_weights(folder)) == 16
    assert frozen.load(folder).config.num_hidden_layers == 2


def refusal(folder: Path) -> str:
    """The message that both readers refuse a folder with."""
    relist(folder)
    found = []
    for read in (frozen.load, frozen.read_weights):
        with pytest.raises(RunError) as caught:
            read(folder)
        found.append(str(caught.value))
    assert found[0] == found[1] and str(folder) in found[0]
    return found[0]


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("scale", lambda x: x * 0, f"{UP}: scales are not positive numbers"),
        ("scale", lambda x: -x, f"{UP}: scales are not positive numbers"),
        ("scale", lambda x: x * float("nan"), f"{UP}: scales are not positive numbers"),
        ("scale", lambda x: x / 0, f"{UP}: scales are not positive numbers"),
        ("scale", lambda x: x * 1.001, f"{UP}: scales are no bfloat16 numbers"),
        ("scale", lambda x: x.bfloat16(), f"{UP}: its scales are bfloat16 [128, 2], expected float32 [128, 2]"),
        ("scale", lambda x: x[:, :1].clone(), f"{UP}: its scales are float32 [128, 1], expected float32 [128, 2]"),
        ("qdata", lambda x: torch.full_like(x, 8), f"{UP}: codes from 8 to 8, permitted are -8 to 7"),
        ("qdata", lambda x: x[:0], f"{UP}: its codes are int8 [0, 64]"),
        ("qdata", lambda x: x.float(), f"{UP}: its codes are float32 [128, 64]"),
        ("zero_point", lambda x: x + 1, f"{UP}: zero points are not zeros"),
    ],
)
def test_what_is_no_code_or_scale_is_named(
    folder: Path, name: str, edit: Callable[[Tensor], Tensor], words: str
) -> None:
    with stored_tensors(folder) as tensors:
        tensors[f"{UP}._weight_{name}"] = edit(tensors[f"{UP}._weight_{name}"])
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (torch.full((64,), float("nan")), f"{NORM}: holds values that are not finite"),
        (torch.full((64,), float("inf")), f"{NORM}: holds values that are not finite"),
        (torch.ones(64, dtype=torch.int32), f"{NORM}: is int32 [64], expected floats"),
        (torch.ones(0), f"{NORM}: is float32 [0], expected floats"),
    ],
)
def test_a_norm_that_is_no_norm_is_named(folder: Path, norm: Tensor, words: str) -> None:
    with stored_tensors(folder) as tensors:
        tensors[NORM] = norm
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, f"{UP}: its codes are int4, the scheme says 8 bits"),
        ({"group_size": 64}, f"{UP}: its scales are float32 [128, 2], expected float32 [128, 1]"),
        ({"group_size": 0}, f"{UP}: groups of 0 do not divide 64 columns"),
        ({"quantize_input": False}, f"{UP}: the rounding of its input is 'int8_asym_per_token'"),
    ],
)
def test_a_scheme_of_other_tensors_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["scheme"]["weights"][UP] |= changes
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("embedding", "nowhere", "nowhere, an end of the model, has no codes"),
        ("head", UP, "are one table in the scheme"),
    ],
)
def test_ends_that_the_model_does_not_have_are_named(folder: Path, entry: str, value: str, words: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["scheme"][entry] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("tied", "words"), [(True, "one table in the scheme"), (False, "equal, but 'scheme.tied' is false")]
)
def test_tied_ends_are_those_of_the_tensors(tmp_path: Path, tied: bool, words: str) -> None:
    model = make_model(make_tokenizer())
    if tied:  # in the manifest alone
        rotation.untie(model)
        model.lm_head.weight.data.mul_(2)
    scheme = frozen.freeze(model, choose_scheme(model, 32))
    assert scheme.tied is not tied
    model.save_pretrained(tmp_path)
    changed = frozen.scheme_metadata(scheme) | {"tied": tied}
    write_manifest(tmp_path, "quantized", scheme=changed, model={"source": "tiny"})
    assert f"model.embed_tokens and lm_head are {words}" in refusal(tmp_path)


def test_ends_that_rounding_leaves_equal_are_tied() -> None:
    model = make_model(make_tokenizer())
    rotation.untie(model)  # the same values
    chosen = choose_scheme(model, 32)
    assert not chosen.tied and frozen.freeze(model, chosen).tied


def test_a_model_without_a_head_cannot_be_tied(tmp_path: Path) -> None:
    scheme = Scheme(32, True, "embedding", "", {"embedding": WeightScheme(8, 64, quantize_input=False)})
    zeros = torch.zeros(4, 1, dtype=torch.int8)
    table = frozen_check.StoredWeight(torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 1), zeros, 8, (1, 64), None)
    with pytest.raises(RunError, match=r"'scheme\.tied' is true, and the model has no head"):
        frozen_check.require_sound(tmp_path, scheme, {"embedding": table}, iter(()))


def test_torchao_has_to_compute_what_the_scheme_says(folder: Path) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata[f"{UP}.weight"])
    description["_data"]["activation_quantization"] = None
    save_file(load_file(path), path, metadata | {f"{UP}.weight": json.dumps(description)})
    assert f"{UP}: the rounding of its input is None" in refusal(folder)


def test_one_tensor_in_two_files_is_refused(folder: Path) -> None:
    save_file({NORM: torch.ones(64)}, folder / "more.safetensors")
    assert f"{NORM} is in another file of the folder, too" in refusal(folder)


@pytest.mark.parametrize("extra", [False, True])
def test_a_norm_is_neither_made_up_nor_left_out(folder: Path, extra: bool) -> None:
    with stored_tensors(folder) as tensors:
        if extra:
            tensors["model.more.weight"] = torch.ones(3)
        else:
            del tensors[NORM]
    relist(folder)
    words = "with model.more.weight, which is not in the model" if extra else f"a checkpoint without {NORM}"
    with pytest.raises(RunError, match=words):
        frozen.load(folder)


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "nonsense"}, "hidden_act 'nonsense', which transformers does not know"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0, expected a whole number of 1 or more"),
        ({"num_key_value_heads": 3}, "layers.0.self_attn.k_proj is [32, 64], and a model of config.json has [48, 64]"),
        ({"num_attention_heads": 8}, "layers.0.self_attn.o_proj is [64, 64], and a model of config.json has [64, 128]"),
        ({"vocab_size": 10**12}, "lm_head is [288, 64], and a model of config.json has [1000000000000, 64]"),
        ({"head_dim": "x"}, "head_dim 'x', expected a whole number"),
        ({"vocab_size": -1}, "vocab_size -1, expected a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, at most 10000"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "a quantization_config of 'bitsandbytes'"),
        ({"quantization_config": None}, "has the scheme of a frozen checkpoint, and config.json has no quantization"),
    ],
)
def test_a_config_json_of_another_model_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, changes)
    relist(folder)
    for read in (frozen.load, frozen.read_weights):
        with pytest.raises((ModelError, RunError)) as caught:
            read(folder)
        assert words in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda layers: layers.pop(r"re:model\.layers\.\d+\.mlp\.up_proj"), "has no settings for re:model"),
        (
            lambda layers: layers["re:lm_head"]["_data"]["weight_dtype"].update(_data="int4"),
            "has other settings for re:lm_head",
        ),
        (lambda layers: layers["re:lm_head"].update(_type="x"), "a quant_type that torchao cannot read"),
        (lambda layers: layers.update(more=layers["re:lm_head"]), "has settings for more"),
        (lambda layers: layers["re:lm_head"]["_data"].pop("weight_granularity"), "not the scheme in manifest.json"),
    ],
)
def test_a_quantizer_of_another_scheme_is_refused(
    folder: Path, edit: Callable[[dict[str, Any]], Any], words: str
) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    data = settings["quant_type"]["default"]["_data"]
    for name in ("fqn_to_config", "module_fqn_to_config"):  # one table under two names
        edit(data[name])
    change_config(folder, {"quantization_config": settings})
    found = refusal(folder)
    assert words in found and "config.json: quantization_config" in found


def test_a_quantizer_with_further_settings_is_refused(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, {"quantization_config": {**settings, "modules_to_not_convert": ["lm_head"]}})
    assert "quantization_config has modules_to_not_convert" in refusal(folder)


@pytest.mark.parametrize("changes", [{"head_dim": {"a": 1}}, {"layer_types": {"a": 1}}])
def test_values_that_transformers_fails_on_are_one_error(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, changes)
    relist(folder)
    for read in (frozen.load, frozen.read_weights):
        with pytest.raises((ModelError, RunError), match=r"config\.json"):
            read(folder)


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 0.5}, {"hidden_act": "gelu"}, {"attention_bias": True}])
def test_a_config_json_of_another_function_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["model_config"] = frozen_config.settings_of(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert frozen.load(folder).config.num_hidden_layers == 2
    change_config(folder, changes)
    key = next(iter(changes))
    assert f"config.json has {key} {json.dumps(changes[key])}, and the model was frozen with" in refusal(folder)


def test_settings_of_a_generation_that_cannot_be_read_name_their_file(folder: Path) -> None:
    path = folder / "generation_config.json"
    for changes in ({"pad_token_id": []}, {"cache_implementation": {}}):
        path.write_text(json.dumps(changes))
        relist(folder)
        with pytest.raises((ModelError, RunError), match=r"generation_config\.json"):
            frozen.load(folder)


def test_the_run_of_an_artifact_cannot_be_switched_off(folder: Path) -> None:
    change_config(folder, {"quantization_config": None})
    relist(folder)
    with pytest.raises(RunError, match=r"manifest\.json has the scheme of a frozen checkpoint"):
        parity.not_comparable(folder)
