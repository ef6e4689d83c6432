"""Options of a .pte's export, read from the program itself: its constant methods, and the tensors of its cache."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qat_edge.errors import ArtifactError
from qat_edge_exporters.artifact import HeldOption
from qat_edge_exporters.executorch.backends.registry import BACKENDS
from qat_edge_exporters.executorch.pte import delegates, inspection, pte_reader, runner_contract
from qat_edge_exporters.executorch.pte.program_info import CacheInfo
from qat_edge_exporters.targets import KV_CACHE_FLOAT

CONTEXT, CALL = "get_max_context_len", "get_max_seq_len"  # of a decoder
LONGEST_TEXT = runner_contract.ENCODER[0]
ATTENTION = "use_sdpa_with_kv_cache"  # the opposite of --portable, except in CoreML
COREML = BACKENDS["coreml"].delegate


def held_options(folder: Path) -> list[HeldOption]:
    """Return the options of an export folder.

    Raises:
        ArtifactError: the .pte is missing, cannot be parsed, or does not say how many tokens it holds.
    """
    path = folder / pte_reader.MODEL
    pte = delegates.open_pte(path)
    try:
        plans = {plan.name: plan for plan in pte.program.execution_plan}
        forward, constants = plans.get(runner_contract.FORWARD), pte_reader.constant_values(plans)
        backends = [] if forward is None else [delegate.id for delegate in forward.delegates]
        cache = None if forward is None else inspection.cache_info(forward)
    except delegates.PARSE_ERRORS as error:
        raise ArtifactError(f"{path}: damaged, its graph cannot be parsed ({error}). Export again.") from error
    if not {CONTEXT, LONGEST_TEXT} & constants.keys():
        raise ArtifactError(f"{path}: it has no method {CONTEXT}, which runners look for. Export again.")
    return options_of_program(constants, backends, cache)


def options_of_program(
    constants: Mapping[str, Any], backends: Collection[str], cache: CacheInfo | None
) -> list[HeldOption]:
    """Return the options of a program.

    Args:
        constants: values of the constant methods, by name.
        backends: names of its delegates.
        cache: tensors of keys and values outside of delegates.
    """
    file = pte_reader.MODEL
    known = [name for name in (CONTEXT, CALL) if name in constants]
    found = [HeldOption("context_length", f"{name} of {file}", constants[name]) for name in known]
    if LONGEST_TEXT in constants:
        # A text is no longer than the positions of an encoder.
        found.append(HeldOption("context_length", f"{LONGEST_TEXT} of {file}", constants[LONGEST_TEXT], is_least=True))

    # A cache inside a delegate is that of its backend, which takes no option.
    if cache is None:
        found.append(HeldOption("kv_cache", f"the type without an int8 cache in {file}", KV_CACHE_FLOAT))
    else:
        found.append(HeldOption("context_length", f"the number of tokens in the cache of {file}", cache.tokens))
        found.append(HeldOption("kv_cache", f"the type of keys and values in {file}", cache.dtype))

    if ATTENTION in constants and COREML not in backends:
        found.append(HeldOption("portable", f"the value that {ATTENTION} of {file} gives", not constants[ATTENTION]))
    return found
