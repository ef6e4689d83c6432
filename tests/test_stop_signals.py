"""SIGINT, SIGTERM and SIGHUP: noted first, raised the second time, ignored where they were ignored."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from qat_edge import stop_signals
from qat_edge.stop_signals import Stopped


@pytest.mark.parametrize("signum", stop_signals.STOP_SIGNALS)
def test_a_signal_raises_and_names_its_exit_code(signum: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Stopped, match="Stopped by SIG") as caught, stop_signals.raise_on_signals():
        os.kill(os.getpid(), signum)
    assert caught.value.exit_code == 128 + signum and signal.getsignal(signum) is before


def test_an_error_that_native_code_makes_of_a_signal_is_the_signal() -> None:
    def native() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(Stopped) as caught, stop_signals.raise_on_signals():
        native()
    assert caught.value.signum == signal.SIGTERM
    with pytest.raises(ValueError, match="no signal"), stop_signals.raise_on_signals():
        raise ValueError("no signal")


def test_the_first_signal_is_noted_and_the_second_one_raises() -> None:
    announced: list[int] = []
    with pytest.raises(Stopped), stop_signals.defer_signals(announced.append) as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM and announced == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
    assert announced == [signal.SIGTERM]


def test_work_that_is_of_no_use_by_half_is_stopped_at_once() -> None:
    with stop_signals.defer_signals(lambda signum: None) as request:
        with pytest.raises(Stopped), request.at_once():
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped), request.at_once():
            raise AssertionError("the signal came before")


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals.raise_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_is_passed_on_to_a_command_of_ours() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(Stopped), stop_signals.raise_on_signals(), stop_signals.passed_on(process):
        os.kill(os.getpid(), signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM
