"""A device over ssh, through the user's own OpenSSH: their configuration, keys, agent and jump hosts.

All commands share one connection, made by the first (ControlMaster), whose socket lies in a private temporary folder.
Nobody is asked anything, and a host key that is not known already is refused.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from qat_edge_devices.errors import ConnectionLostError, TransportError, UnknownNameError, tail
from qat_edge_devices.remote import RemoteTransport
from qat_edge_devices.shell import BOOTSTRAP
from qat_edge_devices.transport import Access

SOCKET_PATH_BYTES = 80  # sockets' names may have 104 on some systems, and ssh appends to them while it connects
# Given on the command line they win over the user's configuration.
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "auto",
    "ControlPersist": "120",  # should we be killed, the shared connection ends by itself
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "LogLevel": "ERROR",
}
ADVICE = (
    ("Host key verification failed", "Its key is not known here, or is another now: connect once by hand and compare."),
    ("Permission denied", "No key or agent of yours opens it without a question: try `ssh -o BatchMode=yes {host}`."),
    ("Could not resolve", "Check the name; it may be a Host of your ssh configuration."),
)


def open_ssh(address: str, access: Access) -> SshTransport:
    """Connect to `address`: "user@host", a Host of the user's configuration, or "//user@host:port"."""
    transport = SshTransport(address, access)
    transport.open()
    return transport


class SshTransport(RemoteTransport):
    """See the module; nothing is connected before `open`."""

    roots = ('"${XDG_CACHE_HOME:-$HOME/.cache}"', '"${TMPDIR:-/tmp}"')

    def __init__(self, address: str, access: Access) -> None:
        super().__init__(f"ssh:{address}", access)
        if not address.strip("/"):
            raise UnknownNameError("ssh: names no host. Write `ssh:user@host` or `ssh://user@host:port`.")
        if shutil.which("ssh") is None:
            raise TransportError(f"{self.name}: there is no `ssh` on this machine. Install the OpenSSH client.")
        self._destination = f"ssh:{address}" if address.startswith("//") else address
        self._config = ["-F", access.ssh_config] if access.ssh_config else []
        self._socket = ""

    def command(self) -> list[str]:
        """ssh with our options, over the shared connection where there is one."""
        return [*self._client(), "--", self._destination, BOOTSTRAP]

    def connect(self) -> None:
        """Make room for the shared connection; the first command opens it."""
        self.disconnect()
        self._socket = str(Path(_private_folder()) / "s")

    def disconnect(self) -> None:
        """End the shared connection."""
        if not self._socket:
            return
        with suppress(subprocess.TimeoutExpired, OSError):
            argv = [*self._client(), "-O", "exit", "--", self._destination]
            subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        shutil.rmtree(Path(self._socket).parent, ignore_errors=True)
        self._socket = ""

    def unreachable(self, stderr: str) -> TransportError:
        """ssh's own words, and what to do about them."""
        advice = next((a for sign, a in ADVICE if sign in stderr), "Try `ssh -o BatchMode=yes {host} true`.")
        # A server with too many connections in their beginnings drops some of them (MaxStartups).
        kind = ConnectionLostError if "kex_exchange_identification" in stderr else TransportError
        return kind(f"{self.name}: cannot be reached. {advice.format(host=self._destination)} ssh says:{tail(stderr)}")

    def _client(self) -> list[str]:
        options = [word for key, value in OPTIONS.items() for word in ("-o", f"{key}={value}")]
        socket = self._socket.replace("%", "%%")
        return ["ssh", *self._config, *options, "-o", f'ControlPath="{socket}"']


def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="qat-edge-ssh-")
    if len(folder) <= SOCKET_PATH_BYTES:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="qat-edge-ssh-", dir="/tmp")
