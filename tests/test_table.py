"""The table of volumes: held against lists of Python objects."""

import numpy as np
import pytest

from medmoco.data.table import VolumeEntry, VolumeTable

NAMES = ["a", "Müller", "\udcff\udc80", "x" * 300, "b c/d"]


def entries(count: int = 5) -> list[VolumeEntry]:
    return [
        VolumeEntry(name, name[:2], f"/data/{name}.nii", (i + 1, 4, 3), (2.5, 1.0, 0.1 * i))
        for i, name in enumerate(NAMES[:count])
    ]


@pytest.fixture
def table(tmp_path):
    written = VolumeTable.of(entries(), np.arange(5), np.arange(5) * 10)
    np.save(tmp_path / "table.npy", written.rows)
    return VolumeTable.load(tmp_path / "table.npy")


def test_entries_come_back_as_they_were(table):
    assert list(table) == entries()
    assert table[-1] == entries()[-1]
    assert list(table[1:3]) == entries()[1:3]
    assert table.names("case") == NAMES
    assert table == VolumeTable.of(entries(), np.arange(5), np.arange(5) * 10)
    assert table != VolumeTable.of(entries(), np.arange(5), 0)


def test_every_slice_is_located_alone_and_among_others(table):
    counts = [entry.shape[0] for entry in entries()]
    volumes = np.repeat(np.arange(5), counts)
    positions = np.concatenate([np.arange(n) for n in counts])
    assert table.slices == len(volumes) == 15
    got = table.locate(np.arange(15).reshape(3, 5))
    np.testing.assert_array_equal(got[0].ravel(), volumes)
    np.testing.assert_array_equal(got[1].ravel(), positions)
    assert [table.locate(i) for i in range(15)] == list(zip(volumes, positions, strict=True))
    assert table.locate(np.arange(15, dtype=np.int32)[:0])[0].size == 0


@pytest.mark.parametrize("index", [15, [0, 99]])
def test_a_slice_past_the_end_is_named(table, index):
    with pytest.raises(IndexError, match=f"expected a slice below 15, got {np.max(index)}"):
        table.locate(index)


def test_slices_of_chosen_volumes_come_in_order(table):
    chosen = np.array([True, False, True, False, False])
    assert table.slices_where(chosen).tolist() == [0, 3, 4, 5]


def test_an_empty_table_has_no_slices():
    table = VolumeTable.of([], 0, 0)
    assert (len(table), table.slices, list(table)) == (0, 0, [])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", None])
def test_a_file_that_is_no_table_is_an_error(tmp_path, content):
    path = tmp_path / "table.npy"
    np.save(path, np.zeros(3))
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError):
        VolumeTable.load(path)
