"""Whatever sentence-transformers computes besides a transformer and a mean is refused, or named in a warning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import BertConfig, BertModel

from conftest import make_tokenizer
from qat_edge.errors import ModelError
from qat_edge.models import load
from qat_edge.models.sentence_modules import check_modules, differences
from qat_edge.models.tasks import SentenceEncoder
from qat_edge.options import FinetuneOptions
from qat_edge.train import setup

PREFIX = "sentence_transformers.models."
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def write(folder: Path, modules: Any, **files: Any) -> Path:
    """Write modules.json from pairs of type and path, and the other files; "__" stands for "/"."""
    folder.mkdir(exist_ok=True)
    if isinstance(modules, list):
        modules = [{"idx": i, "name": str(i), "type": kind, "path": path} for i, (kind, path) in enumerate(modules)]
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    for name, document in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(document))
    return folder


TRANSFORMER, MEAN, NORMALIZE = (
    (f"{PREFIX}Transformer", ""),
    (f"{PREFIX}Pooling", "1_Pooling"),
    (f"{PREFIX}Normalize", "2_Normalize"),
)
CLS = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}


@pytest.mark.parametrize(
    "pooling",
    [
        {"word_embedding_dimension": 32, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True},
        {"pooling_mode": "mean"},
        {"pooling_mode": None, "pooling_mode_mean_tokens": True, "include_prompt": True},
    ],
)
def test_a_mean_of_length_one_is_what_is_computed(tmp_path: Path, pooling: dict[str, Any]) -> None:
    check_modules(str(write(tmp_path, [TRANSFORMER, MEAN, NORMALIZE], **{"1_Pooling__config": pooling})))
    check_modules(str(write(tmp_path, [TRANSFORMER, ("sentence_transformers.base.modules.Pooling", "1_Pooling")])))


def test_a_model_of_another_library_has_no_modules(tmp_path: Path) -> None:
    (tmp_path / "2024_notes").mkdir()
    check_modules(str(tmp_path))
    assert differences(str(tmp_path), 512) == []


@pytest.mark.parametrize(
    ("modules", "files", "message"),
    [
        (
            [TRANSFORMER, MEAN, (f"{PREFIX}Dense", "2_Dense")],
            {"1_Pooling__config": {"pooling_mode": "mean"}},
            "has the module Dense in 2_Dense, which qat-edge does",
        ),
        ([TRANSFORMER, ("own_code.Pooling", "1_Pooling")], {}, "has the module own_code.Pooling in 1_Pooling"),
        ([(f"{PREFIX}StaticEmbedding", "")], {}, "has the module StaticEmbedding, which"),
        ([(f"{PREFIX}Transformer", "0_Transformer")], {}, "has the module Transformer in 0_Transformer"),
        ([TRANSFORMER, (f"{PREFIX}Pooling", "pool")], {"pool__config": CLS}, "pool/config.json has pooling_mode_cls"),
        ([TRANSFORMER, (f"{PREFIX}Pooling", "")], {"config": CLS}, "config.json has pooling_mode_cls_token; qat-edge"),
        ([TRANSFORMER, MEAN], {"1_Pooling__config": {"pooling_mode": "cls"}}, "has cls; qat-edge supports embeddings"),
        ([TRANSFORMER, MEAN], {"1_Pooling__config": {"pooling_mode_max_tokens": 1}}, "has pooling_mode_max_tokens"),
        ([TRANSFORMER, MEAN], {"1_Pooling__config": [3]}, "expected a JSON object"),
        ([TRANSFORMER, (f"{PREFIX}Pooling", "../x")], {}, "the path '../x' leads out of the model's folder"),
        ([TRANSFORMER, (f"{PREFIX}Pooling", "/x")], {}, "the path '/x' leads out of the model's folder"),
        ([TRANSFORMER, (3, "")], {}, "expected a list of modules, each with a type and a path"),
        ([], {}, "modules.json lists no module; qat-edge applies Transformer, Pooling, Norm"),
        ([TRANSFORMER], {}, "modules.json lists Transformer; qat-edge applies"),
        ([MEAN], {"1_Pooling__config": {"pooling_mode": "mean"}}, "modules.json lists Pooling; qat-edge"),
        (
            [TRANSFORMER, NORMALIZE, MEAN],
            {"1_Pooling__config": {"pooling_mode": "mean"}},
            "modules.json lists Transformer, Normalize, Pooling; qat-edge applies",
        ),
        ([TRANSFORMER, MEAN], {}, "has a Pooling module and no 1_Pooling/config.json, which says"),
        ([TRANSFORMER, MEAN], {"1_Pooling__config": {}}, "1_Pooling/config.json has no pooling mode that is on; qat"),
        (
            [TRANSFORMER, MEAN],
            {"1_Pooling__config": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False}},
            "1_Pooling/config.json has no pooling mode that is on; qat-edge supports",
        ),
        ({"a": 1}, {}, "expected a list of modules, each with a type and a path"),
        # A copy without modules.json.
        (None, {"1_Pooling__config": CLS}, "1_Pooling/config.json has pooling_mode_cls_token"),
        (None, {"1_Pooling__other": {}}, "has a Pooling module and no 1_Pooling/config.json"),
        (None, {"2_Dense__config": {}}, "has the module Dense in 2_Dense"),
    ],
)
def test_a_module_that_would_be_left_out_is_refused(
    tmp_path: Path, modules: Any, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError) as caught:
        check_modules(str(write(tmp_path / "model", modules, **files)))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_of_the_hub_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--someone--encoder" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    write(snapshot, [TRANSFORMER, MEAN], **{"1_Pooling__config": CLS})
    with pytest.raises(ModelError, match=r"someone/encoder: 1_Pooling/config\.json has pooling_mode_cls_token"):
        check_modules("someone/encoder", "0" * 40)
    shutil.rmtree(snapshot)
    write(snapshot, None, config_sentence_transformers={"similarity_fn_name": "dot"})
    check_modules("someone/encoder", "0" * 40)
    assert "meant to be compared by 'dot'" in differences("someone/encoder", 512, "0" * 40)[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"config_sentence_transformers": {"prompts": {"query": "Q: ", "document": ""}}},
            "begins texts with a prompt: 'Q: ' (query). qat-edge adds none: write the prompt into",
        ),
        (
            {"config_sentence_transformers": {"prompts": {"query": "Q: "}, "default_prompt_name": "query"}},
            "begins texts with a prompt: 'Q: ' (query), query by default. qat-edge adds none",
        ),
        ({"sentence_bert_config": {"max_seq_length": 48}}, "cuts texts after 48 tokens (max_seq_length), and --max-le"),
        ({"sentence_bert_config": {"max_seq_length": 4096}}, None),
        ({"sentence_bert_config": {"do_lower_case": True}}, "makes texts lower case first"),
        ({"config_sentence_transformers": {"similarity_fn_name": "dot"}}, "meant to be compared by 'dot'"),
        ({"config_sentence_transformers": {"prompts": {"query": ""}, "similarity_fn_name": "cosine"}}, None),
        ({"config_sentence_transformers": {"prompts": 3, "default_prompt_name": []}}, None),
    ],
)
def test_what_is_done_to_texts_is_a_warning_of_finetune(
    tmp_path: Path, files: dict[str, Any], message: str | None, messages: list[str]
) -> None:
    model = tmp_path / "model"
    BertModel(BertConfig(**SIZES)).save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    write(model, [TRANSFORMER, MEAN], **{"1_Pooling__config": {"pooling_mode": "mean"}}, **files)
    task = SentenceEncoder(scored=False)
    load.load_model(str(model), task=task)
    assert not any("sentence-transformers" in line for line in messages)
    setup.load_base(FinetuneOptions(str(model), "rows.jsonl"), task)
    found = [line for line in messages if "sentence-transformers" in line or "compared by" in line]
    assert len(found) == (message is not None) and all(message in line for line in found if message)
