"""Private names of the ExecuTorch runtime's Python binding.

Read in executorch 1.4.1 and 1.5.1, which have no public way to load a program with a cache that outlives one call, or
to list what is registered. Importing this loads the runtime; the exporter's other modules do not. See compat.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from executorch.extension.pybindings import portable_lib


def load_program(path: Path) -> Any:
    """Load a .pte for execution; its `forward` takes a tuple of tensors and returns a list of them."""
    return portable_lib._load_for_executorch(str(path))


def load_every_method(path: Path) -> None:
    """Load a .pte and each of its methods, delegates included, after checking the file's tables.

    Raises:
        RuntimeError: the runtime rejects the file, or a method.
    """
    program = portable_lib._load_program(str(path), program_verification=portable_lib.Verification.InternalConsistency)
    for index in range(program.num_methods()):
        program.load_method(program.get_method_name(index))


def registered_operators() -> list[str]:
    """Return the full names of all operators whose kernels are linked into this process."""
    return list(portable_lib._get_operator_names())


def registered_backends() -> list[str]:
    """Return the names of all delegates that this process can run."""
    return list(portable_lib._get_registered_backend_names())
