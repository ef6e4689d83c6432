"""A connection to a device's shell that is re-established when it is lost.

One shell on the device, the holder, keeps the work folder: it waits for the end of its stdin, then kills what still
runs in the folder and removes it. That covers a closed connection, a crash of this process and a pulled cable alike.
Nothing outside the work folder is ever removed.
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
from qat_edge_devices.device_errors import CapacityError, ConnectionLostError, DeviceTimeoutError, TransportError, tail
from qat_edge_devices.process import Drain, Feed, Launcher
from qat_edge_devices.shell import Script
from qat_edge_devices.transport import Access, CompletedProgram

SCRIPT_TIMEOUT_S = 60.0  # of a script that answers at once
CLOSING_TIMEOUT_S = 20.0  # the device may wait for processes to end
PAUSES_S = (1.0, 3.0, 9.0)  # before each new attempt to connect
MESSAGE_STEPS = 8  # completed steps that the message of a lost connection lists
NO_SPACE = re.compile(r"no space left|quota exceeded|disk full", re.IGNORECASE)
Result = TypeVar("Result")


class Session(ABC):
    """A device behind a local command line (ssh or adb) that reaches its shell.

    Attributes:
        roots: candidate folders on the device, as its shell writes them, one of which gets the folder `qat-edge`.
        root: that folder; empty until the first connection.
        folder: the work folder of this connection; empty while there is none.
        completed_steps: descriptions of finished steps, for the message if the connection is lost.
        salt: random text that is hashed after every file.
    """

    roots: tuple[str, ...]

    def __init__(self, name: str, access: Access) -> None:
        self.name = name
        self.python = access.python or "python3"
        self.root = ""
        self.folder = ""
        self.completed_steps: list[str] = []
        self.launcher = Launcher(name)
        self.salt = secrets.token_hex(8)
        self._requested_folder = access.folder
        self._holder: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """Return the local command line that runs `shell.BOOTSTRAP` on the device."""

    @abstractmethod
    def connect(self) -> None:
        """Check that the device responds, or raise the reason why it does not."""

    @abstractmethod
    def disconnect(self) -> None:
        """Release what `connect` holds on this machine."""

    @abstractmethod
    def unreachable(self, stderr: str) -> TransportError:
        """Return the error for a `command` that did not reach the device.

        Args:
            stderr: the output of the command.

        Returns:
            ConnectionLostError if another attempt may succeed soon.
        """

    @abstractmethod
    def restore(self) -> None:
        """Put everything that was sent before into the new work folder."""

    def open(self) -> None:
        """Connect and create the work folder.

        Raises:
            TransportError: the device cannot be reached, or has no writable folder.
        """
        try:
            self._connect_first_time()
        except BaseException:
            self.close()
            raise

    def _connect_first_time(self) -> None:
        for pause in PAUSES_S:
            try:
                return self.ensure_connected()
            except ConnectionLostError:  # `unreachable` raises it if the failure may be temporary
                self._release()
                self.launcher.pause(pause)
        return self.ensure_connected()

    def cancel(self) -> None:
        """End running programs and transfers; see `Transport.cancel`."""
        self.launcher.cancel()

    def close(self) -> None:
        """Have the device end what runs and remove the work folder; see `Transport.close`.

        Raises:
            TransportError: the device reports that it could not remove the folder.
        """
        folder, output = self.folder, self._release()
        self.disconnect()
        if output is not None and "removed" not in output.splitlines():
            raise TransportError(f"{self.name}: {folder} could not be removed on the device; remove it by hand.")

    # --- connection ----------------------------------------------------------------------------------------

    def ensure_connected(self) -> None:
        """Connect if there is no connection, with a new work folder that holds all that was pushed before."""
        if self.is_connected():
            return

        # A holder whose connection ended may still own a process here.
        self._release()
        self.connect()

        if not self.root:
            requested = [self._requested_folder] if self._requested_folder else []
            script = shell.FIND_ROOT.replace("$roots", " ".join(self.roots))
            self.root = self.run_script(script, requested, "there is no folder for files").rstrip("\n")

        self._create_work_folder(f"{self.root}/runs/{secrets.token_hex(8)}")
        self.restore()

    def is_connected(self) -> bool:
        """Return whether the holder of the work folder still runs."""
        return self._holder is not None and self._holder.poll() is None

    def _create_work_folder(self, folder: str) -> None:
        """Start the holder of `folder`.

        Raises:
            ConnectionLostError: the connection ended first.
            TransportError: the device cannot create the folder.
        """
        self.folder = folder
        script = self.script(shell.HOLD_WORK_FOLDER, {})
        holder = self.launcher.hold(self.command(), script.line())

        # Reading stdout has no timeout of its own: killing the holder ends it.
        timer = threading.Timer(SCRIPT_TIMEOUT_S, holder.kill)
        timer.start()
        stdout = holder.stdout
        is_held = stdout is not None and script.skip_to_output(stdout) and stdout.readline() == b"held\n"
        timer.cancel()
        if is_held:
            self._holder = holder
            return

        # A script that ended by itself wrote the reason to stderr; give it a moment to arrive.
        with suppress(subprocess.TimeoutExpired):
            holder.wait(1)
        holder.kill()
        _, errors = holder.communicate()
        self.folder = ""
        stderr = errors.decode(errors="replace")
        error_class = TransportError if script.has_ended(stderr) else ConnectionLostError
        reason = tail(script.without_markers(stderr))
        raise error_class(f"{self.name}: {folder} cannot be created on the device.{reason}")

    def _release(self) -> str | None:
        """End the holder, so that the device cleans up.

        Returns:
            Its output; None if there was no holder or its connection was gone.
        """
        # Forgotten first, so that a failure below is not retried with a holder that is half closed.
        holder, self._holder, self.folder = self._holder, None, ""
        if holder is None:
            return None
        try:
            # communicate closes its stdin, which is the signal to clean up.
            stdout, stderr = holder.communicate(timeout=CLOSING_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            holder.kill()
            stdout, stderr = holder.communicate()
        return stdout.decode(errors="replace") if b"qat-edge-end" in stderr else None

    def with_retries(self, step: str, action: Callable[[], Result]) -> Result:
        """Run `action`, and run it again over a new connection each time the connection is lost.

        Args:
            step: description for messages, such as "send model.pte".
            action: called without arguments; it must be safe to repeat.

        Raises:
            ConnectionLostError: it was lost at every attempt.
        """
        for pause in (*PAUSES_S, None):
            try:
                with self.recorded_step(step, attempts=len(PAUSES_S) + 1):
                    self.ensure_connected()
                    return action()
            except ConnectionLostError:
                if pause is None or not self.root:  # without a root it was never connected
                    raise
                self.launcher.pause(pause)
        raise AssertionError("the last round returns or raises")

    @contextmanager
    def recorded_step(self, step: str, attempts: int = 1) -> Iterator[None]:
        """Record `step` as completed. If the connection is lost, release it and report what was and was not done."""
        # Releasing the connection clears self.folder, and the message names it.
        folder = self.folder
        try:
            yield
        except ConnectionLostError as error:
            self._release()
            if not self.root:
                raise
            raise ConnectionLostError(self._lost_connection_message(str(error), step, folder, attempts)) from error
        self.completed_steps.append(step)

    def _lost_connection_message(self, reason: str, step: str, folder: str, attempts: int) -> str:
        done = "; ".join(self.completed_steps[-MESSAGE_STEPS:]) or "nothing"
        tried = f"Tried {attempts} times. " if attempts > 1 else ""
        return (
            f"{reason.rstrip()}\n{tried}Done: {done}. Not done: {step}. The device itself ends the programs it was "
            f"running and removes {folder or 'its work folder'}; checked files stay in {self.root}/cache and are not "
            "sent again."
        )

    # --- scripts -------------------------------------------------------------------------------------------

    def run_script(
        self,
        body: str,
        arguments: Sequence[str] = (),
        failure: str = "a query failed",
        timeout_s: float = SCRIPT_TIMEOUT_S,
    ) -> str:
        """Run a short script on the device and return its stdout.

        Args:
            body: one of the scripts of `shell`.
            arguments: its positional parameters.
            failure: beginning of the error message, such as "files cannot be checked".
            timeout_s: a script that takes longer counts as a lost connection.

        Raises:
            ConnectionLostError: the device did not answer.
            TransportError: the script failed.
        """
        script = self.script(body, {}, arguments)
        completed = self.send_script(script, timeout_s, is_short=True)
        self.check(completed, failure)
        return completed.stdout

    def script(
        self,
        body: str,
        variables: Mapping[str, str],
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Script:
        """Return `body` with the variables of this session; `env` is exported to programs."""
        ours = {"root": self.root, "run": self.folder, "nonce": self.salt}
        return Script(body, secrets.token_hex(8), ours | dict(variables), arguments, env)

    def send_script(
        self,
        script: Script,
        timeout_s: float,
        *,
        feed: Feed | None = None,
        drain: Drain | None = None,
        on_line: Callable[[str], None] | None = None,
        shown: Sequence[str] | None = None,
        is_short: bool = False,
    ) -> CompletedProgram:
        """Run `script` on the device to its end.

        Args:
            script: the script.
            timeout_s: time limit in seconds.
            feed: writes to its stdin, the script first; by default the script alone.
            drain: reads its stdout, markers included.
            on_line: called with each line of its output.
            shown: command line for messages.
            is_short: the script should not take long, so a timeout is reported as a lost connection.

        Raises:
            DeviceTimeoutError: it exceeded `timeout_s`.
            ConnectionLostError: its end did not arrive.
            TransportError: the device was never reached.
        """
        watch = None if on_line is None else script.only_output(on_line)
        try:
            completed = self.launcher.run(
                self.command(), timeout_s, on_line=watch, feed=feed or _feed_script(script), drain=drain, shown=shown
            )
        except DeviceTimeoutError as error:
            if is_short:
                raise ConnectionLostError(f"{self.name}: there was no answer within {timeout_s:g} s.") from error
            raise DeviceTimeoutError(script.without_markers(str(error))) from error

        return self._extract(script, completed)

    def _extract(self, script: Script, completed: CompletedProgram) -> CompletedProgram:
        """Return the script's own result, or raise if its end did not arrive."""
        answer = script.extract(completed)
        if answer is not None:
            return answer
        # Without a root there never was a connection: the output is that of ssh or adb, with the reason.
        if not self.root:
            raise self.unreachable(completed.stderr)
        reason = tail(script.without_markers(completed.stderr))
        raise ConnectionLostError(f"{self.name}: the connection was lost.{reason}")

    def check(self, completed: CompletedProgram, failure: str) -> None:
        """Require that a script succeeded.

        Raises:
            CapacityError, TransportError: it did not; `failure` begins the message.
        """
        if completed.returncode == 0:
            return
        reason = completed.stderr.strip() or f"exit code {completed.returncode}"
        message = f"{self.name}: {failure}: {reason}."
        if NO_SPACE.search(completed.stderr):
            raise CapacityError(f"{message} Free some space on the device, or name another disk with --device-folder.")
        raise TransportError(message)


def _feed_script(script: Script) -> Feed:
    """Return a feed that writes the script and closes stdin."""

    def feed(stdin: IO[bytes]) -> None:
        stdin.write(script.line())
        stdin.close()

    return feed
