"""The processor a native program was built for, by the header of its ELF file, held against a device's.

Offsets and numbers: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html and its registry of machines.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from qat_edge_devices.device_errors import UnsuitableError
from qat_edge_devices.transport import DeviceInfo

MAGIC = b"\x7fELF"
HEADER_BYTES = 20  # up to e_machine
PROGRAM_TYPES = (2, 3)  # ET_EXEC, and ET_DYN as position-independent programs have it
# e_machine, and what `uname -m` calls processors that run it.
PROCESSORS = {
    3: ("i386", "i486", "i586", "i686"),
    40: ("arm", "armv6l", "armv7l", "armv7a", "armv8l"),
    62: ("x86_64", "amd64"),
    183: ("aarch64", "arm64"),
    243: ("riscv64", "riscv32"),
}


@dataclass(frozen=True)
class Program:
    """What an ELF header says. machine: e_machine; bits: of addresses."""

    machine: int
    bits: int
    little_endian: bool

    def __str__(self) -> str:
        name = PROCESSORS.get(self.machine, (f"ELF machine {self.machine}",))[0]
        return f"{name}, {self.bits}-bit, {'little' if self.little_endian else 'big'}-endian"


def read_program(path: Path) -> Program:
    """The header of the program at `path`.

    Raises:
        UnsuitableError: it cannot be read, or is no program in ELF.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise UnsuitableError(f"{path}: cannot be read ({error.strerror}).") from error
    if header[:4] != MAGIC or len(header) < HEADER_BYTES or header[4] not in (1, 2) or header[5] not in (1, 2):
        raise UnsuitableError(
            f"{path}: is no ELF file (it begins with {header[:4]!r}), so no program of Linux or Android. Give the "
            "executor_runner or llama_main that was built for the device."
        )
    kind, machine = struct.unpack_from("<HH" if header[5] == 1 else ">HH", header, 16)
    if kind not in PROGRAM_TYPES:
        raise UnsuitableError(f"{path}: is an ELF file of type {kind}, an object or a core, and no program.")
    return Program(machine, 32 * header[4], header[5] == 1)


def require_fit(device: str, info: DeviceInfo, path: Path) -> None:
    """Require that the device can run the program at `path`; a processor of an unknown name is left to try.

    Raises:
        UnsuitableError: it was built for another; the message names both.
    """
    program = read_program(path)
    theirs = next((number for number, names in PROCESSORS.items() if info.machine.lower() in names), program.machine)
    fits = program.machine == theirs and program.little_endian and program.bits <= (info.bits or program.bits)
    if not fits:
        system = f"{info.machine}, {info.bits}-bit programs" if info.bits else info.machine
        raise UnsuitableError(
            f"{device}: {path.name} is built for {program}, and the device is {system}, little-endian. Build it for "
            "that, or name the device it was built for. Nothing was sent."
        )
