"""Device profiles: TOML files with gates, threads and repeats, the defaults of `validate --profile`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from qat_edge import readers
from qat_edge.errors import UsageError

# Options that a profile may set besides gates.
OTHERS = ("target", "threads", "repeats", "prefill", "decode", "error_budget")
SUFFIX = ".toml"


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """Read a profile, given by name or as a path that ends in .toml.

    Returns:
        Its path and its values, by option as in the YAML configuration.

    Raises:
        UsageError: no such profile, or not valid TOML.
    """
    folder = Path(str(files("qat_edge_devices"))) / "profiles"
    path = Path(name) if name.endswith(SUFFIX) else folder / f"{name}{SUFFIX}"
    if not path.exists():
        if Path(name).exists():
            raise UsageError(f"--profile {name}: a profile is a TOML file whose name ends in {SUFFIX}.")
        known = ", ".join(sorted(p.stem for p in folder.glob(f"*{SUFFIX}")))
        raise UsageError(f"--profile {name}: no such profile. Known: {known}; or give a FILE{SUFFIX}.")
    return path, readers.read_toml(path, UsageError, f"--profile {path}")


def by_device(pairs: Sequence[str], devices: Sequence[str]) -> dict[str, str]:
    """Parse --device-profile into the name of the profile by device.

    Args:
        pairs: values of --device-profile, "DEVICE=PROFILE".
        devices: values of --device.

    Raises:
        UsageError: not such a pair, a device that is not in `devices`, no profile, or two profiles for one.
    """
    profiles: dict[str, str] = {}
    for pair in pairs:
        # A device's name may contain "=", so it is matched as a whole instead of splitting the pair.
        device = next((d for d in devices if pair.startswith(f"{d}=")), None)
        if device is None:
            raise UsageError(
                f"--device-profile {pair}: does not begin with one of the devices, {', '.join(devices)}. Write "
                f"DEVICE=PROFILE with a device as in --device, such as {devices[0]}=pi5."
            )
        if device in profiles:
            raise UsageError(f"--device-profile {pair}: {device} also has the profile {profiles[device]}. Give one.")
        profiles[device] = pair.removeprefix(f"{device}=")
        if not profiles[device].strip():
            raise UsageError(
                f"--device-profile {pair}: no profile follows. Write {device}=PROFILE, such as {device}=pi5."
            )
    return profiles


def permitted(option: str) -> bool:
    """Return True if a profile may set an option of validate: a gate, or how its figure is measured."""
    return option in OTHERS or is_gate(option)


def is_gate(option: str) -> bool:
    """Return True if an option of validate sets a gate."""
    return option.startswith(("max_", "min_")) and option != "max_new_tokens"
