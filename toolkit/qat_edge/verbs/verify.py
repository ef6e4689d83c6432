"""Read every artifact back and compare it with the frozen checkpoint, matrix by matrix, code by code."""

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
from qat_edge.lazy import resolve
from qat_edge.models import tokenizer
from qat_edge.quant import frozen, rotated_norm
from qat_edge.quant.frozen import FrozenWeight
from qat_edge.quant.scheme import Scheme
from qat_edge.run import MANIFEST, Run, read_manifest, sha256, write_text
from qat_edge_exporters import READERS
from qat_edge_exporters.artifact import Artifact, ArtifactWeight


@dataclass(frozen=True)
class Verified:
    """What one artifact was found to hold. faults: one sentence each; none means equal in every code and scale.

    head_equal: None of a model that ends with its blocks.
    """

    folder: Path
    target: str
    linears: int
    linears_equal: int
    embedding_equal: bool
    head_equal: bool | None
    faults: list[str]

    def describe(self) -> str:
        """The line that `qat-edge verify` prints."""
        rest = [f"{name} {'equal' if equal else 'DIFFERS'}" for name, equal in self._tables()]
        return f"{self.folder}: {self.linears_equal} of {self.linears} linear layers equal, {', '.join(rest)}"

    def _tables(self) -> list[tuple[str, bool]]:
        head = [] if self.head_equal is None else [("head", self.head_equal)]
        return [("embedding", self.embedding_equal), *head]


def verify(run: Run, targets: Sequence[str]) -> list[Verified]:
    """Compare the run's artifacts, and those of its post-training quantizations, with their checkpoints.

    RUN/verified.json keeps what was found, for the report.

    Raises:
        RunError: nothing was exported, or a named target was not.
        ArtifactError: an artifact cannot be read at all.
    """
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
    """What the report shows of one artifact; the manifest's hash tells which export it was."""
    facts = dataclasses.asdict(result) | {"folder": str(result.folder.relative_to(run.path))}
    return facts | {"manifest_sha256": sha256(result.folder / MANIFEST)}


def verify_folder(folder: Path, target: str, quantized: Path) -> Verified:
    """Compare the artifact in `folder` with the frozen checkpoint in `quantized`."""
    plan, expected = frozen.read_scheme(quantized), frozen.read_weights(quantized)
    artifact: Artifact = resolve(READERS, target, "--target")(folder)
    differing = {name: _difference(name, expected[name], artifact.weights.get(name)) for name in plan.weights}
    faults = [*artifact.faults, *(text for text in differing.values() if text)]
    faults += _unexpected(plan, artifact) + _turn_faults(quantized, artifact) + _file_faults(folder, quantized)
    return Verified(
        folder=folder,
        target=target,
        linears=len(plan.linears),
        linears_equal=sum(not differing[name] for name in plan.linears),
        embedding_equal=not any(differing[name] for name in plan.embeddings),
        head_equal=not any(differing[name] for name in plan.heads) if plan.heads else None,
        faults=faults,
    )


def require_equal(results: Sequence[Verified]) -> None:
    """Raise what `verify` found as one error.

    Raises:
        ArtifactError: an artifact differs from its checkpoint.
    """
    faults = [f"{result.folder}: {fault}" for result in results for fault in result.faults]
    if faults:
        shown = "\n".join(f"  {fault}" for fault in faults[:20])
        more = f"\n  ... and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ArtifactError(f"{len(faults)} faults found; export again, or restore the files:\n{shown}{more}")


def _difference(name: str, expected: FrozenWeight, found: ArtifactWeight | None) -> str:
    """What is different about one matrix, empty where nothing is."""
    if found is None:
        return f"{name}: not in the artifact"
    codes, scales = expected.codes.numpy(), expected.scales.float().numpy()
    if found.bits != expected.bits or found.codes.shape != codes.shape:
        return (
            f"{name}: int{found.bits} {found.codes.shape} in the artifact, int{expected.bits} {codes.shape} was frozen"
        )
    places = np.argwhere(found.codes != codes)
    if len(places):
        row, column = places[0]
        return (
            f"{name}: {len(places)} of {codes.size} codes differ, first at row {row}, column {column}: "
            f"{found.codes[row, column]} in the artifact, {codes[row, column]} was frozen"
        )
    # A runtime may want finer blocks; then a group's scale stands there several times.
    finer = found.scales.shape[1] // scales.shape[1]
    if found.scales.shape != (scales.shape[0], scales.shape[1] * finer):
        return f"{name}: scales {found.scales.shape} in the artifact, {scales.shape} were frozen"
    places = np.argwhere(found.scales != np.repeat(scales, finer, axis=1))
    if len(places):
        row, column = places[0]
        return f"{name}: {len(places)} scales differ, first at row {row}, group {column}"
    return ""


def _unexpected(plan: Scheme, artifact: Artifact) -> list[str]:
    extra = sorted(set(artifact.weights) - set(plan.weights))
    return [f"{name}: in the artifact, but not in the checkpoint" for name in extra]


def _turn_faults(quantized: Path, artifact: Artifact) -> list[str]:
    """What turns the head's input, bit for bit, where the artifact's float constants were read."""
    if artifact.floats is None:
        return []
    return [
        f"{name}.{rotated_norm.TURN}: not in the artifact as it was frozen"
        for name, turn in rotated_norm.stored_turns(quantized).items()
        if hashlib.sha256(turn.numpy().tobytes()).hexdigest() not in artifact.floats
    ]


def _file_faults(folder: Path, quantized: Path) -> list[str]:
    """Tokenizer of the artifact against the checkpoint's, and every file against the manifest."""
    faults = []
    for name in tokenizer.FILES:
        if not (quantized / name).is_file():
            continue
        if not (folder / name).is_file():
            faults.append(f"{name}: missing; the app would have no tokenizer or template")
        elif sha256(folder / name) != sha256(quantized / name):
            faults.append(f"{name}: not the tokenizer the model was trained with")
    if (folder / MANIFEST).is_file():
        for name, facts in read_manifest(folder)["files"].items():
            if not (folder / name).is_file():
                faults.append(f"{name}: listed in {MANIFEST}, but missing")
            elif sha256(folder / name) != facts["sha256"]:
                faults.append(f"{name}: changed since it was exported (its sha256 is not the one in {MANIFEST})")
    return faults
