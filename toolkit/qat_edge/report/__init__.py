"""RUN/reports/*.json and what else the run holds -> one self-contained report.html, and report.json beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from qat_edge.report.collect import collect
from qat_edge.report.page import render
from qat_edge.run import Run, write_text

REPORT_JSON = "report.json"


def report(run: Run, say: Callable[[str], None]) -> Path:
    """Write RUN/report.html and RUN/report.json; return the page's path.

    Raises:
        RunError: nothing was validated yet, a report is damaged, or the folder cannot be written.
    """
    story = collect(run)
    for part, reason in story.missing.items():
        say(f"Not in the report: {part}: {reason}")
    write_text(run.path / REPORT_JSON, json.dumps(story.document(), indent=1, default=str, allow_nan=False) + "\n")
    write_text(run.report_html, render(story))
    return run.report_html
