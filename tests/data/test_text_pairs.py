"""A classifier of text pairs: the model computes token types itself, in training, in torch and in the .pte file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from conftest import train_run
from qat_edge.data import training_examples
from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError
from qat_edge.models import tasks
from qat_edge.models.merge import base_model
from qat_edge.models.tasks import SequenceClassifier
from qat_edge.options import ExportOptions
from qat_edge.quant import frozen
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge_exporters.targets import target_named

WORDS = ["[PAD]", "[CLS]", "[SEP]", "the", *(f"w{i}" for i in range(28))]
LABELS = ("other", "same")
TARGETS = ("executorch", "onnx")
MOST_SHARE = 0.5  # of the effect of token types, all of which an artifact without them misses; on x86 ONNX has 0.23
ROWS = [
    {"text": f"the w{i % 7}", "text_pair": f"w{i % 7 + i % 2} the w1", "label": LABELS[(i + 1) % 2]} for i in range(32)
]


def make_tokenizer() -> Any:
    """A word-level tokenizer that inserts separators like BERT's."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


def make_config() -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, id2label=dict(enumerate(LABELS)), label2id={"other": 0, "same": 1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run trained on pairs, frozen and exported."""
    root = tmp_path_factory.mktemp("pairs")
    torch.manual_seed(0)
    model = BertForSequenceClassification(make_config())
    # Ten times as large as other embeddings, so that their effect is far above that of rounding.
    torch.nn.init.normal_(model.bert.embeddings.token_type_embeddings.weight, std=0.2)
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    made = train_run(root / "model", root, ROWS)
    export(made, ExportOptions(target=TARGETS, ptq=("none",)))
    return made


@pytest.mark.parametrize(("text", "pair"), [("the w1", "w2 w3 the"), ("w1", None), ("w1 " * 9, "w2 " * 20), ("", "w1")])
def test_token_types_are_those_of_the_tokenizer(text: str, pair: str | None) -> None:
    given = make_tokenizer()(
        text,
        pair,
        truncation=True,
        max_length=16,
        padding="max_length",
        return_token_type_ids=True,
        return_tensors="pt",
    )
    kept = given.attention_mask.bool()
    found = tasks.token_types(given.input_ids, given.attention_mask)
    assert torch.equal(found[kept], given.token_type_ids[kept])


def test_the_model_computes_token_types_in_torch_and_in_the_artifact(run: Run) -> None:
    task = tasks.task_of_run(run)
    assert task == SequenceClassifier(LABELS, pairs=True)

    # The tokenizer's types are the reference; neither our models nor the artifact are given any.
    rows = [make_tokenizer()(row["text"], row["text_pair"], return_token_type_ids=True) for row in ROWS[:8]]
    artifacts = {
        target: target_named(target).run_encoder(run.exports / target, [row.input_ids for row in rows])
        for target in TARGETS
    }
    # Plain transformers, of the base and of the frozen checkpoint.
    frozen_alone = AutoModelForSequenceClassification.from_pretrained(run.quantized).eval()
    plain = BertForSequenceClassification(make_config()).eval()
    plain.load_state_dict(base_model(run.adapter).state_dict())

    effects: list[Tensor] = []
    differences: dict[str, list[Tensor]] = {target: [] for target in TARGETS}
    for ours, theirs in ((base_model(run.adapter), plain), (frozen.load(run.quantized), frozen_alone)):
        for index, row in enumerate(rows):
            ids, mask, types = (torch.tensor([row[k]]) for k in ("input_ids", "attention_mask", "token_type_ids"))
            with torch.no_grad():
                found = task.predict(ours, ids, mask)
                torch.testing.assert_close(found, theirs(ids, mask, types).logits)
                type_effect = found - theirs(ids, mask, types * 0).logits
            assert bool(type_effect.any())
            if theirs is frozen_alone:
                effects.append(type_effect.flatten())
                for target in TARGETS:
                    differences[target].append((found - torch.from_numpy(artifacts[target][index])).flatten())
    # An artifact without types would be off by the effect of the types; rounding has another direction in each row.
    effect = torch.cat(effects)
    for target, rows_found in differences.items():
        share = torch.cat(rows_found) @ effect / (effect @ effect)
        assert abs(float(share)) < MOST_SHARE, (target, share)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1", "text_pair": 3, "label": "same"}, "1: 'text_pair' must be a string, found a number"),
        ({"text": "w1 [SEP] w2", "text_pair": "w3", "label": 1}, "1: the tokenizer begins the second text elsewhere"),
    ],
)
def test_unusable_pairs_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    model = BertForSequenceClassification(make_config())
    with pytest.raises(DataError, match=message):
        training_examples.tokenize_for_task(
            SequenceClassifier(LABELS, pairs=True), load_rows(str(tmp_path / "rows.jsonl")), model, make_tokenizer(), 16
        )


def test_pairs_for_a_classifier_of_single_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    rows, model = load_rows(str(tmp_path / "rows.jsonl")), BertForSequenceClassification(make_config())
    with pytest.raises(DataError, match="1: two texts, but the classifier is trained on single texts"):
        training_examples.tokenize_for_task(SequenceClassifier(LABELS), rows, model, make_tokenizer(), 16)
