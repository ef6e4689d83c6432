"""Lines and tables of `plan`, each at most 80 columns wide."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.table import Table

from qat_edge.readers import counted
from qat_edge.verbs.prediction import GIGABYTE, MEGABYTE, Plan, PlannedLayer

NONE = "-"
MOST_EXCEPTIONS = 10


def plan_lines(plan: Plan) -> Iterator[str]:
    """Yield lines about parameters, bits, and the parts of the training's memory."""
    parts = plan.parameters
    head = "shared with the embedding" if not parts.head else f"{parts.head / 1e6:.2f} M"
    yield f"Model: {plan.model}, {parts.model / 1e6:.1f} M parameters"
    yield (
        f"  embedding {parts.embedding / 1e6:.2f} M, linear layers {parts.linears / 1e6:.2f} M, head {head}, "
        f"other {parts.other / 1e6:.3f} M"
    )
    yield f"  trained next to them: adapters {parts.adapters / 1e6:.2f} M, scales {parts.scales / 1e6:.2f} M"
    if plan.kept_layers is not None:
        yield f"  after pruning to {counted(len(plan.kept_layers), 'layer')}"

    yield from _bits(plan)

    memory = plan.memory
    yield (
        f"Training memory: {memory.peak_bytes / GIGABYTE:.2f} GB at the peak, on {memory.device} in "
        f"{memory.precision}, {counted(memory.batch_size, 'row')} of {memory.row_tokens} tokens"
    )
    shown = {
        "libraries": memory.libraries, "base weights": memory.base, "trained": memory.trained,
        "optimizer": memory.optimizer, "gradients and activations": memory.step,
    }  # fmt: skip
    yield "  " + ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in shown.items())
    stages = {"phase 1": memory.phase_1, "PTQ initialization": memory.initialization, "QAT": memory.qat}
    yield "  peak of " + ", ".join(f"{k} {v / GIGABYTE:.2f}" for k, v in stages.items() if v is not None)


def plan_tables(plan: Plan) -> Iterator[Table]:
    """Yield the tables of artifacts and of device profiles."""
    table = _table(
        f"Files and decoding, {plan.context_length} tokens of context",
        ("target", "MB", "weights MB", "cache MB", "tokens/s at most"),
    )
    for each in plan.artifacts:
        if each.refused:
            table.add_row(each.title, *[NONE] * 4)
            continue
        speed = NONE if each.most_tokens_per_s is None else f"{each.most_tokens_per_s:.1f}"
        sizes = (each.size_bytes, each.weight_bytes, each.cache_bytes)
        table.add_row(each.title, *(f"{size / MEGABYTE:.1f}" for size in sizes), speed)
    yield table

    if plan.fits:
        fits = _table(
            "Device profiles: room left below each gate",
            ("profile", "target", "MB of file", "MB of memory", "tokens/s", "fits"),
        )
        for fit in plan.fits:
            margin = fit.decode_margin_tokens_per_s
            fits.add_row(
                fit.profile,
                fit.target,
                _margin(fit.size_margin_bytes),
                _margin(fit.memory_margin_bytes),
                NONE if margin is None else f"{margin:+.1f}",
                "yes" if fit.fits else "no",
            )
        fits.caption = "Memory and speed are bounds: a device may need more and be slower."
        yield fits


def _bits(plan: Plan) -> Iterator[str]:
    """Yield the bits of the weights, those that are not as requested, and modules that stay float."""
    counts = Counter(_format(layer) for layer in plan.layers)
    yield "Bits: " + ", ".join(f"{count} {text}" for text, count in sorted(counts.items()))
    exceptions = [layer for layer in plan.layers if layer.reason]
    for layer in exceptions[:MOST_EXCEPTIONS]:
        yield f"  {layer.name}: {layer.reason}"
    if len(exceptions) > MOST_EXCEPTIONS:
        yield f"  and {len(exceptions) - MOST_EXCEPTIONS} more; --json lists all"
    for modules in plan.skipped:
        count = f"{modules.parameters / 1e6:.3f} M, {modules.share:.1%} of the parameters"
        yield f"  stays float32: {modules.module_class} ({count}, such as {modules.example})"


def _format(layer: PlannedLayer) -> str:
    groups = "per channel" if layer.group_size == layer.width else f"group {layer.group_size}"
    return f"int{layer.bits} ({groups})"


def _margin(size_bytes: int | None) -> str:
    return NONE if size_bytes is None else f"{size_bytes / MEGABYTE:+.0f}"


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, pad_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    return table
