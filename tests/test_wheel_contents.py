"""The wheel: what it holds, that its metadata are valid, and that the device package needs nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
PACKAGES = {"toolkit/qat_edge", "toolkit/optimum", "exporters/qat_edge_exporters", "devices/qat_edge_devices"}


def build_wheel(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


def metadata_of(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *sorted(PACKAGES)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    expected = {path.partition("/")[2] for path in tracked}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == expected


def test_the_source_archive_builds_the_same_wheel_and_twine_accepts_both(wheel: Path, tmp_path: Path) -> None:
    # `build` makes the wheel from the archive.
    for command in (["build", "--outdir", str(tmp_path), str(ROOT)], ["twine", "check", "--strict", f"{tmp_path}/*"]):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (again,) = tmp_path.glob("*.whl")
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())


def test_a_container_is_built_from_the_files_that_the_wheel_needs(wheel: Path, tmp_path: Path) -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in kept:
        source, copy = ROOT / name, tmp_path / "context" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    again = build_wheel(tmp_path / "context", tmp_path / "again")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())

    extras = Metadata.from_email(metadata_of(wheel), validate=True).provides_extra or []
    for path in sorted((ROOT / "tools" / "containers").glob("*.Dockerfile")):
        text = path.read_text()
        assert "--constraint tools/lock/requirements.txt" in text and "tools/lock" in kept
        named = text.partition('".[')[2].partition("]")[0].split(",")
        assert named and set(named) <= set(extras)


def test_its_metadata_are_valid(wheel: Path) -> None:
    metadata = Metadata.from_email(metadata_of(wheel), validate=True)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        scripts = archive.read(name).decode()
    assert metadata.name == "qat-edge" and metadata.description_content_type == "text/markdown"
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert "qat-edge = qat_edge.cli.commands:main" in scripts


def test_the_device_package_needs_the_standard_library_alone(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    (site,) = (tmp_path / "empty").rglob("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (python,) = [path for path in (tmp_path / "empty").rglob("python*") if path.name in ("python", "python.exe")]
    code = """
import contextlib
from qat_edge_devices import RUNTIMES, TRANSPORTS, open_runtime, open_transport
with contextlib.closing(open_transport("local")) as transport:
    assert transport.info().cores
    for name in RUNTIMES:
        open_runtime(name, transport, threads=1)
"""
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
