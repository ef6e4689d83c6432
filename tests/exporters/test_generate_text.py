"""The text that is taken from what ExecuTorch's runner prints."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from qat_edge_exporters.executorch.generate_text import PrintedAnswer
from qat_edge_exporters.executorch.llm_runner import STATISTICS
from qat_edge_exporters.runner_process import RunnerProcess

MARK = "0123456789abcdef"  # of the request


@pytest.mark.parametrize(
    ("printed", "shown"),
    [
        ("Paris.", "Paris."),
        ("Paris.<|im_end|>", "Paris."),
        ("a < b <|im_start|>c", "a < b c"),
        ("two\nlines\n\n", "two\nlines\n\n"),  # as where the answer was cut
        ("two\n<|im_end|>\n", "two\n"),  # the runner's own line feed
        ("a<|im_start|>\nb", "a\nb"),
        ("smile \U0001f642 done", "smile \U0001f642 done"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("end", [f"{MARK} 7\n", f'{STATISTICS} {{"a":1}}\n{MARK} 7\n'])
def test_the_answer_alone_is_shown(printed: str, shown: str, end: str) -> None:
    stream = io.BytesIO((printed + end + "the next answer").encode())
    answer = PrintedAnswer(stream, ["<|im_start|>", "<|im_end|>"], MARK)
    assert "".join(answer.pieces()) == shown
    assert (answer.tokens, answer.has_end) == (7, printed.rstrip("\n").endswith("<|im_end|>"))
    assert stream.read() == b"the next answer"


def test_an_answer_without_its_mark_is_not_complete() -> None:
    answer = PrintedAnswer(io.BytesIO(b"Paris" + STATISTICS.encode() + b" {}\n"), [], MARK)
    assert "".join(answer.pieces()) == "Paris" and answer.tokens is None


def test_bytes_that_are_no_text_are_marked() -> None:
    assert "".join(PrintedAnswer(io.BytesIO(b"a\xf0\x9fb"), [], MARK).pieces()) == "a\ufffdb"


def test_text_comes_as_soon_as_it_can_be_told_from_a_mark() -> None:
    stream = io.BytesIO(b"one<")
    pieces = PrintedAnswer(stream, ["<end>"], MARK).pieces()
    assert next(pieces) == "o"
    assert stream.tell() == 1


def test_a_line_of_information_is_not_the_reason_of_a_crash() -> None:
    log = "E 01:33:02 executorch:x.cpp:1] Failed to load\nI 01:33:03 executorch:y.cpp:2] Metadata: use_kv_cache = 1\n"
    for text, reason in ((log, "Failed to load"), (log.splitlines(keepends=True)[1], "signal 6")):
        process = subprocess.Popen([sys.executable, "-c", "import os; os.abort()"])
        code, said = RunnerProcess(process, io.BytesIO(), io.StringIO(text)).finish()
        assert code == -6 and reason in said and "Metadata" not in said
