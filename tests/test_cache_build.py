"""Building a slice cache: in parallel, in shards, and on from where it was killed."""

import errno
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from volume_files import ramp, save_volume

from medmoco.data import build as build_module
from medmoco.data import nifti
from medmoco.data import plan as plan_module
from medmoco.data.cache import CacheSettings, Source, build_cache
from medmoco.data.journal import Converted, Journal
from medmoco.data.shards import place
from medmoco.errors import Fault, UserError

LABELS = {"classes": ("background", "a", "b"), "values": (0, 2, 5)}
NAMES = "abcdef"


@pytest.fixture
def sources(tmp_path):
    """Six labelled volumes, all different."""
    made = []
    for i, name in enumerate(NAMES):
        voxels = ramp((5 + i, 6, 7))
        image = save_volume(tmp_path / "images" / f"{name}.nii.gz", voxels + i)
        label = save_volume(tmp_path / "labels" / f"{name}.nii.gz", np.uint8([0, 2, 5])[voxels % 3])
        made.append(Source(name, name, image, label))
    return made


def build(sources, root, **keywords):
    return build_cache(sources, CacheSettings(), root, **LABELS, **keywords)


def contents(cache):
    return {path.name: path.read_bytes() for path in cache.directory.iterdir()}


def converted(monkeypatch):
    """Gets the numbers of the volumes that are converted from now on."""
    numbers, convert = [], build_module._convert_image

    def noted(plan, number):
        numbers.append(number)
        return convert(plan, number)

    monkeypatch.setattr(build_module, "_convert_image", noted)
    return numbers


def test_volumes_at_once_give_the_files_of_one_after_another(sources, tmp_path):
    one = build(sources, tmp_path / "one", workers=1)
    assert contents(build(sources, tmp_path / "four", workers=4)) == contents(one)


def test_so_many_volumes_are_converted_at_once(sources, tmp_path, monkeypatch):
    met = threading.Barrier(3)  # a volume waits for two others

    def meet(plan, number, convert=build_module._convert_image):
        met.wait(timeout=60)
        return convert(plan, number)

    monkeypatch.setattr(build_module, "_convert_image", meet)
    build(sources, tmp_path / "cache", workers=3)


@pytest.mark.parametrize(("free", "at_once"), [(10**12, 4), (2 * 24 * 420 * 3, 3), (10, 1)])
def test_volumes_at_once_leave_half_of_the_memory(monkeypatch, free, at_once):
    monkeypatch.setattr(build_module, "available_memory", lambda: free)
    plan = SimpleNamespace(shapes=np.array([(7, 6, 10), (1, 2, 3)] * 5), sources=range(10))
    assert build_module._at_once(plan, workers=4) == at_once


def test_volumes_are_the_same_in_shards_of_any_size(sources, tmp_path, monkeypatch):
    whole = build(sources, tmp_path / "whole")
    monkeypatch.setattr(plan_module, "place", functools.partial(place, limit=600))
    parts = build(sources, tmp_path / "parts")
    images = sorted(parts.directory.glob("images-*.u16"))
    assert len(images) == len(list(parts.directory.glob("labels-*.u8"))) > 2
    assert max(path.stat().st_size for path in images) <= 2 * 600
    assert parts.volumes.names("case") == whole.volumes.names("case") == list(NAMES)
    for index in range(len(whole)):
        volume, position = parts.locate(index)
        assert (parts.image(volume, position) == whole.images(volume)[position]).all()
        assert (parts.label(volume, position) == whole.labels(volume)[position]).all()


@pytest.mark.parametrize("name", ["images-00000.u16", "labels-00000.u8", "volumes.npy"])
def test_a_cache_of_a_missing_or_short_file_is_built_again(sources, tmp_path, name, capsys):
    cache = build(sources, tmp_path / "cache")
    before = contents(cache)
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(before[name][:-1])):
        damage(cache.directory / name)
        assert contents(build(sources, tmp_path / "cache")) == before
        assert "is damaged, it is built again" in capsys.readouterr().out


def test_sizes_are_told_beforehand(sources, tmp_path, capsys):
    build(sources, tmp_path / "cache")
    told = capsys.readouterr().out.splitlines()[0]
    slices, mib = 6 * 7, 3 * sum((5 + i) * 6 * 7 for i in range(6)) / 2**20
    start = f"cache: 6 volumes, {slices} slices, {mib:.1f} MiB to write below {tmp_path / 'cache'}"
    assert told.startswith(start) and told.endswith(" free")


KILLED = """
import sys, time
from pathlib import Path
from medmoco.data import build, cache
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
convert = build._convert_image
def stuck(plan, number):
    if number == stop:
        (folder / "stuck").touch()
        time.sleep(600)
    return convert(plan, number)
build._convert_image = stuck
sources = [
    cache.Source(n, n, folder / "images" / f"{n}.nii.gz", folder / "labels" / f"{n}.nii.gz")
    for n in "abcdef"
]
labels = {"classes": ("background", "a", "b"), "values": (0, 2, 5)}
cache.build_cache(sources, cache.CacheSettings(), folder / "cache", workers=1, **labels)
"""


def journal_of(root):
    """The journal of the build in this folder, and the numbers of the volumes that it tells."""
    journals = list(root.glob(".*.partial/journal.jsonl"))
    lines = journals[0].read_text().splitlines() if journals else []
    return journals, [json.loads(line)["number"] for line in lines[1:]]


def test_a_killed_build_goes_on_and_ends_as_an_unbroken_one(sources, tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-c", KILLED, str(tmp_path), "4"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (tmp_path / "stuck").exists() or len(journal_of(tmp_path / "cache")[1]) < 4:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (journal,), told = journal_of(tmp_path / "cache")
    assert sorted(told) == [0, 1, 2, 3]
    (journal.parent / ".index.json.abcdefgh").touch()  # of a kill while the index was written
    numbers = converted(monkeypatch)
    cache = build(sources, tmp_path / "cache")
    assert sorted(numbers) == [4, 5]
    assert "cache: goes on after 4 of 6 volumes" in capsys.readouterr().out
    assert not journal.parent.exists()
    assert contents(cache) == contents(build(sources, tmp_path / "unbroken"))


def interrupt_at(sources, root, number):
    """Stops a build at this volume; what `journal_of` tells."""

    def interrupted(plan, current, convert=build_module._convert_image):
        if current == number:
            raise KeyboardInterrupt
        return convert(plan, current)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(build_module, "_convert_image", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(sources, root, workers=1)
    return journal_of(root)


def test_what_did_not_reach_the_disk_is_converted_again(sources, tmp_path, monkeypatch):
    """As a power cut may leave it: a journal that is ahead of the voxels, or cut itself."""
    (journal,), told = interrupt_at(sources, tmp_path / "cache", 5)
    damaged = told[0]
    labels = bytearray((journal.parent / "labels-00000.u8").read_bytes())
    labels[sum(5 + i for i in range(damaged)) * 6 * 7] ^= 1
    (journal.parent / "labels-00000.u8").write_bytes(labels)
    journal.write_bytes(journal.read_bytes()[:-5])
    numbers = converted(monkeypatch)
    cache = build(sources, tmp_path / "cache")
    assert sorted(numbers) == sorted({damaged} | set(range(6)) - set(told[:-1]))
    assert contents(cache) == contents(build(sources, tmp_path / "unbroken"))


def test_what_another_plan_has_left_is_deleted(sources, tmp_path, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(plan_module, "place", functools.partial(place, limit=600))
        interrupt_at(sources, tmp_path / "cache", 5)
    numbers = converted(monkeypatch)
    cache = build(sources, tmp_path / "cache")
    assert sorted(numbers) == list(range(6))
    assert contents(cache) == contents(build(sources, tmp_path / "unbroken"))


def test_skip_bad_goes_on_where_bad_files_ended_a_build(sources, tmp_path, monkeypatch):
    sources[2].image.write_bytes(sources[2].image.read_bytes()[:-9])
    with pytest.raises(UserError, match="1 bad file among 6 volumes"):
        build(sources, tmp_path / "cache")
    numbers = converted(monkeypatch)
    cache = build(sources, tmp_path / "cache", skip_bad=True)
    assert numbers == [2] and len(cache.volumes) == 5


def test_bad_files_alone_leave_nothing(sources, tmp_path):
    sources[2].image.write_bytes(b"")
    with pytest.raises(UserError, match="1 bad file among 1 volumes"):
        build(sources[2:3], tmp_path / "cache")
    assert list((tmp_path / "cache").glob(".*.partial")) == []


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EIO, "Input/output error"), OSError(errno.EMFILE, "x")]
)
@pytest.mark.parametrize("reads", ["headers", "voxels"])
def test_what_cannot_be_read_for_a_moment_is_never_left_out(
    sources, tmp_path, monkeypatch, error, reads
):
    """A cache that lacks it would be found again at every start."""
    name = {"headers": "_parse_header", "voxels": "_fill"}[reads]
    read, files = getattr(nifti, name), []

    def fail(first, *arguments):
        files.append(first)
        if len(files) == 4:
            raise error
        return read(first, *arguments)

    with monkeypatch.context() as context:
        context.setattr(nifti, name, fail)
        with pytest.raises(Fault, match=r"cannot be read: .*; the same command goes on") as caught:
            build(sources, tmp_path / "cache", skip_bad=True, workers=1)
    assert ".nii.gz" in str(caught.value)
    assert len(build(sources, tmp_path / "cache", skip_bad=True).volumes) == 6


def test_no_workers_convert_one_volume_after_another(sources, tmp_path, monkeypatch):
    threads = []
    at_once = build_module._in_threads
    monkeypatch.setattr(build_module, "_in_threads", lambda *a: threads.append(a[2]) or at_once(*a))
    build(sources, tmp_path / "cache", workers=0)
    assert threads == [1]


@pytest.mark.parametrize(
    "line",
    [
        b'{"number": [1], "modality": "ct", "checksums": [1]}',
        b'{"number": 6, "modality": "ct", "checksums": [1]}',
        b'{"number": -1, "modality": "ct", "checksums": [1]}',
        b'{"number": 1, "modality": "pet", "checksums": [1]}',
        b'{"number": 1, "modality": "ct", "checksums": 1}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_odd_lines_of_the_journal_are_passed_over(tmp_path, line):
    good = Converted(2, "mr", (1, 2))
    with Journal(tmp_path / "journal", "plan", 6) as journal:
        journal.add(good)
    first, last = (tmp_path / "journal").read_bytes().splitlines()
    (tmp_path / "journal").write_bytes(b"\n".join([first, line, last, b""]))
    assert Journal(tmp_path / "journal", "plan", 6).found == {2: good}
    assert Journal(tmp_path / "journal", "another plan", 6).found == {}


def test_a_full_disk_keeps_what_is_done(sources, tmp_path, monkeypatch):
    write, written = build_module.Shards.write, []

    def full(self, shard, start, stack):
        written.append(stack)
        if len(written) > 6:
            raise OSError(28, "No space left on device")
        write(self, shard, start, stack)

    with monkeypatch.context() as context:
        context.setattr(build_module.Shards, "write", full)
        with pytest.raises(UserError, match=r"cannot be written: .*No space left on device"):
            build(sources, tmp_path / "cache", workers=1)
    numbers = converted(monkeypatch)
    build(sources, tmp_path / "cache")
    assert sorted(numbers) == [3, 4, 5]
