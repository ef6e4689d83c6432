"""docs/speed.md and its plot, from the JSON of a speed benchmark alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import chart
from benchmarks.bandwidth import BUFFER_BYTES, THREADS
from benchmarks.engines import NAMES, PTE
from benchmarks.page import MISSING, median_of, provenance, table
from qat_edge.errors import RunError
from qat_edge.report.figures import megabytes, number, percent
from qat_edge.run import write_text

PHASES = {"prefill": "prompt", "decode": "decoding"}
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
    def figures(self) -> list[Mapping[str, Any]]:
        """What each round found."""
        return [document["figures"] for document in self.rounds]

    def rates(self, engine: str, threads: int, phase: str) -> list[float]:
        """Tokens per second, a value a round; empty where it was not measured."""
        rows = [row for figures in self.figures for row in figures["rows"]]
        return [float(row[phase]) for row in rows if (row["engine"], row["threads"]) == (engine, threads)]

    def ratios(self, engine: str, threads: int, phase: str) -> list[float]:
        """How many times as fast the .pte is, round by round."""
        ours, theirs = self.rates(PTE, threads, phase), self.rates(engine, threads, phase)
        return [a / b for a, b in zip(ours, theirs, strict=True)] if ours and theirs else []

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
        "## Tokens per second", *picture, *[_speeds(timings, phase) for phase in PHASES], _limit_words(timings),
        "## The `.pte`'s graph", _graph(timings),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def _introduction(timings: Timings) -> str:
    amounts = timings.rounds[0]["cell"]["settings"]["amounts"]
    return (
        "Written by `python -m benchmarks.speed` from the JSON of its rounds; no figure here was typed by hand. Every "
        f"engine takes a prompt of {amounts['prefill']} tokens from an empty cache and then decodes "
        f"{amounts['decode']} behind it, {amounts['repeats']} times after a warm-up, pinned to as many CPUs as it has "
        "threads. A round times all engines one after the other, each in a process of its own, and begins with "
        "another one than the round before. A figure is the median over the rounds of each round's median, with the "
        "least and the greatest; a ratio is taken within each round, and above 1 the `.pte` is faster. All engines "
        "run the same fine-tuned model: ours the quantized one, the peers its FP32 fine-tune, rounded by their own "
        "tools. llama-bench chooses no tokens; the others' decoding includes that."
    )


def _ran(timings: Timings) -> str:
    busy = [float(figures["others_busy_cores"]) for figures in timings.figures]
    rows = [("rounds", str(len(timings.rounds))), ("cores that other programs kept busy", median_of(busy))]
    return table(("", ""), [*rows, *provenance(timings.rounds)])


def _engines(timings: Timings) -> str:
    head = ("engine", "version", "file, MB", "embedding", "head", "MB read a token")
    rows = []
    for name in NAMES:
        facts = timings.engines.get(name)
        if facts is None:
            rows.append((name, *[MISSING] * 5))
            continue
        sizes = megabytes(facts["size_bytes"]), megabytes(facts["token_bytes"])
        rows.append((name, facts["version"], sizes[0], facts["embedding"], facts["head"], sizes[1]))
    return table(head, rows)


def _missing(timings: Timings) -> str:
    return "\n".join(f"- {name}: {MISSING}. {reason}" for name, reason in timings.reasons.items())


def _speeds(timings: Timings, phase: str) -> str:
    head = ("engine", *[f"{PHASES[phase]}, {_threads(n)}" for n in THREADS])
    head = (*head, *[f"`.pte` against it, {_threads(n)}" for n in THREADS])
    rows = []
    for name in NAMES:
        rates = [median_of(timings.rates(name, threads, phase)) for threads in THREADS]
        ratios = [_ratio(timings, name, threads, phase) for threads in THREADS]
        rows.append((name, *rates, *ratios))
    if phase == "decode":
        head = (*head, *[f"of the limit, {_threads(n)}" for n in THREADS])
        rows = [(*row, *[_share(timings, row[0], threads) for threads in THREADS]) for row in rows]
    return table(head, rows)


def _ratio(timings: Timings, engine: str, threads: int, phase: str) -> str:
    return "" if engine == PTE else median_of(timings.ratios(engine, threads, phase), _times)


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
        f"reads: {limits}, the fastest pass over a buffer of {BUFFER_BYTES >> 20} MiB in any round. The KV cache and "
        "the norms are left out of the bytes. What a cache larger than the weights holds is read faster than memory."
    )


def _graph(timings: Timings) -> str:
    graph = timings.engines.get(PTE, {}).get("graph", {})
    words = "Calls a token: delegates are XNNPACK's, the rest are operators outside of them."
    return f"{words}\n\n{table(('what', 'calls'), [(name, str(calls)) for name, calls in graph.items()])}"


def _points(timings: Timings, phase: str) -> dict[str, chart.Points]:
    return {
        name.strip("`").removeprefix("onnxruntime-"): [
            (str(threads), rate) for threads in THREADS for rate in timings.rates(name, threads, phase)
        ]
        for name in NAMES
    }
