"""Diagnose a .pte: which runtimes load it, and whether it meets the contract of ExecuTorch's LLM runner.

Runtimes are known by name. The installed Python wheel loads the file; those of apps are looked up in a table. Memory
and processor of a device are for `validate` to test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat_edge import progress, readers
from qat_edge.data import conversation
from qat_edge.errors import ArtifactError, RunError
from qat_edge.manifest import MANIFEST, library_version, read_manifest
from qat_edge.models import artifact_options, tokenizer
from qat_edge.options import RUNTIMES
from qat_edge_exporters.executorch import known_runtimes, runner_tokenizer, runtime_probe
from qat_edge_exporters.executorch.pte import pte_options, runner_contract
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.executorch.pte.program_info import (
    CacheInfo,
    ContractEntry,
    ProgramInfo,
    RuntimeCheck,
    TokenizerCheck,
)
from qat_edge_exporters.file_diagnosis import SchemaCheck

__all__ = [
    "CacheInfo", "ContractEntry", "Diagnosis", "ProgramInfo", "RuntimeCheck", "TokenizerCheck", "diagnose_pte",
]  # fmt: skip

BUILT_AGAINST = ("executorch", "torch", "torchao")


@dataclass(frozen=True)
class Diagnosis:
    """All findings about one .pte. The field names are the keys of `qat-edge doctor --json`.

    Attributes:
        path: of the file.
        program: its contents.
        runtimes: one check for each runtime.
        runner: its constant methods, checked; empty for a program that is no language model.
        words: check of the tokenizer next to it; None if there is none.
        written_by: versions from the manifest next to it, by library.
        installed: versions in this environment, by library.
        faults: what is wrong in any runtime, one sentence each.
        schema: schema of the answers next to it; None without one.
    """

    path: Path
    program: ProgramInfo
    runtimes: list[RuntimeCheck]
    runner: list[ContractEntry]
    words: TokenizerCheck | None
    written_by: dict[str, str]
    installed: dict[str, str]
    faults: list[str]
    schema: SchemaCheck | None = None


def diagnose_pte(path: Path, runtimes: Sequence[str]) -> Diagnosis:
    """Examine the .pte at `path` for each of `runtimes`; without any, for all known ones.

    Raises:
        ArtifactError: there is no .pte, or it cannot be read at all.
    """
    progress.info(f"Reading {path}")
    program = inspect(path)

    progress.info("Loading it with the installed executorch")
    # One process for program and tokenizer: starting it takes seconds.
    tokenizer_path = path.parent / runner_tokenizer.TOKENIZER
    texts = runner_tokenizer.probe_texts(tokenizer_path)
    probed = runtime_probe.probe(path, tokenizer_path, texts)
    checks = known_runtimes.check_runtimes(program, runtimes or RUNTIMES, probed)

    # The runner's contract, and the tokenizer, are those of a program that generates text.
    entries: list[ContractEntry] = []
    tokenizer_check, faults = None, []
    if program.is_language_model:
        entries = runner_contract.entries(program)
        tokenizer_check = runner_tokenizer.check_tokenizer(tokenizer_path, probed["tokenizer"], texts)
        faults = [f"{entry.name}: {entry.problem}" for entry in entries if entry.problem]
        faults += runner_contract.forward_problems(program)
        faults += _tokenizer_faults(tokenizer_path, tokenizer_check, program)
        faults += _template_faults(path.parent, tokenizer_check, program)

    faults += _recorded_faults(path.parent, program)
    return Diagnosis(
        path=path,
        program=program,
        runtimes=checks,
        runner=entries,
        words=tokenizer_check,
        written_by=_written_by(path.parent),
        installed={name: library_version(name) or "none" for name in BUILT_AGAINST},
        faults=faults,
    )


def _tokenizer_faults(path: Path, check: TokenizerCheck | None, program: ProgramInfo) -> list[str]:
    """Return disagreements between tokenizer and program, one sentence each."""
    if check is None:
        return [
            f"{path.name} is not next to the program: the runner cannot read a prompt. Copy it from the export folder."
        ]
    faults = runner_tokenizer.splitting_faults(path, check)
    if check.error:
        return faults

    # Without get_eos_ids, the runner stops at the tokenizer's own end token.
    ids = program.constants.get("get_eos_ids", [check.eos])
    lost = [token for token in check.end_tokens if isinstance(ids, list) and token not in ids]
    if lost:
        faults.append(f"get_eos_ids is {ids}, and the model also ends with {lost}: generation would not stop there.")

    # A tokenizer may have fewer tokens than the logits, which are often padded.
    output = program.forward.outputs[0].shape if program.forward and program.forward.outputs else ()
    if output and check.size > output[-1]:
        faults.append(
            f"{path.name} has {check.size} tokens, the program's logits only {output[-1]}: it belongs to another model."
        )
    return faults


def _template_faults(folder: Path, check: TokenizerCheck | None, program: ProgramInfo) -> list[str]:
    """Compare the chat template next to the program with the tokens that end a generation, one sentence each."""
    if check is None or check.error:
        return []
    ends = program.constants.get("get_eos_ids", [check.eos])
    loaded = tokenizer.load_tokenizer(folder)
    return conversation.template_faults(
        loaded, ends if isinstance(ends, list) else [ends], tokenizer.recorded_end_tokens(folder)
    )


def _recorded_faults(folder: Path, program: ProgramInfo) -> list[str]:
    """Compare the options in the manifest of an export with the program, one sentence each."""
    try:
        options = read_manifest(folder).get("options")
    except RunError:
        return []  # the folder may be an app's, with a file of that name
    if not isinstance(options, dict):
        return []
    held = pte_options.options_of_program(program.constants, list(program.delegates), program.cache)
    return [f"{MANIFEST}: {fault}" for fault in artifact_options.option_faults(options, held)]


def _written_by(folder: Path) -> dict[str, str]:
    """Return the versions in the folder's manifest; empty if there is none that can be read."""
    try:
        manifest = readers.read_object(folder / MANIFEST, ArtifactError)
        found = {"qat-edge": manifest["qat_edge"], **{name: manifest["libraries"][name] for name in BUILT_AGAINST}}
    except (ArtifactError, KeyError, TypeError):
        return {}
    return {name: str(version) for name, version in found.items()}
