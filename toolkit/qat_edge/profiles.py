"""Device profiles: TOML files of limits, threads and repeats that `validate --profile` starts from."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qat_edge.errors import UsageError

# What a profile may hold beside limits.
OTHERS = ("target", "threads", "repeats", "prefill", "decode", "error_budget")
SUFFIX = ".toml"


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """The file of a profile, by its name or as a path that ends in .toml, and its keys: names of options, as in YAML.

    Raises:
        UsageError: no such profile, or no TOML.
    """
    folder = Path(str(files("qat_edge_devices"))) / "profiles"
    path = Path(name) if name.endswith(SUFFIX) else folder / f"{name}{SUFFIX}"
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in folder.glob(f"*{SUFFIX}")))
        raise UsageError(f"--profile {name}: no such profile. Known: {known}; or give a FILE{SUFFIX}.") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--profile {path}: cannot be read as TOML: {error}") from error


def by_device(pairs: Sequence[str], devices: Sequence[str]) -> dict[str, str]:
    """The profile of each device that has one of its own; `pairs` are "DEVICE=PROFILE".

    Raises:
        UsageError: no such pair, a device that is not among `devices`, or two profiles for one.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        device = next((d for d in devices if pair.startswith(f"{d}=")), None)
        if device is None:
            raise UsageError(
                f"--device-profile {pair}: begins with none of the devices, {', '.join(devices)}. Write DEVICE=PROFILE "
                f"with a device as --device has it, such as {devices[0]}=pi5."
            )
        name = pair.removeprefix(f"{device}=")
        if device in found:
            raise UsageError(f"--device-profile {pair}: {device} is given {found[device]} as well. Give it one.")
        found[device] = name
    return found


def permitted(option: str) -> bool:
    """Whether a profile may set an option of validate: a limit, or how what it limits is measured."""
    return option in OTHERS or is_limit(option)


def is_limit(option: str) -> bool:
    """Whether an option of validate is a gate."""
    return option.startswith(("max_", "min_")) and option != "max_new_tokens"
