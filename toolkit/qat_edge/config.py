"""Read and write configuration files, and resolve the options of a verb.

A value comes from the flag, else the configuration file, else a device profile, else the default in `options`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qat_edge import option_paths, profiles, readers, remote_code, storage
from qat_edge.errors import RunError, UsageError
from qat_edge.options import (
    OF_FROZEN_BASE,
    RENAMED_VALUES,
    SWEEP_OPTIONS,
    CompareOptions,
    EvalOptions,
    ExportOptions,
    FinetuneOptions,
    QuantizeOptions,
    SensitivityOptions,
    SweepOptions,
    ValidateOptions,
)
from qat_edge.readers import shorten, show

Options = TypeVar("Options")
MAX_TEXT = 4096  # characters of one value; the longest path of Linux
SECTIONS: dict[str, type] = {  # of a configuration file, with the options they hold, in the order of the work
    "finetune": FinetuneOptions, "sweep": SweepOptions, "sensitivity": SensitivityOptions,
    "quantize": QuantizeOptions, "export": ExportOptions, "validate": ValidateOptions, "eval": EvalOptions,
    "compare": CompareOptions,
}  # fmt: skip


def load(
    cls: type[Options],
    section: str,
    path: Path | None,
    flags: Mapping[str, Any],
    write_flag: Callable[[str], str] | None = None,
) -> Options:
    """Resolve the options of one verb.

    Args:
        cls: the verb's dataclass.
        section: its section in the file.
        path: configuration file, or None.
        flags: values given by flags; None where a flag was not given.
        write_flag: returns what a message calls an option of `flags`; by default "section.name".

    Raises:
        UsageError: an unreadable file, an unknown key (the nearest is named), a wrong type or value, a required option
            that nobody gave, or a file that claims the permission to run a model's code.
    """
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    written = _current_names(fields, _section(section, path))
    _check_keys(written, fields, section, path)

    # Flags override the file. Names and values of 0.1.0 count as today's.
    given = {k: v for k, v in _current_names(fields, flags).items() if v is not None}
    _require_own_permission(written.pop(remote_code.OPTION, None), given, f"{path}: {section}.{remote_code.OPTION}")
    checked = _checked(cls, {k: v for k, v in written.items() if k not in given}, lambda k: f"{path}: {section}.{k}")
    checked |= _checked(cls, given, write_flag or (lambda k: f"{section}.{k}"))
    if remote_code.OPTION in fields:
        checked[remote_code.OPTION] = bool(given.get(remote_code.OPTION, remote_code.permitted()))

    # A frozen base decides what its weights are; a run's config.yaml has it already.
    if checked.get("frozen_base") is not None and not {*OF_FROZEN_BASE, "scales"} <= checked.keys():
        checked = load_frozen_base(checked["frozen_base"]).on_frozen_base | checked

    # A profile fills in what neither flag nor file gave; a run's config.yaml has everything resolved already.
    resolved = all(n in checked for n in fields if profiles.permitted(n))
    if isinstance(checked.get("profile"), str) and not resolved:
        checked = _of_profile(cls, checked["profile"]) | checked

    missing = [n for n, f in fields.items() if f.default is MISSING and n not in checked]
    if missing:
        flag = flag_name(missing[0])
        raise UsageError(f"{flag} is missing. Give it as a flag, or as '{section}.{missing[0]}' in --config FILE.")
    return cls(**checked)


def load_trained(path: Path) -> FinetuneOptions:
    """Read the options of a training from config.yaml of its run, which is the record of them.

    Raises:
        RunError: the file was changed: it cannot be read, or an option is missing, unknown or of another type.
    """
    try:
        return load(FinetuneOptions, "finetune", path, {})
    except UsageError as error:
        # Nobody gave --config or left a flag out: the file is the run's own.
        reason = str(error).removeprefix("--config ").removeprefix(f"{path}: ")
        if reason.startswith("--"):
            reason = f"the section 'finetune' has no '{reason.split()[0].removeprefix('--')}'."
        raise RunError(
            f"{path}: {reason} The file is the record of the training. Restore it, or train again."
        ) from error


def of_sweep(folder: Path) -> Path:
    """Return the file with the options that a sweep began with.

    Raises:
        RunError: there is no sweep in the folder.
    """
    path = folder / SWEEP_OPTIONS
    if not path.is_file():
        raise RunError(f"--resume: {folder} has no {SWEEP_OPTIONS}, so there is no sweep to continue. Check --out.")
    return path


def _require_own_permission(claimed: Any, given: Mapping[str, Any], where: str) -> None:
    """Refuse a file that claims the permission to run a model's code, unless this command has it from its own flag.

    Raises:
        UsageError: names the key and the flag.
    """
    if claimed in (None, False) or given.get(remote_code.OPTION) or remote_code.permitted():
        return
    raise UsageError(
        f"{where}: a file cannot permit a model's own code to run, only {remote_code.FLAG} in the command can. Give "
        "that flag if you have read the code and trust it, or remove the key."
    )


def renamed_in_use(cls: type, section: str, path: Path | None, flags: Mapping[str, Any]) -> list[str]:
    """Return one sentence for each name or value of 0.1.0 among the flags and in the file, with today's."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    given = [(path, _section(section, path)), (None, {k: v for k, v in flags.items() if v is not None})]
    found = []
    for file, values in given:
        where = f"{file}: " if file else ""
        write = flag_name if file is None else (lambda name: f"'{section}.{name}'")
        for name, spec in fields.items():
            old = spec.metadata["old_name"]
            if old and old in values:
                found.append(f"{where}{write(old)} is now {write(name)}; the old name still works.")
        for key, value in _current_names(fields, values).items():
            for item in value if isinstance(value, list | tuple) else [value]:
                if key in fields and _is_renamed(item, fields[key]):
                    found.append(f"{where}{write(key)} {item} is now {RENAMED_VALUES[item]}; the old name still works.")
    return found


def for_devices(
    options: ValidateOptions,
    path: Path | None,
    flags: Mapping[str, Any],
    write_flag: Callable[[str], str] | None = None,
) -> dict[str, ValidateOptions]:
    """Resolve the options of devices with a profile of their own; `options` were loaded from the same file and flags.

    Raises:
        UsageError: a profile for a device that is not among `options.device`, or an invalid one; names the device.
    """
    found = {}
    for device, name in profiles.by_device(options.device_profile, options.device).items():
        try:
            found[device] = load(ValidateOptions, "validate", path, {**flags, "profile": name}, write_flag)
        except UsageError as error:
            raise UsageError(f"--device-profile {device}={name}: {error}") from error
    return found


def flag_name(name: str) -> str:
    """Return a field's flag: "qat_start" -> "--qat-start"."""
    return "--" + name.replace("_", "-")


def read_sections(path: Path) -> dict[str, Any]:
    """Read all sections of a configuration file. The keys of all are checked, whichever verb reads the file.

    Raises:
        UsageError: the file is missing, is no YAML, names a verb that takes no configuration, or has an unknown key.
    """
    document = readers.read_yaml(path, UsageError, f"--config {path}")
    if document is None:  # an empty file
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"--config {path}: expected sections such as 'finetune:', found {type(document).__name__}.")
    for key, value in document.items():
        if key not in SECTIONS:
            _refuse_outside(key, document, path)
            raise UsageError(f"{path}: unknown section '{shorten(str(key))}'.{_nearest(key, list(SECTIONS))}")
        if value is not None and not isinstance(value, dict):
            raise UsageError(f"{path}: section '{key}' must hold 'key: value' lines.")
        fields = {f.name: f for f in dataclasses.fields(SECTIONS[key])}
        _check_keys(_current_names(fields, value or {}), fields, key, path)
    return document


def _refuse_outside(key: Any, document: Mapping[Any, Any], path: Path) -> None:
    """Refuse a key of a section that stands outside of every section.

    Raises:
        UsageError: Names the key and its section.
    """
    known = {section: _known_names(cls) for section, cls in SECTIONS.items()}
    possible = [section for section, names in known.items() if key in names]
    if not possible:
        return
    # Several verbs may have such a key: the other keys outside of sections tell which one is meant.
    outside = {name for name in document if name not in SECTIONS}
    best = max(possible, key=lambda section: len(outside & known[section]))
    more = (
        f", or of another one that has it ({', '.join(s for s in possible if s != best)})" if len(possible) > 1 else ""
    )
    raise UsageError(
        f"{path}: '{key}' is outside of every section. It is a key of '{best}'{more}: write the line '{best}:' above "
        "it and indent the keys below that line."
    )


def _known_names(cls: type) -> set[str]:
    """Return the keys of a section, with those of 0.1.0."""
    fields = dataclasses.fields(cls)
    return {f.name for f in fields} | {f.metadata["old_name"] for f in fields if f.metadata["old_name"]}


def searched_name(text: str) -> str:
    """Return the option that a text of --search names, which may be written as its flag."""
    return text.partition("=")[0].strip().removeprefix("--").replace("-", "_")


def require_key(name: str, known: Collection[str], where: str) -> None:
    """Refuse a name that is none of the known ones; the nearest is named. where: the beginning of the message.

    Raises:
        UsageError: names it.
    """
    if name not in known:
        raise UsageError(f"{where}: unknown option '{shorten(name)}'.{_nearest(name, list(known))}")


def _check_keys(values: Mapping[str, Any], known: Collection[str], section: str, path: Path | None) -> None:
    """Refuse keys of a section that are no options of its verb; the nearest option is named."""
    for key, value in values.items():
        if key not in known and not (key == remote_code.OPTION and value):  # that has a message of its own
            raise UsageError(f"{path}: unknown key '{section}.{shorten(str(key))}'.{_nearest(key, list(known))}")


def save(path: Path, section: str, options: Any, left_out: Collection[str] = ()) -> None:
    """Write the resolved options of one verb, without those `left_out`, next to the other sections of config.yaml."""
    document = read_sections(path) if path.is_file() else {}
    # A permission belongs to one command, so it is not kept.
    left_out = {*left_out, remote_code.OPTION}
    absolute = plain(option_paths.absolute(options))
    document[section] = {name: value for name, value in absolute.items() if name not in left_out}
    storage.write_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))


def plain(options: Any) -> dict[str, Any]:
    """Return options as YAML and JSON hold them: lists for tuples."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options).items()}


def current_values(cls: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return options recorded in a manifest under today's names and values."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    current = _current_names(fields, recorded)
    return {k: RENAMED_VALUES[v] if k in fields and _is_renamed(v, fields[k]) else v for k, v in current.items()}


def _current_names(fields: Mapping[str, dataclasses.Field[Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `values` with keys of 0.1.0 under today's names.

    Raises:
        UsageError: an option is given under both names.
    """
    renamed = {f.metadata["old_name"]: name for name, f in fields.items() if f.metadata["old_name"]}
    for old_name, name in renamed.items():
        if old_name not in fields and None not in (values.get(old_name), values.get(name)):
            raise UsageError(
                f"{flag_name(old_name)} and {flag_name(name)} are one option. Give {flag_name(name)} alone."
            )
    old = {renamed[k]: v for k, v in values.items() if k in renamed and k not in fields}
    new = {k: v for k, v in values.items() if k in fields or k not in renamed}
    return old | {k: v for k, v in new.items() if v is not None or k not in old}


def _is_renamed(value: Any, spec: dataclasses.Field[Any]) -> bool:
    """Return whether `value` is one of 0.1.0 that the field knows under another name today."""
    return isinstance(value, str) and RENAMED_VALUES.get(value) in (spec.metadata["choices"] or ())


def load_frozen_base(folder: str) -> FinetuneOptions:
    """Read the options of the run of a frozen base.

    Raises:
        UsageError: there is no run, or its options cannot be read.
    """
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise UsageError(f"--frozen-base {folder}: no run folder. `qat-edge quantize MODEL --out {folder}` makes one.")
    try:
        return load_trained(path)
    except RunError as error:
        raise UsageError(f"--frozen-base {folder}: {error}") from error


def _of_profile(cls: type, name: str) -> dict[str, Any]:
    """Return the options that a device profile sets.

    Raises:
        UsageError: no such profile, or an invalid key or value in it; names the file and the key.
    """
    path, values = profiles.read(name)
    fields = {f.name: f for f in dataclasses.fields(cls) if profiles.permitted(f.name)}
    values = _current_names(fields, values)
    for key in values:
        if key not in fields:
            raise UsageError(f"{path}: unknown key '{key}'.{_nearest(key, list(fields))}")
    return _checked(cls, values, lambda key: f"{path}: {key}")


def checked_value(cls: type, name: str, value: Any, where: str) -> Any:
    """Return the value of one option as its field's type. where: the beginning of an error message.

    Raises:
        UsageError: it has another type, or is not permitted.
    """
    return _checked(cls, {name: value}, lambda _: where)[name]


def _checked(cls: type, values: dict[str, Any], write: Callable[[str], str]) -> dict[str, Any]:
    """Return values with the fields' types; an error begins with what `write` makes of the field's name."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    return {k: _coerce(v, hints[k], fields[k], write(k)) for k, v in values.items()}


def _section(section: str, path: Path | None) -> dict[str, Any]:
    return {} if path is None else dict(read_sections(path).get(section) or {})


def _nearest(word: object, known: list[str]) -> str:
    near = difflib.get_close_matches(shorten(str(word)), known, n=1, cutoff=0.4)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(known)}."


def _coerce(value: Any, hint: Any, spec: dataclasses.Field[Any], name: str) -> Any:
    """Return `value` as the field's type, checked against its choices and bounds."""
    # Optional fields: None stays None, anything else is checked as the other type.
    if typing.get_origin(hint) is types.UnionType:
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))

    # Lists: a single string counts as a list of one.
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, str | list | tuple):
            raise UsageError(f"{name}: expected a list, found {show(value)}.")
        items = [value] if isinstance(value, str) else list(value)
        if not items and not spec.metadata["may_be_empty"]:
            raise UsageError(f"{name}: an empty list leaves nothing to do. Give at least one, or leave it out.")
        return tuple(_coerce(v, typing.get_args(hint)[0], spec, name) for v in items)

    value = _converted(value, hint, spec)
    if type(value) is not hint:
        raise UsageError(f"{name}: expected {hint.__name__}, found {show(value)}.")
    if isinstance(value, str):
        _check_text(value, spec, name)

    choices = spec.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{name}: {show(value)} is not one of {', '.join(map(str, choices))}.")
    if spec.metadata["bounds"] is not None:
        least, greatest = spec.metadata["bounds"]
        require_between(value, least, greatest, name)
    return value


def _check_text(value: str, spec: dataclasses.Field[Any], name: str) -> None:
    """Refuse text that no file name can hold, and an empty path: it would be the current folder."""
    require_text(value, name)
    if spec.name in option_paths.PATH_OPTIONS and not value.strip():
        wanted = option_paths.NO_DATA.get(spec.name, "a file, a folder or an id on the Hub")
        raise UsageError(f"{name}: empty. Name {wanted}, or leave it out.")


def require_between(value: float, least: float, greatest: float, name: str) -> None:
    """Refuse a number that is not finite or outside its bounds.

    Raises:
        UsageError: names the option and the bound.
    """
    if not math.isfinite(value):
        raise UsageError(f"{name}: expected a number, found {value}.")
    if value < least:
        raise UsageError(f"{name}: {shorten(value)} is below the least permitted value, {least:g}.")
    if value > greatest:
        raise UsageError(f"{name}: {shorten(value)} is above the greatest permitted value, {greatest:.10g}.")


def require_text(text: str, name: str, most: int = MAX_TEXT) -> None:
    """Refuse text that no file name and no tokenizer can hold.

    Raises:
        UsageError: bytes that are not UTF-8, a null character, or thousands of characters.
    """
    if len(text) > most:
        raise UsageError(f"{name}: {len(text)} characters; at most {most} are permitted.")
    # Python keeps bytes of a command line that are not UTF-8 as halves of surrogate pairs.
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{name}: {shorten(text)!a} is not UTF-8 text without null characters.")


def require_output(path: Path, name: str) -> None:
    """Refuse a path that nothing can be written to, before any slow step.

    Raises:
        UsageError: a file is where a folder would have to be, or the path cannot exist.
    """
    require_text(str(path), name)
    try:
        for parent in path.parents:
            if parent.exists() and not parent.is_dir():
                raise UsageError(f"{name} {path}: {parent} is a file, so nothing can be written below it.")
        path.exists()
    except OSError as error:
        raise UsageError(f"{name} {shorten(str(path))}: cannot be written ({error.strerror}).") from error


def _converted(value: Any, hint: Any, spec: dataclasses.Field[Any]) -> Any:
    """Convert values that YAML or 0.1.0 spell differently."""
    if _is_renamed(value, spec):
        return RENAMED_VALUES[value]
    if isinstance(value, bool) and {"on", "off"} <= set(spec.metadata["choices"]):  # YAML reads on and off as booleans
        return "on" if value else "off"
    if hint is float and type(value) in (int, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    return value
