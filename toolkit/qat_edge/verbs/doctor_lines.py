"""Lines of `qat-edge doctor`: the verdict first, then one line for each finding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qat_edge.data.answer_schema import SCHEMA_FILE
from qat_edge.manifest import MANIFEST

if TYPE_CHECKING:
    from qat_edge_exporters.executorch.diagnosis import (
        CacheInfo,
        Diagnosis,
        ProgramInfo,
        RuntimeCheck,
        TokenizerCheck,
    )
    from qat_edge_exporters.file_diagnosis import FileDiagnosis, GgufInfo, OnnxInfo, SchemaCheck

# Backends whose operators are counted inside their delegates.
COUNTED = {"XnnpackBackend", "VulkanBackend"}
MOST_VALUES = 4  # inputs, outputs and end tokens that a line names

Row = tuple[str, str]


def lines(diagnosis: Diagnosis | FileDiagnosis) -> list[str]:
    """Return the lines that `qat-edge doctor` prints: the verdict first, then the details."""
    from qat_edge_exporters.file_diagnosis import FileDiagnosis, OnnxInfo

    # Where it loads, and what is wrong.
    rows = [("runtime", _runtime_line(check)) for check in diagnosis.runtimes]
    rows += [("fault", fault) for fault in diagnosis.faults]
    rows += [] if diagnosis.schema is None else [("schema", _schema_line(diagnosis.schema))]
    if not isinstance(diagnosis, FileDiagnosis):
        rows += _program_rows(diagnosis)
    else:
        rows += [("note", note) for note in diagnosis.notes]
        contents = diagnosis.contents
        rows += _graph_rows(contents) if isinstance(contents, OnnxInfo) else _gguf_rows(contents)
        if diagnosis.tokenizer is not None:
            template = "with" if diagnosis.tokenizer.has_chat_template else "without"
            rows.append(("tokenizer", f"{diagnosis.tokenizer.size} tokens; {template} a chat template"))
        rows.append(("versions", "installed: " + ", ".join(f"{n} {v}" for n, v in diagnosis.installed.items())))
    return [_headline(diagnosis), *(f"{name:<10} {text}" for name, text in rows)]


def _headline(diagnosis: Diagnosis | FileDiagnosis) -> str:
    loading = [check.runtime for check in diagnosis.runtimes if check.loads]
    untried = [check.runtime for check in diagnosis.runtimes if check.untried]
    failing = [check.runtime for check in diagnosis.runtimes if not check.loads and not check.untried]
    parts = [f"loads in {', '.join(loading)}" if loading else "loads in no requested runtime" if failing else ""]
    parts.append(f"not in {', '.join(failing)}" if loading and failing else "")
    parts.append(f"was not tried in {', '.join(untried)}" if untried else "")
    parts.append(f"faults found: {len(diagnosis.faults)}, see below" if diagnosis.faults else "")
    return f"{diagnosis.path} {'; '.join(filter(None, parts))}."


def _runtime_line(check: RuntimeCheck) -> str:
    how = "loaded" if check.tried else "has every operator and backend"
    return f"{check.runtime}: {how if check.loads else check.reason}  ({check.title})"


def _schema_line(check: SchemaCheck) -> str:
    """Return which runtime constrains answers by the schema next to the file."""
    if check.faults:
        return "cannot be used, see above"
    tried = "took the grammar" if check.tried else "was not tried"
    state = f"{check.runtime} constrains answers by it ({tried} here). " if check.runtime else ""
    return f"{SCHEMA_FILE}: a valid JSON schema. {state}{check.note}"


# --- ONNX and GGUF -------------------------------------------------------------------------------------------


def _graph_rows(contents: OnnxInfo) -> list[Row]:
    """Return what an ONNX graph consists of."""
    opsets = ", ".join(f"{domain} {version}" for domain, version in contents.opsets.items())
    producer = f", written by {contents.producer}" if contents.producer else ""
    rows = [("format", f"IR version {contents.ir_version}; opsets {opsets}{producer}")]
    rows += [("inputs", _some(contents.inputs)), ("outputs", _some(contents.outputs))]
    rows += [
        (
            "matrices",
            f"{each.operator} x{each.count}: {each.bits} bits, blocks of {each.block_size}, accuracy_level "
            f"{each.accuracy_level}{', zero points' if each.zero_points else ''}",
        )
        for each in contents.matrices
    ]
    rows.append(("operators", _counts(contents.operators)))
    if contents.context_length is not None:
        rows.append(("text", _text_line(contents.context_length, contents.end_tokens)))
    rows.append(("size", _sizes_line(contents.size_bytes)))
    return rows


def _gguf_rows(contents: GgufInfo) -> list[Row]:
    """Return what a GGUF file consists of."""
    name = f", {contents.name}" if contents.name else ""
    head = "; embedding and head share one table" if contents.tied else ""
    rows = [("format", f"GGUF version {contents.version}; architecture {contents.architecture}{name}")]
    types = ", ".join(f"{each.name} x{each.count} {_size(each.size_bytes)}" for each in contents.types)
    rows.append(("tensors", f"{types}{head}"))
    if contents.context_length is not None:
        rows.append(("text", _text_line(contents.context_length, contents.end_tokens)))
    if contents.rope:
        rows.append(("rope", ", ".join(f"{key.partition('.')[2]} = {value}" for key, value in contents.rope.items())))
    template = "with" if contents.has_chat_template else "without"
    tokenizer = contents.tokenizer or "no tokenizer"
    rows.append(("tokenizer", f"{tokenizer}; {contents.vocabulary} tokens; {template} a chat template"))
    rows.append(("size", _size(contents.size_bytes)))
    return rows


def _text_line(context_length: int, ends: list[int]) -> str:
    ended = f"generation ends with {_some(ends)}" if ends else "no end token is named"
    return f"context of {context_length} tokens; {ended}"


def _some(values: list[Any]) -> str:
    more = f" and {len(values) - MOST_VALUES} more" if len(values) > MOST_VALUES else ""
    return ", ".join(map(str, values[:MOST_VALUES])) + more


# --- .pte ----------------------------------------------------------------------------------------------------


def _program_rows(diagnosis: Diagnosis) -> list[Row]:
    """Return what a .pte consists of."""
    program = diagnosis.program

    # What callers see: methods, metadata, tokenizer.
    rows = [("method", str(method)) for method in program.methods]
    rows += [("runner", f"{entry.name} = {_shown(entry.value)}  ({entry.use})") for entry in diagnosis.runner]
    if diagnosis.words is not None:
        rows.append(("tokenizer", _tokenizer_line(diagnosis.words)))

    # What it consists of, and its needs.
    rows.append(("delegates", _delegates_line(program)))
    rows.append(("operators", _counts(program.operators)))
    rows.append(("size", _size_line(program)))
    rows.append(("memory", f"{_size(program.memory_bytes)} planned for cache and activations, in addition to weights"))
    if program.cache is not None:
        rows.append(("cache", _cache_line(program.cache, program.constants)))
    rows.append(("versions", _versions_line(diagnosis)))
    return rows


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
    shared = f"; embedding and head share {_size(program.shared_bytes)}" if program.shared_bytes else ""
    return f"{_sizes_line(program.size_bytes)}{shared}"


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


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())


def _sizes_line(size_bytes: Mapping[str, int]) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in size_bytes.items())
    return f"{parts}; {_size(sum(size_bytes.values()))} in total"


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _shown(value: Any) -> str:
    if value is None:
        return "missing"
    return str(value).lower() if isinstance(value, bool) else str(value)
