"""Find the first layer at which an artifact diverges from its frozen checkpoint, on the device and on this machine.

A copy of the artifact that also returns intermediate values runs there, and each value is compared with that of the
checkpoint given equal inputs: see `fault_test.find_divergence`. For an ONNX folder these are the input and the output
of every matrix; for a .pte the values passed between delegates, the result of every layer's attention and the output
of every layer.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from qat_edge.diagnose import fault_test
from qat_edge.diagnose.error_budget import TorchBudget
from qat_edge.diagnose.fault_test import Divergence
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding
from qat_edge.errors import ArtifactError, DeviceError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import LOCAL
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.device_errors import CancelledError, DeviceLayerError
from qat_edge_devices.runtime import TracedSequence
from qat_edge_devices.transport import Transport
from qat_edge_exporters.artifact import Exposed, Passage
from qat_edge_exporters.targets import target_named

PROMPTS = 8  # that are traced through the layers
_ONE = Lock()  # `emulate_rounding` changes attention for the whole process, and devices are tested in parallel


@dataclass(frozen=True)
class Localization:
    """Result of comparing an artifact's layers on one device with the frozen checkpoint's.

    Attributes:
        divergence: the first one, None if there is none or it is not known.
        reason: why it is not known; empty where the layers were compared.
    """

    divergence: Divergence | None
    reason: str = ""

    def describe(self, where: str) -> str:
        """Return a sentence without its final stop that begins with `where`, such as "On this machine"."""
        if self.reason:
            return f"{where}, the layers cannot be compared: {self.reason.rstrip('.')}"
        if self.divergence is None:
            return f"{where}, no layer diverges given equal inputs"
        return f"{where}, the first layer that diverges is {self.divergence}"


def describe_location(
    folder: Path, target: str, quantized: Path, torch: TorchBudget, transport: Transport, threads: int
) -> str:
    """Describe where the artifact first diverges on a device, and whether it does so on this machine, too."""
    there = locate(folder, target, quantized, torch, transport, threads)
    if transport.name == LOCAL:
        return there.describe("On this machine")

    # A fault that shows on both machines is in the file; otherwise in the runtime on the device.
    with closing(open_transport(LOCAL)) as local:
        here = locate(folder, target, quantized, torch, local, threads)
    if here == there:
        return there.describe(f"On {transport.name} and on this machine")

    text = f"{there.describe(f'On {transport.name}')}. {here.describe('On this machine')}"
    if here == Localization(None):
        text += f": the cause is the runtime on {transport.name}"
    return text


def locate(
    folder: Path, target: str, quantized: Path, torch: TorchBudget, transport: Transport, threads: int
) -> Localization:
    """Find the first module whose values on a device differ from the frozen checkpoint's.

    Args:
        folder: of the artifact.
        target: of the artifact.
        quantized: folder of the frozen checkpoint.
        torch: has the prompts, and how the runtime rounds differently.
        transport: to the device.
        threads: CPU threads of the runtime.
    """
    ids = [prompt.ids for prompt in torch.prompts]
    rounding = torch.roundings.get(target, Rounding())
    return locate_on_prompts(folder, target, quantized, ids, rounding, transport, threads)


def locate_on_prompts(
    folder: Path,
    target: str,
    quantized: Path,
    prompts: Sequence[Sequence[int]],
    rounding: Rounding,
    transport: Transport,
    threads: int,
) -> Localization:
    """Find the first module whose values differ, on the first tokens of evenly spaced prompts.

    Args:
        folder: of the artifact.
        target: of the artifact.
        quantized: folder of the frozen checkpoint.
        prompts: token ids.
        rounding: of the runtime.
        transport: to the device.
        threads: CPU threads of the runtime.
    """
    step = max(len(prompts) // PROMPTS, 1)
    traced_ids = [list(ids[: fault_test.LENGTH]) for ids in prompts[::step]]

    # An artifact that cannot be traced, or a device that fails, leaves the location unknown.
    try:
        processor = transport.info().processor
        traced = trace_artifact(folder, target, traced_ids, transport, threads)
    except CancelledError:
        raise
    except (ArtifactError, DeviceLayerError) as error:
        return Localization(None, str(error))

    # Compare with the checkpoint, rounding as the runtime does on that processor.
    traces = [{name: (_tensor(p.inputs), _tensor(p.outputs)) for name, p in modules.items()} for modules in traced]
    model, rounded = reference.load_dequantized(quantized)
    every_linear = traces[0].keys() >= set(rounded)
    with _ONE, emulate_rounding(model, rounded, rounding.on(processor)):
        candidates = list(zip(traced_ids, traces, strict=True))
        return Localization(fault_test.find_divergence(model, candidates, every_linear))


def trace_artifact(
    folder: Path, target: str, prompts: Sequence[Sequence[int]], transport: Transport, threads: int
) -> list[dict[str, Passage]]:
    """Run an artifact on a device and return the inputs and outputs of its modules, by name, for each prompt."""
    with tempfile.TemporaryDirectory(prefix="qat-edge-") as name:
        # Write a copy of the artifact that returns intermediate values, and run that.
        exposed: Exposed = target_named(target).expose_outputs(folder, Path(name))
        runtime = open_runtime(target, transport, threads)
        runtime.prepare(Path(name))
        by_prompt = []
        for traced in runtime.trace(prompts, fault_test.DECODED_FROM):
            # The files are deleted after the last prompt, so the arrays are read now.
            by_prompt.append(_read_passages(exposed, traced))
        return by_prompt


def _read_passages(exposed: Exposed, traced: TracedSequence) -> dict[str, Passage]:
    """Read the inputs and outputs of all modules for one sequence.

    Raises:
        DeviceError: the device returned something else than float32 arrays of the requested names.
    """
    try:
        # Stored as they are: a compressed array could be many times as large as its file.
        with zipfile.ZipFile(traced.outputs) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("a compressed array")
        with np.load(traced.outputs, allow_pickle=False) as arrays:
            outputs = dict(zip(traced.names, arrays.values(), strict=True))
        if any(values.dtype != np.float32 or values.ndim != 2 for values in outputs.values()):
            raise ValueError("an array that is not float32 (tokens, features)")
        return exposed.passages(outputs)
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DeviceError(f"the outputs that the device returned cannot be read ({reason[:200]}).") from error


def _tensor(values: NDArray[np.float32] | None) -> Tensor | None:
    return None if values is None else from_numpy(values)
