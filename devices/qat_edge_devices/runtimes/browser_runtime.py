"""Run ONNX artifacts in onnxruntime-web, in a page of headless Chromium.

The requests and the results are those of the Python agent (`agent_runtime.py`); `agent/agent.js` is the other
side.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from qat_edge_devices import onnxruntime_web
from qat_edge_devices.agent.active_adapter import ADAPTER_FILE
from qat_edge_devices.browser_transport import BrowserTransport
from qat_edge_devices.device_errors import RequestRejectedError, UnknownNameError
from qat_edge_devices.runtimes.agent_runtime import AGENT, OnnxRuntime
from qat_edge_devices.transport import DeviceInfo, Transport


class WasmRuntime(OnnxRuntime):
    """Scores, generates and times in onnxruntime-web with WebAssembly, on the processor.

    Attributes:
        library: files of onnxruntime-web that the page loads.
        external_data: names of the artifact's files of weights, which the page has to announce to the runtime.
    """

    library = onnxruntime_web.WASM_FILES
    external_data: tuple[str, ...] = ()
    grammar_file = ""  # onnxruntime-web takes none

    def program(self) -> dict[str, Path]:
        """Return the page, its agent and onnxruntime-web."""
        transport = _browser(self.transport)
        library = onnxruntime_web.unpack(transport.archive, self.library, transport.folder / "onnxruntime-web")
        pages = [AGENT / "agent.html", AGENT / "agent.js"]
        return {f"agent/{path.name}": path for path in pages} | {f"agent/{name}": p for name, p in library.items()}

    def argv(self) -> tuple[str, ...]:
        """Return the page and its arguments."""
        return ("agent/agent.html", "request.json", "results")

    def require_supported(self, info: DeviceInfo) -> None:
        """Accept any processor: the browser has been found, so it runs here."""

    def files(self, artifact: Path) -> dict[str, Path]:
        """Return graph, external weights and configuration.

        Raises:
            RequestRejectedError: the artifact has a LoRA adapter, which onnxruntime-web cannot load.
        """
        if (artifact / ADAPTER_FILE).is_file():
            raise RequestRejectedError(
                f"{self.transport.name}: {artifact} has a LoRA adapter, and onnxruntime-web cannot load one. Measure "
                "an artifact whose adapter is merged, or another device."
            )
        files = super().files(artifact)
        self.external_data = tuple(path.name for path in files.values() if path.name.startswith("model.onnx."))
        return files

    def shared(self) -> dict[str, Any]:
        """Return what all requests have in common."""
        return super().shared() | {"external_data": list(self.external_data)}

    def _round_trip(self, request: dict[str, Any], folder: Path, done_before: int) -> None:
        super()._round_trip(request, folder, done_before)
        # The page writes a folder of .npy files for each sequence, which is what a .npz file is.
        for outputs in folder.glob("outputs-*"):
            with zipfile.ZipFile(folder / f"{outputs.name}.npz", "w") as archive:
                for path in sorted(outputs.iterdir(), key=lambda path: int(path.stem.removeprefix("arr_"))):
                    archive.write(path, path.name)
            shutil.rmtree(outputs)


class WebGpuRuntime(WasmRuntime):
    """Scores, generates and times in onnxruntime-web with WebGPU."""

    backend = "onnx-webgpu"
    library = onnxruntime_web.WEBGPU_FILES


def _browser(transport: Transport) -> BrowserTransport:
    """Return a transport as the browser that it has to be.

    Raises:
        UnknownNameError: it is another one.
    """
    if not isinstance(transport, BrowserTransport):
        raise UnknownNameError(f"{transport.name}: onnxruntime-web needs a browser. Use --device browser.")
    return transport
