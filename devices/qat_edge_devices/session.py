"""A connection to a device's shell that is held, lost and made again: what a transport's work is built on.

A shell on the device holds the work folder: it waits for the end of its stdin, then ends what still runs there and
removes the folder, whether we closed the connection, died, or the cable was pulled. Nothing else is ever removed.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

from qat_edge_devices import shell
from qat_edge_devices.device_errors import ConnectionLostError, DeviceTimeoutError, RoomError, TransportError, tail
from qat_edge_devices.process import Feed, Launcher
from qat_edge_devices.shell import Script
from qat_edge_devices.transport import Access, Completed

SCRIPT_TIMEOUT_S = 60.0  # of a script that answers at once
CLOSING_TIMEOUT_S = 20.0  # the device may wait for processes to end
PAUSES_S = (1.0, 3.0, 9.0)  # before the connection is tried again
NO_SPACE = re.compile(r"no space left|quota exceeded|disk full", re.IGNORECASE)
Result = TypeVar("Result")


class Session(ABC):
    """A device behind a command line of this machine that reaches its shell.

    root: the folder there that holds ours. folder: the work folder of this connection. done: what was done, for
    the message should the connection be lost.
    """

    roots: tuple[str, ...]  # folders there, as its shell writes them, one of which holds ours

    def __init__(self, name: str, access: Access) -> None:
        self.name = name
        self.python = access.python or "python3"
        self.root = ""
        self.folder = ""
        self.done: list[str] = []
        self.launcher = Launcher(name)
        self.word = secrets.token_hex(8)
        self._asked_folder = access.folder
        self._holder: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """What to start here so that `shell.BOOTSTRAP` runs there."""

    @abstractmethod
    def connect(self) -> None:
        """Make sure that the device answers, or say why not."""

    @abstractmethod
    def disconnect(self) -> None:
        """Let go of what `connect` holds here."""

    @abstractmethod
    def unreachable(self, stderr: str) -> TransportError:
        """What to say where `command` did not get through, by what it wrote; ConnectionLostError where it may soon."""

    @abstractmethod
    def restore(self) -> None:
        """Put everything that was sent into the new work folder."""

    def open(self) -> None:
        """Connect and make the work folder.

        Raises:
            TransportError: the device cannot be reached, or has no place for our folder.
        """
        try:
            self._reach_at_first()
        except BaseException:
            self.close()
            raise

    def _reach_at_first(self) -> None:
        for pause in PAUSES_S:
            try:
                return self.reach()
            except ConnectionLostError:  # as `unreachable` says where it may be for the moment only
                self._let_go()
                self.launcher.pause(pause)
        return self.reach()

    def cancel(self) -> None:
        """End what runs and what is being sent; see `Transport.cancel`."""
        self.launcher.cancel()

    def close(self) -> None:
        """Have the device end what runs and remove the work folder; see `Transport.close`.

        Raises:
            TransportError: the device says that it could not remove it.
        """
        folder, said = self.folder, self._let_go()
        self.disconnect()
        if said is not None and "removed" not in said.splitlines():
            raise TransportError(f"{self.name}: {folder} could not be removed on the device; do it by hand.")

    def do(
        self,
        body: str,
        arguments: Sequence[str] = (),
        what: str = "a question cannot be answered",
        timeout_s: float = SCRIPT_TIMEOUT_S,
    ) -> str:
        """stdout of a script that answers soon.

        Raises:
            ConnectionLostError: there was no answer.
            TransportError: it failed; `what` begins the message.
        """
        script = self.script(body, {}, arguments)
        completed = self.send_script(script, timeout_s, control=True)
        self.check(completed, what)
        return completed.stdout

    # --- connection ----------------------------------------------------------------------------------------

    def reach(self) -> None:
        """Connect where there is no connection, with a new work folder that holds all that was pushed."""
        if self.is_held():
            return
        self._let_go()
        self.connect()
        if not self.root:
            roots = [self._asked_folder] if self._asked_folder else []
            answer = self.do(shell.ROOT.replace("$roots", " ".join(self.roots)), roots, "there is no place for files")
            self.root = answer.rstrip("\n")
        self._hold(f"{self.root}/runs/{secrets.token_hex(8)}")
        self.restore()

    def is_held(self) -> bool:
        """Whether the work folder is held by a connection that is there."""
        return self._holder is not None and self._holder.poll() is None

    def _hold(self, folder: str) -> None:
        self.folder = folder
        script = self.script(shell.HOLD, {})
        holder = self.launcher.hold(self.command(), script.line())
        timer = threading.Timer(SCRIPT_TIMEOUT_S, holder.kill)
        timer.start()
        stdout = holder.stdout
        if stdout is not None and script.skip_noise(stdout) and stdout.readline() == b"held\n":
            timer.cancel()
            self._holder = holder
            return
        timer.cancel()
        with suppress(subprocess.TimeoutExpired):
            holder.wait(1)
        holder.kill()
        _, errors = holder.communicate()
        stderr, self.folder = errors.decode(errors="replace"), ""
        kind = TransportError if script.has_ended(stderr) else ConnectionLostError
        raise kind(f"{self.name}: {folder} cannot be made on the device.{tail(script.without_marks(stderr))}")

    def _let_go(self) -> str | None:
        """End the holder, so that the device cleans up; what it said, None where the connection was gone."""
        holder, self._holder, self.folder = self._holder, None, ""
        if holder is None:
            return None
        try:
            # communicate closes its stdin, and the end of stdin is the sign.
            stdout, stderr = holder.communicate(timeout=CLOSING_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            stdout, stderr = holder.communicate()
        return stdout.decode(errors="replace") if b"qat-edge-end" in stderr else None

    def trying(self, what: str, action: Callable[[], Result]) -> Result:
        """Do `action`, over a new connection where the old one was lost, some times over."""
        for pause in (*PAUSES_S, None):
            try:
                with self.undertaking(what, tries=len(PAUSES_S) + 1):
                    self.reach()
                    return action()
            except ConnectionLostError:
                if pause is None or not self.root:  # without a root it never was connected
                    raise
                self.launcher.pause(pause)
        raise AssertionError("the last round returns or raises")

    @contextmanager
    def undertaking(self, what: str, tries: int = 1) -> Iterator[None]:
        """Remember what was done; where the connection is lost, let go of it and say what was not."""
        folder = self.folder
        try:
            yield
        except ConnectionLostError as error:
            self._let_go()
            if not self.root:
                raise
            raise ConnectionLostError(self._story(str(error), what, folder, tries)) from error
        self.done.append(what)

    def _story(self, reason: str, what: str, folder: str, tries: int) -> str:
        done = "; ".join(self.done[-8:]) or "nothing"
        tried = f"Tried {tries} times. " if tries > 1 else ""
        return (
            f"{reason.rstrip()}\n{tried}Done: {done}. Not done: {what}. The device itself ends what ran there and "
            f"removes {folder or 'its work folder'}; checked files stay in {self.root}/cache and are not sent again."
        )

    # --- scripts -------------------------------------------------------------------------------------------

    def script(
        self,
        body: str,
        variables: Mapping[str, str],
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Script:
        """`body` with the variables of this session; `env` is exported to programs."""
        ours = {"root": self.root, "run": self.folder, "nonce": self.word}
        return Script(body, secrets.token_hex(8), ours | dict(variables), arguments, env)

    def send_script(
        self,
        script: Script,
        timeout_s: float,
        *,
        feed: Feed | None = None,
        drain: Callable[[IO[bytes]], None] | None = None,
        on_line: Callable[[str], None] | None = None,
        shown: Sequence[str] | None = None,
        control: bool = False,
    ) -> Completed:
        """Run `script` there to its end. control: it should not take long, so silence is a lost connection."""
        watch = None if on_line is None else script.after_noise(on_line)
        try:
            completed = self.launcher.run(
                self.command(), timeout_s, on_line=watch, feed=feed or _whole(script), drain=drain, shown=shown
            )
        except DeviceTimeoutError as error:
            if control:
                raise ConnectionLostError(f"{self.name}: there was no answer within {timeout_s:g} s.") from error
            raise DeviceTimeoutError(script.without_marks(str(error))) from error
        answer = script.completed(completed)
        if answer is None and not self.root:
            raise self.unreachable(completed.stderr)
        if answer is None:
            said = tail(script.without_marks(completed.stderr))
            raise ConnectionLostError(f"{self.name}: the connection was lost.{said}")
        return answer

    def check(self, completed: Completed, what: str) -> None:
        """Require that a script did what it should.

        Raises:
            RoomError, TransportError: it did not; `what` begins the message.
        """
        if completed.returncode == 0:
            return
        message = f"{self.name}: {what}: {completed.stderr.strip() or f'exit code {completed.returncode}'}."
        if NO_SPACE.search(completed.stderr):
            raise RoomError(f"{message} Free some space on the device, or name another disk with --device-folder.")
        raise TransportError(message)


def _whole(script: Script) -> Feed:
    """The script, and the end of stdin."""

    def feed(stdin: IO[bytes]) -> None:
        stdin.write(script.line())
        stdin.close()

    return feed
