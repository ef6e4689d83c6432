"""Scripts for a device's shell, run by the shells of this machine."""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from qat_edge_devices import shell
from qat_edge_devices.transport import CompletedProgram


@pytest.mark.parametrize("login", ["dash", "bash", "busybox sh", "mksh", "fish", "tcsh", "zsh"])
def test_any_login_shell_understands_the_command_line(login: str) -> None:
    if shutil.which(login.split()[0]) is None:
        pytest.skip(f"{login} is not installed")
    script = shell.Script('printf "%s|" "$@" "$v"; cat; echo oh >&2; exit 7', "w", {"v": "a'b\\n$x"}, ["é \\ \n'", "%"])
    argv = [*login.split(), "-c", shell.BOOTSTRAP]
    done = subprocess.run(argv, input=script.line() + b"rest\n", capture_output=True, check=False)
    result = script.extract(CompletedProgram(done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert result == CompletedProgram(7, "é \\ \n'|%|a'b\\n$x|rest\n", "oh\n")


@pytest.mark.parametrize("sh", ["dash", "bash", "busybox sh", "mksh"])
def test_a_file_is_hashed_while_it_arrives_until_stopped(tmp_path: Path, sh: str) -> None:
    if shutil.which(sh.split()[0]) is None:
        pytest.skip(f"{sh} is not installed")
    content = random.Random(2).randbytes(3 * 1024**2 + 77)
    for stopped in (False, True):
        place = tmp_path / f"incoming {stopped}"
        arguments = [str(place), str(len(content))]
        script = shell.Script(shell.HASH_WHILE_RECEIVED, "w", {"run": str(tmp_path), "nonce": "salt"}, arguments)
        argv = [*sh.split(), "-c", shell.BOOTSTRAP]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as follower:
            assert follower.stdin is not None
            follower.stdin.write(script.line())
            follower.stdin.flush()
            for begin in range(0, len(content), 700_000):
                time.sleep(0.03)
                with place.open("ab") as file:
                    file.write(content[begin : begin + 700_000])
                if stopped and begin:
                    Path(f"{place}.end").touch()
                    break
            output, _ = follower.communicate(timeout=20)
        assert (hashlib.sha256(content + b"salt").hexdigest() in output.decode()) is not stopped
