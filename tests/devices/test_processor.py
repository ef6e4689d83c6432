"""Kinds of processors, from what uname and Linux's /proc/cpuinfo report."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from device_fixtures import device_under_test

from qat_edge_devices import open_transport, processor
from qat_edge_devices.processor import Processor, processor_of, this_processor

# As on a Raspberry Pi 5 (Cortex-A76) and on a Raspberry Pi 4 (Cortex-A72).
NEW = "processor\t: 0\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp\n"
OLD = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"


@pytest.mark.parametrize(
    ("machine", "has_dot_product", "expected"),
    [
        ("x86_64", None, Processor.X86),
        ("AMD64", None, Processor.X86),
        ("aarch64", True, Processor.ARM),
        ("arm64", None, Processor.ARM),
        ("aarch64", False, Processor.ARM_WITHOUT_DOT_PRODUCT),
        ("wasm32", None, Processor.WASM),
        ("riscv64", False, Processor.OTHER),
    ],
)
def test_a_processor_has_a_kind(machine: str, has_dot_product: bool | None, expected: Processor) -> None:
    assert processor_of(machine, has_dot_product) is expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"), [(NEW, Processor.ARM), (OLD, Processor.ARM_WITHOUT_DOT_PRODUCT), (None, Processor.ARM)]
)
def test_this_machine_is_recognized(
    cpuinfo: str | None, expected: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert this_processor() is expected


@pytest.mark.parametrize(("cpuinfo", "expected"), [(NEW, Processor.ARM), (OLD, Processor.ARM_WITHOUT_DOT_PRODUCT)])
def test_a_device_is_recognized(
    cpuinfo: str, expected: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    (tmp_path / "device").mkdir()
    with device_under_test("ssh", tmp_path / "device", monkeypatch) as dut:
        dut.plant("uname", "echo aarch64")
        # Reads that file where the script names /proc/cpuinfo.
        here = f'[ "$3" = /proc/cpuinfo ] && exec grep "$1" "$2" {tmp_path}/cpuinfo'
        dut.plant("grep", f'PATH=/usr/bin:/bin\n{here}\nexec grep "$@"')
        with contextlib.closing(open_transport(dut.device, dut.access)) as transport:
            assert transport.info().processor is expected
