"""An ONNX export folder: graph, weights and the configuration of onnxruntime-genai."""

from __future__ import annotations

from pathlib import Path

from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.runtimes.agent_runtime import AgentRuntime


class OnnxRuntime(AgentRuntime):
    """Scores in plain onnxruntime; generates and times in onnxruntime-genai where the device has it.

    `LoadFigures.runtime` says which of the two it was.
    """

    backend = "onnx"

    def files(self, artifact: Path) -> dict[str, Path]:
        """Graph, external weights and configuration, under their own names: they refer to each other."""
        if not (artifact / "model.onnx").is_file():
            raise TransportError(f"{artifact}: no model.onnx there. Export it again.")
        names = [*sorted(p.name for p in artifact.glob("model.onnx*")), "genai_config.json"]
        return {f"artifact/{n}": artifact / n for n in names if (artifact / n).is_file()}

    def entry(self) -> str:
        """The folder on the device."""
        return "artifact"
