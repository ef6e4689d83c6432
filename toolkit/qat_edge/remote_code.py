"""Permission to run Python code that comes with a model.

Only the flag --trust-remote-code of the command that runs gives it, or the argument of that name of a function in
`qat_edge.api`. No file gives it: a run folder or a configuration may come from a stranger. Whoever loads something from
a model's files passes `permitted()` on as `trust_remote_code`; without any value, transformers would ask on stdin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qat_edge.errors import ModelError, RunError

FLAG = "--trust-remote-code"
OPTION = "trust_remote_code"
HELP = "Run Python code that comes with the model. No file can give this permission, only this flag."
# Keys of config.json whose values may be "organization/kernel" on the Hub.
KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_permitted: ContextVar[bool] = ContextVar("remote_code_permitted", default=False)


@contextmanager
def permit(granted: bool) -> Iterator[None]:
    """Permit the code of models inside the block if `granted`; an outer permission stays in force."""
    token = _permitted.set(granted or _permitted.get())
    try:
        yield
    finally:
        _permitted.reset(token)


def permitted() -> bool:
    """Return whether the running command may run the code of a model."""
    return _permitted.get()


def require_for(recorded: object, folder: Path) -> bool:
    """Return whether a base model is to be loaded with its own code, as it was in training.

    Args:
        recorded: `trust_remote_code` of the training, from the manifest in `folder`. It is no permission.
        folder: Adapter of the training.

    Raises:
        RunError: The training ran the model's code, and this command may not.
    """
    # Without the model's code, transformers may have a class of the same name that computes something else.
    if recorded is not False and not permitted():
        raise RunError(
            f"{folder}: the model was trained with Python code of its own, which runs only if this command has the "
            f"flag {FLAG}. Read that code first: it can do whatever you can do on this machine."
        )
    return recorded is not False


def require_no_kernels(config: Mapping[str, Any], where: object) -> None:
    """Refuse a configuration that names an implementation on the Hub, which transformers downloads and runs.

    Args:
        config: Contents of config.json.
        where: Name of the model for the message.

    Raises:
        ModelError: It names one, and the command does not permit code of the model.
    """
    for key in KERNELS:
        value = config.get(key)
        names = value.values() if isinstance(value, dict) else [value]
        named = next((name for name in names if isinstance(name, str) and "/" in name), None)
        if named is not None and not permitted():
            raise ModelError(
                f"{where}: its configuration names compiled code to download and run ({key}: {named[:80]}). Remove "
                f"the key, or give {FLAG} if you trust that code."
            )


@contextmanager
def refusals(folder: Path) -> Iterator[None]:
    """Turn the refusal of transformers to run the code in a folder into an error that names the flag.

    Raises:
        ModelError: The folder needs code of its own, and the command does not permit it.
    """
    try:
        yield
    except ValueError as error:
        if OPTION not in str(error):
            raise
        raise ModelError(
            f"{folder}: needs Python code of its own, which runs only if this command has the flag {FLAG}. Read that "
            "code first: it can do whatever you can do on this machine."
        ) from error
