"""Search over options of finetune: train and score trials, keep the best one, compare it with the others.

    SWEEP/sweep.yaml      options of finetune and of the sweep; --resume reads them
    SWEEP/study.db        values and state of every trial (`train.trial_store`)
    SWEEP/trials/NNN/     a run folder each; all but the best lose their weights, unless --keep-all
    SWEEP/sweep.json      the result, written anew after every trial
    SWEEP/report.html     the same as a page
    SWEEP/best.yaml       options of the best trial, for finetune --config

Any number of processes may work on one sweep: --workers starts them, and so does the command with --resume in another
shell, as long as the folder is on a disk of this machine.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_edge import config, option_paths, progress, run_lock
from qat_edge.data.formats import RowStream
from qat_edge.errors import RunError, UsageError
from qat_edge.evaluate.results import to_json
from qat_edge.models import load
from qat_edge.models.outline import read_outline
from qat_edge.options import SWEEP_OPTIONS, FinetuneOptions, SweepOptions
from qat_edge.report.formatting import megabytes
from qat_edge.stop_signals import Stopped
from qat_edge.storage import disk_errors, remove_folder, write_text

if TYPE_CHECKING:
    from qat_edge.report.sweep_results import SweepResult
    from qat_edge.train.trial_store import TrialStore

RESULT, BEST, PAGE = "sweep.json", "best.yaml", "report.html"
FREE = ("trials", "workers", "keep_all")  # options that --resume may change


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep that may begin, or go on.

    Attributes:
        folder: Of the sweep.
        options: Of finetune, for every trial.
        sweep: Its own, with the search space.
        store: Its trials.
        as_given: Values that the options have without a search; None where the space does not contain them.
    """

    folder: Path
    options: FinetuneOptions
    sweep: SweepOptions
    store: TrialStore
    as_given: dict[str, Any] | None

    def summarize(self) -> SweepResult:
        """Return the present result."""
        from qat_edge.report.sweep_results import summarize

        return summarize(
            self.store, self.folder, self.options.model, self.sweep.search, self.sweep.trials, self.as_given
        )


def sweep(options: FinetuneOptions, search: SweepOptions, out: Path, resume: bool = False) -> SweepResult:
    """Search for the options with the lowest loss of the frozen checkpoint.

    Args:
        options: Of finetune, for every trial; those that are searched are replaced.
        search: The search space and the trials.
        out: Folder of the sweep.
        resume: Go on with the sweep in `out`, or help other processes with it.

    Raises:
        UsageError: An extra is missing, or an impossible option, space or combination.
        RunError: `out` exists (without `resume`), or is no sweep.
        QatEdgeError: A trial failed for another reason than its values.
        Stopped: A signal ended it; the message has the command that continues.
    """
    require_installed()
    prepared = _prepare(option_paths.absolute(options), search, out, resume)
    try:
        if search.workers > 1:
            from qat_edge.verbs.sweep_workers import run_workers

            run_workers(prepared)
        else:
            work(prepared)
    except KeyboardInterrupt as error:
        raise _stopped(prepared, error) from None
    return write_results(prepared)


def require_installed() -> None:
    """Require the extra of this verb.

    Raises:
        UsageError: It is not installed.
    """
    if find_spec("optuna") is None:
        raise UsageError(
            "A sweep cannot run here: the package optuna is not installed. `pip install 'qat-edge[sweep]'` installs it."
        )


def load_recorded(out: Path) -> tuple[FinetuneOptions, SweepOptions]:
    """Read the options that a sweep began with.

    Raises:
        RunError: There is no sweep.
        UsageError: They cannot be read.
    """
    path = config.of_sweep(out)
    return config.load(FinetuneOptions, "finetune", path, {}), config.load(SweepOptions, "sweep", path, {})


def work(prepared: Sweep) -> None:
    """Run trials in this process until there are as many as requested.

    Raises:
        QatEdgeError: A trial failed for another reason than its values.
        KeyboardInterrupt: A signal came.
    """
    from qat_edge.verbs.sweep_trials import run_trial

    prunes = pruner_of(prepared.options, prepared.sweep) != "none"
    while (trial := prepared.store.begin(prepared.sweep.trials)) is not None:
        run_trial(prepared.store, trial, prepared.folder, prepared.options, prepared.sweep, prunes)
        write_results(prepared)


def write_results(prepared: Sweep) -> SweepResult:
    """Write sweep.json, best.yaml and report.html, after removing weights that are not kept."""
    from qat_edge.report.sweep_page import render
    from qat_edge.train.search_space import with_values

    folder = prepared.folder
    with prepared.store.locked():
        result = prepared.summarize()
        if not prepared.sweep.keep_all:
            result = _without_weights(result)
        write_text(folder / RESULT, json.dumps(to_json(result), indent=1, default=str) + "\n")
        if result.best is not None:
            values = result.of(result.best).values
            config.save(folder / BEST, "finetune", with_values(prepared.options, values))
        write_text(folder / PAGE, render(result))
    return result


# --- before the first trial --------------------------------------------------------------------------------


def _prepare(options: FinetuneOptions, search: SweepOptions, out: Path, resume: bool) -> Sweep:
    """Check everything that can be checked before a trial, then make or open the sweep.

    Raises:
        UsageError, RunError: See `sweep`.
    """
    from qat_edge.train import search_space
    from qat_edge.train.trial_store import TrialStore

    _require_scored(options)
    search = dataclasses.replace(search, search=search.search or tuple(search_space.default_space(options)))
    if not search.search:
        raise UsageError("--search is missing: these options leave no default to search over. Name at least one.")
    space = search_space.parse(search.search)
    search_space.require_combinations(options, space)
    pruner = pruner_of(options, search)
    if resume:
        _require_same(options, search, out)
    else:
        _require_new(out)
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)

    store = TrialStore(out, space, options.seed, pruner, options.eval_every)
    as_given = search_space.values_of(options, space)
    with store.locked():
        if not store.trials() and as_given is not None:
            store.queue(as_given)
        config.save(out / SWEEP_OPTIONS, "finetune", options)
        config.save(out / SWEEP_OPTIONS, "sweep", search, left_out=("workers",))
    return Sweep(out, options, search, store, as_given)


def _require_scored(options: FinetuneOptions) -> None:
    """Require a model that generates text, rows to score it on, and steps to train.

    Raises:
        UsageError: One of them is missing.
        ModelError, DataError: Model or rows cannot be read.
    """
    if options.eval_data is None:
        raise UsageError(
            "--eval-data is missing: the loss on held-out rows is the score of a trial. Give rows that are not trained "
            "on."
        )
    if not options.steps:
        raise UsageError("--steps 0: nothing is trained, so there is nothing to search over. Give steps.")
    if load.encoder_config(options.model, options.trust_remote_code) is not None:
        raise UsageError(f"{options.model} is an encoder; sweep is for models that generate text.")
    # A model or rows that cannot be read are found before there is a folder.
    read_outline(options.model, options.trust_remote_code)
    for source, split in ((options.data, "train"), (options.eval_data, "eval")):
        next(iter(RowStream(source, split, report=False, streamed=True)))


def pruner_of(options: FinetuneOptions, search: SweepOptions) -> str:
    """Return the pruner: as given, or the default for the evaluations.

    Raises:
        UsageError: It is given, and there is no evaluation before QAT starts.
    """
    # With a start that is searched, some trials may have one.
    is_searched = "qat_start" in map(config.searched_name, search.search)
    evaluates = options.eval_every > 0 and (is_searched or options.eval_every < options.qat_start_step)
    if search.pruner is None:
        return "median" if evaluates else "none"
    if search.pruner != "none" and not evaluates:
        raise UsageError(
            f"--pruner {search.pruner}: a trial is pruned by its loss before QAT starts, and there is no evaluation "
            f"before step {options.qat_start_step}. Give --eval-every with fewer steps, or --pruner none."
        )
    return search.pruner


def _require_new(out: Path) -> None:
    """Require that nothing is in the place of a new sweep.

    Raises:
        RunError: Something is.
    """
    if (out / SWEEP_OPTIONS).is_file():
        raise RunError(f"{out} has a sweep already. Give --resume to go on with it, or choose another --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists already, and is no sweep. Choose another --out.")


def _require_same(options: FinetuneOptions, search: SweepOptions, out: Path) -> None:
    """Require the options that the sweep began with, but for those that change no trial.

    Raises:
        UsageError: One differs.
    """
    before_options, before_search = load_recorded(out)
    pairs: list[tuple[Any, Any]] = [(options, option_paths.absolute(before_options)), (search, before_search)]
    changed = [
        config.flag_name(field.name)
        for now, before in pairs
        for field in dataclasses.fields(now)
        if field.name not in (*FREE, "trust_remote_code")
        and not option_paths.same(getattr(now, field.name), getattr(before, field.name))
    ]
    if changed:
        free = ", ".join(map(config.flag_name, FREE))
        raise UsageError(
            f"--resume: {', '.join(changed)} differ from {out / SWEEP_OPTIONS}, and losses of other options cannot be "
            f"compared. Leave them out, or begin another sweep; only {free} may change."
        )


# --- after a trial -----------------------------------------------------------------------------------------


def _without_weights(result: SweepResult) -> SweepResult:
    """Remove the weights of finished trials other than the best one, report it, and return the new result."""
    from qat_edge.report.sweep_results import COMPLETE, FAILED, PRUNED, WEIGHTS
    from qat_edge.train.trial_store import folder_of

    removed, size_bytes = [], 0
    for trial in result.trials:
        if trial.state not in (COMPLETE, PRUNED, FAILED) or trial.number == result.best or not trial.has_weights:
            continue
        run = folder_of(result.folder, trial.number)
        with run_lock.writing(run, "sweep"):
            for part in (run / name for name in WEIGHTS if (run / name).is_dir()):
                size_bytes += sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
                remove_folder(part)
        removed.append(trial.number)
    if removed:
        names = ", ".join(map(str, removed))
        progress.info(
            f"Removed the weights of trial{'s' if len(removed) > 1 else ''} {names}, {megabytes(size_bytes)} MB; "
            "--keep-all keeps them"
        )
    trials = [
        dataclasses.replace(each, has_weights=each.has_weights and each.number not in removed) for each in result.trials
    ]
    return dataclasses.replace(result, trials=trials)


def _stopped(prepared: Sweep, error: KeyboardInterrupt) -> Stopped:
    """Return the error of a stopped sweep, whose message has the command that continues it."""
    signum = error.signum if isinstance(error, Stopped) else signal.SIGINT
    result = write_results(prepared)
    command = f"qat-edge sweep --resume --out {shlex.quote(str(prepared.folder))}"
    return Stopped(
        signum, f"Stopped by {signal.Signals(signum).name} after {result.accounts()}. To continue: {command}"
    )
