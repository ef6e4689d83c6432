"""Speed benchmark: rounds and resuming, bytes read per token, engines that are missing, the page."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper, numpy_helper

from benchmarks import bandwidth, engines, peers, speed, speed_page
from benchmarks.cells import CellStore
from benchmarks.engines import GENAI, LLAMA_CPP, ONNX, PTE, PTE_INT4, TRIAL, Amounts, Engine, EngineInfo
from benchmarks.page import MISSING
from benchmarks.peers import PeerBuilder, PeerError
from benchmarks.speed_page import Timings
from conftest import train_run
from qat_edge.errors import RunError
from qat_edge.manifest import write_manifest
from qat_edge.run import Run
from qat_edge_exporters.executorch.pte import pte_reader

AMOUNTS = Amounts(prefill=8, decode=4, repeats=3)
INFO = EngineInfo("1.0", 2_000_000, "int8 per channel", "int4 by 32", 1_000_000, "abc", {"delegates": 3})


def fake(name: str, decode: float, calls: list[str] | None = None) -> Engine:
    """Return an engine whose repeats vary around `decode`; one of them is disturbed."""

    def time(threads: int, amounts: Amounts) -> dict[str, list[float]]:
        if calls is not None:
            calls.append(f"{name}{threads}")
        return {"prefill": [10 * decode * threads] * 3, "decode": [decode * threads, 0.1, 2 * decode * threads]}

    return Engine(name, replace(INFO, sha256=name), time)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate an idle machine that reads 1 GB/s with one thread and 2 GB/s with two."""
    monkeypatch.setattr(bandwidth, "measure", lambda threads: threads * 1e9)
    monkeypatch.setattr(speed.psutil, "cpu_percent", lambda interval: 0.0)


# --- rounds ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("memory")
def test_each_round_starts_with_another_engine() -> None:
    calls: list[str] = []
    both = [fake("a", 50.0, calls), fake("b", 25.0, calls)]
    for index in range(2):
        figures = speed.one_round(both, index, AMOUNTS)
    assert calls == ["a2", "b2", "a1", "b1", "b2", "a2", "b1", "a1"]
    row = next(row for row in figures["rows"] if (row["engine"], row["threads"]) == ("a", 2))
    assert (row["prefill"], row["decode"]) == (1000.0, 100.0)  # medians of the repeats


@pytest.mark.usefixtures("memory")
def test_finished_rounds_are_kept_and_another_model_is_measured_anew(tmp_path: Path) -> None:
    calls: list[str] = []
    store, engine = CellStore(tmp_path), fake("a", 50.0, calls)
    assert len(speed.rounds([engine], store, AMOUNTS, 1)) == 1
    assert len(speed.rounds([engine], store, AMOUNTS, 2)) == 2
    assert calls == ["a2", "a1"] * 2
    other = replace(engine, info=replace(engine.info, sha256="other"))
    speed.rounds([other], store, AMOUNTS, 1)
    assert len(calls) == 6
    speed.rounds([engine, fake("b", 25.0, calls)], store, AMOUNTS, 1)  # with another engine
    assert len(calls) == 10


def test_measuring_bandwidth_does_not_change_the_affinity_of_the_process() -> None:
    if hasattr(os, "sched_getaffinity"):
        before = os.sched_getaffinity(0)
        with bandwidth.pinned(1):
            assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(0) == before
    assert bandwidth.read_rate(1, buffer_bytes=1 << 20, passes=2) > 1e6


# --- bytes read per token ------------------------------------------------------------------------------------------


def test_a_shared_table_is_read_once_and_its_precision_named() -> None:
    codes = numpy_helper.from_array(np.zeros((64, 1, 32), np.uint8), "table")
    scales = numpy_helper.from_array(np.zeros((64, 1), np.float32), "scales")
    layer = numpy_helper.from_array(np.zeros((32, 1, 16), np.uint8), "layer")
    nodes = [
        helper.make_node("GatherBlockQuantized", ["table", "ids", "scales"], ["x"], bits=8, block_size=32),
        helper.make_node("MatMulNBits", ["x", "layer"], ["y"], "/model/layers.0/mlp", bits=4, block_size=32),
        helper.make_node("Reshape", ["scales", "shape"], ["reshaped"]),
        helper.make_node("MatMulNBits", ["y", "table", "reshaped"], ["z"], "/lm_head/MatMul", bits=8, block_size=32),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [codes, scales, layer])
    embedding, head, read = engines.onnx_weights(helper.make_model(graph))
    assert (embedding, head) == ("int8 by 32", "int8 by 32")
    assert read == 64 * 32 + 64 * 4 + 32 * 16


# --- peers ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_llama_cpp_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(PeerError, match="no C\\+\\+ compiler"):
        PeerBuilder(tmp_path, Run(tmp_path)).llama_bench()


def test_an_engine_that_crashes_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(threads: int, amounts: Amounts) -> dict[str, list[float]]:
        raise PeerError("ended by SIGSEGV")

    monkeypatch.setattr(engines, "_pte", lambda name, folder: fake(name, 50.0))
    monkeypatch.setattr(engines, "_llama_cpp", lambda workshop: Engine(LLAMA_CPP, INFO, crash))
    monkeypatch.setattr(PeerBuilder, "genai_int4", lambda self: tmp_path)
    ready, reasons = engines.gather(Run(tmp_path), tmp_path)
    assert [engine.name for engine in ready] == [PTE]
    assert reasons[LLAMA_CPP] == "ended by SIGSEGV"
    assert set(reasons) == {PTE_INT4, ONNX, LLAMA_CPP, GENAI} and "model.onnx: missing" in reasons[ONNX]
    assert "no manifest.json" in reasons[PTE_INT4]  # the export whose options the int4 tables would have


def test_a_pte_with_int4_tables_is_exported_from_any_run(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    made = train_run(tiny_model_folder, tmp_path, steps=2)
    like = made.exports / "executorch"
    like.mkdir(parents=True)
    write_manifest(like, "export", options={"target": ["executorch", "onnx"], "context_length": 48, "ptq": ["rtn"]})
    builder = PeerBuilder(tmp_path / "work", made)
    folder = builder.int4_tables()
    engine = engines._pte(PTE_INT4, folder)
    artifact = pte_reader.read(folder)
    assert artifact.size_bytes["head"] == 0, "the head shares the embedding's table"
    assert artifact.faults == [] and artifact.metadata["get_max_context_len"] == 48
    assert (engine.info.embedding, engine.info.head) == ("int4 by 32", "int4 by 32")
    matrices = [w.codes.size for name, w in artifact.weights.items() if name != "model.embed_tokens"]
    assert len(matrices) == 2 * 7 + 1
    assert engine.info.token_bytes == sum(matrices) * (4 + 16 / 32) / 8  # bfloat16 scales of 32 weights each
    assert engine.timed(1, TRIAL)["decode"] > 0
    monkeypatch.setattr(peers, "export", lambda *given: pytest.fail("made again"))
    assert builder.int4_tables() == folder
    assert sum(line.startswith("Exporting the model with int4") for line in messages) == 1
    write_manifest(like, "export", options={"context_length": 64})
    with pytest.raises(pytest.fail.Exception, match="made again"):  # the run has another export
        builder.int4_tables()


def test_the_output_of_a_failed_program_is_quoted(tmp_path: Path) -> None:
    builder = PeerBuilder(tmp_path, Run(tmp_path))
    with pytest.raises(PeerError, match="no such source"):
        builder._run([sys.executable, "-c", "raise SystemExit('no such source')"], "fetch")
    assert "no such source" in (tmp_path / "logs" / "fetch.log").read_text()


def test_llama_bench_decodes_after_the_prompt(tmp_path: Path) -> None:
    program = tmp_path / "llama-bench"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "args = sys.argv[1:]\nflags = {a: args[i + 1] for i, a in enumerate(args[:-1]) if a.startswith('-')}\n"
        "rate = 900.0 if flags['-n'] == '0' else 100.0 + float(flags['-d'])\n"
        "print(json.dumps([{'samples_ts': [rate] * int(flags['-r'])}]))\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    rates = engines._by_llama_bench(program, tmp_path / "m.gguf", 1, AMOUNTS)
    assert rates == {"prefill": [900.0] * 3, "decode": [108.0] * 3}
    program.write_text(f"#!{sys.executable}\nraise SystemExit('cannot load')\n")
    with pytest.raises(PeerError, match=r"exit code 1.*cannot load"):
        engines._by_llama_bench(program, tmp_path / "m.gguf", 1, AMOUNTS)


# --- the page ------------------------------------------------------------------------------------------------------


def made(decodes: dict[str, float], disturbed: float = 1.0) -> dict[str, Any]:
    """Return a finished round as the store returns it."""
    rows = [
        {"engine": name, "threads": threads, "prefill": 8 * rate, "decode": rate * threads * disturbed}
        for name, rate in decodes.items()
        for threads in bandwidth.THREADS
    ]
    return {
        "cell": {"settings": {"amounts": {"prefill": 128, "decode": 64, "repeats": 5}}},
        "figures": {"others_busy_cores": 0.25, "bytes_per_s": {"2": 2e9, "1": 1e9}, "rows": rows},
        "wall_s": 60.0, "created": "2026-01-02T03:04:05+00:00", "machine": "x86_64, 2 cores",
        "python": "3.11.7", "libraries": {"torch": "2.13.0"}, "git_revision": "abc",
    }  # fmt: skip


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """Three rounds of three engines, the second one disturbed; llama.cpp could not be built."""
    found = {
        "engines": {name: engines.engine_info([fake(name, 1.0)])[name] for name in (PTE, ONNX, GENAI)},
        "reasons": {LLAMA_CPP: "no C++ compiler"},
        "rounds": [
            made({PTE: 120.0, ONNX: 100.0, GENAI: 80.0}),
            made({PTE: 130.0, ONNX: 100.0, GENAI: 80.0}, disturbed=0.25),
            made({PTE: 140.0, ONNX: 100.0, GENAI: 80.0}),
        ],
    }
    path = tmp_path / "speed.json"
    path.write_text(json.dumps(found))
    return path


def row(page: str, *starts: str) -> list[str]:
    """Return the cells of the last table row that starts with these."""
    found = [line for line in page.splitlines() if line.startswith("| " + " | ".join(starts) + " |")]
    return [cell.strip() for cell in found[-1].strip("|").split("|")]


def test_ratios_are_taken_within_a_round(result: Path, tmp_path: Path) -> None:
    timings = Timings(**json.loads(result.read_text()))
    assert timings.ratios(PTE, ONNX, 1, "decode") == pytest.approx(
        [1.2, 1.3, 1.4]
    )  # the disturbed round does not change the ratio
    assert timings.rates(ONNX, 1, "decode") == pytest.approx([100.0, 25.0, 100.0])
    # 1 MB a token at a median of 120 tokens/s, where 1 GB/s can be read.
    assert timings.bandwidth_share(PTE, 1) == pytest.approx(0.12) and timings.bandwidth_share(LLAMA_CPP, 1) is None
    # Two threads are at least as fast as one.
    timings.figures[0]["bytes_per_s"]["1"] = 4e9
    assert timings.bandwidth(2) == timings.bandwidth(1) == 4e9
    page = speed_page.write(result, tmp_path / "speed.md").read_text()
    assert row(page, ONNX)[1:] == ["800 (800 to 800)"] * 2 + ["200 (50.0 to 200)", "100 (25.0 to 100)", "10%", "10%"]
    assert row(page, PTE, ONNX)[4:] == ["1.30 (1.20 to 1.40)"] * 4
    assert "speed.svg" in page and (tmp_path / "speed.svg").read_text().count("<polygon") == 2 + 2 * 9


def test_a_missing_engine_is_listed_with_the_reason(result: Path, tmp_path: Path) -> None:
    page = speed_page.write(result, tmp_path / "speed.md").read_text()
    assert f"- {LLAMA_CPP}: {MISSING}. no C++ compiler" in page
    assert set(row(page, LLAMA_CPP)[1:]) == {MISSING}
    with pytest.raises(RunError, match=r"nothing\.json"):
        speed_page.write(tmp_path / "nothing.json", tmp_path / "speed.md")


def test_pairs_of_equal_precision_come_first(tmp_path: Path) -> None:
    rates = {PTE: 120.0, PTE_INT4: 150.0, LLAMA_CPP: 80.0, GENAI: 100.0}
    tables = {PTE: "int8 per channel", PTE_INT4: "int4 by 32", LLAMA_CPP: "Q8_0", GENAI: "int4 by 32"}
    info = {n: replace(INFO, embedding=bits, head=bits, graph={}) for n, bits in tables.items()}
    found = engines.engine_info([replace(fake(n, 1.0), info=each) for n, each in info.items()])
    page = speed_page.render(Timings(found, {}, [made(rates)]))
    lines = page.split("## The `.pte` compared with the other engines")[1].split("## The")[0].splitlines()
    pairs = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `.pte`")]
    assert [(*pair[:3], pair[6]) for pair in pairs] == [
        (PTE, LLAMA_CPP, "8 : 8", "1.50"), (PTE_INT4, GENAI, "4 : 4", "1.50"),
        (PTE, GENAI, "8 : 4", "1.20"), (PTE_INT4, LLAMA_CPP, "4 : 8", "1.88"),
    ]  # fmt: skip
    assert ONNX not in page  # neither measured nor missing with a reason


def test_the_committed_report_has_the_shape_of_this_version() -> None:
    path = speed.ROOT / "docs" / "speed.md"
    if not path.is_file():
        pytest.skip("the benchmark has not been run yet")
    info = engines.engine_info([fake(name, 1.0) for name in (PTE, PTE_INT4, ONNX, LLAMA_CPP, GENAI)])
    rounds = [made(dict.fromkeys(info, 100.0))]
    expected, committed = speed_page.render(Timings(info, {}, rounds)), path.read_text()
    assert _fixed_lines(committed) == _fixed_lines(expected)
    assert expected.split("\n\n")[1] in committed, "the introduction"


def _fixed_lines(page: str) -> list[str]:
    """Headings and heads of tables, which do not depend on figures."""
    lines = page.splitlines()
    heads = {lines[index - 1] for index, line in enumerate(lines) if line.startswith("| ---")}
    return [line for line in lines if line.startswith("#") or line in heads]
