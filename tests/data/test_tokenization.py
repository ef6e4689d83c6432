"""Rows are read with their line numbers, the loss covers the right tokens, and every truncation is counted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qat_edge.data import formats, tokenization
from qat_edge.data.conversation import lead_of
from qat_edge.data.formats import Chat, Completion, Pair, Row, Text, load_rows
from qat_edge.data.token_table import IGNORED
from qat_edge.data.tokenization import Collator
from qat_edge.errors import DataError

DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "the first thing"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "another"},
    {"role": "assistant", "content": "\nand on"},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def trained_texts(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """Runs of tokens with loss, decoded."""
    assert len(ids) == len(labels)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


# --- reading -----------------------------------------------------------------------------------------------


def test_the_three_shapes_for_text_generation(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl", {"messages": DIALOGUE}, {"prompt": "a", "completion": "b", "id": 7}, {"text": "c"}
    )
    chat, completion, text = load_rows(source)
    assert chat == Chat(DIALOGUE, f"{source}:1")
    assert completion == Completion("a", "b", f"{source}:2")
    assert text == Text("c", f"{source}:3")


def test_the_three_shapes_for_encoders(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "rows.jsonl",
        {"text": "a", "text_pair": "b", "label": "c"},
        {"text_a": "a", "text_b": "b", "score": -0.5},
        {"anchor": "a", "positive": "b"},
    )
    labelled, scored, matching = load_rows(source)
    assert labelled == Text("a", f"{source}:1", label="c", pair="b")
    assert scored == Pair("a", "b", -0.5, f"{source}:2")
    assert matching == Pair("a", "b", None, f"{source}:3")


def test_every_file_format_gives_the_same_rows(tmp_path: Path) -> None:
    records = [{"prompt": "one, two", "completion": "three\nfour"}, {"prompt": "five", "completion": "six"}]
    write_lines(tmp_path / "rows.jsonl", *records)
    (tmp_path / "rows.json").write_text(json.dumps(records))
    frame = datasets.Dataset.from_list(records)
    frame.to_csv(tmp_path / "rows.csv")
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"):
        rows = load_rows(str(tmp_path / name))
        found = [(row.prompt, row.completion) for row in rows if isinstance(row, Completion)]
        assert found == [("one, two", "three\nfour"), ("five", "six")], name


def test_the_parts_of_a_folder_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"text": "learn"})
    write_lines(folder / "test.jsonl", {"text": "examine"})
    assert load_rows(str(folder)) == [Text("learn", f"{folder}/train.jsonl:1")]
    assert load_rows(str(folder), "test") == load_rows(f"{folder}:test", "train")
    assert load_rows(str(folder), "test") == [Text("examine", f"{folder}/test.jsonl:1")]
    with pytest.raises(DataError, match="no data set with a part 'nonsense'"):
        load_rows(str(folder), "nonsense")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, "keys found: 'question', 'answer'; expected 'messages'"),
        ({"prompt": "a", "completion": None}, "keys found: 'prompt'; expected"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a string, found a number"),
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"text": ["a"]}, "'text' must be a string, found a list"),
        ({"messages": "a"}, "'messages' must be a list of {role, content}, found a string"),
        ({"messages": []}, "found an empty list"),
        ({"messages": [{"role": "user"}]}, "message 1: 'content' must be a string, found nothing"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message of role 'assistant'"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]},
            "the assistant's message is empty",
        ),
        (["text"], "expected an object with 'messages'"),
        ({}, "keys found: none"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, record: Any, message: str) -> None:
    source = write_lines(tmp_path / "rows.jsonl", {"text": "good"}, record)
    with pytest.raises(DataError) as caught:
        load_rows(source)
    assert str(caught.value).startswith(f"{source}:2: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_lines_are_read_whatever_the_suffix(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "lines.json"
    path.write_text(mark + '{"text": "a\u2028b"}\n\n{"text": "c"}\n', encoding="utf-8")
    assert load_rows(str(path)) == [Text("a\u2028b", f"{path}:1"), Text("c", f"{path}:3")]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"bad\.jsonl:3: not JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_rows(str(tmp_path / "latin.jsonl"))
    (tmp_path / "object.json").write_text('{"text": "a"}')
    with pytest.raises(DataError, match="expected a JSON list of rows, found an object"):
        load_rows(str(tmp_path / "object.json"))
    (tmp_path / "lines.json").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"lines\.json:3: not JSON"):
        load_rows(str(tmp_path / "lines.json"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        load_rows(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"cannot read \.xlsx; use \.jsonl"):
        load_rows(str(tmp_path / "rows.xlsx"))


def test_long_values_of_csv_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_text('text\n"' + "word " * 40_000 + '"\n')
    assert len(load_rows(str(tmp_path / "rows.csv"))) == 1
    monkeypatch.setattr(formats, "MAX_LINE_CHARACTERS", 1000)
    with pytest.raises(DataError, match=r"rows\.csv:2: a value has more than 1000 characters"):
        load_rows(str(tmp_path / "rows.csv"))


def test_a_quote_in_a_csv_file_that_nothing_closes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\nsay 1,1\nsay 2,"2\nsay 3,3\n')
    with pytest.raises(DataError, match=r"rows\.csv:\d: cannot be read as CSV .* has to close it"):
        list(load_rows(str(path)))
    path.write_text('prompt,completion\nsay 1,"a ""b"", c"\n')
    assert [row.completion for row in load_rows(str(path))] == ['a "b", c']  # type: ignore[union-attr]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for data files; pytest's own has "test" in its name, which `datasets` takes for a part."""
    path = tmp_path / "rows"
    path.mkdir()
    return path


def test_the_cells_of_csv_files_in_a_folder_are_texts(folder: Path) -> None:
    (folder / "train.csv").write_text("prompt,completion\nNA,null\n007,1.50\n2024-01-01,true\n")
    rows: Any = load_rows(str(folder))
    assert [(row.prompt, row.completion) for row in rows] == [("NA", "null"), ("007", "1.50"), ("2024-01-01", "true")]
    assert rows[0].where == f"{folder / 'train.csv'}:2"

    # pandas would take the first of three values for the name of the row.
    (folder / "train.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match=r"train\.csv:2: more values than the 2 columns"):
        load_rows(str(folder))


def test_no_cell_of_other_tables_in_a_folder_is_null(folder: Path) -> None:
    (folder / "train.tsv").write_text("prompt\tcompletion\nNA\tnull\n")
    rows: Any = load_rows(str(folder))
    assert [(row.prompt, row.completion) for row in rows] == [("NA", "null")]


def test_texts_of_a_folder_that_look_like_dates_are_texts(folder: Path) -> None:
    write_lines(folder / "train.jsonl", {"prompt": "2024-01-01T00:00:00", "completion": "2024-01-01 00:00:00"})
    (row,) = cast("list[Completion]", load_rows(str(folder)))
    assert row.completion == "2024-01-01 00:00:00"


@pytest.mark.parametrize("place", ["../other.jsonl", "/etc/hosts", "http://127.0.0.1:9/rows.jsonl", "zip://a::b"])
@pytest.mark.parametrize("file", ["README.md", ".huggingface.yaml"])
def test_a_description_that_names_data_elsewhere_is_refused(folder: Path, file: str, place: str) -> None:
    text = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{place}'\n"
    (folder / file).write_text(f"---\n{text}---\n" if file == "README.md" else text)
    with pytest.raises(DataError, match=r"names data outside of the folder, '.*'\. Put the files into the folder"):
        load_rows(str(folder))


def test_a_script_is_named(folder: Path) -> None:
    (folder / f"{folder.name}.py").write_text("")
    with pytest.raises(DataError, match=r"that can be read .*scripts are no longer supported"):
        load_rows(str(folder))


def test_a_part_that_a_saved_data_set_does_not_have_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(tmp_path / "saved")
    for source, split in ((f"{tmp_path}/saved", "validation"), (f"{tmp_path}/saved:train", "train")):
        assert [row.text for row in load_rows(source, split) if isinstance(row, Text)] == ["a"]
    with pytest.raises(DataError, match=r"a part 'nonsense' .*it was saved as one part"):
        load_rows(f"{tmp_path}/saved:nonsense")


def test_a_folder_that_cannot_be_read_is_not_called_missing(folder: Path) -> None:
    (folder / "train.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match="no data set with a part 'train' was found there that can be read") as error:
        load_rows(str(folder))
    assert "no such file" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
@pytest.mark.parametrize("name", ["rows.jsonl", "rows", "/dev/zero"])
def test_a_pipe_is_named_as_such(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if not path.exists():
        os.mkfifo(path)
    with pytest.raises(DataError, match="a pipe, a socket or a device"):
        load_rows(str(path))


def test_a_part_of_a_file_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="a file has no parts"):
        load_rows(f"{source}:train")


@pytest.mark.parametrize("kind", ["Audio", "Image"])
def test_sound_and_images_that_no_row_uses_are_not_decoded(tmp_path: Path, kind: str) -> None:
    features = {
        "prompt": {"dtype": "string", "_type": "Value"},
        "completion": {"dtype": "string", "_type": "Value"},
        "media": {"_type": kind},
    }
    media = pa.array([{"bytes": b"neither", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"prompt": ["say 1 "], "completion": ["1"], "media": media})
    path = tmp_path / "rows.parquet"
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    assert [row.completion for row in load_rows(str(path))] == ["1"]  # type: ignore[union-attr]


def test_a_csv_row_is_named_by_the_line_it_ends_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines",b\nc\n')
    with pytest.raises(DataError, match=r"rows\.csv:4: keys found: 'prompt'"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.txt"])
def test_empty_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n" if name == "empty.jsonl" else "")
    with pytest.raises(DataError, match="contains no rows"):
        load_rows(str(tmp_path / name))


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "somebody/no-such-data"])
def test_missing_sources_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_rows(name)


# --- tokens with loss --------------------------------------------------------------------------------------


def test_loss_on_every_assistant_message_and_its_end_token(tokenizer: Any) -> None:
    done = tokenization.tokenize([Chat(DIALOGUE, "row")], tokenizer, 512)
    (row,) = done.rows
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(DIALOGUE, tokenize=False)
    assert trained_texts(row["input_ids"], row["labels"], tokenizer) == ["the answer<|im_end|>", "\nand on<|im_end|>"]
    assert (done.truncated, done.cut_tokens, done.dropped) == (0, 0, 0)
    assert done.tokens == len(row["input_ids"])
    assert done.trained_tokens == sum(label != IGNORED for label in row["labels"])


def test_a_prompt_is_a_prefix_of_its_training_row_even_where_tokens_merge(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.add_special_tokens(["t\nx"])  # straddles "assistant\n" and "x..."
    row = Chat([{"role": "user", "content": "go"}, {"role": "assistant", "content": "xylophone"}], "row")
    ((prompt, expected, *_),) = tokenization.prompts([row], tokenizer)
    (trained,) = tokenization.tokenize([row], tokenizer, 512).rows
    assert expected == "xylophone"
    assert trained["input_ids"][: len(prompt)] == prompt
    assert trained["labels"][: len(prompt)] == [IGNORED] * len(prompt)
    assert trained_texts(**_ids_and_labels(trained), tokenizer=tokenizer) == ["xylophone<|im_end|>"]


def test_a_template_that_rewrites_past_turns_gives_one_example_per_assistant_message(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    done = tokenization.tokenize([Chat(DIALOGUE, "row")], tokenizer, 512)
    assert [trained_texts(**_ids_and_labels(row), tokenizer=tokenizer) for row in done.rows] == [
        ["<think></think>the answer<|im_end|>"],
        ["<think></think>\nand on<|im_end|>"],
    ]


def test_a_template_that_does_not_continue_its_own_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    with pytest.raises(DataError, match="f:9: the chat template does not render message 3"):
        tokenization.tokenize([Chat(DIALOGUE, "f:9")], tokenizer, 512)


def test_a_missing_or_strict_chat_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"f:9: .*refuses the roles system, user.*must alternate"):
        tokenization.tokenize([Chat(DIALOGUE, "f:9")], tokenizer, 512)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"tokenizer of --model has no chat template.*--data"):
        tokenization.tokenize([Chat(DIALOGUE, "f:9")], tokenizer, 512)


def test_loss_on_the_completion_and_the_end_token(tokenizer: Any) -> None:
    (row,) = tokenization.tokenize([Completion("in the ", "then", "row")], tokenizer, 64).rows
    assert tokenizer.decode(row["input_ids"]) == "in the then<|im_end|>"
    assert trained_texts(row["input_ids"], row["labels"], tokenizer) == ["then<|im_end|>"]
    ((prompt, expected, *_),) = tokenization.prompts(
        [Completion("in the ", "then", "row"), Text("x", "row")], tokenizer
    )
    assert row["input_ids"][: len(prompt)] == prompt
    assert expected == "then"


def test_a_token_that_would_span_prompt_and_completion_is_split(tokenizer: Any) -> None:
    (row,) = tokenization.tokenize([Completion("t", "he end", "row")], tokenizer, 64).rows  # "the" would be one token
    assert trained_texts(row["input_ids"], row["labels"], tokenizer) == ["he end<|im_end|>"]


def test_texts_are_packed_into_full_windows_without_loss_of_tokens(tokenizer: Any) -> None:
    texts = ["abcdefghij" * 3, "klm", "nopqrst" * 4]
    done = tokenization.tokenize([Text(t, "row") for t in texts], tokenizer, 16)
    stream = [token for row in done.rows for token in row["input_ids"]]
    assert tokenizer.decode(stream) == "".join(t + "<|im_end|>" for t in texts)
    assert [len(row["input_ids"]) for row in done.rows[:-1]] == [16] * (len(done.rows) - 1)
    assert all(row["labels"] == row["input_ids"] for row in done.rows)
    assert (done.truncated, done.cut_tokens) == (0, 0)


def test_a_beginning_of_sequence_token_occurs_once_per_example(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert lead_of(tokenizer).ids == [1]
    rows = tokenization.tokenize([Text("abcdefghij" * 3, "row"), Completion("t", "he", "row")], tokenizer, 16).rows
    assert [row["input_ids"][0] for row in rows] == [1] * 4
    assert [row["input_ids"].count(1) for row in rows] == [1] * 4
    assert trained_texts(**_ids_and_labels(rows[-1]), tokenizer=tokenizer) == ["he<|im_end|>"]
    (chat,) = tokenization.tokenize([Chat(DIALOGUE, "row")], tokenizer, 512).rows
    assert chat["input_ids"].count(1) == len(DIALOGUE)


def test_truncated_and_dropped_rows_are_counted(tokenizer: Any) -> None:
    fits, cut, lost = Completion("ab", "cd", "1"), Completion("ab", "c" * 20, "2"), Completion("a" * 30, "b", "3")
    done = tokenization.tokenize([fits, cut, lost], tokenizer, 10)
    assert [len(row["input_ids"]) for row in done.rows] == [5, 10]
    assert (done.truncated, done.cut_tokens, done.dropped) == (2, (23 - 10) + (32 - 10), 1)
    assert done.summary() == (
        "2 rows, 15 tokens, 11 of them with loss; 2 rows truncated, 35 tokens lost; "
        "1 row dropped: no token with loss was left"
    )
    with pytest.raises(DataError, match="None of 1 rows has a token to train on within 10 tokens"):
        tokenization.tokenize([lost], tokenizer, 10)


def test_empty_texts_are_left_out_and_counted(tokenizer: Any) -> None:
    rows: list[Row] = [Text("", "1"), Text("the end", "2"), Text(" \n", "3"), Completion("a", "b", "4")]
    done = tokenization.tokenize(rows, tokenizer, 64)
    assert [tokenizer.decode(row["input_ids"]) for row in done.rows] == ["the end<|im_end|>", "ab<|im_end|>"]
    assert done.notes == ("2 rows with an empty 'text' left out",)
    assert len(tokenization.scored_ids(rows, tokenizer, 64, 100)) == 2
    for read in (tokenization.tokenize, lambda *given: tokenization.scored_ids(*given, limit=100)):
        with pytest.raises(DataError, match=r"The 'text' of every row is empty, so .* predict \(2 rows\)\. Fill it in"):
            read([rows[0], rows[2]], tokenizer, 64)


def test_rows_that_train_an_end_alone_are_counted(tokenizer: Any) -> None:
    rows = [Completion("a", "<|im_end|>", "1"), Completion("a", "b", "2"), Chat(DIALOGUE, "3")]
    notes = tokenization.tokenize(rows, tokenizer, 512).notes
    assert notes[-1] == "1 row trains an end token alone: the model learns to answer nothing there"
    # A template may write less than the message has.
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim('.')")
    dots = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "..."}]
    assert any("1 row trains an end" in note for note in tokenization.tokenize([Chat(dots, "1")], tokenizer, 64).notes)


# --- batches, windows --------------------------------------------------------------------------------------


def test_padding_is_on_the_right_and_has_no_loss(tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 2, 7], "labels": [IGNORED, 2, 7]}, {"input_ids": list(range(9)), "labels": [IGNORED] * 9}]
    batch = Collator(tokenizer)(rows)
    assert {key: tuple(value.shape) for key, value in batch.items()} == dict.fromkeys(batch, (2, 16))
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["input_ids"][0].tolist() == [5, 2, 7] + [tokenizer.pad_token_id] * 13
    assert batch["labels"][0].tolist() == [IGNORED, 2, 7] + [IGNORED] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [
        3,
        9,
    ]  # the token 2 also pads
    tokenizer.pad_token = None
    assert Collator(tokenizer, multiple_of=1)(rows)["input_ids"][0, -1] == tokenizer.eos_token_id


def test_models_are_compared_at_the_tokens_with_loss(tokenizer: Any) -> None:
    rows: list[Row] = [Chat(DIALOGUE, "1"), Completion("ab", "cd", "2")]
    trained = tokenization.tokenize(rows, tokenizer, 64).rows
    for scored, row in zip(tokenization.scored_ids(rows, tokenizer, 64, 1000), trained, strict=True):
        expected = [label for label in row["labels"][1:] if label != IGNORED]
        assert scored.targets.tolist() == expected
        assert scored.ids == row["input_ids"][: len(scored.ids)]
        assert scored.positions[-1] + 2 == len(scored.ids)  # no token after the last target


def test_rows_after_the_limit_are_not_tokenized(tokenizer: Any) -> None:
    no_assistant = Chat([{"role": "user", "content": "x"}], "2")
    rows: list[Row] = [Completion("ab", "cd", "1"), no_assistant]
    assert [len(scored.positions) for scored in tokenization.scored_ids(rows, tokenizer, 64, 3)] == [3]
    assert next(tokenization.prompts(rows, tokenizer)).expected == "cd"


def test_rows_without_a_token_to_compare_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="None of 1 rows has a token to compare within 2 tokens"):
        tokenization.scored_ids([Completion("a long prompt", "x", "1")], tokenizer, 2, 10)


def test_the_limit_counts_positions_of_all_sequences(tokenizer: Any) -> None:
    found = tokenization.scored_ids([Text("abcdefghijklmnopqrstuvwxyz" * 3, "row")], tokenizer, 16, 20)
    assert [len(scored.positions) for scored in found] == [15, 5]
    assert found[1].positions == [0, 1, 2, 3, 4]


def _ids_and_labels(row: dict[str, list[int]]) -> dict[str, list[int]]:
    return {"ids": row["input_ids"], "labels": row["labels"]}
