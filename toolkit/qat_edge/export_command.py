"""Commands that write an artifact, for messages: `export` without its flags would write other artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import RunError
from qat_edge.options import DEFAULT_CONTEXT
from qat_edge.quant.ptq.method_names import RENAMED_METHODS
from qat_edge_exporters.targets import NEUTRAL, TARGETS, Target

# Names inside a run folder, which `run` makes paths of.
EXPORTS, PTQ, COMPARE, CONFIG, SCHEMA = "exports", "ptq", "compare", "config.yaml", "schema.json"


def export_targets(run: Path, targets: Iterable[str]) -> str:
    """Return the command that exports targets of a run that it does not have yet.

    Args:
        run: folder of the run.
        targets: names of artifacts; those of other backends need commands of their own.
    """
    records = [TARGETS[name] for name in targets if name in TARGETS]
    usual = [record for record in records if record.backend is None]
    groups = [usual, *([record] for record in records if record.backend is not None)]
    commands = [f"qat-edge export {run}{''.join(map(_target_flags, group))}" for group in groups if group]
    return "` and `".join(commands or [f"qat-edge export {run}"])


def export_again(folder: Path, context_length: int | None = None, schema: str | None = None) -> str:
    """Return the command that writes an artifact again, with the options of its export.

    Args:
        folder: RUN/exports/TARGET, or RUN/ptq/METHOD/exports/TARGET. It may be damaged or missing: options that its
            manifest does not give are left out.
        context_length: tokens that it is to hold in place of those of its export.
        schema: value of --schema in place of that of its export.
    """
    run = next((parent for parent in list(folder.parents)[1:5] if (parent / CONFIG).is_file()), None)
    if run is not None and folder.relative_to(run).parts[0] == COMPARE:
        return f"qat-edge compare {run} --force"
    flags = [f"qat-edge export {'RUN' if run is None else run}"]
    target = TARGETS.get(folder.name)
    if target is None:
        return f"{flags[0]} --force"

    # The run's own artifact and those of a method are replaced, and no other ones.
    variant = folder.parent.parent
    method = RENAMED_METHODS.get(variant.name, variant.name) if variant.parent.name == PTQ else "none"
    flags += [_target_flags(target).strip(), f"--ptq {method}"]

    options = _recorded_options(folder)
    length = options.get("context_length") if context_length is None else context_length
    flags += [f"--context-length {length}"] if isinstance(length, int) and length != DEFAULT_CONTEXT else []
    for name in target.options:
        value, flag = options.get(name, NEUTRAL[name]), f"--{name.replace('_', '-')}"
        if value != NEUTRAL[name]:
            flags.append(flag if value is True else f"{flag} {value}")
    source = schema or _schema_source(folder, run, options)
    flags += [f"--schema {source}"] if source else []
    return " ".join([*flags, "--force"])


def _target_flags(target: Target) -> str:
    backend = "" if target.backend is None else f" --backend {target.backend.name}"
    return f" --target {target.format}{backend}"


def _recorded_options(folder: Path) -> Mapping[str, Any]:
    """Return the options in the manifest of an artifact; none where it cannot be read."""
    try:
        options = readers.read_object(folder / "manifest.json", RunError).get("options")
    except RunError:
        return {}
    return options if isinstance(options, dict) else {}


def _schema_source(folder: Path, run: Path | None, options: Mapping[str, Any]) -> str:
    """Return the value of --schema that an artifact was exported with; empty for an artifact without a schema."""
    copy, recorded = folder / SCHEMA, options.get("schema")
    if not copy.is_file() and not isinstance(recorded, str):
        return ""
    # The run's own copy stays where it is, unlike the file of a user and the rows.
    own = None if run is None else run / SCHEMA
    if own is not None and own.is_file() and (not copy.is_file() or own.read_bytes() == copy.read_bytes()):
        return str(own)
    return recorded if isinstance(recorded, str) else "FILE"
