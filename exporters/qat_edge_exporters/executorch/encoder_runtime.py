"""Run an encoder's .pte in the installed ExecuTorch runtime, in a process of its own (`encoder_process`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat_edge_exporters import encoder_process
from qat_edge_exporters.encoder_process import TextRefused


def run_encoder(folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """Run the program in an export folder on each text.

    Args:
        folder: holds model.pte.
        texts: token ids of each text.

    Returns:
        Logits or embeddings, (texts, width).

    Raises:
        ArtifactError: the runtime refuses the program, or a text, or it crashed.
    """
    return encoder_process.run_texts(__name__, folder / "model.pte", texts, "ExecuTorch's runtime")


def _outputs_of(program_path: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    # Only the process that runs the program needs the runtime.
    import executorch.kernels.quantized  # noqa: F401  registers operators of the .pte
    import torch

    from qat_edge_exporters.executorch import compat_runtime

    try:
        program = compat_runtime.load_program(program_path)
        found = []
        for ids in texts:
            tokens = torch.tensor([ids])
            # A copy: the runtime reuses the memory of its output in the next call.
            found.append(program.forward((tokens, torch.ones_like(tokens)))[0].clone())
    except RuntimeError as error:
        raise TextRefused(str(error)) from error
    return np.asarray(torch.cat(found).numpy())


if __name__ == "__main__":
    sys.exit(encoder_process.serve(_outputs_of))
