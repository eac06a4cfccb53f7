"""Disks that are full or read-only: the file and the reason are named, whole files stay whole."""

import errno
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from medmoco import pretrain
from medmoco.command import run_command
from medmoco.errors import Fault, UserError, telling_what_is_kept
from medmoco.output import WriteError, append_jsonl, make_folder, save_torch, write_text
from same_run import differences


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What the system allows to write; a file beyond it is cut off, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_is_cut_off_never_takes_the_place_of_a_whole_one(tmp_path):
    path = tmp_path / "last.pt"
    save_torch(path, {"weight": torch.ones(10)})
    whole = path.read_bytes()
    with (
        files_of_at_most(4096),
        pytest.raises(WriteError, match=r"last\.pt: cannot be written: File too large") as error,
    ):
        save_torch(path, {"weight": torch.ones(10_000)}, previous=tmp_path / "last.previous.pt")
    assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file_of_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(WriteError, match=r"metrics\.jsonl: cannot be written: No space left"):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})


def test_what_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"file/a: cannot be written: Not a directory"):
        make_folder(tmp_path / "file" / "a")
    with pytest.raises(WriteError, match=r"none/a: cannot be written: No such file or directory"):
        write_text(tmp_path / "none" / "a", "")


def test_a_fault_says_what_is_kept_and_other_errors_are_left_alone():
    with (
        pytest.raises(Fault, match=r"^disk full; step 3 is kept$"),
        telling_what_is_kept(lambda: "step 3 is kept"),
    ):
        raise Fault("disk full")
    with pytest.raises(UserError, match=r"^--lr is wrong$"), telling_what_is_kept(lambda: "-"):
        raise UserError("--lr is wrong")


@pytest.mark.parametrize(("error", "status"), [(Fault("disk"), 1), (UserError("--lr"), 2)])
def test_the_exit_status_tells_a_fault_from_a_wrong_flag(capsys, error, status):
    def main(argv):
        raise error

    assert run_command(main, []) == status
    assert capsys.readouterr().err == f"error: {error}\n"


# --- in the middle of a run ---------------------------------------------------------------------

MODEL = ["--method", "mocov2", "--width", "0.125", "--image-size", "32", "--device", "cpu"]
LENGTH = ["--batch-size", "8", "--epochs", "2"]
REASONS = {
    "full": "No space left on device",
    "read-only": "Read-only file system",
    "limited": "File too large",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(tiny_task, cache) -> list[str]:
    return ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache), *MODEL, *LENGTH]


@pytest.fixture(scope="module")
def unbroken(tiny_task, cache, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    data = ["--data", str(tiny_task / "imagesTr"), "--cache", str(cache), *MODEL, *LENGTH]
    pretrain.main([*data, "--output", str(output)])
    return output


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, 16 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount on this machine")
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    filler = disk / "filler"
    with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    yield
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)


def break_at_step(monkeypatch, step: int, begin: Callable[[], object]) -> None:
    train_step = pretrain.Pretraining._train_step

    def breaking(self, batch):
        if self.step == step:
            begin()
        return train_step(self, batch)

    monkeypatch.setattr(pretrain.Pretraining, "_train_step", breaking)


@pytest.mark.parametrize("fault", REASONS)
def test_a_disk_that_fails_in_the_middle_costs_nothing_but_the_time_since_the_checkpoint(
    request, flags, unbroken, tmp_path, monkeypatch, capsys, fault
):
    if fault == "limited":
        place, broken = tmp_path, files_of_at_most(4096)
    else:
        place = request.getfixturevalue("small_disk")
        broken = {"full": full, "read-only": read_only}[fault](place)
    output = place / "run"
    with monkeypatch.context() as patch:
        break_at_step(patch, 8, broken.__enter__)
        try:
            assert run_command(pretrain.main, [*flags, "--output", str(output)]) == 1
        finally:
            broken.__exit__(None, None, None)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {output}/")
    assert f"cannot be written: {REASONS[fault]}; " in error
    assert error.endswith(
        f"{output / 'checkpoints' / 'last.pt'} is whole, and --resume goes on from it"
    )
    pretrain.main(["--output", str(output), "--resume"])
    assert differences(unbroken, output) == []


def test_a_disk_that_is_full_when_the_cache_is_built_is_named_and_leaves_nothing(
    flags, tmp_path, capsys
):
    place = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run")]
    with files_of_at_most(100_000):
        assert run_command(pretrain.main, [*flags, *place]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'cache'}: the slice cache cannot be written: " in error
    assert not (tmp_path / "run").exists()
    left = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*"))
    assert left < 100_000, "what cannot be used takes room"


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("encoder.pt", "last.pt is whole, and --resume goes on from it"),
        ("summary.json", "what is finished is kept, and --resume goes on from there"),
        ("report.html", "what is finished is kept, and --resume goes on from there"),
    ],
)
def test_what_cannot_be_written_after_the_training_is_named_with_what_is_kept(
    unbroken, tmp_path, capsys, name, kept
):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    (output / name).unlink()
    (output / name).mkdir()  # what is written takes its place, which fails whoever runs the test
    assert run_command(pretrain.main, ["--resume", "--output", str(output)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {output / name}: cannot be written: Is a directory; ")
    assert error.endswith(kept)


def test_an_output_that_cannot_be_written_is_named_before_the_training(flags, capsys):
    assert run_command(pretrain.main, [*flags, "--output", "/proc/self/run"]) == 2
    assert "error: --output /proc/self/run: cannot be made: " in capsys.readouterr().err
