"""A device over ssh, through the user's own OpenSSH: their configuration, keys, agent and jump hosts.

All commands share one connection, made by the first (ControlMaster), whose socket lies in a private temporary folder.
Nobody is asked anything, and a host key that is not known already is refused, be it the device's or a jump host's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
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

SOCKET_PATH_BYTES = 80  # sockets' names may have 104 on some systems, and ssh appends to them while it connects
# Written before the user's configuration they win over it, at jump hosts too: ssh reaches these by an ssh of its own,
# which is given the file and nothing of our command line.
EVERYWHERE = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "LogLevel": "ERROR",
}
OPTIONS = {
    "ControlMaster": "auto",
    "ControlPersist": "120",  # should we be killed, the shared connection ends by itself
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "PermitLocalCommand": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
}
DROPPED = "kex_exchange_identification"
KEY_OF = re.compile(r"host key is known for (\S+) and|[Hh]ost key for (\S+) has changed")
ADVICE = (
    (
        "Host key verification failed",
        "The key of {named} is not known here, or is another now: connect once by hand and compare.",
    ),
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
        self._config = access.ssh_config
        self._socket = ""

    def command(self) -> list[str]:
        """ssh with our options, over the shared connection where there is one."""
        return [*self._client(), "--", self._destination, BOOTSTRAP]

    def connect(self) -> None:
        """Make room for the shared connection; the first command opens it."""
        self.disconnect()
        folder = Path(_private_folder())
        self._socket = str(folder / "s")
        ours = "".join(f"{key} {value}\n" for key, value in EVERYWHERE.items())
        (folder / "config").write_text(ours + self._configuration())

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
        if DROPPED in stderr:
            stderr = self._words_on_the_way() or stderr
        advice = next((a for sign, a in ADVICE if sign in stderr), "Try `ssh -o BatchMode=yes {host} true`.")
        found = KEY_OF.search(stderr)
        named = self._destination if found is None else found[1] or found[2]
        # A server with too many connections in their beginnings drops some of them (MaxStartups).
        kind = ConnectionLostError if DROPPED in stderr and found is None else TransportError
        said = f"{advice.format(host=self._destination, named=named)} ssh says:{tail(stderr)}"
        return kind(f"{self.name}: cannot be reached. {said}")

    def _configuration(self) -> str:
        """The user's own, or what was named in its place."""
        if self._config is None:
            return "Include ~/.ssh/config\nInclude /etc/ssh/ssh_config\n"
        try:
            return Path(self._config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TransportError(f"{self.name}: --ssh-config {self._config} cannot be read ({error}).") from error

    def _words_on_the_way(self) -> str:
        """What a jump host's ssh says, which a connection that is to be shared (ControlPersist) keeps to itself."""
        alone = ["-o", "ControlPath=none", "-o", "ControlPersist=no"]
        with suppress(DeviceTimeoutError):
            return self.launcher.run([*self._client(alone), "--", self._destination, "true"], SCRIPT_TIMEOUT_S).stderr
        return ""

    def _client(self, first: Sequence[str] = ()) -> list[str]:
        options = [word for key, value in OPTIONS.items() for word in ("-o", f"{key}={value}")]
        socket = self._socket.replace("%", "%%")
        config = str(Path(self._socket).with_name("config"))
        return ["ssh", "-F", config, *first, *options, "-o", f'ControlPath="{socket}"']


def _private_folder() -> str:
    folder = tempfile.mkdtemp(prefix="qat-edge-ssh-")
    if len(folder) <= SOCKET_PATH_BYTES:
        return folder
    Path(folder).rmdir()
    return tempfile.mkdtemp(prefix="qat-edge-ssh-", dir="/tmp")
