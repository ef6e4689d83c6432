"""Names in the graph of an encoder: its inputs, its outputs and its metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qat_edge.models.tasks import ModelTask

INPUTS = ("input_ids", "attention_mask")  # int64 (batch, tokens)
LOGITS, EMBEDDING = "logits", "sentence_embedding"  # float32 (batch, width), as optimum names them
# Metadata of the graph: tokens of the longest text, and numbers in an output.
MAX_LENGTH, OUTPUT_WIDTH = "max_length", "output_width"


def output_name(task: ModelTask) -> str:
    """Return the name of the graph's output."""
    # It imports torch, which the process that runs a graph does without.
    from qat_edge.models.tasks import SentenceEncoder

    return EMBEDDING if isinstance(task, SentenceEncoder) else LOGITS
