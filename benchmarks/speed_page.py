"""Write docs/speed.md and its plot from the JSON file of a speed benchmark."""

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
from qat_edge.report.formatting import megabytes, number, percent
from qat_edge.storage import write_text

PHASES = {"prefill": "prompt", "decode": "decoding"}
OURS, THEIRS = (PTE, PTE_INT4), (ONNX, LLAMA_CPP, GENAI)
PLOT = chart.Dots(
    "speed",
    "Tokens per second of each engine",
    "Higher is better; one mark per round.",
    "tokens per second, higher is better",
    {"2": ("square", "2 threads"), "1": ("circle", "1 thread")},
)


@dataclass(frozen=True)
class Timings:
    """Content of speed.json.

    Attributes:
        engines: name -> EngineInfo of a measured engine, as plain values.
        reasons: name -> why an engine was not measured.
        rounds: records of the rounds, as the store keeps them.
    """

    engines: Mapping[str, Mapping[str, Any]]
    reasons: Mapping[str, str]
    rounds: Sequence[Mapping[str, Any]]

    @property
    def names(self) -> list[str]:
        """Engines that were measured or could not be, in the order of the tables."""
        return [name for name in NAMES if name in self.engines or name in self.reasons]

    @property
    def figures(self) -> list[Mapping[str, Any]]:
        """Figures of each round."""
        return [record["figures"] for record in self.rounds]

    def rates(self, engine: str, threads: int, phase: str) -> list[float]:
        """Return tokens per second, one value per round; empty where the engine was not measured."""
        rows = [row for figures in self.figures for row in figures["rows"]]
        return [float(row[phase]) for row in rows if (row["engine"], row["threads"]) == (engine, threads)]

    def ratios(self, ours: str, theirs: str, threads: int, phase: str) -> list[float]:
        """Return the speed of one engine relative to another, round by round."""
        both = self.rates(ours, threads, phase), self.rates(theirs, threads, phase)
        return [a / b for a, b in zip(*both, strict=True)] if all(both) else []

    def bandwidth(self, threads: int) -> float:
        """Return bytes per second that this machine reads: the fastest round with as many threads or fewer."""
        rates = [figures["bytes_per_s"] for figures in self.figures]
        return max(float(rate) for each in rates for count, rate in each.items() if int(count) <= threads)

    def bandwidth_share(self, engine: str, threads: int) -> float | None:
        """Return the rate at which decoding reads its matrices, as a share of the memory bandwidth."""
        rates = self.rates(engine, threads, "decode")
        if not rates:
            return None
        return median(rates) * self.engines[engine]["token_bytes"] / self.bandwidth(threads)


def write(result: Path, out: Path) -> Path:
    """Write the report of one speed.json, and its plot next to it.

    Raises:
        RunError: the file is missing, or is not a result of this benchmark.
    """
    try:
        timings = Timings(**json.loads(result.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"{result}: not a result of the speed benchmark ({error}). Run it without --page-only."
        ) from error
    picture = chart.dots(PLOT, {title: _points(timings, phase) for phase, title in PHASES.items()})
    if picture:
        write_text(out.with_suffix(".svg"), picture)
    write_text(out, render(timings, out.with_suffix(".svg").name if picture else None))
    return out


def render(timings: Timings, plot: str | None = None) -> str:
    """Return the report as Markdown.

    Args:
        timings: finished rounds.
        plot: file name of the picture, None for none.
    """
    picture = [] if plot is None else [f"![Tokens per second of each engine, one mark per round]({plot})"]
    if not timings.rounds:
        return "# Speed of the exported files\n\nNothing has been measured yet.\n"
    blocks = [
        "# Speed of the exported files", _introduction(timings), _provenance(timings),
        "## The engines", _engines(timings), _missing(timings),
        "## Tokens per second", *picture, _speeds(timings), _bandwidth_text(timings),
        "## The `.pte` compared with the other engines", _ratios(timings),
        "## Operators in the `.pte`", _graph(timings),
    ]  # fmt: skip
    return "\n\n".join(block for block in blocks if block) + "\n"


def _introduction(timings: Timings) -> str:
    amounts = timings.rounds[0]["cell"]["settings"]["amounts"]
    nearest = (
        " The `.pte` with int4 tables is an exception: it is the FP32 fine-tune, rounded to nearest."
        if PTE_INT4 in timings.engines
        else ""
    )
    return (
        "`python -m benchmarks.speed` writes this page from the JSON files of its rounds; no figure is typed by hand. "
        f"Every engine processes a prompt of {amounts['prefill']} tokens with an empty cache and then decodes "
        f"{amounts['decode']} more tokens, {amounts['repeats']} times after a warm-up, pinned to as many CPUs as "
        "it has threads. A round times all engines one after the other, each in a process of its own, and starts with "
        "another engine than the round before. Each figure is the median over the rounds of the round's own median, "
        "with minimum and maximum in parentheses. Ratios are computed within each round; above 1, the `.pte` is "
        "faster. All engines run the same fine-tuned model. Our files hold the quantized model; the tools of the other "
        f"engines quantize its FP32 fine-tune.{nearest} *Tables* are embedding and head. llama-bench does not choose "
        "tokens; decoding by the other engines includes that step."
    )


def _provenance(timings: Timings) -> str:
    busy = [float(figures["others_busy_cores"]) for figures in timings.figures]
    rows = [("rounds", str(len(timings.rounds))), ("cores that other programs kept busy", median_of(busy))]
    return table(("", ""), [*rows, *provenance(timings.rounds)])


def _engines(timings: Timings) -> str:
    head = ("engine", "version", "file, MB", "embedding", "head", "MB read per token")
    rows = []
    for name in timings.names:
        info = timings.engines.get(name)
        if info is None:
            rows.append((name, *[MISSING] * 5))
            continue
        sizes = megabytes(info["size_bytes"]), megabytes(info["token_bytes"])
        rows.append((name, info["version"], sizes[0], info["embedding"], info["head"], sizes[1]))
    return table(head, rows)


def _missing(timings: Timings) -> str:
    return "\n".join(f"- {name}: {MISSING}. {reason}" for name, reason in timings.reasons.items())


def _speeds(timings: Timings) -> str:
    head = ("engine", *_columns(), *[f"share of bandwidth, {_threads(n)}" for n in THREADS])
    rows = []
    for name in timings.names:
        rates = [median_of(timings.rates(name, threads, phase)) for phase in PHASES for threads in THREADS]
        rows.append((name, *rates, *[_share(timings, name, threads) for threads in THREADS]))
    return table(head, rows)


def _ratios(timings: Timings) -> str:
    """Ratios of each pair of engines; pairs with the same bits of embedding and head come first."""
    rows: dict[bool, list[Sequence[str]]] = {True: [], False: []}
    for ours, theirs in product(OURS, THEIRS):
        both = [timings.engines[name] for name in (ours, theirs) if name in timings.engines]
        if len(both) < 2:
            continue
        bits, sizes = [_table_bits(each) for each in both], [megabytes(each["size_bytes"]) for each in both]
        ratios = [timings.ratios(ours, theirs, threads, phase) for phase in PHASES for threads in THREADS]

        row = (ours, theirs, " : ".join(bits), " : ".join(sizes), *[median_of(each, _times) for each in ratios])
        rows[bits[0] == bits[1]].append(row)
    head = ("file", "compared with", "bits of tables", "file, MB", *_columns())
    text = "Speed of the `.pte` divided by that of the other engine. Pairs whose tables have the same bits come first."
    return f"{text}\n\n{table(head, [*rows[True], *rows[False]])}"


def _table_bits(info: Mapping[str, Any]) -> str:
    """Bits of embedding and head: `8` for int8 or Q8_0, `4, 8` where they differ."""
    found = [re.search(r"\d+", info[part]) for part in ("embedding", "head")]
    return ", ".join(dict.fromkeys(each[0] for each in found if each))


def _columns() -> list[str]:
    return [f"{title}, {_threads(n)}" for title in PHASES.values() for n in THREADS]


def _times(ratio: float) -> str:
    return f"{ratio:.2f}"


def _share(timings: Timings, engine: str, threads: int) -> str:
    share = timings.bandwidth_share(engine, threads)
    return MISSING if share is None else percent(share)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _bandwidth_text(timings: Timings) -> str:
    rates = " and ".join(f"{number(timings.bandwidth(n) / 1e9)} GB/s with {_threads(n)}" for n in THREADS)
    return (
        "*Share of bandwidth* is bytes of the matrices that each token reads, times tokens per second, divided by the "
        f"memory bandwidth of this machine: {rates}, the fastest pass over a buffer of {BUFFER_BYTES >> 20} MiB in any "
        "round. The bytes exclude the KV cache, the norms and the rotation in front of a head that shares its table "
        "with the embedding. A CPU cache larger than the weights is read faster than memory."
    )


def _graph(timings: Timings) -> str:
    graphs = {name: timings.engines[name]["graph"] for name in OURS if name in timings.engines}
    calls = dict.fromkeys(call for graph in graphs.values() for call in graph)
    rows = [(call, *[str(graph.get(call, 0)) for graph in graphs.values()]) for call in calls]
    text = "Calls per token: delegates are calls of XNNPACK, the other rows are operators outside of it."
    return f"{text}\n\n{table(('call', *graphs), rows)}"


def _points(timings: Timings, phase: str) -> dict[str, chart.Points]:
    return {
        name.replace("`", "").removeprefix("onnxruntime-"): [
            (str(threads), rate) for threads in THREADS for rate in timings.rates(name, threads, phase)
        ]
        for name in timings.names
    }
