"""The run that `finetune --force` replaces: kept in RUN/.previous until the new one is finished.

Its parts are moved into RUN/.previous one by one, config.yaml last, and back again with config.yaml first. So:

    .previous with config.yaml       a whole run; everything else in RUN belongs to the new one
    .previous without config.yaml    moving was interrupted; what is in RUN belongs to the earlier run, too

RUN/.previous is an ordinary run folder, which can be moved elsewhere to keep it. Files in RUN that are no part of a run
are left where they are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from qat_edge import progress, storage
from qat_edge.errors import RunError

PREVIOUS = ".previous"
CONFIG = "config.yaml"
# What a run folder holds; everything else in it belongs to somebody else.
RUN_PARTS = (
    "training.json", "checkpoints", "adapter", "reference", "start", "quantized", "exports", "schema.json", "ptq",
    "verified.json", "reports", "answers.json", "sensitivity", "compare", "eval", "report.html", "report.json",
    "history.html", "history.json", "logs", "rows.jsonl", CONFIG,
)  # fmt: skip

# Those of them that are written into. All others are replaced whole.
WRITTEN_INTO = ("checkpoints", "exports", "ptq", "reports", "compare", "eval", "logs", PREVIOUS)


def refuse_links(folder: Path) -> None:
    """Refuse a run one of whose folders is a link: what is written or removed there would be somebody else's.

    Raises:
        RunError: Names the link and where it leads.
    """
    parts = [folder / name for name in WRITTEN_INTO]
    # Every PTQ variant, and every deployment of compare, has exports of its own.
    inner = [path for name in ("ptq", "compare") for path in (folder / name).glob("*")]
    for path in (*parts, *inner, *(path / "exports" for path in inner)):
        if path.is_symlink():
            raise RunError(
                f"{path} is a link to {path.readlink()}; nothing is written or removed through a link inside a run "
                "folder. Remove the link, or move that folder to its place; the run folder itself may be a link."
            )


def set_aside(folder: Path) -> None:
    """Move the run in `folder` into its .previous; an earlier one that is there already stays the previous one."""
    previous = folder / PREVIOUS
    if previous.is_dir():
        _remove_parts(folder)  # of a run that was not finished either
        return
    previous.mkdir()
    for name in RUN_PARTS:
        if (folder / name).exists() or (folder / name).is_symlink():
            storage.rename(folder / name, previous / name)


def discard(folder: Path) -> None:
    """Remove the previous run: the new one is finished."""
    if (folder / PREVIOUS).is_dir():
        storage.remove_folder(folder / PREVIOUS)


def recover(folder: Path, resuming: bool = False) -> None:
    """Finish what a killed process left half done. Only for the process that holds the lock of the folder.

    Args:
        folder: The run folder.
        resuming: The new run is about to be continued, so the previous one stays where it is.
    """
    previous = folder / PREVIOUS
    if not previous.is_dir():
        return
    if not (previous / CONFIG).is_file():
        _move_back(folder)
    elif (folder / "adapter").exists() and (folder / "training.json").is_file():
        discard(folder)
    elif not resuming and not has_checkpoint(folder):
        restore(folder)


def restore(folder: Path) -> None:
    """Bring the previous run back in place of one that has nothing to continue from."""
    _remove_parts(folder)
    storage.rename(folder / PREVIOUS / CONFIG, folder / CONFIG)
    _move_back(folder)
    progress.info(f"{folder}: the new run had no checkpoint yet, so the earlier run is back")


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has reached its first checkpoint."""
    return any((folder / "checkpoints").glob("checkpoint-*"))


def _move_back(folder: Path) -> None:
    for path in sorted((folder / PREVIOUS).iterdir()):
        storage.rename(path, folder / path.name)
    (folder / PREVIOUS).rmdir()


def _remove_parts(folder: Path) -> None:
    """Remove the run in `folder`, config.yaml last."""
    for name in RUN_PARTS:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
