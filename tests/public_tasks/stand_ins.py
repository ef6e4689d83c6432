"""Small wheels in the place of the pinned ones, and a `pip` that copies them."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from qat_edge.manifest import sha256
from qat_edge.models.wheels import PinnedWheel
from qat_edge.public_tasks import arithmetic, function_calls, short_benchmarks

FUNCTIONS = ("alarm.set", "lamp.dim", "oven.heat", "door.open", "tap.close", "radio.tune", "blind.lower", "fan.spin")

CHAIN_SUM = """
class ChainSumConfig:
    def __init__(self, seed, size):
        self.seed, self.size = seed, size

class ChainSumDataset:
    def __init__(self, config):
        self.config = config

    def __iter__(self):
        for i in range(self.config.size):
            n = (self.config.seed + i) % 700
            yield {"question": f"{n} + 1 =", "answer": str(n + 1), "metadata": {}}
"""
GSM_SYMBOLIC = """
class GSMSymbolicDatasetConfig:
    def __init__(self, seed, size):
        raise ValueError("this generator is broken")

class GSMSymbolicDataset:
    pass
"""


def function(name: str) -> dict[str, Any]:
    """A definition in BFCL's form, with an argument that may be left out."""
    properties = {"level": {"type": "float"}, "note": {"type": "string"}, "extra": {"type": "dict", "properties": {}}}
    parameters = {"type": "dict", "properties": properties, "required": ["level"]}
    return {"name": name, "description": f"{name}.", "parameters": parameters}


def bfcl_files() -> dict[str, str]:
    """Two questions a function in one category, and one in each of the others."""
    files = {}
    for category in function_calls.CATEGORIES.values():
        count = 2 if category == "simple_python" else 1
        questions, answers = [], []
        for number, name in enumerate(FUNCTIONS * count):
            other = FUNCTIONS[(number + 1) % len(FUNCTIONS)]
            names = [name, other] if "multiple" in category else [name]
            key = f"{category}_{number}"
            content = f"{name} to {number}"
            conversation = [[{"role": "user", "content": content}]]
            question = {"id": key, "question": conversation, "function": [function(each) for each in names]}
            questions.append(question)
            answers.append({"id": key, "ground_truth": [{name: {"level": [number], "note": ["", "x"]}}]})
        files[function_calls.QUESTIONS.format(category)] = "".join(json.dumps(each) + "\n" for each in questions)
        files[function_calls.ANSWERS.format(category)] = "".join(json.dumps(each) + "\n" for each in answers)
    return files


def benchmark_files() -> dict[str, str]:
    """Eight questions a benchmark."""
    cases: dict[str, list[dict[str, Any]]] = {"gsm8k": [], "hellaswag": [], "truthfulqa": []}
    for i in range(8):
        cases["gsm8k"].append({"id": f"g{i}", "prompt": f"What is {i} and {i}?", "expected": str(2 * i)})
        endings = ["the end", "an ant", "on", f"in {i}"]
        cases["hellaswag"].append({"id": f"h{i}", "ctx": f"He ran {i}", "endings": endings, "expected_index": i % 4})
        cases["truthfulqa"].append(
            {"id": f"t{i}", "question": f"Is {i}?", "choices": ["yes", "no"], "expected_index": 0}
        )
    return {
        short_benchmarks.CASES.format(short_benchmarks.FOLDERS[name]): "".join(json.dumps(c) + "\n" for c in found)
        for name, found in cases.items()
    }


def gym_files() -> dict[str, str]:
    """One generator that works and one that fails; the package's own __init__ must not be imported."""
    return {
        "reasoning_gym/__init__.py": "raise ImportError('heavy')\n",
        "reasoning_gym/coaching/__init__.py": "",
        "reasoning_gym/arithmetic/__init__.py": "raise ImportError('heavy')\n",
        "reasoning_gym/arithmetic/chain_sum.py": CHAIN_SUM,
        "reasoning_gym/arithmetic/gsm_symbolic/__init__.py": "",
        "reasoning_gym/arithmetic/gsm_symbolic/gsm_symbolic.py": GSM_SYMBOLIC,
    }


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the wheels, pin them in the place of the real ones, and return an empty cache folder."""
    index = folder / "index"
    index.mkdir()
    for module, files in (
        (function_calls, bfcl_files()), (short_benchmarks, benchmark_files()), (arithmetic, gym_files()),
    ):  # fmt: skip
        requirement = module.WHEEL.requirement
        path = index / f"{requirement.replace('==', '-')}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        monkeypatch.setattr(module, "WHEEL", PinnedWheel(requirement, sha256(path)))

    real_run = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "pip" not in command:
            return real_run(command, **options)
        requirement = Path(command[-1]).read_text().split()[0].replace("==", "-")
        shutil.copy(index / f"{requirement}-py3-none-any.whl", command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    cache = folder / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache / "qat-edge"
