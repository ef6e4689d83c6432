"""Read models that torchao quantized, such as its published 8da4w models: their codes, and the floats these stand for.

transformers writes such a model as safetensors files, whose metadata describes the quantized tensors, and before its
version 5 as pickles. A pickle is read by torch's weights-only unpickler, which builds tensors and runs no code.

Reference: https://huggingface.co/docs/transformers/quantization/torchao
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.quantization import IntxUnpackedToInt8Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig, PreTrainedModel

from qat_edge import progress, readers
from qat_edge.errors import ModelError
from qat_edge.models import weights_check
from qat_edge.models.hub import one_line
from qat_edge.models.load_config import WRONG_VALUES
from qat_edge.models.tokenizer import GENERATION_CONFIG
from qat_edge.models.weights_check import LoadReport
from qat_edge.quant import numerics
from qat_edge.quant.frozen import INPUT_ROUNDING
from qat_edge.quant.frozen_adapters import ADAPTER

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# Files of such a model on the Hub; its repositories hold exported programs as well.
PATTERNS = ["*.safetensors", "*.json", "pytorch_model*.bin", "*.model", "*.txt", "*.jinja"]
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PARTS = ("_qdata", "_scale", "_zero_point")  # end the names of the stored parts of a quantized tensor
# Raised for files that are damaged, or of another version of torchao.
READ_ERRORS = (*WRONG_VALUES, OSError, SafetensorError, pickle.UnpicklingError, EOFError)


class TorchaoWeight(NamedTuple):
    """Codes of one matrix as torchao stored them.

    Attributes:
        codes: int8, shape (out, in).
        scales: float32, shape (out, in // group).
        bits: Of a code.
        rounds_input: The layer rounds its input to int8 per token, asymmetrically.
    """

    codes: Tensor
    scales: Tensor
    bits: int
    rounds_input: bool

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.codes.shape[1] // self.scales.shape[1]


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a model: safetensors, or pickles where there are none.

    Raises:
        ModelError: There are none, or the index of the pickles names others.
    """
    weights_check.refuse_pointers([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    index, shards = folder / PICKLE_INDEX, sorted(folder.glob("pytorch_model-*-of-*.bin"))
    names = (weights_check.WEIGHTS, weights_check.INDEX, PICKLE, PICKLE_INDEX)
    present = [name for name in names if (folder / name).is_file()]
    if any(name in present for name in names[:2]) or (not present and any(folder.glob("*.safetensors"))):
        return weights_check.check_files(folder)
    if PICKLE in present:
        return [folder / PICKLE]
    if not present:
        raise ModelError(f"{folder}: has neither *.safetensors nor {PICKLE}. Copy or download the weights.")
    return weights_check.indexed_files(index, shards, ".bin")


def load_floats(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype, source: str
) -> tuple[PreTrainedModel, LoadReport]:
    """Load the model with the numbers that its codes stand for, and report which names did not match.

    Args:
        folder: Folder with the weights.
        config: Its configuration.
        dtype: Type of the weights in memory.
        source: Hub id or folder, for messages.

    Raises:
        ModelError: A tensor is in no form that can be read.
    """
    if getattr(config, "auto_map", None):
        raise ModelError(
            f"{source}: quantized by torchao, and with code of its own (auto_map in config.json), which is not "
            "supported together. Use the float model it was made from."
        )
    weights_check.refuse_adapters((path.name for path in folder.glob(f"{ADAPTER}/*")), f"{source}/{ADAPTER}")
    stored, floats = read(folder, source)
    for name, weight in stored.items():
        floats[f"{name}.weight"] = numerics.dequantize(weight.codes, weight.scales)

    progress.info(
        f"{source}: quantized by torchao; its {len(stored)} quantized weights are read as the numbers that their codes "
        "stand for"
    )
    # Otherwise transformers would make quantized layers of these floats. Its automatic class takes no tensors.
    del config.quantization_config
    model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
        None, config=config, state_dict=floats, dtype=dtype, trust_remote_code=False, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    # It gets from tensors what it would have read from a folder.
    model.name_or_path = model.config.name_or_path = source
    if (folder / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, LoadReport.from_transformers(info)


def read(folder: Path, source: str) -> tuple[dict[str, TorchaoWeight], dict[str, Tensor]]:
    """Return the quantized matrices of a model by module name, and its other tensors by their own.

    Args:
        folder: Folder with the weights.
        source: Hub id or folder, for messages.

    Raises:
        ModelError: A file cannot be read; a tensor has another form, zero points other than 0, or scales that are not
            positive numbers.
    """
    stored, floats = {}, {}
    for name, entry in _state(folder, source).items():
        tensor = entry.data if isinstance(entry, nn.Parameter) else entry
        if not isinstance(tensor, Tensor):
            raise ModelError(
                f"{source}: {readers.shorten(name)} is no tensor ({type(tensor).__name__}), and the weights have to be "
                "a dictionary of tensors by name. Save the model with save_pretrained."
            )
        if type(tensor) is Tensor:
            if name.endswith((".weight", ".bias")) and tensor.dtype not in FLOATS:
                raise ModelError(
                    f"{source}: {name} is stored as {str(tensor.dtype).removeprefix('torch.')}, which is no float of "
                    "16 bits or more. Copy the model again, or use the float model it was made from."
                )
            floats[name] = tensor
            continue
        module, _, attribute = name.rpartition(".")
        if not isinstance(tensor, IntxUnpackedToInt8Tensor) or attribute != "weight" or tensor.dim() != 2:
            raise ModelError(
                f"{source}: {name} has the type {type(tensor).__name__}, and torchao's IntxUnpackedToInt8Tensor of a "
                "matrix is read alone, as Int8DynamicActivationIntxWeightConfig and IntxWeightOnlyConfig make it. Use "
                "the float model it was made from."
            )
        stored[module] = _stored_weight(tensor, f"{source}: {name}")
    return stored, floats


def _stored_weight(tensor: IntxUnpackedToInt8Tensor, where: str) -> TorchaoWeight:
    """Return the codes of a tensor. where: source and name, for messages."""
    rounding = tensor.activation_quantization
    name = str(getattr(rounding, "value", rounding))
    bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, greatest = int(tensor.qdata.min()), int(tensor.qdata.max())
    fault = ""
    if tensor.block_size[0] != 1:
        fault = f"has one scale for {tensor.block_size[0]} rows, and one for each row or group is read"
    elif bool(tensor.zero_point.any()):
        fault = "has zero points other than 0 (mapping type asymmetric), and symmetric codes are read"
    elif rounding is not None and name != INPUT_ROUNDING:
        fault = f"rounds its input as {name}, and {INPUT_ROUNDING} is known"
    elif not bool((torch.isfinite(tensor.scale) & (tensor.scale > 0)).all()):
        fault = "has scales that are not positive numbers"
    elif not low <= least <= greatest <= high:
        fault = f"has codes from {least} to {greatest}, and int{bits} has {low} to {high}"
    if fault:
        raise ModelError(f"{where} {fault}. Use the float model it was made from.")
    return TorchaoWeight(tensor.qdata, tensor.scale.float(), bits, rounding is not None)


def _state(folder: Path, source: str) -> dict[str, Any]:
    """Return all tensors of a model by name: plain ones, and quantized ones in torchao's classes."""
    files = weight_files(folder)
    if files[0].suffix != ".safetensors":
        found: dict[str, Any] = {}
        for path in files:
            with _reading(path):
                mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
                part = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
                twice = sorted(found.keys() & part.keys())
            if twice:
                raise ModelError(f"{path}: {readers.shorten(twice[0])} is in another file, too. Copy the model again.")
            found |= part
        return found

    # A tensor's parts may be in several files.
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    names: list[str] = []
    for path in files:
        with _reading(path), safe_open(path, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping: no __iter__)
            described = file.metadata() or {}
            names += readers.parse_json(described.get("tensor_names", "[]"), str(path), ModelError)
            metadata |= described
    # transformers writes the names of all tensors into each file.
    metadata["tensor_names"] = json.dumps(list(dict.fromkeys(names)))
    with _reading(folder):
        state, left = unflatten_tensor_state_dict(tensors, metadata)
    parts = sorted(key for key in left if key.endswith(PARTS))
    if parts:
        raise ModelError(
            f"{source}: {parts[0]} belongs to a quantized tensor that is not whole, or that the files do not describe. "
            "Copy the model again, or use the float model it was made from."
        )
    twice = sorted(state.keys() & left.keys())
    if twice:
        raise ModelError(f"{source}: {twice[0]} is there as codes and as a float. Copy the model again.")
    return state | left


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report what readers raise for a damaged file, or for classes that this version of torchao does not have."""
    try:
        yield
    except READ_ERRORS as error:
        raise ModelError(
            f"{path}: cannot be read ({one_line(error)}): damaged, or written by a version of torchao whose classes "
            "this one does not have. Copy it again, or use the float model it was made from."
        ) from error
