"""One loader for JSON, YAML and TOML: correct files are read, hostile ones end in one short sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat_edge import readers
from qat_edge.errors import DataError, QatEdgeError, UsageError

Reader = Callable[[Path, type[QatEdgeError]], Any]
HOSTILE: list[tuple[str, bytes, Reader, str]] = [
    ("deep.json", b"[" * 100_000 + b"]" * 100_000, readers.read_json, "nested deeper than 100 levels"),
    ("open.json", b'{"a":' * 100_000, readers.read_json, "nested deeper than 100 levels"),
    ("digits.json", b"1" * 5000, readers.read_json, "an integer of 5000 digits"),
    ("fraction.json", b"0." + b"1" * 5000, readers.read_json, "a number of 5002 characters"),
    ("large.json", b"1e999", readers.read_json, "1e999 is too large"),
    ("nan.json", b"[NaN]", readers.read_json, "NaN is not a JSON number"),
    ("surrogate.json", b'{"a": "\\ud800"}', readers.read_json, r"half of a surrogate pair, \\ud800"),
    ("key.json", b'{"\\ud800": 1}', readers.read_json, "half of a surrogate pair"),
    ("twice.json", b'{"a": 1, "b": 2, "a": 3}', readers.read_json, "key 'a' twice"),
    ("utf16.json", "{}".encode("utf-16"), readers.read_json, "not UTF-8 text"),
    ("cut.json", b'{"a": ', readers.read_json, r"not JSON \("),
    ("list.json", b"[1]", readers.read_object, r"expected a JSON object, found \[1\]"),
    ("deep.yaml", b"[" * 10_000, readers.read_yaml, "nested deeper than 100 levels"),
    ("digits.yaml", b"a: " + b":".join([b"1"] * 50_000), readers.read_yaml, "an integer of 99999 digits"),
    ("alias.yaml", b"a: &a [x, x]\nb: [*a, *a]\n", readers.read_yaml, r"alias '\*a' is not supported"),
    ("tag.yaml", b"a: !!python/object/apply:os.system ['true']\n", readers.read_yaml, "constructor for the tag"),
    ("twice.yaml", b"a: 1\na: 2\n", readers.read_yaml, "'a' is given twice"),
    ("octal.yaml", b"steps: 0200\n", readers.read_yaml, "0200 is a number that YAML reads in another base"),
    ("minutes.yaml", b"steps: 1:30\n", readers.read_yaml, "1:30 is a number that YAML reads in another base"),
    ("date.yaml", b"a: 2001-99-99\n", readers.read_yaml, "month must be in"),
    ("large.yaml", b"#" * (readers.MAX_YAML_BYTES + 1), readers.read_yaml, "bytes; at most 262144 are read"),
    ("deep.toml", b".".join([b"a"] * 500) + b" = 1", readers.read_toml, "nested deeper than 100 levels"),
    ("digits.toml", b"a = " + b"1" * 5000, readers.read_toml, "an integer with too many digits"),
    ("large.toml", b"#" * (readers.MAX_TOML_BYTES + 1), readers.read_toml, "bytes; at most 16384 are read"),
]


@pytest.mark.parametrize(("name", "data", "read", "message"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_a_hostile_file_is_one_short_error(tmp_path: Path, name: str, data: bytes, read: Reader, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as raised:
        read(path, DataError)
    assert str(raised.value).startswith(str(path)) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    ("name", "text", "read"),
    [
        ("plain.json", '{"a": [1, 2.5, null, true, "\\ud83d\\ude42"]}', readers.read_json),
        ("plain.yaml", "a: [1, 2.5, null, true, 🙂]\n", readers.read_yaml),
    ],
)
def test_plain_files_are_read_with_and_without_a_byte_order_mark(
    tmp_path: Path, name: str, text: str, read: Reader
) -> None:
    path = tmp_path / name
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(text, encoding=encoding)
        assert read(path, DataError) == {"a": [1, 2.5, None, True, "🙂"]}


def test_toml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("a = [1, 2.5]\n[b]\nc = 'd'\n")
    assert readers.read_toml(tmp_path / "a.toml", UsageError) == {"a": [1, 2.5], "b": {"c": "d"}}


def test_nan_is_read_where_our_own_results_may_hold_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[NaN]")
    (found,) = readers.read_json(tmp_path / "a.json", DataError, allow_nan=True)
    assert found != found


@pytest.mark.parametrize(
    ("path", "message"),
    [("/dev/zero", "not a file"), (".", "not a file"), ("no/such", "no such file"), ("a\0b", "null")],
)
def test_what_is_no_file_is_named(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        readers.read_json(Path(path), UsageError, "--config FILE")


def test_messages_quote_values_shortly() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert readers.show(deep) == "list of 1"
    assert readers.show("x" * 10**6) == "'" + "x" * 80 + "...'"
    assert readers.show(2**5000) == "an integer of 5001 bits"
    assert (readers.show("a"), readers.show(1.5), readers.show(None)) == ("'a'", "1.5", "None")


def test_a_count_of_one_is_in_the_singular() -> None:
    assert [readers.counted(count, "row") for count in (0, 1, 2)] == ["0 rows", "1 row", "2 rows"]
    assert readers.counted(1, "matrix is", "matrices are") == "1 matrix is"
    assert readers.counted(3, "matrix is", "matrices are") == "3 matrices are"
