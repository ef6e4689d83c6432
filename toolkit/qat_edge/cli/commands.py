"""The commands: each parses, calls one function and prints. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from qat_edge import __version__, config, progress
from qat_edge.cli.console import ConsoleReporter, console
from qat_edge.config import (
    CompareOptions,
    DoctorOptions,
    ExportOptions,
    FinetuneOptions,
    QuantizeOptions,
    SensitivityOptions,
    ValidateOptions,
)
from qat_edge.errors import QatEdgeError, UsageError

Command = Callable[..., Any]
RUN = click.argument("run", type=click.Path(path_type=Path))
FORCE = click.option("--force", is_flag=True, help="Replace what is there already.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
CONFIG = click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="YAML file with these options; flags win over it.",
)


def options_of(cls: type) -> Callable[[Command], Command]:
    """One flag per field of an options dataclass; None where not given, so that file and defaults can follow."""

    def decorate(command: Command) -> Command:
        for field in reversed(dataclasses.fields(cls)):
            command = _flag(field, typing.get_type_hints(cls)[field.name])(command)
        return command

    return decorate


def _flag(field: dataclasses.Field[Any], hint: Any) -> Callable[[Command], Command]:
    name, text = config.flag_name(field.name), field.metadata["help"]
    if field.default is dataclasses.MISSING:
        text += "  [required, here or in --config]"
    elif field.default not in (None, ()):
        shown = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default).lower()
        text += f"  [default: {shown}]"
    if hint is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, default=None, help=text)
    multiple = typing.get_origin(hint) is tuple
    if multiple or typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]
    choices = field.metadata["choices"]
    kind = click.Choice([str(c) for c in choices]) if choices and hint is str else hint
    return click.option(name, field.name, type=kind, multiple=multiple, default=None, help=text)


def load_options(cls: type[config.Options], section: str, path: Path | None, flags: dict[str, Any]) -> config.Options:
    """Options of one verb from its flags and file; an empty multiple flag counts as not given."""
    return config.load(cls, section, path, {k: None if v == () else v for k, v in flags.items()})


class Commands(click.Group):
    """Lists commands in the order of the work, and turns our errors into one paragraph and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except QatEdgeError as error:
            click.secho(f"Error: {error}", err=True, fg="red" if sys.stderr.isatty() else None)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="qat-edge")
@click.option("-v", "--verbose", is_flag=True, help="Show the libraries' logs and warnings.")
@click.pass_context
def main(ctx: click.Context, verbose: bool) -> None:
    """Fine-tune a small language model with QAT-LoRA and ship exactly the function that was trained.

    finetune -> export -> verify -> validate -> report, each reading and writing one run folder.
    """
    from qat_edge.logs import quiet_libraries

    quiet_libraries(verbose)
    ctx.with_resource(progress.report_to(ConsoleReporter()))


@main.command()
@options_of(FinetuneOptions)
@CONFIG
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run folder to make.")
@click.option("--resume", is_flag=True, help="Go on with the run folder's last checkpoint, exactly.")
@FORCE
@JSON
def finetune(config_path: Path | None, out: Path, resume: bool, force: bool, as_json: bool, **flags: Any) -> None:
    """Train LoRA adapters, then go on with the deployed rounding in the forward pass."""
    source = _open(out).config if resume and config_path is None else config_path
    options = load_options(FinetuneOptions, "finetune", source, flags)
    from qat_edge.verbs.finetune import finetune as verb

    result = verb(options, out, resume=resume, force=force)
    if as_json:
        _print_json(result)
    progress.info(
        f"Wrote {out}: adapters after {result.steps} steps, {result.wall_s:.0f} s. Next: qat-edge export {out}"
    )


@main.command()
@RUN
@options_of(SensitivityOptions)
@CONFIG
@FORCE
@JSON
def sensitivity(run: Path, config_path: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Measure what each layer costs at 4 and at 8 bits, and pick bits within a size or a KL divergence."""
    options = load_options(SensitivityOptions, "sensitivity", config_path, flags)
    opened = _open(run)
    from qat_edge.cli.terminal_tables import sensitivity_table
    from qat_edge.verbs.sensitivity import sensitivity as verb

    result = verb(opened, options, force=force)
    if as_json:
        _print_json(result)
    console().print(sensitivity_table(result.measured, result.choice))
    progress.info(result.describe())


@main.command()
@RUN
@options_of(QuantizeOptions)
@CONFIG
@FORCE
@JSON
def quantize(run: Path, config_path: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Freeze the trained weights (export does it too), or quantize the FP32 fine-tune without training."""
    options = load_options(QuantizeOptions, "quantize", config_path, flags)
    opened = _open(run)
    from qat_edge.verbs.quantize import quantize as verb

    result = verb(opened, options, force=force)
    if as_json:
        _print_json(result)
    ptq = "" if options.method == "qat" else f" --ptq {options.method}"
    progress.info(f"Wrote {result.folder}: {result.weights}. Next: qat-edge export {run}{ptq}")


@main.command()
@RUN
@options_of(ExportOptions)
@CONFIG
@FORCE
@JSON
def export(run: Path, config_path: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Merge and freeze the weights once, then write .pte and ONNX artifacts from them."""
    options = load_options(ExportOptions, "export", config_path, flags)
    opened = _open(run)
    from qat_edge.verbs.export import export as verb

    written = verb(opened, options, force=force)
    if as_json:
        _print_json(written)
    progress.info(f"Wrote {len(written)} artifacts below {run}. Next: qat-edge verify {run}")


@main.command()
@RUN
@click.option(
    "--target", multiple=True, type=click.Choice(config.ARTIFACTS), help="Artifacts to check; all by default."
)
@JSON
def verify(run: Path, target: tuple[str, ...], as_json: bool) -> None:
    """Read codes and scales back out of every artifact and compare them with the frozen checkpoint."""
    opened = _open(run)
    from qat_edge.verbs.verify import require_equal
    from qat_edge.verbs.verify import verify as verb

    results = verb(opened, target)
    if as_json:
        _print_json(results)
    for result in results:
        click.echo(result.describe(), err=as_json)
    require_equal(results)
    progress.info(f"Verified {len(results)} artifacts: what was frozen is what ships. Next: qat-edge validate {run}")


@main.command()
@click.argument("program", metavar="FILE", type=click.Path(path_type=Path))
@options_of(DoctorOptions)
@JSON
def doctor(program: Path, as_json: bool, **flags: Any) -> None:
    """Say where a .pte loads: operators, runner metadata, tokenizer, sizes; FILE may be its export folder.

    Exits with 1 where something is wrong, or where a runtime named by --runtime lacks what the program needs.
    """
    options = load_options(DoctorOptions, "doctor", None, flags)
    from qat_edge.verbs.doctor import doctor as verb
    from qat_edge.verbs.doctor import lines, require_loadable

    diagnosis = verb(program, options)
    if as_json:
        _print_json(diagnosis)
    for line in lines(diagnosis):
        click.echo(line, err=as_json)
    require_loadable(diagnosis, options)


@main.command()
@RUN
@options_of(ValidateOptions)
@CONFIG
@click.option("--junit", type=click.Path(path_type=Path), help="Write what became of the limits as JUnit XML.")
@FORCE
@JSON
def validate(run: Path, config_path: Path | None, junit: Path | None, force: bool, as_json: bool, **flags: Any) -> None:
    """Run every artifact in its own runtime and compare it with the FP32 fine-tune."""
    options = load_options(ValidateOptions, "validate", config_path, flags)
    own = config.for_devices(options, config_path, {k: v for k, v in flags.items() if v != ()})
    opened = _open(run)
    from qat_edge.cli.terminal_tables import summary_table
    from qat_edge.evaluate import gates
    from qat_edge.evaluate.devices import report_paths
    from qat_edge.models import tasks
    from qat_edge.run import write_text
    from qat_edge.verbs import validate as verb

    if junit is not None:
        gates.require_limits(*(own.get(device, options) for device in options.device))
        junit.unlink(missing_ok=True)  # no earlier result may stand for this one
    if tasks.of_run(opened).encodes:
        _validate_encoder(opened, options, junit, force, as_json)
        return
    done = verb.validate_devices(opened, options, force=force, own=own)
    if junit is not None:
        write_text(junit, gates.junit(done.reports, done.failures))
    if as_json and (done.reports or len(options.device) > 1):
        _print_json(done.reports if len(options.device) > 1 else done.reports[0])
    paths = report_paths(opened.reports, [report.device for report in done.reports])
    for report in done.reports:
        console().print(summary_table(report))
        progress.info(f"Wrote {paths[report.device]}. Next: qat-edge report {run}")
    verb.require_success(done)


@main.command()
@click.argument("run", type=click.Path(path_type=Path), required=False)
@options_of(CompareOptions)
@CONFIG
@click.option("--out", type=click.Path(path_type=Path), help="Train first, into this new run folder.")
@FORCE
@JSON
def compare(
    run: Path | None, config_path: Path | None, out: Path | None, force: bool, as_json: bool, **flags: Any
) -> None:
    """Ship one fine-tune in every way (base, LoRA unmerged, naive PTQ, merged, merged PTQ, QAT) and compare them."""
    options = load_options(CompareOptions, "compare", config_path, flags)
    given = [config.flag_name(k) for k in ("model", "data", "eval_data") if getattr(options, k) is not None]
    if run is not None and (out is not None or given):
        raise UsageError(f"RUN and {'--out' if out else given[0]}: give a finished run, or what to train first.")
    if run is None and out is None:
        raise UsageError("Nothing to compare: give a finished RUN, or --model, --data and --out to train one first.")
    opened: Any = None if run is None else _open(run)
    from qat_edge.cli.terminal_tables import deployment_table
    from qat_edge.evaluate.deployments import document
    from qat_edge.verbs.compare import compare as verb
    from qat_edge.verbs.compare import train

    if out is not None:
        opened = train(options, out, config_path, force=force)
    table = verb(opened, options, config_path, force=force)
    if as_json:
        click.echo(json.dumps(document(table), indent=1, default=str))
    for target in table.targets:
        console().print(deployment_table(table, target))
    progress.info(f"Wrote {opened.path / 'compare' / 'compare.html'} and compare.json beside it")


@main.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--open", "open_it", is_flag=True, help="Open the report in a browser.")
def report(runs: tuple[Path, ...], open_it: bool) -> None:
    """Write one self-contained HTML file of what validate measured; of several runs, the oldest first, their history.

    RUN/report.html of one run; history.html in the last of several. A JSON file beside it holds its figures.
    """
    opened = [_open(run) for run in runs]
    from qat_edge.verbs.report import report as verb

    path = verb(opened)
    progress.info(f"Wrote {path}")
    if open_it:
        click.launch(str(path))


@main.command()
@RUN
@click.argument("prompt")
@click.option(
    "--from",
    "source",
    default="torch",
    type=click.Choice(["torch", *config.ARTIFACTS]),
    show_default=True,
    help="What answers: the frozen model in torch, or an artifact in its own runtime.",
)
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the chat template.")
@click.option("--system", help="System message before the prompt.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1), help="Longest answer.")
def generate(run: Path, prompt: str, source: str, raw: bool, system: str | None, max_new_tokens: int) -> None:
    """Answer PROMPT greedily, printing the text as it comes."""
    opened = _open(run)
    from qat_edge.verbs.generate import generate as verb

    verb(
        opened, prompt, source, lambda piece: click.echo(piece, nl=False),
        raw=raw, system=system, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    click.echo()


@main.command()
@click.option(
    "--out", default=Path("runs/demo"), show_default=True, type=click.Path(path_type=Path), help="Run folder."
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="Configuration instead of the demo's own.",
)
def demo(out: Path, config_path: Path | None) -> None:
    """The whole line on SmolLM2-135M-Instruct and a phone-assistant task, replacing an earlier demo."""
    from qat_edge.cli.terminal_tables import stage_table
    from qat_edge.verbs.demo import demo as verb

    stages = verb(out, config_path)
    console().print(stage_table(stages))
    progress.info(f"Open {out / 'report.html'} in a browser.")


def _validate_encoder(run: Any, options: ValidateOptions, junit: Path | None, force: bool, as_json: bool) -> None:
    from qat_edge.evaluate import gates
    from qat_edge.evaluate.encoders import validate
    from qat_edge.run import write_text

    result = validate(run, options, force=force)
    if junit is not None:
        write_text(junit, gates.junit([result], {}))
    if as_json:
        _print_json(result)
    for line in result.lines():
        click.echo(line, err=as_json)
    progress.info(f"Wrote {run.answers}. Next: qat-edge report {run.path}")
    gates.require_gates(result)


def _open(path: Path) -> Any:
    from qat_edge.run import Run

    return Run.open(path)


def _print_json(result: Any) -> None:
    rows = [dataclasses.asdict(r) for r in result] if isinstance(result, Iterable) else dataclasses.asdict(result)
    click.echo(json.dumps(rows, indent=1, default=str))
