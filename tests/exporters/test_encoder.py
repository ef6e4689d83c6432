"""Encoders on every target: the outputs of the frozen torch model, and its codes and scales read back.

`test_onnx_encoder` has what only ONNX folders have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import onnxruntime
import pytest
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from tiny import CONTEXT, TinyExport, export_into, export_to, freeze, sqnr
from torch import Tensor
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PretrainedConfig,
    RobertaConfig,
    T5Config,
)

from qat_edge.diagnose import parity
from qat_edge.diagnose.runtime_rounding import Rounding, emulate_rounding, rounding_of
from qat_edge.errors import ArtifactError, ExportError
from qat_edge.evaluate import reference
from qat_edge.models import artifact_options, tasks
from qat_edge.models.tasks import ModelTask, SentenceEncoder, SequenceClassifier
from qat_edge.quant import frozen
from qat_edge.verbs.verify import verify_folder
from qat_edge_devices.processor import this_processor
from qat_edge_exporters.executorch.pte.inspection import inspect
from qat_edge_exporters.targets import target_named

POSITIONS = 48  # fewer than CONTEXT
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS, "pad_token_id": 1,
}  # fmt: skip
DISTIL: dict[str, Any] = {
    "vocab_size": 288, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": POSITIONS,
}  # fmt: skip
FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], ModelTask]] = {
    "bert": (lambda: BertConfig(**SIZES, num_labels=3), SequenceClassifier()),
    "distilbert": (lambda: DistilBertConfig(**DISTIL, num_labels=2), SequenceClassifier()),
    # Positions begin after the padding's; its head is two layers.
    "roberta": (lambda: RobertaConfig(**SIZES | {"max_position_embeddings": POSITIONS + 2}), SequenceClassifier()),
    "minilm": (lambda: BertConfig(**SIZES | {"num_hidden_layers": 3}), SentenceEncoder()),
}
# Float rounding may move an int8 input across a tie: 33 dB was measured where that happened (DistilBERT in
# onnxruntime), above 110 elsewhere. Padding with a mask moved none; without one, outputs differ by 31 dB or less.
LEAST_DB, PADDED_DB = 30, 40
TARGETS = ("executorch", "onnx")


def outputs(exported: TinyExport, ids: Tensor, mask: Tensor) -> Tensor:
    """Return the outputs of an artifact in its runtime, loaded without a line of ours."""
    if exported.pte.is_file():
        return torch.as_tensor(_load_for_executorch(str(exported.pte)).forward((ids, mask))[0])
    session = onnxruntime.InferenceSession(str(exported.folder / "model.onnx"))
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    return torch.from_numpy(found)


def text(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 288, (1, length), generator=generator), torch.ones(1, length, dtype=torch.int64)


@contextmanager
def rounding_as(exported: TinyExport, target: str) -> Iterator[Any]:
    """Yield the frozen model, rounding as the target's runtime does on this machine."""
    rounding = (rounding_of(exported.folder, target, int8_cache=False) or Rounding()).on(this_processor())
    if not rounding.blocks:  # as training does
        with torch.no_grad():
            yield frozen.load(exported.frozen)
        return
    model, names = reference.load_dequantized(exported.frozen)
    with emulate_rounding(model, names, rounding), torch.no_grad():
        yield model


@dataclass(frozen=True)
class Made:
    """One artifact of a tiny encoder."""

    target: str
    exported: TinyExport
    task: ModelTask


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelTask]:
    config, task = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    freeze(config(), 32, folder / "frozen", task=task)
    return folder, task


@pytest.fixture(scope="module", params=TARGETS)
def made(request: pytest.FixtureRequest, family: tuple[Path, ModelTask]) -> Made:
    folder, task = family
    return Made(request.param, export_to(request.param, folder / "frozen", folder / request.param), task)


def test_outputs_are_those_of_the_frozen_model(made: Made) -> None:
    with rounding_as(made.exported, made.target) as model:
        for length in (2, 3, 17, POSITIONS):
            ids, mask = text(length)
            expected = made.task.predict(model, ids, mask)
            found = outputs(made.exported, ids, mask)
            assert found.shape == expected.shape and sqnr(expected, found) > LEAST_DB
            if isinstance(made.task, SentenceEncoder):
                assert found.norm() == pytest.approx(1, abs=1e-5)


def test_padding_does_not_change_the_output(made: Made) -> None:
    ids, mask = text(9)
    padded = torch.nn.functional.pad(ids, (0, 7), value=1), torch.nn.functional.pad(mask, (0, 7))
    alone = outputs(made.exported, ids, mask)
    assert sqnr(alone, outputs(made.exported, *padded)) > PADDED_DB
    assert sqnr(alone, outputs(made.exported, padded[0], torch.ones_like(padded[0]))) < PADDED_DB


def test_codes_and_scales_are_read_back(made: Made) -> None:
    exported, task = made.exported, made.task
    result = verify_folder(exported.folder, made.target, exported.frozen)
    assert result.faults == [] and result.embedding_equal and result.floats == result.floats_equal
    assert result.head_equal is (True if isinstance(task, SequenceClassifier) else None)
    scheme = frozen.read_scheme(exported.frozen)
    assert result.linears == result.linears_equal == len(scheme.linears)
    assert bool(scheme.head) == isinstance(task, SequenceClassifier)


def test_the_longest_text_is_held_by_the_files(made: Made) -> None:
    held = target_named(made.target).held_options(made.exported.folder)
    where = {"executorch": "get_max_length of model.pte", "onnx": "max_length in the metadata of model.onnx"}
    assert artifact_options.option_faults({"context_length": CONTEXT}, held) == []
    (fault,) = artifact_options.option_faults({"context_length": POSITIONS - 1}, held)
    assert f"'options.context_length' is {POSITIONS - 1}, but {where[made.target]} is {POSITIONS}." in fault
    assert artifact_options.option_faults({"context_length": CONTEXT, "kv_cache": "int8"}, held) != []


def test_parity_is_measured_and_a_longer_text_is_refused(made: Made) -> None:
    exported, target = made.exported, target_named(made.target)
    found = parity.measure(exported.folder, made.target, parity.FrozenReference(exported.frozen), CONTEXT)
    assert found.fault == "" and found.not_measured == "" and found.tokens == parity.PROMPTS
    longest = target.run_encoder(exported.folder, [[5] * POSITIONS, [5] * 2])
    assert longest.shape == (2, outputs(exported, *text(2)).shape[1])
    with pytest.raises(ArtifactError, match="refused it"):
        target.run_encoder(exported.folder, [[5] * (POSITIONS + 1)])


def test_a_program_has_one_method_for_texts_of_any_length(made: Made) -> None:
    exported = made.exported
    if made.target != "executorch":
        return  # test_onnx_encoder tests the graph
    program = inspect(exported.pte)
    assert program.constants["get_max_length"] == POSITIONS and not program.is_language_model
    width, given = program.constants["get_output_width"], f"int64 [1, <={POSITIONS}]"
    assert str(program.forward) == f"forward({given}, {given}) -> float32 [1, {width}]"
    assert sum(program.size_bytes.values()) == exported.pte.stat().st_size and program.size_bytes["head"] == 0
    assert set(program.delegates) == {"XnnpackBackend"} and sum(program.delegates.values()) <= 5
    others = {name for name in program.operators if not name.startswith(("aten::", "executorch_prim::"))}
    assert others == {"quantized_decomposed::embedding_byte.out"}


def test_two_swapped_tables_are_found(tmp_path: Path) -> None:
    freeze(FAMILIES["bert"][0](), 32, tmp_path / "frozen", task=SequenceClassifier())
    exported = export_into(tmp_path / "frozen", tmp_path / "export")
    layers = json.loads((exported.folder / "layers.json").read_text())
    assert len(layers["tables"]) == 3
    layers["tables"][0], layers["tables"][1] = layers["tables"][1], layers["tables"][0]
    (exported.folder / "layers.json").write_text(json.dumps(layers))
    result = verify_folder(exported.folder, "executorch", exported.frozen)
    assert not result.embedding_equal and result.linears_equal == result.linears


@pytest.mark.parametrize("table_bits", [(8, 8), (4, 8)])
def test_a_portable_program_has_aten_operators_only(tmp_path: Path, table_bits: tuple[int, int]) -> None:
    task = SentenceEncoder()
    model = freeze(FAMILIES["minilm"][0](), 32, tmp_path / "frozen", None, table_bits, task)
    exported = export_into(tmp_path / "frozen", tmp_path / "export", portable=True)
    assert all(name.startswith(("aten::", "executorch_prim::")) for name in inspect(exported.pte).operators)
    assert verify_folder(exported.folder, "executorch", exported.frozen).faults == []
    ids, mask = text(11)
    with torch.no_grad():
        assert sqnr(task.predict(model, ids, mask), outputs(exported, ids, mask)) > LEAST_DB


@pytest.mark.parametrize("options", [{"kv_cache": "int8"}, {"backend": "vulkan"}])
def test_options_of_models_that_generate_text_are_refused(tmp_path: Path, options: dict[str, str]) -> None:
    freeze(FAMILIES["distilbert"][0](), 32, tmp_path / "frozen", task=SequenceClassifier())
    with pytest.raises(ExportError, match="is for models that generate text; distilbert is a sequence classifier"):
        export_into(tmp_path / "frozen", tmp_path / "export", **options)


def test_unsupported_models_are_known_from_their_configuration() -> None:
    for missing in (target_named(name).missing_for for name in TARGETS):
        assert [missing(config()) for config, _ in FAMILIES.values()] == [""] * len(FAMILIES)
        assert "attention of its own" in missing(DebertaV2Config())
        assert "see only a part of the text" in missing(ModernBertConfig())


def test_the_task_follows_from_the_configuration() -> None:
    config = BertConfig(architectures=["BertForSequenceClassification"])
    assert tasks.task_of_config(config) == SequenceClassifier()
    assert tasks.task_of_config(BertConfig(architectures=["BertForMaskedLM"])) == SentenceEncoder()
    assert tasks.task_of_config(BertConfig(is_decoder=True)) == tasks.CAUSAL_LM
    assert not tasks.is_encoder_config(T5Config())
    assert CONTEXT > POSITIONS
