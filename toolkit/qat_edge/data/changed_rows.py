"""Find out whether a file holds the rows that finetune read from it."""

from __future__ import annotations

from qat_edge import progress
from qat_edge.data.formats import RowStream
from qat_edge.manifest import read_manifest
from qat_edge.run import Run

DATA, EVAL_DATA = "data", "eval_data"  # entries of the manifests, named like the options of finetune
ROWS = "rows_sha256"  # what they hold on top of source and tokens


def describe_change(run: Run, entry: str, rows: RowStream, flag: str) -> str:
    """Return a sentence without a stop about rows that are others than in training; empty where they are the same.

    Nothing is known of runs of earlier versions, which recorded the tokens alone.

    Args:
        run: A run with a reference.
        entry: DATA or EVAL_DATA.
        rows: Read to the end, from the place that finetune had for them.
        flag: Flag of the present command that names other rows.
    """
    recorded = (read_manifest(run.reference).get(entry) or {}).get(ROWS)
    if recorded in (None, rows.sha256):
        return ""
    return (
        f"{rows.source} has other rows than when finetune read it, and these other rows are used. Restore the file, or "
        f"name the rows to use with {flag} FILE"
    )


def warn_of_change(run: Run, entry: str, rows: RowStream, flag: str, given: str | None) -> None:
    """Warn with `describe_change`, unless the rows were named for the present command. given: Value of the flag."""
    changed = "" if given else describe_change(run, entry, rows, flag)
    if changed:
        progress.warn(changed)
