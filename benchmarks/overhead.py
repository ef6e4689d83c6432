"""Overhead of the agent over its runtimes: `python -m benchmarks.overhead RUN` times tokens with and without it.

A bare step is the runtime's own call on inputs prepared beforehand, without choosing a token. A process loads an
artifact as the agent does and decodes: one step bare, the next one by the agent, so that whatever slows the machine
slows both. Each round is a process. Times are CPU time of one thread; the median step counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import psutil

from qat_edge_devices.agent import loaded_models, machine

# Runtime -> target, and whether onnxruntime-genai is hidden: otherwise the agent would choose it.
RUNTIMES = {
    "executorch": ("executorch", False),
    "onnxruntime": ("onnx", True),
    "onnxruntime-genai": ("onnx", False),
}
# Prepended to the program of a round: CPU time as its clock, and a package that must not be importable.
CLOCK = "import sys, time; time.perf_counter = time.process_time; "
HIDE_GENAI = "sys.modules['onnxruntime_genai'] = None; "
Step = Callable[[], object]


def main() -> None:
    """Time decoding by the agent and by bare calls of the same runtime, for every export of a finished run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=main.__doc__)
    parser.add_argument("run", type=Path, help="finished run with exports of both targets, such as runs/demo")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, a process each, 5 by default")
    parser.add_argument("--prefill", type=int, default=16, help="tokens of the prompt, 16 by default")
    parser.add_argument("--decode", type=int, default=32, help="steps of each kind after it, 32 by default")
    parser.add_argument("--turns", type=int, default=4, help="prompts per process, 4 by default")
    given = parser.parse_args()
    amounts = {name: getattr(given, name) for name in ("prefill", "decode", "turns")}
    for runtime, (target, _) in RUNTIMES.items():
        artifact = given.run / "exports" / target
        artifact = artifact / "model.pte" if target == "executorch" else artifact
        print(describe(runtime, rounds(runtime, artifact.resolve(), amounts, given.rounds)), flush=True)


class TokenTimes(NamedTuple):
    """Median milliseconds per token in one round."""

    bare_ms: float
    agent_ms: float


def rounds(runtime: str, artifact: Path, amounts: dict[str, int], count: int) -> list[TokenTimes]:
    """Time `count` rounds.

    Args:
        runtime: key of RUNTIMES.
        artifact: .pte file or ONNX folder.
        amounts: "prefill", "decode" and "turns", as the command's options.
        count: rounds.
    """
    # The clock has to be replaced before the agent is imported, so each round runs `python -c`.
    target, hide = RUNTIMES[runtime]
    request = {"task": "speed", "backend": target, "artifact": str(artifact), "threads": 1, **amounts}
    code = (
        f"{CLOCK}{HIDE_GENAI * hide}from benchmarks.overhead import time_alternately; time_alternately(*sys.argv[1:])"
    )
    found = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as name:
            result = Path(name) / "result.json"
            argv = [sys.executable, "-c", code, json.dumps(request), str(result)]
            ended = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
            if ended.returncode:
                raise SystemExit(f"{artifact} could not be timed:\n{ended.stderr}")
            found.append(TokenTimes(*json.loads(result.read_text(encoding="utf-8"))))
    return found


def time_alternately(text: str, result: str) -> None:
    """Time one round in this process.

    Args:
        text: request of the agent, as JSON.
        result: file for the median milliseconds of a bare step and of the agent's.
    """
    request = json.loads(text)
    cpus = machine.pin(request["threads"], request["backend"])
    model = loaded_models.choose_backend(request)
    model.load(Path(request["artifact"]), request, cpus)
    bare_ms, agent_ms = [], []
    for turn in range(request["turns"]):
        times = steps(model, request, bare_first=turn % 2 == 0)
        bare_ms += times[0]
        agent_ms += times[1]
    Path(result).write_text(json.dumps([median(bare_ms), median(agent_ms)]), encoding="utf-8")


def steps(
    model: loaded_models.DeviceModel, request: dict[str, Any], bare_first: bool
) -> tuple[list[float], list[float]]:
    """Return milliseconds of the bare steps and of the agent's steps after one prompt, which alternate."""
    prefill, decode = request["prefill"], request["decode"]
    model.start([1 + i % 7 for i in range(prefill)], prefill + 2 * decode + 1)
    bare_ms: list[float] = []
    agent_ms: list[float] = []
    # Both kinds of steps continue the same sequence, so the KV cache grows alike for both.
    for position in range(prefill, prefill + 2 * decode):
        is_bare = ((position - prefill) % 2 == 0) == bare_first
        token = 1 + position % 7
        step = CALLS[model.runtime](model, token, position) if is_bare else partial(model.next, token)
        began = time.perf_counter()
        step()
        (bare_ms if is_bare else agent_ms).append((time.perf_counter() - began) * 1e3)
    return bare_ms, agent_ms


def _executorch(model: loaded_models.DeviceModel, token: int, position: int) -> Step:
    """Prepare one call of ExecuTorch's method."""
    loaded = cast(loaded_models.ExecuTorchModel, model)
    loaded.position = position + 1  # the agent's next step continues here
    return partial(loaded.method.call, [loaded.torch.tensor([[token]]), loaded.torch.tensor([position])])


def _onnxruntime(model: loaded_models.DeviceModel, token: int, position: int) -> Step:
    """Prepare one call of onnxruntime, which includes passing the KV cache from call to call."""
    loaded = cast(loaded_models.OnnxModel, model)
    loaded.position = position + 1
    cache, outputs, feed = loaded.cache, loaded.outputs, loaded.feed([token], position)
    past = [name.replace("present", "past_key_values") for name in outputs]

    def step() -> None:
        values = loaded.session.run_with_ort_values(outputs, feed | cache)
        cache.update((name, value) for name, value in zip(past, values, strict=True) if name in cache)

    return step


def _genai(model: loaded_models.DeviceModel, token: int, position: int) -> Step:
    """Prepare one call of onnxruntime-genai, which keeps token and position itself."""
    step: Step = cast(loaded_models.GenaiModel, model).generator.generate_next_token
    return step


CALLS = {"executorch": _executorch, "onnxruntime": _onnxruntime, "onnxruntime-genai": _genai}


def describe(runtime: str, times: Sequence[tuple[float, float]]) -> str:
    """Return a line about the rounds of one runtime; times: milliseconds per token, bare and by the agent."""
    bare_ms, agent_ms = (median(each) for each in zip(*times, strict=True))
    ratios = sorted(agent / bare for bare, agent in times)
    return (
        f"{runtime}: a token takes {bare_ms:.3f} ms bare, {agent_ms:.3f} ms by the agent; ratio {median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}), {len(times)} rounds, load average {psutil.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
