"""Options that an artifact was exported with: those of its manifest, which its own files have to confirm.

Whoever edits a manifest can list the files again, so that every hash fits. A context that the artifact does not hold
would then be measured as an error of the runtime, and another KV cache as one of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qat_edge import readers
from qat_edge.errors import ArtifactError, RunError
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.options import MOST_TOKENS
from qat_edge_exporters.artifact import HeldOption
from qat_edge_exporters.targets import KV_CACHE_INT8, NEUTRAL, target_named


class ArtifactOptions(NamedTuple):
    """Options that decide what an artifact computes.

    Attributes:
        context_length: Tokens of prompt and answer together that it holds; of a text for an encoder.
        int8_cache: Keys and values are kept in int8.
    """

    context_length: int
    int8_cache: bool


_checked: dict[tuple[Any, ...], ArtifactOptions] = {}  # of this process: a graph of gigabytes is parsed once


def options_of_artifact(folder: Path) -> ArtifactOptions:
    """Return the options of an artifact, which is named after its target.

    Raises:
        RunError: The manifest has none, or a context that no artifact has.
        ArtifactError: They are not those of the artifact's own files, or these cannot be read.
    """
    recorded = read_manifest(folder).get("options")
    length = recorded.get("context_length") if isinstance(recorded, dict) else None
    if not isinstance(recorded, dict) or type(length) is not int or not 1 <= length <= MOST_TOKENS:
        raise RunError(
            f"{folder / MANIFEST}: damaged, its options have context_length {readers.show(length)}. Export again."
        )
    stamp = _stamp(folder)
    if stamp not in _checked:
        faults = option_faults(recorded, target_named(folder.name).held_options(folder))
        if faults:
            raise ArtifactError(f"{folder / MANIFEST}: {faults[0]}")
        _checked[stamp] = ArtifactOptions(length, recorded.get("kv_cache") == KV_CACHE_INT8)
    return _checked[stamp]


def context_of_artifact(folder: Path) -> int:
    """Return the tokens of prompt and answer together that an artifact holds; see `options_of_artifact`."""
    return options_of_artifact(folder).context_length


def option_faults(recorded: Mapping[str, Any], held: Iterable[HeldOption]) -> list[str]:
    """Return a sentence for each option that a manifest records otherwise than the artifact's files have it.

    Args:
        recorded: Entry "options" of the manifest.
        held: Options of the files.
    """
    faults = []
    for option in held:
        # A version without the option wrote its neutral value.
        value = recorded.get(option.name, NEUTRAL.get(option.name))
        is_larger = option.is_least and type(value) is int and type(option.value) is int and value > option.value
        if (type(value), value) != (type(option.value), option.value) and not is_larger:
            found = readers.show(option.value)
            faults.append(
                f"'options.{option.name}' is {readers.show(value)}, but {option.where} is {found}. Export again, or "
                "restore the files."
            )
    return faults


def recorded_faults(folder: Path, target: str) -> list[str]:
    """Return how the manifest of a folder contradicts its files, a sentence each; a folder of another tool has none."""
    try:
        recorded = read_manifest(folder).get("options")
        if not isinstance(recorded, dict):
            return []
        return [f"{MANIFEST}: {fault}" for fault in option_faults(recorded, target_named(target).held_options(folder))]
    except RunError:
        return []  # the folder may be an app's, with a file of that name
    except ArtifactError as error:
        return [str(error)]


def _stamp(folder: Path) -> tuple[Any, ...]:
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return folder, sha256(folder / MANIFEST), *((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in files)
