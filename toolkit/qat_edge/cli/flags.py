"""Flags made from the option dataclasses of `qat_edge.options`, and commands whose `--help` groups them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from qat_edge import config, progress, remote_code
from qat_edge.environment import require_importable
from qat_edge.errors import UsageError
from qat_edge.options import DATA, GROUPS, MOST_PROMPT, OUTPUT, RENAMED_VALUES

Command = Callable[..., Any]


def options_of(cls: type) -> Callable[[Command], Command]:
    """Decorate a command with one flag per field of an options dataclass, and one hidden flag per renamed field.

    A flag that is not given is None, so that the configuration file and the defaults can follow.
    """

    def decorate(command: Command) -> Command:
        hints = typing.get_type_hints(cls)
        for field in reversed(dataclasses.fields(cls)):
            command = _flag(field, hints[field.name])(command)
            if field.metadata["old_name"]:
                command = _flag(field, hints[field.name], field.metadata["old_name"])(command)
        return command

    return decorate


def load_options(
    cls: type[config.Options], section: str, path: Path | None, flags: Mapping[str, Any]
) -> config.Options:
    """Resolve the options of one verb from its flags and file; warn about names of 0.1.0."""
    given = without_empty(flags)
    for sentence in config.renamed_in_use(cls, section, path, given):
        progress.warn(sentence)
    return config.load(cls, section, path, given, config.flag_name)


def output_path(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Check the value of a flag that names an output, as a callback of click.

    Raises:
        UsageError: nothing can be written there.
    """
    if value is not None:
        config.require_output(value, param.opts[0])
    return value


def text_value(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Check text that is passed on to a tokenizer, as a callback of click.

    Raises:
        UsageError: it is not UTF-8.
    """
    if value is not None:
        config.require_text(value, param.opts[0], most=MOST_PROMPT)
    return value


def text_values(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """Check the texts of a repeatable flag, as a callback of click.

    Raises:
        UsageError: one is not UTF-8.
    """
    for text in value:
        config.require_text(text, param.opts[0])
    return value


def _permit_remote_code(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.with_resource(remote_code.permit(value))


def without_empty(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags with None in place of (): a repeatable flag that was not given."""
    return {name: None if value == () else value for name, value in flags.items()}


def split_flags(flags: Mapping[str, Any], *classes: type) -> list[dict[str, Any]]:
    """Return the flags of each options dataclass, with those of old names."""
    names = [{name for f in dataclasses.fields(cls) for name in (f.name, f.metadata["old_name"])} for cls in classes]
    return [{name: value for name, value in flags.items() if name in known} for known in names]


def refuse_searched_flags(search: Sequence[str], flags: Mapping[str, Any]) -> None:
    """Refuse a flag of an option that is searched: one of the two would have no effect.

    Raises:
        UsageError: Names both.
    """
    for text in search:
        name = config.searched_name(text)
        if without_empty(flags).get(name) is not None:
            raise UsageError(f"{config.flag_name(name)} and --search {text}: give one of them.")


class GroupedCommand(click.Command):
    """Command whose help begins with an example and lists its options under headings.

    A command gives its example as `@main.command(example="qat-edge export runs/mine")`.
    """

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, unless what it imports cannot be imported here."""
        require_importable()
        return super().invoke(ctx)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the example after the description."""
        super().format_help_text(ctx, formatter)
        if self.example:
            with formatter.section("Example"):
                for line in self.example.splitlines():
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by group; those that are not of an options dataclass belong to the output."""
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                records.setdefault(getattr(parameter, "group", OUTPUT), []).append(record)

        # A command with one group needs no headings.
        if len(records) == 1:
            records = {"Options": next(iter(records.values()))}
        for group in ("Options", *GROUPS):
            if group in records:
                with formatter.section(group):
                    formatter.write_dl(records[group])


class _GroupedOption(click.Option):
    """Option that knows the heading it stands under."""

    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class _RenamedChoice(click.Choice[str]):
    """Choice that also accepts the values' names of 0.1.0; `load_options` warns about them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Pass a known old value on as it is."""
        if RENAMED_VALUES.get(value) in self.choices:
            return value
        return super().convert(value, param, ctx)


def _flag(field: dataclasses.Field[Any], hint: Any, old_name: str = "") -> Callable[[Command], Command]:
    """Return the decorator that adds a field's flag, or the hidden one of its old name."""
    name = old_name or field.name
    flag = config.flag_name(name)
    shared = {"cls": _GroupedOption, "group": field.metadata["group"], "default": None, "hidden": bool(old_name)}
    shared["help"] = _help_text(field)
    if hint is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **shared)

    # tuple[str, ...] is a repeatable flag, and X | None an X.
    multiple = typing.get_origin(hint) is tuple
    if multiple or typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]
    choices = field.metadata["choices"]
    kind = _RenamedChoice([str(choice) for choice in choices]) if choices and hint is str else hint
    return click.option(flag, name, type=kind, multiple=multiple, **shared)


def _help_text(field: dataclasses.Field[Any]) -> str:
    """Return the field's help with its default."""
    text = str(field.metadata["help"])
    # click shows the choices of text options itself.
    if field.metadata["choices"] and not all(isinstance(choice, str) for choice in field.metadata["choices"]):
        text += f" One of {', '.join(map(str, field.metadata['choices']))}."
    if isinstance(field.default, tuple) and "repeat" not in text:
        text += " Repeat the flag for several."
    if field.default is dataclasses.MISSING:
        return text + "  [required, here or in --config]"
    if field.default in (None, ()):
        return text
    shown = ", ".join(field.default) if isinstance(field.default, tuple) else str(field.default).lower()
    return text + f"  [default: {shown}]"


# The permission of the command, for those that load models; finetune has it among its options. It is in force until the
# command ends, and no part of what is computed, so it is in no options dataclass and in no file.
TRUST_REMOTE_CODE = click.option(
    remote_code.FLAG,
    cls=_GroupedOption,
    group=DATA,
    is_flag=True,
    expose_value=False,
    callback=_permit_remote_code,
    help=remote_code.HELP,
)
