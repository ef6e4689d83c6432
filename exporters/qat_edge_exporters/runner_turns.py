"""The runner's side of a conversation; `runner_process` is the other side.

    stdin    a line of JSON for each turn, with "tokens", the longest answer; STOP ends the answer in progress, and the
             end of stdin ends the runner
    stdout   READY once the model is loaded; then the id of each token as a line, and END after each answer

stdin is read in a thread of its own, so that STOP arrives while a runtime computes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

READY, END, STOP = "ready", "end", "stop"
STOP_EVERY_S = 0.02  # a runtime may miss a call that comes before its loop begins
READ_BYTES = 2**16

Take = Callable[[int], bool]  # takes an id; returns whether the next one is wanted


class RunnerTurns:
    """Requests of a conversation, one at a time.

    Args:
        stop: Ends the answer in progress, in a runtime that gives no chance between tokens; called repeatedly, from
            another thread, until the answer has ended.
    """

    def __init__(self, stop: Callable[[], None] | None = None) -> None:
        self._stop = stop
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._stopped, self._answered = threading.Event(), threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_stopped(self) -> bool:
        """Return whether the answer in progress is to end."""
        return self._stopped.is_set()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield each request; asking for the next one ends the turn."""
        print(READY, flush=True)
        while (line := self._lines.get()) is not None:
            yield json.loads(line)
            self._answered.set()

    def _read(self) -> None:
        for line in _stdin_lines():
            if line == STOP.encode():
                self._end_answer()
            else:
                # Here, in the order of the lines, and not where the request is taken: a STOP after it must count.
                self._stopped.clear()
                self._answered.clear()
                self._lines.put(line)
        self._end_answer()
        self._lines.put(None)

    def _end_answer(self) -> None:
        self._stopped.set()
        while self._stop is not None and not self._answered.wait(STOP_EVERY_S):
            self._stop()


def serve(run: Callable[[dict[str, Any], Take], None]) -> None:
    """Print the ids of an answer to each request, in a runtime whose loop over tokens is ours.

    Args:
        run: Passes each id of an answer to its second argument, until that returns False.
    """
    turns = RunnerTurns()

    def take(token: int) -> bool:
        print(token, flush=True)
        return not turns.is_stopped

    for request in turns:
        run(request, take)
        print(END, flush=True)


def _stdin_lines() -> Iterator[bytes]:
    """Yield the lines of stdin. Python's own reader has a lock, which a thread must not hold when the process ends."""
    rest = b""
    while data := os.read(0, READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
