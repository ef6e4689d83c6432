"""SmolLM2-135M-Instruct, rounded to nearest and exported: the same codes, and the same function but for noise.

Minutes, not seconds: `pytest -m model` selects these, `-m "not model"` leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qat_edge.data import tokenization
from qat_edge.data.formats import Chat, Row
from qat_edge.demo_data import assistant
from qat_edge.evaluate.metrics import LogitComparison, first_divergence
from qat_edge.evaluate.reference import disturbed, generate, load_exact
from qat_edge.manifest import write_manifest
from qat_edge.models import load
from qat_edge.models.demo_model import fetch_demo_model
from qat_edge.quant import frozen, scheme
from qat_edge.verbs.verify import verify_folder
from qat_edge_devices import open_runtime, open_transport
from qat_edge_devices.transport import Access
from qat_edge_exporters.targets import DEFAULT_FORMATS, target_named
from tests.devices.device_fixtures import device_under_test

pytestmark = pytest.mark.model

CACHE = Path(__file__).parents[1] / ".cache" / "qat-edge"
PROMPTS = 20
FLOOR_SEEDS = 3
NEW_TOKENS = 16
MARGIN = 1.5  # of the floor's spread over seeds; a fault (one doubled scale) costs several times the floor


@dataclass(frozen=True)
class Exported:
    """The frozen checkpoint, its artifacts by target, and conversations to compare them on."""

    quantized: Path
    folders: dict[str, Path]
    tokenizer: Any
    conversations: list[list[int]]
    prompts: list[list[int]]


def silent(*_: object) -> None:
    pass


def freeze(folder: Path, layers: Sequence[int] | None = None) -> Any:
    """The real model rounded to nearest, whole or with `layers` alone; returns its tokenizer."""
    model, tokenizer, _ = load.load_model(fetch_demo_model(CACHE))
    if layers is not None:
        model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
        model.config.num_hidden_layers = len(layers)
    plan = scheme.choose_scheme(model, 32)
    frozen.freeze(model, plan)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder, "quantized", scheme=frozen.scheme_metadata(plan))
    return tokenizer


def export(quantized: Path, folder: Path, target: str) -> Path:
    folder.mkdir()
    target_named(target).export(quantized, folder, 256)
    return folder


def conversations(tokenizer: Any, count: int) -> list[Row]:
    return [Chat(row["messages"], str(i)) for i, row in enumerate(assistant.rows("eval", count))]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("real")
    tokenizer = freeze(folder / "quantized")
    folders = {target: export(folder / "quantized", folder / target, target) for target in DEFAULT_FORMATS}
    rows = conversations(tokenizer, PROMPTS)
    return Exported(
        quantized=folder / "quantized",
        folders=folders,
        tokenizer=tokenizer,
        conversations=[row["input_ids"] for row in tokenization.tokenize(rows, tokenizer, 128).rows],
        prompts=[prompt.ids for prompt in tokenization.prompts(rows, tokenizer)],
    )


@pytest.fixture(scope="module")
def exact(exported: Exported) -> Any:
    return load_exact(exported.quantized)


def torch_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([list(ids)])).logits[0].numpy())


def artifact_logits(target: str, folder: Path, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    with closing(open_transport("local")) as transport:
        runtime = open_runtime(target, transport, threads=2)
        runtime.prepare(folder)
        return [np.load(scored.logits) for scored in runtime.score(sequences)]


def compared(reference: Sequence[np.ndarray], candidate: Sequence[np.ndarray], sequences: Sequence[list[int]]) -> Any:
    comparison = LogitComparison()
    for one, other, ids in zip(reference, candidate, sequences, strict=True):
        comparison.add(one[: len(ids) - 1], other[: len(ids) - 1], np.array(ids[1:]))
    return comparison.result()


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
def test_every_layer_is_equal(exported: Exported, target: str) -> None:
    found = verify_folder(exported.folders[target], target, exported.quantized)
    assert (found.linears_equal, found.linears, found.faults) == (210, 210, [])


def test_the_pte_agrees_down_to_the_noise_floor(exported: Exported, exact: Any) -> None:
    plain = [torch_logits(exact, ids) for ids in exported.conversations]
    floors = []
    for seed in range(FLOOR_SEEDS):
        with disturbed(exact, seed):
            noisy = [torch_logits(exact, ids) for ids in exported.conversations]
        floors.append(compared(plain, noisy, exported.conversations))
    found = compared(
        plain,
        artifact_logits("executorch", exported.folders["executorch"], exported.conversations),
        exported.conversations,
    )
    assert found.kl_nats <= MARGIN * max(f.kl_nats for f in floors)
    assert 1 - found.top1_agreement <= MARGIN * max(1 - f.top1_agreement for f in floors)
    assert found.sqnr_db >= min(f.sqnr_db for f in floors) - 3


def test_greedy_answers_part_only_where_the_choice_is_within_the_noise(exported: Exported, exact: Any) -> None:
    eos = [exported.tokenizer.eos_token_id]
    expected = [generate(exact, [ids], eos, NEW_TOKENS, eos[0])[0] for ids in exported.prompts]
    with closing(open_transport("local")) as transport:
        runtime = open_runtime("executorch", transport, threads=2)
        runtime.prepare(exported.folders["executorch"])
        found = [a.ids for a in runtime.generate(exported.prompts, eos, NEW_TOKENS).completions]
    for prompt, ours, theirs in zip(exported.prompts, expected, found, strict=True):
        parting = first_divergence(ours, theirs)
        if parting is None:
            continue
        prefix = [*prompt, *ours[:parting]]
        logits = torch_logits(exact, prefix)[-1]
        chosen = [([*ids, eos[0]])[parting] for ids in (ours, theirs)]
        noise = []
        for seed in range(8):
            with disturbed(exact, seed):
                noise.append(np.abs(torch_logits(exact, prefix)[-1] - logits)[chosen].max())
        # Both choices move by the noise, one up and one down.
        assert logits[chosen[0]] - logits[chosen[1]] <= 2 * max(noise)


@pytest.mark.parametrize("layer", [0, 15, 29])
def test_a_layer_from_equal_inputs_agrees_to_float_rounding(layer: int, tmp_path: Path) -> None:
    """Embedding, one layer and head: where no int8 activation sits on a tie, only the order of sums differs."""
    tokenizer = freeze(tmp_path / "quantized", [layer])
    folder = export(tmp_path / "quantized", tmp_path / "executorch", "executorch")
    ids = tokenization.tokenize(conversations(tokenizer, 4), tokenizer, 64).rows
    sequences = [row["input_ids"] for row in ids]
    model = load_exact(tmp_path / "quantized")
    decibels = []
    for row, found in zip(sequences, artifact_logits("executorch", folder, sequences), strict=True):
        expected = torch_logits(model, row)
        noise = ((expected - found) ** 2).sum(axis=1)
        decibels += (10 * np.log10((expected**2).sum(axis=1) / np.maximum(noise, 1e-30))).tolist()
    assert np.median(decibels) > 110


def asked_there(
    device: str, access: Access | None, exported: Exported, target: str
) -> tuple[list[np.ndarray], list[tuple[int, ...]]]:
    """Logits of a few tokens and short answers; what it takes to time them is done too."""
    with closing(open_transport(device, access)) as transport:
        runtime = open_runtime(target, transport, threads=1)
        runtime.prepare(exported.folders[target])
        logits = [np.load(scored.logits) for scored in runtime.score([ids[:24] for ids in exported.conversations[:2]])]
        answers = runtime.generate(exported.prompts[:1], [exported.tokenizer.eos_token_id], 4).completions
        speed = runtime.speed(prefill=8, decode=2, repeats=1)
    assert min(speed.decode_tokens_per_s) > 0 and speed.load.artifact_rss_bytes > 0
    return logits, [answer.ids for answer in answers]


@pytest.mark.parametrize("target", DEFAULT_FORMATS)
@pytest.mark.parametrize("way", ["ssh", "adbd"])
def test_a_device_that_is_reached_answers_as_this_machine_does_and_is_sent_the_artifact_once(
    exported: Exported, way: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = asked_there("local", None, exported, target)
    artifact = max(path.stat().st_size for path in exported.folders[target].iterdir())
    with device_under_test(way, tmp_path / way, monkeypatch) as found:
        assert found.sent is not None
        counts = [found.sent()]
        for _ in range(2):
            there = asked_there(found.device, found.access, exported, target)
            for one, other in zip(here[0], there[0], strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
            assert there[1] == here[1]
            counts.append(found.sent())
    first, second = (after - before for before, after in pairwise(counts))
    assert first > artifact > 50 * 10**6 and second < 10**6
