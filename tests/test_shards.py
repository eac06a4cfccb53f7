"""Shards: where stacks go, and how slices come back."""

import os
import sys

import numpy as np
import pytest

from medmoco.data import shards as shards_module
from medmoco.data.index import CacheDamage
from medmoco.data.shards import Shards, place
from medmoco.errors import UserError

SIZES = [24, 12]


@pytest.fixture
def shards(tmp_path):
    made = Shards(tmp_path, "images", np.uint16, SIZES)
    made.create()
    return made


def test_volumes_stay_whole_within_the_limit():
    shapes = np.array([(2, 3, 4), (1, 3, 4), (1, 1, 1), (0, 0, 0), (9, 3, 4), (1, 1, 2)])
    shard, start, sizes = place(shapes, limit=36)
    assert shard.tolist() == [0, 0, 1, 1, 2, 3]  # the fifth is larger than the limit
    assert start.tolist() == [0, 24, 0, 1, 0, 0]
    assert sizes == [36, 1, 108, 2]


def test_places_do_not_overlap_whatever_the_shapes():
    shapes = np.random.default_rng(0).integers(1, 30, (200, 3))
    shard, start, sizes = place(shapes, limit=20_000)
    taken = [np.zeros(size, bool) for size in sizes]
    for shape, s, first in zip(shapes, shard, start, strict=True):
        part = taken[s][first : first + shape.prod()]
        assert len(part) == shape.prod() and not part.any()
        part[:] = True
    assert all(part.all() for part in taken)
    assert max(sizes) <= max(20_000, shapes.prod(axis=1).max())


def test_what_is_written_is_read_and_mapped(shards):
    first, second = np.arange(24).reshape(2, 3, 4), np.arange(12).reshape(1, 3, 4) + 65500
    shards.write(0, 0, first)
    shards.write(1, 0, second)
    np.testing.assert_array_equal(shards.map(0, 0, (2, 3, 4)), first)
    np.testing.assert_array_equal(shards.read(0, 12, (3, 4)), first[1])
    np.testing.assert_array_equal(shards.read(1, 0, (1, 3, 4)), second)
    assert shards.read(0, 0, (3, 4)).dtype == np.uint16
    assert shards.path(1).name == "images-00001.u16"
    shards.read(0, 0, (3, 4))[:] = 7  # a copy
    assert shards.read(0, 0, (1, 1))[0, 0] == 0


def test_files_are_made_in_their_length_and_those_that_exist_stay(shards):
    shards.check()
    shards.write(0, 0, np.ones((2, 3, 4)))
    shards.create()
    shards.check()
    assert shards.read(0, 0, (2, 3, 4)).all()


@pytest.mark.parametrize("length", [0, 23, 25, None])
def test_a_damaged_file_is_noticed(shards, length):
    path = shards.path(1)
    path.unlink() if length is None else os.truncate(path, length)
    with pytest.raises(CacheDamage, match=rf"{path}: expected 24 bytes, got {length or 0}"):
        shards.check()


def test_a_file_that_is_cut_or_gone_while_in_use_is_named(shards):
    os.truncate(shards.path(0), 40)
    message = f"{shards.path(0)}: the slice cache was cut while it was in use: expected 8 bytes"
    with pytest.raises(UserError, match=message):
        shards.read(0, 0, (2, 3, 4))
    shards.path(1).unlink()
    with pytest.raises(UserError, match=f"{shards.path(1)}: the slice cache cannot be read: No"):
        shards.read(1, 0, (1, 3, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files in /proc")
def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN_FILES", 3)
    many = Shards(tmp_path, "labels", np.uint8, [4] * 20)
    many.create()
    before = len(os.listdir("/proc/self/fd"))
    for shard in range(20):
        many.write(shard, 0, np.full((1, 2, 2), shard))
        assert many.read(shard, 0, (2, 2)).tolist() == [[shard, shard]] * 2
    assert len(os.listdir("/proc/self/fd")) - before == 3
    del many
    assert len(os.listdir("/proc/self/fd")) == before
