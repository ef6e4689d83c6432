"""The frozen checkpoint: codes and scales of the merged model. Nothing downstream quantizes again.

It is an ordinary Hugging Face folder of torchao IntxUnpackedToInt8Tensor weights. Plain
`transformers.AutoModelForCausalLM.from_pretrained(folder)`, or the auto class of an encoder's task, runs it without
this package. (`AutoModel` gives a sentence encoder a new pooler, which its output does not depend on.)

An embedding and a head that share a table are stored separately, because the head rounds its input and the embedding
has none. Their codes are equal, and exporters share them again where the target can (`Scheme.tied`, kept in the
manifest). Where the hidden states of a tied model are rotated, only `load` runs it: plain transformers stops at the
last norm's weight (`rotated_norm`).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from qat_edge import readers, remote_code
from qat_edge.errors import RunError
from qat_edge.manifest import MANIFEST, how_to_restore, read_manifest
from qat_edge.models import config_check, tasks
from qat_edge.quant import frozen_adapters, frozen_check, frozen_config, numerics, rotated_norm
from qat_edge.quant.codebook import FEWEST, INTEGER, LEVELS, SEQ, SEQ_TYPE_BITS
from qat_edge.quant.scheme import Scheme, WeightScheme

if TYPE_CHECKING:
    from torchao.core.config import AOBaseConfig
    from transformers import PretrainedConfig, PreTrainedModel

INPUT_ROUNDING = "int8_asym_per_token"  # torchao's name for numerics.fake_quantize_activation


@dataclass(frozen=True)
class FrozenWeight:
    """One quantized matrix.

    Attributes:
        codes: int8, shape (out, in).
        scales: float32, shape (out, in // group), bfloat16-representable.
        bits: 2, 4 or 8.
        levels: "seq" for 2-bit weights whose codes are -3 -1 1 3; else "integer".
    """

    codes: Tensor
    scales: Tensor
    bits: int
    levels: str = INTEGER

    def equals(self, other: FrozenWeight) -> bool:
        """Return whether both have the same codes and scales, so that one table can serve for both."""
        return torch.equal(self.codes, other.codes) and torch.equal(self.scales, other.scales)


def freeze(model: PreTrainedModel, scheme: Scheme, scales_of: Mapping[str, Tensor] | None = None) -> Scheme:
    """Replace every weight of `scheme` in a merged float32 model by its codes and scales, in place.

    Args:
        model: The merged model.
        scheme: Bits and group size by module name.
        scales_of: Module name -> scales (out, in // group), bfloat16-representable, for weights that were trained or
            quantized under scales of their own. The others get those of `numerics.choose_scales`.

    Returns:
        The scheme for the manifest: embedding and head are tied where rounding left them equal.
    """
    # A table that embedding and head share becomes two tensors with equal codes here.
    for name, spec in scheme.weights.items():
        module: Any = model.get_submodule(name)
        weight = module.weight.detach()
        given = (scales_of or {}).get(name)
        scales = numerics.choose_scales(weight, spec.codebook, spec.group_size) if given is None else given
        codes = numerics.quantize(weight, scales, spec.codebook)
        module.weight = nn.Parameter(as_torchao(codes, scales, spec), requires_grad=False)

    # Make `save_pretrained` write, and `from_pretrained` expect, quantized weights.
    describe_codes(model.config, scheme)
    model.hf_quantizer = TorchAoHfQuantizer(model.config.quantization_config, pre_quantized=False)
    return replace(scheme, tied=_are_ends_equal(model, scheme))


def describe_codes(config: PretrainedConfig, scheme: Scheme) -> None:
    """Put the description of a scheme's codes into a model's configuration, in place."""
    config.tie_word_embeddings = False
    config.quantization_config = _torchao_config(scheme)


def _are_ends_equal(model: PreTrainedModel, scheme: Scheme) -> bool:
    """Return whether embedding and head of a frozen model have the same codes and scales."""
    if not {scheme.embedding, scheme.head} <= scheme.weights.keys():
        return False  # a model without a head
    ends: list[Any] = [model.get_submodule(name).weight for name in (scheme.embedding, scheme.head)]
    one, other = ends
    return torch.equal(one.qdata, other.qdata) and torch.equal(one.scale, other.scale)


def as_torchao(codes: Tensor, scales: Tensor, spec: WeightScheme) -> IntxUnpackedToInt8Tensor:
    """Return the torchao tensor of exactly these codes (out, in) and scales (out, in // group)."""
    # "Unpacked": one int8 per code for int4 too, which exporters read without unpacking.
    return IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=_code_type(spec),
        block_size=(1, spec.group_size),
        dtype=scales.dtype,
        activation_quantization=INPUT_ROUNDING if spec.quantize_input else None,
    )


def load(folder: Path, with_adapters: bool = True) -> PreTrainedModel:
    """Load the frozen model in evaluation mode, on the CPU in float32.

    Args:
        folder: The checkpoint.
        with_adapters: Compute its unmerged adapters, if it has some.

    Raises:
        RunError: The folder holds no frozen checkpoint.
        ExportError: Its unmerged adapters are damaged.
        ModelError: It needs code of its own, which the command does not permit, or config.json has a value that no
            model can have.
    """
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no frozen checkpoint here. `qat-edge export` makes one.")
    # The task decides the transformers class, and what a loaded model still needs.
    frozen_config.read(folder)
    task = tasks.task_of_folder(folder)
    if (folder / MANIFEST).is_file() and "scheme" in read_manifest(folder):
        _check_tensors(folder)
    with frozen_config.building_errors(folder):
        model = rotated_norm.load(partial(_read_model, task), folder).eval()
    task.prepare(model)

    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):
        # transformers regards a module with a torchao weight as initialized and leaves this buffer uninitialized.
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    if with_adapters:
        frozen_adapters.add_adapters(model, folder)
    return model


def _read_model(task: tasks.ModelTask, folder: Path, output_loading_info: bool = False, **options: Any) -> Any:
    """Load a model with transformers, all of whose tensors are in the files, and all of whose files have a place.

    Args:
        task: Decides the transformers class.
        folder: The checkpoint.
        output_loading_info: Return transformers' report, too.
        options: Further arguments for transformers.

    Raises:
        RunError: Names tensors that are missing or have no place.
    """
    model, report = task.auto_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=remote_code.permitted(),
        output_loading_info=True, **config_check.PLAIN_OUTPUTS, **options,
    )  # fmt: skip
    # A sentence encoder gets a new pooler, which its output does not depend on; the gain is read by `rotated_norm`.
    missing = [name for name in report["missing_keys"] if not (task.is_encoder and tasks.POOLER in name.split("."))]
    extra = [name for name in report["unexpected_keys"] if not name.endswith(f".{rotated_norm.GAIN}")]
    if missing or extra:
        what = f"without {sorted(missing)[0]}" if missing else f"with {sorted(extra)[0]}, which is not in the model"
        raise RunError(f"{folder}: a checkpoint {what}. {how_to_restore(folder)}")
    return (model, report) if output_loading_info else model


def read_scheme(folder: Path) -> Scheme:
    """Read the scheme of a frozen checkpoint from its manifest.

    Raises:
        RunError: The manifest is missing or damaged.
    """
    # Checkpoints from before encoders have no "apart".
    manifest = read_manifest(folder)
    try:
        metadata = manifest["scheme"]
        weights = {name: WeightScheme(**values) for name, values in metadata["weights"].items()}
        unknown = {spec.levels for spec in weights.values()} - set(LEVELS)
        if unknown:
            raise TypeError(f"levels {', '.join(sorted(map(str, unknown)))}")
        return Scheme(**{**metadata, "weights": weights, "apart": tuple(metadata.get("apart", ()))})
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{folder / MANIFEST}: damaged, its scheme cannot be read ({error}). Freeze it again."
        ) from error


def scheme_metadata(scheme: Scheme) -> dict[str, Any]:
    """Return the scheme as plain values for the manifest, from which `read_scheme` restores it."""
    document = asdict(scheme)
    # Versions that know 4 and 8 bits alone read such a manifest, too.
    for weight in document["weights"].values():
        if weight["levels"] == INTEGER:
            del weight["levels"]
    return document


def read_weights(folder: Path) -> dict[str, FrozenWeight]:
    """Read codes and scales by module name from the safetensors files, without loading a model.

    Raises:
        RunError: The folder holds no quantized weights, a file is damaged, or its tensors are not those of the scheme.
    """
    if (folder / MANIFEST).is_file() and "scheme" in read_manifest(folder):
        _check_tensors(folder)
    found: dict[str, FrozenWeight] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            for name, stem, bits in _quantized_tensors(file):
                width, levels = (FEWEST, SEQ) if bits == SEQ_TYPE_BITS else (bits, INTEGER)
                codes, scales = file.get_tensor(f"{stem}_qdata"), file.get_tensor(f"{stem}_scale")
                found[name] = FrozenWeight(codes, scales, width, levels)
    if not found:
        raise RunError(f"{folder}: no quantized weights found. `qat-edge export` makes a frozen checkpoint.")
    return found


def read_floats(folder: Path) -> dict[str, Tensor]:
    """Read the tensors that are not quantized (norms, biases, buffers) by name, as float32.

    A rotated norm's own weight is under NORM.weight and its rotation under NORM.turn, as in a loaded model.

    Raises:
        RunError: A file is damaged.
    """
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            stems = tuple(stem for _, stem, _ in _quantized_tensors(file))
            keys = [key for key in file.keys() if not key.startswith(stems)] if stems else list(file.keys())  # noqa: SIM118
            tensors = {key: file.get_tensor(key) for key in keys}
            found |= {key: tensor.float() for key, tensor in tensors.items() if tensor.is_floating_point()}

    for key in [key for key in found if key.endswith(f".{rotated_norm.GAIN}")]:
        name = key.removesuffix(f".{rotated_norm.GAIN}")
        found[f"{name}.{rotated_norm.ROTATION}"] = found[f"{name}.{rotated_norm.WEIGHT}"]
        found[f"{name}.{rotated_norm.WEIGHT}"] = found.pop(key)
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        RunError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path}: damaged ({readers.shorten(str(error), 200)}). {how_to_restore(path.parent)}"
        ) from error


def _quantized_tensors(file: Any) -> Iterator[tuple[str, str, int]]:
    """Yield module name, prefix of the stored tensors and bits of the type of every quantized weight of a file."""
    for key, text in (file.metadata() or {}).items():
        # torchao describes each quantized tensor as JSON in the file's metadata.
        description = readers.parse_json(text, key, RunError) if text.startswith("{") else {}
        if description.get("_type") != IntxUnpackedToInt8Tensor.__name__:
            continue
        name, _, attribute = key.rpartition(".")
        bits = int(description["_data"]["target_dtype"]["_data"].removeprefix("int"))
        yield name, f"{name}._{attribute}", bits


def _torchao_config(scheme: Scheme) -> TorchAoConfig:
    """Return the config that tells transformers, on loading, which weights are quantized and how."""
    configs: OrderedDict[str, Any] = OrderedDict()
    for name, spec in scheme.weights.items():
        # One pattern for the same projection of all layers; a layer that differs from the others is named exactly.
        pattern = "re:" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
        config = _layer_config(spec)
        if configs.setdefault(pattern, config) != config:
            configs[name] = config
    return TorchAoConfig(FqnToConfig(configs), include_input_output_embeddings=True)


def _code_type(spec: WeightScheme) -> torch.dtype:
    """Return torchao's type of the codes: the narrowest that holds them, which -3 to 3 need three bits of."""
    bits = SEQ_TYPE_BITS if spec.levels == SEQ else spec.bits
    dtype: torch.dtype = getattr(torch, f"int{bits}")
    return dtype


def _layer_config(spec: WeightScheme) -> AOBaseConfig:
    dtype = _code_type(spec)
    granularity = PerGroup(spec.group_size) if spec.has_groups else PerAxis(0)
    if spec.quantize_input:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)


# --- check -------------------------------------------------------------------------------------------------


def _check_tensors(folder: Path) -> None:
    """Compare the tensors of a checkpoint with the scheme in its manifest.

    Raises:
        RunError: They differ, or cannot be codes and scales.
    """
    if frozen_check.is_checked(folder):
        return
    weights: dict[str, frozen_check.StoredWeight] = {}
    floats: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as file:
            stored = _stored_weights(file)
            stems = tuple(f"{name}._weight_" for name in stored)
            tensors = {key: file.get_tensor(key) for key in file.keys() if not key.startswith(stems)}  # noqa: SIM118
            twice = sorted((weights.keys() & stored.keys()) | (floats.keys() & tensors.keys()))
            if twice:
                raise RunError(f"{path}: {twice[0]} is in another file of the folder, too. {how_to_restore(folder)}")
            weights, floats = weights | stored, floats | tensors
    scheme = read_scheme(folder)
    frozen_check.require_sound(folder, scheme, weights, iter(floats.items()))
    shapes = {name: tuple(weight.codes.shape) for name, weight in weights.items()}
    frozen_config.require_shapes(folder, frozen_config.read(folder), shapes)
    frozen_config.require_quantizer(folder, _torchao_config(scheme))
    frozen_check.remember(folder)


def _stored_weights(file: Any) -> dict[str, frozen_check.StoredWeight]:
    """Return the quantized matrices of an open file, with what torchao's description says about them."""
    found = {}
    for name, stem, bits in _quantized_tensors(file):
        description = readers.parse_json(file.metadata()[f"{name}.weight"], name, RunError)["_data"]
        codes, scales, zero_point = (file.get_tensor(f"{stem}_{part}") for part in ("qdata", "scale", "zero_point"))
        block, rounding = description["block_size"], description["activation_quantization"]
        found[name] = frozen_check.StoredWeight(codes, scales, zero_point, bits, block, rounding)
    return found
