"""Try the verbs under kills, signals, full disks and in pairs; the exit code is 1 where a trial went wrong.

python -m tests.reliability --trials 100
python -m tests.reliability --trials 6 --verb finetune --kind kill
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

# Before any library is imported: forked children share what is set up here, and must not have threads.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

from qat_edge import stop_signals
from qat_edge.logs import quiet_libraries

quiet_libraries(verbose=False)

from tests.reliability.harness import Bench, Outcome, Scenario, can_mount  # noqa: E402
from tests.reliability.scenarios import Scenarios, make_inputs  # noqa: E402

KINDS = ("kill", "signal", "pair", "disk")
VERBS = (
    "finetune", "finetune-force", "finetune-again", "quantize", "quantize-force", "sensitivity", "export",
    "export-pte", "verify", "validate", "compare",
)  # fmt: skip


def main() -> int:
    """Run the trials and print one line for each kind and verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="trials of each kind and verb")
    parser.add_argument("--verb", choices=VERBS, action="append", help="all by default")
    parser.add_argument("--kind", choices=KINDS, action="append", help="all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    given = parser.parse_args()

    # Under nohup and in the background of a script these are ignored, and no trial would be cut short.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    faults = 0
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        root = Path(name).resolve()
        bench, scenarios = Bench(root), Scenarios(root, make_inputs(root))
        for kind in given.kind or KINDS:
            if kind == "disk" and not can_mount(root):
                print("disk: skipped, because this user may not mount a file system", flush=True)
                continue
            for verb in given.verb or VERBS:
                began = time.monotonic()
                outcome = run_trials(bench, scenarios.named(verb), kind, given.trials, given.seed)
                faults += len(outcome.faults)
                print(
                    f"{kind:7s}{verb:16s}{outcome.trials:4d} trials, {outcome.killed:4d} of them cut short or refused, "
                    f"{len(outcome.faults)} wrong, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
                for fault in outcome.faults:
                    print(fault, flush=True)
    return 1 if faults else 0


def run_trials(bench: Bench, scenario: Scenario, kind: str, trials: int, seed: int) -> Outcome:
    """Run the trials of one kind."""
    if kind == "kill":
        return bench.kill_trials(scenario, trials, seed)
    if kind == "pair":
        return bench.pair_trials(scenario, trials)
    if kind == "disk":
        return bench.full_disk_trials(scenario, trials)

    # As the command line runs a verb.
    def run(folder: Path) -> None:
        try:
            with stop_signals.raise_on_signals():
                scenario.run(folder)
        except stop_signals.Stopped as stopped:
            print(stopped, flush=True)
            sys.exit(stopped.exit_code)

    return bench.signal_trials(replace(scenario, run=run), trials, seed)


if __name__ == "__main__":
    sys.exit(main())
