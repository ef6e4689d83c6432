"""The first layer at which an artifact parts from its frozen checkpoint: the file looked into, on this machine.

What passes through the artifact is read in a process of its own (a runtime may crash on a faulty file), then compared
from equal inputs: see `faults.first_parting`. In an ONNX folder that is the input and the output of every matrix; in a
.pte what passes between delegates, the result of every layer's attention and the output of every layer.
"""

from __future__ import annotations

import multiprocessing
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from qat_edge.data import ScoredIds
from qat_edge.errors import ArtifactError
from qat_edge.measure import faults, reference
from qat_edge.measure.budget import TorchSide
from qat_edge.measure.devices import LOCAL
from qat_edge.measure.faults import Parting
from qat_edge.measure.rounding import Rounding, rounding_as
from qat_edge.tables import resolve
from qat_edge_exporters import TRACERS
from qat_edge_exporters.artifact import Passage

PROMPTS = 8  # that are followed through the layers
_ONE = Lock()  # `rounding_as` changes attention for the whole process, and devices are judged side by side


def first_words(folder: Path, target: str, quantized: Path, torch: TorchSide, device: str) -> str:
    """Where the artifact parts first, in a sentence; device: the one on which it was found to part."""
    rounding = torch.roundings.get(target, Rounding())
    try:
        place = first_layer(
            folder, target, quantized, rounding if rounding.applies(platform.machine()) else Rounding(), torch.prompts
        )
    except ArtifactError as error:
        return f"Its layers cannot be compared: {error}"
    if place is not None:
        return f"The first layer at which outputs part: {place}"
    if device != LOCAL:
        return f"On this machine no layer of the same file parts, so it is what the runtime makes of it on {device}"
    return "From equal inputs no layer parts"


def first_layer(
    folder: Path, target: str, quantized: Path, rounding: Rounding, prompts: Sequence[ScoredIds]
) -> Parting | None:
    """The first module that says otherwise than the checkpoint, rounding as the runtime does; None where none does.

    Raises:
        ArtifactError: the artifact cannot be looked into.
    """
    asked = [prompt.ids[: faults.LENGTH] for prompt in prompts[:: max(len(prompts) // PROMPTS, 1)]]
    passages = _in_own_process(folder, target, asked)
    model, rounded = reference.load_dequantized(quantized)
    traces = [{name: (_tensor(one.inputs), _tensor(one.outputs)) for name, one in seen.items()} for seen in passages]
    with _ONE, rounding_as(model, rounded, rounding):
        pairs = list(zip(asked, traces, strict=True))
        return faults.first_parting(model, pairs, every_linear=traces[0].keys() >= set(rounded))


def _tensor(values: NDArray[np.float32] | None) -> Tensor | None:
    return None if values is None else from_numpy(values)


def _in_own_process(folder: Path, target: str, prompts: list[list[int]]) -> list[dict[str, Passage]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_trace, folder, target, prompts).result()
        except BrokenProcessPool as error:
            raise ArtifactError(f"{folder}: its runtime crashed while it was looked into.") from error


def _trace(folder: Path, target: str, prompts: list[list[int]]) -> list[dict[str, Passage]]:
    found: list[dict[str, Passage]] = resolve(TRACERS, target, "--target")(folder, prompts)
    return found
