"""The frozen checkpoint: where codes and scales live from the merge on. Nothing downstream re-quantizes.

It is an ordinary Hugging Face folder of torchao IntxUnpackedToInt8Tensor weights: plain
`transformers.AutoModelForCausalLM.from_pretrained(folder)`, or the class of an encoder's kind, runs it without this
package (`AutoModel` gives a sentence encoder a pooler anew, which takes no part in its answer). An embedding and a head
that share a table are stored apart (the head rounds its input, the embedding has none), with equal
codes; exporters share them again where the target can (`Scheme.tied`, kept in the manifest). Where the hidden states of
a tied model are turned, only `load` runs it: plain transformers stops at the last norm's weight (`turned`).
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
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

from qat_edge.errors import RunError
from qat_edge.models import tasks
from qat_edge.quant import numerics, rotated_norm
from qat_edge.quant.scheme import Scheme, WeightScheme
from qat_edge.run import read_manifest

INPUT_ROUNDING = "int8_asym_per_token"  # torchao's name for what fake_quantize_activation does


@dataclass(frozen=True)
class FrozenWeight:
    """One quantized matrix. codes: int8 (out, in); scales: float32 (out, in // group), bfloat16-representable."""

    codes: Tensor
    scales: Tensor
    bits: int


def freeze(model: Any, scheme: Scheme, scales_of: Mapping[str, Tensor] | None = None) -> None:
    """Replace every weight of `scheme` in a merged float32 model by its codes and scales, in place.

    scales_of: scales by module name (out, in // group), bfloat16-representable, of weights that were
    trained or quantized under scales of their own; the others get those of their largest values.
    """
    for name, spec in scheme.weights.items():
        module = model.get_submodule(name)
        weight = module.weight.detach()
        given = (scales_of or {}).get(name)
        scales = numerics.choose_scales(weight, spec.bits, spec.group_size) if given is None else given
        module.weight = nn.Parameter(
            as_torchao(numerics.quantize(weight, scales, spec.bits), scales, spec), requires_grad=False
        )
    model.config.tie_word_embeddings = False
    config = _torchao_config(scheme)
    model.config.quantization_config = config
    model.hf_quantizer = TorchAoHfQuantizer(config, pre_quantized=False)


def as_torchao(codes: Tensor, scales: Tensor, spec: WeightScheme) -> IntxUnpackedToInt8Tensor:
    """The torchao tensor that holds exactly these codes (out, in) and scales (out, in // group)."""
    return IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scales,
        zero_point=torch.zeros_like(scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{spec.bits}"),
        block_size=(1, spec.group_size),
        dtype=scales.dtype,
        activation_quantization=INPUT_ROUNDING if spec.quantize_input else None,
    )


def load(folder: Path) -> Any:
    """The frozen model, in evaluation mode, on the CPU in float32.

    Raises:
        RunError: no frozen checkpoint here.
    """
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no frozen checkpoint here. `qat-edge export` makes one.")
    kind = tasks.of_folder(folder)
    read = partial(kind.auto.from_pretrained, dtype=torch.float32, local_files_only=True)
    model = rotated_norm.load(read, folder).eval()
    kind.settle(model)
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "scalar_embed_scale"):
        # transformers takes a module with a torchao weight for initialized, and leaves this buffer as it was allocated.
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
    return model


def read_scheme(folder: Path) -> Scheme:
    """The scheme a frozen checkpoint was made under, from its manifest."""
    facts = read_manifest(folder)["scheme"]
    weights = {k: WeightScheme(**v) for k, v in facts["weights"].items()}
    return Scheme(**{**facts, "weights": weights, "apart": tuple(facts.get("apart", ()))})


def scheme_facts(scheme: Scheme) -> dict[str, Any]:
    """What `read_scheme` reads: the scheme as plain values for the manifest."""
    return asdict(scheme)


def read_weights(folder: Path) -> dict[str, FrozenWeight]:
    """Codes and scales by module name, read from the safetensors files themselves without loading a model."""
    found: dict[str, FrozenWeight] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key, text in (file.metadata() or {}).items():
                meta = json.loads(text) if text.startswith("{") else {}
                if meta.get("_type") != IntxUnpackedToInt8Tensor.__name__:
                    continue
                name, _, attribute = key.rpartition(".")
                stem = f"{name}._{attribute}"
                found[name] = FrozenWeight(
                    codes=file.get_tensor(f"{stem}_qdata"),
                    scales=file.get_tensor(f"{stem}_scale"),
                    bits=int(meta["_data"]["target_dtype"]["_data"].removeprefix("int")),
                )
    if not found:
        raise RunError(f"{folder}: no quantized weights found. `qat-edge export` makes a frozen checkpoint.")
    return found


def _torchao_config(scheme: Scheme) -> TorchAoConfig:
    """What tells transformers, on loading, which weights are quantized and how."""
    configs: OrderedDict[str, Any] = OrderedDict()
    for name, spec in scheme.weights.items():
        pattern = "re:" + re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
        config = _layer_config(spec)
        # One pattern for all layers of a kind; a layer that differs from its kind is named exactly.
        if configs.setdefault(pattern, config) != config:
            configs[name] = config
    return TorchAoConfig(FqnToConfig(configs), include_input_output_embeddings=True)


def _layer_config(spec: WeightScheme) -> Any:
    dtype = getattr(torch, f"int{spec.bits}")
    granularity = PerAxis(0) if spec.bits == 8 else PerGroup(spec.group_size)
    if spec.quantize_input:
        return Int8DynamicActivationIntxWeightConfig(weight_dtype=dtype, weight_granularity=granularity)
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=granularity)
