"""A .pte without torch: in executorch-numpy-runtime, in a separate Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from summing_model import CONTEXT, greedy, sums, write_pte

from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.agent import loaded_models
from qat_edge_devices.device_errors import RequestRejectedError
from qat_edge_devices.runtime import Runtime
from qat_edge_devices.transport import Access, Transport
from tests.exporters.tiny import export_into, freeze, llama

PYTHON = Path(__file__).parents[2] / ".cache" / "torch-free" / "python"  # made by tests/devices/install
real = pytest.mark.skipif(
    not PYTHON.is_file(), reason="executorch-numpy-runtime is not installed (tests/devices/install does it)"
)


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [
        ({"torch", "executorch", "executorch_numpy_runtime"}, "with torch"),
        ({"executorch", "executorch_numpy_runtime"}, "without"),
        ({"torch", "executorch_numpy_runtime"}, "without"),
        ({"executorch_numpy_runtime"}, "without"),
        (set(), "with torch"),  # its import fails with the name of the missing package
    ],
)
def test_the_torch_free_runtime_is_used_if_torch_is_not_installed(
    installed: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(loaded_models, "ExecuTorchModel", lambda: "with torch")
    monkeypatch.setattr(loaded_models, "NumpyModel", lambda: "without")
    assert loaded_models.choose_backend({"backend": "executorch", "task": "score"}) == chosen


@pytest.fixture
def there() -> Iterator[Transport]:
    with contextlib.closing(open_transport("local", Access(python=str(PYTHON)))) as transport:
        yield transport


def prepared(artifact: Path, transport: Transport) -> Runtime:
    runtime = open_runtime("executorch", transport, threads=1)
    runtime.prepare(artifact)
    return runtime


@real
def test_the_torch_free_runtime_scores_generates_and_times(there: Transport, tmp_path: Path) -> None:
    runtime = prepared(write_pte(tmp_path / "executorch"), there)
    sequences = [[5], [1, 2, 3, 4], [7] * 30]
    for decode_from in (None, 2):
        scored = [np.load(one.logits).argmax(1).tolist() for one in runtime.score(sequences, decode_from)]
        assert scored == [sums(ids) for ids in sequences]
    generated = runtime.generate([[1, 2], [12, 2]], eos_ids=[11], max_new_tokens=6)
    assert [completion.ids for completion in generated.completions] == [(3, 6, 12), tuple(greedy([12, 2], 6))]
    load = runtime.speed(prefill=8, decode=4, repeats=1).load
    assert (load.runtime, load.context_length) == ("executorch-numpy-runtime", CONTEXT)
    assert load.runtime_version == "1.4.0 (ExecuTorch 1.3.1)"
    assert load.pool_threads is None, "it does not report them"


@real
def test_a_program_with_llm_operators_names_the_missing_operators(there: Transport, tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "quantized")
    export_into(tmp_path / "quantized", tmp_path / "default")
    message = r"model\.pte needs llama::custom_sdpa, llama::update_cache, operators .* export it with --portable"
    with pytest.raises(RequestRejectedError, match=f"local: {message}"):
        list(prepared(tmp_path / "default", there).score([[1, 2]]))


@real
def test_a_portable_program_gives_the_same_logits_as_in_executorch(there: Transport, tmp_path: Path) -> None:
    freeze(llama(), 32, tmp_path / "quantized")
    export_into(tmp_path / "quantized", tmp_path / "portable", portable=True)
    sequences = [[1, 2, 3, 4, 5, 6], [9, 8, 7]]
    with contextlib.closing(open_transport("local")) as here:
        expected = [np.load(one.logits) for one in prepared(tmp_path / "portable", here).score(sequences, 2)]
    found = [np.load(one.logits) for one in prepared(tmp_path / "portable", there).score(sequences, 2)]
    for logits, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(logits, others, atol=1e-4)


@real
def test_a_damaged_program_is_named(there: Transport, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"not a program" * 9)
    with pytest.raises(RequestRejectedError, match=r"local: model\.pte cannot be loaded: "):
        list(prepared(tmp_path, there).score([[1, 2]]))
