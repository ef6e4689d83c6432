"""Code that comes with a model runs only with the flag of the command that runs, whatever a file says (C20)."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import qat_edge
from conftest import train_run
from qat_edge import config, remote_code
from qat_edge.cli.commands import main
from qat_edge.errors import ModelError, RunError, UsageError
from qat_edge.manifest import sha256
from qat_edge.models import merge
from qat_edge.models.load import load_model
from qat_edge.options import FinetuneOptions, QuantizeOptions
from qat_edge.python_process import python_command
from qat_edge.quant import frozen
from qat_edge.run import Run

OWN_CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "w").close()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(tiny_model_folder, tmp_path_factory.mktemp("trained"))


class Received:
    """A run folder from a stranger: its files claim the permission, and its model brings code that leaves a mark."""

    def __init__(self, folder: Path, run: Run, model: Path) -> None:
        self.marker = folder / "code-ran"
        self.model = folder / "model"
        shutil.copytree(model, self.model)
        (self.model / "own.py").write_text(OWN_CODE.format(marker=str(self.marker)))
        self._edit(self.model / "config.json", self._with_code)
        self.run = Run(folder / "run")
        shutil.copytree(run.path, self.run.path)
        for part in (self.run.adapter, self.run.reference):
            self._edit(part / "manifest.json", self._claim)
        self._edit(self.run.checkpoints / "inputs.json", self._claim)
        text = self.run.config.read_text()
        self.run.config.write_text(text.replace("finetune:\n", "finetune:\n  trust_remote_code: true\n"))

    @staticmethod
    def _edit(path: Path, change: Any) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    @staticmethod
    def _with_code(values: dict[str, Any]) -> None:
        values["model_type"], values["architectures"] = "own", ["OwnModel"]
        values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}

    def _claim(self, manifest: dict[str, Any]) -> None:
        manifest["model"] |= {"trust_remote_code": True, "source": str(self.model)}
        manifest["model"]["identity"]["settings"]["config.json"] = sha256(self.model / "config.json")


@pytest.fixture
def received(tmp_path: Path, trained: Run, tiny_model_folder: Path) -> Received:
    return Received(tmp_path, trained, tiny_model_folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "RUN"],
        ["quantize", "RUN", "--method", "rtn"],
        ["export", "RUN", "--target", "onnx"],
        ["sensitivity", "RUN"],
        ["compare", "RUN"],
        ["finetune", "--resume", "--out", "RUN"],
        ["finetune", "--config", "RUN/config.yaml", "--out", "RUN-again"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_a_received_run_cannot_permit_its_code(received: Received, arguments: list[str]) -> None:
    given = [text.replace("RUN", str(received.run.path)) for text in arguments]
    result = CliRunner().invoke(main, given)
    assert result.exit_code in (1, 2), result.output
    assert remote_code.FLAG in result.stderr and "Traceback" not in result.output
    assert not received.marker.exists()


def test_the_flag_of_the_command_permits_it(received: Received) -> None:
    with pytest.raises(RunError, match="--trust-remote-code"):
        qat_edge.quantize(received.run.path)
    qat_edge.quantize(received.run.path, trust_remote_code=True)
    assert received.marker.exists()

    # The frozen checkpoint has the code, too, and needs the permission again.
    received.marker.unlink()
    for load in (frozen.load, qat_edge.load_frozen):
        with pytest.raises(ModelError, match="--trust-remote-code"):
            load(received.run.quantized)
    assert not received.marker.exists()
    assert qat_edge.load_frozen(received.run, trust_remote_code=True).config.model_type == "own"


def test_a_training_without_code_of_the_model_never_runs_any(received: Received) -> None:
    def honest(manifest: dict[str, Any]) -> None:
        manifest["model"]["trust_remote_code"] = False

    received._edit(received.run.adapter / "manifest.json", honest)
    with remote_code.permit(True), pytest.raises(ModelError):
        merge.merged_model(received.run.adapter)
    assert not received.marker.exists()


@pytest.mark.parametrize("claim", [True, "yes", 1, [], {"a": 1}])
def test_no_value_in_a_file_is_a_permission(tmp_path: Path, claim: Any) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"finetune": {"model": "m", "data": "d", "trust_remote_code": claim}}))
    with pytest.raises(UsageError, match=r"c\.yaml: finetune\.trust_remote_code: a file cannot permit"):
        config.load(FinetuneOptions, "finetune", path, {})
    assert config.load(FinetuneOptions, "finetune", path, {"trust_remote_code": True}).trust_remote_code is True


def test_the_permission_is_kept_in_no_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config.save(path, "finetune", FinetuneOptions("m", "d", trust_remote_code=True))
    assert "trust_remote_code" not in path.read_text()
    assert config.load(FinetuneOptions, "finetune", path, {}).trust_remote_code is False
    # A resumed run is compared with the options it began with: the permission is this command's in both.
    with remote_code.permit(True):
        assert config.load(FinetuneOptions, "finetune", path, {}).trust_remote_code is True


def test_other_sections_know_no_such_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("quantize: {trust_remote_code: false}\n")
    with pytest.raises(UsageError, match=r"unknown key 'quantize\.trust_remote_code'"):
        config.load(QuantizeOptions, "quantize", path, {})


def test_a_permission_ends_with_its_block() -> None:
    assert not remote_code.permitted()
    with remote_code.permit(True), remote_code.permit(False):
        assert remote_code.permitted()  # what a command permits holds for its parts
    assert not remote_code.permitted()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_name_code_to_download(tmp_path: Path, tiny_model_folder: Path, key: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: "stranger/kernel"}))
    with pytest.raises(ModelError, match="compiled code to download and run"):
        load_model(str(folder))


def test_a_process_of_ours_ignores_modules_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('planted')")
    command = python_command("qat_edge", "--version")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "qat-edge" in done.stdout, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="Windows does not remove a current folder")
def test_a_current_folder_that_was_deleted_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = [
        "sh",
        "-c",
        f"cd gone && rmdir ../gone && exec {shlex.join(python_command('qat_edge', 'verify', 'run'))}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Error: The current folder was deleted." in done.stderr, done.stderr
