"""Checkpoints: whole or absent, of this run or refused, and never code."""

import os
import pickle

import pytest
import torch

from medmoco.checkpoint import (
    AnotherRun,
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from medmoco.errors import UserError
from medmoco.tensor_file import DamagedFile, load_tensors

IDENTITY = {"method": "medmoco", "arch": "resnet18"}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, IDENTITY, {"step": 3, "weight": torch.arange(4.0)})
    return path


class Bomb:
    """A pickle that would leave a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_state_comes_back_as_it_was(checkpoint):
    state = load_checkpoint(checkpoint, IDENTITY)
    assert state["step"] == 3
    torch.testing.assert_close(state["weight"], torch.arange(4.0), rtol=0, atol=0)


def test_another_method_is_named(checkpoint):
    with pytest.raises(UserError, match=r"last\.pt.*expected method = 'mocov2', got 'medmoco'"):
        load_checkpoint(checkpoint, {**IDENTITY, "method": "mocov2"})


def test_another_version_is_named(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "version": 99}, checkpoint)
    with pytest.raises(UserError, match=r"last\.pt: expected version 2 of a checkpoint, got 99"):
        load_checkpoint(checkpoint, IDENTITY)


def test_another_format_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: expected a checkpoint of format"):
        load_checkpoint(tmp_path / "other.pt", IDENTITY)


def test_a_pickle_of_something_else_runs_no_code(tmp_path):
    mark = tmp_path / "mark"
    for name, write in (("plain.pt", pickle.dump), ("zip.pt", torch.save)):
        with open(tmp_path / name, "wb") as file:
            write(Bomb(mark), file)
        with pytest.raises(UserError, match=f"{name}: expected a file of tensors"):
            load_checkpoint(tmp_path / name, IDENTITY)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_named(checkpoint, share):
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match=r"last\.pt: expected a file of tensors"):
        load_checkpoint(checkpoint, IDENTITY)


def test_a_list_is_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match=r"list\.pt: expected a dictionary of tensors, got list"):
        load_checkpoint(tmp_path / "list.pt", IDENTITY)


def test_a_checkpoint_without_its_checksum_is_damaged(checkpoint):
    torch.save(torch.load(checkpoint, weights_only=True), checkpoint)
    with pytest.raises(DamagedFile, match=r"last\.pt: expected a checkpoint that ends with its"):
        load_checkpoint(checkpoint, IDENTITY)
    assert load_tensors(checkpoint)["state"]["step"] == 3, "weights of others have none either"


# --- the last two ---------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def overwrite(path):
    path.write_bytes(b"no checkpoint")


DAMAGES = [truncate, flip_a_bit, empty, overwrite]


@pytest.fixture
def checkpoints(tmp_path):
    """Of steps 1, 2 and 3, of which the last two are there."""
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "last.pt", IDENTITY)
    for step in (1, 2, 3):
        checkpoints.save({"step": step})
    return checkpoints


def steps(checkpoints) -> dict[str, int]:
    folder = checkpoints.path.parent
    return {path.name: load_checkpoint(path, IDENTITY)["step"] for path in folder.glob("*.pt")}


def test_the_last_two_are_kept(checkpoints):
    assert steps(checkpoints) == {"last.pt": 3, "last.previous.pt": 2}
    assert checkpoints.load() == {"step": 3}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_one_is_named_and_the_one_before_goes_on(checkpoints, damage, capsys):
    damage(checkpoints.path)
    assert checkpoints.load() == {"step": 2}
    told = capsys.readouterr().err
    assert f"warning: {checkpoints.path}: " in told
    assert f"going on from {checkpoints.previous}" in told
    checkpoints.save({"step": 4})
    assert steps(checkpoints) == {"last.pt": 4, "last.previous.pt": 2}


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_ones_are_both_named(checkpoints, damage):
    damage(checkpoints.path)
    flip_a_bit(checkpoints.previous)
    with pytest.raises(UserError) as refused:
        checkpoints.load()
    assert str(refused.value).count(f"{checkpoints.path}: ") == 1
    assert f"{checkpoints.previous}: damaged" in str(refused.value)


def test_a_damaged_only_one_is_named(checkpoints):
    checkpoints.previous.unlink()
    truncate(checkpoints.path)
    with pytest.raises(UserError, match=r"last\.pt: .*\nno checkpoint is left"):
        checkpoints.load()


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_whenever_a_save_is_stopped_a_whole_one_is_left(checkpoints, monkeypatch, stopped_at):
    """The process ends at the first or at the second of the renames: nothing is cleaned up."""
    replace, calls = os.replace, []

    def until_stopped(*paths):
        calls.append(paths)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", until_stopped)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save({"step": 4})
    left = Checkpoints(checkpoints.path, IDENTITY)
    assert left.load() == {"step": 3}
    left.save({"step": 5})
    assert steps(left) == {"last.pt": 5, "last.previous.pt": 3}


def test_one_that_may_not_be_read_is_no_reason_to_go_back(checkpoints, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("medmoco.tensor_file.check_seal", forbidden)
    with pytest.raises(UserError, match=r"last\.pt: cannot be read: Permission denied"):
        checkpoints.load()


def test_that_of_another_run_is_no_damage(checkpoints):
    with pytest.raises(AnotherRun, match=r"last\.pt: checkpoint of another run"):
        Checkpoints(checkpoints.path, {"method": "mocov2"}).load()


def test_without_any_there_is_nothing_to_load(checkpoints):
    assert checkpoints.exist()
    checkpoints.remove()
    assert not checkpoints.exist() and checkpoints.load() is None
    assert not list(checkpoints.path.parent.iterdir())


def test_what_they_cost_is_told(checkpoints):
    checkpoints.seconds = 0.5
    size = f"{checkpoints.path.stat().st_size / 1e6:.1f}"
    assert checkpoints.cost(20.0) == f"3 checkpoints of {size} MB in 0.50 s, 2.5% of the training"
