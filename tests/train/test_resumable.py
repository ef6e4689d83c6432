"""Checkpoints that are whole, but changed by somebody who entered the new hashes too: none runs code or trains on.

The same for a run without the record of what it began with.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from conftest import train_run
from qat_edge import config
from qat_edge.cli.commands import main
from qat_edge.errors import RunError
from qat_edge.manifest import file_entry
from qat_edge.options import FinetuneOptions
from qat_edge.run import Run
from qat_edge.train.checkpoints import MARKER, STATE
from qat_edge.verbs.finetune import finetune


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_run(tiny_model_folder, tmp_path_factory.mktemp("resumable"))


@pytest.fixture
def checkpoint(trained: Run, tmp_path: Path) -> Path:
    """The checkpoint of step 2 of a run that was stopped after it."""
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "checkpoint-4")
    return run.checkpoints / "checkpoint-2"


def resume(checkpoint: Path) -> None:
    """Continue the run, after listing the files of its checkpoint as they are."""
    files = {p.name: file_entry(p) for p in checkpoint.iterdir() if p.is_file() and p.name != MARKER}
    (checkpoint / MARKER).write_text(json.dumps({"step": 2, "files": files}))
    run = Run(checkpoint.parent.parent)
    finetune(config.load(FinetuneOptions, "finetune", run.config, {}), run.path, resume=True)


def refusal(checkpoint: Path, file: str) -> str:
    """The message that refuses a file of the checkpoint."""
    with pytest.raises(RunError) as caught:
        resume(checkpoint)
    text = str(caught.value)
    assert str(checkpoint / file) in text and "weights_only" not in text and "\n" not in text
    assert not (checkpoint.parent.parent / "adapter").exists()
    return text


class Harmful:
    """Pickled as a call that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_pickle_does_not_run(checkpoint: Path, tmp_path: Path, name: str) -> None:
    torch.save({"state": Harmful(tmp_path / "ran")}, checkpoint / name)
    assert "holds code in place of tensors" in refusal(checkpoint, name)
    (checkpoint / name).write_bytes(b"junk")
    assert "damaged" in refusal(checkpoint, name)
    (checkpoint / name).unlink()
    assert "it is missing" in refusal(checkpoint, name)
    assert not (tmp_path / "ran").exists()


def test_arguments_that_nobody_reads_do_no_harm(checkpoint: Path, tmp_path: Path) -> None:
    torch.save(Harmful(tmp_path / "ran"), checkpoint / "training_args.bin")
    resume(checkpoint)
    assert not (tmp_path / "ran").exists() and (checkpoint.parent.parent / "adapter").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "model.safetensors"])
def test_files_that_would_be_read_instead_are_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_bytes(b"x")
    assert "does not write it" in refusal(checkpoint, name)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"global_step": 3}, "'global_step' is 3, expected 2"),
        ({"global_step": "2"}, "'global_step' is '2', expected 2"),
        ({"max_steps": 9}, "'max_steps' is 9, expected 4"),
        ({"epoch": "x"}, "'epoch' is 'x', expected a number"),
        ({"log_history": 3}, "'log_history' is not a list"),
        ({"log_history": []}, "the losses of 0 steps, expected those of steps 1 to 2"),
        ({"log_history": [{"loss": "low", "step": 1}]}, "holds a 'loss' that is no number"),
        ({"train_batch_size": "x"}, "'train_batch_size' is 'x'"),
        ({"stateful_callbacks": 3}, "'stateful_callbacks' is 3"),
        ({"more": 1}, "'more' is none of its entries"),
    ],
)
def test_a_state_of_another_training_is_named(checkpoint: Path, entries: dict[str, Any], words: str) -> None:
    path = checkpoint / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    assert words in refusal(checkpoint, STATE)


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        ("optimizer.pt", lambda saved: saved["state"][0].update(exp_avg=torch.zeros(3)), "of parameter 0 has another"),
        ("optimizer.pt", lambda saved: saved["state"][0]["exp_avg"].fill_(float("nan")), "is not finite"),
        ("optimizer.pt", lambda saved: saved["state"].update({99: {}}), "its entry 99 is not"),
        ("optimizer.pt", lambda saved: saved["param_groups"].pop(), "other groups of parameters"),
        ("optimizer.pt", lambda saved: saved["param_groups"][0].update(weight_decay=9.0), "'weight_decay' of the"),
        ("scheduler.pt", lambda saved: saved.update(last_epoch=1), "'last_epoch' of the schedule"),
        ("scheduler.pt", lambda saved: saved.update(base_lrs=[5.0, 5.0]), "'base_lrs' of the schedule"),
        ("scheduler.pt", lambda saved: saved.update(_last_lr="x"), "'_last_lr' of the schedule"),
        ("rng_state.pth", lambda saved: saved.update(cpu=torch.zeros(3)), "generator 'cpu' cannot be set"),
    ],
)
def test_what_does_not_fit_the_training_is_named(
    checkpoint: Path, name: str, edit: Callable[[Any], None], words: str
) -> None:
    saved = torch.load(checkpoint / name, weights_only=False)  # written a moment ago by this test
    edit(saved)
    torch.save(saved, checkpoint / name)
    assert words in refusal(checkpoint, name)


def test_every_trained_tensor_has_to_be_there(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    assert f"1 tensor missing ({name})" in refusal(checkpoint, path.name)


# --- the record of what a run began with -------------------------------------------------------------------


@pytest.mark.parametrize("record", [None, "{}"])
def test_without_the_record_nothing_is_trained(trained: Run, tmp_path: Path, record: str | None) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.checkpoints)
    if record is not None:
        run.checkpoints.mkdir()
        (run.checkpoints / "inputs.json").write_text(record)
    (run.path / "training.json").unlink()
    run.config.write_text(run.config.read_text().replace("seed: 0", "seed: 7"))
    left = {p for p in run.path.rglob("*") if p.name != ".lock"}
    for advice in ("train again with --force", "train with another --out"):
        with pytest.raises(RunError, match=rf"inputs\.json is missing or empty, .*Restore the file, or {advice}\."):
            finetune(config.load_trained(run.config), run.path, resume=True)
        assert {p for p in run.path.rglob("*") if p.name != ".lock"} == left
        # --force accepts a folder with an adapter, and no other without the record.
        left -= {run.adapter, *run.adapter.rglob("*")}
        shutil.rmtree(run.adapter, ignore_errors=True)


def test_a_finished_run_without_the_record_is_kept(trained: Run, tmp_path: Path, messages: list[str]) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    shutil.rmtree(run.checkpoints)
    finetune(config.load_trained(run.config), run.path, resume=True)
    assert any("inputs.json is missing or empty, so it is not known whether options," in line for line in messages)
    assert "is finished: all 4 steps are done" in messages[-1]
    # Nothing claims that the run was trained with what config.yaml has now.
    assert not run.checkpoints.exists()


def test_a_record_without_options_is_named(checkpoint: Path, messages: list[str]) -> None:
    path = checkpoint.parent / "inputs.json"
    record = json.loads(path.read_text())
    record.pop("options")
    path.write_text(json.dumps(record))
    resume(checkpoint)
    assert any("inputs.json has no options, as an earlier version of qat-edge wrote it" in line for line in messages)
    assert "options" in json.loads(path.read_text())


@pytest.mark.parametrize("text", ["", "finetune: {}\n", "quantize: {}\n"])
@pytest.mark.parametrize("flags", [(), ("--model", "m", "--data", "d"), ("--config", "own.yaml")])
def test_an_emptied_record_of_options_is_named(trained: Run, tmp_path: Path, text: str, flags: tuple[str, ...]) -> None:
    run = Run(Path(shutil.copytree(trained.path, tmp_path / "run")))
    own = tmp_path / "own.yaml"
    shutil.copy(run.config, own)
    run.config.write_text(text)
    given = [str(own) if flag == own.name else flag for flag in flags]
    result = CliRunner().invoke(main, ["finetune", "--resume", "--out", str(run.path), *given])
    message = " ".join(result.stderr.split())
    assert result.exit_code == 1, result.output
    assert f"{run.config}: the section 'finetune' has no 'model'." in message
    assert "The file is the record of the training. Restore it, or train again." in message
