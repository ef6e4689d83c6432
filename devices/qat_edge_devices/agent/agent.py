"""Run one artifact on the machine this folder lies on: `python -m agent.agent REQUEST.json RESULTS_FOLDER`.

The folder is copied to devices by itself, so it imports the standard library, numpy and the runtime. A request names
the backend, the artifact, the threads and one task; RESULTS_FOLDER gets result.json and, for `score`, one
logits-00000.npy a sequence, for `trace` one outputs-00000.npz. stdout carries lines `progress DONE TOTAL`, never
results. Exit codes: 0, or 65 for what the artifact cannot do, 69 for a Python package that is missing (stderr's last
line says which or what).

  score     logits of given token ids, row t predicting token t + 1: float32, (tokens, vocabulary); from `decode_from`
            on, where that is no null, tokens are taken one at a time, as in an answer
  trace     in the same way all that the artifact returns but its cache, each (tokens, features)
  generate  greedy continuation of prompts, until an end token or a length
  speed     prefill and decode of a synthetic prompt, one warm-up, then repeats

Token ids in, token ids out: no tokenizer is involved. "Time to first token" is from the prompt's ids to the id of
the first new token; a decode step is one forward pass and the choice of the greatest logit.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

# The folder travels under a shorter name.
from . import machine  # noqa: TID252
from .loaded_models import PIP_NAMES, Model, Refusal, choose_backend  # noqa: TID252

FORMAT = 1  # of request and result
EXIT_REFUSED = 65
EXIT_MISSING_PACKAGE = 69


def score(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write logits until the next sequence would pass `max_bytes`; at least one, so that callers advance."""
    sequences, written, row_bytes, done = request["sequences"], 0, 0, 0
    for index, ids in enumerate(sequences):
        check_length(model, len(ids), f"sequence {index}")
        if done and written + row_bytes * len(ids) > request["max_bytes"]:
            break
        with (out / f"logits-{index:05d}.npy").open("wb") as file:
            read = model.read(ids, request["decode_from"])
            row_bytes = write_rows(file, len(ids), (piece["logits"] for piece in read))
        written, done = written + row_bytes * len(ids), done + 1
        progress(done, len(sequences))
    return {"scored": done}


def trace(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write all that the artifact returns for each sequence, and tell what is what in the order of a file."""
    import numpy

    found: dict[str, list[Any]] = {}
    for index, ids in enumerate(request["sequences"]):
        check_length(model, len(ids), f"sequence {index}")
        found = {}
        for piece in model.read(ids, request["decode_from"]):
            for name, rows in piece.items():
                found.setdefault(name, []).append(rows)
        numpy.savez(out / f"outputs-{index:05d}.npz", *(numpy.concatenate(rows) for rows in found.values()))
        progress(index + 1, len(request["sequences"]))
    return {"outputs": list(found)}


def write_rows(file: BinaryIO, count: int, pieces: Iterator[Any]) -> int:
    """A .npy file of (count, vocabulary) float32, piece by piece; returns the bytes of one row."""
    from numpy.lib import format as npy

    width = 0
    for piece in pieces:
        if not width:
            width = piece.shape[1]
            shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
            npy.write_array_header_1_0(file, shape)
        file.write(piece.astype("<f4", order="C", copy=False).tobytes())
    return width * 4


def generate(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Greedy ids of each prompt, the end token left out, and why it stopped."""
    answers, most, ends = [], request["max_new_tokens"], set(request["eos_ids"])
    for index, prompt in enumerate(request["prompts"]):
        check_length(model, len(prompt) + 1, f"prompt {index} and a first token", least=2)
        room = most if model.context_length is None else min(most, model.context_length - len(prompt))
        began = time.perf_counter()
        token = model.start(prompt, len(prompt) + room)
        first_ms = (time.perf_counter() - began) * 1e3
        ids: list[int] = []
        while token not in ends:
            ids.append(token)
            if len(ids) == room:
                break
            token = model.next(token)
        stopped = "eos" if token in ends else "length" if room == most else "context"
        answers.append({"ids": ids, "stopped": stopped, "ttft_ms": first_ms})
        progress(index + 1, len(request["prompts"]))
    return {"answers": answers}


def speed(model: Model, request: dict[str, Any], out: Path) -> dict[str, Any]:
    """Times of one prompt and `decode` steps after its first token, over and over; the first round is dropped."""
    prefill, decode, repeats = request["prefill"], request["decode"], request["repeats"]
    check_length(model, prefill + decode + 1, "the prompt and the decode steps")
    prompt = [1 + i % 7 for i in range(prefill)]  # a dense model takes as long for any ids
    first, steps = [], []  # seconds, of the steps a list a round
    for round_ in range(1 + repeats):
        if round_ == 1:
            before = machine.condition()
            cpu_began, wall_began = time.process_time(), time.perf_counter()
        began = time.perf_counter()
        token = model.start(prompt, prefill + decode + 1)
        marks = [time.perf_counter()]
        for _ in range(decode):
            token = model.next(token)
            marks.append(time.perf_counter())
        first.append(marks[0] - began)
        steps.append([end - start for start, end in pairwise(marks)])
        progress(round_ + 1, 1 + repeats)
    busy = (time.process_time() - cpu_began) / (time.perf_counter() - wall_began)
    return {
        "prefill_tokens_per_s": [prefill / t for t in first[1:]],
        "decode_tokens_per_s": [decode / sum(times) for times in steps[1:]],
        "step_ms": [t * 1e3 for times in steps[1:] for t in times],
        "ttft_ms": [t * 1e3 for t in first[1:]],
        "cores_busy": busy,
        "before": before,
        "after": machine.condition(),
    }


TASKS = {"score": score, "trace": trace, "generate": generate, "speed": speed}


def run(request: dict[str, Any], out: Path) -> None:
    """One request: import the runtime, load the artifact, do the task, write result.json last."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    cpus = machine.pin(request["threads"], request["backend"])
    model = choose_backend(request)
    baseline_is_clean = machine.forget_peak()
    baseline = machine.resident_bytes()
    began = time.perf_counter()
    model.load(Path(request["artifact"]), request, cpus)
    load_ms = (time.perf_counter() - began) * 1e3
    answer = TASKS[request["task"]](model, request, out)
    figures = {
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
    text = json.dumps({"format": FORMAT, "load": figures, **answer})
    (out / "result.json").write_text(text, encoding="utf-8")


def check_length(model: Model, tokens: int, what: str, least: int = 1) -> None:
    """Refuse what is empty and what the cache cannot hold: runtimes differ in how they fail, and some do not."""
    if tokens < least:
        raise Refusal(f"{what}: no token ids were given, so there is nothing to predict from.")
    if model.context_length is not None and tokens > model.context_length:
        raise Refusal(
            f"{what} takes {tokens} tokens and the artifact's context holds {model.context_length}: ask for fewer, "
            "or export with a longer context."
        )


def progress(done: int, total: int) -> None:
    """Tell whoever started this how far it is."""
    print(f"progress {done} {total}", flush=True)


def main(argv: list[str]) -> int:
    """Run the request file argv[1] into the folder argv[2]; the exit code says what kind of failure it was."""
    try:
        run(json.loads(Path(argv[1]).read_text(encoding="utf-8")), Path(argv[2]))
    except Refusal as error:
        print(error, file=sys.stderr)
        return EXIT_REFUSED
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        print(PIP_NAMES.get(module, module), file=sys.stderr)
        return EXIT_MISSING_PACKAGE
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
