"""Generators of reasoning-gym in a process of their own: problems as JSON on stdout.

The generators are Python code inside the pinned wheel. They are imported from there, without being installed, and
without the package's `__init__`, which imports a dozen libraries that these generators do not use.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# Name of a task -> module, data set and configuration.
GENERATORS = {
    "chain_sum": ("reasoning_gym.arithmetic.chain_sum", "ChainSumDataset", "ChainSumConfig"),
    "gsm_symbolic": (
        "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic", "GSMSymbolicDataset", "GSMSymbolicDatasetConfig",
    ),
}  # fmt: skip
PACKAGES = ("reasoning_gym", "reasoning_gym.arithmetic")


def problems(wheel: str, name: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Return generated problems: question, answer, and a worked solution where the generator has one."""
    for package in PACKAGES:
        bare = ModuleType(package)
        bare.__path__ = [f"{wheel}/{package.replace('.', '/')}"]
        sys.modules[package] = bare

    import_module("reasoning_gym.coaching")  # first: its modules and the factory's import each other
    module, data_set, configuration = GENERATORS[name]
    generators = import_module(module)
    generated = getattr(generators, data_set)(getattr(generators, configuration)(seed=seed, size=count))
    return [
        {"question": each["question"], "answer": each["answer"], "worked": each["metadata"].get("answer_cot", "")}
        for each in generated
    ]


def main() -> None:
    """Print the problems that the arguments ask for: wheel, task, seed, count."""
    wheel, name, seed, count = sys.argv[1:]
    print(json.dumps(problems(wheel, name, int(seed), int(count))))


if __name__ == "__main__":
    main()
