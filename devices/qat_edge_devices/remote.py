"""A device behind a shell: what ssh and adb have in common.

On the device, below a root folder of ours:

    cache/SHA256     contents sent before, each under its own digest, read-only; complete and checked, or not there
    runs/ID          the work folder, made new for each connection

A shell on the device holds the work folder: it waits for the end of its stdin, then ends what still runs there and
removes the folder, whether we closed the connection, died, or the cable was pulled. Nothing else is ever removed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO

from qat_edge_devices import shell
from qat_edge_devices.device_errors import (
    ConnectionLostError,
    DeviceError,
    IntegrityError,
    RoomError,
    TransportError,
    command_line,
)
from qat_edge_devices.process import Feed
from qat_edge_devices.session import SCRIPT_TIMEOUT_S, Session
from qat_edge_devices.shell import Script
from qat_edge_devices.transport import Access, Completed, DeviceInfo, inside, kilobytes

CACHE_BYTES = 64 * 1024  # smaller files are sent each time
MARGIN_BYTES = 32 * 1024**2  # of disk that is to stay free: room for requests and results
SAMPLED_BLOCKS = 8  # of a file; weights that were trained again differ in some
SLOWEST_BYTES_PER_S = 100_000  # a transfer is given up below this
SLOWEST_DISK_BYTES_PER_S = 5_000_000  # a memory card, read or copied


@dataclass(frozen=True)
class Content:
    """One file to be at `remote`. local: no link. data: its bytes, where it is not for the cache."""

    remote: str
    local: Path
    size: int
    mtime_ns: int
    data: bytes | None

    def digest(self) -> str:
        """Its sha256; the first to ask for that of a large file waits until it is read."""
        return self._hash().hexdigest()

    def salted(self, word: str) -> str:
        """That of it and a word after it."""
        plain = self._hash().copy()
        plain.update(word.encode())
        return plain.hexdigest()

    def blocks(self) -> list[int]:
        """Which are looked at before the whole file is."""
        return [index * (self.size // shell.BLOCK_BYTES) // SAMPLED_BLOCKS for index in range(SAMPLED_BLOCKS)]

    def sample(self) -> str:
        """The sha256 of `blocks`, "" where the file cannot be read any more."""
        found = hashlib.sha256()
        with suppress(OSError), self.local.open("rb") as file:
            for block in self.blocks():
                file.seek(block * shell.BLOCK_BYTES)
                found.update(file.read(shell.BLOCK_BYTES))
            return found.hexdigest()
        return ""

    def _hash(self) -> hashlib._Hash:
        if self.data is not None:  # the file may be gone by the time this is sent again
            return hashlib.sha256(self.data)
        return _hashed(self.local, self.size, self.mtime_ns)


class RemoteTransport(Session):
    """A `Transport` over a session; ssh and adb fill in how it is reached."""

    def __init__(self, name: str, access: Access) -> None:
        super().__init__(name, access)
        self._sent: dict[str, Content] = {}

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Send what the device's cache lacks, check it there, and give it its names; see `Transport.push`."""
        contents = [self._content(remote, local, keep) for remote, local in self._expanded(files)]
        names = ", ".join(c.remote for c in contents)
        self.trying(f"send {names}", lambda: self._push(contents))
        self._sent |= {c.remote: c for c in contents}

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> Completed:
        """Run a program in the work folder; see `Transport.run`. Above 128, the exit code is a signal's."""
        if any("\0" in word for word in argv):
            raise TransportError(f"{self.name}: an argument of `{command_line(argv)}` holds a NUL character.")
        with self.undertaking(f"run `{command_line(argv)}`"):
            self.reach()
            # The device ends the program by itself a little later, should nobody be left to tell it.
            variables = {"limit": str(int(timeout_s) + 30)}
            script = self.script(shell.RUN, variables, argv, env)
            completed = self.send_script(script, timeout_s, feed=_opening(script), on_line=on_line, shown=argv)
            if completed.returncode:
                self._require_held()  # else the holder lost its connection first, and ended the program as it should
        if completed.returncode == shell.EXIT_ABSENT:
            raise TransportError(
                f"{self.name}: `{command_line(argv)}` cannot be started: there is no {argv[0]} on the device. "
                "Name the Python there with --device-python."
            )
        return completed

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file or a folder to `local`, streamed; see `Transport.pull`."""
        place = inside(self.name, remote).as_posix()
        with self.undertaking(f"bring back {remote}"), _temporary(local.parent) as folder:
            self._require_held()  # a new connection has a new work folder, without what programs wrote
            faults: list[str] = []
            script = self.script(shell.PULL, {}, [place])
            timeout_s = SCRIPT_TIMEOUT_S + self.used_bytes(place) / SLOWEST_BYTES_PER_S
            completed = self.send_script(
                script, timeout_s, drain=lambda out: _unpack(script, out, folder, faults), control=True
            )
            if completed.returncode or faults:
                self._require_held()
                said = completed.stderr.strip() or "; ".join(faults)
                raise TransportError(f"{self.name}: {remote} cannot be brought back to {local} ({said}).")
            (folder / place).rename(local)

    def info(self) -> DeviceInfo:
        """What the machine says about itself."""
        return self.trying("ask for the machine", self._info)

    def restore(self) -> None:
        """Files of the cache are given their names again; only small ones are sent."""
        if self._sent:
            self._push(list(self._sent.values()))

    def send_file(self, local: Path, size: int, place: str) -> None:
        """Write the bytes of `local` to `place` on the device, through stdin of a shell there."""
        script = self.script(shell.RECEIVE, {}, [place])

        def feed(stdin: IO[bytes]) -> None:
            stdin.write(script.line())
            with local.open("rb") as file:
                shutil.copyfileobj(file, stdin, 1024 * 1024)
            stdin.close()

        completed = self.send_script(script, transfer_timeout_s(size), feed=feed, control=True)
        self.check(completed, f"{local.name} cannot be sent")

    def _require_held(self) -> None:
        if not self.is_held():
            raise ConnectionLostError(f"{self.name}: the connection was lost.")

    # --- files ---------------------------------------------------------------------------------------------

    def _expanded(self, files: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
        """Every file, folders taken apart."""
        for remote, local in files.items():
            place = inside(self.name, remote)
            if not local.is_dir():
                yield place.as_posix(), local
                continue
            for path in sorted(local.rglob("*")):
                if path.is_file():
                    yield (place / PurePosixPath(path.relative_to(local).as_posix())).as_posix(), path

    def _content(self, remote: str, local: Path, keep: bool) -> Content:
        try:
            found = local.stat()
            with local.open("rb") as file:
                data = None if keep and found.st_size >= CACHE_BYTES else file.read()
            # A link may be gone by the time a new connection asks for the file again.
            return Content(remote, local.resolve(), found.st_size, found.st_mtime_ns, data)
        except OSError as error:
            raise TransportError(f"{self.name}: {local} cannot be sent ({error.strerror}).") from error

    def _push(self, contents: Sequence[Content]) -> None:
        large = [c for c in contents if c.data is None]
        small = [c for c in contents if c.data is not None]
        disk, *samples = self._stock(large)
        # A file whose sample is not there need not be hashed to be missed.
        known = [c for c in large if samples and c.sample() in samples]
        digests = self._digests((self._cached(c) for c in known), sum(c.size for c in known))
        held = {c.local for c, found in zip(known, digests, strict=True) if found == c.salted(self.word)}
        missing = {c.local: c for c in large if c.local not in held}
        self._check_room(sum(c.size for c in (*missing.values(), *small)), _free_disk(disk))
        for content in missing.values():
            self._send_to_cache(content, [c for c in large if c.local == content.local])
        if held:
            self._place(shell.PLACE, [], [c for c in large if c.local in held])
        for content in small:
            self._send_small(content)
        found = self._digests((f"{self.folder}/{c.remote}" for c in small), sum(c.size for c in small))
        for content, digest in zip(small, found, strict=True):
            self._require_equal(content, digest)

    def _stock(self, contents: Sequence[Content]) -> list[str]:
        """The device's line about its disk, then samples of the files of these sizes in the cache."""
        asked = {" ".join(map(str, (c.size, *c.blocks()))) for c in contents}
        return self.do(shell.STOCK, sorted(asked)).splitlines()

    def _place(self, script: str, first: Sequence[str], contents: Sequence[Content]) -> None:
        words = [word for c in contents for word in (self._cached(c), c.remote)]
        timeout_s = SCRIPT_TIMEOUT_S + sum(c.size for c in contents) / SLOWEST_DISK_BYTES_PER_S
        self.do(script, [*first, *words], "files cannot be put in their places", timeout_s)

    def _send_to_cache(self, content: Content, equal: Sequence[Content]) -> None:
        """Send a file that is to be at all the places of `equal`, which it is among."""
        incoming = f"{self.folder}/.incoming-{secrets.token_hex(8)}"  # never a name that another file may have had
        began = time.monotonic()
        if self._sent_and_followed(content, incoming) != content.salted(self.word):
            (found,) = self._digests([incoming], content.size)
            self._require_equal(content, found)
        self._place(shell.KEEP, [incoming], equal)
        took_s = time.monotonic() - began
        self.done.append(f"sent {content.local.name} ({content.size / 1e6:.1f} MB, {took_s:.1f} s) and checked it")

    def _sent_and_followed(self, content: Content, incoming: str) -> str:
        """Send a file, hashed meanwhile on both sides; the salted digest of what was read there as it arrived.

        Empty where it could not be followed.
        """
        with ThreadPoolExecutor(2) as beside:
            timeout_s = transfer_timeout_s(content.size)
            script = self.script(shell.FOLLOW, {}, [incoming, str(content.size)])
            digest = beside.submit(self.send_script, script, timeout_s, control=True)
            beside.submit(content.digest)
            try:
                self.send_file(content.local, content.size, incoming)
            except BaseException:
                with suppress(DeviceError):
                    self.do(shell.STOP_FOLLOWING, [incoming])
                raise
            try:
                return digest.result().stdout.strip()
            except TransportError:  # the whole file is read again, and a lost connection is told there
                return ""

    def _send_small(self, content: Content) -> None:
        script = self.script(shell.RECEIVE_SMALL, {}, [content.remote])

        def feed(stdin: IO[bytes]) -> None:
            stdin.write(script.line() + (content.data or b""))
            stdin.close()

        completed = self.send_script(script, SCRIPT_TIMEOUT_S, feed=feed, control=True)
        self.check(completed, f"{content.local.name} cannot be sent")

    def _require_equal(self, content: Content, found: str) -> None:
        expected = content.salted(self.word)
        if found != expected:
            raise IntegrityError(
                f"{self.name}: {content.local} ({content.size} bytes, sha256 {content.digest()[:12]}...) was sent, and "
                f"what lies on the device is something else: with the random word {self.word} after it the sha256 "
                f"should be {expected[:12]}..., the device found {found[:12]}... Either the file changed "
                "meanwhile, or the device's disk, memory or sha256 program is at fault. Nothing was run."
            )

    def _digests(self, places: Iterable[str], size: int) -> list[str]:
        """Salted digests of files there, `size` bytes in all; "-" for one that is not there."""
        asked = list(places)
        if not asked:
            return []
        timeout_s = SCRIPT_TIMEOUT_S + size / SLOWEST_DISK_BYTES_PER_S
        found = self.do(shell.DIGEST, asked, "files cannot be checked", timeout_s).split()
        if len(found) != len(asked):
            raise IntegrityError(f"{self.name}: asked for {len(asked)} digests, the device gave {len(found)}.")
        return found

    def _check_room(self, needed: int, free: int | None) -> None:
        if free is not None and needed + MARGIN_BYTES > free:
            raise RoomError(
                f"{self.name}: {needed / 1e6:.1f} MB are to be sent, {MARGIN_BYTES / 1e6:.0f} MB more are to stay free "
                f"for results, and {self.root} has {free / 1e6:.1f} MB. Free some space there, or name another disk "
                "with --device-folder. Nothing was sent."
            )

    def _cached(self, content: Content) -> str:
        return f"{self.root}/cache/{content.digest()}"

    def used_bytes(self, place: str) -> int:
        """What lies at `place` in the work folder, as far as the device's `du` says."""
        return kilobytes(self.do('cd "$run" && du -sk "./$1" 2>/dev/null || echo 0', [place])) or 0

    def _info(self) -> DeviceInfo:
        said: dict[str, list[str]] = {}
        for line in self.do(shell.INFO).splitlines():
            key, _, value = line.partition("\t")
            if value.strip():
                said.setdefault(key, []).append(value.strip())
        first = {key: values[0] for key, values in said.items()}
        total = first.get("memory_total", "")
        # The kernel counts in kB, sysctl in bytes.
        memory = kilobytes(total) if "kB" in total else int(total) if total.isdigit() else None
        bits, cores = first.get("bits", ""), first.get("cores", "")
        return DeviceInfo(
            machine=first.get("machine", "unknown"),
            cpu_model=", ".join(dict.fromkeys(said.get("cpu", []))) or "unknown",
            cores=int(cores) if cores.isdigit() else 1,
            memory_bytes=memory or 0,
            os=", ".join([*said.get("os", []), first.get("kernel", "")]),
            bits=int(bits) if bits.isdigit() else None,
            free_memory_bytes=kilobytes(first.get("memory_free", "")),
            free_disk_bytes=_free_disk(first.get("disk", "")),
        )


@lru_cache(maxsize=64)
def _hashed(path: Path, size: int, mtime_ns: int) -> hashlib._Hash:
    """sha256 of a file, read once for all devices while neither its size nor its time changes.

    Raises:
        TransportError: it cannot be read any more.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise TransportError(f"{path} cannot be read ({error.strerror}).") from error


def transfer_timeout_s(size: int) -> float:
    """How long sending `size` bytes may take."""
    return SCRIPT_TIMEOUT_S + size / SLOWEST_BYTES_PER_S


def _opening(script: Script) -> Feed:
    """The script; stdin stays open, for its end means that we are gone."""

    def feed(stdin: IO[bytes]) -> None:
        stdin.write(script.line())
        stdin.flush()

    return feed


def _unpack(script: Script, stdout: IO[bytes], folder: Path, faults: list[str]) -> None:
    """Write the tar archive in `stdout` below `folder`; what is wrong with it goes to `faults`."""
    try:
        if script.skip_noise(stdout):
            with tarfile.open(fileobj=stdout, mode="r|") as archive:
                archive.extractall(folder, filter="data")  # nothing outside the folder, no devices, no links out
    except (tarfile.TarError, OSError) as error:
        faults.append(str(error))
    with suppress(OSError, ValueError):
        while stdout.read(1024 * 1024):
            pass


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=parent) as name:
        yield Path(name)


def _free_disk(line: str) -> int | None:
    """Bytes available by the last line of `df -Pk`: "NAME 1024-blocks Used Available 9% /mount"."""
    found = re.search(r"\s(\d+)\s+\d+%\s", line)
    return None if found is None else int(found[1]) * 1024
