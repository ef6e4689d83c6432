"""Run an encoder's ONNX folder in the installed onnxruntime, in a process of its own (`encoder_process`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat_edge_exporters import encoder_process
from qat_edge_exporters.encoder_process import TextRefused
from qat_edge_exporters.onnx import names
from qat_edge_exporters.onnx.encoder_names import MAX_LENGTH


def run_encoder(folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Run the graph in an export folder on each text.

    Args:
        folder: holds model.onnx and its data file.
        texts: token ids of each text.

    Returns:
        Logits or embeddings, (texts, width).

    Raises:
        ArtifactError: the runtime refuses the graph, or a text, or it crashed.
    """
    return encoder_process.run_texts(__name__, folder / names.MODEL_FILE, texts, "onnxruntime")


def _outputs_of(path: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    # Only the process that runs the graph needs the runtime.
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    onnxruntime.disable_telemetry_events()
    # onnxruntime's exceptions have no common base class of their own.
    known = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    errors: tuple[type[Exception], ...] = (*known, ValueError)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        longest = int(session.get_modelmeta().custom_metadata_map.get(MAX_LENGTH, 0))
        found = []
        for ids in texts:
            # The graph itself takes any text that the table of positions has rows for.
            if len(ids) > longest:
                raise TextRefused(f"a text of {len(ids)} tokens, more than its {MAX_LENGTH} of {longest}")
            tokens = np.array([ids], dtype=np.int64)
            found += session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
    except errors as error:
        raise TextRefused(str(error)) from error
    return np.concatenate(found)


if __name__ == "__main__":
    sys.exit(encoder_process.serve(_outputs_of))
