"""Pretraining that was stopped or killed goes on bit for bit, or says why it cannot."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pretraining_runs import TINY, assert_identical, assert_same_end, records, state

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.output import save_torch


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(tiny_task, cache_folder):
    """Flags of a run of 2 epochs of 6 steps, which a test completes by its output folder."""
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache_folder), "--device", "cpu"]
    return [*data, *TINY, "--epochs", "2"]


@pytest.fixture(scope="module")
def unbroken(tiny_task, cache_folder, tmp_path_factory) -> Path:
    """A run that was never stopped."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache_folder), "--device", "cpu"]
    pretrain.main([*data, *TINY, "--epochs", "2", "--output", str(output)])
    return output


def stop_at_step(monkeypatch, step: int, arguments: list[str], number=signal.SIGTERM) -> None:
    """Runs the command, which a signal ends after `step` steps."""
    train_step = pretrain.Pretraining._train_step

    def terminate_at_step(self, batch):
        record = train_step(self, batch)
        if self.step == step:
            os.kill(os.getpid(), number)
        return record

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_train_step", terminate_at_step)
        assert run_command(pretrain.main, arguments) == 0


@pytest.mark.parametrize("step", [1, 6, 7, 12])
def test_sigterm_saves_and_resume_ends_with_the_same_weights(
    flags, unbroken, tmp_path, monkeypatch, step
):
    output = tmp_path / "stopped"
    stop_at_step(monkeypatch, step, [*flags, "--output", str(output)])
    assert state(output)["step"] == step
    assert not (output / "encoder.pt").exists()
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)


def test_densecl_resumes_with_both_of_its_queues(flags, tmp_path, monkeypatch):
    choice = [*flags, "--method", "densecl", "--epochs", "1"]
    pretrain.main([*choice, "--output", str(tmp_path / "unbroken")])
    last = records(tmp_path / "unbroken")[-1]
    parts = (last["loss_global"] + last["loss_local"]) / 2
    assert last["loss"] == pytest.approx(parts, rel=1e-5)
    queue = state(tmp_path / "unbroken")["model"]["local_queue.keys"]
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(len(queue)))

    stop_at_step(monkeypatch, 3, [*choice, "--output", str(tmp_path / "stopped")])
    pretrain.main(["--output", str(tmp_path / "stopped"), "--resume"])
    assert_same_end(tmp_path / "unbroken", tmp_path / "stopped")


def test_sigterm_while_the_last_epoch_is_diagnosed_is_not_lost(
    flags, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "stopped"
    diagnose = pretrain.Pretraining._diagnose

    def terminate_at_end(self):
        diagnose(self)
        if self.step == self.total_steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_diagnose", terminate_at_end)
        assert run_command(pretrain.main, [*flags, "--output", str(output)]) == 0
    assert not (output / "encoder.pt").exists(), "what follows pretraining was not begun"
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)


def test_sigterm_while_the_queue_is_filled_does_not_wait_for_it(
    flags, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "stopped"
    ids = pretrain.Pretraining.ids_of

    def terminate_at_first_keys(self, index):
        os.kill(os.getpid(), signal.SIGTERM)
        return ids(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "ids_of", terminate_at_first_keys)
        assert run_command(pretrain.main, [*flags, "--output", str(output)]) == 0
    assert not (output / "checkpoints").exists()
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)


# The command with a pause before every step, so that there is a run to be killed.
SLOWLY = """
import sys, time
from medmoco import pretrain
train_step = pretrain.Pretraining._train_step
def after_a_pause(self, batch):
    time.sleep(0.5)
    return train_step(self, batch)
pretrain.Pretraining._train_step = after_a_pause
pretrain.main(sys.argv[1:])
"""


def test_sigkill_and_resume_end_with_the_same_weights(flags, unbroken, tmp_path):
    output = tmp_path / "killed"
    command = [sys.executable, "-c", SLOWLY, *flags, "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "metrics.jsonl").exists() or not records(output):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "encoder.pt").exists(), "the run was over before it was killed"
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)


def test_resume_refuses_another_method(unbroken, capsys):
    arguments = ["--output", str(unbroken), "--resume", "--method", "mocov2"]
    assert run_command(pretrain.main, arguments) == 2
    assert "was started with --method medmoco, got mocov2" in capsys.readouterr().err


def test_resume_refuses_the_run_of_another_command(unbroken, tmp_path, capsys):
    output = tmp_path / "copy"
    output.mkdir()
    config = json.loads((unbroken / "config.json").read_text()) | {"command": "train"}
    (output / "config.json").write_text(json.dumps(config))
    assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 2
    assert "expected a run of `medmoco pretrain`" in capsys.readouterr().err


def test_resume_refuses_a_checkpoint_of_another_architecture(unbroken, tmp_path, capsys):
    output = tmp_path / "copy"
    (output / "checkpoints").mkdir(parents=True)
    (output / "config.json").write_bytes((unbroken / "config.json").read_bytes())
    content = torch.load(unbroken / "checkpoints" / "last.pt", weights_only=True)
    content["identity"]["arch"] = "resnet50"
    save_torch(output / "checkpoints" / "last.pt", content)
    assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "checkpoint of another run: expected arch = 'resnet18', got 'resnet50'" in error


def test_a_run_goes_on_from_the_checkpoint_of_another_kind_of_device(unbroken, tmp_path):
    output = tmp_path / "copy"
    (output / "checkpoints").mkdir(parents=True)
    (output / "config.json").write_bytes((unbroken / "config.json").read_bytes())
    content = torch.load(unbroken / "checkpoints" / "last.pt", weights_only=True)
    content["state"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # CUDA's: seed and offset
    save_torch(output / "checkpoints" / "last.pt", content)
    pretrain.main(["--output", str(output), "--resume"])
    assert (output / "encoder.pt").is_file()


def test_a_finished_run_resumes_to_the_same_result(unbroken):
    before = state(unbroken)
    pretrain.main(["--output", str(unbroken), "--resume"])
    assert_identical(state(unbroken), before)


def test_sigusr1_stops_too_and_loader_processes_change_nothing(
    flags, unbroken, tmp_path, monkeypatch
):
    output = tmp_path / "stopped"
    choice = [*flags, "--workers", "2", "--output", str(output)]
    stop_at_step(monkeypatch, 8, choice, signal.SIGUSR1)
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    flags, unbroken, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "stopped"
    stop_at_step(monkeypatch, 8, [*flags, "--output", str(output)])
    last = output / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    capsys.readouterr()
    pretrain.main(["--output", str(output), "--resume"])
    printed = capsys.readouterr()
    assert f"warning: {last}: " in printed.err
    assert "last.previous.pt" in printed.err
    assert "2 epochs of 6 steps, from step 6, batch" in printed.out
    assert_same_end(unbroken, output)


def test_two_damaged_checkpoints_are_both_named(unbroken, tmp_path, capsys):
    output = tmp_path / "copy"
    shutil.copytree(unbroken, output)
    names = ("last.pt", "last.previous.pt")
    for name in names:
        content = bytearray((output / "checkpoints" / name).read_bytes())
        content[len(content) // 3] ^= 16
        (output / "checkpoints" / name).write_bytes(content)
    assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 2
    error = capsys.readouterr().err
    assert all(f"{output / 'checkpoints' / name}: damaged" in error for name in names)


def draw() -> tuple[float, float, float]:
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_random_numbers_of_every_library_go_on(flags, tmp_path, monkeypatch):
    """For steps that draw from the global generators, as those of an extension may."""
    train_step, drawn = pretrain.Pretraining._train_step, []

    def drawing(self, batch):
        drawn.append(draw())
        return train_step(self, batch)

    monkeypatch.setattr(pretrain.Pretraining, "_train_step", drawing)
    output = tmp_path / "stopped"
    stop_at_step(monkeypatch, 7, [*flags, "--method", "mocov2", "--output", str(output)])
    expected = [draw() for _ in range(5)]
    drawn.clear()
    pretrain.main(["--output", str(output), "--resume"])
    assert drawn == expected


def test_a_stop_after_the_training_leaves_what_is_finished(unbroken, tmp_path, monkeypatch, capsys):
    output = tmp_path / "copy"
    shutil.copytree(unbroken, output)
    (output / "report.html").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "write_plots", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 0
    assert (
        "outside of the training; what is finished is kept; --resume goes on from there"
        in capsys.readouterr().err
    )
    assert not (output / "report.html").exists()
    pretrain.main(["--output", str(output), "--resume"])
    assert (output / "report.html").is_file()


@pytest.mark.parametrize("place", ["restore", "summary", "metadata"])
def test_a_stop_before_and_after_the_steps_is_followed_at_once(
    unbroken, tmp_path, monkeypatch, capsys, place
):
    """As the checkpoint is read, as encoder.pt is written, and between the two files."""
    output = tmp_path / "copy"
    shutil.copytree(unbroken, output)
    monkeypatch.setattr(pretrain, "write_plots", lambda _: None)
    monkeypatch.setattr(pretrain, "write_report", lambda _, output: output)
    with monkeypatch.context() as patch:
        patch.setattr(
            pretrain.Pretraining, place, lambda self: os.kill(os.getpid(), signal.SIGTERM)
        )
        assert run_command(pretrain.main, ["--output", str(output), "--resume"]) == 0
    assert "; --resume goes on from there" in capsys.readouterr().err
    pretrain.main(["--output", str(output), "--resume"])
    assert_same_end(unbroken, output)
