"""A phone, or anything else that runs adbd, through the platform's `adb` and whatever server that finds.

Files go by adb's own protocol, which is its fastest way; commands by `adb shell` as Android has it since version 7
(shell_v2), whose stdin, stdout and stderr are clean.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from qat_edge_devices.device_errors import ConnectionLostError, DeviceTimeoutError, RoomError, TransportError, tail
from qat_edge_devices.remote import RemoteTransport, transfer_timeout_s
from qat_edge_devices.session import NO_SPACE
from qat_edge_devices.shell import BOOTSTRAP
from qat_edge_devices.transport import Access, Completed

CLIENT_TIMEOUT_S = 30.0
ADVICE = (
    ("unauthorized", "Unlock it and allow USB debugging for this computer."),
    ("no permissions", "This user may not open its USB node: add a udev rule, or join the group `plugdev`."),
    ("offline", "Plug it in again, or `adb reconnect`."),
    ("more than one", "Name one: `adb:SERIAL`."),
    ("no devices", "Plug one in and switch on USB debugging, or name it: `adb:HOST:PORT`."),
    ("not found", "Check the serial number, and USB debugging on the device."),
)


def open_adb(address: str, access: Access) -> AdbTransport:
    """Connect to the device of serial number `address`, to "host:port", or to the only one there is ("")."""
    transport = AdbTransport(address, access)
    transport.open()
    return transport


class AdbTransport(RemoteTransport):
    """See the module; nothing is connected before `open`."""

    roots = ("/data/local/tmp", '"${TMPDIR:-/tmp}"')

    def __init__(self, address: str, access: Access) -> None:
        super().__init__(f"adb:{address}" if address else "adb", access)
        self._serial = address
        self._adb = _find_adb(self.name)

    def command(self) -> list[str]:
        """`adb shell` without a terminal."""
        return [*self._client(), "shell", "-T", BOOTSTRAP]

    def connect(self) -> None:
        """Start the server where none runs, reach a network address, and make sure of the device."""
        self._ask("start-server")
        if re.fullmatch(r".+:\d+", self._serial):
            # Its exit code says nothing before adb 31; the state below does.
            self.launcher.run([self._adb, "connect", self._serial], CLIENT_TIMEOUT_S)
        state = self._ask(*self._selected(), "get-state")
        if state.stdout.strip() != "device":
            raise self._gone(state.stderr + state.stdout)
        features = self._ask(*self._selected(), "features").stdout.replace(",", " ").split()
        if "shell_v2" not in features:
            raise TransportError(
                f"{self.name}: its adbd keeps neither exit codes nor stderr apart (no shell_v2). Android 7 or later "
                "is needed."
            )

    def disconnect(self) -> None:
        """Nothing: the server and its connections are the user's."""

    def unreachable(self, stderr: str) -> TransportError:
        """adb's own words, and what to do about them."""
        advice = next((a for sign, a in ADVICE if sign in stderr), "See what `adb devices -l` says.")
        return TransportError(f"{self.name}: cannot be reached. {advice} adb says:{tail(stderr)}")

    def send_file(self, local: Path, size: int, place: str) -> None:
        """`adb push`."""
        argv = [*self._client(), "push", str(local.resolve()), place]
        try:
            completed = self.launcher.run(argv, transfer_timeout_s(size))
        except DeviceTimeoutError as error:
            raise ConnectionLostError(str(error)) from error
        if completed.returncode == 0:
            return
        said = tail(completed.stderr + completed.stdout)
        if NO_SPACE.search(said):
            raise RoomError(
                f"{self.name}: {local.name} cannot be sent: the device's disk is full. Free some space there, or name "
                f"another disk with --device-folder. adb says:{said}"
            )
        if self._ask(*self._selected(), "get-state").stdout.strip() != "device":
            raise ConnectionLostError(f"{self.name}: the connection was lost.{said}")
        raise TransportError(f"{self.name}: {local.name} cannot be sent. adb says:{said}")

    def _gone(self, stderr: str) -> TransportError:
        error = self.unreachable(stderr)
        return ConnectionLostError(str(error)) if self.root else error

    def _ask(self, *argv: str) -> Completed:
        """What `adb` answers about the server and its devices."""
        return self.launcher.run([self._adb, *argv], CLIENT_TIMEOUT_S)

    def _client(self) -> list[str]:
        return [self._adb, *self._selected()]

    def _selected(self) -> list[str]:
        return ["-s", self._serial] if self._serial else []


def _find_adb(name: str) -> str:
    """`adb` of PATH, or of the Android SDK that the environment names."""
    sdks = [os.environ.get("ANDROID_HOME"), os.environ.get("ANDROID_SDK_ROOT")]
    places = [str(Path(sdk) / "platform-tools") for sdk in sdks if sdk]
    found = shutil.which("adb") or shutil.which("adb", path=os.pathsep.join(places) or os.devnull)
    if found is None:
        raise TransportError(
            f"{name}: there is no `adb` on this machine. Install the Android platform tools, or set ANDROID_HOME."
        )
    return found
