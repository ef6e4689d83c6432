"""The command of a Python program in a process of its own."""

from __future__ import annotations

import sys


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter.

    With -P, Python does not look for modules in the current folder: it may be one that came from somebody else, with a
    json.py in it.
    """
    return [sys.executable, "-P", "-m", module, *arguments]
