"""Commands in messages: they write the artifact that the message is about, and parse as `export` takes them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from qat_edge.cli import commands
from qat_edge.errors import RunError
from qat_edge.export_command import export_again, export_targets
from qat_edge.manifest import MANIFEST, read_manifest
from qat_edge.report.collect import _exports, _without_path
from qat_edge.run import Run
from qat_edge.verbs.generate import find_model
from qat_edge.verbs.verify import verify

SCHEMA = '{"type": "integer"}\n'


def artifact(run: Path, name: str, options: dict[str, Any] | None = None, schema: str = "") -> Path:
    """Make a folder of an artifact with the options of its export; without a manifest if there are none."""
    folder = run / name
    folder.mkdir(parents=True)
    (run / "config.yaml").write_text("finetune: {}\n")
    if options is not None:
        (folder / MANIFEST).write_text(json.dumps({"format": 2, "options": options}))
    if schema:
        (folder / "schema.json").write_text(schema)
    return folder


def parsed(command: str) -> dict[str, Any]:
    """Parse a command as the command line does; return the options that are not at their defaults."""
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("qat-edge", "export")
    context = commands.export.make_context("export", arguments)
    return {name: value for name, value in context.params.items() if value not in (None, (), False)}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("exports/gguf", {"context_length": 1024}, {"target": ("gguf",), "ptq": ("none",)}),
        ("exports/hf", None, {"target": ("hf",), "ptq": ("none",)}),
        ("exports/onnx", {"context_length": 64}, {"target": ("onnx",), "ptq": ("none",), "context_length": 64}),
        ("ptq/gptq/exports/gguf", {}, {"target": ("gguf",), "ptq": ("gptq",)}),
        ("ptq/cd/exports/gguf", {}, {"target": ("gguf",), "ptq": ("coordinate-descent",)}),
        (
            "exports/executorch",
            {"kv_cache": "int8", "portable": False},
            {"target": ("executorch",), "ptq": ("none",), "kv_cache": "int8"},
        ),
        ("exports/executorch", {"portable": True}, {"target": ("executorch",), "ptq": ("none",), "portable": True}),
        ("exports/executorch-vulkan", {}, {"target": ("executorch",), "ptq": ("none",), "backend": "vulkan"}),
    ],
)
def test_the_command_writes_that_artifact_with_its_options(
    tmp_path: Path, name: str, options: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    command = export_again(artifact(tmp_path, name, options))
    assert parsed(command) == {"run": tmp_path, "force": True, **expected}


def test_the_schema_is_that_of_the_run_or_of_the_export(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "exports/gguf", {"schema": "tools"}, SCHEMA)
    assert " --schema tools --force" in export_again(folder)
    (tmp_path / "schema.json").write_text(SCHEMA)
    assert f" --schema {tmp_path}/schema.json --force" in export_again(folder)
    (tmp_path / "schema.json").write_text('{"type": "null"}\n')
    assert " --schema tools --force" in export_again(folder)
    (folder / MANIFEST).unlink()
    assert " --schema FILE --force" in export_again(folder)


def test_folders_that_export_does_not_write(tmp_path: Path) -> None:
    folder = artifact(tmp_path, "compare/deployments/gptq/exports/onnx", {})
    assert export_again(folder) == f"qat-edge compare {tmp_path} --force"
    assert export_again(tmp_path / "exports" / "another") == f"qat-edge export {tmp_path} --force"


def test_targets_that_a_run_does_not_have(tmp_path: Path) -> None:
    assert export_targets(tmp_path, []) == f"qat-edge export {tmp_path}"
    assert export_targets(tmp_path, ["gguf", "hf"]) == f"qat-edge export {tmp_path} --target gguf --target hf"
    coreml, vulkan = export_targets(tmp_path, ["executorch-coreml", "executorch-vulkan"]).split("` and `")
    assert coreml.endswith("--backend coreml") and parsed(vulkan)["backend"] == "vulkan"


def test_messages_have_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artifact(tmp_path, "exports/gguf", schema=SCHEMA)
    (tmp_path / "schema.json").write_text(SCHEMA)
    command = f"qat-edge export {tmp_path} --target gguf --ptq none --schema {tmp_path}/schema.json --force"
    with pytest.raises(RunError) as caught:
        read_manifest(folder)
    assert f"`{command}`" in str(caught.value)

    # The report leaves out where the run is, and keeps the command whole.
    missing: dict[str, str] = {}
    _exports(Run(tmp_path), missing)
    shown = _without_path(missing["exports/gguf"], tmp_path)
    assert shown.startswith("exports/gguf is damaged") and f"`{command.replace(str(tmp_path), 'RUN')}`" in shown

    with pytest.raises(RunError, match=r"onnx not exported yet. Run `qat-edge export .* --target onnx`"):
        verify(Run(tmp_path), ["onnx"])
    monkeypatch.setattr("qat_edge.models.tasks.require_causal_lm", lambda *_: None)
    with pytest.raises(RunError, match=r"onnx is missing. `qat-edge export .* --target onnx` makes it"):
        find_model(Run(tmp_path), "onnx", "generate")
