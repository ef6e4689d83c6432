"""Artifacts in ARM instructions under qemu, compared with x86 and with the frozen checkpoint in torch.

Slow (imports of torch alone take a minute there), so not part of `make test`: `make test-arm64`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import plain_rows, short_training, train_run
from qat_edge.diagnose import runtime_rounding
from qat_edge.evaluate import reference
from qat_edge.evaluate.reference import Logits
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.processor import Processor
from qat_edge_devices.transport import Access

PYTHON = Path(__file__).parents[2] / ".cache" / "arm64" / "python"  # made by tests/devices/install-arm64
SEQUENCES = [[(7 * i * i + 11 * i + seed) % 260 for i in range(32)] for seed in (3, 5)]
SLACK_DB = 3.0  # an error of half the power again: two disturbances of the same size differ by less

pytestmark = [
    pytest.mark.arm64,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no ARM machine here (make test-arm64 makes one)"),
]


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("arm64"))
    export(made, ExportOptions(context_length=64, ptq=("none",)))
    return made


def scored(run: Run, target: str, python: str | None) -> Logits:
    """Return the logits of all sequences, (tokens, vocabulary), from the agent in that Python."""
    with contextlib.closing(open_transport("local", Access(python=python))) as transport:
        runtime = open_runtime(target, transport, threads=1)
        runtime.prepare(run.exports / target)
        return np.concatenate([np.load(one.logits) for one in runtime.score(SEQUENCES)])


def in_torch(model: torch.nn.Module) -> Logits:
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([ids])).logits[0].numpy() for ids in SEQUENCES])


def sqnr_db(expected: Logits, found: Logits) -> float:
    one, other = expected.astype(np.float64), found.astype(np.float64)
    return float(10 * np.log10(np.square(one).sum() / np.square(one - other).sum()))


@pytest.fixture(scope="module")
def made(run: Run, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """Runs with 4-bit and with 2-bit weights; embedding and head have 8 bits."""
    folder = tmp_path_factory.mktemp("arm64-2bit")
    two = Run(folder / "run")
    options = short_training(tiny_model_folder, folder, plain_rows(40), steps=4, weight_bits=2, group_size=64)
    finetune(options, two.path)
    export(two, ExportOptions(target=("onnx",), context_length=64, ptq=("none",)))
    return {4: run, 2: two}


@pytest.fixture(scope="module")
def exact(run: Run) -> tuple[Logits, float]:
    """Logits of the frozen checkpoint in torch, and their SQNR in dB when the checkpoint is disturbed."""
    model = reference.load_exact(run.quantized)
    found = in_torch(model)
    with reference.disturbed(model):
        return found, sqnr_db(found, in_torch(model))


def print_figures(request: pytest.FixtureRequest, **figures: float) -> None:
    """Print the figures past pytest's capture: they are the purpose of the command."""
    with request.getfixturevalue("capsys").disabled():
        print(f"\n{request.node.name}: " + ", ".join(f"{name} {value:.1f} dB" for name, value in figures.items()))


def test_executorch_on_arm_computes_what_was_frozen(
    run: Run, exact: tuple[Logits, float], request: pytest.FixtureRequest
) -> None:
    expected, floor_db = exact
    arm, x86 = scored(run, "executorch", str(PYTHON)), scored(run, "executorch", None)
    print_figures(
        request, arm_x86=sqnr_db(x86, arm), arm_frozen=sqnr_db(expected, arm), x86_frozen=sqnr_db(expected, x86),
        disturbed=floor_db,
    )  # fmt: skip
    # Where XNNPACK moves an input to another code than torch, it does so on both.
    assert sqnr_db(x86, arm) > floor_db - SLACK_DB
    assert sqnr_db(expected, arm) > min(floor_db, sqnr_db(expected, x86)) - SLACK_DB


@pytest.mark.parametrize("processor", [Processor.ARM, Processor.ARM_WITHOUT_DOT_PRODUCT])
@pytest.mark.parametrize("bits", [4, 2])
def test_onnx_on_arm_rounds_inputs_as_the_error_budget_assumes(
    processor: Processor,
    bits: int,
    made: dict[int, Run],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = made[bits]
    monkeypatch.setenv("QEMU_CPU", "cortex-a72" if processor is Processor.ARM_WITHOUT_DOT_PRODUCT else "max")
    found = scored(run, "onnx", str(PYTHON))

    # The frozen checkpoint in torch, with inputs rounded as ONNX Runtime does on each kind of processor.
    rounding = runtime_rounding.artifact_rounding(run.exports / "onnx", "onnx")
    assert rounding is not None
    model, names = reference.load_dequantized(run.quantized)
    kinds = (processor, Processor.X86, Processor.WASM, Processor.OTHER)
    emulated: dict[str, Logits] = {}
    for kind in kinds:
        with runtime_rounding.emulate_rounding(model, names, rounding.on(kind)):
            emulated[kind] = in_torch(model)
    closeness = {kind: sqnr_db(logits, found) for kind, logits in emulated.items()}
    x86 = scored(run, "onnx", None)
    print_figures(request, **closeness, x86_itself=sqnr_db(x86, found), x86_emulated=sqnr_db(emulated["x86"], x86))

    # Measured: 56 to 131 dB, and 38 to 43 dB with the rounding of other processors.
    others = [kind for kind in kinds if not np.array_equal(emulated[kind], emulated[processor])]
    assert closeness[processor] > 50 and all(closeness[kind] < 45 for kind in others) and others
