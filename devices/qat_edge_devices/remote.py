"""Transport to a device through its shell: everything that ssh and adb have in common.

Folders on the device, below the root folder of qat-edge:

    cache/SHA256     files sent before, named by their digest, read-only; only complete and verified files are here
    runs/ID          the work folder of one connection, removed at its end (see `session`)

A file goes to the cache once and is then hard-linked into each work folder, so a second run sends only what changed.
`push` in steps: compare a few sampled blocks with the cache (cheap), hash the files whose samples are there, send the
others, verify what arrived by a salted sha256, and link. The salt makes the device read the file: a digest that was
computed before does not help.
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

from qat_edge_devices import device_data, shell
from qat_edge_devices.device_errors import (
    CapacityError,
    ConnectionLostError,
    DeviceLayerError,
    IntegrityError,
    TransportError,
    command_line,
)
from qat_edge_devices.process import Feed
from qat_edge_devices.processor import processor_of
from qat_edge_devices.session import SCRIPT_TIMEOUT_S, Session
from qat_edge_devices.shell import Script
from qat_edge_devices.transport import Access, CompletedProgram, DeviceInfo, parse_kilobytes, work_path

CACHE_BYTES = 64 * 1024  # smaller files are sent each time
MARGIN_BYTES = 32 * 1024**2  # disk space to keep free, for requests and results
DOT_PRODUCT = {"yes": True, "no": False}  # answers of shell.MACHINE_INFO
SAMPLED_BLOCKS = 8  # per file; some differ if weights were trained again
SLOWEST_BYTES_PER_S = 100_000  # a slower transfer is aborted
SLOWEST_DISK_BYTES_PER_S = 5_000_000  # a memory card, read or copied
COPY_BYTES = 1024 * 1024  # read and written at once
MOST_FILES = 100_000  # of one result
MOST_BYTES = 64 * 1024**3
DEVICE_TIMEOUT_MARGIN_S = 30  # after the time limit, the device ends a program by itself


@dataclass(frozen=True)
class Content:
    """One local file to be placed on the device.

    Attributes:
        remote: its name in the work folder.
        local: the file, links resolved.
        size: in bytes.
        mtime_ns: time of its last change.
        data: its bytes if it is too small for the cache or must not be kept; None for a file of the cache.
    """

    remote: str
    local: Path
    size: int
    mtime_ns: int
    data: bytes | None

    def digest(self) -> str:
        """Return its sha256. The first call for a large file reads it whole."""
        return self._hash().hexdigest()

    def salted_digest(self, salt: str) -> str:
        """Return the sha256 of its bytes followed by `salt`."""
        salted = self._hash().copy()
        salted.update(salt.encode())
        return salted.hexdigest()

    def blocks(self) -> list[int]:
        """Return the indices of the blocks that are compared before the whole file is."""
        blocks = self.size // shell.BLOCK_BYTES
        return [index * blocks // SAMPLED_BLOCKS for index in range(SAMPLED_BLOCKS)]

    def sample(self) -> str:
        """Return the sha256 of `blocks`, or "" if the file can no longer be read."""
        sampled = hashlib.sha256()
        with suppress(OSError), self.local.open("rb") as file:
            for block in self.blocks():
                file.seek(block * shell.BLOCK_BYTES)
                sampled.update(file.read(shell.BLOCK_BYTES))
            return sampled.hexdigest()
        return ""

    def _hash(self) -> hashlib._Hash:
        # From memory where possible: a request file is deleted before a new connection sends it again.
        if self.data is not None:
            return hashlib.sha256(self.data)
        return _hash_file(self.local, self.size, self.mtime_ns)


class RemoteTransport(Session):
    """A `Transport` over a session. ssh and adb define how the device is reached."""

    def __init__(self, name: str, access: Access) -> None:
        super().__init__(name, access)
        self._sent: dict[str, Content] = {}

    def push(self, files: Mapping[str, Path], keep: bool = True) -> None:
        """Send the files that the device's cache lacks, verify them and link all; see `Transport.push`."""
        contents = [self._content(remote, local, keep) for remote, local in self._files_below(files)]
        names = ", ".join(content.remote for content in contents)
        self.with_retries(f"send {names}", lambda: self._push(contents))
        # Remembered for `restore`, should the connection be lost later.
        self._sent |= {content.remote: content for content in contents}

    def run(
        self,
        argv: Sequence[str],
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        on_line: Callable[[str], None] | None = None,
    ) -> CompletedProgram:
        """Run a program in the work folder; see `Transport.run`. An exit code above 128 stands for a signal."""
        if any("\0" in argument for argument in argv):
            raise TransportError(f"{self.name}: an argument of `{command_line(argv)}` contains a NUL character.")

        with self.recorded_step(f"run `{command_line(argv)}`"):
            self.ensure_connected()
            # The device has a limit of its own, in case this process dies before it can stop the program.
            variables = {"limit": str(int(timeout_s) + DEVICE_TIMEOUT_MARGIN_S)}
            script = self.script(shell.RUN_PROGRAM, variables, argv, env)
            completed = self.send_script(script, timeout_s, feed=_open_feed(script), on_line=on_line, shown=argv)
            if completed.returncode:
                # If the holder lost its connection first, it killed the program: that is no failure of the program.
                self._require_connection()

        if completed.returncode == shell.EXIT_ABSENT:
            raise TransportError(
                f"{self.name}: `{command_line(argv)}` cannot be started: there is no {argv[0]} on the device. "
                "Name the Python there with --device-python."
            )
        return completed

    def pull(self, remote: str, local: Path) -> None:
        """Bring a file or a folder to `local`, streamed as a tar archive; see `Transport.pull`."""
        path = work_path(self.name, remote).as_posix()
        with self.recorded_step(f"bring back {remote}"), _temporary_folder(local.parent) as folder:
            # No reconnection here: a new work folder would not have the results.
            self._require_connection()

            errors: list[str] = []
            script = self.script(shell.PULL, {}, [path])
            timeout_s = SCRIPT_TIMEOUT_S + self.used_bytes(path) / SLOWEST_BYTES_PER_S
            completed = self.send_script(
                script, timeout_s, drain=lambda stdout: _unpack(script, stdout, folder, errors), is_short=True
            )

            if completed.returncode or errors:
                self._require_connection()
                reason = device_data.printable(completed.stderr.strip()) or "; ".join(errors)
                raise TransportError(f"{self.name}: {remote} cannot be brought back to {local} ({reason}).")
            if not (folder / path).exists():
                raise TransportError(f"{self.name}: {remote} cannot be brought back to {local} (the device sent none).")
            (folder / path).rename(local)

    def info(self) -> DeviceInfo:
        """Describe the machine."""
        return self.with_retries("read the machine's description", self._info)

    def restore(self) -> None:
        """Link files of the cache into the new work folder; only small files are sent again."""
        if self._sent:
            self._push(list(self._sent.values()))

    def send_file(self, local: Path, size: int, destination: str) -> None:
        """Write the bytes of `local` to the path `destination` on the device, through stdin of a shell."""
        script = self.script(shell.RECEIVE, {}, [destination])

        def feed(stdin: IO[bytes]) -> None:
            stdin.write(script.line())
            with local.open("rb") as file:
                shutil.copyfileobj(file, stdin, COPY_BYTES)
            stdin.close()

        completed = self.send_script(script, transfer_timeout_s(size), feed=feed, is_short=True)
        self.check(completed, f"{local.name} cannot be sent")

    def used_bytes(self, path: str) -> int:
        """Return the size of `path` in the work folder, as the device's `du` reports it; 0 if it does not."""
        return parse_kilobytes(self.run_script(shell.USED_KILOBYTES, [path])) or 0

    def _require_connection(self) -> None:
        if not self.is_connected():
            raise ConnectionLostError(f"{self.name}: the connection was lost.")

    # --- files ---------------------------------------------------------------------------------------------

    def _files_below(self, files: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
        """Yield (name on the device, local file) of every file, folders expanded."""
        for remote, local in files.items():
            path = work_path(self.name, remote)
            if not local.is_dir():
                yield path.as_posix(), local
                continue
            for child in sorted(local.rglob("*")):
                if child.is_file():
                    yield (path / PurePosixPath(child.relative_to(local).as_posix())).as_posix(), child

    def _content(self, remote: str, local: Path, keep: bool) -> Content:
        try:
            status = local.stat()
            is_cached = keep and status.st_size >= CACHE_BYTES
            with local.open("rb") as file:
                data = None if is_cached else file.read()
            # Resolved: a link may be gone by the time a new connection needs the file again.
            return Content(remote, local.resolve(), status.st_size, status.st_mtime_ns, data)
        except OSError as error:
            raise TransportError(f"{self.name}: {local} cannot be sent ({error.strerror}).") from error

    def _push(self, contents: Sequence[Content]) -> None:
        large = [content for content in contents if content.data is None]
        small = [content for content in contents if content.data is not None]
        disk, *samples = self._list_cache(large)

        # A file whose sample is not in the cache is certainly missing: no need to hash it first.
        candidates = [content for content in large if samples and content.sample() in samples]
        digests = self._hash_on_device((self._cached(c) for c in candidates), sum(c.size for c in candidates))
        cached = {
            content.local
            for content, digest in zip(candidates, digests, strict=True)
            if digest == content.salted_digest(self.salt)
        }
        # By local file: one that goes to several names is sent once.
        missing = {content.local: content for content in large if content.local not in cached}

        self._check_free_disk(sum(content.size for content in (*missing.values(), *small)), _free_disk_bytes(disk))
        for content in missing.values():
            self._send_to_cache(content, [other for other in large if other.local == content.local])
        if cached:
            self._link(shell.LINK_FROM_CACHE, [], [content for content in large if content.local in cached])
        self._send_small_files(small)

    def _list_cache(self, contents: Sequence[Content]) -> list[str]:
        """Return the device's line about its disk, then samples of the cached files that have one of these sizes."""
        wanted = {" ".join(map(str, (content.size, *content.blocks()))) for content in contents}
        return self.run_script(shell.LIST_CACHE, sorted(wanted)).splitlines()

    def _link(self, script: str, first: Sequence[str], contents: Sequence[Content]) -> None:
        """Link `contents` from the cache into the work folder. `first`: arguments of the script before theirs."""
        pairs = [argument for content in contents for argument in (self._cached(content), content.remote)]
        timeout_s = SCRIPT_TIMEOUT_S + sum(content.size for content in contents) / SLOWEST_DISK_BYTES_PER_S
        self.run_script(script, [*first, *pairs], "files cannot be linked into the work folder", timeout_s)

    def _send_to_cache(self, content: Content, same_file: Sequence[Content]) -> None:
        """Send a file and verify it, then link it under every name in `same_file`, its own among them."""
        incoming = f"{self.folder}/.incoming-{secrets.token_hex(8)}"  # a name that no earlier attempt has used
        began = time.monotonic()
        if self._send_and_hash(content, incoming) != content.salted_digest(self.salt):
            # The hash of the arriving bytes can fail on a slow device; that of the whole file decides.
            (digest,) = self._hash_on_device([incoming], content.size)
            self._require_equal(content, digest)
        self._link(shell.ADD_TO_CACHE, [incoming], same_file)
        took_s = time.monotonic() - began
        size_mb = content.size / 1e6
        self.completed_steps.append(f"sent {content.local.name} ({size_mb:.1f} MB, {took_s:.1f} s) and checked it")

    def _send_and_hash(self, content: Content, incoming: str) -> str:
        """Send a file while both sides hash it.

        Returns:
            The salted digest that the device computed as the bytes arrived, or "" if it could not.
        """
        with ThreadPoolExecutor(2) as pool:
            timeout_s = transfer_timeout_s(content.size)
            script = self.script(shell.HASH_WHILE_RECEIVED, {}, [incoming, str(content.size)])
            device_digest = pool.submit(self.send_script, script, timeout_s, is_short=True)
            pool.submit(content.digest)  # fills the cache of `_hash_file`
            try:
                self.send_file(content.local, content.size, incoming)
            except BaseException:
                # Otherwise leaving the pool would wait for bytes that never arrive.
                with suppress(DeviceLayerError):
                    self.run_script(shell.STOP_HASHING, [incoming])
                raise
            try:
                return device_digest.result().stdout.strip()
            except TransportError:
                return ""  # the caller hashes the whole file, which also reports a lost connection

    def _send_small_files(self, contents: Sequence[Content]) -> None:
        """Send files that do not go to the cache, then verify all of them at once."""
        for content in contents:
            self._send_small(content)
        paths = (f"{self.folder}/{content.remote}" for content in contents)
        digests = self._hash_on_device(paths, sum(content.size for content in contents))
        for content, digest in zip(contents, digests, strict=True):
            self._require_equal(content, digest)

    def _send_small(self, content: Content) -> None:
        script = self.script(shell.RECEIVE_SMALL, {}, [content.remote])

        def feed(stdin: IO[bytes]) -> None:
            stdin.write(script.line() + (content.data or b""))
            stdin.close()

        completed = self.send_script(script, SCRIPT_TIMEOUT_S, feed=feed, is_short=True)
        self.check(completed, f"{content.local.name} cannot be sent")

    def _require_equal(self, content: Content, found: str) -> None:
        expected = content.salted_digest(self.salt)
        if found != expected:
            raise IntegrityError(
                f"{self.name}: {content.local} ({content.size} bytes, sha256 {content.digest()[:12]}...) was sent, but "
                f"the file on the device is something else: with the random text {self.salt} appended, its sha256 "
                f"should be {expected[:12]}..., and the device computed {found[:12]}... Either the file changed "
                "during the transfer, or the device's disk, memory or sha256 program is faulty. Nothing was run."
            )

    def _hash_on_device(self, paths: Iterable[str], size: int) -> list[str]:
        """Return the salted digests of files on the device, "-" for one that does not exist.

        Args:
            paths: absolute paths.
            size: of all files, in bytes, for the time limit.
        """
        requested = list(paths)
        if not requested:
            return []
        timeout_s = SCRIPT_TIMEOUT_S + size / SLOWEST_DISK_BYTES_PER_S
        found = self.run_script(shell.HASH_FILES, requested, "files cannot be checked", timeout_s).split()
        if len(found) != len(requested):
            raise IntegrityError(f"{self.name}: requested {len(requested)} digests, the device returned {len(found)}.")
        return found

    def _check_free_disk(self, needed: int, free: int | None) -> None:
        if free is not None and needed + MARGIN_BYTES > free:
            raise CapacityError(
                f"{self.name}: {needed / 1e6:.1f} MB are to be sent and {MARGIN_BYTES / 1e6:.0f} MB must stay free for "
                f"results, but {self.root} has {free / 1e6:.1f} MB. Free some space there, or name another disk with "
                "--device-folder. Nothing was sent."
            )

    def _cached(self, content: Content) -> str:
        """Return the path of `content` in the device's cache."""
        return f"{self.root}/cache/{content.digest()}"

    def _info(self) -> DeviceInfo:
        # A key can have several values, such as the CPU models of a phone.
        values: dict[str, list[str]] = {}
        for line in self.run_script(shell.MACHINE_INFO).splitlines():
            key, _, value = line.partition("\t")
            if value.strip():
                values.setdefault(key, []).append(device_data.printable(value.strip()))
        first = {key: found[0] for key, found in values.items()}

        bits, cores = first.get("bits", ""), first.get("cores", "")
        return DeviceInfo(
            machine=first.get("machine", "unknown"),
            cpu_model=", ".join(dict.fromkeys(values.get("cpu", []))) or "unknown",
            cores=device_data.whole_number(cores) or 1,
            memory_bytes=_memory_bytes(first.get("memory_total", "")),
            os=", ".join([*values.get("os", []), first.get("kernel", "")]),
            processor=processor_of(first.get("machine", ""), DOT_PRODUCT.get(first.get("dot_product", ""))),
            bits=device_data.whole_number(bits),
            free_memory_bytes=parse_kilobytes(first.get("memory_free", "")),
            free_disk_bytes=_free_disk_bytes(first.get("disk", "")),
        )


@lru_cache(maxsize=64)
def _hash_file(path: Path, size: int, mtime_ns: int) -> hashlib._Hash:
    """Hash a file. Cached for all devices while neither its size nor its time changes.

    Raises:
        TransportError: it can no longer be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise TransportError(f"{path} cannot be read ({error.strerror}).") from error


def transfer_timeout_s(size: int) -> float:
    """Return the time limit for sending `size` bytes, in seconds."""
    return SCRIPT_TIMEOUT_S + size / SLOWEST_BYTES_PER_S


def _open_feed(script: Script) -> Feed:
    """Return a feed that writes the script and leaves stdin open: its end would stop the program."""

    def feed(stdin: IO[bytes]) -> None:
        stdin.write(script.line())
        stdin.flush()

    return feed


def _unpack(script: Script, stdout: IO[bytes], folder: Path, errors: list[str]) -> None:
    """Extract the tar archive in `stdout` below `folder`; problems are appended to `errors`."""
    try:
        if script.skip_to_output(stdout):
            with tarfile.open(fileobj=stdout, mode="r|") as archive:
                # The filter permits nothing outside the folder, no device files, no links that lead out.
                archive.extractall(folder, filter=_Limits())
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError) as error:
        errors.append(device_data.printable(str(error)))

    # Read the rest, or the device would block on a full pipe.
    with suppress(OSError, ValueError):
        while stdout.read(COPY_BYTES):
            pass


class _Limits:
    """Filter of a tar archive: plain files and folders inside the target, no more than one result can have."""

    def __init__(self) -> None:
        self.count = self.size_bytes = 0

    def __call__(self, member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
        """Return the member to extract.

        Raises:
            ValueError: it is a link or a device, or there are too many members or bytes.
        """
        self.count += 1
        self.size_bytes += member.size
        if not (member.isreg() or member.isdir()):
            raise ValueError(f"the archive has a member that is no file, {device_data.printable(member.name)}")
        if self.count > MOST_FILES or self.size_bytes > MOST_BYTES:
            raise ValueError(f"the archive has more than {MOST_FILES} files or {MOST_BYTES} bytes")
        return tarfile.data_filter(member, path)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=parent) as name:
        yield Path(name)


def _memory_bytes(text: str) -> int:
    """Parse installed memory: "MemTotal: 8051420 kB" of Linux, or plain bytes of sysctl; 0 if it is neither."""
    if "kB" in text:
        return parse_kilobytes(text) or 0
    return device_data.whole_number(text) or 0


def _free_disk_bytes(line: str) -> int | None:
    """Parse the last line of `df -Pk`: "NAME 1024-blocks Used Available 9% /mount"."""
    found = re.search(r"\s(\d{1,15})\s+\d+%\s", line)
    return None if found is None else int(found[1]) * 1024
