"""Float constants of a .pte that are no tensors of the checkpoint: the frequencies of rotary embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from qat_edge import remote_code
from qat_edge.models import tasks
from qat_edge.models.meta_model import model_without_weights
from qat_edge_exporters.artifact import Artifact, FloatConstant


def rotary_frequencies(checkpoint: Path, artifact: Artifact) -> list[FloatConstant]:
    """Compute the frequencies with the model's own modules; empty for a model without rotary embeddings."""
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=remote_code.permitted())
    model = model_without_weights(config, tasks.task_of_folder(checkpoint).auto_class)

    found = []
    for name, module in model.named_modules():
        # transformers 5.23: these modules have no common base class; the attribute `rope_type` is what they share.
        if not hasattr(module, "rope_type"):
            continue
        # Made again on the CPU: the buffers of a module on the meta device hold no values.
        rotary: Any = type(module)(module.config)
        found += [
            FloatConstant(f"{name}.{buffer}", values.float().numpy().astype(np.float32))
            for buffer, values in rotary.named_buffers()
        ]
    return found
