"""Trace a decoder, with a key-value cache in buffers, into one exported program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from qat_edge.errors import ExportError
from qat_edge_exporters.executorch import compat
from qat_edge_exporters.executorch.graph.attention import Int8Cache, KeyValueCache, replace_attention
from qat_edge_exporters.executorch.graph.portable_attention import PortableCache
from qat_edge_exporters.executorch.graph.quantized_modules import QuantizedEmbedding
from qat_edge_exporters.executorch.graph.rewrites import XnnpackRewrites, rotate_half_as_product
from qat_edge_exporters.trace_check import EXECUTORCH, check_attention, tracing_errors

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Decoder(nn.Module):
    """The function that the LLM runner calls, with rewritten calls for XNNPACK.

    tokens (1, S) and the first one's position (1,), int64 -> logits of the last token (1, 1, vocabulary).
    """

    def __init__(self, model: PreTrainedModel, cache: KeyValueCache) -> None:
        super().__init__()
        self.model = model
        self.cache = cache
        self.constants = nn.ParameterDict()  # of the rewritten calls, filled by the first run

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        # The position becomes a symbol, with the bounds that the cache's operators need.
        start: Any = input_pos[0].item()
        compat.constrain(start >= 0)
        compat.constrain(start + tokens.shape[1] <= self.cache.length)
        positions = (input_pos + torch.arange(tokens.shape[1])).unsqueeze(0)
        self.cache.begin(start, positions)
        with XnnpackRewrites(self.constants), rotate_half_as_product(self.model, self.constants):
            return self.model(input_ids=tokens, position_ids=positions, use_cache=False, logits_to_keep=1).logits


def choose_cache(
    config: PretrainedConfig, context_length: int, portable: bool = False, precision: str = "float32"
) -> KeyValueCache:
    """Return the cache for a model of `config`.

    Args:
        config: the model's configuration.
        context_length: tokens that the cache holds.
        portable: use ATen operators only.
        precision: "float32" or "int8".

    Raises:
        ExportError: no operator computes this model's attention over an int8 cache.
    """
    # Gemma 2 caps its scores, which is possible only where they are computed by separate operators.
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if precision == "float32":
        return PortableCache(context_length) if portable or capped else KeyValueCache(context_length)

    # int8 keys and values are read by ExecuTorch's operator only.
    if portable or capped:
        why = f"{config.model_type} caps its attention scores" if capped else "ATen has no such operator"
        raise ExportError(
            f"--kv-cache {precision}: {why}, and only ExecuTorch's attention operator, which cannot cap them, reads a "
            "cache in int8. Leave the flag out."
        )
    return Int8Cache(context_length)


def trace(decoder: Decoder) -> ExportedProgram:
    """Trace a model that was made exportable.

    Raises:
        ExportError: attention that ExecuTorch's cannot replace, or code that cannot be traced.
    """
    model, cache = decoder.eval().model, decoder.cache
    # Three tokens: torch.export takes lengths of 0 and 1 for constants.
    tokens, start = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with replace_attention(cache, model.config), tracing_errors(model, EXECUTORCH):
        # The first run creates the cache's buffers and the constants, so that tracing finds them.
        with _without_tables(model):
            decoder(tokens[:, :1], start)
        check_attention(model, len(cache.layers), EXECUTORCH)

        # strict=False traces Python as it runs, which the rewritten calls need.
        lengths = {1: Dim("length", min=1, max=cache.length)}
        return torch.export.export(decoder, (tokens, start), dynamic_shapes=(lengths, None), strict=False)


@contextmanager
def _without_tables(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, the model knows one token only and returns its last hidden states.

    Computing one token in Python converts the whole embedding and head to float: the peak of an export's memory.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantizedEmbedding):
        model.set_input_embeddings(nn.Embedding(1, embedding.width))
    model.set_output_embeddings(nn.Identity())
    try:
        yield
    finally:
        model.set_input_embeddings(embedding)
        model.set_output_embeddings(head)
