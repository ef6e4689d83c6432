"""Compare genai_config.json with what the export of a frozen checkpoint writes: onnxruntime-genai applies what it says.

The permitted keys and values are those of `genai_config`; here every value is computed again from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from qat_edge import readers, remote_code
from qat_edge.errors import ArtifactError
from qat_edge.models import tokenizer
from qat_edge.models.generation_settings import kept_by_onnx
from qat_edge.quant import frozen_config
from qat_edge_exporters.onnx import decoder_signature, graph_file, names
from qat_edge_exporters.onnx.attention_check import attention_faults
from qat_edge_exporters.onnx.decoder_names import MODEL_TYPE
from qat_edge_exporters.onnx.genai_config import NEUTRAL_SEARCH, TENSORS
from qat_edge_exporters.onnx.query_scaling import scaling_faults

EARLY_STOPPING = {"early_stopping": True}  # the builder's; beam search alone has it
BOS = 1  # the builder's id where no file names one
# Not a matter of the model: speed, and keys that depend on the builder's version.
FREE = ("model.decoder.session_options", "search.past_present_share_buffer", "search.chunk_size")
# The builder's names of types that are not the beginning of the class's name.
OTHER_TYPES = {"Gemma3ForCausalLM": "gemma3_text"}


def setting_faults(folder: Path, checkpoint: Path) -> list[str]:
    """Return a fault for each value of an artifact's genai_config.json that the export would not write.

    Raises:
        ArtifactError: The file cannot be read.
    """
    found = dict(_flat(readers.read_object(folder / names.GENAI_CONFIG, ArtifactError)))
    context, graph = found.get("model.context_length"), graph_file.load_graph(folder / names.MODEL_FILE)
    expected = _expected(checkpoint, context)
    cache = decoder_signature.cache_shape(graph)
    if cache is not None:
        expected |= _traced(*cache)
    tensors = {f"model.decoder.{key}": name for key, name in TENSORS.items()}
    expected |= {key: name for key, name in tensors.items() if key in found}
    config = frozen_config.read(checkpoint)
    faults = attention_faults(graph, config, context) if isinstance(context, int) else []
    if decoder_signature.is_traced(graph):
        faults += scaling_faults(graph, config)
    return faults + [
        f"{names.GENAI_CONFIG}: {readers.shorten(key)} is {readers.show(found.get(key))}, the export writes "
        f"{readers.show(expected.get(key))}."
        for key in sorted(expected.keys() | found.keys())
        if not key.startswith(FREE) and found.get(key) != expected.get(key)
    ]


def written(checkpoint: Path, context_length: int, heads: int, width: int) -> dict[str, Any]:
    """Return genai_config.json of a decoder that was traced from its own code, without options of speed.

    Args:
        checkpoint: the frozen checkpoint.
        context_length: of prompt and completion.
        heads: of keys and values.
        width: channels of a head.
    """
    flat = _expected(checkpoint, context_length) | {f"model.decoder.{key}": name for key, name in TENSORS.items()}
    flat |= _traced(heads, width)
    document: dict[str, Any] = {}
    for key, value in flat.items():
        *owners, last = key.split(".")
        place = document
        for owner in owners:
            place = place.setdefault(owner, {})
        place[last] = value
    return document


def _traced(heads: int, width: int) -> dict[str, Any]:
    """Return the values of a traced decoder that are not those of the builder."""
    return {"model.type": MODEL_TYPE, "model.decoder.head_size": width, "model.decoder.num_key_value_heads": heads}


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects under names with dots."""
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _expected(checkpoint: Path, context_length: object) -> dict[str, Any]:
    """Return values by name with dots. The context length is compared with the manifest elsewhere."""
    with remote_code.refusals(checkpoint):
        config = AutoConfig.from_pretrained(
            checkpoint, local_files_only=True, trust_remote_code=remote_code.permitted()
        )
    loaded = tokenizer.load_tokenizer(checkpoint)

    def token(name: str) -> Any:
        # The order of the builder; it gets no generation_config.json of a frozen checkpoint.
        return next((value for owner in (config, loaded) if (value := getattr(owner, name, None)) is not None), None)

    ends, pad, bos = token("eos_token_id"), token("pad_token_id"), token("bos_token_id")
    heads, name = config.num_attention_heads, config.architectures[0]
    model = {
        "bos_token_id": BOS if bos is None else bos,
        "context_length": context_length,
        "eos_token_id": tokenizer.end_tokens(checkpoint),
        "pad_token_id": pad if pad is not None else ends[0] if isinstance(ends, list) else ends,
        "type": OTHER_TYPES.get(name, name.partition("For")[0].lower()),
        "vocab_size": config.vocab_size,
        "decoder.filename": names.MODEL_FILE,
        "decoder.head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "decoder.hidden_size": config.hidden_size,
        "decoder.num_attention_heads": heads,
        "decoder.num_hidden_layers": config.num_hidden_layers,
        "decoder.num_key_value_heads": getattr(config, "num_key_value_heads", heads),
    }
    search = {**EARLY_STOPPING, **NEUTRAL_SEARCH, **kept_by_onnx(checkpoint), "max_length": context_length}
    return {
        **{f"model.{key}": value for key, value in model.items()},
        **{f"search.{key}": value for key, value in search.items()},
    }
