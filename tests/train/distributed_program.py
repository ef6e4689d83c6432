"""Train in several processes: `start` starts this program in each of them, with the jobs to do one after another."""

from __future__ import annotations

import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from qat_edge.options import FinetuneOptions
from qat_edge.python_process import python_command
from qat_edge.train import checkpoints, distributed
from qat_edge.train.setup import choose_device
from qat_edge.train.sharded_base import held_bytes
from qat_edge.verbs.finetune import finetune

ROOT = Path(__file__).parents[2]


def start(jobs: list[dict[str, Any]], folder: Path, processes: int = 2, **variables: str) -> list[str]:
    """Do jobs in several processes that find each other as those of several machines do; return their outputs.

    A job has the "options" of finetune and "out"; a run to continue also "copy_of" and "step", its last checkpoint; one
    that diverges "nan_at", the step after which it does.
    """
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            python_command("tests.train.distributed_program", str(file)),
            env={
                **os.environ, "WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR", **variables,
                "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    return outputs


def begin_at(run: Path, copy: Path, step: int) -> None:
    """Copy a finished run as one that was killed after a step."""
    shutil.copytree(run, copy)
    for path in checkpoints.found(copy / "checkpoints"):
        if checkpoints.step_of(path) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "adapter")
    (copy / "training.json").unlink()


class HeldBytes(TrainerCallback):
    """Write how many bytes of the frozen weights this process holds after each step, and how many there are."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_step_end(self, *state: Any, model: Any, **kwargs: Any) -> None:
        """Add a line to a file of this process."""
        with self.out.with_name(f"{self.out.name} held by {distributed.rank()}.jsonl").open("a") as file:
            file.write(json.dumps(held_bytes(model)) + "\n")


class SpoiledAdapter(TrainerCallback):
    """Fill a trained parameter with NaN before the step that follows a step."""

    def __init__(self, after: int | None) -> None:
        self.after = after

    def on_step_begin(self, args: Any, state: TrainerState, *control: Any, model: Any, **kwargs: Any) -> None:
        """Spoil it."""
        if state.global_step == self.after:
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))


def _do(job: dict[str, Any]) -> None:
    options = FinetuneOptions(**{k: tuple(v) if isinstance(v, list) else v for k, v in job["options"].items()})
    out = Path(job["out"])
    distributed.join(choose_device(options.device))
    if "copy_of" in job:
        distributed.on_first(lambda: begin_at(Path(job["copy_of"]), out, job["step"]))
    finetune(options, out, resume="copy_of" in job, callbacks=[HeldBytes(out), SpoiledAdapter(job.get("nan_at"))])
    assert not any(type(each) is DTensor for each in gc.get_objects()), "shards are held after the last step"


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        _do(each)
