"""Each extra alone, in an environment that has the packages it names and no others.

The environments are virtual ones. The wheel is unpacked in each; what its metadata require is linked from the packages
that run the tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import plain_rows, short_training
from qat_edge import config
from qat_edge.options import FORMATS
from qat_edge_exporters.targets import target_named
from tests.test_wheel_contents import build_wheel

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")


def required(requirement: Requirement, found: dict[str, set[str]]) -> None:
    """Add a package and what it requires to `found`, as names with their extras."""
    extras = found.setdefault(canonicalize_name(requirement.name), set())
    wanted = {"", *requirement.extras} - extras
    extras |= wanted
    for text in distribution(requirement.name).requires or () if wanted else ():
        inner = Requirement(text)
        if any(inner.marker is None or inner.marker.evaluate({"extra": extra}) for extra in wanted):
            required(inner, found)


def link(source: Path, target: Path) -> None:
    """Link a file or a folder; a folder that several packages share becomes one with links to the contents of each."""
    if not source.is_dir() or not (target.exists() or target.is_symlink()):
        target.symlink_to(source)
        return
    if target.is_symlink():
        first = target.resolve()
        if first == source.resolve():
            return
        target.unlink()
        target.mkdir()
        for child in first.iterdir():
            link(child, target / child.name)
    for child in source.iterdir():
        if not (target / child.name).is_file():
            link(child, target / child.name)


class Environment:
    """A virtual environment with the wheel and what one of its extras requires.

    Attributes:
        python: its interpreter.
    """

    def __init__(self, folder: Path, wheel: Path, extra: str) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin/python"
        (site,) = folder.rglob("site-packages")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            metadata = archive.read(name).decode()

        found: dict[str, set[str]] = {}
        for line in metadata.splitlines():
            if line.startswith("Requires-Dist: "):
                direct = Requirement(line.removeprefix("Requires-Dist: "))
                if direct.marker is None or direct.marker.evaluate({"extra": extra}):
                    required(direct, found)
        for package in found:
            if package != "qat-edge":
                self._link(package, site)

    @staticmethod
    def _link(package: str, site: Path) -> None:
        installed = distribution(package)
        tops = {file.parts[0] for file in installed.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in sorted(tops):
            source = Path(str(installed.locate_file(top)))
            if source.exists():
                link(source, site / top)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), "-I", *arguments], capture_output=True, text=True, check=False, timeout=600
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def plain(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("plain"), wheel, "")


@pytest.fixture(scope="module")
def run(plain: Environment, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained without any extra; tests export it into folders of their own names."""
    folder = tmp_path_factory.mktemp("trained")
    options = short_training(tiny_model_folder, folder, plain_rows(40), steps=4, rotate="off")
    config.save(folder / "options.yaml", "finetune", options)
    arguments = ("finetune", "--config", str(folder / "options.yaml"), "--out", str(folder / "run"))
    done = plain.run("-m", "qat_edge", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Arguments: the run, a format, and the package with the modules of that format.
USE = """
import pkgutil, sys
from importlib import import_module
from qat_edge import export, validate, verify

run, format, package = sys.argv[1:]
for module in pkgutil.walk_packages(import_module(package).__path__, package + "."):
    if not module.name.endswith(("vulkan", "coreml", "compat_runtime")):
        import_module(module.name)

export(run, target=[format], context_length=128, ptq=["none"])
(found,) = verify(run)
assert found.linears_equal == found.linears == 14 and not found.faults, found
options = dict(tokens=64, window=64, prompts=2, max_new_tokens=4, prefill=8, decode=4, repeats=1, threads=1)
(report,) = validate(run, target=[format], **options)
assert format in [model.target for model in report.measured], report
"""


def test_each_extra_exports_verifies_and_measures_its_format(
    format: str, wheel: Path, run: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    alone = Environment(tmp_path / "environment", wheel, target_named(format).extra)
    package = target_named(format).exporter.rpartition(".")[0]
    done = alone.run("-c", USE, str(own), format, package)
    assert done.returncode == 0, done.stderr[-3000:]


def test_without_extras_two_formats_are_written_and_the_others_name_theirs(plain: Environment, run: Path) -> None:
    for format in FORMATS:
        done = plain.run("-m", "qat_edge", "export", str(run), "--target", format, "--ptq", "none")
        hint = f"`pip install 'qat-edge[{format}]'` installs it"
        assert hint in done.stderr and "Traceback" not in done.stderr
        assert done.returncode == (0 if target_named(format).packages_only_run else 2), done.stderr[-3000:]
        assert (run / "exports" / format).exists() == target_named(format).packages_only_run


def test_a_sweep_needs_its_extra_alone(
    plain: Environment, wheel: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    options = short_training(tiny_model_folder, tmp_path, plain_rows(16), steps=2)
    config.save(tmp_path / "options.yaml", "finetune", options)
    arguments = (
        "-m",
        "qat_edge",
        "sweep",
        "--config",
        str(tmp_path / "options.yaml"),
        "--out",
        str(tmp_path / "sweep"),
    )
    done = plain.run(*arguments)
    assert done.returncode == 2 and "`pip install 'qat-edge[sweep]'` installs it" in " ".join(done.stderr.split())
    assert not (tmp_path / "sweep").exists()

    alone = Environment(tmp_path / "environment", wheel, "sweep")
    done = alone.run(*arguments, "--trials", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "sweep/best.yaml").is_file() and (tmp_path / "sweep/report.html").is_file()


def test_optimum_lists_our_command(wheel: Path, tmp_path: Path) -> None:
    alone = Environment(tmp_path / "environment", wheel, "optimum")
    done = alone.run("-m", "optimum.commands.optimum_cli", "export", "--help")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "qat-edge" in done.stdout


def test_the_metadata_has_no_other_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        extras = Metadata.from_email(archive.read(name), validate=True).provides_extra or []
    covered = {target_named(format).extra for format in FORMATS} | {"optimum"}
    assert set(extras) == covered | {"coreml", "dev", "docs", "eval", "sweep", "trl"}
