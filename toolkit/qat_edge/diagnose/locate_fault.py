"""The first layer at which an artifact parts from its frozen checkpoint: the file looked into, where it runs.

A copy that returns what passes through it runs on the device and on this machine, and each is compared from equal
inputs: see `faults.first_parting`. In an ONNX folder that is the input and the output of every matrix; in a .pte what
passes between delegates, the result of every layer's attention and the output of every layer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from qat_edge.diagnose import fault_test
from qat_edge.diagnose.error_budget import TorchSide
from qat_edge.diagnose.fault_test import Parting
from qat_edge.diagnose.runtime_rounding import Rounding, rounding_as
from qat_edge.errors import ArtifactError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import LOCAL
from qat_edge.lazy import resolve
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.device_errors import CancelledError
from qat_edge_devices.device_errors import DeviceError as TransportLevelError
from qat_edge_devices.transport import Transport
from qat_edge_exporters import TRACERS
from qat_edge_exporters.artifact import Exposed, Passage

PROMPTS = 8  # that are followed through the layers
_ONE = Lock()  # `rounding_as` changes attention for the whole process, and devices are judged side by side


@dataclass(frozen=True)
class Looked:
    """The first place at which an artifact parts on a device, None where at none. reason: why that is not known."""

    place: Parting | None
    reason: str = ""

    def words(self, where: str) -> str:
        """A sentence without its end; where: it begins with that."""
        if self.reason:
            return f"{where} its layers cannot be compared: {self.reason.rstrip('.')}"
        if self.place is None:
            return f"{where} no layer parts from equal inputs"
        return f"{where} the first layer at which outputs part: {self.place}"


def first_words(
    folder: Path, target: str, quantized: Path, torch: TorchSide, transport: Transport, threads: int
) -> str:
    """Where the artifact parts first on a device, and whether on this machine as well, in words."""
    there = look(folder, target, quantized, torch, transport, threads)
    if transport.name == LOCAL:
        return there.words("On this machine")
    with closing(open_transport(LOCAL)) as local:
        here = look(folder, target, quantized, torch, local, threads)
    if here == there:
        return there.words(f"On {transport.name} as on this machine")
    words = f"{there.words(f'On {transport.name}')}. {here.words('On this machine')}"
    return f"{words}: it is what the runtime makes of the file there" if here == Looked(None) else words


def look(folder: Path, target: str, quantized: Path, torch: TorchSide, transport: Transport, threads: int) -> Looked:
    """The first module that says otherwise on a device than the checkpoint, rounding as the runtime does there."""
    rounding = torch.roundings.get(target, Rounding())
    asked = [prompt.ids[: fault_test.LENGTH] for prompt in torch.prompts[:: max(len(torch.prompts) // PROMPTS, 1)]]
    try:
        otherwise = rounding.applies(transport.info().machine)
        seen = passages(folder, target, asked, transport, threads)
    except CancelledError:
        raise
    except (ArtifactError, TransportLevelError) as error:
        return Looked(None, str(error))
    model, rounded = reference.load_dequantized(quantized)
    traces = [{name: (_tensor(p.inputs), _tensor(p.outputs)) for name, p in found.items()} for found in seen]
    with _ONE, rounding_as(model, rounded, rounding if otherwise else Rounding()):
        pairs = list(zip(asked, traces, strict=True))
        return Looked(fault_test.first_parting(model, pairs, every_linear=traces[0].keys() >= set(rounded)))


def passages(
    folder: Path, target: str, asked: Sequence[Sequence[int]], transport: Transport, threads: int
) -> list[dict[str, Passage]]:
    """What passes through the artifact on a device, by module, for each sequence."""
    with tempfile.TemporaryDirectory(prefix="qat-edge-") as name:
        exposed: Exposed = resolve(TRACERS, target, "--target")(folder, Path(name))
        runtime = open_runtime(target, transport, threads)
        runtime.prepare(Path(name))
        found = []
        for traced in runtime.trace(asked, fault_test.DECODED_FROM):
            with np.load(traced.outputs) as arrays:
                outputs = dict(zip(traced.names, arrays.values(), strict=True))
            found.append(exposed.passages(outputs))
        return found


def _tensor(values: NDArray[np.float32] | None) -> Tensor | None:
    return None if values is None else from_numpy(values)
