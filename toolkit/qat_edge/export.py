"""Frozen checkpoint -> artifacts. The exporters pack codes; none of them rounds a weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qat_edge import config
from qat_edge.config import ExportOptions
from qat_edge.errors import RunError
from qat_edge.quantize import quantize
from qat_edge.run import MANIFEST, Run, Variant, replace_folder, sha256, write_manifest
from qat_edge.tables import resolve
from qat_edge_exporters import EXPORTERS


@dataclass(frozen=True)
class Exported:
    """One artifact folder that was written."""

    target: str
    folder: Path
    size_bytes: int
    wall_s: float


def export(run: Run, options: ExportOptions, say: Callable[[str], None], force: bool = False) -> list[Exported]:
    """Write every target of the run, and of its round-to-nearest baseline where `options.baseline` asks.

    Raises:
        UsageError: an unknown target.
        RunError: an artifact exists and `force` is not set.
        ExportError: a target cannot express the model.
    """
    exporters = {target: resolve(EXPORTERS, target, "--target") for target in options.target}
    variants: list[tuple[Variant, Path]] = [(run, run.adapter)]
    if options.baseline:
        variants.append((run.baseline, run.reference))
    for variant, _ in variants:
        for target in exporters:
            _refuse_existing(variant.exports / target, force)
    written = []
    for variant, adapter in variants:
        quantize(variant, adapter, say, force)
        for target, exporter in exporters.items():
            written.append(_export_one(variant, target, exporter, options, say))
    config.save(run.config, "export", options)
    return written


def _refuse_existing(folder: Path, force: bool) -> None:
    """Fail before the first minute of work, not after the last."""
    if folder.exists() and not force:
        raise RunError(f"{folder} exists already. Give --force to replace it.")


def _export_one(
    variant: Variant,
    target: str,
    exporter: Callable[..., None],
    options: ExportOptions,
    say: Callable[[str], None],
) -> Exported:
    folder = variant.exports / target
    began = time.monotonic()
    say(f"Exporting {folder}")
    with replace_folder(folder, force=True) as work:
        exporter(variant.quantized, work, options.context_length, say)
        wall_s = time.monotonic() - began
        write_manifest(
            work,
            "export",
            target=target,
            options=config.plain(options),
            quantized_sha256=sha256(variant.quantized / MANIFEST),
            wall_s=wall_s,
        )
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    say(f"Wrote {folder}: {size / 1e6:.1f} MB in {wall_s:.0f} s")
    return Exported(target, folder, size, wall_s)
