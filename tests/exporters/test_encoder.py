"""Encoders as a .pte: the outputs of the frozen torch model, and its codes and scales read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  operators of the .pte
import pytest
import torch
from executorch.extension.pybindings.portable_lib import _load_for_executorch
from tiny import CONTEXT, TinyExport, export_into, freeze, sqnr
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

from qat_edge.errors import ExportError
from qat_edge.models import artifact_options, tasks
from qat_edge.models.tasks import ModelTask, SentenceEncoder, SequenceClassifier
from qat_edge.quant import frozen
from qat_edge.verbs.verify import verify_folder
from qat_edge_exporters.executorch import pte_support
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
# Float rounding may move an int8 input across a tie: 48 dB was measured where that happened, above 120 elsewhere.
LEAST_DB = 40


def outputs(exported: TinyExport, ids: Tensor, mask: Tensor) -> Tensor:
    return torch.as_tensor(_load_for_executorch(str(exported.pte)).forward((ids, mask))[0])


def text(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, 288, (1, length), generator=generator), torch.ones(1, length, dtype=torch.int64)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyExport, ModelTask]:
    root = tmp_path_factory.mktemp(request.param)
    config, task = FAMILIES[request.param]
    freeze(config(), 32, root / "frozen", task=task)
    return export_into(root / "frozen", root / "export"), task


def test_outputs_are_those_of_the_frozen_model(made: tuple[TinyExport, ModelTask]) -> None:
    exported, task = made
    model = frozen.load(exported.frozen)
    for length in (2, 3, 17, POSITIONS):
        ids, mask = text(length)
        with torch.no_grad():
            expected = task.predict(model, ids, mask)
        found = outputs(exported, ids, mask)
        assert found.shape == expected.shape and sqnr(expected, found) > LEAST_DB
        if isinstance(task, SentenceEncoder):
            assert found.norm() == pytest.approx(1, abs=1e-5)


def test_padding_does_not_change_the_output(made: tuple[TinyExport, ModelTask]) -> None:
    exported, _ = made
    ids, mask = text(9)
    padded = torch.nn.functional.pad(ids, (0, 7), value=1), torch.nn.functional.pad(mask, (0, 7))
    alone = outputs(exported, ids, mask)
    assert sqnr(alone, outputs(exported, *padded)) > LEAST_DB
    assert sqnr(alone, outputs(exported, padded[0], torch.ones_like(padded[0]))) < LEAST_DB


def test_codes_and_scales_are_read_back(made: tuple[TinyExport, ModelTask]) -> None:
    exported, task = made
    result = verify_folder(exported.folder, "executorch", exported.frozen)
    assert result.faults == [] and result.embedding_equal
    assert result.head_equal is (True if isinstance(task, SequenceClassifier) else None)
    scheme = frozen.read_scheme(exported.frozen)
    assert result.linears == result.linears_equal == len(scheme.linears)
    assert bool(scheme.head) == isinstance(task, SequenceClassifier)
    held = target_named("executorch").held_options(exported.folder)
    assert artifact_options.option_faults({"context_length": CONTEXT}, held) == []
    (fault,) = artifact_options.option_faults({"context_length": POSITIONS - 1}, held)
    assert f"'options.context_length' is {POSITIONS - 1}, but get_max_length of model.pte is {POSITIONS}." in fault
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
    assert [pte_support.missing(config()) for config, _ in FAMILIES.values()] == [""] * len(FAMILIES)
    assert "attention of its own" in pte_support.missing(DebertaV2Config())
    assert "see only a part of the text" in pte_support.missing(ModernBertConfig())


def test_the_task_follows_from_the_configuration() -> None:
    config = BertConfig(architectures=["BertForSequenceClassification"])
    assert tasks.task_of_config(config) == SequenceClassifier()
    assert tasks.task_of_config(BertConfig(architectures=["BertForMaskedLM"])) == SentenceEncoder()
    assert tasks.task_of_config(BertConfig(is_decoder=True)) == tasks.CAUSAL_LM
    assert not tasks.is_encoder_config(T5Config())
    assert CONTEXT > POSITIONS
