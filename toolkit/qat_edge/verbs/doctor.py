"""Report where a .pte loads, and what ExecuTorch's LLM runner would miss in it.

`qat_edge_exporters.executorch.diagnosis` examines the file; this module prints the result and decides the exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat_edge.errors import ArtifactError
from qat_edge.manifest import MANIFEST
from qat_edge.options import RUNTIMES, DoctorOptions
from qat_edge_exporters.targets import EXECUTORCH, ONNX, target_named

if TYPE_CHECKING:
    from qat_edge_exporters.executorch.diagnosis import (
        CacheInfo,
        Diagnosis,
        ProgramInfo,
        RuntimeCheck,
        TokenizerCheck,
    )

MODEL = "model.pte"
# Backends whose operators are counted inside their delegates.
COUNTED = {"XnnpackBackend", "VulkanBackend"}


def doctor(path: Path, options: DoctorOptions) -> Diagnosis:
    """Examine a .pte, or the one in an export folder, for the runtimes named in `options`, or for all known ones.

    Raises:
        ArtifactError: there is no .pte, or it cannot be read at all.
    """
    program = path / MODEL if path.is_dir() else path
    if path.is_dir() and not program.is_file():
        other = target_named(ONNX).file
        hint = " `qat-edge verify RUN` reads and runs an ONNX folder." if (path / other).is_file() else ""
        raise ArtifactError(f"{path}: no {MODEL} in it, and doctor examines .pte files. Give one, or its folder.{hint}")
    return target_named(EXECUTORCH).diagnose(program, options.runtime or RUNTIMES)


def require_loadable(diagnosis: Diagnosis, options: DoctorOptions) -> None:
    """Raise an error if the program cannot run where the user wants it to.

    Raises:
        ArtifactError: the program has faults, a runtime named by --runtime cannot load it, or, if none is named, no
            runtime can.
    """
    failing = [check for check in diagnosis.runtimes if not check.loads]
    # A runtime that the user did not name may lack an operator.
    if not options.runtime and len(failing) < len(diagnosis.runtimes):
        failing = []
    reasons = [f"{check.runtime} cannot load it: {check.reason}." for check in failing] + diagnosis.faults
    if reasons:
        listed = "\n".join(f"  {text}" for text in reasons)
        raise ArtifactError(f"{diagnosis.path}: {len(reasons)} problems found:\n{listed}")


def lines(diagnosis: Diagnosis) -> list[str]:
    """Return the lines that `qat-edge doctor` prints: the verdict first, then the details."""
    program = diagnosis.program

    # Where it loads, and what is wrong.
    rows = [("runtime", _runtime_line(check)) for check in diagnosis.runtimes]
    rows += [("fault", fault) for fault in diagnosis.faults]

    # What callers see: methods, metadata, tokenizer.
    rows += [("method", str(method)) for method in program.methods]
    rows += [("runner", f"{entry.name} = {_shown(entry.value)}  ({entry.use})") for entry in diagnosis.runner]
    if diagnosis.words is not None:
        rows.append(("tokenizer", _tokenizer_line(diagnosis.words)))

    # What it consists of, and its needs.
    rows.append(("delegates", _delegates_line(program)))
    rows.append(("operators", ", ".join(f"{name} x{count}" for name, count in program.operators.items())))
    rows.append(("size", _size_line(program)))
    rows.append(("memory", f"{_size(program.memory_bytes)} planned for cache and activations, in addition to weights"))
    if program.cache is not None:
        rows.append(("cache", _cache_line(program.cache, program.constants)))
    rows.append(("versions", _versions_line(diagnosis)))
    return [_headline(diagnosis), *(f"{name:<10} {text}" for name, text in rows)]


def _headline(diagnosis: Diagnosis) -> str:
    loading = [check.runtime for check in diagnosis.runtimes if check.loads]
    failing = [check.runtime for check in diagnosis.runtimes if not check.loads]
    where = f"loads in {', '.join(loading)}" if loading else "loads in no requested runtime"
    others = f"; not in {', '.join(failing)}" if loading and failing else ""
    wrong = f"; faults found: {len(diagnosis.faults)}, see below" if diagnosis.faults else ""
    return f"{diagnosis.path} {where}{others}{wrong}."


def _runtime_line(check: RuntimeCheck) -> str:
    how = "loaded" if check.tried else "has every operator and backend"
    return f"{check.runtime}: {how if check.loads else check.reason}  ({check.title})"


def _tokenizer_line(check: TokenizerCheck) -> str:
    if check.error:
        return "cannot be used, see above"
    ends = ", ".join(map(str, check.end_tokens))
    split = "splits the probe texts as in training" if not check.differing else "splits texts differently, see above"
    return f"{check.size} tokens; generation ends with {ends}; ExecuTorch's tokenizer {split}"


def _delegates_line(program: ProgramInfo) -> str:
    parts = ", ".join(f"{name} x{count}" for name, count in program.delegates.items()) or "none"
    # With any other backend, the share would leave out what is inside its delegates.
    if not set(program.delegates) <= COUNTED:
        return parts
    outside = sum(program.operators.values())
    total = program.nodes + outside
    return f"{parts}; {outside} of {total} operators ({outside / max(total, 1):.0%}) outside"


def _size_line(program: ProgramInfo) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in program.size_bytes.items())
    shared = f"; embedding and head share {_size(program.shared_bytes)}" if program.shared_bytes else ""
    return f"{parts}; {_size(sum(program.size_bytes.values()))} in total{shared}"


def _cache_line(cache: CacheInfo, constants: dict[str, Any]) -> str:
    tokens = constants.get("get_max_context_len")
    each = ""
    if isinstance(tokens, int) and tokens > 0:
        each = f" for {tokens} tokens, {cache.size_bytes // tokens:,} bytes each"
    return f"keys and values in {cache.dtype}: {_size(cache.size_bytes)}{each}"


def _versions_line(diagnosis: Diagnosis) -> str:
    written = ", ".join(f"{name} {version}" for name, version in diagnosis.written_by.items())
    installed = ", ".join(f"{name} {version}" for name, version in diagnosis.installed.items())
    if not written:
        return f"not recorded in the file, and there is no {MANIFEST} next to it; installed: {installed}"
    same = all(diagnosis.written_by[name] == version for name, version in diagnosis.installed.items())
    return f"written by {written}; " + ("the same are installed" if same else f"installed: {installed}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return str(value).lower() if isinstance(value, bool) else str(value)
