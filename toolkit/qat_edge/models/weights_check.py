"""Check that the files of a model and the model in memory agree, before anything is trained on it.

transformers starts missing tensors at random values and drops unexpected ones; both are log lines there. Here every
tensor that the model needs has to come out of the files, and every tensor in the files has to have a place, apart from
those whose absence or presence has a known reason:

    tied tables            one of two names that share a tensor is enough
    encoders               the head may be new, and heads of other tasks stay unused
    buffers                the class computes them; a stored copy must have the same values
    ignored by the class   transformers lists such names by architecture
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_edge import progress, readers
from qat_edge.errors import DataError, ModelError
from qat_edge.models.tasks import POOLER, ModelTask
from qat_edge.readers import counted

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # beginning of a file
# Put before every name by a wrapper around the model that was saved: prefix -> the wrapper.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel, DDP or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "Lightning",
    "base_model.model.": "peft",
}
ADAPTER_PARTS = ("lora_", ".base_layer.", "modules_to_save")  # of the names of a model saved with adapters inside
FLOATS = ("BF16", "F16", "F32", "F64")  # types of weights, as safetensors names them
ROTARY_FREQUENCIES = "inv_freq"


@dataclass(frozen=True)
class LoadReport:
    """Names that did not match when a model was loaded.

    Attributes:
        missing: Tensors of the model that are not in the files.
        unexpected: Tensors of the files that the model has no place for.
        mismatched: Tensors of another shape: name -> shape in the files, shape in the model.
    """

    missing: Collection[str]
    unexpected: Collection[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def from_transformers(cls, info: Mapping[str, Any]) -> LoadReport:
        """Return the report of `from_pretrained(..., output_loading_info=True)`."""
        mismatched = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]}
        # A tensor of another shape counts as missing in some versions.
        missing = [name for name in info["missing_keys"] if name not in mismatched]
        return cls(sorted(missing), sorted(info["unexpected_keys"]), mismatched)


# --- files --------------------------------------------------------------------------------------------------


def refuse_adapters(names: Iterable[str], source: str) -> None:
    """Refuse a source with the files of an adapter, which transformers would load or leave out without a word.

    Args:
        names: Names of the source's files.
        source: Hub id or folder, for the message.

    Raises:
        ModelError: There is an adapter.
    """
    present = set(names)
    found = [name for name in ADAPTER_FILES if name in present]
    if found:
        raise ModelError(
            f"{source}: holds an adapter ({', '.join(found)}), which is no part of the model's weights. Merge it first "
            "(`PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)`), or remove the "
            "adapter's files to train the model without it."
        )


def check_files(folder: Path) -> list[Path]:
    """Return the safetensors files that make up the model of a folder, in order.

    Raises:
        ModelError: Two sets of weights are there, a file of the index is missing or one of a set is not in the index,
            a tensor is stored twice, or a file is damaged.
    """
    index = folder / INDEX
    shards = sorted(path for path in folder.glob("model-*-of-*.safetensors"))
    single = folder / WEIGHTS

    # transformers would take the single file and leave the others out.
    if single.is_file() and (index.is_file() or shards):
        other = index.name if index.is_file() else shards[0].name
        raise ModelError(
            f"{folder}: two sets of weights: {WEIGHTS} and {other}. Only one of them can be the model; move the other "
            "one out of the folder."
        )
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = indexed_files(index, shards, ".safetensors")
    else:
        found = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[: readers.FEW])
        raise ModelError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX} (found: {found}). Rename a single file to {WEIGHTS}, or copy "
            "the index that belongs to the files."
        )

    _refuse_repeated_tensors(files)
    unread = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if unread:
        progress.warn(f"{folder}: not part of the model, and not read: {', '.join(unread)}")
    return files


def indexed_files(index: Path, shards: Sequence[Path], suffix: str) -> list[Path]:
    """Return the files with weights that an index names, in order.

    Args:
        index: The index.
        shards: Files with weights that are there, all of which it has to name.
        suffix: Of their names.

    Raises:
        ModelError: It is no index, names a file that is not there, or does not name one that is.
    """
    document = readers.parse_json(readers.read_text(index, ModelError), str(index), ModelError)
    names = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index}: has no 'weight_map' from tensors to files. Copy the model again.")

    files = [index.parent / name for name in sorted(set(names.values()))]
    outside = [path.name for path in files if path.parent != index.parent or path.suffix != suffix]
    if outside:
        raise ModelError(f"{index}: names {outside[0]!r}, which is no {suffix} file of this folder.")
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(
            f"{index.parent}: {len(missing)} of the {len(files)} files that {index.name} names are missing "
            f"({readers.first_few(missing)}). Copy or download them."
        )
    left_out = [path.name for path in shards if path not in files]
    if left_out:
        raise ModelError(
            f"{index.parent}: {index.name} does not name {readers.first_few(left_out)}. The index belongs to another "
            "model, or the files do: copy the model again, into an empty folder."
        )
    return files


def _refuse_repeated_tensors(files: Sequence[Path]) -> None:
    """Refuse files that are damaged, codes in place of weights, and tensors that are in more than one of them."""
    counts: Counter[str] = Counter()
    for path in files:
        types = _tensor_types(path)
        counts.update(types.keys())
        _refuse_codes(types, path)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ModelError(
            f"{files[0].parent}: {counted(len(repeated), 'tensor is', 'tensors are')} in more than one file "
            f"({readers.first_few(repeated)}). Copy the model again, into an empty folder."
        )


def _refuse_codes(types: Mapping[str, str], path: Path) -> None:
    """Refuse weights of types that transformers would cast to floats, although they stand for other numbers.

    Args:
        types: Type of each tensor of a file.
        path: The file.

    Raises:
        ModelError: Weights are codes of a quantized checkpoint, or no real numbers.
    """
    # Buffers, such as masks and positions, may have other types.
    found = {name: kind for name, kind in types.items() if kind not in FLOATS and name.endswith((".weight", ".bias"))}
    if not found:
        return
    integers = [name for name, kind in found.items() if kind[0] in "IU"]
    if integers:
        raise ModelError(
            f"{path}: {counted(len(integers), 'weight is', 'weights are')} stored as integers "
            f"({readers.first_few(integers)}), and config.json does not say how they stand for numbers. Start from the "
            "float model."
        )
    shown = readers.first_few([f"{name}: {kind}" for name, kind in found.items()])
    raise ModelError(
        f"{path}: {counted(len(found), 'weight is', 'weights are')} of a type that is no float of 16 bits or more "
        f"({shown}): codes that need scales to be numbers. Start from the float model."
    )


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse files that Git LFS left in the place of the real ones.

    Raises:
        ModelError: Names the file.
    """
    for path in paths:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository, or "
                    "download the file again."
                )


def _tensor_types(path: Path) -> dict[str, str]:
    """Return the names of a file's tensors, each with its type in the file's header: "F32", "BF16", "I8", ..."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"{path.parent}: the weights cannot be loaded ({path.name}: {error}). Copy or save them again."
        ) from error


# --- names of tensors ---------------------------------------------------------------------------------------


def check_loaded(model: PreTrainedModel, report: LoadReport, source: str, task: ModelTask) -> None:
    """Refuse a model whose weights do not all come from its files.

    Args:
        model: As transformers loaded it.
        report: Names that did not match.
        source: Hub id, folder or file, for the message.
        task: What the model was loaded for. An encoder may get a new head.

    Raises:
        ModelError: Tensors are missing, have no place or another shape, or a table is shared in name only.
    """
    missing, unexpected, mismatched = list(report.missing), list(report.unexpected), dict(report.mismatched)
    if task.is_encoder:
        missing = [name for name in missing if not _belongs_to_head(name, model)]
        unexpected = [name for name in unexpected if not _is_other_head(name, model)]
        new_head = {name: shapes for name, shapes in mismatched.items() if _belongs_to_head(name, model)}
        mismatched = {name: shapes for name, shapes in mismatched.items() if name not in new_head}
        if new_head:
            progress.warn(
                f"{source}: its head is for other labels ({readers.first_few(new_head)}), so training starts a new one"
            )

    if missing or unexpected or mismatched:
        raise ModelError(_describe(missing, unexpected, mismatched, model, source))
    _check_tied(model, source)


def _describe(
    missing: Sequence[str],
    unexpected: Sequence[str],
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    model: PreTrainedModel,
    source: str,
) -> str:
    """Return what does not match, and the likely cause."""
    found = []
    if missing:
        found.append(f"{counted(len(missing), 'tensor is', 'tensors are')} missing ({readers.first_few(missing)})")
    if unexpected:
        found.append(
            f"{counted(len(unexpected), 'has', 'have')} no place in the model ({readers.first_few(unexpected)})"
        )
    if mismatched:
        shapes = [f"{name}: {list(a)} in the file, {list(b)} in the model" for name, (a, b) in mismatched.items()]
        found.append(f"{counted(len(mismatched), 'has', 'have')} another shape ({readers.first_few(shapes, '; ')})")
    return (
        f"{source}: the weights are not those of a {type(model).__name__}: {', '.join(found)}. "
        f"{_likely_cause(missing, unexpected, mismatched, model)}"
    )


def _likely_cause(
    missing: Sequence[str], unexpected: Sequence[str], mismatched: Collection[str], model: PreTrainedModel
) -> str:
    """Return one sentence or two on why names differ and what to do."""
    if any(part in name for name in unexpected for part in ADAPTER_PARTS):
        return "They hold adapters that were not merged: merge them (`merge_and_unload()`) and save the model again."
    for prefix, wrapper in WRAPPERS.items():
        if any(name.startswith(prefix) for name in unexpected):
            return f"'{prefix}' comes from {wrapper}: save the model inside that wrapper, with save_pretrained."

    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if list(missing) == [f"{names.get(id(head))}.weight"]:
        return (
            "If the model has one table for embedding and head, set tie_word_embeddings to true in config.json; "
            "otherwise save the model again with its head."
        )
    if missing and unexpected and _same_but_for_prefix(missing, unexpected):
        return "The names differ by what comes first in them: save the model again with save_pretrained."
    if missing and not unexpected and not mismatched:
        return "They would start at random values: copy the missing file, or save the whole model again."
    return "config.json belongs to another model, or the weights do: copy both from one place."


def _same_but_for_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> bool:
    """Return whether most missing names end as an unexpected one does."""
    ends = {".".join(name.split(".")[-3:]) for name in unexpected}
    return sum(".".join(name.split(".")[-3:]) in ends for name in missing) > len(missing) / 2


def _check_tied(model: PreTrainedModel, source: str) -> None:
    """Refuse two different tables where the configuration says one: transformers keeps them apart, and only logs it."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return
    if getattr(model.config, "tie_word_embeddings", False) and embedding.weight is not head.weight:
        raise ModelError(
            f"{source}: config.json says that embedding and head are one table (tie_word_embeddings), but the weights "
            "hold two different ones. If the head is meant to be its own, set tie_word_embeddings to false; otherwise "
            "remove its tensor."
        )


def _belongs_to_head(name: str, model: PreTrainedModel) -> bool:
    """Return whether a tensor of an encoder comes after its blocks: it is outside of the body, or in the pooler."""
    if POOLER in name.split("."):
        return True
    body = model.base_model
    return body is not model and not name.startswith(f"{model.base_model_prefix}.")


def _is_other_head(name: str, model: PreTrainedModel) -> bool:
    """Return whether a tensor that an encoder has no place for belongs to a head for another task."""
    # A file may name the body's parts with the prefix of the architecture or without.
    parts = {child for child, _ in model.base_model.named_children()} - {POOLER}
    first, _, rest = name.partition(".")
    if first == model.base_model_prefix:
        return rest.partition(".")[0] == POOLER
    return first not in parts


# --- values -------------------------------------------------------------------------------------------------


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse weights that are NaN or infinite: training and rounding would spread them through the model.

    Raises:
        ModelError: A tensor holds such values.
    """
    found: dict[str, int] = {}
    stored = model.state_dict(keep_vars=True)
    tensors = {id(tensor): (name, tensor) for name, tensor in stored.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.values():
        if not tensor.is_floating_point():
            continue
        # A sum is NaN or infinite if any term is, and takes one read; large terms can overflow it, so look again.
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            count = int((~torch.isfinite(tensor.detach())).sum())
            if count:
                found[name] = count
    if found:
        shown = readers.first_few([f"{name}: {count}" for name, count in found.items()])
        raise ModelError(
            f"{source}: {counted(len(found), 'tensor holds', 'tensors hold')} values that are NaN or infinite "
            f"({shown}). The model was damaged when it was trained or converted; use another copy or an earlier "
            "checkpoint."
        )


def check_buffers(model: PreTrainedModel, files: Iterable[Path], source: str) -> None:
    """Refuse buffers in the files that differ from those the class computes, which are the ones in use.

    An example are rotary frequencies: old checkpoints have them for each layer, and a model that was trained with
    others than those of its configuration would be another function.

    Raises:
        ModelError: A buffer differs.
    """
    stored_names = set(model.state_dict())
    computed: dict[str, list[Tensor]] = {}
    for name, buffer in model.named_buffers():
        if name not in stored_names:
            computed.setdefault(name.rpartition(".")[2], []).append(buffer)

    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping: no __iter__)
                last = name.rpartition(".")[2]
                if name not in stored_names and last in computed:
                    _check_buffer(name, file.get_tensor(name), computed[last], model, source)


def _check_buffer(name: str, stored: Tensor, computed: Sequence[Tensor], model: PreTrainedModel, source: str) -> None:
    """Refuse a stored buffer that equals none of the computed ones of its name."""
    candidates = list(computed)
    if name.endswith(ROTARY_FREQUENCIES):
        candidates += _unscaled_frequencies(model, stored.numel())
    if any(_equal(stored, candidate) for candidate in candidates):
        return

    # Masks and positions are as long as the context, which a configuration may shorten or extend.
    if not stored.is_floating_point() and all(stored.shape != candidate.shape for candidate in candidates):
        return
    raise ModelError(
        f"{source}: the buffer {name} differs from what {type(model).__name__} computes from config.json, and only the "
        "computed one is used. The model was trained with other settings (for rotary frequencies: rope_parameters): "
        "correct config.json, or remove the buffer from the weights if it is a leftover."
    )


def _equal(stored: Tensor, computed: Tensor) -> bool:
    """Return whether two buffers agree to the precision of the stored one."""
    if stored.shape != computed.shape:
        return False
    if not stored.is_floating_point():
        return torch.equal(stored.long(), computed.long())
    # The least number that float16 holds is large for rotary frequencies.
    precision = torch.finfo(stored.dtype)
    return torch.allclose(
        stored.float(), computed.float(), rtol=max(4 * precision.eps, 1e-5), atol=float(precision.smallest_normal)
    )


def _unscaled_frequencies(model: PreTrainedModel, count: int) -> list[Tensor]:
    """Return the rotary frequencies before any scaling: what old checkpoints store next to a scaling of positions."""
    parameters: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    per_type = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    bases = [float(value["rope_theta"]) for value in per_type if value.get("rope_theta")]
    return [base ** -(torch.arange(count, dtype=torch.float32) / count) for base in bases]


# --- vocabulary ---------------------------------------------------------------------------------------------


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Rows without a token are fine: tables are padded upward. A placeholder of another modality, such as Gemma's
    `<image_soft_token>`, may lie outside, because its embedding comes from another model.

    Raises:
        ModelError: Tokens, or the ids of begin, end or padding, are outside of the table.
    """
    rows = _table_rows(model)
    placeholders = _placeholders(tokenizer)
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    unusable = [(i, token) for i, token in beyond if token not in placeholders]
    if unusable:
        shown = readers.first_few([f"{token!r} = {i}" for i, token in unusable])
        raise ModelError(
            f"{source}: the tokenizer has {counted(len(unusable), 'token')} beyond the {rows} rows of the model's "
            f"embedding ({shown}). Add their rows with `model.resize_token_embeddings(len(tokenizer))` and save the "
            "model again, or use the tokenizer that belongs to it."
        )
    if beyond:
        progress.warn(
            f"{source}: no text may contain {readers.first_few([token for _, token in beyond])}: its id has no row"
        )

    special = {
        f"{where} {name}": value
        for where, owner in (
            ("tokenizer", tokenizer), ("config.json", model.config),
            ("generation_config.json", getattr(model, "generation_config", None)),
        )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        for value in _as_ids(getattr(owner, name, None))
    }  # fmt: skip
    outside = [f"{name} = {value}" for name, value in special.items() if value >= rows]
    if outside:
        raise ModelError(
            f"{source}: {readers.first_few(outside)}, but the model's embedding has {rows} rows. Correct the ids in "
            "these files."
        )


def check_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], source: str
) -> None:
    """Refuse rows with an id that the embedding has no row for.

    Args:
        model: As loaded.
        tokenizer: Its tokenizer, which may have placeholders of images outside of the embedding.
        rows: Tokenized rows, with "input_ids".
        source: File or data set of the rows, for the message.

    Raises:
        DataError: There is such an id.
    """
    count = _table_rows(model)
    if max(tokenizer.get_vocab().values(), default=0) < count:
        return  # no text can have such an id
    for number, row in enumerate(rows, 1):
        largest = max(row["input_ids"], default=0)
        if largest >= count:
            token = tokenizer.convert_ids_to_tokens(int(largest))
            raise DataError(
                f"{source}: training row {number} has the token {token!r}, which stands for an image or sound, and the "
                "model is used for text alone. Remove it from the rows."
            )


def _table_rows(model: PreTrainedModel) -> int:
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def _placeholders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the tokens that stand for an image, a sound or a video."""
    names = re.compile(r"(image|audio|video|vision|boi|eoi|boa|eoa)_?\w*token$")
    named: dict[str, Any] = dict(getattr(tokenizer, "init_kwargs", {}))
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        # Tokenizer files have a list here or names.
        extra = named.get(key)
        named |= extra if isinstance(extra, dict) else {}
    return {str(token) for name, token in named.items() if names.search(str(name))}


def _as_ids(value: Any) -> list[int]:
    """Return an id, a list of them or None as a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return [int(v) for v in values if v is not None]
