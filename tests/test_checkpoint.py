"""Checkpoints: whole or absent, of this run or refused, and never code."""

import os
import pickle

import pytest
import torch

from medmoco.checkpoint import load_checkpoint, save_checkpoint
from medmoco.errors import UserError

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
    with pytest.raises(UserError, match=r"last\.pt: expected version 1, got 99"):
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
