"""Loaders that break off: noticed between two batches, told in one line, and nothing is lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.data.delivery import LoaderDied, delivered
from medmoco.errors import UserError
from same_run import differences


class Slices(torch.utils.data.Dataset):
    """Items that cannot be read from `lost` on."""

    def __init__(self, lost: int = 10**6, error: type[Exception] = OSError):
        self.lost, self.error = lost, error

    def __len__(self):
        return 40

    def __getitem__(self, item):
        if item >= self.lost:
            raise self.error(5, "Input/output error", "/cache/images.u16")
        return torch.tensor(item)


def test_what_a_loader_gives_is_delivered_as_it_is():
    loader = DataLoader(Slices(), 8)
    assert torch.equal(torch.cat(list(delivered(loader))), torch.arange(40))


@pytest.mark.parametrize("error", [OSError, UserError])
@pytest.mark.parametrize("workers", [0, 1])
def test_slices_that_cannot_be_read_any_more_are_told_in_one_line(workers, error):
    batches = delivered(DataLoader(Slices(8, error), 4, num_workers=workers))
    assert next(batches).tolist() == [0, 1, 2, 3]
    assert next(batches).tolist() == [4, 5, 6, 7]
    with pytest.raises(LoaderDied, match=r"Input/output.*images\.u16'\)?$") as died:
        next(batches)
    assert "\n" not in str(died.value) and "Error:" not in str(died.value)


def test_errors_of_a_program_are_no_fault_of_the_loader():
    with pytest.raises(ValueError):
        list(delivered(DataLoader(Slices(lost=0, error=ValueError), 4)))


def kill_workers() -> None:
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()


@pytest.fixture(scope="module")
def flags(tiny_task, tmp_path_factory) -> list[str]:
    flags = ["--data", str(tiny_task / "imagesTr"), "--cache", str(tmp_path_factory.mktemp("c"))]
    flags += ["--method", "mocov2", "--device", "cpu", "--epochs", "2", "--workers", "1"]
    return [*flags, "--width", "0.125", "--image-size", "32", "--batch-size", "8"]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    pretrain.main([*flags, "--output", str(output)])
    return output


def test_a_killed_worker_ends_a_run_between_two_steps_and_resume_loses_nothing(
    flags, unbroken, tmp_path, monkeypatch, capsys
):
    broken = tmp_path / "broken"
    train_step = pretrain.Pretraining._train_step

    def kill_in_a_step(self, batch):
        if self.step == 7:
            kill_workers()
        return train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_train_step", kill_in_a_step)
        assert run_command(pretrain.main, [*flags, "--output", str(broken)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a process that reads slices was killed by SIGKILL; ")
    assert f"{broken / 'checkpoints' / 'last.pt'} is whole, and --resume goes on" in error
    state = torch.load(broken / "checkpoints" / "last.pt", weights_only=True)["state"]
    assert state["step"] >= 8, "what was done since the last checkpoint is lost"
    pretrain.main(["--output", str(broken), "--resume"])
    assert differences(unbroken, broken) == []


def lose_slices_in_the_diagnosis(patch, step: int, arguments: list[str]) -> None:
    """Runs the command, whose held-out slices cannot be read after `step` steps."""
    diagnose = pretrain.Pretraining._diagnose

    def lose_slices(self):
        if self.step == step:
            self.held_out = DataLoader(Slices(lost=0), 8)
        diagnose(self)

    with patch.context() as within:
        within.setattr(pretrain.Pretraining, "_diagnose", lose_slices)
        assert run_command(pretrain.main, [*arguments, "--workers", "0"]) == 1


def test_slices_that_a_diagnosis_cannot_read_cost_no_step(
    flags, unbroken, tmp_path, monkeypatch, capsys
):
    broken, last = tmp_path / "broken", tmp_path / "broken" / "checkpoints" / "last.pt"
    lose_slices_in_the_diagnosis(monkeypatch, 6, [*flags, "--output", str(broken)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: slices cannot be read any more: ")
    assert error.endswith(f"; {last} is whole, and --resume goes on from it")
    assert torch.load(last, weights_only=True)["state"]["step"] == 6
    pretrain.main(["--output", str(broken), "--resume"])
    assert differences(unbroken, broken) == []


def test_before_the_first_diagnosis_there_is_nothing_to_save(flags, tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken"
    lose_slices_in_the_diagnosis(monkeypatch, 0, [*flags, "--output", str(broken)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("; no checkpoint was written yet, and --resume begins again")
    assert not (broken / "checkpoints").exists()


# A trainer with two workers, whose pids it prints.
PARENT = """
import multiprocessing, sys, time, torch
from test_delivery import Slices
from medmoco.data.delivery import delivered
from medmoco.data.stream import EpochSampler, make_loader
loader = make_loader(Slices(), EpochSampler(40, 4, seed=0), 2, torch.device("cpu"))
batches = delivered(loader)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
if sys.argv[1] == "waits":
    time.sleep(600)
"""


@pytest.mark.parametrize("parent_then", ["waits", "exits"])
def test_workers_end_with_a_parent_that_is_killed_or_exits(parent_then):
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here), str(here.parent / "soak"), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, parent_then],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    with parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if parent_then == "waits":
            parent.kill()
        parent.wait(timeout=120)
    deadline = time.monotonic() + 120
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a dead process that nobody has waited for
