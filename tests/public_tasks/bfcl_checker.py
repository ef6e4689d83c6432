"""BFCL's own checker, from its wheel, with stand-ins for the API clients and parsers that it imports."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qat_edge.public_tasks.call_checker import Call


class _AnyModel(dict[str, Any]):
    """Configuration of every model: names of functions keep their dots."""

    def __missing__(self, key: str) -> Any:
        return types.SimpleNamespace(underscore_to_dot=False)


STAND_INS: dict[str, tuple[str, Any]] = {
    "bfcl_eval.constants.model_config": ("MODEL_CONFIG_MAPPING", _AnyModel()),
    "bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter": ("java_type_converter", None),
    "bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter": ("js_type_converter", None),
}


def load(wheel: Path) -> Callable[[Sequence[Call], list[Any], list[Any], str], bool]:
    """Return a function of (calls, possible answers, definitions, category)."""
    for name, (attribute, value) in STAND_INS.items():
        module = types.ModuleType(name)
        setattr(module, attribute, value)
        sys.modules[name] = module
    sys.path.insert(0, str(wheel))
    try:
        checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
        language = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
    finally:
        sys.path.remove(str(wheel))

    def matches(calls: Sequence[Call], possible: list[Any], definitions: list[Any], category: str) -> bool:
        output = [{call.name: call.arguments} for call in calls]
        return bool(checker.ast_checker(definitions, output, possible, language, category, "any")["valid"])

    return matches
