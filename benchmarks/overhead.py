"""What the agent adds to its runtimes: `python -m benchmarks.overhead RUN` times tokens with it and bare.

Bare is nothing but the runtime's own call, on inputs made beforehand; no token is chosen. A process loads an artifact
as the agent does and decodes, one step bare and the next by the agent, so that what else slows the machine slows both;
each round is a process. Time is the processor's, of one thread and in the median step.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

from qat_edge_devices.agent import loaded_models, machine

# Runtime -> target, and whether onnxruntime-genai is hidden from the agent, which would choose it.
RUNTIMES = {
    "executorch": ("executorch", False),
    "onnxruntime": ("onnx", True),
    "onnxruntime-genai": ("onnx", False),
}
# What goes before either program: its clock, and what it must not find.
CLOCK = "import sys, time; time.perf_counter = time.process_time; "
HIDE_GENAI = "sys.modules['onnxruntime_genai'] = None; "
Step = Callable[[], object]


def main() -> None:
    """Time decoding by the agent and by bare calls of the same runtime, for every export of a finished run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run with exports of both targets, such as runs/demo")
    parser.add_argument("--rounds", type=int, default=5, help="processes, 5 by default")
    parser.add_argument("--prefill", type=int, default=16, help="tokens of the prompt, 16 by default")
    parser.add_argument("--decode", type=int, default=32, help="steps of each that follow, 32 by default")
    parser.add_argument("--turns", type=int, default=4, help="prompts in a process, 4 by default")
    given = parser.parse_args()
    amounts = {name: getattr(given, name) for name in ("prefill", "decode", "turns")}
    for runtime, (target, _) in RUNTIMES.items():
        artifact = given.run / "exports" / target
        artifact = artifact / "model.pte" if target == "executorch" else artifact
        print(told(runtime, rounds(runtime, artifact.resolve(), amounts, given.rounds)), flush=True)


def rounds(runtime: str, artifact: Path, amounts: dict[str, int], count: int) -> list[tuple[float, float]]:
    """Milliseconds of a token in each round: bare, and by the agent."""
    target, hide = RUNTIMES[runtime]
    request = {"task": "speed", "backend": target, "artifact": str(artifact), "threads": 1, **amounts}
    code = f"{CLOCK}{HIDE_GENAI * hide}from benchmarks.overhead import in_turn; in_turn(*sys.argv[1:])"
    found = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name:
            result = Path(name) / "result.json"
            argv = [sys.executable, "-c", code, json.dumps(request), str(result)]
            ended = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
            if ended.returncode:
                raise SystemExit(f"{artifact} could not be timed:\n{ended.stderr}")
            bare, ours = json.loads(result.read_text(encoding="utf-8"))
        found.append((bare, ours))
    return found


def in_turn(text: str, result: str) -> None:
    """Write the milliseconds of the median step, bare and by the agent, into the file `result`; text: a request."""
    request = json.loads(text)
    cpus = machine.pin(request["threads"], request["backend"])
    model = loaded_models.choose_backend(request)
    model.load(Path(request["artifact"]), request, cpus)
    bare, ours = [], []
    for turn in range(request["turns"]):
        times = steps(model, request, bare_first=turn % 2 == 0)
        bare += times[0]
        ours += times[1]
    Path(result).write_text(json.dumps([median(bare), median(ours)]), encoding="utf-8")


def steps(model: loaded_models.Model, request: dict[str, Any], bare_first: bool) -> tuple[list[float], list[float]]:
    """Milliseconds of the steps after a prompt: every other one bare, the others by the agent."""
    prefill, decode = request["prefill"], request["decode"]
    model.start([1 + i % 7 for i in range(prefill)], prefill + 2 * decode + 1)
    bare: list[float] = []
    ours: list[float] = []
    for position in range(prefill, prefill + 2 * decode):
        is_bare = ((position - prefill) % 2 == 0) == bare_first
        token = 1 + position % 7
        step = CALLS[model.runtime](model, token, position) if is_bare else partial(model.next, token)
        began = time.perf_counter()
        step()
        (bare if is_bare else ours).append((time.perf_counter() - began) * 1e3)
    return bare, ours


def _executorch(model: loaded_models.Model, token: int, position: int) -> Step:
    mine = cast(loaded_models.ExecuTorchModel, model)
    mine.position = position + 1  # where the agent goes on
    return partial(mine.method.call, [mine.torch.tensor([[token]]), mine.torch.tensor([position])])


def _onnxruntime(model: loaded_models.Model, token: int, position: int) -> Step:
    """The cache has to be handed from call to call here, too."""
    mine = cast(loaded_models.OnnxModel, model)
    mine.position = position + 1
    held, outputs, feed = mine.cache, mine.outputs, mine.feed([token], position)
    past = [name.replace("present", "past_key_values") for name in outputs]

    def step() -> None:
        answers = mine.session.run_with_ort_values(outputs, feed | held)
        held.update((name, value) for name, value in zip(past, answers, strict=True) if name in held)

    return step


def _genai(model: loaded_models.Model, token: int, position: int) -> Step:
    step: Step = cast(loaded_models.GenaiModel, model).generator.generate_next_token
    return step


CALLS = {"executorch": _executorch, "onnxruntime": _onnxruntime, "onnxruntime-genai": _genai}


def told(runtime: str, times: list[tuple[float, float]]) -> str:
    """A line about the rounds of one runtime."""
    bare, ours = (median(each) for each in zip(*times, strict=True))
    ratios = sorted(mine / theirs for theirs, mine in times)
    return (
        f"{runtime}: a token takes {bare:.3f} ms bare, {ours:.3f} ms by the agent; ratio {median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}), {len(times)} rounds, load average {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
