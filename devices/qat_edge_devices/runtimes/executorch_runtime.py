"""An ExecuTorch export folder: one .pte. The tokenizer beside it stays here, for only ids travel."""

from __future__ import annotations

from pathlib import Path

from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.runtimes.agent_runtime import AgentRuntime


class ExecuTorchRuntime(AgentRuntime):
    """Runs the .pte of an export folder, or the .pte itself, in ExecuTorch's Python runtime."""

    backend = "executorch"

    def files(self, artifact: Path) -> dict[str, Path]:
        """The .pte under the name the agent is given."""
        if artifact.is_file():
            return {"artifact/model.pte": artifact}
        found = sorted(artifact.glob("*.pte"))
        if len(found) != 1:
            raise TransportError(f"{artifact}: expected one .pte there, found {len(found)}. Export it again.")
        return {"artifact/model.pte": found[0]}

    def entry(self) -> str:
        """The .pte on the device."""
        return "artifact/model.pte"
