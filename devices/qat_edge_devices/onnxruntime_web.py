"""Download onnxruntime-web, pinned by version and checksum, with npm, which knows the registry that this machine uses.

The archive is kept in the user's cache as it came, and checked before each use. Nothing of it is installed or run
outside the page.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from qat_edge_devices.device_errors import TransportError

VERSION = "1.30.0"
REQUIREMENT = f"onnxruntime-web@{VERSION}"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # as npm states it
WASM_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
WEBGPU_FILES = (
    "ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
)  # fmt: skip
DOWNLOAD_S = 900.0


def cache_folder() -> Path:
    """Return the folder that keeps downloads between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "qat-edge" / "npm"


def fetch_archive(device: str, cache: Path) -> Path:
    """Return the path of the archive below `cache`, where an earlier call has put it, or download it.

    Raises:
        TransportError: there is no npm, or its registry does not provide the archive, or another one under its name.
    """
    path = cache / f"onnxruntime-web-{VERSION}.tgz"
    if path.is_file() and _sha512(path) == SHA512:
        return path

    try:
        cache.mkdir(parents=True, exist_ok=True)
        # Downloaded next to it and renamed, so that an interrupted download is never taken for the archive.
        with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as work:
            _download(device, Path(work), path).replace(path)
    except OSError as error:
        raise TransportError(
            f"{device}: {path} cannot be written ({error.strerror}). Make room there, or name another folder for "
            "downloads: --device-folder."
        ) from error
    return path


def _download(device: str, work: Path, target: Path) -> Path:
    npm = shutil.which("npm")
    command = f"npm pack {REQUIREMENT}"
    if target.is_file():
        device = f"{device}: {target} is damaged, its sha512 is another one than that of {REQUIREMENT}"
    advice = f"run `{command}` on a machine that has npm, and copy onnxruntime-web-{VERSION}.tgz to {target}"
    if npm is None:
        raise TransportError(
            f"{device}: onnxruntime-web is fetched by npm, and there is no npm in PATH. Install it, or {advice}."
        )
    # npm's own cache and logs go with `work`, and not into the home folder.
    argv = [npm, "pack", REQUIREMENT, "--ignore-scripts", "--loglevel=error", "--cache", str(work / "npm")]
    argv += ["--pack-destination", str(work)]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=DOWNLOAD_S,
            cwd=work,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TransportError(f"{device}: `{command}` ran past {DOWNLOAD_S:g} s. Try again, or {advice}.") from error

    found = list(work.glob("*.tgz"))
    if done.returncode != 0 or len(found) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["npm gave no reason"]
        raise TransportError(f"{device}: `{command}` failed: {' '.join(lines[:3])}. Check npm's registry, or {advice}.")
    if _sha512(found[0]) != SHA512:
        raise TransportError(
            f"{device}: npm's registry has another file as {REQUIREMENT}, whose sha512 is not {SHA512}. Nothing was "
            "kept."
        )
    return found[0]


def unpack(archive: Path, names: tuple[str, ...], folder: Path) -> dict[str, Path]:
    """Write files of the archive's dist/ into `folder`; return their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in names}
    with tarfile.open(archive) as tar:
        for name, path in paths.items():
            source = tar.extractfile(f"package/dist/{name}")
            if source is None:
                raise TransportError(f"{archive}: {name} is not a file. Remove the archive to download it again.")
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
    return paths


def _sha512(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
