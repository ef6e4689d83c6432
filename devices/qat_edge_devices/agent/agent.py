"""Run one artifact on this machine: `python -m agent.agent REQUEST.json RESULTS_FOLDER`.

This folder is copied to devices without the rest of its package, so it imports only the standard library, numpy and the
runtime (executorch with torch, executorch-numpy-runtime, onnxruntime, onnxruntime-genai or xllamacpp). A request names
the backend, the artifact, its LoRA adapter or null, the threads and one task:

  score     logits of given token ids, row t predicting token t + 1: float32 (tokens, vocabulary); from position
            `decode_from` on, unless it is null, tokens are fed one at a time, as in generation
  trace     all outputs of the artifact except its cache, each (tokens, features), with tokens fed in the same way
  generate  greedy continuation of prompts, up to an end token or a length; with "grammar", the path of a file, only of
            tokens that the grammar in it permits
  speed     prefill and decode of a synthetic prompt: one warm-up, then repeats

RESULTS_FOLDER gets result.json and, per sequence, a file logits-00000.npy for `score` or outputs-00000.npz for
`trace`. stdout carries lines "progress DONE TOTAL" and no results. Exit codes: 0; 65 if the artifact cannot do what was
requested; 69 if a Python package is missing. The last line of stderr is then the reason, or the name of the package.

Inputs and outputs are token ids; there is no tokenizer. "Time to first token" runs from the ids of the prompt to the id
of the first new token. A decode step is one forward pass and the choice of the largest logit.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

# Relative, because the folder is sent under a shorter name.
from . import machine  # noqa: TID252
from .loaded_models import PIP_NAMES, DeviceModel, choose_backend  # noqa: TID252
from .model_errors import RequestRejected  # noqa: TID252

FORMAT = 2  # of request and result
EXIT_REJECTED = 65
EXIT_MISSING_PACKAGE = 69


def score(model: DeviceModel, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write logits until the next sequence would exceed `max_bytes`; at least one, so that the caller advances."""
    sequences = request["sequences"]
    written, row_bytes, done = 0, 0, 0
    for index, ids in enumerate(sequences):
        require_length(model, len(ids), f"sequence {index}")
        # The size of a row is known after the first sequence.
        if done and written + row_bytes * len(ids) > request["max_bytes"]:
            break
        with (out / f"logits-{index:05d}.npy").open("wb") as file:
            chunks = model.read(ids, request["decode_from"])
            row_bytes = write_rows(file, len(ids), (chunk["logits"] for chunk in chunks))
        written += row_bytes * len(ids)
        done += 1
        report_progress(done, len(sequences))
    return {"scored": done}


def trace(model: DeviceModel, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write all outputs of the artifact for each sequence; return their names in the order of the files' arrays."""
    import numpy

    outputs: dict[str, list[Any]] = {}
    for index, ids in enumerate(request["sequences"]):
        require_length(model, len(ids), f"sequence {index}")
        outputs = {}
        for chunk in model.read(ids, request["decode_from"]):
            for name, rows in chunk.items():
                outputs.setdefault(name, []).append(rows)
        arrays = [numpy.concatenate(rows) for rows in outputs.values()]
        numpy.savez(out / f"outputs-{index:05d}.npz", *arrays)
        report_progress(index + 1, len(request["sequences"]))
    return {"outputs": list(outputs)}


def write_rows(file: BinaryIO, count: int, chunks: Iterator[Any]) -> int:
    """Write a .npy file of float32 (count, vocabulary) chunk by chunk.

    Args:
        file: open for writing.
        count: rows of all chunks together.
        chunks: arrays (rows, vocabulary).

    Returns:
        The bytes of one row.
    """
    from numpy.lib import format as npy

    width = 0
    for chunk in chunks:
        # The header comes first and needs the width, which only the first chunk shows.
        if not width:
            width = chunk.shape[1]
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            npy.write_array_header_1_0(file, header)
        file.write(chunk.astype("<f4", order="C", copy=False).tobytes())
    return width * 4


def generate(model: DeviceModel, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Continue each prompt greedily; return the ids without the end token, and why it stopped."""
    completions = []
    longest, end_ids = request["max_new_tokens"], set(request["eos_ids"])
    for index, prompt in enumerate(request["prompts"]):
        require_length(model, len(prompt) + 1, f"prompt {index} and a first token", least=2)
        # A runtime with a KV cache of fixed length cannot go beyond it.
        limit = longest
        if model.context_length is not None:
            limit = min(longest, model.context_length - len(prompt))

        # The first token comes with the prompt; the others one at a time.
        began = time.perf_counter()
        token = model.start(prompt, len(prompt) + limit)
        ttft_ms = (time.perf_counter() - began) * 1e3

        ids: list[int] = []
        while token not in end_ids:
            ids.append(token)
            if len(ids) == limit:
                break
            token = model.next(token)

        # The end token itself is not part of the answer.
        reason_for_limit = "length" if limit == longest else "context"
        stopped = "eos" if token in end_ids else reason_for_limit
        completions.append({"ids": ids, "stopped": stopped, "ttft_ms": ttft_ms})
        report_progress(index + 1, len(request["prompts"]))
    return {"completions": completions}


def speed(model: DeviceModel, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Time one prompt and `decode` steps after its first token, `repeats` times after a warm-up that is dropped."""
    prefill, decode, repeats = request["prefill"], request["decode"], request["repeats"]
    require_length(model, prefill + decode + 1, "the prompt and the decode steps")
    prompt = [1 + i % 7 for i in range(prefill)]  # a dense model takes equally long for any ids

    first_s: list[float] = []  # seconds to the first token, by round
    steps_s: list[list[float]] = []  # seconds of each decode step, by round
    for index in range(1 + repeats):
        # Round 0 is the warm-up: CPU time and the state of the machine are taken after it.
        if index == 1:
            before = machine.machine_state()
            cpu_began, wall_began = time.process_time(), time.perf_counter()

        began = time.perf_counter()
        token = model.start(prompt, prefill + decode + 1)
        times = [time.perf_counter()]
        for _ in range(decode):
            token = model.next(token)
            times.append(time.perf_counter())

        first_s.append(times[0] - began)
        steps_s.append([end - start for start, end in pairwise(times)])
        report_progress(index + 1, 1 + repeats)

    cores_busy = (time.process_time() - cpu_began) / (time.perf_counter() - wall_began)
    return {
        "prefill_tokens_per_s": [prefill / seconds for seconds in first_s[1:]],
        "decode_tokens_per_s": [decode / sum(steps) for steps in steps_s[1:]],
        "step_ms": [seconds * 1e3 for steps in steps_s[1:] for seconds in steps],
        "ttft_ms": [seconds * 1e3 for seconds in first_s[1:]],
        "cores_busy": cores_busy,
        "before": before,
        "after": machine.machine_state(),
    }


TASKS = {"score": score, "trace": trace, "generate": generate, "speed": speed}


def run(request: dict[str, Any], out: Path) -> None:
    """Run one request: import the runtime, load the artifact, run the task, write result.json last."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    # Pin before the import: libraries create their threads then.
    cpus = machine.pin(request["threads"], request["backend"])
    model = choose_backend(request)
    baseline_is_clean = machine.forget_peak()
    baseline = machine.resident_bytes()

    began = time.perf_counter()
    model.load(Path(request["artifact"]), request, cpus)
    load_ms = (time.perf_counter() - began) * 1e3

    result = TASKS[request["task"]](model, request, out)

    load = {
        "runtime": model.runtime,
        "runtime_version": model.version,
        "threads": cpus,
        "pool_threads": model.pool_threads,
        "context_length": model.context_length,
        "load_ms": load_ms,
        "baseline_rss_bytes": baseline,
        "peak_rss_bytes": machine.peak_bytes(),
        "peak_includes_import": not baseline_is_clean,
    }
    text = json.dumps({"format": FORMAT, "load": load, **result})
    (out / "result.json").write_text(text, encoding="utf-8")


def require_length(model: DeviceModel, tokens: int, what: str, least: int = 1) -> None:
    """Reject empty input, and input longer than the cache: runtimes fail there in different ways, or not at all.

    Raises:
        RequestRejected: fewer than `least` tokens, or more than the context length.
    """
    if tokens < least:
        raise RequestRejected(f"{what}: no token ids were given, so there is nothing to predict from.")
    if model.context_length is not None and tokens > model.context_length:
        raise RequestRejected(
            f"{what} takes {tokens} tokens and the artifact's context holds {model.context_length}: request fewer, "
            "or export with a longer context."
        )


def report_progress(done: int, total: int) -> None:
    """Print a line of progress for the process that started this one."""
    print(f"progress {done} {total}", flush=True)


def main(argv: list[str]) -> int:
    """Run the request file argv[1] into the folder argv[2]; return the exit code."""
    # Messages name files, and Windows has an encoding of the country for what a program writes to another.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        run(json.loads(Path(argv[1]).read_text(encoding="utf-8")), Path(argv[2]))
    except RequestRejected as error:
        print(error, file=sys.stderr)
        return EXIT_REJECTED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        print(PIP_NAMES.get(module, module), file=sys.stderr)
        return EXIT_MISSING_PACKAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
