"""What changes around a pretraining: its data folder goes away, the system's clock jumps."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tqdm.std
from pretraining_runs import TINY, assert_same_end, records

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.data import cache as slice_cache

SHORT = ["--method", "mocov2", "--device", "cpu", *TINY, "--epochs", "1"]


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """The report takes longer than such a training, and is not what is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "write_plots", lambda _: None)
        patch.setattr(pretrain, "write_report", lambda _, output: output)
        yield


@pytest.fixture(scope="module")
def volumes(tiny_task, tmp_path_factory) -> Path:
    """A folder of volumes that a test may move away and back."""
    return Path(shutil.copytree(tiny_task / "imagesTr", tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture(scope="module")
def flags(volumes, tmp_path_factory) -> list[str]:
    return ["--data", str(volumes), "--cache", str(tmp_path_factory.mktemp("cache")), *SHORT]


@pytest.fixture(scope="module")
def unbroken(flags, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    pretrain.main([*flags, "--output", str(output)])
    return output


def test_training_goes_on_without_the_data_folder_but_does_not_begin_again(
    volumes, flags, unbroken, tmp_path, monkeypatch, capsys
):
    output, away = tmp_path / "run", volumes.with_name("away")
    train_step = pretrain.Pretraining._train_step

    def move_away(self, batch):
        if self.step == 2:
            volumes.rename(away)
        return train_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain.Pretraining, "_train_step", move_away)
        assert run_command(pretrain.main, [*flags, "--output", str(output)]) == 0
    assert_same_end(unbroken, output)
    capsys.readouterr()
    assert run_command(pretrain.main, ["--resume", "--output", str(output)]) == 2
    assert str(volumes) in capsys.readouterr().err
    away.rename(volumes)


def test_a_folder_that_goes_away_while_the_cache_is_built_is_named(
    volumes, flags, tmp_path, monkeypatch, capsys
):
    away, make_plan = volumes.with_name("away"), slice_cache.make_plan

    def move_away(*arguments):
        plan = make_plan(*arguments)
        volumes.rename(away)
        return plan

    monkeypatch.setattr(slice_cache, "make_plan", move_away)
    place = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    try:
        assert run_command(pretrain.main, [*flags, *place]) == 2
    finally:
        away.rename(volumes)
    error = capsys.readouterr().err
    assert all(str(path) in error for path in volumes.iterdir())
    assert not (tmp_path / "run").exists()


def test_a_clock_that_jumps_changes_neither_weights_nor_speeds(
    flags, unbroken, tmp_path, monkeypatch
):
    jumps = itertools.cycle([0.0, 1e9, -1e9, 3600.0, -3600.0])
    real = time.time

    def jumping() -> float:
        return real() + next(jumps)

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(tqdm.std, "time", jumping)
    output = tmp_path / "run"
    pretrain.main([*flags, "--tensorboard", "--output", str(output)])
    assert_same_end(unbroken, output)
    for record in records(output):
        assert 0 < record["images_per_second"] < math.inf and 0 <= record["data_wait"] <= 1
    seconds = json.loads((output / "summary.json").read_text())["seconds"]
    assert all(0 <= value < 3600 for value in seconds.values())
