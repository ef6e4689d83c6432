"""Chromium and npm packages for tests; a test is skipped, with the reason, where they are missing."""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

import pytest

from qat_edge_devices import chromium, onnxruntime_web
from qat_edge_devices.device_errors import TransportError


def chromium_or_skip() -> str:
    """Return the path of Chromium, with onnxruntime-web in the cache."""
    try:
        onnxruntime_web.fetch_archive("browser", onnxruntime_web.cache_folder())
        return chromium.find_chromium("browser", "")
    except TransportError as error:
        pytest.skip(str(error))


def npm_package(requirement: str, integrity: str, folder: Path) -> None:
    """Unpack a package of npm's registry into `folder`, from the cache where it is there."""
    cache = onnxruntime_web.cache_folder()
    name = requirement.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz"
    if not (cache / name).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", requirement, "--ignore-scripts", "--pack-destination", str(cache)]
        command += ["--cache", str(cache / "npm")]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"`{' '.join(command[:3])}` failed: {done.stderr[:200]}")
    assert onnxruntime_web._sha512(cache / name) == integrity
    folder.mkdir(parents=True)
    with tarfile.open(cache / name) as archive:
        archive.extractall(folder, filter="data")
