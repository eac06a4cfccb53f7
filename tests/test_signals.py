"""One request to stop lets the run save; a second one ends it."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from medmoco import signals
from medmoco.tensor_file import load_tensors

# A run that takes for ever to save. It prints when it may be told to stop, and what it was told.
SAVING = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["StopRequest"]() as stop:
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.01)
    print("asked", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.fixture
def saving():
    command = [sys.executable, "-c", SAVING, signals.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_request_ends_at_once_whatever_catches_exceptions(saving, second):
    saving.send_signal(signal.SIGTERM)
    assert saving.stdout.readline() == "asked\n"
    time.sleep(signals.SAME_REQUEST_SECONDS + 0.1)
    saving.send_signal(second)
    assert saving.wait(60) == -second


def test_a_request_that_is_told_twice_is_one():
    with pytest.raises(signals.Stopped), signals.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked
        raise signals.Stopped


def test_a_request_too_late_to_be_followed_goes_on_to_who_handled_signals_before():
    with (
        pytest.raises(signals.Stopped, match="stopped here"),
        signals.stopping_at_once("here"),
        signals.StopRequest(),
    ):
        signal.raise_signal(signal.SIGUSR1)


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    with signals.StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_stop_while_a_file_is_read_is_no_damage_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "encoder.pt"
    torch.save({"weight": torch.ones(1)}, path)
    load = torch.load

    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", signalled)
    with pytest.raises(signals.Stopped, match="stopped here"), signals.stopping_at_once("here"):
        load_tensors(path)
