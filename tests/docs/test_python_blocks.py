"""Python in the documentation compiles, uses names that exist, and runs where it is marked as runnable."""

from __future__ import annotations

import ast
import contextlib
import json
from importlib import import_module
from pathlib import Path

import pytest

from tests.docs.doc_pages import README, CodeBlock, code_blocks

BLOCKS = code_blocks("python")
RUNNABLE = [block for block in BLOCKS if block.runnable]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Blocks that train a run of their own; the others read the run of README's block.
TRAINING = [block for block in RUNNABLE if "finetune(" in block.code]
READING = [block for block in RUNNABLE if "finetune(" not in block.code]
# The real sizes, and what stands for them in a test of a few seconds: the tiny model has fewer positions than the
# default context, and two exports are enough.
SMALLER = {
    "steps=200": "steps=5, batch_size=4, max_length=64, track=('none',)",
    "export(trained.run": "export(trained.run, context_length=128, ptq=['none']",
    "tokens=2048, prompts=64": "tokens=64, window=32, prompts=2, max_new_tokens=4, prefill=4, decode=2, repeats=1",
    'source="executorch"': 'source="executorch", max_new_tokens=4',
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_python_block_compiles(block: CodeBlock) -> None:
    compile(block.code, block.name, "exec")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_every_imported_name_exists(block: CodeBlock) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "trl":
                pytest.importorskip("trl", reason="trl is not installed: pip install 'qat-edge[trl]'")
            module = import_module(node.module)
            for alias in node.names:
                # A name of the module, or a module in it that nothing has imported yet.
                assert hasattr(module, alias.name) or import_module(f"{node.module}.{alias.name}")


def test_some_blocks_are_runnable() -> None:
    assert {block.page.name for block in TRAINING} == {"README.md", "quickstart.md"}
    assert {block.page.name for block in READING} >= {"verify.md", "frozen-checkpoint.md", "errors.md"}


def _run(block: CodeBlock, model: Path, folder: Path) -> None:
    """Execute a block in a folder, with the tiny model and small sizes in place of its own."""
    code = block.code
    for text, smaller in {MODEL: str(model), **SMALLER}.items():
        code = code.replace(text, smaller)
    with contextlib.chdir(folder):
        exec(compile(code, block.name, "exec"), {"__name__": "documentation"})


def _write_rows(folder: Path) -> None:
    """Write the two data files that the blocks name."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f'{{"n":{i}}}'}]}
        for i in range(40)
    ]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder_with_run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which README's block has run: it holds runs/mine."""
    folder = tmp_path_factory.mktemp("readme")
    _write_rows(folder)
    _run(next(block for block in TRAINING if block.page == README), tiny_model_folder, folder)
    return folder


def test_the_block_of_readme_runs(folder_with_run: Path) -> None:
    exports = folder_with_run / "runs" / "mine" / "exports"
    assert {path.name for path in exports.iterdir()} == {"executorch", "onnx"}


@pytest.mark.parametrize("block", READING, ids=lambda block: block.name)
def test_blocks_that_read_a_run(block: CodeBlock, tiny_model_folder: Path, folder_with_run: Path) -> None:
    _run(block, tiny_model_folder, folder_with_run)


def test_the_quickstart_runs(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_rows(tmp_path)
    _run(next(block for block in TRAINING if block.page != README), tiny_model_folder, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("14 of 14 linear layers equal, embedding equal, head equal") == 2
    assert "qat onnx" in printed
