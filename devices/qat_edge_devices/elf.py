"""Read from its ELF header which processor a native program was built for, and compare that with a device.

Format of the header and machine numbers: https://refspecs.linuxfoundation.org/elf/gabi4+/ch4.eheader.html
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from qat_edge_devices.device_errors import UnsupportedDeviceError
from qat_edge_devices.transport import DeviceInfo

MAGIC = b"\x7fELF"
HEADER_BYTES = 20  # up to e_machine
PROGRAM_TYPES = (2, 3)  # ET_EXEC, and ET_DYN, the type of position-independent programs
# e_machine -> names that `uname -m` prints for processors that run it.
PROCESSORS = {
    3: ("i386", "i486", "i586", "i686"),
    40: ("arm", "armv6l", "armv7l", "armv7a", "armv8l"),
    62: ("x86_64", "amd64"),
    183: ("aarch64", "arm64"),
    243: ("riscv64", "riscv32"),
}


@dataclass(frozen=True)
class ElfProgram:
    """Fields of an ELF header.

    Attributes:
        machine: e_machine, the number of the processor.
        bits: address size, 32 or 64.
        little_endian: byte order.
    """

    machine: int
    bits: int
    little_endian: bool

    def __str__(self) -> str:
        name = PROCESSORS.get(self.machine, (f"ELF machine {self.machine}",))[0]
        return f"{name}, {self.bits}-bit, {'little' if self.little_endian else 'big'}-endian"


def read_program(path: Path) -> ElfProgram:
    """Read the header of the program at `path`.

    Raises:
        UnsupportedDeviceError: the file cannot be read, or is not a program in ELF.
    """
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except OSError as error:
        raise UnsupportedDeviceError(f"{path}: cannot be read ({error.strerror}).") from error

    # Byte 4: 1 for 32-bit, 2 for 64-bit addresses. Byte 5: 1 for little-endian, 2 for big-endian.
    if header[:4] != MAGIC or len(header) < HEADER_BYTES or header[4] not in (1, 2) or header[5] not in (1, 2):
        raise UnsupportedDeviceError(
            f"{path}: is not an ELF file (it begins with {header[:4]!r}), so not a program of Linux or Android. Give "
            "the executor_runner or llama_main that was built for the device."
        )

    file_type, machine = struct.unpack_from("<HH" if header[5] == 1 else ">HH", header, 16)
    if file_type not in PROGRAM_TYPES:
        raise UnsupportedDeviceError(f"{path}: is an ELF file of type {file_type}, an object or a core, not a program.")
    return ElfProgram(machine, 32 * header[4], header[5] == 1)


def require_fit(device: str, info: DeviceInfo, path: Path) -> None:
    """Require that the device can run the program at `path`. A processor with an unknown name is accepted.

    Raises:
        UnsupportedDeviceError: it was built for another processor; the message names both.
    """
    program = read_program(path)
    # An unknown name maps to the program's own machine, so that it fits.
    name = info.machine.lower()
    machine = next((number for number, names in PROCESSORS.items() if name in names), program.machine)
    # 64-bit systems run 32-bit programs, not the reverse.
    bits_fit = info.bits is None or program.bits <= info.bits
    if program.machine != machine or not program.little_endian or not bits_fit:
        system = f"{info.machine}, {info.bits}-bit programs" if info.bits else info.machine
        raise UnsupportedDeviceError(
            f"{device}: {path.name} is built for {program}, and the device is {system}, little-endian. Build it for "
            "that, or name the device it was built for. Nothing was sent."
        )
