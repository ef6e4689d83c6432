"""Transport over ssh, through the user's OpenSSH: their configuration, keys, agent and jump hosts.

All commands share one connection, opened by the first of them (ControlMaster), with its socket in a private temporary
folder; on Windows, whose OpenSSH cannot do that, each command has its own. ssh never prompts, and refuses unknown host
keys, of the device as well as of jump hosts.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qat_edge_devices.device_errors import (
    ConnectionLostError,
    DeviceTimeoutError,
    TransportError,
    UnknownNameError,
    tail,
)
from qat_edge_devices.remote import RemoteTransport
from qat_edge_devices.session import SCRIPT_TIMEOUT_S
from qat_edge_devices.shell import BOOTSTRAP
from qat_edge_devices.transport import Access

SOCKET_PATH_BYTES = 80  # a socket's path is limited to 104 on some systems, and ssh appends to it while connecting
EXIT_TIMEOUT_S = 10  # for closing the shared connection
# Written to a file before the user's configuration, so that they take precedence. A file rather than options: ssh
# starts another ssh for a jump host, which gets the file but not the options of the command line.
CONFIG_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
SHARES_CONNECTION = sys.platform != "win32"
SHARED = {
    "ControlMaster": "auto",
    "ControlPersist": "120",  # if this process is killed, the shared connection ends by itself
}
NOT_SHARED = {"ControlMaster": "no", "ControlPath": "none"}  # whatever the user's configuration has
COMMAND_OPTIONS = {
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
}
DROPPED = "kex_exchange_identification"  # ssh's message if the server closes the connection at once
KEY_OF = re.compile(r"host key is known for (\S+) and|[Hh]ost key for (\S+) has changed")
ADVICE = (
    (
        "Host key verification failed",
        "The key of {named} is not known here, or has changed: connect once by hand and compare.",
    ),
    ("Permission denied", "No key or agent of yours opens it without a prompt: try `ssh -o BatchMode=yes {host}`."),
    ("Could not resolve", "Check the name; it may be a Host of your ssh configuration."),
)
DEFAULT_ADVICE = "Try `ssh -o BatchMode=yes {host} true`."


def open_ssh(address: str, access: Access) -> SshTransport:
    """Connect to `address`: "user@host", a Host of the user's configuration, or "//user@host:port"."""
    transport = SshTransport(address, access)
    transport.open()
    return transport


class SshTransport(RemoteTransport):
    """Transport over OpenSSH. `open` connects."""

    roots = ('"${XDG_CACHE_HOME:-$HOME/.cache}"', '"${TMPDIR:-/tmp}"')

    def __init__(self, address: str, access: Access) -> None:
        super().__init__(f"ssh:{address}", access)
        if not address.strip("/"):
            raise UnknownNameError("ssh: names no host. Write `ssh:user@host` or `ssh://user@host:port`.")
        if shutil.which("ssh") is None:
            raise TransportError(f"{self.name}: there is no `ssh` on this machine. Install the OpenSSH client.")
        # ssh takes "ssh://user@host:port" as a destination.
        self._destination = f"ssh:{address}" if address.startswith("//") else address
        self._user_config = access.ssh_config
        self._socket = ""

    def command(self) -> list[str]:
        """Return the ssh command line, which uses the shared connection if there is one."""
        return [*self._client(), "--", self._destination, BOOTSTRAP]

    def connect(self) -> None:
        """Prepare the folder of the shared connection; the first command opens it."""
        # Close what a lost connection may have left.
        self.disconnect()
        folder = Path(_private_folder())
        self._socket = str(folder / "s")
        ours = "".join(f"{key} {value}\n" for key, value in CONFIG_OPTIONS.items())
        (folder / "config").write_text(ours + self._user_configuration(), encoding="utf-8", newline="\n")

    def disconnect(self) -> None:
        """Close the shared connection."""
        if not self._socket:
            return
        if SHARES_CONNECTION:
            with suppress(subprocess.TimeoutExpired, OSError):
                argv = [*self._client(), "-O", "exit", "--", self._destination]
                subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=EXIT_TIMEOUT_S, check=False)
        shutil.rmtree(Path(self._socket).parent, ignore_errors=True)
        self._socket = ""

    def unreachable(self, stderr: str) -> TransportError:
        """Return an error with the message of ssh and advice; see `Session.unreachable`."""
        if DROPPED in stderr:
            stderr = self._stderr_without_sharing() or stderr
        advice = next((advice for message, advice in ADVICE if message in stderr), DEFAULT_ADVICE)

        # The key may be that of a jump host: name the host that ssh names.
        key = KEY_OF.search(stderr)
        named = self._destination if key is None else key[1] or key[2]

        # A server with too many connections being opened drops some of them (MaxStartups): worth another attempt.
        error_class = ConnectionLostError if DROPPED in stderr and key is None else TransportError
        reason = f"{advice.format(host=self._destination, named=named)} ssh says:{tail(stderr)}"
        return error_class(f"{self.name}: cannot be reached. {reason}")

    def _user_configuration(self) -> str:
        """Return the user's configuration, or the content of the file given by --ssh-config."""
        if self._user_config is None:
            return "Include ~/.ssh/config\nInclude /etc/ssh/ssh_config\n"
        try:
            return Path(self._user_config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TransportError(f"{self.name}: --ssh-config {self._user_config} cannot be read ({error}).") from error

    def _stderr_without_sharing(self) -> str:
        """Return ssh's messages from an unshared connection: a shared one (ControlPersist) hides a jump host's."""
        unshared = ["-o", "ControlPath=none", "-o", "ControlPersist=no"]
        argv = [*self._client(unshared), "--", self._destination, "true"]
        with suppress(DeviceTimeoutError):
            return self.launcher.run(argv, SCRIPT_TIMEOUT_S).stderr
        return ""

    def _client(self, first: Sequence[str] = ()) -> list[str]:
        """Return ssh and its options; those in `first` take precedence."""
        # ssh expands tokens such as %h in this option.
        socket = self._socket.replace("%", "%%")
        sharing = SHARED | {"ControlPath": f'"{socket}"'} if SHARES_CONNECTION else NOT_SHARED
        given = COMMAND_OPTIONS | sharing
        options = [argument for key, value in given.items() for argument in ("-o", f"{key}={value}")]
        return ["ssh", "-F", str(Path(self._socket).with_name("config")), *first, *options]


def _private_folder() -> str:
    """Create a temporary folder whose path is short enough for a socket in it."""
    folder = tempfile.mkdtemp(prefix="qat-edge-ssh-")
    if not SHARES_CONNECTION or len(folder) <= SOCKET_PATH_BYTES:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="qat-edge-ssh-", dir="/tmp")
