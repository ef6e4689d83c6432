"""Diagnose a GGUF file of any tool: whether llama.cpp loads it, and what it would do to an app's texts.

`gguf_scan` reads the file; llama.cpp loads it in a process of its own (`llama_probe`). A file of ours has to meet
`verify` as well, which compares it with its checkpoint.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoTokenizer

from qat_edge import progress, readers
from qat_edge.data import conversation
from qat_edge.errors import ModelError
from qat_edge.manifest import library_version
from qat_edge.models import artifact_options, gguf_keys, tokenizer
from qat_edge.models.gguf_metadata import GgufMetadata
from qat_edge.models.gguf_tokenizer import PRE_TOKENIZER
from qat_edge.models.hub import one_line
from qat_edge.models.tokenizer_check import native_errors
from qat_edge_devices.agent.llama_model import PACKAGE
from qat_edge_exporters.executorch.pte.program_info import RuntimeCheck
from qat_edge_exporters.file_diagnosis import FileDiagnosis, GgufInfo, TypeCount, few
from qat_edge_exporters.gguf import gguf_scan, llama_probe
from qat_edge_exporters.gguf.gguf_file import ARCHITECTURE, MODEL_FILE
from qat_edge_exporters.gguf.gguf_scan import DAMAGED, ScannedFile
from qat_edge_exporters.gguf.llama_probe import INSTALL, LoadedWeights
from qat_edge_exporters.gguf.vocabulary import TEMPLATE
from qat_edge_exporters.targets import GGUF, LLAMA_CPP

TABLE, HEAD = "token_embd.weight", "output.weight"
TOKENS, TOKENIZER_MODEL = "tokenizer.ggml.tokens", "tokenizer.ggml.model"
BYTE_LEVEL = "gpt2"  # model of tokenizers whose splitting rule has a key of its own
LAYER = re.compile(r"blk\.([0-9]{1,6})\.")
MOST_LAYERS = 10_000
# Ids of tokens in the metadata that a generation or a prompt uses.
TOKEN_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "eot", "eom", "unknown", "padding"))
# Numbers of the metadata that have to be above 0, and what happens otherwise.
_ANGLES = "the angles of the rotary embedding are infinite or no numbers"
_NORMS = "norms divide by 0, or by the root of a negative number"
POSITIVE = {
    "rope.freq_base": _ANGLES,
    "rope.freq_base_swa": _ANGLES,
    "attention.layer_norm_rms_epsilon": _NORMS,
    "attention.layer_norm_epsilon": _NORMS,
    "attention.group_norm_epsilon": _NORMS,
}
PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")  # name of a file of several


def diagnose_gguf(path: Path, runtimes: Sequence[str]) -> FileDiagnosis:
    """Examine the file at `path` for llama.cpp, the one runtime of the format.

    Raises:
        ArtifactError: there is no GGUF file, or its metadata cannot be read.
    """
    progress.info(f"Reading {path}")
    file = gguf_scan.scan(path)
    faults = [*gguf_scan.tensor_faults(file), *_part_faults(file)]
    faults += [f"{path.name}: {fault}" for fault in (*_metadata_faults(file), *_tokenizer_faults(file))]
    notes = _notes(file)
    if path.name == MODEL_FILE:
        faults += artifact_options.recorded_faults(path.parent, GGUF)

    progress.info("Looking for scales that are no numbers")
    faults += gguf_scan.value_faults(file)
    check, loaded = _check_llama_cpp(file)
    found, unsure = _template_findings(file, loaded)
    return FileDiagnosis(
        path=path,
        format=GGUF,
        runtimes=[check],
        faults=faults + found,
        notes=notes + unsure,
        contents=_contents(file, loaded),
        installed={name: library_version(name) or "none" for name in (PACKAGE, "gguf")},
    )


def _check_llama_cpp(file: ScannedFile) -> tuple[RuntimeCheck, LoadedWeights]:
    """Load the file in llama.cpp, if it is installed."""
    if find_spec(PACKAGE) is None:
        return RuntimeCheck(LLAMA_CPP, f"{PACKAGE} is not installed", "", [], [], untried=INSTALL), LoadedWeights("")
    progress.info(f"Loading it with the installed {PACKAGE}")
    loaded = llama_probe.load_file(file.path)
    title = f"{PACKAGE} {library_version(PACKAGE)}"
    check = RuntimeCheck(LLAMA_CPP, title, "loading the file", [], [], not loaded.untried, loaded.error, loaded.untried)
    return check, loaded


def _contents(file: ScannedFile, loaded: LoadedWeights) -> GgufInfo:
    values = file.metadata
    name, table = values.get("general.name"), file.tensor(TABLE)
    rope = {key: value for key, value in values.items() if ".rope." in key and not isinstance(value, list)}
    kinds = (values.get(TOKENIZER_MODEL), values.get(PRE_TOKENIZER))
    return GgufInfo(
        version=file.version,
        architecture=readers.shorten(values.get(ARCHITECTURE, "")),
        name=readers.shorten(name) if isinstance(name, str) else "",
        types=_types(file),
        context_length=_number(file.get("context_length")),
        rope={readers.shorten(key): value for key, value in rope.items()},
        vocabulary=len(_tokens(file)),
        rows=table.shape[0] if table is not None and table.shape else None,
        tied=table is not None and file.tensor(HEAD) is None,
        end_tokens=_ends(file) if loaded.end_tokens is None else loaded.end_tokens,
        tokenizer=", ".join(readers.shorten(kind) for kind in kinds if isinstance(kind, str)),
        has_chat_template=isinstance(values.get(TEMPLATE), str),
        size_bytes=len(file.data),
    )


def _types(file: ScannedFile) -> list[TypeCount]:
    """Return number and bytes of the tensors of each type, the largest first."""
    found: dict[str, TypeCount] = {}
    for tensor in file.tensors:
        known = found.get(tensor.kind, TypeCount(tensor.kind, 0, 0))
        found[tensor.kind] = TypeCount(tensor.kind, known.count + 1, known.size_bytes + (tensor.size_bytes or 0))
    return sorted(found.values(), key=lambda each: -each.size_bytes)


# --- metadata ------------------------------------------------------------------------------------------------


def _part_faults(file: ScannedFile) -> list[str]:
    """Name the files that are missing of a model in several."""
    parts, name = file.metadata.get("split.count", 1), PART.fullmatch(file.path.name)
    if type(parts) is not int or parts < 2:
        return []
    if name is None:
        return [
            f"{file.path.name}: one of {parts} files of a model, and llama.cpp finds the others by names such as "
            "model-00001-of-00002.gguf only. Give the files their names again."
        ]
    others = (file.path.with_name(f"{name[1]}-{i:05}-of-{name[3]}.gguf") for i in range(1, min(parts, 99_999) + 1))
    return few(f"{each.name}: missing. Copy all files of the model." for each in others if not each.is_file())


def _metadata_faults(file: ScannedFile) -> Iterator[str]:
    """Yield keys of the architecture that are missing, or contradict the tensors."""
    architecture = file.metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str):
        yield f"{ARCHITECTURE} is {readers.show(architecture)}, no name of a model's graph. {DAMAGED}"
        return
    for key, value in file.metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{readers.shorten(key)} is {value}, no finite number. {DAMAGED}"
    yield from _divisor_faults(file)
    if _number(file.get("context_length")) is None:
        yield f"{architecture}.context_length is {readers.show(file.get('context_length'))}: llama.cpp needs a number."
    layers = _number(file.get("block_count"))
    if layers is None or layers > MOST_LAYERS:
        yield f"{architecture}.block_count is {readers.show(file.get('block_count'))}: llama.cpp needs a number."
    elif not _is_split(file):
        stored = {int(found[1]) for tensor in file.tensors if (found := LAYER.match(tensor.name))}
        missing = sorted(set(range(layers)) - stored)
        if missing:
            yield f"{architecture}.block_count is {layers}, and layer {missing[0]} has no tensor. {DAMAGED}"
    if file.tensor(TABLE) is None and not _is_split(file):
        yield f"there is no tensor {TABLE}, so that no token has an embedding. {DAMAGED}"


def _divisor_faults(file: ScannedFile) -> Iterator[str]:
    """Yield numbers that have to be above 0: bases of the rotary embedding, epsilons of norms."""
    for name, effect in POSITIVE.items():
        # A model without a rotary embedding may have the key nevertheless.
        if name.startswith("rope.") and file.get("rope.dimension_count") == 0:
            continue
        value = file.get(name)
        if type(value) in (int, float) and value <= 0:
            yield f"{file.metadata[ARCHITECTURE]}.{name} is {value:g}, not above 0: {effect}. Convert the model again."


def _tokenizer_faults(file: ScannedFile) -> Iterator[str]:
    """Yield keys of the tokenizer that are missing, or contradict the tensors."""
    values, table = file.metadata, file.tensor(TABLE)
    if not isinstance(values.get(TOKENIZER_MODEL), str) or not _tokens(file):
        yield (
            f"no tokenizer in it ({TOKENIZER_MODEL}, {TOKENS}), so that no text can be read. Convert the model again, "
            "with its tokenizer's files next to it."
        )
        return
    if values[TOKENIZER_MODEL] == BYTE_LEVEL and not values.get(PRE_TOKENIZER):
        yield (
            f"{PRE_TOKENIZER} is missing: llama.cpp splits texts by a rule that no model was trained with. Convert the "
            "model again with a newer convert_hf_to_gguf.py."
        )
    size = len(_tokens(file))
    if table is not None and table.shape and table.shape[0] != size:
        yield f"{TOKENS} has {size} tokens, and {TABLE} {table.shape[0]} rows. Convert the model again."
    rows = table.shape[0] if table is not None and table.shape else size
    for key in TOKEN_KEYS:
        if (index := values.get(key)) is not None and not (type(index) is int and index < rows):
            yield f"{key} is {readers.show(index)}, none of the {rows} tokens. Convert the model again."
    if not _ends(file):
        yield "no key names an end token (tokenizer.ggml.eos_token_id), so that a generation may never end."


def _notes(file: ScannedFile) -> list[str]:
    """Return what else a user should know, one sentence each."""
    values, found = file.metadata, []
    architecture = values.get(ARCHITECTURE)
    if isinstance(architecture, str) and architecture not in gguf.MODEL_ARCH_NAMES.values():
        known = f"gguf {library_version('gguf')}"
        found.append(f"The architecture {readers.shorten(architecture)} is not among those of {known}.")
    if values.get("general.type", "model") != "model":
        found.append(f"general.type is {readers.show(values['general.type'])}: the file is no model on its own.")
    if _is_split(file):
        found.append(f"The model has {values['split.count']} files, of which this one was examined.")
    if not isinstance(values.get(TEMPLATE), str):
        found.append("The file has no chat template: apps have to bring one, or send plain text.")
    return found


# --- chat template -------------------------------------------------------------------------------------------


def _template_findings(file: ScannedFile, loaded: LoadedWeights) -> tuple[list[str], list[str]]:
    """Compare the chat template with the tokens that end a generation; return faults and notes."""
    if not isinstance(file.metadata.get(TEMPLATE), str) or not _tokens(file):
        return [], []
    failure = f"{file.path.name}: transformers cannot make a tokenizer of it"
    try:
        with native_errors(failure, "Its chat template was not compared."):
            made = AutoTokenizer.from_pretrained(
                str(file.path.parent), gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
            )
    except (*tokenizer.LOADING_ERRORS, ModelError) as error:
        return [], [f"The chat template was not compared with the end tokens: {one_line(error)}"]
    ends = _ends(file) if loaded.end_tokens is None else loaded.end_tokens
    faults = conversation.template_faults(made, ends, tokenizer.recorded_end_tokens(file.path.parent))
    # llama.cpp knows more end tokens than the file names.
    return ([], faults) if loaded.end_tokens is None else (faults, [])


# --- values --------------------------------------------------------------------------------------------------


def _ends(file: ScannedFile) -> list[int]:
    """Return the ids of end tokens that the file names; lists of something else are left out."""
    metadata = GgufMetadata(str(file.metadata.get(ARCHITECTURE)), file.metadata, frozenset())
    try:
        return [index for index in gguf_keys.end_tokens(metadata, file.path) if type(index) is int]
    except ModelError:
        return []


def _tokens(file: ScannedFile) -> list[Any]:
    found = file.metadata.get(TOKENS)
    return found if isinstance(found, list) else []


def _is_split(file: ScannedFile) -> bool:
    parts = file.metadata.get("split.count", 1)
    return type(parts) is int and parts > 1


def _number(value: object) -> int | None:
    return value if type(value) is int and value > 0 else None
