"""The process of its own in which an artifact is looked into. What is found there is in tests/exporters."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def crash(*_: object) -> None:
    os._exit(1)


def test_a_runtime_that_crashes_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat_edge.errors import ArtifactError  # not above: the new process imports this file
    from qat_edge.measure import layers

    monkeypatch.setattr(layers, "_trace", crash)
    with pytest.raises(ArtifactError, match=r"folder: its runtime crashed while it was looked into"):
        layers._in_own_process(Path("folder"), "onnx", [[1]])
