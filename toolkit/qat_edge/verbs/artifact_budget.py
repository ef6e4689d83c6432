"""Error budget of one artifact on one device; if its error exceeds rounding noise, the layer where it begins."""

from __future__ import annotations

import dataclasses

from qat_edge import progress
from qat_edge.diagnose import locate_fault
from qat_edge.diagnose.error_budget import TorchBudget, budget, run_fault_test
from qat_edge.evaluate.evaluator import Evaluator
from qat_edge.evaluate.results import Budget, FaultTest
from qat_edge.run import Run
from qat_edge.verbs.verify import verify_folder
from qat_edge_devices.transport import Transport


def artifact_budget(run: Run, target: str, transport: Transport, evaluator: Evaluator, side: TorchBudget) -> Budget:
    """Return the error budget of one artifact, with the location of a fault where there is one.

    Args:
        run: the run whose own artifact it is.
        target: name of the artifact.
        transport: the device that it runs on.
        evaluator: measures the artifact, with the options of the device.
        side: torch side of the budget, the same for all devices.
    """
    fault_test = run_fault_test(run, evaluator, side, target, transport)
    if fault_test.exceeds_noise:
        fault_test = dataclasses.replace(
            fault_test, location=_locate(run, evaluator, side, target, transport, fault_test)
        )
        progress.warn(
            f"{target}: differs from the frozen checkpoint by more than rounding noise. {fault_test.location}"
        )
    return budget(evaluator, side, target, transport.name, fault_test)


def _locate(
    run: Run, evaluator: Evaluator, side: TorchBudget, target: str, transport: Transport, fault_test: FaultTest
) -> str:
    """Describe where a fault is: the file is read back first, then its layers are compared one by one."""
    folder = run.exports / target
    verified = verify_folder(folder, target, run.quantized)
    in_file = f"The file differs from the frozen checkpoint: {verified.faults[0]}" if verified.faults else ""
    if verified.linears_equal < verified.linears or not (verified.embedding_equal and verified.head_equal):
        return in_file

    # At position 0 there is nothing to attend to, so a difference there is not one of attention.
    cause = "attention (rotary angles, mask or cache)" if fault_test.position else "how the runtime computes them"
    in_file = in_file or "Its codes and scales equal the frozen checkpoint's"
    layer = locate_fault.describe_location(folder, target, run.quantized, side, transport, evaluator.options.threads)
    return f"{in_file}. It diverges at position {fault_test.position} of a prompt: {cause}. {layer}"
