"""Transport over adb, to a phone or any other machine that runs adbd, through the `adb` of the Android platform tools.

Files are sent with `adb push`, the fastest way that adb has. Commands run through `adb shell` as Android has it since
version 7 (shell_v2), which keeps stdin, stdout, stderr and the exit code apart.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from qat_edge_devices.device_errors import CapacityError, ConnectionLostError, DeviceTimeoutError, TransportError, tail
from qat_edge_devices.remote import RemoteTransport, transfer_timeout_s
from qat_edge_devices.session import NO_SPACE
from qat_edge_devices.shell import BOOTSTRAP
from qat_edge_devices.transport import Access, CompletedProgram

CLIENT_TIMEOUT_S = 30.0  # of adb commands that transfer nothing
ADVICE = (
    ("unauthorized", "Unlock it and allow USB debugging for this computer."),
    ("no permissions", "This user may not open its USB node: add a udev rule, or join the group `plugdev`."),
    ("offline", "Plug it in again, or `adb reconnect`."),
    ("more than one", "Name one: `adb:SERIAL`."),
    ("no devices", "Plug one in and switch on USB debugging, or name it: `adb:HOST:PORT`."),
    ("not found", "Check the serial number, and USB debugging on the device."),
)
DEFAULT_ADVICE = "See the output of `adb devices -l`."


def open_adb(address: str, access: Access) -> AdbTransport:
    """Connect to the device with serial number `address`, to "host:port", or to the only device there is ("")."""
    transport = AdbTransport(address, access)
    transport.open()
    return transport


class AdbTransport(RemoteTransport):
    """Transport over adb. `open` connects."""

    roots = ("/data/local/tmp", '"${TMPDIR:-/tmp}"')

    def __init__(self, address: str, access: Access) -> None:
        super().__init__(f"adb:{address}" if address else "adb", access)
        self._serial = address
        self._adb = _find_adb(self.name)

    def command(self) -> list[str]:
        """Return the command line of `adb shell` without a terminal."""
        return [*self._client(), "shell", "-T", BOOTSTRAP]

    def connect(self) -> None:
        """Start the adb server if none runs, connect to a network address, and check the state of the device."""
        self._run_client("start-server")
        if re.fullmatch(r".+:\d+", self._serial):
            # Its exit code means nothing before adb 31; the state below decides.
            self._run_client("connect", self._serial)

        # "device" is the state of a device that is connected and authorized.
        state = self._run_client(*self._select(), "get-state")
        if state.stdout.strip() != "device":
            raise self._no_device(state.stderr + state.stdout)

        # Without shell_v2, `adb shell` merges stderr into stdout and always exits with 0.
        features = self._run_client(*self._select(), "features").stdout.replace(",", " ").split()
        if "shell_v2" not in features:
            raise TransportError(
                f"{self.name}: its adbd reports neither exit codes nor a separate stderr (no shell_v2). Android 7 or "
                "later is needed."
            )

    def disconnect(self) -> None:
        """Do nothing: the adb server and its connections belong to the user."""

    def unreachable(self, stderr: str) -> TransportError:
        """Return an error with the message of adb and advice; see `Session.unreachable`."""
        advice = next((advice for message, advice in ADVICE if message in stderr), DEFAULT_ADVICE)
        return TransportError(f"{self.name}: cannot be reached. {advice} adb says:{tail(stderr)}")

    def send_file(self, local: Path, size: int, destination: str) -> None:
        """Send a file with `adb push`."""
        argv = [*self._client(), "push", str(local.resolve()), destination]
        try:
            completed = self.launcher.run(argv, transfer_timeout_s(size))
        except DeviceTimeoutError as error:
            raise ConnectionLostError(str(error)) from error
        if completed.returncode == 0:
            return

        # adb has one exit code for all failures: tell them apart by the message and the state of the device.
        output = tail(completed.stderr + completed.stdout)
        if NO_SPACE.search(output):
            raise CapacityError(
                f"{self.name}: {local.name} cannot be sent: the device's disk is full. Free some space there, or name "
                f"another disk with --device-folder. adb says:{output}"
            )
        if self._run_client(*self._select(), "get-state").stdout.strip() != "device":
            raise ConnectionLostError(f"{self.name}: the connection was lost.{output}")
        raise TransportError(f"{self.name}: {local.name} cannot be sent. adb says:{output}")

    def _no_device(self, stderr: str) -> TransportError:
        """Return the error for a device that is not ready: a lost connection if it was there before."""
        error = self.unreachable(stderr)
        return ConnectionLostError(str(error)) if self.root else error

    def _run_client(self, *arguments: str) -> CompletedProgram:
        """Run `adb` with a command about the server or its devices."""
        return self.launcher.run([self._adb, *arguments], CLIENT_TIMEOUT_S)

    def _client(self) -> list[str]:
        return [self._adb, *self._select()]

    def _select(self) -> list[str]:
        """Return the options that select the device."""
        return ["-s", self._serial] if self._serial else []


def _find_adb(name: str) -> str:
    """Return the path of `adb`: from PATH, or from the Android SDK that the environment names."""
    sdks = [os.environ.get("ANDROID_HOME"), os.environ.get("ANDROID_SDK_ROOT")]
    folders = [str(Path(sdk) / "platform-tools") for sdk in sdks if sdk]
    found = shutil.which("adb") or shutil.which("adb", path=os.pathsep.join(folders) or os.devnull)
    if found is None:
        raise TransportError(
            f"{name}: there is no `adb` on this machine. Install the Android platform tools, or set ANDROID_HOME."
        )
    return found
