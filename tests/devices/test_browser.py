"""ONNX folders in onnxruntime-web inside headless Chromium, and the errors where that is impossible."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import onnx
import psutil
import pytest
import torch
from browser_fixtures import chromium_or_skip
from onnx import TensorProto, helper
from summing_model import PEAK, VOCABULARY, greedy, summing_graph, sums, write_onnx

from qat_edge.diagnose.error_budget import _processors, _reference_key
from qat_edge.diagnose.runtime_rounding import FLOAT, emulate_rounding, rounding_of
from qat_edge.errors import UsageError
from qat_edge.evaluate import reference
from qat_edge.evaluate.devices import require_runtimes, run_on_devices
from qat_edge.options import ValidateOptions
from qat_edge.quant.scheme import LinearCodes
from qat_edge.run import Run
from qat_edge.verbs.validate import validate_devices
from qat_edge_devices import browser_transport, chromium, onnxruntime_web, open_runtime, open_transport
from qat_edge_devices.agent.active_adapter import ADAPTER_FILE
from qat_edge_devices.browser_transport import BrowserTransport
from qat_edge_devices.device_errors import (
    CancelledError,
    DeviceTimeoutError,
    KilledError,
    RequestRejectedError,
    TransportError,
    UnknownNameError,
)
from qat_edge_devices.mock import MockTransport
from qat_edge_devices.page_server import PageEnd, PageServer
from qat_edge_devices.processor import Processor, this_processor
from qat_edge_devices.runtimes import agent_runtime
from qat_edge_devices.transport import Access, CompletedProgram
from tests.exporters.tiny import MIXED, export_to, freeze, llama, sqnr

ARGV = ("agent/agent.html", "request.json", "results")


# --- without Chromium ----------------------------------------------------------------------------------------


def program(folder: Path, name: str, script: str) -> str:
    """Write a shell script, and return its path."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_without_chromium_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        TransportError, match=r"no Chromium in PATH .* `apt-get install chromium`.*browser:/path/to/chrom"
    ):
        open_transport("browser", Access(folder=str(tmp_path)))
    with pytest.raises(TransportError, match=r"/no/such is not a program"):
        open_transport("browser:/no/such", Access(folder=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_the_first_known_program_of_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = program(tmp_path, "google-chrome", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert chromium.find_chromium("browser", "") == second
    first = program(tmp_path, "chromium", "")
    assert chromium.find_chromium("browser", "") == first
    assert chromium.find_chromium("browser", second) == second


def test_another_program_is_refused(tmp_path: Path) -> None:
    path = program(tmp_path / "with a space", "tool", "echo tool 1.0")
    with pytest.raises(TransportError, match=r"--version` printed 'tool 1.0'. Give the path of Chromium"):
        open_transport(f"browser:{path}", Access(folder=str(tmp_path)))


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put an npm that is a shell script into PATH; it finds the folder for the archive in $out."""

    def put(script: str) -> None:
        program(tmp_path / "bin", "npm", f"while [ $# -gt 0 ]; do out=$1; shift; done\n{script}")

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return put


def test_without_npm_the_message_has_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TransportError, match=r"no npm in PATH.*`npm pack onnxruntime-web@[\d.]+`.*copy .*\.tgz to /"):
        onnxruntime_web.fetch_archive("browser", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_npm_that_fails_is_quoted(tmp_path: Path, npm: Callable[[str], None]) -> None:
    npm("echo npm error 404 no such package >&2; exit 1")
    with pytest.raises(TransportError, match=r"failed: npm error 404 no such package\. Check npm's registry"):
        onnxruntime_web.fetch_archive("browser", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_for_downloads_that_is_a_file_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TransportError, match=r"browser: .*\.tgz cannot be written \(File exists\).*--device-folder\."):
        onnxruntime_web.fetch_archive("browser", tmp_path / "file")


def test_another_archive_is_refused(tmp_path: Path, npm: Callable[[str], None]) -> None:
    npm("echo something else >$out/onnxruntime-web.tgz")
    with pytest.raises(TransportError, match=r"another file as onnxruntime-web@.*Nothing was kept"):
        onnxruntime_web.fetch_archive("browser", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_archive_is_downloaded_once_and_again_if_damaged(
    tmp_path: Path, npm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archive").write_bytes(b"archive")
    monkeypatch.setattr(onnxruntime_web, "SHA512", onnxruntime_web._sha512(tmp_path / "archive"))
    npm("echo x >>$out/../../calls; printf archive >$out/onnxruntime-web.tgz")
    for calls in (1, 1):
        path = onnxruntime_web.fetch_archive("browser", tmp_path / "cache")
        assert path.read_bytes() == b"archive"
        assert (tmp_path / "calls").read_text().count("x") == calls
    path.write_bytes(b"damaged")
    assert onnxruntime_web.fetch_archive("browser", tmp_path / "cache").read_bytes() == b"archive"
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[PageServer]:
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "page.html").write_text("<p>page")
    (tmp_path / "secret").write_text("secret")
    server = PageServer(tmp_path / "served", lambda forget: {"forget": forget})
    with server.serving():
        yield server


def call(
    server: PageServer, method: str, name: str, body: bytes = b"", token: str | None = None
) -> tuple[int, bytes, Any]:
    """Send one request below the token; return status, body and headers."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    with closing(connection):
        connection.request(method, f"/{server.token if token is None else token}/{name}", body or None)
        response = connection.getresponse()
        return response.status, response.read(), response.headers


def test_the_page_gets_files_of_its_folder_only(server: PageServer) -> None:
    status, body, headers = call(server, "GET", "page.html?request=1")
    assert (status, body, headers["Content-Type"]) == (200, b"<p>page", "text/html; charset=utf-8")
    # Without these, WebAssembly has no threads.
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    for name in ("none", "../secret", "%2e%2e/secret", "/etc/passwd", ""):
        assert call(server, "GET", name)[0] == 404, name
    assert call(server, "GET", "page.html", token="guess")[0] == 404
    assert call(server, "POST", "_append/new", b"x", token="guess")[0] == 404
    assert sorted(path.name for path in server.folder.iterdir()) == ["page.html"]


def test_the_page_appends_to_files_of_its_folder_only(server: PageServer) -> None:
    assert [call(server, "POST", "_append/results/a.npy", part)[0] for part in (b"one", b"two")] == [200, 200]
    assert (server.folder / "results" / "a.npy").read_bytes() == b"onetwo"
    assert call(server, "POST", "_append/../secret", b"x")[0] == 400
    assert (server.folder.parent / "secret").read_text() == "secret"


def test_the_page_reports_progress_life_and_end(server: PageServer) -> None:
    assert json.loads(call(server, "GET", "_machine?forget_peak")[1]) == {"forget": True}
    assert server.signs.heard is None
    began = server.signs.moved
    assert call(server, "POST", "_alive", b"0")[0] == 200
    assert server.signs.heard is not None and server.signs.moved == began, "alive, but no step"
    assert call(server, "POST", "_alive", b"3")[0] == 200
    assert server.signs.moved > began
    assert call(server, "POST", "_line", b"progress 1 2")[0] == 200
    assert call(server, "POST", "_exit", b'{"code": 65, "message": "no"}')[0] == 200
    assert [server.events.get(), server.events.get()] == ["progress 1 2", PageEnd(65, "no")]
    for name, body in (("_alive", b"x"), ("_exit", b"{}"), ("_exit", b"no JSON"), ("_line", b"x" * 100_000)):
        assert call(server, "POST", name, body)[0] in (400, 413)


def test_the_page_has_the_constants_of_the_python_side() -> None:
    text = (agent_runtime.AGENT / "agent.js").read_text(encoding="utf-8")
    constants = dict(re.findall(r"^const (\w+) = (\d+);", text, flags=re.MULTILINE))
    assert constants == {
        "FORMAT": str(agent_runtime.FORMAT), "EXIT_REJECTED": str(agent_runtime.EXIT_REJECTED), "CHUNK_TOKENS": "256",
    }  # fmt: skip
    names = re.findall(r'"(ort\.\w+\.min\.mjs)"', text)
    assert names == [onnxruntime_web.WASM_FILES[0], onnxruntime_web.WEBGPU_FILES[0]]


def test_a_path_that_is_no_program_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text("finetune: {}\n")
    monkeypatch.setattr("qat_edge.models.tasks.require_causal_lm", lambda *_: None)
    for device in ("browser:/no/such", f"browser-webgpu:{tmp_path}"):
        with pytest.raises(UsageError, match=r"--device browser.*: /.* is not a program\. Give the path of Chromium"):
            validate_devices(Run(tmp_path), ValidateOptions(device=("local", device)))


def test_a_browser_runs_onnx_artifacts_only(onnx_folder: Path, tmp_path: Path) -> None:
    options = ValidateOptions(device=("browser",))
    require_runtimes({"browser": options, "ssh:pi": options}, lambda each: {"onnx"})
    with pytest.raises(UsageError, match=r"--device browser: .* as well: executorch, gguf. Give --target onnx."):
        require_runtimes({"browser": options}, lambda each: {"onnx", "executorch", "gguf"})
    with pytest.raises(UsageError, match="Leave --runner-binary out"):
        require_runtimes({"browser:/x": ValidateOptions(runner_binary="run")}, lambda each: {"onnx"})

    transport = MockTransport(lambda argv, files: CompletedProgram(0, "", ""), name="browser")
    with pytest.raises(UnknownNameError, match=r"'gguf' is not a known runtime\. Known: onnx\."):
        open_runtime("gguf", transport, 1)
    with pytest.raises(UnknownNameError, match="onnxruntime-web needs a browser"):
        open_runtime("onnx", transport, 1).prepare(onnx_folder)
    with_adapter = tmp_path / "adapter"
    shutil.copytree(onnx_folder, with_adapter)
    (with_adapter / ADAPTER_FILE).write_bytes(b"")
    with pytest.raises(RequestRejectedError, match="has a LoRA adapter, and onnxruntime-web cannot load one"):
        open_runtime("onnx", transport, 1).files(with_adapter)  # type: ignore[attr-defined]


def test_browsers_and_this_machine_are_measured_one_at_a_time() -> None:
    names = ("ssh:a", "browser", "local", "adb:b")
    transports = {name: MockTransport(lambda argv, files: CompletedProgram(0, "", ""), name=name) for name in names}
    running: set[str] = set()
    neighbours: dict[str, set[str]] = {}
    both = threading.Barrier(2)

    def work(device: str, transport: object) -> None:
        running.add(device)
        if device in ("ssh:a", "adb:b"):
            both.wait(10)
        neighbours[device] = set(running)
        if device in ("ssh:a", "adb:b"):
            both.wait(10)
        running.discard(device)

    results, failures = run_on_devices(transports, work)
    assert list(results) == ["local", "browser", "ssh:a", "adb:b"] and failures == {}
    assert neighbours["local"] == {"local"} and neighbours["browser"] == {"browser"}
    assert neighbours["ssh:a"] == {"ssh:a", "adb:b"}


# --- in Chromium ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("summing") / "onnx")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[BrowserTransport]:
    """A browser whose work folder is in `tmp_path`; its archive stays in the user's cache."""
    chromium_or_skip()
    with closing(browser_transport.open_browser("", Access())) as transport:
        yield transport
    assert not transport.folder.exists() and not transport.profiles.exists()
    assert processes_with(transport.profiles) == []


def processes_with(folder: Path) -> list[str]:
    """Return the command lines of living processes that name a folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(str(folder) in word for word in words):
            found.append(" ".join(words)[:200])
    return found


@pytest.mark.browser
def test_the_page_scores_traces_generates_and_times(onnx_folder: Path, page: BrowserTransport) -> None:
    shown: list[tuple[int, int]] = []
    runtime = open_runtime("onnx", page, 1, lambda done, total: shown.append((done, total)))
    runtime.prepare(onnx_folder)

    # 300 tokens: more than one chunk, then single tokens
    sequences = [[5], [i % VOCABULARY for i in range(300)]]
    for decode_from, chosen in ((None, sequences), (290, sequences[1:])):
        for scored, ids in zip(runtime.score(chosen, decode_from), chosen, strict=True):
            expected = np.zeros((len(ids), VOCABULARY), np.float32)
            expected[range(len(ids)), sums(ids)] = PEAK
            np.testing.assert_array_equal(np.load(scored.logits), expected, strict=True)
            load = scored.load
    assert shown == [(1, 2), (2, 2), (1, 1)]
    assert (load.runtime, load.runtime_version) == ("onnxruntime-web", onnxruntime_web.VERSION)
    assert (load.threads, load.context_length) == (1, 400)
    assert 50e6 < load.baseline_rss_bytes <= load.peak_rss_bytes < 4e9

    for traced in runtime.trace([[1, 2, 3]], decode_from=2):
        assert traced.names == ("logits",)
        assert np.load(traced.outputs)["arr_0"].argmax(1).tolist() == sums([1, 2, 3])

    end = greedy([1, 2], 3)[-1]
    done = runtime.generate([[1, 2], [5]], [end], 4)
    assert done.completions[0].ids == tuple(greedy([1, 2], 2)) and done.completions[0].stopped == "eos"
    assert len(done.completions[1].ids) <= 4
    with pytest.raises(RequestRejectedError, match="takes 501 tokens and the artifact's context holds 400"):
        runtime.generate([[1] * 500], [], 4)

    timed = runtime.speed(prefill=8, decode=4, repeats=2)
    assert len(timed.step_ms) == 8 and len(timed.ttft_ms) == 2 and timed.cores_busy > 0


@pytest.mark.browser
@pytest.mark.parametrize(
    ("group_size", "codes", "bits"), [(32, LinearCodes(), MIXED), (64, LinearCodes(2, "seq"), None)], ids=["4", "2"]
)
def test_the_logits_are_those_of_the_frozen_weights_with_float_inputs(
    group_size: int, codes: LinearCodes, bits: dict[str, int] | None, page: BrowserTransport, tmp_path: Path
) -> None:
    trained = freeze(llama(), group_size, tmp_path / "frozen", bits, codes=codes)
    folder = export_to("onnx", tmp_path / "frozen", tmp_path / "onnx").folder
    ids = [5, 6, 7, 8, 9, 10, 200, 30, 41, 52, 63, 74]
    runtime = open_runtime("onnx", page, 1)
    runtime.prepare(folder)
    (logits,) = [torch.from_numpy(np.load(scored.logits)) for scored in runtime.score([ids], decode_from=6)]

    rounding = rounding_in_browser(folder).on(page.info().processor)
    assert rounding.name == FLOAT
    model, names = reference.load_dequantized(tmp_path / "frozen")
    with torch.no_grad(), emulate_rounding(model, names, rounding):
        expected = model(torch.tensor([ids])).logits[0].float()
    with torch.no_grad():
        as_trained = trained(torch.tensor([ids])).logits[0].float()
    # Measured: 124 dB. With the rounding of inputs that training has, it is 33 dB.
    assert sqnr(expected, logits) > 100
    assert 20 < sqnr(as_trained, logits) < 60


def rounding_in_browser(folder: Path) -> Any:
    found = rounding_of(folder, "onnx", int8_cache=False)
    assert found is not None
    assert _processors(["browser"]) == {this_processor(), Processor.WASM}
    keys = [_reference_key("onnx", found, each) for each in (Processor.X86, Processor.WASM)]
    assert keys == ["onnx", "onnx, WebAssembly"]
    return found


@pytest.mark.browser
def test_a_page_that_runs_out_of_memory_is_named(page: BrowserTransport, tmp_path: Path) -> None:
    graph, one = summing_graph(), helper.make_tensor("", TensorProto.FLOAT, [1], [1.0])
    # Ones of 6.4 GB, where WebAssembly has 4 GB for everything: their mean is 1.
    graph.graph.node.extend([
        helper.make_node("ConstantOfShape", ["huge"], ["ones"], value=one),
        helper.make_node("ReduceMean", ["ones"], ["one"], keepdims=0),
        helper.make_node("Mul", ["plain", "one"], ["logits"]),
    ])  # fmt: skip
    next(node for node in graph.graph.node if node.op_type == "OneHot").output[0] = "plain"
    graph.graph.initializer.append(helper.make_tensor("huge", TensorProto.INT64, [2], [40_000, 40_000]))
    write_onnx(tmp_path / "onnx")
    onnx.save(graph, tmp_path / "onnx" / "model.onnx")
    runtime = open_runtime("onnx", page, 1)
    runtime.prepare(tmp_path / "onnx")
    with pytest.raises(RequestRejectedError, match=r"the page ran out of memory \(.*WebAssembly has 4 GB"):
        next(runtime.score([[1, 2]]))


@pytest.mark.browser
def test_a_file_that_is_no_graph_is_named(page: BrowserTransport, tmp_path: Path) -> None:
    write_onnx(tmp_path / "onnx")
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"no graph")
    runtime = open_runtime("onnx", page, 1)
    runtime.prepare(tmp_path / "onnx")
    with pytest.raises(RequestRejectedError, match=r"browser: model.onnx cannot be loaded: .*protobuf"):
        runtime.generate([[1]], [], 1)


def push_page(page: BrowserTransport, script: str, folder: Path) -> None:
    path = folder / "page.html"
    path.write_text(f"<!doctype html><script type=module>{script}</script>", encoding="utf-8")
    page.push({"agent/agent.html": path})


ALIVE = "setInterval(() => fetch('../_alive', {method: 'POST', body: '1'}), 200);"


@pytest.mark.browser
def test_a_silent_page_is_stopped_with_its_messages(
    page: BrowserTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_transport, "OPENS_S", 10.0)
    push_page(page, "throw new Error('this page is broken')", tmp_path)
    with pytest.raises(TransportError, match=r"(?s)did not open the page within 10 s.*this page is broken") as caught:
        page.run(ARGV, 60)
    assert "dbus" not in str(caught.value)

    monkeypatch.setattr(browser_transport, "STILL_S", 3.0)
    push_page(page, ALIVE, tmp_path)
    with pytest.raises(DeviceTimeoutError, match="ran past 3 s without a step"):
        page.run(ARGV, 60)


@pytest.mark.browser
def test_a_page_that_crashes_is_reported(
    page: BrowserTransport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_transport, "SILENT_S", 3.0)
    push_page(page, f"{ALIVE} await fetch('../_line', {{method: 'POST', body: 'ready'}});", tmp_path)

    def kill_renderers(line: str) -> None:
        assert line == "ready"
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            # The zygote names the profile; renderers have it as an ancestor.
            if any(word.startswith("--type=renderer") for word in words) and belongs_to(process, page.profiles):
                process.kill()

    with pytest.raises(KilledError, match=r"nothing was heard of the page for 3 s. The page crashed: memory ran out"):
        page.run(ARGV, 60, on_line=kill_renderers)


def belongs_to(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for parent in [process, *process.parents()] for word in parent.cmdline())


@pytest.mark.browser
def test_cancelling_ends_chromium(page: BrowserTransport, tmp_path: Path) -> None:
    push_page(page, f"{ALIVE} await fetch('../_line', {{method: 'POST', body: 'ready'}});", tmp_path)
    with pytest.raises(CancelledError, match="browser: cancelled"):
        page.run(ARGV, 60, on_line=lambda line: page.cancel())
    assert processes_with(page.profiles) == []


@pytest.mark.browser
def test_chromium_ends_when_this_process_is_killed(page: BrowserTransport, tmp_path: Path) -> None:
    push_page(page, f"{ALIVE} await fetch('../_line', {{method: 'POST', body: 'ready'}});", tmp_path)
    script = f"""
from pathlib import Path
from qat_edge_devices.browser_transport import BrowserTransport
from qat_edge_devices.transport import Access
page = BrowserTransport("browser", "", Access())
page.push({{"agent/agent.html": Path({str(tmp_path / "page.html")!r})}})
print(page.folder, page.profiles, flush=True)
page.run({ARGV!r}, 60, on_line=lambda line: print(line, flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        folder, profiles = map(Path, child.stdout.readline().split())
        assert child.stdout.readline() == "ready\n" and processes_with(profiles) != []
        os.kill(child.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while processes_with(profiles) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_with(profiles) == []
    shutil.rmtree(folder)
    shutil.rmtree(profiles)
