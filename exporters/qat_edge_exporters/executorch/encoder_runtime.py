"""Run an encoder's .pte in the installed ExecuTorch runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401  registers operators of the .pte
import numpy as np
import torch
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError
from qat_edge_exporters.executorch import compat_runtime


def run_encoder(folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Run the program in an export folder on each text.

    Args:
        folder: holds model.pte.
        texts: token ids of each text.

    Returns:
        Logits or embeddings, (texts, width).

    Raises:
        ArtifactError: the runtime refuses the program, or a text.
    """
    path = folder / "model.pte"
    try:
        program = compat_runtime.load_program(path)
        outputs = []
        for ids in texts:
            tokens = torch.tensor([ids])
            # A copy: the runtime reuses the memory of its output in the next call.
            outputs.append(program.forward((tokens, torch.ones_like(tokens)))[0].clone())
    except RuntimeError as error:
        raise ArtifactError(f"{path}: ExecuTorch's runtime refused it: {error}. Export again.") from error
    return np.asarray(torch.cat(outputs).numpy())
