"""Save what was trained, and load it again together with its base model, merged in float32 or not merged.

`finetune --method full` writes whole models in the adapters' place: model.safetensors and config.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import option_paths, progress, readers, remote_code
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.manifest import LIBRARIES, MANIFEST, check_files, library_version, read_manifest, write_manifest
from qat_edge.models import adapter_files
from qat_edge.models.layer_removal import keep_layers
from qat_edge.models.load import load_model
from qat_edge.models.load_config import load_config
from qat_edge.models.tasks import task_from_metadata
from qat_edge.options import BF16_BASE
from qat_edge.quant import base_storage, fake, frozen, numerics, qlora_base, rotation, scheme
from qat_edge.quant.fake import SCALE_FACTOR
from qat_edge.quant.qat_init import QatInit
from qat_edge.quant.scheme import Scheme
from qat_edge.storage import replace_folder

WHOLE_MODEL = "model.safetensors"
# Libraries whose arithmetic decides trained codes.
NUMERIC_LIBRARIES = tuple(name for name in LIBRARIES if name in ("torch", "torchao", "transformers", "peft"))
DEFAULT_TABLE_BITS = (8, 8)  # of embedding and head, for manifests from before they could be chosen


@dataclass(frozen=True)
class MergedModel:
    """A base model with its adapters merged in float32, not rounded yet.

    Attributes:
        model: On the CPU, in evaluation mode, without gradients.
        tokenizer: The base model's tokenizer.
        scheme: Bits and group size of each weight.
        scales: Group scales by module name, shape (out, in // group), of the layers that have trained scales. The
            others take their scales from their largest weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheme: Scheme
    scales: dict[str, Tensor]


class _BaseModel(NamedTuple):
    """A base model as the training loaded it, before anything was trained."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheme: Scheme


class _TrainedModel(NamedTuple):
    """A base model with adapters next to its weights, or with its own weights trained; fake quantization is off."""

    model: PreTrainedModel | PeftModel
    switch: fake.Switch
    tokenizer: PreTrainedTokenizerBase
    scheme: Scheme


# --- write and read a folder of trained weights ------------------------------------------------------------


def save_weights(
    model: PreTrainedModel | PeftModel, folder: Path, part: str, metadata: dict[str, Any], scales: bool = True
) -> None:
    """Write the adapters of a peft model, or the whole of a model without adapters, and a manifest.

    Args:
        model: The model in training.
        folder: Replaced if it exists.
        part: "adapter" or "reference", for the manifest.
        metadata: Further entries of the manifest.
        scales: Include the factors of learned scales. Without them the folder is plain LoRA, or a plain Hugging Face
            model.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if scales or SCALE_FACTOR not in name}
    with replace_folder(folder, force=True) as work:
        if isinstance(model, PeftModel):
            # Embeddings are part of the base model, even where target_modules names the head tied to them.
            model.save_pretrained(work, save_embedding_layers=False, state_dict=state)
        else:
            model.config.save_pretrained(work)
            save_file(whole_state(state), work / WHOLE_MODEL, metadata={"format": "pt"})
        write_manifest(work, part, **metadata)


def adapter_metadata(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder of trained weights.

    Raises:
        RunError: The folder contains no finished adapter, its files are not those that were written, or it is not of
            this run.
    """
    if not folder.is_dir():
        raise RunError(_why_missing(folder))
    metadata = check_files(folder)
    adapter_files.check_record(folder, metadata)
    return metadata


def _why_missing(folder: Path) -> str:
    """Return why a run has no such folder of trained weights, and what to do, for an error."""
    if not (folder.parent / "training.json").is_file():
        return (
            f"{folder} is missing: the training has not reached that point. `qat-edge finetune --resume` continues it."
        )
    # The last checkpoint has the adapter at the end of training, and no longer the reference.
    is_kept = folder.name == "adapter" and any((folder.parent / "checkpoints").glob("checkpoint-*"))
    again = (
        f"write it again from the last checkpoint with `qat-edge finetune --resume --out {folder.parent}`"
        if is_kept
        else "train again with `qat-edge finetune --force`"
    )
    return (
        f"{folder} is missing, although the training is finished: it was removed, or not copied with the run. Restore "
        f"it from a copy of the run, or {again}."
    )


# --- load models -------------------------------------------------------------------------------------------


def merged_model(adapter: Path, force: bool = False) -> MergedModel:
    """Load a base model and merge the adapters of a folder into it, in float32.

    Adapters that were trained unmerged are left out: the weights under them are those of the base.

    Args:
        adapter: RUN/adapter or RUN/reference.
        force: Merge although the quantizer or a library has another version than in training.

    Raises:
        RunError: There is no adapter, or the base model, the PTQ initialization or a library differs from training.
    """
    # Codes are rounded from the merged weights, so a merge that differs in the last bit can change a code.
    metadata = adapter_metadata(adapter)
    _check_numerics(adapter, metadata, force)
    trained = _load_trained(adapter, metadata)

    # On the device of the training: a base in few bits is dequantized there, too.
    merged, scales = fake.merge_adapters(trained.model.to(_merge_device(adapter, metadata["device"])))
    merged = merged.to("cpu").eval().requires_grad_(False)
    cpu_scales = {name: tensor.cpu() for name, tensor in scales.items()}
    return MergedModel(merged, trained.tokenizer, trained.scheme, cpu_scales)


def float_model(reference: Path, quantized: Path) -> PreTrainedModel:
    """Load the FP32 fine-tune in the basis of a checkpoint of the same run, so that parts of both can be exchanged.

    Raises:
        RunError: See `merged_model`.
    """
    # The reference is from before the rotation of phase 2, so it is rotated by the same matrix.
    merged = merged_model(reference)
    seed = read_manifest(quantized).get("rotation_seed")
    if seed is not None:
        # Whether embedding and head are tied decides which weights a rotation changes.
        tied = frozen.read_scheme(quantized).tied
        rotation.rotate(merged.model, replace(merged.scheme, tied=tied), seed)
    return merged.model


def fake_quantized_model(adapter: Path) -> PreTrainedModel | PeftModel:
    """Load the model as it was at the end of training: adapters not merged, rounded in every forward pass, float32.

    Raises:
        RunError: See `merged_model`.
    """
    trained = _load_trained(adapter, adapter_metadata(adapter))
    trained.switch.enabled = True
    return trained.model.eval().requires_grad_(False)


def base_model(adapter: Path) -> PreTrainedModel:
    """Load the base model of a training in float32, without anything trained.

    It has the layers that pruning kept, and the values that a base in few bits stands for.
    """
    # Layers stored in few bits are replaced by dense ones of the same values.
    base = _load_base(adapter, adapter_metadata(adapter))
    for name in base.scheme.linears:
        layer = base.model.get_submodule(name)
        if isinstance(layer, qlora_base.QloraLinear):
            qlora_base.restore_dense(layer)
    return base.model.eval()


# --- steps they share --------------------------------------------------------------------------------------


def base_config(adapter: Path) -> PretrainedConfig | None:
    """Read the configuration of the base model of a run's adapters, without its weights.

    None where the model is in no local folder, or is a part of a larger one: then it is known once it is merged.

    Raises:
        RunError: There is no adapter, or the model has code of its own that may not run.
        ModelError: The configuration cannot be read.
    """
    source = adapter_metadata(adapter)["model"]
    if not (Path(source["source"]) / "config.json").is_file():
        return None
    trusted = remote_code.require_for(source["trust_remote_code"], adapter)
    config = load_config(source["source"], trusted, source["source"])
    return config if config.get_text_config() is config else None


def _load_base(adapter: Path, metadata: dict[str, Any]) -> _BaseModel:
    """Repeat how the training prepared its base model: load, prune, choose the scheme, store in few bits.

    Raises:
        RunError: The model's files or its revision are not those of the training, or it has code of its own that may
            not run.
    """
    # "model" has the source as the user gave it, the identity of its weights, and the entries of its task.
    source = metadata["model"]
    if option_paths.is_gone(source["source"]):
        raise RunError(
            f"{source['source']}: no such file or folder; the run was trained on the model there. Restore it, or put a "
            "link to its new place there."
        )
    trusted = remote_code.require_for(source["trust_remote_code"], adapter)
    # At the commit of the training: code of a newer one must not run, even if the weights are refused afterwards.
    revision = source["identity"]["revision"]
    loaded = load_model(source["source"], trusted, task=task_from_metadata(source), revision=revision)

    # A Hub id may have a new commit, a folder new files. The name is not compared: a folder may have been moved.
    found, trained = dataclasses.asdict(loaded.identity), source["identity"]
    changed = [key for key in ("revision", "files") if found[key] != trained[key]]
    if changed:
        raise RunError(
            f"{source['source']} is not the model that was trained: {changed[0]} is {found[changed[0]]}, the run "
            f"was trained on {trained[changed[0]]}. Restore that model, or run finetune again."
        )
    _check_settings(source["source"], found["settings"], trained.get("settings"))

    # The same steps in the same order as in `train.setup`.
    if metadata["kept_layers"] is not None:
        keep_layers(loaded.model, metadata["kept_layers"])
    table_bits = tuple(metadata.get("table_bits", DEFAULT_TABLE_BITS))
    codes = scheme.LinearCodes.of_training(metadata)
    base = _BaseModel(
        loaded.model,
        loaded.tokenizer,
        scheme.choose_scheme(loaded.model, metadata["group_size"], metadata["bits"], table_bits, codes),
    )
    if metadata["base"] == BF16_BASE:
        base_storage.round_to_bfloat16(base.model, base.scheme)
    elif metadata["base"] in qlora_base.FORMATS:
        qlora_base.quantize_base(base.model, base.scheme.linears, metadata["base"])
    return base


def _check_settings(source: str, found: dict[str, str], trained: Any) -> None:
    """Compare the configuration and tokenizer files of a base model with those of the training.

    Raises:
        RunError: A file was changed, added or removed.
    """
    if trained is None:  # earlier versions recorded the weights alone
        return
    if not isinstance(trained, dict):
        raise RunError(f"{MANIFEST}: 'model.identity.settings' is no object. Restore the file, or train again.")
    changed = sorted(name for name in {*found, *trained} if found.get(name) != trained.get(name))
    if changed:
        raise RunError(
            f"{source} is not the model that was trained: {', '.join(map(readers.shorten, changed))} changed since. "
            "Restore what the training read, or run finetune again."
        )


def _load_trained(adapter: Path, metadata: dict[str, Any]) -> _TrainedModel:
    """Load a base model and add the contents of one folder of trained weights, without merging."""
    base = _load_base(adapter, metadata)
    unmerged = metadata.get("unmerged", False)  # earlier versions had none
    switch = fake.insert(base.model, base.scheme, metadata["learned_scales"], unmerged)

    # The PTQ initialization changed base weights before the adapters of phase 2 were trained on them. It may have
    # changed embedding and head differently, which separates them.
    tied = base.scheme.tied
    if metadata["start"]:
        QatInit.load(adapter.parent / "start", metadata["start"]["sha256"]).apply(base.model)
        tied = tied and scheme.shares_table(base.model)

    # fake.train_weights and fake.add_adapters make the same trainable layers as in training, with factors of scales.
    if metadata["method"] == "full":
        model = _load_whole_model(fake.train_weights(base.model), adapter)
    else:
        model = _load_adapters(base, adapter, metadata["model"])
    if metadata.get("fixed_codes"):  # earlier versions had none
        fake.fix_codes(model)
    return _TrainedModel(model, switch, base.tokenizer, replace(base.scheme, tied=tied))


def _load_adapters(base: _BaseModel, folder: Path, source: Mapping[str, Any]) -> PeftModel:
    """Add the adapters that `save_weights` wrote to their base model. source: entry "model" of the manifest.

    Raises:
        RunError: They are missing, of another kind, or belong to another model.
    """
    heads = base.scheme.heads if task_from_metadata(source).is_encoder else None
    config = adapter_files.read_config(folder, heads, source)
    try:
        model = fake.add_adapters(base.model, config)
    except (UsageError, ModelError) as error:
        reason = str(error).removeprefix("--target-modules: ")
        raise RunError(
            f"{folder / adapter_files.ADAPTER_CONFIG}: 'target_modules' does not fit the model ({reason}) "
            f"{adapter_files.TRAIN_AGAIN}"
        ) from error

    # Embeddings are no part of an adapter, see `save_weights`.
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = adapter_files.read_tensors(folder / adapter_files.ADAPTER_WEIGHTS, expected)
    set_peft_model_state_dict(model, tensors)
    return model


def _load_whole_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Load the weights that `save_weights` wrote into their model.

    Raises:
        RunError: They are missing, or belong to another model.
    """
    tensors = adapter_files.read_tensors(folder / WHOLE_MODEL, whole_state(model.state_dict()))
    model.load_state_dict(tensors, strict=False)  # a shared table has one of its names in the file
    return model


def whole_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with one name per tensor: a head that shares the embedding's table is left out."""
    names = {tensor.data_ptr(): name for name, tensor in reversed(state.items())}
    return {name: state[name].contiguous() for name in names.values()}


def _check_numerics(adapter: Path, metadata: dict[str, Any], force: bool) -> None:
    """Refuse to merge under other numerics than those of the training, unless forced.

    Raises:
        RunError: The quantizer or a library has another version, and `force` is not set.
    """
    # QUANTIZER is the version of our own rounding, which changes less often than that of qat-edge.
    trained = metadata["libraries"] | {"quantizer": metadata["quantizer"]}
    current = {name: library_version(name) for name in NUMERIC_LIBRARIES} | {"quantizer": numerics.QUANTIZER}
    changed = [f"{name} {now} (trained with {trained[name]})" for name, now in current.items() if trained[name] != now]
    if not changed:
        return

    difference = (
        f"{adapter} was trained with other versions: {', '.join(changed)}. A code at a rounding tie may differ."
    )
    if not force:
        raise RunError(f"{difference} Install those versions, train again, or give --force to continue.")
    progress.warn(f"--force: {difference}")


def _merge_device(adapter: Path, trained_on: str) -> str:
    """Choose the device of the training: the last bit of B A, and with it a code at a tie, depends on the device.

    Raises:
        RunError: The manifest names a device that no training has.
    """
    if trained_on not in ("cpu", "cuda"):
        raise RunError(
            f"{adapter / MANIFEST}: 'device' is {readers.show(trained_on)}, expected cpu or cuda. Restore the file, or "
            "train again."
        )
    if trained_on == "cuda" and not torch.cuda.is_available():
        progress.warn(
            "Trained on CUDA, merged on this CPU: a few codes at rounding ties may differ from those in training."
        )
        return "cpu"
    return trained_on
