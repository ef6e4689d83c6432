"""LoRA adapter of an ONNX folder, active in every run: the graph alone computes the base.

Libraries and their objects are typed `Any`: they ship no type information.
"""

from __future__ import annotations

from typing import Any

ADAPTER_FILE = "adapter.onnx_adapter"
NAME = "adapter"  # while it is loaded


class OnnxAdapter:
    """Adapter in plain onnxruntime.

    Args:
        library: onnxruntime.
        path: of the adapter's file; None for an artifact without one.

    Attributes:
        run_options: for each run of the session; None without an adapter.
    """

    def __init__(self, library: Any, path: str | None) -> None:
        self.run_options: Any = None
        if path is not None:
            # The options do not own the adapter, so it has to live as long as they do.
            self._adapter = library.LoraAdapter()
            self._adapter.Load(path)
            self.run_options = library.RunOptions()
            self.run_options.add_active_adapter(self._adapter)


class GenaiAdapter:
    """Adapter in onnxruntime-genai.

    Args:
        library: onnxruntime_genai.
        model: that the adapter belongs to.
        path: of the adapter's file; None for an artifact without one.
    """

    def __init__(self, library: Any, model: Any, path: str | None) -> None:
        self._adapters: Any = None
        if path is not None:
            self._adapters = library.Adapters(model)
            self._adapters.load(path, NAME)

    def activate(self, generator: Any) -> None:
        """Make the adapter active in a generator that has no tokens yet."""
        if self._adapters is not None:
            generator.set_active_adapter(self._adapters, NAME)
