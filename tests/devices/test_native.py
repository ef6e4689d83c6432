"""Runners that a user built: compared with the device before anything is sent, used by the flags in their --help."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from device_fixtures import start_device, unavailable_reason

from conftest import train_run
from qat_edge.cli import commands
from qat_edge.evaluate import results
from qat_edge.options import ExportOptions
from qat_edge.run import Run
from qat_edge.verbs.export import export
from qat_edge.verbs.report import report
from qat_edge_devices import open_transport
from qat_edge_devices.device_errors import ConnectionLostError, ProgramError, ResultError, UnsupportedDeviceError
from qat_edge_devices.elf import ElfProgram, read_program
from qat_edge_devices.mock import MockTransport
from qat_edge_devices.runtimes.native_runtime import NativeRunner
from qat_edge_devices.transport import CompletedProgram, Transport

WIDTH, VOCABULARY = 8, 13  # of the stand-in's program
EXECUTOR = ("-DEXECUTOR_RUNNER",)


def header(machine: int, bits: int = 64, order: str = "<", file_type: int = 3) -> bytes:
    """Return the first bytes of an ELF file."""
    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    return ident + struct.pack(f"{order}HH", file_type, machine) + bytes(44)


def built(folder: Path, name: str, *flags: str) -> Path:
    """Compile the stand-in and return its path."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build a runner with")
    source = Path(__file__).with_name("stand_in.c")
    subprocess.run(["gcc", "-O1", *flags, "-o", str(folder / name), str(source)], check=True)
    return folder / name


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    folder.mkdir()
    for name in ("model.pte", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(b"x")
    return folder


@pytest.fixture(params=["local", "ssh"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    if request.param == "local":
        with contextlib.closing(open_transport("local")) as transport:
            yield transport
        return
    reason = unavailable_reason("ssh")
    if reason:
        pytest.skip(reason)
    with start_device("ssh", tmp_path) as dut:
        with contextlib.closing(open_transport(dut.device, dut.access)) as transport:
            yield transport
        assert dut.runs() == []


# --- the header ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "program", "words"),
    [
        (header(183), ElfProgram(183, 64, True), "aarch64, 64-bit, little-endian"),
        (header(62, file_type=2), ElfProgram(62, 64, True), "x86_64, 64-bit, little-endian"),
        (header(40, 32), ElfProgram(40, 32, True), "arm, 32-bit, little-endian"),
        (header(21, order=">"), ElfProgram(21, 64, False), "ELF machine 21, 64-bit, big-endian"),
    ],
)
def test_the_elf_header_gives_the_processor_a_program_was_built_for(
    tmp_path: Path, written: bytes, program: ElfProgram, words: str
) -> None:
    (tmp_path / "runner").write_bytes(written)
    assert read_program(tmp_path / "runner") == program
    assert str(program) == words


def test_a_compiled_program_is_read_as_the_machine_it_was_compiled_on(tmp_path: Path) -> None:
    machine = subprocess.run(["uname", "-m"], capture_output=True, text=True, check=True).stdout.strip()
    assert str(read_program(built(tmp_path, "runner"))).startswith(machine)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (b"", "is not an ELF file"),
        (b"#!/bin/sh\necho a script of some length\n", "is not an ELF file"),
        (header(183)[:19], "is not an ELF file"),
        (header(183, file_type=1), "an object or a core, not a program"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_program_is_refused(
    tmp_path: Path, artifact: Path, written: bytes | None, words: str
) -> None:
    if written is not None:
        (tmp_path / "runner").write_bytes(written)
    mock = MockTransport(lambda argv, files: CompletedProgram(0, "", ""))
    with pytest.raises(UnsupportedDeviceError, match=f"runner: .*{words}"):
        NativeRunner(mock, tmp_path / "runner", 1).prepare(artifact)
    assert mock.calls == []


@pytest.mark.parametrize(
    ("written", "machine", "bits", "words"),
    [
        (header(62), "aarch64", 64, "runner is built for x86_64, 64-bit, little-endian, and the device is aarch64"),
        (header(183), "armv8l", 32, "built for aarch64, 64-bit.* the device is armv8l, 32-bit programs"),
        (header(183), "aarch64", 32, "built for aarch64, 64-bit.* the device is aarch64, 32-bit programs"),
        (header(183, order=">"), "arm64", 64, "built for aarch64, 64-bit, big-endian, and the device is arm64"),
        (header(8), "x86_64", None, "built for ELF machine 8, 64-bit.* the device is x86_64, little-endian"),
    ],
)
def test_a_program_for_another_processor_is_not_sent(
    tmp_path: Path, artifact: Path, written: bytes, machine: str, bits: int | None, words: str
) -> None:
    (tmp_path / "runner").write_bytes(written)
    mock = MockTransport(lambda argv, files: CompletedProgram(0, "", ""))
    mock.described = dataclasses.replace(mock.described, machine=machine, bits=bits)
    with pytest.raises(UnsupportedDeviceError, match=rf"mock: .*{words}.*Nothing was sent\."):
        NativeRunner(mock, tmp_path / "runner", 1).prepare(artifact)
    assert mock.calls == []


# --- requests -------------------------------------------------------------------------------------------


def test_executor_runner_computes_logits_after_as_many_tokens_as_its_program_takes(
    device: Transport, tmp_path: Path, artifact: Path
) -> None:
    runner = NativeRunner(device, built(tmp_path, "executor_runner", *EXECUTOR), 1)
    runner.prepare(artifact)
    assert (runner.computes_logits, runner.generates_text) == (True, False)
    for ids in (list(range(WIDTH)), [12] * WIDTH):
        logits = np.frombuffer(runner.logits(ids), "<f4")
        assert logits.shape == (VOCABULARY,) and logits.argmax() == sum(ids) % VOCABULARY
    with pytest.raises(ProgramError, match=r"(?s)executor_runner --model_path=.* input size \(24\) .*mismatch"):
        runner.logits([1, 2, 3])


def test_llama_main_generates_text_and_prints_timings(device: Transport, tmp_path: Path, artifact: Path) -> None:
    runner = NativeRunner(device, built(tmp_path, "llama main"), 1)
    runner.prepare(artifact)
    assert (runner.computes_logits, runner.generates_text) == (False, True)
    for prompt, expected in (("bc", "dgmz"), ("b;$(c", None), ("b\n'c", None)):
        text, timings = runner.generate_text(prompt, 6)
        assert expected is None or text == expected
        assert timings is not None and timings.prompt_tokens == len(prompt)
    text, timings = runner.generate_text("bc", 2)
    assert text == "dgz" and timings is not None
    assert (timings.load_ms, timings.ttft_ms, timings.new_tokens) == (250, 100, 2)
    assert timings.prefill_tokens_per_s == pytest.approx(2 / 0.1)
    assert timings.decode_tokens_per_s == pytest.approx(2 / 0.2)


def test_only_flags_listed_by_help_are_passed(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "runner").write_bytes(header(62))
    help_text = (
        "  Flags from main.cpp:\n    -model_path (The\n      -model.)\n  --tokenizer_path (It.)\n    -prompt (P.)"
    )
    calls: list[list[str]] = []

    def handler(argv: object, files: dict[str, bytes]) -> CompletedProgram:
        assert isinstance(argv, list)
        calls.append(argv[4:])
        return CompletedProgram(1, help_text, "") if argv[4:] == ["--help"] else CompletedProgram(0, "bc d", "")

    runner = NativeRunner(MockTransport(handler), tmp_path / "runner", 4)
    runner.prepare(artifact)
    assert runner.generate_text("bc ", 5, for_timing=True) == ("d", None)
    assert calls[1:] == [
        ["--model_path=artifact/model.pte", "--tokenizer_path=artifact/tokenizer.json", "--prompt=bc "]
    ]
    help_text = "usage: something else"
    with pytest.raises(
        UnsupportedDeviceError, match=r"(?s)runner --help ended with exit code 1 and names neither.*else"
    ):
        runner.prepare(artifact)


def test_unreadable_timings_are_an_error_and_a_lost_connection_is_retried(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "runner").write_bytes(header(62))
    left = [2]

    def handler(argv: list[str], files: dict[str, bytes]) -> CompletedProgram:
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionLostError("mock: the connection was lost.")
        if argv[4:] == ["--help"]:
            return CompletedProgram(
                1, "".join(f"  -{flag} (x)\n" for flag in ("model_path", "tokenizer_path", "prompt")), ""
            )
        return CompletedProgram(0, 'text\nPyTorchObserver {"prompt_tokens": 3}\n', "")

    runner = NativeRunner(MockTransport(handler), tmp_path / "runner", 1)  # type: ignore[arg-type]
    runner.prepare(artifact)
    with pytest.raises(
        ResultError, match=r"mock: the figures of runner cannot be read \(KeyError: 'inference_start_ms'"
    ):
        runner.generate_text("a", 1)


# --- the command -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    made = train_run(tiny_model_folder, tmp_path_factory.mktemp("native"))
    export(made, ExportOptions(target=("executorch",), context_length=32, ptq=("none",)))
    return made


def validated(run: Run, *flags: str) -> tuple[int, str]:
    options = "--tokens 64 --prompts 2 --max-new-tokens 4 --threads 1 --prefill 8 --decode 4 --repeats 2 --force"
    result = CliRunner().invoke(commands.main, ["validate", str(run.path), *options.split(), *flags])
    return result.exit_code, result.output


def test_a_runner_without_logits_is_reported_with_the_reason(run: Run, tmp_path: Path) -> None:
    runner = built(tmp_path, "llama_main")
    code, output = validated(
        run, "--window", "32", "--runner-binary", str(runner), "--min-decode", "1", "--max-kl", "1"
    )
    assert code == 1 and "1 of 2 gates missed: qat, executorch: --max-kl 1, not measured" in output.replace("\n", " ")
    found = results.load(run.reports / "local.json").measured[-1]
    assert (found.name, found.target, found.runtime) == ("qat", "executorch", "llama_main, native")
    assert math.isnan(found.perplexity) and found.agreement is None and not found.scored
    assert found.exact_match == 0 and found.prompts == 2
    assert found.speed is not None and found.speed.decode.median == pytest.approx(found.speed.new_tokens / 0.2)
    notes = " | ".join(found.notes)
    for words in ("llama_main, built by you", "gives text, not logits", "memory not measured", "compared as text"):
        assert words in notes
    report([run])
    assert "gives text, not logits" in run.report_html.read_text()


def test_logits_of_a_runner_are_compared_and_missing_measurements_have_a_reason(run: Run, tmp_path: Path) -> None:
    vocabulary = json.loads((run.quantized / "config.json").read_text())["vocab_size"]
    runner = built(tmp_path, "executor_runner", *EXECUTOR, "-DWIDTH=32", f"-DVOCABULARY={vocabulary}")
    text = tmp_path / "text.txt"
    text.write_text("the other one in another hour " * 40)
    flags = ("--text", str(text), "--runner-binary", str(runner))
    code, output = validated(run, *flags, "--window", "33")
    assert code == 0, output
    found = results.load(run.reports / "local.json").measured[-1]
    assert found.agreement is not None and found.parity is not None and found.scored
    assert 1 <= found.agreement.tokens <= 3 and found.agreement.kl_nats > 0
    assert found.speed is None and found.exact_match is None
    assert f"logits after 32 tokens only, {found.agreement.tokens} of them" in " | ".join(found.notes)
    assert validated(run, *flags, "--window", "32")[0] == 0
    found = results.load(run.reports / "local.json").measured[-1]
    assert found.agreement is None
    assert "takes 32 tokens a call and no other number" in " | ".join(found.notes)
    assert "--window 33" in " | ".join(found.notes)


def test_options_that_a_runner_does_not_support_are_usage_errors(run: Run, tmp_path: Path) -> None:
    (tmp_path / "runner").write_bytes(header(183))
    runner = ["--runner-binary", str(tmp_path / "runner")]
    for flags, code, words in (
        (["--runner-binary", str(tmp_path / "absent")], 2, "there is no such file"),
        ([*runner, "--error-budget"], 2, "--error-budget: needs logits of whole sequences"),
        ([*runner, "--target", "onnx"], 1, "onnx cannot run in --runner-binary, which takes a .pte"),
        (runner, 1, "runner is built for aarch64, 64-bit"),
    ):
        found, output = validated(run, "--window", "32", *flags)
        assert found == code and words in " ".join(output.split()), output
