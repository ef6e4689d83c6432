"""The frozen checkpoint that a training would end in, without its tensors: what targets predict sizes from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat_edge.manifest import write_manifest
from qat_edge.quant import frozen
from qat_edge.quant.scheme import Scheme
from qat_edge.train.rotated_outline import RotationOutcome
from qat_edge_exporters.planned_size import FrozenOutline, WeightOutline


def write_outline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scheme: Scheme,
    rotation: RotationOutcome,
    folder: Path,
) -> FrozenOutline:
    """Write the small files of a frozen checkpoint into a folder, and return its outline.

    Args:
        model: The base model, on the meta device; it is left as it is.
        tokenizer: Of the model.
        scheme: Bits and group size of each weight.
        rotation: Effect of the rotation at the start of QAT.
        folder: Existing folder.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    frozen.describe_codes(config, scheme)
    config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = scheme.tied and not rotation.unties
    metadata = frozen.scheme_metadata(scheme) | {"tied": tied}
    write_manifest(folder, "quantized", scheme=metadata)

    weights = {}
    for name, spec in scheme.weights.items():
        module: Any = model.get_submodule(name)
        rows, width = module.weight.shape
        weights[name] = WeightOutline(rows, width, spec.bits, spec.group_size)
    floats = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if name.removesuffix(".weight") not in scheme.weights
    }
    text = config.get_text_config(decoder=True)
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return FrozenOutline(
        folder, weights, floats, scheme.embedding, scheme.head, tied, rotation.norms,
        2 * text.num_hidden_layers * key_heads * head_width, head_width, text.num_hidden_layers,
    )  # fmt: skip
