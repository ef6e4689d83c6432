"""Fine-tune a small language model for int4, export it, and prove that the trained function is the one that ships.

    from qat_edge import plan, finetune, sweep, prepare, quantize, quantize_model, export, verify, validate
    from qat_edge import generate, chat, load_frozen, Run

The functions are documented in `qat_edge.api`; importing this package imports nothing heavy.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# ONNX Runtime, onnxruntime-genai and the Hub's client report their use to their makers unless these are set before they
# start; ONNX Runtime also keeps an identifier and a data base in the user's cache. Child processes inherit them.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from qat_edge.api import (
        chat,
        export,
        finetune,
        generate,
        load_frozen,
        plan,
        prepare,
        quantize,
        quantize_model,
        sweep,
        validate,
        verify,
    )
    from qat_edge.run import Run

__version__ = "0.2.0.dev0"
__all__ = [
    "Run",
    "__version__",
    "chat",
    "export",
    "finetune",
    "generate",
    "load_frozen",
    "plan",
    "prepare",
    "quantize",
    "quantize_model",
    "sweep",
    "validate",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("qat_edge.run" if name == "Run" else "qat_edge.api"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
