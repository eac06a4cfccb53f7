"""Files of torch.save from somewhere: ordinary tensors no larger than the file, or refused."""

import errno
import io
import os
import pickle
import zipfile

import pytest
import torch

from medmoco.errors import UserError
from medmoco.models.weights import read_weights
from medmoco.tensor_file import DamagedFile, load_tensors


def saved(folder, content, legacy=False):
    path = folder / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def rebuilt(path, change, method=zipfile.ZIP_STORED):
    """The archive with every entry's content passed through `change`."""
    with zipfile.ZipFile(path) as source:
        entries = [(info.filename, source.read(info)) for info in source.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries:
            archive.writestr(name, change(name, content))
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_and_plain_values_come_back(tmp_path, legacy):
    tied = torch.arange(6.0)
    content = {"a": tied, "b": [tied, 3, None, "x", (1, 2.5)], "c": {4: tied.view(2, 3).half()}}
    found = load_tensors(saved(tmp_path, content, legacy))
    assert torch.equal(found["a"], tied) and found["b"][1:] == content["b"][1:]
    assert torch.equal(found["c"][4], content["c"][4])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2, 2).to_sparse(), "expected dense tensors on the CPU, got a sparse_coo one"),
        (
            torch.empty(3, device="meta"),
            "expected dense tensors on the CPU, got a strided one on m",
        ),
        (torch.zeros(1).expand(10**6, 10**6), "expected tensors no larger than the file"),
        ([torch.zeros(10**5).view(-1) for _ in range(3)], None),
    ],
)
def test_tensors_that_are_not_ordinary_are_refused(tmp_path, value, message):
    path = saved(tmp_path, {"weights": [{"deep": value}]})
    if message is None:
        load_tensors(path)
        return
    with pytest.raises(UserError, match=message) as caught:
        load_tensors(path)
    assert str(path) in str(caught.value)


def test_an_archive_that_inflates_is_refused(tmp_path):
    path = rebuilt(saved(tmp_path, {"a": torch.zeros(10)}), lambda _, c: c, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedFile, match=r"file\.pt: .*its parts are compressed"):
        load_tensors(path)


def test_a_storage_that_claims_more_than_its_part_is_refused(tmp_path):
    def claim(name, content):
        return content.replace(b"K\x0a", b"J\xff\xff\xff\x00") if "data.pkl" in name else content

    path = rebuilt(saved(tmp_path, {"a": torch.zeros(10)}), claim)
    with pytest.raises(UserError, match=r"file\.pt: expected"):
        load_tensors(path)


def test_a_long_pickle_is_refused(tmp_path):
    path = saved(tmp_path, {"names": ["n" * 1000 + str(n) for n in range(5000)]})
    with pytest.raises(DamagedFile, match="4,194,304 bytes of names and numbers"):
        load_tensors(path)


def test_lists_that_hold_themselves_or_multiply_end(tmp_path):
    ring = [1]
    ring.append(ring)
    multiplied = {"conv1.weight": torch.zeros(1)}
    for _ in range(4):
        multiplied = {str(name): multiplied for name in range(1000)}
    path = saved(tmp_path, {"ring": ring, "state_dict": multiplied})
    assert load_tensors(path)["ring"][1][0] == 1
    with pytest.raises(
        UserError, match=r"file\.pt: expected an encoder\.pt of medmoco or a ResNet"
    ):
        read_weights(path)


class Command:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["archive", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_runs_none(tmp_path, form):
    content = {"state_dict": {"a": torch.zeros(1)}, "optimizer": Command(tmp_path / "mark")}
    path = tmp_path / "file.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Command(tmp_path / "mark")))
    else:
        saved(tmp_path, content, legacy=form == "legacy")
    with pytest.raises(UserError, match=r"file\.pt: expected a file of tensors") as caught:
        load_tensors(path)
    assert not (tmp_path / "mark").exists()
    assert "\n" not in str(caught.value)


def test_every_cut_is_refused_by_name(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(50)}, buffer)
    content, path = buffer.getvalue(), tmp_path / "file.pt"
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"file\.pt: expected a file of tensors"):
            load_tensors(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), "not enough memory"),
    ],
)
def test_trouble_of_the_moment_is_no_damage(tmp_path, monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    path = saved(tmp_path, {"a": torch.zeros(1)})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match=rf"file\.pt: cannot be read: {reason}$") as caught:
        load_tensors(path)
    assert not isinstance(caught.value, DamagedFile), "the checkpoint before it would be taken"
