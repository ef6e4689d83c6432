"""Read the files of an adapter, or of a whole trained model: exactly what `merge.save_weights` wrote, or an error.

peft fills tensors that are missing with random values, drops those without a place, and knows many kinds of adapters
that are no product B A next to a weight (DoRA, rank-stabilized scaling, replicated layers, biases). The layers of
`quant.fake` compute one kind, so every key of adapter_config.json that means another one is refused, and every tensor
of a file has to be expected, in its shape and type.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qat_edge import config, readers
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST
from qat_edge.options import FinetuneOptions
from qat_edge.quant.codebook import SEQ
from qat_edge.quant.ptq.method_names import COMPENSATED, RENAMED_METHODS, STORED
from qat_edge.readers import counted

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHOWN_NAMES = 3  # of tensors, in a message
# Keys of adapter_config.json that do not change what the adapter computes.
DESCRIPTIVE = ("base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version", "revision")
# Keys that finetune sets, and that are checked one by one. All others have peft's default.
SET_BY_US = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "task_type")
# The record of a run's inputs, which `finetune --resume` compares too, and the entries of it that decide codes.
INPUTS = Path("checkpoints", "inputs.json")
COMPARED_INPUTS = (
    "model.identity.files", "model.identity.revision", "kept_layers", "bits", "frozen_base.sha256", "data.sha256",
    "eval_data.sha256",
)  # fmt: skip
# What entries of a manifest that were added later are where they are missing.
BEFORE = {"weight_bits": 4, "weight_levels": SEQ, "fixed_codes": False, "unmerged": False}
TRAIN_AGAIN = "Restore the file, or train again."


# --- adapter_config.json -----------------------------------------------------------------------------------


def read_config(folder: Path, heads: list[str] | None, source: Mapping[str, Any]) -> LoraConfig:
    """Read adapter_config.json, and refuse what `fake.LoraFakeQuantLinear` does not compute.

    Args:
        folder: Folder of the adapter.
        heads: Layers that are trained themselves, next to the adapters; None for a model that generates text.
        source: Entry "model" of the manifest.

    Raises:
        RunError: It is missing or damaged, or a value is not what finetune writes; the message names key and value.
    """
    path = folder / ADAPTER_CONFIG
    values = readers.read_object(path, RunError)
    _refuse_other_kinds(path, values)
    expected = {"task_type": None if heads is not None else "CAUSAL_LM", "modules_to_save": heads}
    for key, value in expected.items():
        if values.get(key) != value:
            raise _unexpected(path, key, values.get(key), json.dumps(value))
    _check_numbers(path, values)
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(name, str) and name for name in targets) or not targets:
        raise _unexpected(path, "target_modules", targets, "a list of names")
    _check_base(path, values.get("base_model_name_or_path"), source)
    return LoraConfig(**{key: values.get(key) for key in SET_BY_US})


def _refuse_other_kinds(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse every key with another value than peft's default, apart from those that finetune sets.

    Raises:
        RunError: Names the key and its value.
    """
    # As in a file: tuples are lists, and enumerations are text.
    defaults = {key: json.dumps(value, default=str) for key, value in LoraConfig().to_dict().items()}
    for key, value in values.items():
        if key in (*SET_BY_US, *DESCRIPTIVE):
            continue
        if key not in defaults:
            # Another version of peft may have more options. One that is off changes nothing.
            if value:
                raise _unexpected(path, key, value, "null")
        elif json.dumps(value) != defaults[key]:
            raise _unexpected(path, key, value, defaults[key])


def _unexpected(path: Path, key: str, found: Any, expected: str) -> RunError:
    """Return the error for a key whose value changes what the adapter computes. expected: JSON, or words."""
    return RunError(
        f"{path}: '{readers.shorten(str(key))}' is {_show(found)}, and finetune writes {expected}: an adapter with "
        f"another value computes something that is not merged. {TRAIN_AGAIN}"
    )


def _show(value: Any) -> str:
    """Return a value from a JSON file as it is written there, cut."""
    return readers.shorten(json.dumps(value))


def _check_numbers(path: Path, values: Mapping[str, Any]) -> None:
    """Check rank, alpha and dropout: types, bounds, and the options that the run was trained with.

    Raises:
        RunError: Names the key.
    """
    trained = trained_options(path.parent)
    fields = {field.name: field for field in dataclasses.fields(FinetuneOptions)}
    for key, name in (("r", "lora_rank"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        value, (least, most) = values.get(key), fields[name].metadata["bounds"]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most or (key != "lora_dropout" and not isinstance(value, int)):
            raise _unexpected(path, key, value, f"a number from {least:g} to {most:g}")
        if trained is not None and value != getattr(trained, name):
            raise RunError(
                f"{path}: '{key}' is {value}, and the run was trained with {config.flag_name(name)} "
                f"{getattr(trained, name)} ({path.parent.parent / 'config.yaml'}). {TRAIN_AGAIN}"
            )


def _check_base(path: Path, found: Any, source: Mapping[str, Any]) -> None:
    """Refuse an adapter that names another base model than its manifest: shapes alone do not tell two models apart.

    Raises:
        RunError: Names both.
    """
    # The name of a GGUF file or of a model on the Hub is not a path.
    if source["identity"].get("kind") != "folder" or found is None:
        return
    known = {str(Path(name).resolve()) for name in (source["source"], source["identity"]["name"])}
    if not isinstance(found, str) or str(Path(found).resolve()) not in known:
        raise RunError(
            f"{path}: 'base_model_name_or_path' is {readers.show(found)}, and {MANIFEST} next to it names "
            f"{source['source']}: the adapter belongs to another model. {TRAIN_AGAIN}"
        )


# --- the run's own record ----------------------------------------------------------------------------------


def trained_options(folder: Path) -> FinetuneOptions | None:
    """Return the options in config.yaml of the run that a folder of trained weights is part of; None without a run.

    Raises:
        RunError: The file was changed: it cannot be read, or an option is missing, unknown or of another type.
    """
    path = folder.parent / "config.yaml"
    return config.load_trained(path) if path.is_file() else None


def check_record(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Compare the manifest of trained weights with the place that they are in, and with what the run recorded.

    Raises:
        RunError: They are of another training, or of another part of it.
    """
    # The weights of phase 1 and of the end have equal names and shapes.
    kind = metadata.get("kind")
    if folder.name in ("adapter", "reference") and kind != folder.name:
        raise RunError(
            f"{folder / MANIFEST}: says that this is the {readers.shorten(kind)} of a run, not its {folder.name}. "
            "Restore the folder, or train again."
        )
    trained = trained_options(folder)
    if trained is not None:
        path = folder.parent / "config.yaml"
        entries = _entries_of(trained, kind == "adapter")
        if kind == "adapter" and trained.frozen_base is None:
            entries["start.rotation_seed"] = _rotation_seed(trained, metadata)
        _compare(folder, metadata, entries, path)
    start = folder.parent / "start" / MANIFEST
    if kind == "adapter" and start.is_file():  # earlier versions have no seed there
        seed = readers.read_object(start, RunError).get("rotation_seed", MISSING)
        _compare(folder, metadata, {"start.rotation_seed": seed}, start)
    if (folder.parent / INPUTS).is_file():
        recorded = readers.read_object(folder.parent / INPUTS, RunError)
        entries = {name: _entry(recorded, name) for name in COMPARED_INPUTS}
        _compare(folder, metadata, entries, folder.parent / INPUTS)


def _entries_of(options: FinetuneOptions, is_end: bool) -> dict[str, Any]:
    """Return entries of a manifest as a training with these options writes them. is_end: After phase 2."""
    is_chosen = options.ptq_init != STORED  # else the model has groups and bits of its own
    initialized = is_end and (options.ptq_init != "none" or options.scales != "absmax")
    return {
        "seed": options.seed,
        "group_size": options.group_size if is_chosen else MISSING,
        "method": options.method,
        "base": options.base,
        "table_bits": [options.embedding_bits, options.head_bits] if is_chosen else MISSING,
        "weight_bits": options.weight_bits,
        # A file of bits may set the levels.
        "weight_levels": options.weight_levels or (MISSING if options.bits else SEQ),
        "learned_scales": is_end and options.scales == "learned",
        "fixed_codes": is_end and options.has_fixed_codes,
        "unmerged": is_end and options.frozen_base is not None,
        "start.method" if initialized else "start": options.ptq_init if initialized else None,
    }


def _rotation_seed(options: FinetuneOptions, metadata: Mapping[str, Any]) -> int | None:
    """Return the seed of the rotation of a training; with --rotate auto, whether there was one is up to the model."""
    is_possible = options.method == "lora" and options.ptq_init in COMPENSATED
    if options.rotate == "off" or (options.rotate == "auto" and not is_possible):
        return None
    is_rotated = options.rotate == "on" or _entry(metadata, "start.rotation_seed") not in (None, MISSING)
    return options.seed if is_rotated else None


def _compare(folder: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any], path: Path) -> None:
    """Compare entries of a manifest with those of a record. path: File of the record, for the message.

    Raises:
        RunError: One differs.
    """
    for name, value in expected.items():
        found = RENAMED_METHODS.get(str(_entry(metadata, name)), _entry(metadata, name))
        # An earlier version did not record every entry; some it could not do otherwise.
        if found is MISSING:
            found = BEFORE.get(name, MISSING)
        if found is not MISSING and value is not MISSING and found != value:
            raise RunError(
                f"{folder / MANIFEST}: '{name}' is {_show(found)}, and {path} says {_show(value)}: the "
                "weights are of another training, or a file was changed. Restore the files, or train again."
            )


def _entry(document: Mapping[str, Any], name: str) -> Any:
    """Return the entry at a path of keys with dots between them: MISSING, or None below an entry that is None."""
    value: Any = document
    for key in name.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


# --- tensors -----------------------------------------------------------------------------------------------


def read_tensors(
    path: Path, expected: Mapping[str, Tensor], optional: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read a file of trained tensors.

    Args:
        path: A safetensors file.
        expected: Tensors of the model that they are read for, by their names in the file.
        optional: Further tensors that may be in the file; other names of an expected one among them.

    Raises:
        RunError: The file is missing or damaged; a tensor is missing, has no place, another shape or type, or holds
            values that are not finite. The message names the tensors.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing, although the manifest next to it is of trained weights. {TRAIN_AGAIN}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: damaged ({readers.shorten(str(error), 200)}). {TRAIN_AGAIN}") from error

    places = {**(optional or {}), **expected}
    present = {places[name].data_ptr() for name in tensors.keys() & places.keys()}
    missing = {name for name in expected.keys() - tensors.keys() if expected[name].data_ptr() not in present}
    faults = _name_faults(missing, tensors.keys() - places.keys())
    for name in sorted(tensors.keys() & places.keys()):
        found, wanted = tensors[name], places[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            faults.append(f"{name} is {_describe(found)}, expected {_describe(wanted)}")
        elif not bool(torch.isfinite(found).all()):
            faults.append(f"{name} holds values that are not finite")
    if faults:
        more = f"; and {len(faults) - SHOWN_NAMES} more" if len(faults) > SHOWN_NAMES else ""
        raise RunError(
            f"{path}: not what this training wrote: {'; '.join(faults[:SHOWN_NAMES])}{more}. Restore the files of "
            "the folder, or train again."
        )
    return tensors


def _name_faults(missing: Collection[str], extra: Collection[str]) -> list[str]:
    """Return a phrase for the tensors that are missing, and one for those without a place."""
    faults = []
    for names, what in ((sorted(missing), "missing"), (sorted(extra), "without a place in the model")):
        if names:
            more = ", ..." if len(names) > SHOWN_NAMES else ""
            faults.append(f"{counted(len(names), 'tensor')} {what} ({', '.join(names[:SHOWN_NAMES])}{more})")
    return faults


def _describe(tensor: Tensor) -> str:
    """Return type and shape: "float32 [4, 64]"."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
