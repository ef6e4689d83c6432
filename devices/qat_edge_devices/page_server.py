"""HTTP server on 127.0.0.1 for one page: gives it the files of a work folder, takes its results and its progress.

Every path begins with a random token, so that no other page or user of this machine can read or write anything. The
headers isolate the page from other origins, which browsers require before WebAssembly may use threads.

    GET  /TOKEN/NAME          a file of the work folder
    GET  /TOKEN/_machine      CPU time and memory of the browser, state of the machine
    POST /TOKEN/_append/NAME  append the body to a file of the work folder
    POST /TOKEN/_line         a line of progress
    POST /TOKEN/_alive        the page lives; the body is the number of steps taken
    POST /TOKEN/_exit         the end: {"code": 0, "message": ""}
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import unquote, urlsplit

from qat_edge_devices import device_data
from qat_edge_devices.device_errors import TransportError
from qat_edge_devices.transport import work_path

MOST_BODY_BYTES = 2 * 1024**3  # of one POST; a chunk of logits has 256 rows of the vocabulary
MOST_TEXT_BYTES = 64 * 1024  # of a line or a message
BLOCK_BYTES = 1024**2
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript",
         ".wasm": "application/wasm", ".json": "application/json"}  # fmt: skip
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class PageEnd:
    """The page's own report that it has ended; code and message are as a program's exit code and stderr."""

    code: int
    message: str


@dataclass
class PageSigns:
    """Signs of life: times of `time.monotonic`.

    Attributes:
        heard: when the page was last heard of; None before it was.
        moved: when it last took a step, wrote something or began.
        steps: number of steps it has taken.
    """

    heard: float | None = None
    moved: float = 0.0
    steps: int = 0


class PageServer:
    """Serves `folder` to one page.

    Attributes:
        events: lines of the page as text, and at last its `PageEnd`.
        signs: signs of life.
        url: address of the work folder, which ends in "/".

    Args:
        folder: the work folder.
        machine: returns the answer to `_machine`, with True if peaks of memory are to be forgotten first.
    """

    def __init__(self, folder: Path, machine: Callable[[bool], dict[str, Any]]) -> None:
        self.folder = folder
        self.machine = machine
        self.events: SimpleQueue[str | PageEnd] = SimpleQueue()
        self.signs = PageSigns(moved=time.monotonic())
        self.token = secrets.token_urlsafe(24)
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}/{self.token}/"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Answer requests in another thread until the block is left."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def file(self, name: str) -> Path:
        """Return the path of a file of the work folder.

        Raises:
            TransportError: the name leads outside.
        """
        return self.folder / work_path("page", unquote(name))

    def take(self, command: str, text: str) -> None:
        """Record a line, a sign of life or the end.

        Raises:
            ValueError, TypeError, KeyError: the text is not what the command takes.
        """
        now = time.monotonic()
        self.signs.heard = now
        if command == "_alive":
            steps = device_data.whole_number(text)
            if steps is None:
                raise ValueError("expected a number of steps")
            if steps == self.signs.steps:
                return
            self.signs.steps = steps
        self.signs.moved = now
        if command == "_line":
            self.events.put(text)
        if command == "_exit":
            found = device_data.parse_json(text)
            self.events.put(PageEnd(device_data.checked(found["code"], int, "code"), str(found["message"])))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, page: PageServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.page = page

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report what goes wrong in this server, but not that Chromium has ended with its connections open."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name, query = self._name()
        if name is None:
            return
        if name == "_machine":
            self._answer(HTTPStatus.OK, json.dumps(self.server.page.machine(query == "forget_peak")).encode(), ".json")
            return
        try:
            path = self.server.page.file(name)
            file = path.open("rb")
        except (OSError, TransportError):
            self._answer(HTTPStatus.NOT_FOUND, b"no such file")
            return
        with file:
            self._head(HTTPStatus.OK, path.stat().st_size, path.suffix)
            shutil.copyfileobj(file, self.wfile, BLOCK_BYTES)

    def do_POST(self) -> None:
        name, _ = self._name()
        if name is None:
            return
        length = device_data.whole_number(self.headers.get("Content-Length", ""))
        most = MOST_BODY_BYTES if name.startswith("_append/") else MOST_TEXT_BYTES
        if length is None or length > most:
            self.close_connection = True
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"no length, or too long")
            return
        try:
            if name.startswith("_append/"):
                self._append(self.server.page.file(name.removeprefix("_append/")), length)
                self.server.page.signs.moved = time.monotonic()
            else:
                self.server.page.take(name, self.rfile.read(length).decode("utf-8"))
        except OSError as error:  # the disk is full, for one
            self.close_connection = True
            self._answer(HTTPStatus.INSUFFICIENT_STORAGE, str(error).encode())
        except (TransportError, ValueError, TypeError, KeyError) as error:
            self.close_connection = True
            self._answer(HTTPStatus.BAD_REQUEST, str(error).encode())
        else:
            self._answer(HTTPStatus.OK, b"")

    def _append(self, path: Path, length: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            while length and (block := self.rfile.read(min(length, BLOCK_BYTES))):
                file.write(block)
                length -= len(block)

    def _name(self) -> tuple[str | None, str]:
        """Return the part of the path after the token and the query; answer 404 and return None without a token."""
        parts = urlsplit(self.path)
        token, _, name = parts.path.removeprefix("/").partition("/")
        if secrets.compare_digest(token.encode(), self.server.page.token.encode()):
            return name, parts.query
        self.close_connection = True
        self._answer(HTTPStatus.NOT_FOUND, b"")
        return None, ""

    def _answer(self, status: HTTPStatus, body: bytes, suffix: str = "") -> None:
        self._head(status, len(body), suffix)
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, length: int, suffix: str) -> None:
        self.send_response(status)
        for key, value in HEADERS.items():
            self.send_header(key, value)
        self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: stderr belongs to the command."""
