"""A slice cache that was changed since it was published is told from one that cannot be read."""

import json
import os

import numpy as np
import pytest
from volume_files import ramp, save_volume

from medmoco.data.cache import CacheSettings, Source, build_cache
from medmoco.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    image = save_volume(tmp_path_factory.mktemp("images") / "a.nii.gz", ramp())
    return Source("a", "a", image)


def build(source, root):
    return build_cache([source], CacheSettings("mr"), root)


def index_with(**changes):
    def damage(folder):
        path = folder / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def table_with(**columns):
    """Another value in a column, or None to leave the column out."""

    def damage(folder):
        path = folder / "volumes.npy"
        rows = np.load(path)
        for name, value in columns.items():
            if value is not None:
                rows[name] = value
        kept = [name for name in rows.dtype.names if columns.get(name, 0) is not None]
        np.save(path, rows[kept])

    return damage


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def changed_bit(folder):
    path = folder / "volumes.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        index_with(shards=[]),
        index_with(settings=None),
        index_with(settings={"modality": "pet", "window": [0, 1]}),
        index_with(bad=[{"file": 1}]),
        index_with(classes=["background", "a"]),
        index_with(checksum=None),
        table_with(shard=7),
        table_with(shard=-1),
        table_with(start=-120),
        table_with(shape=0),
        table_with(case=None),
        table_with(path=None),
        changed_bit,
        written("volumes.npy", b""),
        written("index.json", b""),
        written("index.json", b"[]"),
        written("index.json", b"\xff{}"),
        written("index.json", b'{"a":' * 200_000),
        written("images-00000.u16", b"short"),
        lambda folder: (folder / "index.json").unlink(),
        lambda folder: (folder / "images-00000.u16").unlink(),
    ],
)
def test_a_changed_cache_is_built_again(source, tmp_path, capsys, damage):
    cache = build(source, tmp_path)
    before = {path.name: path.read_bytes() for path in cache.directory.iterdir()}
    damage(cache.directory)
    again = build(source, tmp_path)
    assert f"{again.directory} is damaged, it is built again" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in again.directory.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_cache_that_cannot_be_read_is_kept(source, tmp_path):
    index = build(source, tmp_path).directory / "index.json"
    index.chmod(0)
    with pytest.raises(UserError, match=r"cannot be read: Permission denied"):
        build(source, tmp_path)
    index.chmod(0o600)
    build(source, tmp_path)


def test_an_error_of_the_disk_is_no_damage(source, tmp_path, monkeypatch):
    directory = build(source, tmp_path).directory

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as context:
        context.setattr("medmoco.data.cache.SliceCache", fail)
        with pytest.raises(UserError, match=r"slice cache cannot be read: Input/output error"):
            build(source, tmp_path)
    assert build(source, tmp_path).directory == directory
