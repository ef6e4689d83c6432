"""Find figures of artifacts that are no longer in the run folder: exported or quantized again after validate."""

from __future__ import annotations

from qat_edge.errors import RunError
from qat_edge.evaluate.encoder_results import EncoderReport, EncoderResult
from qat_edge.evaluate.results import Measurement, Report
from qat_edge.manifest import MANIFEST, read_manifest, sha256
from qat_edge.quant.ptq.method_names import is_own
from qat_edge.run import Run, Variant


def outdated_note(run: Run, measured: Report | EncoderReport) -> str:
    """Return which figures of a report describe artifacts that are no longer there, as sentences; empty if none do.

    Results of earlier versions do not record which artifact they measured, so they are not compared.
    """
    ptq = {variant.name: variant for variant in run.variants()[1:]}
    rows: list[Measurement | EncoderResult] = [
        *(measured.measured if isinstance(measured, Report) else measured.results)
    ]
    changes = [
        f"{row.name}, {row.target} ({change})"
        for row in rows
        if row.artifact_sha256
        and (change := _change(run if is_own(row.name) else ptq.get(row.name), row.target, row.artifact_sha256))
    ]
    if not changes:
        return ""
    return (
        f"Outdated: these figures and gates describe artifacts that have changed since: {'; '.join(changes)}. Measure "
        "again: `qat-edge validate RUN --force`."
    )


def _change(variant: Variant | None, target: str, measured_sha256: str) -> str:
    """Return what happened to an artifact after it was measured; empty if it is unchanged.

    Args:
        variant: the quantized model that the artifact was exported from; None if it is gone.
        target: target of the artifact.
        measured_sha256: hash of the manifest of the artifact that was measured.
    """
    manifest = None if variant is None else variant.exports / target / MANIFEST
    if variant is None or manifest is None or not manifest.is_file():
        return "removed"
    if sha256(manifest) != measured_sha256:
        return "exported again"

    # A new checkpoint whose export is still the old one: `export --force` would write another artifact.
    frozen = variant.quantized / MANIFEST
    try:
        exported_from = read_manifest(manifest.parent).get("quantized_sha256")
    except RunError:
        return "damaged"
    is_old = frozen.is_file() and exported_from is not None and exported_from != sha256(frozen)
    return "quantized again, but not exported again" if is_old else ""
