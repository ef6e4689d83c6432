"""The page of `qat-edge compare`: what the figures say, one table a runtime, and bars that show it at a glance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qat_edge import __version__
from qat_edge.evaluate.deployments import PTQ, Deployment, DeploymentTable
from qat_edge.evaluate.results import Measured, Speed, Spread
from qat_edge.report.charts import LINE, WIDTH, Scale, canvas, nice_top, rect, text, to_svg, x_axis
from qat_edge.report.figures import TARGETS, megabytes, number, percent, plain, whole_percent
from qat_edge.report.run_details import Facts, flatten
from qat_edge.report.run_page import Plot, environment, style
from qat_edge.report.tables import Cell, Column, Row, Table, best_rows

CSS = {"base": "base", "lora": "lora", "naive": "other", "merged": "tuned", "qat": "qat"}
COLOURS = {"base": "base", "other": "naive", "tuned": "FP32 fine-tune", "ptq": "merged PTQ", "qat": "QAT-LoRA"}
BAR = 38.0  # height of a bar with its name above
FAR = 3.0  # times the others' perplexity: drawn beside the base's, theirs would all look alike
WORDS = (
    ("Base", "The model before fine-tuning, in 32-bit floats."),
    ("LoRA unmerged", "The FP32 base and the adapters of phase 1 as matrices of their own: Wx + sB(Ax)."),
    ("Naive PTQ base + adapters", "The same adapters beside a base rounded to nearest, which they never saw."),
    ("Merged", "The adapters added into the FP32 weights: the fine-tune that everything is compared with."),
    ("Merged PTQ", "The merged weights, quantized after training by each method."),
    ("Fused QAT-LoRA", "Adapters trained with the deployed rounding in the forward pass, merged, frozen and shipped."),
    ("ms per token", "Median time of one generated token after the prompt: 1000 / decode speed."),
    ("Memory", "Peak resident memory above what the runtime took before it loaded the artifact."),
    ("Perplexity", "exp of the mean loss in nats on the evaluation text, through the runtime. Less is better."),
    ("Exact match", "Share of evaluation prompts whose generated answer equals the expected one."),
    ("KL", "Divergence of next-token probabilities from the FP32 fine-tune in torch, mean over tokens, nats."),
    (
        "Gain kept",
        "Of what fine-tuning gained over the base, the share this deployment still has, by log perplexity and by exact "
        "match. Below 0 is worse than the base.",
    ),
)


@dataclass(frozen=True)
class Runtime:
    """What the page shows of one target."""

    name: str
    verdict: str
    table: Table
    plots: list[Plot]


def render(table: DeploymentTable) -> str:
    """The whole page as one text."""
    asked = [row.measured.prompts for row in table.deployments if row.measured and row.measured.prompts]
    length = table.options.get("context_length")
    subtitle = [
        f"{table.tokens:,} tokens compared",
        f"{max(asked)} prompts answered" if asked else "no prompts answered",
        *([f"context of {length:,} tokens"] if length else []),
        f"measured on {table.device}",
        table.created,
    ]
    runtimes = [_runtime(table, target, index) for index, target in enumerate(table.targets)]
    return environment().get_template("comparison.html").render(
        model=table.model,
        subtitle=subtitle,
        style=style(),
        further_training=table.further_training,
        runtimes=runtimes,
        words=WORDS,
        facts=[
            Facts("Machine", flatten(table.machine)),
            Facts("Runtimes", _runtimes(table)),
            Facts("How it was measured", flatten(table.options)),
        ],
        version=__version__,
    )  # fmt: skip


def columns(table: DeploymentTable) -> list[Column[Deployment]]:
    """Every figure of the table, in the order of the page."""
    return [
        Column("Size", "MB", _of(lambda m: m.total_bytes), megabytes, -1),
        Column("Memory", "MB", lambda row: row.memory_bytes, megabytes, -1),
        Column("Time", "ms/token", lambda row: row.ms_per_token, number, -1, _repeats(lambda speed: speed.decode)),
        _timed("Decode", lambda speed: speed.decode),
        Column("Perplexity", "", _of(lambda m: m.perplexity), number, -1),
        Column("Exact match", "%", _of(lambda m: m.exact_match), percent, 1),
        Column("KL", "nats", _of(lambda m: None if m.agreement is None else m.agreement.kl_nats), number, -1),
        Column("Gain kept", "perplexity, %", table.kept_perplexity, _share, 1),
        Column("Gain kept", "exact match, %", table.kept_exact_match, _share, 1),
        _timed("Prefill", lambda speed: speed.prefill),
        Column("Load", "ms", _of(lambda m: m.load_ms), number, -1),
    ]


def css(row: Deployment) -> str:
    """Class that colours the row."""
    return "ptq" if row.name.startswith(PTQ) else CSS.get(row.name, "other")


def verdict(table: DeploymentTable, target: str) -> str:
    """What the figures of one runtime say, in a sentence or two."""
    qat, merged = table.row("qat", target), table.row("merged", target)
    if qat is None or qat.measured is None:
        return "Fused QAT-LoRA was not measured here, so there is nothing to judge."
    words = [_smaller(qat, merged), _kept_words(table, qat)]
    rivals = [r for r in table.deployments if r.target == target and (r.name == "naive" or r.name.startswith(PTQ))]
    known = [(row, kept) for row in rivals if (kept := table.kept_perplexity(row)) is not None]
    if known:
        words.append(f"By perplexity, the others keep: {_told(known)}.")
    return " ".join(word for word in words if word)


def _told(known: Sequence[tuple[Deployment, float]]) -> str:
    """`Naive PTQ base + adapters 87%; merged PTQ by round-to-nearest 98%, by HQQ 98%`."""
    alone, merged = [], []
    for row, kept in known:
        words = _whole(kept) + (" (worse than the base)" if kept < 0 else "")
        if row.name.startswith(PTQ):
            merged.append(f"by {row.title.partition(', ')[2]} {words}")
        else:
            alone.append(f"{row.title} {words}")
    return "; ".join([*alone, *([f"merged PTQ {', '.join(merged)}"] if merged else [])])


def _smaller(qat: Deployment, merged: Deployment | None) -> str:
    if merged is None or merged.measured is None or qat.measured is None:
        return ""
    parts = [f"{megabytes(merged.measured.total_bytes)} to {megabytes(qat.measured.total_bytes)} MB"]
    if merged.ms_per_token and qat.ms_per_token:
        speeds = [number(1e3 / row.ms_per_token) for row in (merged, qat) if row.ms_per_token]
        parts.append(f"{number(merged.ms_per_token)} to {number(qat.ms_per_token)} ms per token")
        parts.append(f"{speeds[0]} to {speeds[1]} tokens per second")
    return f"From merged FP32 to fused QAT-LoRA: {', '.join(parts)}."


def _kept_words(table: DeploymentTable, qat: Deployment) -> str:
    base, tuned = table.base, table.reference
    found = []
    exact, perplexity = table.kept_exact_match(qat), table.kept_perplexity(qat)
    if exact is not None and base and base.exact_match is not None and tuned.exact_match is not None:
        gained = f"exact match {percent(base.exact_match)} to {percent(tuned.exact_match)}"
        found.append(f"{_whole(exact)} of what fine-tuning gained ({gained})")
    if perplexity is not None and base:
        gained = f"perplexity {number(base.perplexity)} to {number(tuned.perplexity)}"
        found.append(f"{_whole(perplexity)} of the gain in log perplexity ({gained})")
    return f"It keeps {' and '.join(found)}." if found else "What fine-tuning gained over the base is not known here."


def _whole(share: float) -> str:
    return whole_percent(share).replace("-", "−")


def _share(share: float) -> str:
    """As per cent; what rounds to nothing has no sign."""
    return percent(share if abs(share) >= 0.0005 else 0.0)


def _repeats(pick: Callable[[Speed], Spread]) -> Callable[[Deployment], Spread | None]:
    return lambda row: None if row.measured is None or row.measured.speed is None else pick(row.measured.speed)


def _timed(name: str, pick: Callable[[Speed], Spread]) -> Column[Deployment]:
    """A speed in tokens per second."""
    repeats = _repeats(pick)

    def median(row: Deployment) -> float | None:
        spread = repeats(row)
        return None if spread is None else spread.median

    return Column(name, "tok/s", median, number, 1, repeats)


def _of(pick: Callable[[Measured], float | None]) -> Callable[[Deployment], float | None]:
    """A figure of what was measured, None where nothing was."""
    return lambda row: None if row.measured is None else pick(row.measured)


def _runtime(table: DeploymentTable, target: str, index: int) -> Runtime:
    rows = [row for row in table.deployments if row.target == target]
    name = TARGETS.get(target, plain(target))
    return Runtime(name, verdict(table, target), _figures(table, rows, name), _plots(table, rows, index))


def _figures(table: DeploymentTable, rows: Sequence[Deployment], name: str) -> Table:
    """Every row, measured or not; the best of those that are not in float is marked."""
    shown = [Row(row.title, css(row), []) for row in rows]
    used = [c for c in columns(table) if any(c.value(row) is not None for row in rows)]
    for column in used:
        best = best_rows([row for row in rows if css(row) in ("other", "ptq", "qat")], column)
        for line, row in zip(shown, rows, strict=True):
            value = column.value(row)
            cell = Cell("–") if value is None else Cell(_written(column, value), value, row in best)
            line.cells.append(cell)
    heads = [(column.name, column.unit) for column in used]
    notes = [f"{row.title}: {row.reason}" for row in rows if row.measured is None]
    return Table(f"Deployments in {name}", heads, shown, first="Deployment", notes=notes)


def _written(column: Column[Deployment], value: float) -> str:
    return column.write(value).removesuffix("%").replace("-", "−")


def _plots(table: DeploymentTable, rows: Sequence[Deployment], index: int) -> list[Plot]:
    drawn = {column.name: column for column in reversed(columns(table))}
    titles = {
        "Perplexity": "Less is better.",
        "Exact match": "Per cent of the prompts; more is better.",
        "Size": "Everything the device needs, MB.",
        "Time": "Milliseconds per generated token, median.",
    }
    plots = []
    for name, caption in titles.items():
        found = [(row, v) for row in rows if (v := drawn[name].value(row)) is not None and math.isfinite(v)]
        if name == "Perplexity" and (base := _far_base(found)):
            found = [(row, value) for row, value in found if row.name != "base"]
            caption += f" The base's, {number(base)}, is left out."
        if any(value > 0 for _, value in found):
            svg = _bars(f"{name.lower().replace(' ', '-')}-{index}", name, found, drawn[name])
            kinds = dict.fromkeys({"lora": "tuned"}.get(css(row), css(row)) for row, _ in found)
            legend = [(f"l-bar c-{kind}", COLOURS[kind]) for kind in kinds]
            plots.append(Plot(name, Markup(svg), caption, legend))
    return plots


def _far_base(found: Sequence[tuple[Deployment, float]]) -> float:
    """The base's perplexity where it is `FAR` times the greatest of the others, else 0."""
    base, rest = ([v for row, v in found if (row.name == "base") is wanted] for wanted in (True, False))
    return base[0] if base and rest and base[0] > FAR * max(rest) else 0.0


def _bars(name: str, title: str, rows: Sequence[tuple[Deployment, float]], column: Column[Deployment]) -> str:
    """A bar a row, its name above it and its figure at its end."""
    scaled = {"MB": 1e6, "%": 0.01}.get(column.unit, 1.0)
    words = "; ".join(f"{row.title}: {column.write(value)}" for row, value in rows)
    bottom = BAR * len(rows) + 4
    root = canvas(name, title, words, bottom + 24)
    x = Scale(0, nice_top(max(value for _, value in rows) / scaled * 1.02), 0, WIDTH - 52)
    for index, (row, value) in enumerate(rows):
        top = BAR * index + LINE
        text(root, 0, top - 4, row.title, "tick")
        rect(root, 0, top, x(value / scaled), BAR - LINE - 8, f"c-{css(row)}", f"{row.title}: {column.write(value)}")
        text(root, x(value / scaled) + 6, top + 12, _written(column, value), "value")
    x_axis(root, x, bottom, "")
    return to_svg(root)


def _runtimes(table: DeploymentTable) -> list[tuple[str, str]]:
    used = {(TARGETS.get(row.target, row.target), row.measured.runtime) for row in table.deployments if row.measured}
    return [*sorted(used), ("reference", table.reference.runtime)]
