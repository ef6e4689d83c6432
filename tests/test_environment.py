"""Variables that change how transformers and accelerate work are refused by name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import accelerate
import pytest

from qat_edge import environment
from qat_edge.errors import UsageError
from qat_edge.options import FinetuneOptions
from qat_edge.python_process import python_command
from qat_edge.train import setup

LAUNCHED = {
    "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip
# Variables of accelerate without an effect here: on the result of one process, or without a switch that is refused.
HARMLESS = re.compile(
    r"ACCELERATE_(DEEPSPEED_\w+|CONFIG_DS_FIELDS|SAGEMAKER_\w+|FP8_\w+|GRADIENT_\w+|DYNAMO_MODE|DOWNCAST_BF16|"
    r"ALLOW_CP_STANDALONE|BYPASS_DEVICE_MAP|INIT_INCLUDE_BUFFERS|DEBUG_RDV_FILE)"
)


@pytest.mark.parametrize(
    ("name", "value", "refused"),
    [
        ("WORLD_SIZE", "2", True), ("WORLD_SIZE", "1", False), ("OMPI_COMM_WORLD_SIZE", "4", True),
        ("WORLD_SIZE", "many", True), ("WORLD_SIZE", "0", True), ("LOCAL_RANK", "0", True), ("LOCAL_RANK", "-1", False),
        ("ACCELERATE_MIXED_PRECISION", "bf16", True), ("ACCELERATE_MIXED_PRECISION", "no", False),
        *((name, value, value in ("true", "1", "maybe")) for name in environment.TRAINERS
          for value in ("true", "1", "maybe", "false", "0", "No")),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", True), ("ACCELERATE_DYNAMO_BACKEND", "eager", True),
        ("ACCELERATE_DYNAMO_BACKEND", "no", False), ("ACCELERATE_DYNAMO_BACKEND", "NO", False),
        ("ACCELERATE_FP8_BACKEND", "TE", True), ("ACCELERATE_FP8_BACKEND", "no", True),
        ("ACCELERATE_FP8_BACKEND", "NO", False), ("ACCELERATE_TORCH_DEVICE", "meta", True),
        ("ACCELERATE_TORCH_DEVICE", "cpu", False), ("ACCELERATE_USE_CPU", "1", False),
        ("ACCELERATE_USE_CPU", "maybe", True), ("ACCELERATE_CPU_AFFINITY", "1", False),
        ("ACCELERATE_DEBUG_MODE", "1", False), ("ACCELERATE_DEBUG_MODE", "maybe", True),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", False), ("ACCELERATE_DYNAMO_MODE", "max-autotune", False),
        ("FSDP_VERSION", "2", False),
    ],
)  # fmt: skip
def test_what_changes_a_training_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, refused: bool
) -> None:
    monkeypatch.setenv(name, value)
    options = FinetuneOptions(model="m", data="d", device="cpu", precision="fp32")
    if not refused:
        assert setup._choose_machine(options) == ("cpu", "fp32")
        return
    with pytest.raises(UsageError, match=f"^{name} is {value} in the environment.*[uU]nset {name}"):
        setup._choose_machine(options)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_TORCH_DEVICE"])
def test_an_empty_value_is_refused_where_accelerate_fails_at_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(UsageError, match=f"^{name} is empty in the environment"):
        environment.require_plain_training("cpu", "fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""), ({"RANK": "1"}, "^RANK is 1 in the environment, and there are 1 processes"),
        ({"LOCAL_RANK": "1"}, "^LOCAL_RANK is 1 in the environment, and there are 1 processes"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, ""), ({"WORLD_SIZE": "2", "RANK": "1"}, ""),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "^RANK is 2 in the environment, and there are 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "^RANK is x in the environment, and there are 2 processes"),
        ({"WORLD_SIZE": "2", "PMI_SIZE": "2"}, ""),
        ({"WORLD_SIZE": "2", "PMI_SIZE": "4"}, "^PMI_SIZE is 4 in the environment, and WORLD_SIZE is 2"),
    ],
)  # fmt: skip
def test_a_launcher_sets_all_of_its_variables(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    for name, value in {**LAUNCHED, **changes}.items():
        monkeypatch.setenv(name, value)
    if not message:
        environment.require_plain_training("cpu", "fp32")
        return
    with pytest.raises(UsageError, match=message):
        environment.require_plain_training("cpu", "fp32")


@pytest.mark.parametrize("name", [name for name in LAUNCHED if name not in ("LOCAL_RANK", "WORLD_SIZE")])
def test_a_launcher_of_which_a_part_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other, value in {**LAUNCHED, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(other, value)
    monkeypatch.delenv(name)
    with pytest.raises(UsageError, match=f"^WORLD_SIZE is 2 in the environment, and {name} not set: .* wait for other"):
        environment.require_plain_training("cpu", "fp32")


def test_a_gpu_is_not_trained_on_as_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
    environment.require_plain_training("cuda", "fp32")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "yes")
    with pytest.raises(UsageError, match=r"^ACCELERATE_USE_CPU is yes in the environment, and .* --device cpu"):
        environment.require_plain_training("cuda", "fp32")


def test_every_variable_of_accelerate_is_checked_or_harmless() -> None:
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(accelerate.__file__).parent.rglob("*.py")
        if not {"commands", "test_utils"} & set(path.parts) and path.name not in ("launch.py", "launchers.py")
    )
    found = set(re.findall(r"[\"'](ACCELERATE_[A-Z0-9_]*[A-Z0-9])[\"']", text))
    checked = {
        *environment.TRAINERS, *environment.CHOICES, *environment.GPU_SWITCHES, *environment.NEUTRAL_SWITCHES,
        *environment.IMPORT_SWITCHES, environment.DEVICE, environment.LOG_LEVEL, environment.MIXED_PRECISION,
    }  # fmt: skip
    assert "ACCELERATE_USE_DEEPSPEED" in found
    assert {name for name in found - checked if not HARMLESS.fullmatch(name)} == set()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PYTHONOPTIMIZE", "2", "Python runs without docstrings"),
        ("USE_TORCH_XLA", "maybe", "USE_TORCH_XLA is maybe in the environment, which is neither on nor off"),
        ("ACCELERATE_LOG_LEVEL", "loud", "ACCELERATE_LOG_LEVEL is loud in the environment, which is no level"),
    ],
)
def test_what_transformers_cannot_be_imported_with_is_refused(
    tmp_path: Path, name: str, value: str, message: str
) -> None:
    command = python_command("qat_edge", "finetune", "--model", "m", "--data", "d", "--out", str(tmp_path / "run"))
    done = subprocess.run(
        command, env={**os.environ, name: value}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and message in done.stderr


def test_values_that_accelerate_can_be_imported_with_are_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ACCELERATE_LOG_LEVEL": "info", "USE_TORCH_XLA": "0", "ACCELERATE_ENABLE_RICH": "true"}.items():
        monkeypatch.setenv(name, value)
    environment.require_importable()
