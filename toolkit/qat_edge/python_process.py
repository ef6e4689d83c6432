"""The command of a Python program in a process of its own."""

from __future__ import annotations

import sys


def python_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter.

    With -P, Python does not look for modules in the current folder: it may be one that came from somebody else, with a
    json.py in it.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def utf8_command(module: str, *arguments: str) -> list[str]:
    """Return the command of `python_command` for a program whose output is read here.

    It writes UTF-8, and so does everything that it opens without an encoding: elsewhere, Windows has an encoding of the
    country for both.
    """
    return [sys.executable, "-X", "utf8", "-P", "-m", module, *arguments]
