"""Frozen checkpoint -> artifacts. The exporters pack codes; none of them rounds a weight."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qat_edge import config, progress
from qat_edge.config import ExportOptions
from qat_edge.errors import RunError, UsageError
from qat_edge.lazy import resolve
from qat_edge.models import tasks
from qat_edge.run import MANIFEST, Run, Variant, read_manifest, replace_folder, sha256, write_manifest
from qat_edge.verbs.quantize import QAT, place, quantize_if_missing
from qat_edge_exporters import EXPORTERS
from qat_edge_exporters.executorch.backends.registry import BACKENDS, XNNPACK, require_package

PORTABLE = "executorch"  # the target that has programs without custom operators, and a cache in int8
FLOAT = "float32"  # a KV cache that every target has


def artifact_name(target: str, options: ExportOptions) -> str:
    """Of the folder below exports/: the target's, or that of a .pte's other backend."""
    other = target == PORTABLE and options.backend != XNNPACK
    return BACKENDS[options.backend].folder if other else target


@dataclass(frozen=True)
class Exported:
    """One artifact folder that was written."""

    target: str
    folder: Path
    size_bytes: int
    wall_s: float


def export(run: Run, options: ExportOptions, force: bool = False) -> list[Exported]:
    """Write every target of the run, and of the FP32 fine-tune quantized by each method of `options.ptq`.

    An artifact that is there already, of the same checkpoint and context length, is kept unless `force` is set, so
    that methods can be added to a run.

    Raises:
        UsageError: an unknown target; methods together with none; --portable or --backend without its target; a KV
            cache in int8 for what has none.
        RunError: all artifacts exist, or one of another checkpoint or length does, and `force` is not set.
        ExportError: a target cannot express the model, or a backend's compiler is not installed.
    """
    exporters = {target: resolve(EXPORTERS, target, "--target") for target in options.target}
    if options.portable and PORTABLE not in exporters:
        raise UsageError(f"--portable is for --target {PORTABLE}, which is not asked for. Give both, or neither.")
    _check_cache(options)
    _check_backend(options)
    _check_kind(run, options)
    methods = [QAT, *_methods(options)]
    folders = {place(run, m)[0].exports / artifact_name(t, options): (m, t) for m in methods for t in exporters}
    pending = list(folders) if force else _pending(list(folders), options)
    variants = {m: quantize_if_missing(run, m, force) for m in methods}
    written = []
    for folder, (method, target) in folders.items():
        if folder in pending:
            written.append(export_one(variants[method], target, exporters[target], options))
        else:
            progress.info(f"Kept {folder}: exported before from the same checkpoint")
    config.save(run.config, "export", options)
    return written


def _pending(folders: list[Path], options: ExportOptions) -> list[Path]:
    """Those still to be written. Fails before the first minute of work, not after the last.

    Raises:
        RunError: nothing is left to do, or an artifact is of another checkpoint or context length.
    """
    missing = [folder for folder in folders if not folder.exists()]
    for folder in folders:
        if folder.exists() and not (missing and _is_current(folder, options)):
            raise RunError(f"{folder} exists already. Give --force to replace it.")
    return missing


def _is_current(folder: Path, options: ExportOptions) -> bool:
    """Whether an artifact is what exporting it again would make."""
    checkpoint = folder.parent.parent / "quantized" / MANIFEST
    if not (folder / MANIFEST).is_file() or not checkpoint.is_file():
        return False
    manifest = read_manifest(folder)
    made = manifest["options"]
    same = made["context_length"] == options.context_length
    if folder.name == PORTABLE:
        same = same and made.get("portable", False) == options.portable
        same = same and made.get("kv_cache", FLOAT) == options.kv_cache
    return same and manifest["quantized_sha256"] == sha256(checkpoint)


def _check_cache(options: ExportOptions) -> None:
    """Refuse a KV cache in int8 where a target or an operator set has none.

    onnxruntime 1.31 rounds a cache on the CPU by scales that were calibrated beforehand, none for each token.
    """
    flag = f"--kv-cache {options.kv_cache}"
    others = [target for target in options.target if target != PORTABLE]
    if options.kv_cache != FLOAT and others:
        raise UsageError(f"{flag} is for --target {PORTABLE} alone; {others[0]} keeps keys and values in float32.")
    if options.kv_cache != FLOAT and options.portable:
        raise UsageError(f"{flag} and --portable: no operator of ATen's reads such a cache. Give one of the two.")


def _check_backend(options: ExportOptions) -> None:
    """Refuse a backend without its target, with an option that is XNNPACK's, or whose compiler is not there."""
    if options.backend == XNNPACK:
        return
    flag = f"--backend {options.backend}"
    if PORTABLE not in options.target:
        raise UsageError(f"{flag} is for --target {PORTABLE}, which is not asked for. Give both, or neither.")
    if options.portable or options.kv_cache != FLOAT:
        other = "--portable" if options.portable else f"--kv-cache {options.kv_cache}"
        raise UsageError(f"{other} is for --backend {XNNPACK}; {flag} has operators and a cache of its own.")
    require_package(BACKENDS[options.backend])


def _check_kind(run: Run, options: ExportOptions) -> None:
    """Refuse for an encoder what is for models that generate text, before anything is merged.

    Raises:
        UsageError: names the option.
    """
    flags = [f"--target {target}" for target in options.target if target != PORTABLE]
    flags += [f"--kv-cache {options.kv_cache}"] if options.kv_cache != FLOAT else []
    flags += [f"--backend {options.backend}"] if options.backend != XNNPACK else []
    for flag in flags:
        tasks.require_generating(run, flag)


def _methods(options: ExportOptions) -> list[str]:
    """Methods to export beside the run itself, each once."""
    if "none" in options.ptq and len(set(options.ptq)) > 1:
        raise UsageError(f"--ptq none cannot be combined with --ptq {next(m for m in options.ptq if m != 'none')}.")
    return [method for method in dict.fromkeys(options.ptq) if method != "none"]


def export_one(
    variant: Variant,
    target: str,
    exporter: Callable[..., None],
    options: ExportOptions,
) -> Exported:
    """Write one artifact of one variant into its exports, replacing what is there."""
    folder = variant.exports / artifact_name(target, options)
    backend = BACKENDS.get(options.backend) if target == PORTABLE else None
    began = time.monotonic()
    progress.info(f"Exporting {folder}")
    with replace_folder(folder, force=True) as work:
        if options.portable and target == PORTABLE:
            exporter = partial(exporter, portable=True)
        if options.kv_cache != FLOAT and target == PORTABLE:
            exporter = partial(exporter, kv_cache=options.kv_cache)
        if backend is not None:
            exporter = partial(exporter, backend=backend.name)
        exporter(variant.quantized, work, options.context_length)
        wall_s = time.monotonic() - began
        write_manifest(
            work,
            "export",
            target=target,
            options=config.plain(options),
            differences=list(backend.differences) if backend else [],
            quantized_sha256=sha256(variant.quantized / MANIFEST),
            wall_s=wall_s,
        )
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    for difference in backend.differences if backend else ():
        progress.info(f"{folder.name} is not exactly what was trained: {difference}")
    progress.info(f"Wrote {folder}: {size / 1e6:.1f} MB in {wall_s:.0f} s")
    return Exported(target, folder, size, wall_s)
