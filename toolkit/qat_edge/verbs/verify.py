"""Read every artifact back and compare it with the frozen checkpoint: every code and every scale of every matrix.

The target's reader unpacks the file (`Target.read`); this module compares what it found with `quant.frozen`'s weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qat_edge import progress
from qat_edge.errors import ArtifactError, RunError
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.models import tokenizer
from qat_edge.quant import frozen, rotated_norm
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.scheme import Scheme
from qat_edge.run import Run
from qat_edge.run_lock import writes_run
from qat_edge.storage import write_text
from qat_edge_exporters.artifact import Artifact, ArtifactWeight
from qat_edge_exporters.targets import target_named


@dataclass(frozen=True)
class Verified:
    """Result of comparing one artifact with its checkpoint.

    Attributes:
        folder: the artifact's.
        target: its name.
        linears: number of quantized linear layers in the checkpoint.
        linears_equal: how many of them are equal in every code and scale.
        embedding_equal: whether all embeddings are.
        head_equal: whether the output head is; None for a model without one.
        faults: one sentence for each difference; empty where the artifact equals the checkpoint.
    """

    folder: Path
    target: str
    linears: int
    linears_equal: int
    embedding_equal: bool
    head_equal: bool | None
    faults: list[str]

    def describe(self) -> str:
        """Return the line that `qat-edge verify` prints."""
        rest = [f"{name} {'equal' if equal else 'DIFFERS'}" for name, equal in self._tables()]
        return f"{self.folder}: {self.linears_equal} of {self.linears} linear layers equal, {', '.join(rest)}"

    def _tables(self) -> list[tuple[str, bool]]:
        head = [] if self.head_equal is None else [("head", self.head_equal)]
        return [("embedding", self.embedding_equal), *head]


@writes_run("verify")
def verify(run: Run, targets: Sequence[str]) -> list[Verified]:
    """Compare the run's artifacts, and those of its PTQ variants, with their checkpoints.

    Writes the results to RUN/verified.json, which the report shows.

    Args:
        run: a run with exports.
        targets: names of targets to compare; all that were exported where empty.

    Returns:
        One result for each artifact. `require_equal` raises what they found.

    Raises:
        RunError: nothing was exported, or a named target was not.
        ArtifactError: an artifact cannot be read at all.
    """
    # A target is found if any variant has it.
    found = [(v, t) for v in run.variants() for t in v.targets() if not targets or t in targets]
    missing = set(targets) - {t for _, t in found}
    if missing or not found:
        what = ", ".join(sorted(missing)) or "no artifact"
        raise RunError(f"{run.exports}: {what} not exported yet. `qat-edge export {run.path}` does it.")

    results = []
    for variant, target in found:
        progress.info(f"Reading {variant.exports / target}")
        results.append(verify_folder(variant.exports / target, target, variant.quantized))
    write_text(run.verified, json.dumps([_record(run, result) for result in results], indent=1) + "\n")
    return results


def _record(run: Run, result: Verified) -> dict[str, Any]:
    """Return one artifact's entry in verified.json; the manifest's hash identifies the export."""
    entry = dataclasses.asdict(result) | {"folder": str(result.folder.relative_to(run.path))}
    return entry | {"manifest_sha256": sha256(result.folder / MANIFEST)}


def verify_folder(folder: Path, target: str, quantized: Path) -> Verified:
    """Compare the artifact in `folder` with the frozen checkpoint in `quantized`."""
    scheme, expected = frozen.read_scheme(quantized), frozen.read_weights(quantized)
    artifact = target_named(target).read(folder)

    # Every matrix of the scheme has to be in the artifact, equal in bits, codes and scales.
    differing = {name: _difference(name, expected[name], artifact.weights.get(name)) for name in scheme.weights}

    # Beyond the matrices: what the reader itself found wrong, extra matrices, the head's rotation, other files.
    faults = [*artifact.faults, *(text for text in differing.values() if text)]
    faults += _unexpected(scheme, artifact) + _rotation_faults(quantized, artifact) + _file_faults(folder, quantized)

    return Verified(
        folder=folder,
        target=target,
        linears=len(scheme.linears),
        linears_equal=sum(not differing[name] for name in scheme.linears),
        embedding_equal=not any(differing[name] for name in scheme.embeddings),
        head_equal=not any(differing[name] for name in scheme.heads) if scheme.heads else None,
        faults=faults,
    )


def require_equal(results: Sequence[Verified]) -> None:
    """Raise the faults that `verify` found as one error.

    Raises:
        ArtifactError: an artifact differs from its checkpoint.
    """
    faults = [f"{result.folder}: {fault}" for result in results for fault in result.faults]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:20])
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(f"{len(faults)} faults found; export again, or restore the files:\n{shown}{more}")


def _difference(name: str, expected: FrozenWeight, found: ArtifactWeight | None) -> str:
    """Return how one matrix differs, as a sentence; empty where it is equal."""
    if found is None:
        return f"{name}: not in the artifact"
    codes, scales = expected.codes.numpy(), expected.scales.float().numpy()
    if found.bits != expected.bits or found.codes.shape != codes.shape:
        return (
            f"{name}: int{found.bits} {found.codes.shape} in the artifact, int{expected.bits} {codes.shape} was frozen"
        )
    positions = np.argwhere(found.codes != codes)
    if len(positions):
        row, column = positions[0]
        return (
            f"{name}: {len(positions)} of {codes.size} codes differ, first at row {row}, column {column}: "
            f"{found.codes[row, column]} in the artifact, {codes[row, column]} was frozen"
        )

    # A runtime may use smaller blocks than the groups of training: a group's scale is then repeated.
    finer = found.scales.shape[1] // scales.shape[1]
    if found.scales.shape != (scales.shape[0], scales.shape[1] * finer):
        return f"{name}: scales {found.scales.shape} in the artifact, {scales.shape} were frozen"
    positions = np.argwhere(found.scales != np.repeat(scales, finer, axis=1))
    if len(positions):
        row, column = positions[0]
        return f"{name}: {len(positions)} scales differ, first at row {row}, group {column}"
    return ""


def _unexpected(scheme: Scheme, artifact: Artifact) -> list[str]:
    """Name matrices of the artifact that the checkpoint does not have."""
    extra = sorted(set(artifact.weights) - set(scheme.weights))
    return [f"{name}: in the artifact, but not in the checkpoint" for name in extra]


def _rotation_faults(quantized: Path, artifact: Artifact) -> list[str]:
    """Compare the rotation of the head's input, bit for bit, where the reader read float constants."""
    if artifact.floats is None:
        return []
    return [
        f"{name}.{rotated_norm.ROTATION}: not in the artifact as it was frozen"
        for name, turn in rotated_norm.stored_rotations(quantized).items()
        if hashlib.sha256(turn.numpy().tobytes()).hexdigest() not in artifact.floats
    ]


def _file_faults(folder: Path, quantized: Path) -> list[str]:
    """Compare the artifact's tokenizer with the checkpoint's, and every file with the manifest."""
    faults = []
    for name in tokenizer.tokenizer_files(quantized):
        if not (folder / name).is_file():
            faults.append(f"{name}: missing; the app would have no tokenizer or template")
        elif sha256(folder / name) != sha256(quantized / name):
            faults.append(f"{name}: not the tokenizer the model was trained with")
    if (folder / MANIFEST).is_file():
        for name, entry in read_manifest(folder)["files"].items():
            if not (folder / name).is_file():
                faults.append(f"{name}: listed in {MANIFEST}, but missing")
            elif sha256(folder / name) != entry["sha256"]:
                faults.append(f"{name}: changed since it was exported (its sha256 is not the one in {MANIFEST})")
    return faults
