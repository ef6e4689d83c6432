"""docs/speed.md and its plot, from the JSON of a speed benchmark alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import chart
from benchmarks.bandwidth import BUFFER_BYTES, THREADS
from benchmarks.engines import GENAI, LLAMA_CPP, NAMES, ONNX, PTE, PTE_INT4
from benchmarks.page import MISSING, median_of, provenance, table
from qat_edge.errors import RunError
from qat_edge.report.figures import megabytes, number, percent
from qat_edge.run import write_text

PHASES = {"prefill": "prompt", "decode": "decoding"}
OURS, THEIRS = (PTE, PTE_INT4), (ONNX, LLAMA_CPP, GENAI)
PLOT = chart.Dots(
    "speed",
    "Tokens per second of each engine",
    "Higher is better; one mark a round.",
    "tokens per second, higher is better",
    {"2": ("square", "2 threads"), "1": ("circle", "1 thread")},
)


@dataclass(frozen=True)
class Timings:
    """What speed.json holds. engines: facts of those measured; reasons: why the others were not."""

    engines: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, str]
    rounds: Sequence[Mapping[str, Any]]

    @property
    def names(self) -> list[str]:
        """Engines that were measured, or could not be."""
        return [name for name in NAMES if name in self.engines or name in self.reasons]

    @property
    def figures(self) -> list[Mapping[str, Any]]:
        """What each round found."""
        return [document["figures"] for document in self.rounds]

    def rates(self, engine: str, threads: int, phase: str) -> list[float]:
        """Tokens per second, a value a round; empty where it was not measured."""
        rows = [row for figures in self.figures for row in figures["rows"]]
        return [float(row[phase]) for row in rows if (row["engine"], row["threads"]) == (engine, threads)]

    def ratios(self, ours: str, theirs: str, threads: int, phase: str) -> list[float]:
        """How many times as fast one engine is as another, round by round."""
        both = self.rates(ours, threads, phase), self.rates(theirs, threads, phase)
        return [a / b for a, b in zip(*both, strict=True)] if all(both) else []

    def limit(self, threads: int) -> float:
        """Bytes per second that this machine reads: the fastest of the rounds with as many threads or fewer."""
        rates = [figures["bytes_per_s"] for figures in self.figures]
        return max(float(rate) for each in rates for count, rate in each.items() if int(count) <= threads)

    def share(self, engine: str, threads: int) -> float | None:
        """Part of that limit at which decoding reads its matrices."""
        rates = self.rates(engine, threads, "decode")
        if not rates:
            return None
        return median(rates) * self.engines[engine]["token_bytes"] / self.limit(threads)


def write(result: Path, out: Path) -> Path:
    """Write the report of one speed.json, and its plot beside it.

    Raises:
        RunError: there is no such file, or it is no result of this benchmark.
    """
    try:
        timings = Timings(**json.loads(result.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{result}: no result of the speed benchmark ({error}). Run it without --document.") from error
    picture = chart.dots(PLOT, {words: _points(timings, phase) for phase, words in PHASES.items()})
    if picture:
        write_text(out.with_suffix(".svg"), picture)
    write_text(out, render(timings, out.with_suffix(".svg").name if picture else None))
    return out


def render(timings: Timings, plot: str | None = None) -> str:
    """The report as Markdown. plot: file name of the picture, None for none."""
    picture = [] if plot is None else [f"![Tokens per second of each engine, one mark a round]({plot})"]
    if not timings.rounds:
        return "# Speed of the exported files\n\nNothing has been measured yet.\n"
    blocks = [
        "# Speed of the exported files", _introduction(timings), _ran(timings),
        "## The engines", _engines(timings), _missing(timings),
        "## Tokens per second", *picture, _speeds(timings), _limit_words(timings),
        "## Ours beside theirs", _ratios(timings),
        "## The `.pte`'s graph", _graph(timings),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def _introduction(timings: Timings) -> str:
    amounts = timings.rounds[0]["cell"]["settings"]["amounts"]
    nearest = ", or to nearest where a `.pte` has int4 tables" if PTE_INT4 in timings.engines else ""
    return (
        "Written by `python -m benchmarks.speed` from the JSON of its rounds; no figure here was typed by hand. Every "
        f"engine takes a prompt of {amounts['prefill']} tokens from an empty cache and then decodes "
        f"{amounts['decode']} behind it, {amounts['repeats']} times after a warm-up, pinned to as many CPUs as it has "
        "threads. A round times all engines one after the other, each in a process of its own, and begins with "
        "another one than the round before. A figure is the median over the rounds of each round's median, with the "
        "least and the greatest; a ratio is taken within each round, and above 1 ours is faster. All engines run the "
        "same fine-tuned model: ours the quantized one, the others its FP32 fine-tune, rounded by their own tools"
        f"{nearest}. *Tables* are embedding and head. llama-bench chooses no tokens; the others' decoding includes "
        "that."
    )


def _ran(timings: Timings) -> str:
    busy = [float(figures["others_busy_cores"]) for figures in timings.figures]
    rows = [("rounds", str(len(timings.rounds))), ("cores that other programs kept busy", median_of(busy))]
    return table(("", ""), [*rows, *provenance(timings.rounds)])


def _engines(timings: Timings) -> str:
    head = ("engine", "version", "file, MB", "embedding", "head", "MB read a token")
    rows = []
    for name in timings.names:
        facts = timings.engines.get(name)
        if facts is None:
            rows.append((name, *[MISSING] * 5))
            continue
        sizes = megabytes(facts["size_bytes"]), megabytes(facts["token_bytes"])
        rows.append((name, facts["version"], sizes[0], facts["embedding"], facts["head"], sizes[1]))
    return table(head, rows)


def _missing(timings: Timings) -> str:
    return "\n".join(f"- {name}: {MISSING}. {reason}" for name, reason in timings.reasons.items())


def _speeds(timings: Timings) -> str:
    head = ("engine", *_columns(), *[f"of the limit, {_threads(n)}" for n in THREADS])
    rows = []
    for name in timings.names:
        rates = [median_of(timings.rates(name, threads, phase)) for phase in PHASES for threads in THREADS]
        rows.append((name, *rates, *[_share(timings, name, threads) for threads in THREADS]))
    return table(head, rows)


def _ratios(timings: Timings) -> str:
    """Pairs whose embedding and head have as many bits come first."""
    rows: dict[bool, list[Sequence[str]]] = {True: [], False: []}
    for ours, theirs in product(OURS, THEIRS):
        both = [timings.engines[name] for name in (ours, theirs) if name in timings.engines]
        if len(both) < 2:
            continue
        bits, sizes = [_table_bits(each) for each in both], [megabytes(each["size_bytes"]) for each in both]
        ratios = [timings.ratios(ours, theirs, threads, phase) for phase in PHASES for threads in THREADS]
        row = (ours, theirs, " : ".join(bits), " : ".join(sizes), *[median_of(each, _times) for each in ratios])
        rows[bits[0] == bits[1]].append(row)
    head = ("ours", "theirs", "bits of tables", "file, MB", *_columns())
    words = "Ours to theirs. Pairs whose tables have as many bits come first."
    return f"{words}\n\n{table(head, [*rows[True], *rows[False]])}"


def _table_bits(facts: Mapping[str, Any]) -> str:
    """`8` of int8 or Q8_0, `4, 8` where embedding and head differ."""
    found = [re.search(r"\d+", facts[part]) for part in ("embedding", "head")]
    return ", ".join(dict.fromkeys(each[0] for each in found if each))


def _columns() -> list[str]:
    return [f"{words}, {_threads(n)}" for words in PHASES.values() for n in THREADS]


def _times(ratio: float) -> str:
    return f"{ratio:.2f}"


def _share(timings: Timings, engine: str, threads: int) -> str:
    share = timings.share(engine, threads)
    return MISSING if share is None else percent(share)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _limit_words(timings: Timings) -> str:
    limits = " and ".join(f"{number(timings.limit(n) / 1e9)} GB/s with {_threads(n)}" for n in THREADS)
    return (
        f"*Of the limit*: bytes of the matrices that a token reads, times tokens per second, over what this machine "
        f"reads: {limits}, the fastest pass over a buffer of {BUFFER_BYTES >> 20} MiB in any round. The KV cache, the "
        "norms and what turns a shared table's input are left out of the bytes. What a cache larger than the weights "
        "holds is read faster than memory."
    )


def _graph(timings: Timings) -> str:
    graphs = {name: timings.engines[name]["graph"] for name in OURS if name in timings.engines}
    calls = dict.fromkeys(call for graph in graphs.values() for call in graph)
    rows = [(call, *[str(graph.get(call, 0)) for graph in graphs.values()]) for call in calls]
    words = "Calls a token: delegates are XNNPACK's, the rest are operators outside of them."
    return f"{words}\n\n{table(('what', *graphs), rows)}"


def _points(timings: Timings, phase: str) -> dict[str, chart.Points]:
    return {
        name.replace("`", "").removeprefix("onnxruntime-"): [
            (str(threads), rate) for threads in THREADS for rate in timings.rates(name, threads, phase)
        ]
        for name in timings.names
    }
