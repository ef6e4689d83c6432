"""Labels that a data set stores as numbers are read by name, whatever the order of the model's labels."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertConfig, BertModel

from conftest import Recorder, make_tokenizer
from qat_edge import progress
from qat_edge.data import training_examples
from qat_edge.data.formats import load_rows
from qat_edge.data.rows import Chat, NamedLabel, Text
from qat_edge.errors import DataError
from qat_edge.models.tasks import ModelTask, SequenceClassifier

NAMES = ("entailment", "neutral", "contradiction")
NLI = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
UNNAMED = ("LABEL_0", "LABEL_1", "LABEL_2")
CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': neg
          '1': pos
---
"""


def data_set(names: Sequence[str] = NAMES, labels: Sequence[int | None] = (0, 1, 2)) -> Dataset:
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"text": [f"t{i}" for i in labels], "label": list(labels)}, features=features)


def save_folder(data: Dataset, data_folder: Path) -> str:
    data.save_to_disk(str(data_folder / "saved"))
    return str(data_folder / "saved")


def save_parts(data: Dataset, data_folder: Path) -> str:
    DatasetDict({"train": data}).save_to_disk(str(data_folder / "saved"))
    return str(data_folder / "saved")


def save_parquet(data: Dataset, data_folder: Path) -> str:
    data.to_parquet(str(data_folder / "train.parquet"))
    return str(data_folder / "train.parquet")


def save_parquet_folder(data: Dataset, data_folder: Path) -> str:
    save_parquet(data, data_folder)
    return str(data_folder)


def config(labels: Sequence[str]) -> BertConfig:
    """The configuration of a classifier with these labels."""
    found = BertConfig(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    found.architectures = ["BertForSequenceClassification"]
    return found


def trained_labels(task: ModelTask, rows: Any) -> list[int]:
    sizes = {"vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    model = BertModel(BertConfig(num_attention_heads=4, **sizes))
    tokenized = training_examples.tokenize_for_task(task, rows, model, make_tokenizer(), 32)
    return [row["labels"][0] for row in tokenized.rows]


def task_of(labels: Sequence[str], rows: Any) -> ModelTask:
    return training_examples.task_for_rows(config(labels), rows, "rows")


def labels_of(source: Any, part: str = "train") -> list[Any]:
    rows = [row for row in load_rows(str(source), part) if isinstance(row, Text)]
    return [row.label.name if isinstance(row.label, NamedLabel) else row.label for row in rows]


# --- data sets to labels of a model ------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_folder, save_parts, save_parquet, save_parquet_folder])
def test_labels_of_a_data_set_are_mapped_by_name(data_folder: Path, save: Callable[[Dataset, Path], str]) -> None:
    rows = load_rows(save(data_set(), data_folder))
    task = task_of(NLI, rows)
    assert task == SequenceClassifier(NLI)
    assert trained_labels(task, rows) == [2, 1, 0]


def test_training_and_evaluation_data_may_number_their_labels_differently(data_folder: Path) -> None:
    data = {"train": data_set(), "eval": data_set(NLI[::-1], (0, 1)), "test": data_set(tuple(sorted(NAMES)), (0, 1, 2))}
    DatasetDict(data).save_to_disk(str(data_folder))
    rows = load_rows(str(data_folder))
    task = training_examples.task_for_rows(BertConfig(), rows, "rows")
    assert task == SequenceClassifier(NAMES)  # an encoder without a head gets the names, in the order of the data set
    assert trained_labels(task, rows) == [0, 1, 2]
    assert trained_labels(task, load_rows(str(data_folder), "eval")) == [0, 1]
    assert trained_labels(task, load_rows(str(data_folder), "test")) == [2, 0, 1]


def test_names_that_the_model_does_not_have_are_refused(data_folder: Path) -> None:
    rows = load_rows(save_parquet(data_set(("yes", "neutral", "1"), (1, 0)), data_folder))
    with pytest.raises(DataError, match=r"row 2: the label 'yes' of the data set .*CONTRADICTION.*has yes, neutral, 1"):
        trained_labels(task_of(NLI, rows), rows)
    # A name that looks like a number is no index.
    rows = load_rows(save_parquet(data_set(("yes", "neutral", "1"), (2,)), data_folder))
    with pytest.raises(DataError, match="the label '1' of the data set is none of the model's"):
        trained_labels(task_of(NLI, rows), rows)


def test_a_head_without_names_gets_those_of_the_data_set(data_folder: Path) -> None:
    rows = load_rows(save_parquet(data_set(), data_folder))
    recorder = Recorder()
    with progress.report_to(recorder):
        task = task_of(UNNAMED, rows)
    assert task == SequenceClassifier(NAMES)
    (line,) = recorder.lines
    assert line.endswith("have no names, and get those of the data set: 0 entailment, 1 neutral, 2 contradiction")
    assert trained_labels(task, rows) == [0, 1, 2]
    with pytest.raises(DataError, match="'entailment' of the data set is none of the model's"):
        trained_labels(task_of(UNNAMED[:2], rows), rows)

    # A run that was trained on plain numbers, and is evaluated on a data set.
    assert trained_labels(SequenceClassifier(UNNAMED), rows) == [0, 1, 2]


def test_labels_in_other_capitals_are_found(tmp_path: Path) -> None:
    rows = [Text("a", "rows:1", "Entailment"), Text("a", "rows:2", "NEUTRAL")]
    assert trained_labels(SequenceClassifier(NLI), rows) == [2, 1]
    assert trained_labels(SequenceClassifier(("us", "US", "neutral")), [*rows[1:], Text("a", "rows:3", "US")]) == [2, 1]
    with pytest.raises(DataError, match="the label 'Us' is none of the model's"):
        trained_labels(SequenceClassifier(("us", "US")), [Text("a", "rows:1", "Us")])


def test_labels_that_differ_in_capitals_alone_are_named() -> None:
    model, rows = BertModel(BertConfig(vocab_size=288, num_hidden_layers=1)), [Text("a", "rows:1", "us")]
    task = SequenceClassifier(("us", "US ", "neutral"))
    tokenized = training_examples.tokenize_for_task(task, rows, model, make_tokenizer(), 32)
    assert tokenized.notes == ("the labels 'us', 'US ' differ in capitals or spaces alone",)


def test_plain_numbers_are_reported(tmp_path: Path) -> None:
    model, rows = BertModel(BertConfig(vocab_size=288, num_hidden_layers=1)), [Text("a", "rows:1", 2)]
    tokenized = training_examples.tokenize_for_task(SequenceClassifier(NLI), rows, model, make_tokenizer(), 32)
    (note,) = tokenized.notes
    assert note.endswith("the order of the model's labels: 0 CONTRADICTION, 1 NEUTRAL, 2 ENTAILMENT")


# --- names in files ----------------------------------------------------------------------------------------


def test_tables_of_one_data_set_with_other_orders_are_refused(data_folder: Path) -> None:
    data_set().to_parquet(str(data_folder / "train-0.parquet"))
    data_set(NAMES[::-1]).to_parquet(str(data_folder / "train-1.parquet"))
    with pytest.raises(DataError, match=r"train-1\.parquet: 'label' numbers its labels in the order contradiction, "):
        load_rows(str(data_folder))


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".json"])
def test_the_description_of_a_data_set_names_the_labels_of_its_text_files(data_folder: Path, suffix: str) -> None:
    (data_folder / "README.md").write_text(CARD)
    rows = {
        ".csv": "text,label\n007,1\nx,0\n",
        ".jsonl": '{"text": "007", "label": 1}\n{"text": "x", "label": 0}\n',
        ".json": '[{"text": "007", "label": 1}, {"text": "x", "label": 0}]',
    }
    text = rows[suffix.removesuffix(".gz")].encode()
    (data_folder / f"train{suffix}").write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    assert labels_of(data_folder) == ["pos", "neg"]
    assert [row.text for row in load_rows(str(data_folder)) if isinstance(row, Text)] == ["007", "x"]


def test_a_description_allows_names_and_missing_labels(data_folder: Path) -> None:
    (data_folder / "README.md").write_text(CARD)
    (data_folder / "train.csv").write_text("text,label\na,pos\nb,-1\nc,\n")
    assert labels_of(data_folder) == ["pos", None, None]
    (data_folder / "train.csv").write_text("text,label\na,2\n")
    with pytest.raises(DataError, match=r"train\.csv:2: 'label' is '2', which is neither a label .* \(neg, pos\)"):
        load_rows(str(data_folder))


def test_missing_labels_are_refused_by_row(data_folder: Path) -> None:
    rows = load_rows(save_parquet(data_set(labels=(0, -1)), data_folder))
    with pytest.raises(DataError, match=r"row 2: an encoder is trained on rows of 'text' and 'label'.*of -1 in a data"):
        task_of(NLI, rows)


def test_numbers_are_no_names(data_folder: Path) -> None:
    rows = load_rows(save_parquet(data_set(("0", "1", "2")), data_folder))
    assert trained_labels(task_of(NLI, rows), rows) == [0, 1, 2]
    rows = load_rows(save_parquet(data_set(("1", "2", "3")), data_folder))
    assert labels_of(data_folder / "train.parquet") == ["1", "2", "3"]
    assert trained_labels(task_of(("3", "2", "1"), rows), rows) == [2, 1, 0]


def test_names_inside_of_columns_are_read(data_folder: Path) -> None:
    role, features = ClassLabel(names=["assistant", "user"]), {}
    features["messages"] = datasets.List({"role": role, "content": Value("string")})
    messages = [{"role": 1, "content": "Hi"}, {"role": 0, "content": "Hello"}]
    Dataset.from_dict({"messages": [messages]}, features=Features(features)).to_parquet(str(data_folder / "a.parquet"))
    (row,) = load_rows(str(data_folder / "a.parquet"))
    assert isinstance(row, Chat)
    assert [message["role"] for message in row.messages] == ["user", "assistant"]
