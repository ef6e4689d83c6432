"""The commands: each parses its arguments, calls one function of `qat_edge.verbs` and prints the result.

Nothing heavy is imported before a verb runs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qat_edge import __version__, config, launched, progress, remote_code, stop_signals
from qat_edge.cli.console import (
    ConsoleReporter,
    console,
    echo,
    echo_error,
    echo_generated,
    escape_unencodable,
    piped_lines,
    typed_lines,
    visible,
)
from qat_edge.cli.flags import (
    TRUST_REMOTE_CODE,
    GroupedCommand,
    load_options,
    options_of,
    output_path,
    refuse_searched_flags,
    split_flags,
    text_value,
    text_values,
    without_empty,
)
from qat_edge.errors import QatEdgeError, UsageError
from qat_edge.options import (
    ARTIFACTS,
    CHAT_TOKENS,
    MOST_TOKENS,
    PUBLIC_TASKS,
    CompareOptions,
    DoctorOptions,
    EvalOptions,
    ExportOptions,
    FinetuneOptions,
    PlanOptions,
    PushOptions,
    QuantizeOptions,
    SensitivityOptions,
    SweepOptions,
    ValidateOptions,
)
from qat_edge.readers import counted

if TYPE_CHECKING:
    from qat_edge.run import Run
    from qat_edge.verbs.validate import Validated

RUN = click.argument("run", type=click.Path(path_type=Path))
FORCE = click.option("--force", is_flag=True, help="Replace what exists already.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="YAML file with these options; flags override it.",
)
FROM = click.option(
    "--from",
    "source",
    default="torch",
    type=click.Choice(["torch", *ARTIFACTS]),
    show_default=True,
    help="Model to run: the frozen checkpoint in torch, or an artifact in its own runtime.",
)
CONSTRAINED = click.option(
    "--constrained", is_flag=True, help="Permit only answers by the schema of export --schema; in onnx and gguf."
)


class Commands(click.Group):
    """Group that lists its commands in the order of the work, and prints every error as one paragraph."""

    command_class = GroupedCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names as they were added."""
        return list(self.commands)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the command line and run it; `--help` and errors of parsing are printed here, too."""
        escape_unencodable()
        if launched.is_first():
            return super().main(*args, **kwargs)
        # One of several processes: an error of parsing is the same in all of them.
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.ClickException as error:
            if launched.may_report():
                error.show()
            sys.exit(error.exit_code)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit with the error's code, 128 + n after signal n, or 70 after an unexpected error."""
        try:
            with stop_signals.raise_on_signals():
                return super().invoke(ctx)
        except QatEdgeError as error:
            if launched.may_report():
                echo_error(str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt as error:
            ctx.exit(_report_stop(error))
        except click.ClickException as error:
            error.message = visible(error.message)  # type: ignore[misc]  # it is ours: nothing else reads it
            raise
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click handles these: a closed pipe ends the command without a message
        except (SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic in a library written in Rust is no Exception
            ctx.exit(_report_unexpected(error))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qat-edge")
@click.option("-v", "--verbose", is_flag=True, help="Show the libraries' logs and warnings.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Fine-tune a small language model for int4 and ship exactly the function that was trained.

    finetune -> export -> verify -> validate -> report, each reading and writing one run folder.
    """
    from qat_edge.logs import quiet_libraries

    # Libraries look up the current folder at any time, and fail in many ways without it.
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise click.ClickException("The current folder was deleted. Change to another one (`cd`).") from error
    quiet_libraries(verbose)
    ctx.with_resource(progress.report_to(ConsoleReporter() if launched.is_first() else progress.SilentReporter()))
    if launched.count() > 1 and ctx.invoked_subcommand != "finetune":
        raise UsageError(
            f"qat-edge {ctx.invoked_subcommand} runs in one process, and a launcher started {launched.count()} "
            f"({launched.COUNT} in the environment). Start it without torchrun or accelerate; they are for finetune."
        )


@main.command(
    short_help="Predict memory, sizes and speed.",
    example="qat-edge plan HuggingFaceTB/SmolLM2-135M-Instruct --batch-size 4 --profile pi5 --bandwidth 17",
)
@click.argument("model", metavar="[MODEL|RUN]", required=False)
@options_of(PlanOptions)
@CONFIG
@JSON
def plan(model: str | None, config_path: Path | None, as_json: bool, **flags: Any) -> None:
    """Predict parameters, bits, training memory, file sizes and the fit with devices, without loading weights.

    MODEL is a Hub id, a folder or a .gguf file, of which configuration, tokenizer and tensor headers are read, or the
    folder of a run. --config FILE has options of finetune and export, and may name the model.
    """
    options = load_options(PlanOptions, "plan", None, flags)
    from qat_edge.verbs.plan import plan as verb
    from qat_edge.verbs.plan import resolve

    with remote_code.permit(options.trust_remote_code):
        result = verb(resolve(model, options, without_empty(flags), config_path, config.flag_name))
    if as_json:
        _print_json(result)
    from qat_edge.cli.plan_tables import plan_lines, plan_tables

    for line in plan_lines(result):
        progress.info(line)
    for table in plan_tables(result):
        console().print(table)


@main.command(
    short_help="Train adapters, then QAT.",
    example="qat-edge finetune --model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl --out runs/mine",
)
@options_of(FinetuneOptions)
@CONFIG
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), callback=output_path, help="Run folder to write."
)
@click.option("--resume", is_flag=True, help="Continue from the run folder's last checkpoint, bit for bit.")
@FORCE
@JSON
def finetune(config_path: Path | None, out: Path, resume: bool, force: bool, as_json: bool, **flags: Any) -> None:
    """Train LoRA adapters, then continue with fake quantization in the forward pass (QAT)."""
    from qat_edge.quant.ptq.method_names import QAT
    from qat_edge.run import Run

    if resume and config_path is None:
        # The run's own file: nobody wrote its old names by hand, so there is nothing to warn about.
        path = Run.to_resume(out).config
        # First without the flags: whatever is wrong then is wrong in the file.
        with remote_code.permit(bool(flags[remote_code.OPTION])):
            config.load_trained(path)
        options = config.load(FinetuneOptions, "finetune", path, without_empty(flags), config.flag_name)
    else:
        options = load_options(FinetuneOptions, "finetune", config_path, flags)
    # What the same file wants of the export must not fail after hours of training.
    exporting = config.load(ExportOptions, "export", config_path, {})
    from qat_edge.train.option_checks import check_export_section
    from qat_edge.verbs.finetune import finetune as verb
    from qat_edge.verbs.quantize import target_flag

    check_export_section(options, exporting, config_path)
    with remote_code.permit(options.trust_remote_code):
        result = verb(options, out, resume=resume, force=force, context_length=exporting.context_length)
    if as_json and launched.is_first():
        _print_json(result)
    done = (
        f"Wrote {out}: adapters after {counted(result.steps, 'step')}, {result.wall_s:.0f} s"
        if result.wall_s
        else f"Kept {out}"
    )
    progress.info(f"{done}. Next: qat-edge export {out}{target_flag(Run(out), QAT)}")


@main.command(
    short_help="Search over options of finetune.",
    example="qat-edge sweep --config mine.yaml --search learning_rate=1e-4:3e-3:log --search lora_rank=8,16,32 "
    "--out sweeps/mine",
)
@options_of(SweepOptions)
@options_of(FinetuneOptions)
@CONFIG
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), callback=output_path, help="Folder of the sweep to write."
)
@click.option("--resume", is_flag=True, help="Go on with the sweep, or help another process with it.")
@JSON
def sweep(config_path: Path | None, out: Path, resume: bool, as_json: bool, **flags: Any) -> None:
    """Train with different options and compare the losses of the frozen checkpoints on --eval-data.

    Options that are not searched hold for every trial. OUT gets a run folder for each trial, report.html, and
    best.yaml: the options of the best trial, for finetune --config.
    """
    path = config.of_sweep(out) if resume and config_path is None else config_path
    given = split_flags(flags, SweepOptions, FinetuneOptions)
    search = load_options(SweepOptions, "sweep", path, given[0])
    options = load_options(FinetuneOptions, "finetune", path, given[1])
    refuse_searched_flags(search.search, given[1])
    from qat_edge.verbs.sweep import sweep as verb

    with remote_code.permit(options.trust_remote_code):
        result = verb(options, search, out, resume=resume)
    from qat_edge.cli.sweep_table import sweep_table

    if as_json:
        _print_json(result)
    console().print(sweep_table(result))
    for sentence in result.verdict():
        progress.info(sentence)
    done = f"Wrote {out / 'report.html'}. {result.accounts()}"
    following = "" if result.best is None else f". Next: qat-edge finetune --config {out / 'best.yaml'} --out RUN"
    progress.info(done + following)


@main.command(
    short_help="Measure each layer and pick bits by layer.", example="qat-edge sensitivity runs/mine --max-kl 0.01"
)
@RUN
@options_of(SensitivityOptions)
@CONFIG
@TRUST_REMOTE_CODE
@FORCE
@JSON
def sensitivity(run: Path, config_path: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Measure the loss of each layer at 4 and at 8 bits (2 as well with --width 2), and pick bits by layer."""
    options = load_options(SensitivityOptions, "sensitivity", config_path, flags)
    opened = _open(run)
    from qat_edge.cli.terminal_tables import sensitivity_table
    from qat_edge.verbs.sensitivity import sensitivity as verb

    result = verb(opened, options, force=force)
    if as_json:
        _print_json(result)
    console().print(sensitivity_table(result.measured, result.choice))
    progress.info(result.describe())


@main.command(
    short_help="Freeze the weights, or quantize without training.", example="qat-edge quantize runs/mine --method gptq"
)
@click.argument("run", metavar="RUN|MODEL")
@options_of(QuantizeOptions)
@CONFIG
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_path,
    help="Run folder to write, with a model (Hub id, folder or .gguf file) in place of RUN.",
)
@TRUST_REMOTE_CODE
@FORCE
@JSON
def quantize(run: str, config_path: Path | None, out: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Freeze the trained weights (export does it too), or quantize without training: a fine-tune, or any model."""
    options = load_options(QuantizeOptions, "quantize", config_path, flags)
    if out is None:
        opened, method = _open(Path(run)), options.method
        from qat_edge.verbs.quantize import quantize as verb

        result = verb(opened, options, force=force)
    else:
        from qat_edge.run import Run
        from qat_edge.verbs.quantize_model import quantize_model

        result = quantize_model(run, out, options, force=force)
        opened, method = Run(out), "qat"
    from qat_edge.verbs.quantize import target_flag

    if as_json:
        _print_json(result)
    flags_of_export = "" if method == "qat" else f" --ptq {method}"
    flags_of_export += target_flag(opened, method)
    done = "Wrote" if result.wall_s else "Kept"
    progress.info(f"{done} {result.folder}: {result.weights}. Next: qat-edge export {opened.path}{flags_of_export}")


@main.command(
    short_help="Write .pte and ONNX artifacts.", example="qat-edge export runs/mine --target executorch --target onnx"
)
@RUN
@options_of(ExportOptions)
@CONFIG
@TRUST_REMOTE_CODE
@FORCE
@JSON
def export(run: Path, config_path: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Merge the adapters and freeze the codes once, then write .pte and ONNX artifacts from them."""
    options = load_options(ExportOptions, "export", config_path, flags)
    opened = _open(run)
    from qat_edge.verbs.export import export as verb

    written = verb(opened, options, force=force)
    if as_json:
        _print_json(written)
    wrote = (
        f"Wrote {counted(len(written), 'artifact')} below {run}"
        if written
        else f"All artifacts are below {run} already"
    )
    progress.info(f"{wrote}. Next: qat-edge verify {run}")


@main.command(short_help="Compare artifacts with the frozen checkpoint.", example="qat-edge verify runs/mine")
@RUN
@click.option("--target", multiple=True, type=click.Choice(ARTIFACTS), help="Artifacts to verify; all by default.")
@TRUST_REMOTE_CODE
@JSON
def verify(run: Path, target: tuple[str, ...], as_json: bool) -> None:
    """Read every artifact back, run it, and compare both with the frozen checkpoint."""
    opened = _open(run)
    from qat_edge.verbs.verify import conclusion, require_equal
    from qat_edge.verbs.verify import verify as verb

    results = verb(opened, target)
    if as_json:
        _print_json(results)
    for result in results:
        echo(result.describe(), err=as_json)
    require_equal(results)
    progress.info(f"{conclusion(results)}. Next: qat-edge validate {run}")


@main.command(
    short_help="Find out where a .pte, ONNX or GGUF file loads.",
    example="qat-edge doctor runs/mine/exports/executorch --runtime android-app",
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@options_of(DoctorOptions)
@JSON
def doctor(file: Path, as_json: bool, **flags: Any) -> None:
    """Find out where a .pte, an ONNX graph or a GGUF file of any tool loads, and what is wrong with it.

    FILE may be its folder. Operators, settings, tokenizer and sizes are read from the files, and each installed runtime
    loads them. Exits with 1 where something is wrong, or where a runtime named by --runtime lacks what the file needs.
    """
    options = load_options(DoctorOptions, "doctor", None, flags)
    from qat_edge.verbs.doctor import doctor as verb
    from qat_edge.verbs.doctor import lines, require_loadable

    diagnosis = verb(file, options)
    if as_json:
        _print_json(diagnosis)
    for line in lines(diagnosis):
        echo(line, err=as_json)
    require_loadable(diagnosis, options)


@main.command(
    short_help="Measure artifacts on this machine or on devices.",
    example="qat-edge validate runs/mine --max-kl 0.1 --min-exact-match 0.8",
)
@RUN
@options_of(ValidateOptions)
@CONFIG
@TRUST_REMOTE_CODE
@click.option(
    "--junit",
    type=click.Path(path_type=Path),
    callback=output_path,
    help="Write the results of the gates as JUnit XML.",
)
@FORCE
@JSON
def validate(run: Path, config_path: Path | None, junit: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Run every artifact in its own runtime and compare it with the FP32 fine-tune."""
    options = load_options(ValidateOptions, "validate", config_path, flags)
    by_device = config.for_devices(options, config_path, without_empty(flags), config.flag_name)
    opened = _open(run)
    from qat_edge.verbs import validate as verb

    result = verb.validate_run(opened, options, force=force, by_device=by_device, junit=junit)
    if as_json and (result.reports or len(options.device) > 1):
        _print_json(result.reports if len(options.device) > 1 else result.reports[0])
    _print_validated(result, run, as_json)
    verb.require_success(result)


@main.command(
    name="eval",
    short_help="Measure models on public tasks or own rows, with intervals.",
    example="qat-edge eval runs/mine --task bfcl_simple --from reference --from onnx",
)
@RUN
@options_of(EvalOptions)
@click.option(
    "--from",
    "sources",
    multiple=True,
    callback=text_values,
    help="Model to measure, repeatable: torch (the frozen checkpoint), executorch, onnx, METHOD/... for a PTQ variant, "
    "reference (the FP32 fine-tune), base. Compared with the first.  [default: torch]",
)
@click.option(
    "--against", type=click.Path(path_type=Path), help="Run to compare with, model by model, instead of the first."
)
@CONFIG
@TRUST_REMOTE_CODE
@FORCE
@JSON
def evaluate(
    run: Path,
    sources: tuple[str, ...],
    against: Path | None,
    config_path: Path | None,
    force: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Ask models of a run the questions of a task, and compare them on the same questions.

    The questions come from pinned packages of the package index, or from rows of your own (--task rows, rows_loss).
    RUN/eval/TASK.json has every answer.
    """
    options = load_options(EvalOptions, "eval", config_path, flags)
    opened = _open(run)
    other = None if against is None else _open(against)
    from qat_edge.cli.terminal_tables import eval_table
    from qat_edge.verbs.eval import evaluate as verb

    result = verb(opened, options, sources or ("torch",), other, force=force)
    if as_json:
        _print_json(result)
    console().print(eval_table(result))
    progress.info(f"Wrote {result.path}")


@main.command(
    name="task-rows",
    short_help="Write a public task as training rows.",
    example="qat-edge task-rows bfcl data/bfcl --calls text",
)
@click.argument("task", type=click.Choice(PUBLIC_TASKS))
@click.argument("folder", type=click.Path(path_type=Path), callback=output_path)
@click.option(
    "--calls",
    default="template",
    show_default=True,
    type=click.Choice(["template", "text"]),
    help="Functions as tools of the chat template, or as text in the system message.",
)
@FORCE
@JSON
def task_rows(task: str, folder: Path, calls: str, force: bool, as_json: bool) -> None:
    """Write the training part of TASK to FOLDER/train.jsonl, for finetune, and its test part to FOLDER/test.jsonl.

    Function calls are split by function: no function of a test question is in a training row.
    """
    from qat_edge.verbs.task_rows import write_task_rows as verb

    result = verb(task, folder, as_text=calls == "text", force=force)
    if as_json:
        _print_json(result)
    progress.info(
        f"Wrote {counted(result.train_rows, 'row')} to {result.train} and {result.test_rows} to {result.test}. Next: "
        f"qat-edge finetune --data {result.train}"
    )


@main.command(short_help="Compare all deployments of one fine-tune.", example="qat-edge compare runs/mine")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@options_of(CompareOptions)
@CONFIG
@TRUST_REMOTE_CODE
@click.option(
    "--out", type=click.Path(path_type=Path), callback=output_path, help="Train first, into this new run folder."
)
@FORCE
@JSON
def compare(
    run: Path | None, config_path: Path | None, out: Path | None, force: bool, as_json: bool, **flags: Any
) -> None:
    """Deploy one fine-tune in every way (base, LoRA unmerged, naive PTQ, merged, merged PTQ, QAT) and compare them."""
    options = load_options(CompareOptions, "compare", config_path, flags)
    given = [config.flag_name(k) for k in ("model", "data", "eval_data") if getattr(options, k) is not None]
    if run is not None and (out is not None or given):
        raise UsageError(f"RUN and {'--out' if out else given[0]}: give a finished run, or what to train first.")
    if run is None and out is None:
        raise UsageError("Nothing to compare: give a finished RUN, or --model, --data and --out to train one first.")
    opened: Any = None if run is None else _open(run)
    from qat_edge.cli.terminal_tables import deployment_table
    from qat_edge.evaluate.deployments import as_document
    from qat_edge.verbs.compare import compare as verb
    from qat_edge.verbs.compare import train

    if out is not None:
        opened = train(options, out, config_path, force=force)
    table = verb(opened, options, config_path, force=force)
    if as_json:
        click.echo(json.dumps(as_document(table), indent=1, default=str))
    for target in table.targets:
        console().print(deployment_table(table, target))
    progress.info(f"Wrote {opened.path / 'compare' / 'compare.html'}, and compare.json next to it")


@main.command(short_help="Write the HTML report.", example="qat-edge report runs/mine --open")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--open", "open_it", is_flag=True, help="Open the report in a browser.")
def report(runs: tuple[Path, ...], open_it: bool) -> None:
    """Write one self-contained HTML file of what validate measured; of several runs, their history.

    RUN/report.html for one run. For several, the oldest first: history.html in the last. A JSON file of the same name
    has the figures.
    """
    opened = [_open(run) for run in runs]
    from qat_edge.verbs.report import report as verb

    path = verb(opened)
    progress.info(f"Wrote {path}")
    if open_it:
        click.launch(str(path))


@main.command(
    short_help="Upload artifacts to the Hub with a model card.",
    example="qat-edge push runs/mine --repo-id NAME/MODEL --dry-run",
)
@RUN
@click.option(
    "--repo-id",
    required=True,
    callback=text_value,
    help="Repository on the Hugging Face Hub, as NAME/MODEL; made where it is missing.",
)
@options_of(PushOptions)
@JSON
def push(run: Path, repo_id: str, as_json: bool, **flags: Any) -> None:
    """Upload exported artifacts to the Hugging Face Hub, in one commit, with a model card of what was measured.

    Artifacts must be verified, and the run validated. The card is written to RUN/model-card.md as well.
    """
    options = load_options(PushOptions, "push", None, flags)
    opened = _open(run)
    from qat_edge.verbs.push import push as verb

    pushed = verb(opened, repo_id, options)
    if as_json:
        _print_json(pushed)
    progress.info(f"Uploaded: {pushed.url}" if pushed.url else f"Nothing was uploaded. Read {pushed.card}")


@main.command(
    short_help="Generate an answer.", example='qat-edge generate runs/mine --from executorch "Set an alarm for seven"'
)
@RUN
@click.argument("prompt", callback=text_value)
@FROM
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--system", callback=text_value, help="System message before the prompt.")
@click.option(
    "--max-new-tokens",
    default=128,
    show_default=True,
    type=click.IntRange(1, MOST_TOKENS),
    help="Longest answer.",
)
@CONSTRAINED
@TRUST_REMOTE_CODE
def generate(run: Path, prompt: str, source: str, **options: Any) -> None:
    """Generate an answer to PROMPT greedily, printing the text as it comes."""
    opened = _open(run)
    from qat_edge.verbs.generate import generate as verb

    verb(opened, prompt, source, echo_generated, **options)
    click.echo()


@main.command(short_help="Chat with the model.", example="qat-edge chat runs/mine --from executorch")
@RUN
@FROM
@click.option("--system", callback=text_value, help="System message before the conversation.")
@click.option(
    "--max-new-tokens",
    default=CHAT_TOKENS,
    show_default=True,
    type=click.IntRange(1, MOST_TOKENS),
    help="Longest answer.",
)
@CONSTRAINED
@TRUST_REMOTE_CODE
def chat(run: Path, source: str, **options: Any) -> None:
    """Answer messages greedily, a line each, in one conversation; the model stays loaded.

    /reset forgets the conversation (not --system), /exit or the end of the input ends the chat, and /help lists these
    commands.

    Ctrl-C stops an answer; its text so far stays in the conversation. A second Ctrl-C, or one at the prompt, ends the
    chat.

    Messages may come from a pipe or a file: each answer ends with a new line, and a message that cannot be answered is
    an error.
    """
    opened = _open(run)
    from qat_edge.verbs.chat import chat as verb

    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    lines = typed_lines() if is_terminal else piped_lines()
    verb(opened, lines, source, echo_generated, goes_on=is_terminal, **options)


@main.command(short_help="Run every step on a real model.", example="qat-edge demo")
@click.option(
    "--out",
    default=Path("runs/demo"),
    show_default=True,
    type=click.Path(path_type=Path),
    callback=output_path,
    help="Run folder.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="Configuration instead of the demo's own.",
)
def demo(out: Path, config_path: Path | None) -> None:
    """Run every step on SmolLM2-135M-Instruct and a phone-assistant task, replacing an earlier demo."""
    from qat_edge.cli.terminal_tables import stage_table
    from qat_edge.verbs.demo import demo as verb

    stages = verb(out, config_path)
    console().print(stage_table(stages))
    progress.info(f"Open {out / 'report.html'} in a browser.")


def _print_validated(result: Validated, run: Path, as_json: bool) -> None:
    """Print a table per device, or the lines of an encoder, and where the report was written."""
    from qat_edge.cli.terminal_tables import schema_table, summary_table
    from qat_edge.evaluate.results import Report

    for report in result.reports:
        if isinstance(report, Report):
            console().print(summary_table(report))
            if (answers := schema_table(report)) is not None:
                console().print(answers)
        else:
            for line in report.lines():
                echo(line, err=as_json)
        progress.info(f"Wrote {result.paths[report.device]}. Next: qat-edge report {run}")


def _open(path: Path) -> Run:
    from qat_edge.run import Run

    return Run.open(path)


def _report_stop(error: KeyboardInterrupt) -> int:
    """Print, in the first of several processes, that a signal ended the command; return the exit code."""
    stopped = error if isinstance(error, stop_signals.Stopped) else stop_signals.Stopped(signal.SIGINT)
    if launched.is_first():
        launched.may_report()  # so that no other process reports its end as an error
        echo(str(stopped), err=True)
    return stopped.exit_code


def _report_unexpected(error: BaseException) -> int:
    """Print a known error of a library, or write a bug report; return the exit code."""
    from qat_edge.cli.bug_report import EX_SOFTWARE, describe_known, report_bug

    known = describe_known(error)
    if launched.may_report():
        echo_error(known or report_bug(error))
    return 1 if known else EX_SOFTWARE


def _print_json(result: Any) -> None:
    """Print one dataclass, or a list of them, on stdout."""
    from qat_edge.evaluate.results import to_json

    rows = [to_json(r) for r in result] if isinstance(result, Iterable) else to_json(result)
    click.echo(json.dumps(rows, indent=1, default=str))
