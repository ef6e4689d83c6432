"""A quantized model that adapters are trained next to, without changing it: a run of `quantize MODEL --out`.

Its RUN/start has the weights and scales that its codes were frozen from. A training takes them at the start of QAT, so
that all adapters trained on one base share its codes and scales, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qat_edge.errors import RunError
from qat_edge.models.merge import adapter_metadata
from qat_edge.quant.qat_init import QatInit
from qat_edge.run import Run


@dataclass(frozen=True)
class FrozenBase:
    """Parts of a frozen base that a training needs.

    Attributes:
        start: Weights and scales; None where the base rounds the model's own weights by their largest values.
        rotation_seed: Seed of the base's rotation; None without one.
        sha256: Of the file of `start`; None without one.
        kept_layers: Decoder layers that the base kept, if it is pruned.
    """

    start: QatInit | None
    rotation_seed: int | None
    sha256: str | None
    kept_layers: list[int] | None


def read_frozen_base(folder: str, identity: dict[str, Any]) -> FrozenBase:
    """Read the base that adapters are trained next to.

    Args:
        folder: Run folder of the base.
        identity: Of the model to train.

    Raises:
        RunError: no finished run, a damaged one, or one of another model.
    """
    run = Run.open(Path(folder))
    metadata = adapter_metadata(run.adapter)
    quantized = metadata["model"]["identity"]
    changed = [key for key in ("revision", "files") if identity[key] != quantized[key]]
    if changed:
        raise RunError(
            f"--frozen-base {folder}: quantized from {quantized['name']}, whose {changed[0]} was another one than that "
            f"of {identity['name']} is now. Restore that model, or quantize this one."
        )
    found = metadata["start"] or {}
    return FrozenBase(
        start=QatInit.load(run.start, found["sha256"]) if found else None,
        rotation_seed=found.get("rotation_seed"),
        sha256=found.get("sha256"),
        kept_layers=metadata["kept_layers"],
    )
