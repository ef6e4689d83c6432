"""Will this .pte load in an app, and does it say all that ExecuTorch's LLM runner needs? From its bytes, and by trying.

Runtimes are known by name. The installed Python wheel is asked for real; those of apps are looked up in the table
that the exporter keeps. What a device does with its own memory and processor is for `validate` to find out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qat_edge import progress
from qat_edge.config import RUNTIMES, DoctorOptions
from qat_edge.errors import ArtifactError, ModelError
from qat_edge.models import tokenizer
from qat_edge.run import MANIFEST, library_version
from qat_edge_exporters.executorch import known_runtimes, runtime_probe
from qat_edge_exporters.executorch.pte import runner_contract
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.program_info import Cache, Check, Entry, Program, Words

MODEL, TOKENIZER = "model.pte", "tokenizer.json"
BUILT_AGAINST = ("executorch", "torch", "torchao")
TEXTS = ("Set an alarm for seven.", "  two  spaces,\n\nline feeds and 12345 digits", "Grüße, 你好 🙂, don't")


@dataclass(frozen=True)
class Diagnosis:
    """Everything found about one .pte.

    runner: constant methods, judged; empty for a program that is no language model. words: None without a tokenizer.
    written_by: versions from the manifest beside the file. faults: what is wrong in any runtime, a sentence each.
    """

    path: Path
    program: Program
    runtimes: list[Check]
    runner: list[Entry]
    words: Words | None
    written_by: dict[str, str]
    installed: dict[str, str]
    faults: list[str]


def doctor(path: Path, options: DoctorOptions) -> Diagnosis:
    """Examine a .pte, or the one in an export folder, for the runtimes named, or for all known.

    Raises:
        ArtifactError: there is no .pte, or it cannot be read at all.
    """
    path = path / MODEL if path.is_dir() else path
    progress.info(f"Reading {path}")
    program = inspect(path)
    words = path.parent / TOKENIZER
    texts = [*TEXTS, *_special_texts(words)]
    progress.info("Loading it with the installed executorch")
    probed = runtime_probe.ask(path, words, texts)
    checks = known_runtimes.check(program, options.runtime or RUNTIMES, probed)
    runner, found, faults = [], None, []
    if program.is_language_model:
        runner = runner_contract.entries(program)
        found = _words(words, probed["tokenizer"], texts)
        faults = [f"{entry.name}: {entry.problem}" for entry in runner if entry.problem]
        faults += runner_contract.forward_problems(program) + _word_faults(words, found, program)
    installed = {name: library_version(name) or "none" for name in BUILT_AGAINST}
    return Diagnosis(path, program, checks, runner, found, _written_by(path.parent), installed, faults)


def require_loadable(diagnosis: Diagnosis, options: DoctorOptions) -> None:
    """Raise what keeps the program from running where it was asked to.

    Raises:
        ArtifactError: faults; a runtime named by --runtime that cannot load it; or, where none is named, all of them.
    """
    failing = [check for check in diagnosis.runtimes if not check.loads]
    if not options.runtime and len(failing) < len(diagnosis.runtimes):
        failing = []
    reasons = [f"{check.runtime} cannot load it: {reason(check)}." for check in failing] + diagnosis.faults
    if reasons:
        listed = "\n".join(f"  {text}" for text in reasons)
        raise ArtifactError(f"{diagnosis.path}: {len(reasons)} found wrong:\n{listed}")


def reason(check: Check) -> str:
    """Why a runtime cannot load the program, in a line."""
    lacks = [*check.missing_operators, *(f"backend {name}" for name in check.missing_backends)]
    parts = [f"it lacks {', '.join(lacks)}"] if lacks else []
    parts += [check.error] if check.error else []
    custom = [name for name in check.missing_operators if name.startswith(("llama::", "quantized_decomposed::"))]
    if custom and custom == check.missing_operators and not check.missing_backends:
        parts.append("`qat-edge export --portable` writes a program without these")
    return "; ".join(parts)


def _special_texts(words: Path) -> list[str]:
    """A turn of a chat, written with each of the tokenizer's special tokens."""
    try:
        added = json.loads(words.read_text(encoding="utf-8")).get("added_tokens", [])
        return [f"{token['content']}user\nHello{token['content']}\n" for token in added if token.get("special")][:8]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # missing or damaged: loading it says so


def _words(path: Path, probed: dict[str, Any] | None, texts: list[str]) -> Words | None:
    """The tokenizer as both libraries read it; None where there is none."""
    if probed is None:
        return None
    if probed["error"]:
        return Words(error=probed["error"])
    try:
        reference = Tokenizer.from_file(str(path))
        expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
        ends = tokenizer.end_tokens(path.parent)
    except (OSError, ValueError, ModelError) as error:
        return Words(error=" ".join(str(error).split()), size=probed["size"], bos=probed["bos"], eos=probed["eos"])
    differing = [text for text, ids, wanted in zip(texts, probed["ids"], expected, strict=True) if ids != wanted]
    return Words("", probed["size"], probed["bos"], probed["eos"], ends, differing)


def _word_faults(path: Path, words: Words | None, program: Program) -> list[str]:
    """What is wrong between tokenizer and program."""
    if words is None:
        return [
            f"{path.name} is not beside the program: the runner cannot read a prompt. Copy it from the export folder."
        ]
    if words.error:
        return [f"{path.name} cannot be used: {words.error}."]
    faults = [
        f"{path.name}: ExecuTorch's tokenizer splits {text!r} otherwise than training did." for text in words.differing
    ]
    ids = program.constants.get("get_eos_ids", [words.eos])
    lost = [token for token in words.end_tokens if isinstance(ids, list) and token not in ids]
    if lost:
        faults.append(f"get_eos_ids is {ids}, and the model also ends with {lost}: an answer would run on.")
    output = program.forward.outputs[0].shape if program.forward and program.forward.outputs else ()
    if output and words.size > output[-1]:
        faults.append(
            f"{path.name} has {words.size} tokens, the program's logits only {output[-1]}: not its tokenizer."
        )
    return faults


def _written_by(folder: Path) -> dict[str, str]:
    """Versions that the manifest beside the file names; empty where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found = {"qat-edge": manifest["qat_edge"], **{name: manifest["libraries"][name] for name in BUILT_AGAINST}}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: str(version) for name, version in found.items()}


def lines(diagnosis: Diagnosis) -> list[str]:
    """What `qat-edge doctor` prints: first whether and where it loads, then what that rests on."""
    program = diagnosis.program
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in program.size_bytes.items())
    rows = [("runtime", _runtime_line(check)) for check in diagnosis.runtimes]
    rows += [("fault", fault) for fault in diagnosis.faults]
    rows += [("method", str(method)) for method in program.methods]
    rows += [("runner", f"{entry.name} = {_shown(entry.value)}  ({entry.use})") for entry in diagnosis.runner]
    rows += [("tokenizer", _words_line(diagnosis.words))] if diagnosis.words is not None else []
    rows += [("delegates", _delegates_line(program))]
    rows += [("operators", ", ".join(f"{name} x{count}" for name, count in program.operators.items()))]
    shared = f"; embedding and head share {_size(program.shared_bytes)}" if program.shared_bytes else ""
    rows += [("size", f"{sizes}; {_size(sum(program.size_bytes.values()))} in all{shared}")]
    rows += [("memory", f"{_size(program.memory_bytes)} planned for cache and activations, beside the weights")]
    rows += [("cache", _cache_line(program.cache, program.constants))] if program.cache is not None else []
    rows += [("versions", _versions_line(diagnosis))]
    return [_headline(diagnosis), *(f"{name:<10} {text}" for name, text in rows)]


def _headline(diagnosis: Diagnosis) -> str:
    loading = [check.runtime for check in diagnosis.runtimes if check.loads]
    failing = [check.runtime for check in diagnosis.runtimes if not check.loads]
    where = f"loads in {', '.join(loading)}" if loading else "loads nowhere that was asked for"
    others = f"; not in {', '.join(failing)}" if loading and failing else ""
    wrong = f"; {len(diagnosis.faults)} wrong, see below" if diagnosis.faults else ""
    return f"{diagnosis.path} {where}{others}{wrong}."


def _runtime_line(check: Check) -> str:
    how = "loaded" if check.tried else "has every operator and backend"
    return f"{check.runtime}: {how if check.loads else reason(check)}  ({check.title})"


def _words_line(words: Words) -> str:
    if words.error:
        return "cannot be used, see above"
    ends = ", ".join(map(str, words.end_tokens))
    alike = "splits the probe texts as in training" if not words.differing else "splits texts otherwise, see above"
    return f"{words.size} tokens; answers end with {ends}; ExecuTorch's tokenizer {alike}"


def _delegates_line(program: Program) -> str:
    outside = sum(program.operators.values())
    share = (
        f"{outside} of {program.nodes + outside} operators ({outside / max(program.nodes + outside, 1):.0%}) outside"
    )
    parts = ", ".join(f"{name} x{count}" for name, count in program.delegates.items()) or "none"
    return f"{parts}; {share}" if set(program.delegates) <= {"XnnpackBackend", "VulkanBackend"} else parts


def _cache_line(cache: Cache, constants: dict[str, Any]) -> str:
    tokens = constants.get("get_max_context_len")
    each = ""
    if isinstance(tokens, int) and tokens > 0:
        each = f" for {tokens} tokens, {cache.size_bytes // tokens:,} bytes each"
    return f"keys and values in {cache.dtype}: {_size(cache.size_bytes)}{each}"


def _versions_line(diagnosis: Diagnosis) -> str:
    written = ", ".join(f"{name} {version}" for name, version in diagnosis.written_by.items())
    installed = ", ".join(f"{name} {version}" for name, version in diagnosis.installed.items())
    if not written:
        return f"not told by the file, and there is no {MANIFEST} beside it; installed: {installed}"
    same = all(diagnosis.written_by[name] == version for name, version in diagnosis.installed.items())
    return f"written by {written}; " + ("the same are installed" if same else f"installed: {installed}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.1f} kB"


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
