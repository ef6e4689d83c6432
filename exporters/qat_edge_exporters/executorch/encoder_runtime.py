"""An encoder's .pte asked in the installed ExecuTorch runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import numpy as np
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from numpy.typing import NDArray

from qat_edge.errors import ArtifactError


def answers(folder: Path, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """What the program in an export folder answers to each text's token ids: (texts, width).

    Raises:
        ArtifactError: the runtime refuses the program, or a text.
    """
    path = folder / "model.pte"
    try:
        program = _load_for_executorch(str(path))
        found = []
        for ids in texts:
            given = torch.tensor([ids])
            found.append(program.forward((given, torch.ones_like(given)))[0].clone())
    except RuntimeError as error:
        raise ArtifactError(f"{path}: ExecuTorch's runtime refused it: {error}. Export again.") from error
    return np.asarray(torch.cat(found).numpy())
