"""Adapters and manifests that were changed, or made by somebody else, are refused by name instead of being merged.

Every folder is relisted: whoever changes a file can change its manifest too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import relist, train_run
from qat_edge.errors import ModelError, QatEdgeError, RunError
from qat_edge.manifest import MANIFEST, sha256
from qat_edge.models import adapter_files
from qat_edge.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qat_edge.models.layer_removal import keep_layers
from qat_edge.models.merge import merged_model
from qat_edge.run import Run

LAYER = "model.layers.0.mlp.up_proj"
UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(tiny_model_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(trained.path, tmp_path / "run")))


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder: Path, error: type[QatEdgeError] = RunError) -> str:
    """The message that refuses a folder of weights whose manifest lists the files as they are."""
    relist(folder)
    with pytest.raises(error) as caught:
        merged_model(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_finetune_writes_is_merged(run: Run) -> None:
    for folder in (run.adapter, run.reference):
        assert merged_model(folder).model.config.num_hidden_layers == 2


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (without(f"{UP}.lora_A"), f"1 tensor missing ({UP}.lora_A.weight)"),
        (without("scale_factor"), "14 tensors missing"),
        (lambda t: t | {f"{UP}.lora_magnitude_vector": torch.ones(128)}, f"in the model ({UP}.lora_magnitude_vector)"),
        (lambda t: t | {f"{UP}.lora_B.bias": torch.ones(128)}, f"1 tensor without a place in the model ({UP}.lora_B"),
        (lambda t: {n: x * float("nan") if n.startswith(f"{UP}.lora_A") else x for n, x in t.items()}, "not finite"),
        (
            lambda t: {n: x / 0 if n.startswith(f"{UP}.lora_B") else x for n, x in t.items()},
            f"{UP}.lora_B.weight holds",
        ),
        (lambda t: {n: x.bfloat16() for n, x in t.items()}, "bfloat16 [4, 128], expected float32 [4, 128]"),
        (lambda t: {n: x[:2].clone() if "lora_A" in n else x for n, x in t.items()}, "[2, 128], expected float32 [4"),
    ],
    ids=["missing", "without-scales", "dora", "bias", "nan", "infinite", "bfloat16", "rank"],
)
def test_tensors_that_training_did_not_write_are_named(
    run: Run, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    path = run.adapter / ADAPTER_WEIGHTS
    save_file(edit(load_file(path)), path)
    found = refusal(run.adapter)
    assert found.startswith(f"{path}: not what this training wrote") and words in found


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("peft_type", "IA3", "'peft_type' is \"IA3\", and finetune writes \"LORA\""),
        ("modules_to_save", ["lm_head"], "'modules_to_save' is [\"lm_head\"], and finetune writes null"),
        ("task_type", None, "'task_type' is null"),
        ("rank_pattern", {"up_proj": 2}, "'rank_pattern' is {\"up_proj\": 2}"),
        ("alpha_pattern", {"up_proj": 64}, "'alpha_pattern' is {"),
        ("use_rslora", True, "'use_rslora' is true, and finetune writes false"),
        ("use_dora", True, "'use_dora' is true"),
        ("init_lora_weights", "pissa", "'init_lora_weights' is \"pissa\", and finetune writes true"),
        ("layer_replication", [[0, 2]], "'layer_replication' is ["),
        ("trainable_token_indices", [1], "'trainable_token_indices' is ["),
        ("lora_bias", True, "'lora_bias' is true"),
        ("bias", "all", "'bias' is \"all\""),
        ("fan_in_fan_out", True, "'fan_in_fan_out' is true"),
        ("exclude_modules", ["up_proj"], "'exclude_modules' is ["),
        ("an_option_of_tomorrow", 1, "'an_option_of_tomorrow' is 1"),
        ("r", 8, "'r' is 8, and the run was trained with --lora-rank 4"),
        ("r", None, "'r' is null, and finetune writes a number from 1"),
        ("lora_alpha", 64, "'lora_alpha' is 64, and the run was trained with --lora-alpha 32"),
        ("lora_dropout", "0", "'lora_dropout' is \"0\""),
        ("target_modules", "all-linear", "'target_modules' is \"all-linear\", and finetune writes a list of names"),
        ("target_modules", ["embed_tokens"], "embed_tokens is a FakeQuantEmbedding"),
        ("target_modules", ["nowhere"], "'target_modules' does not fit the model"),
        ("base_model_name_or_path", "/elsewhere", "the adapter belongs to another model"),
    ],
)  # fmt: skip
def test_a_key_that_means_another_kind_of_adapter_is_named(run: Run, key: str, value: Any, words: str) -> None:
    change(run.adapter / ADAPTER_CONFIG, **{key: value})
    found = refusal(run.adapter)
    assert found.startswith(f"{run.adapter / ADAPTER_CONFIG}: ") and words in found


def test_fewer_target_modules_than_tensors_are_refused(run: Run) -> None:
    change(run.adapter / ADAPTER_CONFIG, target_modules=["up_proj"])
    assert "36 tensors without a place in the model" in refusal(run.adapter)


def test_a_pickle_in_place_of_the_tensors_is_not_read(run: Run) -> None:
    path = run.adapter / ADAPTER_WEIGHTS
    torch.save(load_file(path), run.adapter / "adapter_model.bin")
    path.unlink()
    assert refusal(run.adapter).startswith(f"{path} is missing")


@pytest.mark.parametrize(("taken", "place"), [("reference", "adapter"), ("adapter", "reference")])
def test_the_two_states_of_a_training_are_not_exchanged(run: Run, taken: str, place: str) -> None:
    shutil.copytree(run.path / taken, run.path / place, dirs_exist_ok=True)
    assert f"says that this is the {taken} of a run, not its {place}" in refusal(run.path / place)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("seed", 1, "'seed' is 1, and"),
        ("group_size", 64, "'group_size' is 64, and"),
        ("method", "full", "'method' is \"full\", and"),
        ("base", "nf4", "'base' is \"nf4\", and"),
        ("table_bits", [4, 8], "'table_bits' is [4, 8], and"),
        ("learned_scales", False, "'learned_scales' is false, and"),
        ("fixed_codes", True, "'fixed_codes' is true, and"),
        ("weight_bits", 2, "'weight_bits' is 2, and"),
        ("weight_levels", "integer", "'weight_levels' is \"integer\", and"),
        ("start", None, "'start.method' is null, and"),
        ("kept_layers", [0], "'kept_layers' is [0], and"),
        ("bits", {"model.layers.0.mlp.up_proj": 8}, "'bits' is {"),
        ("bits", 8, "'bits' is 8, expected dict"),
        ("table_bits", ["8", 8], "'table_bits[0]' is 8, expected int"),
        ("kept_layers", ["a"], "'kept_layers[0]' is a, expected int"),
        ("device", "tpu", "'device' is 'tpu', expected cpu or cuda"),
    ],
)
def test_a_manifest_that_is_not_of_this_run_is_refused(run: Run, entry: str, value: Any, words: str) -> None:
    change(run.adapter / MANIFEST, **{entry: value})
    found = refusal(run.adapter)
    assert found.startswith(f"{run.adapter / MANIFEST}: ") and words in found


@pytest.mark.parametrize("seed", [1, None])
def test_the_seed_of_the_rotation_is_that_of_the_run(run: Run, seed: int | None) -> None:
    metadata = json.loads((run.adapter / MANIFEST).read_text())
    assert metadata["start"]["rotation_seed"] == 0
    change(run.adapter / MANIFEST, start=metadata["start"] | {"rotation_seed": seed})
    record = run.config if seed == 1 else run.start / MANIFEST
    assert f"'start.rotation_seed' is {json.dumps(seed)}, and {record} says 0" in refusal(run.adapter)


def test_runs_without_a_seed_next_to_the_initialization_are_merged(run: Run) -> None:
    metadata = json.loads((run.start / MANIFEST).read_text())
    del metadata["rotation_seed"]
    (run.start / MANIFEST).write_text(json.dumps(metadata))
    merged_model(run.adapter)
    path = run.config
    path.write_text(path.read_text().replace("rotate: auto", "rotate: 'off'"))
    assert "'start.rotation_seed' is 0, and" in refusal(run.adapter)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("lora_rank: 4", "lora_rank: four", "finetune.lora_rank: expected int, found 'four'"),
        ("lora_rank: 4", "lora_rang: 4", "unknown key 'finetune.lora_rang'"),
        ("finetune:", "finetune: nothing\nquantize:", "section 'finetune' must hold 'key: value' lines"),
        ("  model:", "  # model:", "the section 'finetune' has no 'model'."),
        ("finetune:", "- finetune:", "expected sections such as 'finetune:', found list"),
    ],
)
def test_a_record_of_options_that_was_changed_is_named(run: Run, old: str, new: str, words: str) -> None:
    run.config.write_text(run.config.read_text().replace(old, new))
    found = refusal(run.adapter)
    assert found.startswith(f"{run.config}: ") and words in found and "--config" not in found


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t | {"model.more.scales": torch.ones(2, 2)}, "model.more.scales belongs to no quantized layer"),
        (lambda t: t | {"model.more": torch.ones(2)}, "model.more [2] has no place in the model"),
        (lambda t: t | {f"{LAYER}.scales": t[f"{LAYER}.scales"] * 0}, "are not positive scales [128, 2]"),
        (lambda t: t | {f"{LAYER}.scales": torch.ones(128, 1)}, f"{LAYER}.scales [128, 1] are not positive scales"),
        (lambda t: t | {f"{LAYER}.weight": t[f"{LAYER}.weight"] / 0}, f"{LAYER}.weight [128, 64] has no place"),
    ],
    ids=["scales", "parameter", "zero", "shape", "infinite"],
)
def test_an_initialization_that_does_not_fit_is_named(
    run: Run, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str
) -> None:
    path = run.start / "start.safetensors"
    save_file(edit(load_file(path)), path)
    metadata = json.loads((run.adapter / MANIFEST).read_text())
    change(run.adapter / MANIFEST, start=metadata["start"] | {"sha256": sha256(path)})
    found = refusal(run.adapter)
    assert found.startswith(f"{path}: not the initialization of this training") and words in found


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [0, 2], [-1]])
def test_layers_that_the_model_does_not_have_are_not_kept(tiny_model_folder: Path, kept: list[int]) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with pytest.raises(ModelError, match="not increasing numbers of the model's 2 layers"):
        keep_layers(model, kept)


def test_a_whole_model_is_read_by_the_same_checks(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"norm.weight": torch.tensor([1.0, float("inf")])}, path)
    with pytest.raises(RunError, match=r"norm\.weight holds values that are not finite"):
        adapter_files.read_tensors(path, {"norm.weight": torch.ones(2)})
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunError, match="damaged"):
        adapter_files.read_tensors(path, {"norm.weight": torch.ones(2)})
