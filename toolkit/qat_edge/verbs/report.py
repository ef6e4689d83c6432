"""Write what validate measured as one self-contained HTML file with a JSON file next to it: one run, or several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qat_edge import progress, run_lock
from qat_edge.errors import UsageError
from qat_edge.report.collect import collect
from qat_edge.report.encoder_page import render as render_encoder
from qat_edge.report.history import RunEntry, history
from qat_edge.report.history_page import render as render_history
from qat_edge.report.run_page import render
from qat_edge.run import Run
from qat_edge.storage import write_text

HISTORY = "history.html"


def report(runs: Sequence[Run]) -> Path:
    """Write the report of one run to RUN/report.html, or the history of several to LAST/history.html.

    A JSON file of the same name has its figures.

    Args:
        runs: in the order of the history, the oldest first.

    Returns:
        The HTML file.

    Raises:
        UsageError: a run is named twice, or one of several has an encoder.
        RunError: nothing was validated yet, a report is damaged, or the folder cannot be written.
    """
    folders = [run.path.resolve() for run in runs]
    twice = next((run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice.path}: named more than once. Name each run once, the oldest first.")

    # A history compares figures of models that generate text; an encoder has a page of its own.
    stories = [collect(run) for run in runs]
    encoder = next((run for run, story in zip(runs, stories, strict=True) if story.encoder), None)
    if encoder is not None and len(runs) > 1:
        raise UsageError(f"{encoder.path}: has an encoder; a history is of models that generate text. Name it alone.")

    for run, story in zip(runs, stories, strict=True):
        for part, reason in story.missing.items():
            progress.warn(f"Not in the report: {'' if len(runs) == 1 else f'{run.path}: '}{part}: {reason}")
        for device, note in story.outdated.items():
            progress.warn(f"{run.path}, measured on {device}: {note}")

    if len(runs) == 1:
        html = render_encoder(stories[0]) if encoder else render(stories[0])
        return _write(runs[0].report_html, html, stories[0].document())
    found = history([RunEntry(folder.name, story) for folder, story in zip(folders, stories, strict=True)])
    return _write(runs[-1].path / HISTORY, render_history(found), found.document())


def _write(page: Path, html: str, document: dict[str, Any]) -> Path:
    """Write the page, and the document as JSON next to it."""
    with run_lock.writing(page.parent, "report"):
        write_text(page.with_suffix(".json"), json.dumps(document, indent=1, default=str, allow_nan=False) + "\n")
        write_text(page, html)
    return page
