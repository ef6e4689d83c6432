"""Rows that are read as they are needed: the same rows as without streaming, in an order that can be gone on with."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import make_tokenizer
from qat_edge.data import formats, json_list, streamed_rows
from qat_edge.data.formats import RowStream, load_rows
from qat_edge.data.rows import Chat, Completion, Text
from qat_edge.data.streamed_rows import StreamCounts, StreamedRows, StreamPosition, blocks, first_rows
from qat_edge.data.tokenization import tokenize
from qat_edge.errors import DataError, RunError

RECORDS = [{"prompt": f"say {i} ", "completion": f"it is {i}, " + "and on " * (i % 5)} for i in range(25)]


@pytest.fixture(autouse=True)
def _small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(streamed_rows, "BLOCK_ROWS", 10)


def write_jsonl(path: Path, records: list[dict[str, Any]] = RECORDS) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(RECORDS)


def make_stream(source: str, capacity: int | None = None, template: str = "", **options: Any) -> StreamedRows:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template + tokenizer.chat_template
    return StreamedRows(
        RowStream(source, report=False, streamed=True),
        lambda rows: tokenize(rows, tokenizer, 64, join_texts=capacity is None, may_be_empty=True),
        **{"seed": 0, "capacity": capacity, "eval_rows": None, "conversation": {}, **options},
    )


# --- every format ------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "rows.csv": write_csv,
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path),
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
    "parts/train.jsonl": write_jsonl,
    "tables/train.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path),
    "lists/train.json": lambda path: path.write_text(json.dumps(RECORDS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_streamed_rows_are_those_that_are_read_otherwise(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    WRITERS[name](tmp_path / name)
    source = str(tmp_path / name.partition("/")[0])
    # The list of a folder is named by its file, not by the folder.
    streamed, expected = (
        [replace(row, where="") for row in rows] for rows in (RowStream(source, streamed=True), load_rows(source))
    )
    assert streamed == expected and len(expected) == 25


def test_compressed_tables_of_a_folder_are_streamed_as_texts(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    with gzip.open(tmp_path / "tables/train.csv.gz", "wt") as file:
        file.write("prompt,completion\n007,NA\n")
    (row,) = RowStream(str(tmp_path / "tables"), streamed=True)
    assert isinstance(row, Completion) and (row.prompt, row.completion) == ("007", "NA")


def test_streaming_a_parquet_file_writes_no_copy(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "rows.parquet")
    list(RowStream(str(tmp_path / "rows.parquet"), streamed=True))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".arrow"]


def test_a_text_file_is_streamed_in_pieces_that_end_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "TEXT_PIECE", 15)
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfone line\r\nanother line\r\nthe end")
    assert list(RowStream(str(path), streamed=True)) == [
        Text("one line\nanother line\n", f"{path}:1"),
        Text("the end", f"{path}:3"),
    ]


def test_a_stream_that_ends_before_the_rows_that_are_promised_is_named() -> None:
    data = datasets.Dataset.from_list(RECORDS[:3]).to_iterable_dataset()
    assert len(list(formats._decoded_records(data, "org/name:train, row", 3))) == 3
    with pytest.raises(DataError, match=r"org/name:train, row 4: the stream ends here, .* has 5 rows"):
        list(formats._decoded_records(data, "org/name:train, row", 5))


def test_a_connection_that_is_lost_names_the_row() -> None:
    def records() -> Any:
        yield from RECORDS[:2]
        raise ConnectionError("Server Disconnected")

    data = datasets.IterableDataset.from_generator(records)
    with pytest.raises(DataError, match=r"org/name:train, row 3: cannot be read \(Server Disconnected\)"):
        list(formats._decoded_records(data, "org/name:train, row"))


# --- lists and lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize(
    "text", ["[]", " [ ] \n", '[{"text": "a, ]"},\n {"text": "\\"}"}, {"text": "c", "n": [1, [2]]}]']
)
def test_lists_are_read_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, text: str
) -> None:
    monkeypatch.setattr(json_list, "CHUNK", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    found = [record for record, _ in formats._json_records(path)]
    assert found == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', "row 2: not JSON"),
        ('[{"text": "a"}, {"text": "b"}', r"not JSON after row 2 \(the list ends early\)"),
        ('[{"text": "a"} {"text": "b"}]', r"not JSON after row 1 \(',' or '\]' expected, found '\{'\)"),
        ('[{"text": "a"}] more', r"not JSON after row 1 \(more follows after the list\)"),
        ('[{"text": "a"},]', "row 2: not JSON"),
        ('[{"text": "a"}, {"text": "b", "text": "c"}]', "row 2: not usable JSON"),
        ('[{"text": "a"}, {"text": NaN}]', "row 2: not usable JSON"),
        ('{"text": ["a"]}', "expected a JSON list of rows, found an object"),
        ("", "not JSON"),
    ],
)
def test_what_is_wrong_with_a_list_is_named_by_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_line_that_is_not_utf_8_is_named(tmp_path: Path, name: str) -> None:
    head = "text\ngood\n" if name == "rows.csv" else '{"text": "good"}\n'
    tail = b"caf\xe9\n" if name == "rows.csv" else b'{"text": "caf\xe9"}\n'
    (tmp_path / name).write_bytes(head.encode() + tail)
    line = head.count("\n") + 1
    with pytest.raises(DataError, match=rf"{name}:{line}: not UTF-8 text \(byte 0xe9 at character \d+\)"):
        load_rows(str(tmp_path / name))


def test_memory_does_not_grow_with_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "CHUNK", 10_000)

    def peak(count: int) -> int:
        path = tmp_path / "rows.json"
        path.write_text(json.dumps([{"text": "word " * 20}] * count))
        tracemalloc.start()
        assert sum(1 for _ in RowStream(str(path))) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(100)  # caches
    assert peak(20_000) < 1.5 * peak(1000)


# --- blocks and positions ----------------------------------------------------------------------------------


def test_blocks_have_all_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows(write_jsonl(tmp_path / "rows.jsonl"))
    found = list(blocks(rows))
    assert [len(block.rows) for block in found] == [10, 10, 5] and len({block.sha256 for block in found}) == 3
    assert [row for block in found for row in block.rows] == rows and first_rows(rows) == rows[:10]
    monkeypatch.setattr(streamed_rows, "BLOCK_BYTES", 1)
    assert [len(block.rows) for block in blocks(rows)] == [1] * 25


def ids_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(row["input_ids"])


def test_each_pass_has_every_row_in_another_order(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl")
    expected = Counter(map(ids_of, tokenize(load_rows(source), make_tokenizer(), 64).rows))
    rows = list(map(ids_of, islice(make_stream(source), 50)))
    first, second = rows[:25], rows[25:]
    assert Counter(first) == Counter(second) == expected
    assert first[:10] != second[:10] and Counter(first[:10]) == Counter(second[:10])
    assert list(map(ids_of, islice(make_stream(source), 50))) == rows
    assert list(map(ids_of, islice(make_stream(source, seed=1), 25))) != first


@pytest.mark.parametrize("capacity", [None, 64])
@pytest.mark.parametrize("done", [3, 7, 10, 11, 17, 25, 40])
def test_a_stream_goes_on_from_any_position(tmp_path: Path, done: int, capacity: int | None) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl")
    whole = make_stream(source, capacity)
    rows = list(islice(whole, 60))
    begun = make_stream(source, capacity)
    list(islice(begun, done))
    position = begun.position_at(done)
    assert position.yielded <= done

    path = tmp_path / "stream.json"
    path.write_text(json.dumps(asdict(position)))
    resumed = make_stream(source, capacity)
    resumed.resume(StreamPosition.load(path), done)
    assert list(islice(resumed, 60 - done)) == rows[done:]
    assert resumed.position == whole.position


def test_only_rows_that_are_not_trained_on_may_change(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl")
    begun = make_stream(source)
    list(islice(begun, 13))
    position = begun.position_at(13)
    for changed, is_refused in ((22, False), (15, True), (4, True)):
        records = [{**record, "completion": "other"} if i == changed else record for i, record in enumerate(RECORDS)]
        resumed = make_stream(write_jsonl(tmp_path / "rows.jsonl", records))
        resumed.resume(position, 13)
        if not is_refused:
            assert len(list(islice(resumed, 12))) == 12
            continue
        with pytest.raises(RunError, match=r"rows\.jsonl has other rows than when the run read them"):
            next(iter(resumed))

    resumed = make_stream(write_jsonl(tmp_path / "rows.jsonl", RECORDS[:5]))
    resumed.resume(position, 13)
    with pytest.raises(RunError, match="has other rows"):
        next(iter(resumed))


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"block": 10**30},
        {"block": "1"},
        {"counts": {}},
        {"end_of_turn": ["x"]},
        {"sha256": None},
        {"more": 1},
    ],
)
def test_a_position_that_was_edited_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "stream.json"
    path.write_text(json.dumps(asdict(StreamPosition(counts=StreamCounts(3))) | change))
    with pytest.raises(RunError, match="is no position in the data"):
        StreamPosition.load(path)


def test_a_bad_row_is_named_when_its_block_comes(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [*RECORDS[:13], {"prompt": "say"}, *RECORDS[13:]])
    stream = iter(make_stream(source))
    assert len(list(islice(stream, 10))) == 10
    with pytest.raises(DataError, match=r"rows\.jsonl:14: "):
        next(stream)


# --- what is known of all rows -----------------------------------------------------------------------------


def test_counts_and_notes_cover_the_rows_that_were_read(tmp_path: Path, messages: list[str]) -> None:
    records = [{"prompt": "a ", "completion": "b" * (200 if i in (3, 14) else 5)} for i in range(25)]
    records += [{"text": " "}, {"prompt": "p" * 100, "completion": "c"}]
    held_out = tokenize([Completion("a ", "b" * 5, "row")], make_tokenizer(), 64).rows
    stream = make_stream(write_jsonl(tmp_path / "rows.jsonl", records), eval_rows=held_out)
    list(islice(stream, 60))
    counts = stream.position.counts
    assert (counts.rows, counts.sequences, counts.truncated, counts.dropped) == (27, 25, 3, 1)
    assert stream.summary().startswith("27 rows read, some of them 3 times; 3 rows truncated, ")
    shown = [message for message in messages if "evaluation row" in message or "empty 'text'" in message]
    assert len(shown) == 2 and f"train, from {tmp_path}/rows.jsonl:21 on: 1 row with an empty 'text'" in shown[1]


def test_unused_keys_of_the_first_block_are_reported_once(tmp_path: Path, messages: list[str]) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{**record, "id": 1} for record in RECORDS])
    stream = RowStream(source, streamed=True)
    assert len(first_rows(stream)) == 10 and len(list(stream)) == 25
    assert messages == [f"{source}: not used: 'id' in 10 rows"]


def test_conversations_of_later_blocks_change_the_manifests(tmp_path: Path) -> None:
    def chat(i: int, arguments: dict[str, Any]) -> Chat:
        turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": str(i)}]
        return Chat(turns, f"row {i}", template_arguments=arguments)

    conversation: dict[str, Any] = {"end_of_turn": (), "template_arguments": {}}
    stream = make_stream(
        write_jsonl(tmp_path / "rows.jsonl"), conversation=conversation, template="{% if fast %}quickly{% endif %}"
    )
    stream.stream = [  # type: ignore[assignment]  # anything with rows
        *(Completion("a", "b", f"row {i}") for i in range(10)),
        *(chat(i, {"fast": True}) for i in range(10)),
        *(chat(i, {"fast": False}) for i in range(10)),
    ]
    rows = iter(stream)
    seen = []
    for _ in range(3):
        list(islice(rows, 10))
        seen.append(dict(conversation))
    end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
    assert [entry["template_arguments"] for entry in seen] == [{}, {"fast": True}, {}]
    assert [entry["end_of_turn"] for entry in seen] == [(), (end,), (end,)]
    assert replace(stream.position, counts=StreamCounts()).end_of_turn == (end,)
