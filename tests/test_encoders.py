"""Encoders through all commands: a classifier and a sentence encoder, from rows to codes with the trained outputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from conftest import make_tokenizer, short_training, train_run
from qat_edge import config
from qat_edge.cli.commands import main
from qat_edge.data import training_examples
from qat_edge.data.formats import load_rows
from qat_edge.errors import DataError, ModelError, UsageError
from qat_edge.evaluate import encoder_results, encoders, gates
from qat_edge.evaluate.encoders import cosines, quality
from qat_edge.manifest import MANIFEST
from qat_edge.models import tasks
from qat_edge.models.merge import base_model, fake_quantized_model, merged_model
from qat_edge.models.tasks import ModelTask, SentenceEncoder, SequenceClassifier
from qat_edge.options import (
    CompareOptions,
    ExportOptions,
    FinetuneOptions,
    QuantizeOptions,
    SensitivityOptions,
    ValidateOptions,
)
from qat_edge.quant import frozen
from qat_edge.quant.ptq.method_names import CALIBRATED, PTQ_METHODS
from qat_edge.run import Run
from qat_edge.train import objectives
from qat_edge.verbs.chat import chat
from qat_edge.verbs.compare import compare
from qat_edge.verbs.export import export
from qat_edge.verbs.finetune import finetune
from qat_edge.verbs.generate import generate
from qat_edge.verbs.quantize import quantize
from qat_edge.verbs.sensitivity import sensitivity
from qat_edge.verbs.verify import verify

WORDS = ("alarm", "light", "music")
LABELLED = [{"text": f"{WORDS[i % 3]} {i}", "label": WORDS[i % 3]} for i in range(48)]
MATCHING = [{"anchor": f"{WORDS[i % 3]} {i}", "positive": f"the {WORDS[i % 3]} {i} of {i}"} for i in range(40)]
STEPS = 24
ENCODER_TARGETS = ("executorch", "onnx")
SIZES: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
DISTIL = {
    "vocab_size": 288, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def ignore(text: str) -> None:
    pass


def save(build: Callable[[], Any], folder: Path) -> Path:
    torch.manual_seed(0)
    build().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A classifier from a masked language model, with a new head of two layers."""
    root = tmp_path_factory.mktemp("classifier")
    model = save(lambda: DistilBertForMaskedLM(DistilBertConfig(**DISTIL)), root / "model")
    return train_run(model, root, LABELLED, STEPS)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A sentence encoder trained on matching pairs."""
    root = tmp_path_factory.mktemp("embedder")
    model = save(lambda: BertModel(BertConfig(**SIZES)), root / "model")
    return train_run(model, root, MATCHING, STEPS, 3e-3)  # at 1e-2 the loss may rise, by how the CPU multiplies


@pytest.fixture(params=["classifier", "embedder"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """A copy of either run without its quantized folder."""
    trained: Run = request.getfixturevalue(request.param)
    return Run(Path(shutil.copytree(trained.path, tmp_path / "run", ignore=shutil.ignore_patterns("quantized"))))


def batch(run: Run) -> dict[str, Tensor]:
    options = config.load(FinetuneOptions, "finetune", run.config, {})
    task, tokenizer = tasks.task_of_run(run), make_tokenizer()
    model = BertModel(BertConfig(**SIZES))
    rows = training_examples.tokenize_for_task(task, load_rows(options.data), model, tokenizer, options.max_length).rows
    return training_examples.make_collator(task, tokenizer)(rows)


def predict(task: ModelTask, model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return task.predict(model, given["input_ids"], given["attention_mask"])


def check_frozen(run: Run) -> None:
    """The frozen model has the outputs of the trained one, up to activations that fall on the other side of a tie."""
    task, given = tasks.task_of_run(run), batch(run)
    quantize(run, QuantizeOptions())
    found = predict(task, frozen.load(run.quantized), given)
    trained = predict(task, fake_quantized_model(run.adapter), given)
    plain = predict(task, merged_model(run.adapter).model, given)
    difference, rounding = (found - trained).abs().mean(), (trained - plain).abs().mean()
    # Inputs in int8 may fall on the other side of a tie; rounding changes an output by 0.003 to 0.05 of it.
    assert difference < 1e-3 * trained.abs().mean() and difference < 0.2 * rounding


def test_the_frozen_model_has_the_trained_outputs(run: Run) -> None:
    check_frozen(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "full", "learning_rate": 1e-3, "lora_rank": 16},  # the default: there are no adapters
        {"base": "int8", "ptq_init": "hqq"},
        {"ptq_init": "none", "scales": "absmax"},
    ],
)
def test_the_frozen_model_has_the_trained_outputs_with_other_options(
    run: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    before = config.load(FinetuneOptions, "finetune", run.config, {})
    finetune(replace(before, steps=4, **changes), tmp_path / "other")
    check_frozen(Run(tmp_path / "other"))


def test_a_head_may_be_a_module_of_two_layers(tmp_path: Path) -> None:
    model = save(lambda: RobertaForMaskedLM(RobertaConfig(**SIZES | {"pad_token_id": 1})), tmp_path / "model")
    run = train_run(model, tmp_path, LABELLED)
    check_frozen(run)
    assert frozen.read_scheme(run.quantized).heads == ["classifier.dense", "classifier.out_proj"]


def test_training_lowers_the_loss_of_its_rows(run: Run) -> None:
    task, given = tasks.task_of_run(run), batch(run)
    quantize(run, QuantizeOptions())
    objective = objectives.objective_for_task(task)
    assert objective is not None
    with torch.no_grad():
        before, after = (float(objective(m, given)) for m in (base_model(run.adapter), frozen.load(run.quantized)))
    assert after < 0.9 * before  # the loss is over 40 texts, that of training over batches of 4


def test_a_classifier_keeps_its_labels_and_trains_its_head(classifier: Run) -> None:
    quantize(classifier, QuantizeOptions())
    given = batch(classifier)
    model = AutoModelForSequenceClassification.from_pretrained(classifier.quantized)
    assert model.config.id2label == dict(enumerate(WORDS))
    ours = predict(SequenceClassifier(), frozen.load(classifier.quantized), given)
    torch.testing.assert_close(predict(SequenceClassifier(), model.eval(), given), ours)
    assert (ours.argmax(-1) == given["labels"]).float().mean() > 0.9
    merged = merged_model(classifier.adapter)
    base = base_model(classifier.adapter)
    for name in merged.scheme.heads:
        new, old = (m.get_submodule(name).weight for m in (merged.model, base))
        assert not torch.equal(new, old)
    saved = load_file(classifier.adapter / "adapter_model.safetensors")
    assert {n for n in saved if "lora" not in n} == {
        f"base_model.model.{head}.{part}" for head in ("pre_classifier", "classifier") for part in ("weight", "bias")
    }


@pytest.mark.parametrize("method", PTQ_METHODS)
def test_every_ptq_method_supports_encoders(run: Run, method: str) -> None:
    tokens = 100 if method in CALIBRATED else None
    quantized = quantize(run, QuantizeOptions(method=method, calibration_tokens=tokens))
    task, given = tasks.task_of_run(run), batch(run)
    reference = predict(task, merged_model(run.reference).model, given)
    found = predict(task, frozen.load(quantized.folder), given)
    assert torch.nn.functional.cosine_similarity(reference, found, dim=-1).mean() > 0.9


def test_an_encoder_with_a_longer_max_length_than_its_positions_is_calibrated(tmp_path: Path) -> None:
    model = save(lambda: BertModel(BertConfig(**SIZES)), tmp_path / "model")
    options = short_training(model, tmp_path, MATCHING, steps=2, learning_rate=3e-3)
    beyond = SIZES["max_position_embeddings"] + 36
    finetune(replace(options, max_length=beyond), tmp_path / "run")
    quantized = quantize(Run(tmp_path / "run"), QuantizeOptions(method="gptq", calibration_tokens=100))
    assert quantized.folder.is_dir()


def test_export_verify_validate_and_report(classifier: Run, tmp_path: Path, messages: list[str]) -> None:
    export(classifier, ExportOptions(ptq=("none",), context_length=40))
    results = verify(classifier, ())
    assert [result.target for result in results] == list(ENCODER_TARGETS)
    for result in results:
        assert result.faults == [] and result.linears_equal == result.linears == 12
        assert result.parity.fault == result.parity.not_measured == ""
        labels = json.loads((classifier.exports / result.target / "config.json").read_text())["id2label"]
        assert list(labels.values()) == list(WORDS)
    assert messages.count("texts of up to 40 tokens, an output of 3 numbers for each") == len(ENCODER_TARGETS)

    # Four gates for each artifact, of which the size is missed.
    junit = tmp_path / "gates.xml"
    gate_flags = ["--min-quality", "0.9", "--min-cosine", "0.99", "--min-top1", "0.9", "--max-size-mb", "0.01"]
    command = ["validate", str(classifier.path), "--json", "--junit", str(junit), *gate_flags]
    found = CliRunner().invoke(main, command)
    assert found.exit_code == 1 and "2 of 8 gates missed" in " ".join(found.output.split()), found.output

    # The figures of the fine-tune and of the artifact.
    document = json.loads((classifier.path / "answers.json").read_text())
    tuned, *ours = document["answered"]
    assert document["texts"] == len(LABELLED) and tuned["name"] == "fp32 fine-tuned" and tuned["quality"] > 0.9
    assert sum(tuned["size_bytes"].values()) == 4 * sum(p.numel() for p in base_model(classifier.adapter).parameters())
    assert [row["target"] for row in ours] == list(ENCODER_TARGETS)
    for row in ours:
        assert row["name"] == "qat" and min(row["quality"], row["agreement"]) > 0.9
        # onnxruntime rounds inputs by block on x86.
        assert row["parity"] > (0.9999 if row["target"] == "executorch" else 0.999)
        size = sum(row["size_bytes"].values())
        folder = classifier.exports / row["target"]
        assert size == sum(p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST)

        # The same figures in the gates.
        figures = (row["quality"], row["cosine"], row["agreement"], size / 1e6)
        gates_of = [gate for gate in document["gates"] if gate["measured"] == f"qat, {row['target']}"]
        found_gates = {gate["flag"]: (gate["found"], gate["passed"]) for gate in gates_of}
        expected = dict(zip(gate_flags[::2], zip(figures, (True, True, True, False), strict=True), strict=True))
        assert found_gates == expected

    # The same figures in the JUnit file and in the report.
    suite = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("8", "2", "0")
    report = CliRunner().invoke(main, ["report", str(classifier.path)])
    assert report.exit_code == 0, report.output
    assert all(f"{row['cosine']:.4f}" in classifier.report_html.read_text() for row in ours)

    # A second call does not overwrite the first one's results.
    again = CliRunner().invoke(main, ["validate", str(classifier.path)])
    assert again.exit_code == 1 and "answers.json exists already" in again.output


def test_evaluation_rows_that_changed_since_the_training_are_named(classifier: Run, messages: list[str]) -> None:
    path, task = classifier.path.parent / "eval.jsonl", tasks.task_of_run(classifier)
    before, tuned = path.read_text(), merged_model(classifier.reference)
    try:
        for text, changed in ((before, False), (before.replace("light 1", "light one"), True)):
            path.write_text(text)
            encoders._evaluation_rows(classifier, ValidateOptions(), task, tuned)
            assert any(f"{path} has other rows than when finetune read it" in line for line in messages) is changed
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-kl", "0.1"], "validate --max-kl is for models that generate text"),
        (["--threads", "4"], "validate --threads is for models that generate text"),
        (["--device", "ssh:pi"], "validate --device ssh:pi is for models that generate text"),
        (["--target", "gguf"], "validate --target gguf is for models that generate text"),
        (["--profile", "pi5"], "(given, or set by --profile pi5) is for models that generate text"),
        (["--min-top1", "0.9"], "--min-top1 is for models that choose tokens or labels"),
    ],
)
def test_options_of_validate_for_text_generation_are_refused_by_name(
    embedder: Run, flags: list[str], message: str
) -> None:
    found = CliRunner().invoke(main, ["validate", str(embedder.path), *flags])
    output = " ".join(found.output.split())
    assert found.exit_code == 2 and message in output and not embedder.answers.exists(), found.output
    assert "--min-top1" in flags or all(config.flag_name(name) in output for name in gates.ENCODER_GATES)


def test_a_profile_may_have_gates_for_encoders(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text("min_cosine = 0.99\nmax_size_mb = 20\n")
    options = config.load(ValidateOptions, "validate", None, {"profile": str(tmp_path / "board.toml")})
    found = encoder_results.EncoderResult("qat", "executorch", {"linears": 21_000_000}, 0.5, 0.991)
    results = {gate.flag: (gate.found, gate.passed) for gate in gates.check_encoder_gates(options, [found])}
    assert results == {"--min-cosine": (0.991, True), "--max-size-mb": (21.0, False)}


def test_quality_equals_its_formula() -> None:
    logits = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]], dtype=np.float32)
    assert quality(SequenceClassifier(("a", "b")), logits, np.array([0, 1, 1])) == pytest.approx(2 / 3)
    first = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]], dtype=np.float32)
    second = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    both = np.concatenate([first, second])  # cosines 1, 0.8, 0, 0.8: ranks 4, 2.5, 1, 2.5
    assert quality(SentenceEncoder(), both, np.array([0.9, 0.5, 0.1, 0.5])) == pytest.approx(1)
    assert quality(SentenceEncoder(), both, np.array([0.1, 0.5, 0.9, 0.5])) == pytest.approx(-1)
    assert quality(SentenceEncoder(scored=False), both, np.ones(4)) == pytest.approx(1 / 2)
    assert cosines(first, second) == pytest.approx([1, 0.8, 0, 0.8])


def test_a_run_resumed_in_phase_2_ends_the_same(classifier: Run, tmp_path: Path) -> None:
    options = config.load(FinetuneOptions, "finetune", classifier.config, {})
    options = replace(options, steps=6, save_every=2)
    finetune(options, tmp_path / "run")
    whole = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-6")
    shutil.rmtree(tmp_path / "run" / "adapter")
    finetune(options, tmp_path / "run", resume=True)
    again = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


@pytest.mark.parametrize(
    ("feature", "use"),
    [
        ("--target gguf", lambda run: export(run, ExportOptions(target=("gguf",)))),
        ("--kv-cache int8", lambda run: export(run, ExportOptions(target=("executorch",), kv_cache="int8"))),
        ("--rotate", lambda run: quantize(run, QuantizeOptions(method="gptq", rotate=True))),
        ("sensitivity", lambda run: sensitivity(run, SensitivityOptions())),
        ("compare", lambda run: compare(run, CompareOptions(), None)),
        (
            "generate",
            lambda run: generate(run, "hello", "torch", ignore, raw=True, system=None, max_new_tokens=4),
        ),
        ("chat", lambda run: chat(run, ["hello"], "torch", ignore)),
    ],
)
def test_features_for_text_generation_are_refused_before_any_work(
    run: Run, feature: str, use: Callable[[Run], Any]
) -> None:
    with pytest.raises(UsageError, match=f"^{feature} is for models that generate text; .* holds a se"):
        use(run)
    assert not run.quantized.exists() and not run.ptq_folder.exists()


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier with two named labels."""
    names = {"id2label": {0: "off", 1: "on"}, "label2id": {"off": 0, "on": 1}}
    folder = tmp_path_factory.mktemp("labels") / "model"
    return save(lambda: BertForSequenceClassification(BertConfig(**SIZES, **names)), folder)


def options(model: Path, data: str, **changes: Any) -> FinetuneOptions:
    return FinetuneOptions(model=str(model), data=data, steps=2, batch_size=4, track=(), **changes)


PAIR = {"text_a": "one", "text_b": "two", "score": 0.5}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": "on"}, {"text": "b"}], r"2: an encoder is trained on rows of 'text' and 'label'"),
        ([{"prompt": "a", "completion": "b"}], r"1: an encoder is trained on rows of 'text' and 'label'"),
        ([{"text": "a", "label": True}], r"1: 'label' must be a word or a whole number, found True"),
        ([{"text": "a", "label": "on"}, {"text": "b", "label": "up"}], r"2: the label 'up' is none .*\(off, on\)"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": 2}], r"2: the label '2' is none .*\(off, on\)"),
        ([PAIR, {"anchor": "a", "positive": "b"}], r"2: not a row of 'text_a', 'text_b' and 'score'"),
        ([PAIR, {"text": "a", "label": "on"}], r"2: not a row of 'text_a', 'text_b' and 'score'"),
        ([PAIR | {"score": 4.5}], r"1: 'score' is 4.5; a cosine is between -1 and 1"),
        ([{"text": "a", "label": "on"}, {"text": "b", "label": " "}], r"2: 'label' is empty"),
        ([PAIR | {"score": "high"}], r"1: 'score' must be a number, found a string"),
    ],
)
def test_rows_that_an_encoder_cannot_be_trained_on_are_named(
    two_labels: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        finetune(options(two_labels, write(tmp_path / "rows.jsonl", rows)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"keep_layers": 1}, "--keep-layers"),
        ({"distill_weight": 0.5, "ptq_init": "none"}, "--distill-weight"),
        ({"rotate": "on"}, "--rotate on"),
    ],
)
def test_training_options_for_text_generation_are_refused(
    two_labels: Path, tmp_path: Path, changes: dict[str, Any], flag: str
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"text": "a", "label": "on"}])
    with pytest.raises(UsageError, match=f"{flag} is for models that generate text; .* is an encoder"):
        finetune(options(two_labels, rows, **changes), tmp_path / "run")


def test_an_encoder_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    DebertaV2Config().save_pretrained(tmp_path / "model")
    rows = write(tmp_path / "rows.jsonl", LABELLED)
    with pytest.raises(ModelError, match="could not be exported: deberta-v2 has attention of its own"):
        finetune(options(tmp_path / "model", rows), tmp_path / "run")


def test_an_embedding_other_than_the_mean_is_refused(tmp_path: Path) -> None:
    model = save(lambda: BertModel(BertConfig(**SIZES)), tmp_path / "model")
    (model / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    rows = write(tmp_path / "rows.jsonl", MATCHING)
    with pytest.raises(ModelError, match="pooling_mode_cls_token; qat-edge supports embeddings that are the mean"):
        finetune(options(model, rows), tmp_path / "run")


def test_matching_pairs_need_others_in_their_batch(tmp_path: Path) -> None:
    model = save(lambda: BertModel(BertConfig(**SIZES)), tmp_path / "model")
    rows = write(tmp_path / "rows.jsonl", MATCHING)
    with pytest.raises(UsageError, match="--batch-size 1: with rows of 'anchor' and 'positive'"):
        finetune(replace(options(model, rows), batch_size=1), tmp_path / "run")


def test_labels_come_from_the_model_or_the_rows(two_labels: Path, tmp_path: Path) -> None:
    own = BertConfig.from_pretrained(two_labels)
    rows = load_rows(write(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "b", "label": "off"}]))
    task = training_examples.task_for_rows(own, rows, "rows")
    assert task == SequenceClassifier(("off", "on"))
    model, tokenizer = BertModel(BertConfig(**SIZES)), make_tokenizer()
    assert [row["labels"] for row in training_examples.tokenize_for_task(task, rows, model, tokenizer, 32).rows] == [
        [1],
        [0],
    ]
    found = [{"text": "a", "label": n} for n in (10, 2, 2)]
    rows = load_rows(write(tmp_path / "b.jsonl", found))
    assert training_examples.task_for_rows(BertConfig(), rows, "rows") == SequenceClassifier(("2", "10"))
    # Numbers as names: the index of a label could be the name of another one.
    numbered = SequenceClassifier(("1", "2", "3"))
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: the label 0 is none of the model's, which are numbers themselves"
    ):
        zero = load_rows(write(tmp_path / "a.jsonl", [{"text": "a", "label": 0}]))
        training_examples.tokenize_for_task(numbered, zero, model, tokenizer, 32)
    own.id2label = {0: "a", 2: "b"}
    with pytest.raises(ModelError, match="'id2label' has 2 labels and none with the number 1"):
        training_examples.task_for_rows(own, rows, "rows")
    with pytest.raises(DataError, match="every row has the label '2'"):
        training_examples.task_for_rows(BertConfig(), rows[1:], "rows")


def test_objectives_equal_their_formulas() -> None:
    first = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    second = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    given = {"input_ids": first, "attention_mask": first, "labels": torch.tensor([0.5, 1.0])}

    class Known(SentenceEncoder):
        def predict(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.cat([first, second])

    scored, matching = (
        objectives.objective_for_task(Known(scored=True)),
        objectives.objective_for_task(Known(scored=False)),
    )
    assert scored is not None and matching is not None
    torch.testing.assert_close(scored(None, given), torch.tensor(0.25))  # cosines 0 and 1
    cosines = 20 * torch.tensor([[0.0, 0.6], [0.8, 1.0]])
    torch.testing.assert_close(matching(None, given), -cosines.log_softmax(-1).diagonal().sum())
    assert objectives.objective_for_task(tasks.CAUSAL_LM) is None


def test_long_texts_are_truncated_at_the_models_positions(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "rows.jsonl", [{"text": "x" * 100, "label": "a"}, {"text": "y", "label": "b"}]))
    model = BertModel(BertConfig(**SIZES))
    done = training_examples.tokenize_for_task(SequenceClassifier(("a", "b")), rows, model, make_tokenizer(), 512)
    assert [len(row["input_ids"]) for row in done.rows] == [64, 1] and (done.truncated, done.cut_tokens) == (1, 36)
    assert done.summary() == "2 rows, 65 tokens, a 1, b 1; 1 row truncated, 36 tokens lost"


def test_empty_texts_are_counted_and_need_a_token(tmp_path: Path) -> None:
    tokenizer, model = make_tokenizer(), BertModel(BertConfig(**SIZES))
    given = [{"anchor": "a", "positive": "b"}, {"anchor": "a", "positive": ""}]
    rows = load_rows(write(tmp_path / "rows.jsonl", given))
    with pytest.raises(DataError, match=r"rows\.jsonl:2: a text is empty, and the tokenizer has no token for it"):
        training_examples.tokenize_for_task(SentenceEncoder(scored=False), rows, model, tokenizer, 32)
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=special
    )
    done = training_examples.tokenize_for_task(SentenceEncoder(scored=False), rows, model, tokenizer, 32)
    assert done.rows[1]["other_ids"] == [1, 2]
    assert done.notes == ("1 row with an empty text, trained on like any other",)
