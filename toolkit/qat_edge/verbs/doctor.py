"""Report where a .pte, an ONNX graph or a GGUF file loads, and what is wrong with it, whichever tool wrote it.

`examined_file` finds the file; the exporters examine it (the function that `Target.doctor` names); `doctor_lines`
describes the result. This module decides the exit code.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from qat_edge.data.answer_schema import SCHEMA_FILE
from qat_edge.errors import ArtifactError, UsageError
from qat_edge.manifest import MANIFEST
from qat_edge.options import DoctorOptions
from qat_edge.verbs.doctor_lines import lines
from qat_edge.verbs.examined_file import find_file
from qat_edge_exporters.targets import GENAI, TARGETS, Target

if TYPE_CHECKING:
    from qat_edge_exporters.executorch.diagnosis import Diagnosis
    from qat_edge_exporters.file_diagnosis import FileDiagnosis

AGAIN = " it again with the tool that wrote it"
__all__ = ["doctor", "lines", "require_loadable"]


def doctor(path: Path, options: DoctorOptions) -> Diagnosis | FileDiagnosis:
    """Examine a file, or the one in a folder, for the runtimes named in `options`, or for all of its format.

    Raises:
        ArtifactError: there is no such file, or it cannot be read at all.
        UsageError: a runtime of another format is named.
    """
    found = find_file(path)
    _require_runtimes(found.target, options.runtime)
    folder = found.path.parent
    try:
        diagnosis = found.target.diagnose(found.path, options.runtime)
    except ArtifactError as error:
        raise ArtifactError(_advice(str(error), folder)) from error
    if (folder / SCHEMA_FILE).exists():
        loading = [check.runtime for check in diagnosis.runtimes if check.loads]
        schema = found.target.check_schema_files(found.path, loading)
        schema = dataclasses.replace(schema, faults=[_advice(fault, folder) for fault in schema.faults])
        diagnosis = dataclasses.replace(diagnosis, schema=schema, faults=[*diagnosis.faults, *schema.faults])
    else:
        diagnosis = _without_schema(diagnosis, folder, found.target)
    return dataclasses.replace(diagnosis, faults=[_advice(fault, folder) for fault in diagnosis.faults])


def _advice(text: str, folder: Path) -> str:
    """Return a message with advice for users of another tool, unless an export of ours wrote the folder."""
    if (folder / MANIFEST).is_file():
        return text
    return text.replace("Export again", f"Convert{AGAIN}").replace("export again", f"convert{AGAIN}")


def _without_schema(diagnosis: Diagnosis | FileDiagnosis, folder: Path, target: Target) -> Diagnosis | FileDiagnosis:
    """Name a grammar without its schema: a fault of an export of ours, and a note for a folder of another tool."""
    from qat_edge_exporters.file_diagnosis import FileDiagnosis

    if target.grammar is None or not (folder / target.grammar.file).exists():
        return diagnosis
    found = f"{target.grammar.file}: there is no {SCHEMA_FILE} next to it, so that the grammar was not examined"
    if (folder / MANIFEST).is_file() or not isinstance(diagnosis, FileDiagnosis):
        fault = f"{found}. Exports have both: copy {SCHEMA_FILE}, or export again with --schema."
        return dataclasses.replace(diagnosis, faults=[*diagnosis.faults, fault])
    return dataclasses.replace(diagnosis, notes=[*diagnosis.notes, f"{found}. `export --schema` writes both."])


def _require_runtimes(target: Target, names: tuple[str, ...]) -> None:
    """Require runtimes of the file's format.

    Raises:
        UsageError: one is for another format.
    """
    for name in names:
        if name not in target.runtimes:
            formats = [other.title for other in TARGETS.values() if name in other.runtimes]
            raise UsageError(
                f"--runtime {name} loads {', '.join(formats)}, and the file is {target.title}. Its runtimes: "
                f"{', '.join(target.runtimes)}."
            )


def require_loadable(diagnosis: Diagnosis | FileDiagnosis, options: DoctorOptions) -> None:
    """Raise an error if the file cannot run where the user wants it to.

    Raises:
        ArtifactError: the file has faults, a runtime named by --runtime cannot load it, or, if none is named, no
            runtime can, or onnxruntime-genai cannot load a folder with a configuration for it.
    """
    failing = [check for check in diagnosis.runtimes if not check.loads]
    # A runtime that the user did not name may lack an operator, or not be installed.
    if not options.runtime:
        failing = [check for check in failing if not check.untried]
        if any(check.loads for check in diagnosis.runtimes):
            failing = [check for check in failing if check.runtime == GENAI]  # its folder is made for this runtime
    reasons = [f"{check.runtime} cannot load it: {check.reason}." for check in failing] + diagnosis.faults
    if reasons:
        listed = "\n".join(f"  {text}" for text in reasons)
        raise ArtifactError(f"{diagnosis.path}: problems found: {len(reasons)}\n{listed}")
