"""Check which run folder a training may write, and record its inputs and options, which `--resume` compares.

RUN/checkpoints/inputs.json holds the identity of model, data and bits, and the options that decide the result: those in
config.yaml may have been edited since. It is written before config.yaml: a folder with config.yaml can be resumed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qat_edge import config, option_paths, previous_run, progress, remote_code, run_lock
from qat_edge.data import changed_rows
from qat_edge.errors import RunError, UsageError
from qat_edge.manifest import MANIFEST
from qat_edge.options import OF_FROZEN_BASE, FinetuneOptions
from qat_edge.readers import read_json, show
from qat_edge.run import Run
from qat_edge.storage import write_text
from qat_edge.train.setup import TrainingJob

INPUTS_FILE = "inputs.json"  # next to the checkpoints
OF_BASE = {*OF_FROZEN_BASE, "frozen_base"}
# What it identifies, by the keys of the job's metadata. A file of bits may set the levels.
INPUTS = ("model", "data", "eval_data", "kept_layers", "bits", "weight_levels", "frozen_base")
OPTIONS = "options"  # entry with the options of the training
TRAINER = "trainer"  # entry with the arguments' class of a trainer that is not ours
SHARD_BASE = "shard_base"  # option that a resumed run may change
# Paths may change, and what is in them is compared; a permission belongs to one command; the others decide no result.
FREE_OPTIONS = (*option_paths.PATH_OPTIONS, remote_code.OPTION, SHARD_BASE, "save_every", "track")


def check_folder(options: FinetuneOptions, run: Run, resume: bool, force: bool) -> None:
    """Check that the run folder may be written.

    Raises:
        RunError: it exists without `force` or `resume`, is no run folder, or cannot be resumed.
        UsageError: the options differ from those of the run to resume, or an input would be deleted by `force`.
    """
    out = run.path
    if resume:
        _check_resumable(options, run)
        return
    if not out.is_dir():
        raise RunError(f"{out} is a file. Choose another --out.")
    if run_lock.is_unused(out):
        return

    if not force:
        raise RunError(f"{out} exists already. Give --force to replace it, or --resume to continue it.")
    _require_own(run)
    for name in ("model", "data", "eval_data", "bits", "frozen_base"):
        if Path(str(getattr(options, name))).resolve().is_relative_to(out.resolve()):
            raise UsageError(
                f"{config.flag_name(name)} {getattr(options, name)} is inside {out}, which --force would "
                "remove. Move it, or choose another --out."
            )


def _require_own(run: Run) -> None:
    """Require that a folder is a run of ours: --force replaces nothing else.

    Raises:
        RunError: it is not.
    """
    # Unless a killed --force has moved the run away already.
    if (run.path / previous_run.PREVIOUS).is_dir():
        return
    Run.open(run.path)
    try:
        config.load_trained(run.config)
        made_here = (run.adapter / MANIFEST).is_file() or INPUTS[0] in recorded_inputs(run)
    except (RunError, UsageError) as error:
        raise RunError(
            f"{run.path}: not a run folder of qat-edge, so --force does not replace it ({error}) Choose another --out."
        ) from error
    if not made_here:
        raise RunError(
            f"{run.path}: holds a config.yaml, but no adapter and no {INPUTS_FILE}, so it is not known to be a run "
            "folder, and --force does not replace it. Choose another --out."
        )


def _check_resumable(options: FinetuneOptions, run: Run) -> None:
    """Require the very options that the run began with, and its inputs.

    Raises:
        RunError: an input is gone, or another base is in the place of the frozen one.
        UsageError: options differ; the message names their flags.
    """
    Run.open(run.path)
    saved = option_paths.absolute(config.load_trained(run.config))
    changed: list[str] = []
    for name, before in dataclasses.asdict(saved).items():
        given = getattr(options, name)
        # A path may change where the old one is gone; that the contents are the same is checked later.
        moved = name in option_paths.PATH_OPTIONS and option_paths.is_gone(before) and given is not None
        if not option_paths.same(given, before) and not moved and name != SHARD_BASE:
            changed.append(name)
    flags = ", ".join(map(config.flag_name, changed))
    # Options that a base decides come from the folder that is given, and no user gave them.
    if changed and options.frozen_base is not None and saved.frozen_base is not None and {*changed} <= OF_BASE:
        raise RunError(
            f"--frozen-base {options.frozen_base}: not the base that the run began with, which had another {flags} "
            f"({run.config}). Restore that base, or train again with --force."
        )
    if changed:
        raise UsageError(
            f"--resume: {flags} differ from {run.config}. "
            "A resumed run continues exactly as it began: give the same options, or none."
        )
    for name, path in option_paths.missing(options):
        flag = config.flag_name(name)
        raise RunError(f"--resume: {path} is gone, which the run began with. Restore it, or give {flag} its new path.")
    _compare_with_record(options, run)


def _compare_with_record(options: FinetuneOptions, run: Run) -> None:
    """Compare the options with those that the run recorded when it began: config.yaml may have been edited since.

    Raises:
        RunError: an option has another value.
    """
    # Earlier versions recorded none, or know other options.
    inputs, current = recorded_inputs(run), _options_record(options)
    recorded = inputs.get(OPTIONS, {})
    if inputs and not recorded:
        progress.warn(
            f"{run.checkpoints / INPUTS_FILE} has no options, as an earlier version of qat-edge wrote it: it is not "
            f"known whether {run.config} was edited since the run began"
        )
    changed = [name for name in current if name in recorded and recorded[name] != current[name]]
    if changed:
        found = ", ".join(f"{name} {show(current[name])} (was {show(recorded[name])})" for name in changed)
        raise RunError(
            f"--resume: {run.config} was edited since the run began: {found}. A resumed run continues exactly as it "
            "began: restore those values, or train again with --force."
        )


def require_record(run: Run, finished: bool) -> None:
    """Require the record of what a run began with, unless nothing is left to train.

    Raises:
        RunError: it is missing: training could go on, or begin again, with other options and other data.
    """
    if recorded_inputs(run):
        return
    path = run.checkpoints / INPUTS_FILE
    unknown = f"{path} is missing or empty, so it is not known whether options, model and data are those that the run"
    if finished:
        progress.warn(f"{unknown} was trained with")
        return
    # --force replaces a folder without the record only if it has an adapter.
    again = "train again with --force" if (run.adapter / MANIFEST).is_file() else "train with another --out"
    raise RunError(f"--resume: {unknown} began with. Restore the file, or {again}.")


def _options_record(options: FinetuneOptions) -> dict[str, Any]:
    """Return the options that decide the result of a training, as JSON holds them."""
    return {name: value for name, value in config.plain(options).items() if name not in FREE_OPTIONS}


def require_own_trainer(run: Run) -> None:
    """Refuse to resume a run whose trainer is not ours.

    Raises:
        UsageError: Says how to continue it.
    """
    trainer = recorded_inputs(run).get(TRAINER)
    if trainer is not None:
        raise UsageError(
            f"--resume: {run.path} is trained by a trainer of its own ({show(trainer)}), and only that program can "
            "continue it: prepare(..., resume=True), then trainer.train(resume_from_checkpoint=True)."
        )


def begin(run: Run, options: FinetuneOptions, job: TrainingJob, resume: bool, trainer: str | None = None) -> None:
    """Write the options and the identity of model and data; refuse to resume with others.

    Args:
        run: The run folder.
        options: All options of finetune.
        job: Has the identity of model and data.
        resume: The run is continued.
        trainer: Class of the arguments of a trainer that is not ours.

    Raises:
        RunError: model or data changed since the run began.
    """
    current = json.loads(json.dumps({k: job.metadata[k] for k in INPUTS}, default=str))
    current[OPTIONS] = _options_record(options)
    if trainer is not None:
        current[TRAINER] = trainer
    if not resume:
        if not run_lock.is_unused(run.path):
            previous_run.set_aside(run.path)
    else:
        saved = recorded_inputs(run)
        # What is not known is not recorded; see `require_record`.
        if not saved:
            return
        # Earlier versions did not record every input.
        changed = [k for k in (*INPUTS, TRAINER) if k in saved and _differs(current.get(k), saved[k])]
        if changed:
            raise RunError(f"--resume: {', '.join(changed)} changed since {run.path} began. Train again with --force.")

    # In this order: a folder with config.yaml can be resumed.
    write_text(run.checkpoints / INPUTS_FILE, json.dumps(current, indent=1))
    config.save(run.config, "finetune", options)


def _differs(current: Any, saved: Any) -> bool:
    """Return whether an input is another one than when the run began."""
    now, before = _without_place(current), _without_place(saved)
    # Earlier versions recorded the weights of a model alone.
    if isinstance(before, dict) and isinstance(before.get("identity"), dict) and "settings" not in before["identity"]:
        now["identity"].pop("settings")
    return bool(now != before)


def _without_place(recorded: Any) -> Any:
    """Return the identity of an input without where it is: a run and its inputs may be moved."""
    if not isinstance(recorded, dict):
        return recorded
    # The tokens identify the data; earlier versions did not record the rows.
    found = {key: value for key, value in recorded.items() if key not in ("source", changed_rows.ROWS)}
    if isinstance(found.get("identity"), dict):
        found["identity"] = {key: value for key, value in found["identity"].items() if key != "name"}
    return found


def recorded_inputs(run: Run) -> dict[str, Any]:
    """Return what was written about model, data and options when the run began; empty where it is missing.

    Raises:
        RunError: the file is damaged.
    """
    path = run.checkpoints / INPUTS_FILE
    if not path.is_file():
        return {}
    found = read_json(path, RunError)
    if not isinstance(found, dict):
        raise RunError(f"{path}: damaged (not an object). Train again with --force.")
    if found:
        for name in ("model", "data", *({OPTIONS} & found.keys())):
            if not isinstance(found.get(name), dict):
                raise RunError(f"{path}: damaged ('{name}' is no object). Restore it, or train again with --force.")
    return found
