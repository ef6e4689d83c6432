"""The demo, on a tiny model given by a configuration file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qat_edge.demo_data import assistant
from qat_edge.errors import QatEdgeError
from qat_edge.run import Run
from qat_edge.verbs.demo import demo


@pytest.fixture
def configuration(tiny_model_folder: Path, tmp_path: Path) -> Path:
    train, held_out = assistant.write(tmp_path / "data")
    path = tmp_path / "demo.yaml"
    sections = {
        "finetune": {
            "model": str(tiny_model_folder), "data": str(train), "eval_data": str(held_out), "steps": 2,
            "batch_size": 2, "eval_rows": 2, "track": ["none"],
        },
        "export": {"target": "executorch", "context_length": 256, "ptq": []},
        "validate": {"tokens": 64, "prompts": 1, "max_new_tokens": 4, "prefill": 4, "decode": 2, "repeats": 1},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(sections))
    return path


def test_runs_every_stage(configuration: Path, tmp_path: Path, messages: list[str]) -> None:
    stages = demo(tmp_path / "demo", configuration)
    assert [s.name for s in stages] == ["finetune", "export", "verify", "validate", "report", "generate"]
    assert all(s.wall_s > 0 and s.peak_memory_bytes > 10_000_000 for s in stages)
    assert Run(tmp_path / "demo").report_html.is_file()
    assert [line.split()[2] for line in messages if line.startswith("\n$ qat-edge")] == [s.name for s in stages]


def test_stops_at_the_stage_that_fails(configuration: Path, tmp_path: Path) -> None:
    configuration.write_text(configuration.read_text().replace("context_length: 256", "context_length: 99999"))
    with pytest.raises(QatEdgeError, match="`qat-edge finetune` ended with exit code 1"):
        demo(tmp_path / "demo", configuration)
