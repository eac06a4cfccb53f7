import json
import os
import re
import signal
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from volume_files import OBLIQUE, as_stored, ramp, save_volume

from medmoco.data import build as build_module
from medmoco.data.cache import CacheSettings, Source, build_cache
from medmoco.data.sources import folder_sources, read_case_list, task_sources
from medmoco.data.task import read_task
from medmoco.data.volumes import BadFile, read_volume, to_stack
from medmoco.errors import UserError

MR = CacheSettings(modality="mr")
LABELS = {"classes": ("background", "a", "b"), "values": (0, 2, 5)}


def source(folder, name, voxels=None, labels=None, affine=None, label_affine=None):
    image = save_volume(folder / f"{name}.nii.gz", ramp() if voxels is None else voxels, affine)
    if labels is None:
        return Source(name, name, image)
    label = save_volume(folder / "labels" / f"{name}.nii.gz", labels, label_affine)
    return Source(name, name, image, label)


def labelled(folder, name, **keywords):
    return source(folder, name, labels=np.uint8([0, 2, 5])[ramp() % 3], **keywords)


def published(root):
    return [path for path in root.iterdir() if not path.name.endswith(".lock")]


# Content


def test_slices_hold_the_volume_and_its_classes(tmp_path):
    voxels, affine = as_stored(ramp(), np.diag([2.0, 3, 8, 1]), "LPS")
    labels = np.uint8([0, 2, 5])[voxels % 3]
    item = source(tmp_path, "a", voxels, labels, affine, affine)
    cache = build_cache([item], MR, tmp_path / "cache", **LABELS)
    volume = cache.volumes[0]
    assert (volume.case, volume.patient, volume.path) == ("a", "a", str(item.image))
    assert volume.shape == (6, 5, 4)
    assert volume.spacing == (8.0, 3.0, 2.0)
    assert cache.axis == 2
    assert len(cache) == 6
    assert cache.images(0).dtype == np.uint16
    stack = to_stack(read_volume(item.image).voxels, 2)
    low, high = np.percentile(ramp(), (0.5, 99.5))
    expected = (stack.clip(low, high) - low) / (high - low) * 65535
    np.testing.assert_allclose(cache.images(0), expected, atol=1)
    np.testing.assert_array_equal(
        np.array(cache.values)[cache.labels(0)],
        to_stack(read_volume(item.label, label=True).voxels, 2),
    )


def test_window_of_ct_becomes_the_full_scale(tmp_path):
    voxels = np.array([-1000, -175, 37.5, 250, 3000], np.float32).reshape(5, 1, 1)
    cache = build_cache([source(tmp_path, "a", voxels)], CacheSettings("ct"), tmp_path / "cache")
    assert cache.images(0).ravel()[::-1].tolist() == [0, 0, 32768, 65535, 65535]


def test_index_counts_slices_of_all_volumes(tmp_path):
    sources = [source(tmp_path, name, ramp((4, 4, n))) for name, n in (("a", 2), ("b", 3))]
    cache = build_cache(sources, MR, tmp_path / "cache")
    volumes, positions = cache.locate(np.arange(5))
    assert volumes.tolist() == [0, 0, 1, 1, 1]
    assert positions.tolist() == [0, 1, 0, 1, 2]
    assert len(cache) == 5
    assert cache.indices_of(["b"]).tolist() == [2, 3, 4]
    assert cache.indices_of(["b"]).dtype == np.int64
    assert cache.indices_of([]).tolist() == []


def test_cache_without_labels_has_none(tmp_path):
    cache = build_cache([source(tmp_path, "a")], MR, tmp_path / "cache")
    assert cache.classes == ()
    with pytest.raises(ValueError, match="was built without labels"):
        cache.labels(0)


def test_channel_of_4d_files_is_taken(tmp_path):
    item = source(tmp_path, "a", np.stack([ramp(), ramp()[::-1]], -1))
    first, second = (
        build_cache([item], CacheSettings("mr", channel=c), tmp_path / "cache") for c in (0, 1)
    )
    np.testing.assert_array_equal(first.images(0), second.images(0)[:, :, ::-1])


# What the set decides


@pytest.mark.parametrize(
    ("spacing", "axis"), [((1, 1, 5), 2), ((4, 1, 1), 0), ((1, 3, 1), 1), ((1, 1.05, 1), 2)]
)
def test_slices_are_cut_along_the_coarsest_axis_if_there_is_one(tmp_path, spacing, axis):
    item = source(tmp_path, "a", affine=np.diag([*spacing, 1]))
    assert build_cache([item], MR, tmp_path / "cache").axis == axis


def test_axis_of_the_median_holds_for_the_whole_set(tmp_path):
    spacings = {"a": (1, 1, 5), "b": (6, 1, 1), "c": (1, 1, 4)}
    sources = [source(tmp_path, n, affine=np.diag([*s, 1])) for n, s in spacings.items()]
    assert build_cache(sources, MR, tmp_path / "cache").axis == 2


def test_slice_axis_can_be_set(tmp_path):
    cache = build_cache([source(tmp_path, "a")], CacheSettings("mr", 0), tmp_path / "cache")
    assert cache.axis == 0
    assert cache.volumes[0].shape == (4, 6, 5)


@pytest.mark.parametrize(("low", "modality"), [(-1000, "ct"), (0, "mr"), (-50, "mr")])
def test_modality_is_judged_by_the_values_and_printed(tmp_path, capsys, low, modality):
    voxels = np.linspace(low, 900, 120).reshape(4, 5, 6).astype(np.float32)
    cache = build_cache([source(tmp_path, "a", voxels)], CacheSettings(), tmp_path / "cache")
    assert cache.modality == modality
    scale = {"ct": "CT window -175 to 250 HU", "mr": "MR percentiles"}[modality]
    assert f"1 volumes, 6 axial slices, {scale}" in capsys.readouterr().out


def test_mixed_modalities_are_an_error_that_names_the_minority(tmp_path):
    sources = [source(tmp_path, name, ramp() * 10 - 1000) for name in "ab"]
    sources.append(source(tmp_path, "odd"))
    message = r"got 2 volumes that look like CT and 1 like MR .*: odd; say --modality ct or mr"
    with pytest.raises(UserError, match=message):
        build_cache(sources, CacheSettings(), tmp_path / "cache")
    assert published(tmp_path / "cache") == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modality": "pet"}, "--modality: expected auto, ct or mr, got pet"),
        ({"slice_axis": 3}, "--slice-axis: expected 0, 1 or 2, got 3"),
        ({"window": (250.0, -175.0)}, "two rising numbers of HU, got 250 to -175"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        CacheSettings(**settings)


# Bad files


def bad_set(folder):
    """One good case, and one for each thing that can be wrong."""
    cases = {name: labelled(folder, name) for name in ("good", "cut", "void", "gone", "text")}
    cases["cut"].image.write_bytes(cases["cut"].image.read_bytes()[:-30])
    save_volume(cases["void"].image, np.full((4, 5, 6), 3, np.int16))
    cases["gone"].label.unlink()
    cases["text"].image.write_text("not a volume")
    voxels = ramp(kind=np.float32)
    voxels[0] = np.nan
    cases["nan"] = labelled(folder, "nan", voxels=voxels)
    cases["shape"] = source(folder, "shape", labels=ramp((4, 5, 7), np.uint8) % 1)
    cases["affine"] = labelled(folder, "affine", label_affine=np.diag([1.0, 1, 2.5, 1]))
    cases["values"] = source(folder, "values", labels=ramp(kind=np.uint8))
    cases["both"] = labelled(folder, "both")
    for path in (cases["both"].image, cases["both"].label):
        path.write_bytes(b"")
    return list(cases.values())


def test_all_bad_files_are_reported_together_with_their_reasons(tmp_path):
    with pytest.raises(UserError) as caught:
        build_cache(bad_set(tmp_path), MR, tmp_path / "cache", **LABELS)
    first, *lines = str(caught.value).split("\n")
    assert first.startswith("10 bad files among 10 volumes (mend them, or add --skip-bad")
    expected = [
        r"/cut\.nii\.gz: truncated: the gzip stream breaks off before its end",
        r"/void\.nii\.gz: expected an image, got a constant volume \(all voxels 3\)",
        r"/gone\.nii\.gz: expected its label at .*labels/gone\.nii\.gz, got no such file",
        r"/text\.nii\.gz: expected a gzip stream, got a file that starts b'not a vo'",
        r"/nan\.nii\.gz: expected finite voxels, got 30 NaN or infinite ones",
        r"/labels/shape\.nii\.gz: expected the grid of its image, shape \(4, 5, 6\) and affine .*"
        r"got shape \(4, 5, 7\) and affine .*",
        r"/labels/affine\.nii\.gz: expected the grid of its image, .* up to 2\.5 mm apart",
        r"/labels/values\.nii\.gz: expected label values \[0, 2, 5\], got also 1, 3, 4, 6, .*",
        r"/both\.nii\.gz: expected a NIfTI file, got an empty file",
        r"/labels/both\.nii\.gz: expected a NIfTI file, got an empty file",
    ]
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern + "$", line), line
    assert [path.suffix for path in published(tmp_path / "cache")] == [".partial"]


def test_skip_bad_goes_on_without_them_and_lists_them(tmp_path, capsys):
    sources = bad_set(tmp_path)
    for _ in range(2):  # built, then found
        cache = build_cache(sources, MR, tmp_path / "cache", **LABELS, skip_bad=True)
        assert [volume.case for volume in cache.volumes] == ["good"]
        assert len(cache.bad) == 10
        assert cache.bad[0] == BadFile(
            str(tmp_path / "cut.nii.gz"), "truncated: the gzip stream breaks off before its end"
        )
        np.testing.assert_array_equal(np.unique(cache.labels(0)), [0, 1, 2])
    assert "10 bad files left out" in capsys.readouterr().out


def test_cache_of_skip_bad_does_not_hide_bad_files_from_a_strict_run(tmp_path):
    sources = bad_set(tmp_path)
    build_cache(sources, MR, tmp_path / "cache", **LABELS, skip_bad=True)
    with pytest.raises(UserError, match="10 bad files among 10 volumes"):
        build_cache(sources, MR, tmp_path / "cache", **LABELS)


def test_nothing_left_is_an_error_even_with_skip_bad(tmp_path):
    item = source(tmp_path, "a", np.ones((3, 3, 3), np.int16))
    with pytest.raises(UserError, match=r"1 bad file among 1 volumes \(none is left\)"):
        build_cache([item], MR, tmp_path / "cache", skip_bad=True)
    with pytest.raises(UserError, match="expected at least one volume, got none"):
        build_cache([], MR, tmp_path / "cache")


def test_volume_outside_the_window_is_bad(tmp_path):
    item = source(tmp_path, "a", ramp() + 1000)
    message = "expected voxels within the window of -175 to 250 HU, got 1000 to 1119"
    with pytest.raises(UserError, match=message):
        build_cache([item], CacheSettings("ct"), tmp_path / "cache")


def test_label_in_another_orientation_of_the_same_grid_is_good(tmp_path):
    voxels, affine = as_stored(ramp(), OBLIQUE, "LPS")
    labels, label_affine = as_stored(np.uint8([0, 2, 5])[ramp() % 3], OBLIQUE, "SAR")
    item = source(tmp_path, "a", voxels, labels, affine, label_affine)
    cache = build_cache([item], MR, tmp_path / "cache", **LABELS)
    expected = to_stack(read_volume(item.image).voxels % 3, cache.axis)
    np.testing.assert_array_equal(cache.labels(0), expected)


def test_rounding_of_the_affine_is_no_mismatch(tmp_path):
    affine = np.diag([1.0, 1, 2, 1])
    affine[:3, 3] = 1e-4
    build_cache([labelled(tmp_path, "a", label_affine=affine)], MR, tmp_path / "cache", **LABELS)


def test_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(build_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"the slice cache needs .* GiB of disk, 0\.0 GiB are free"):
        build_cache([source(tmp_path, "a")], MR, tmp_path / "cache")


def test_root_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the slice cache cannot be written"):
        build_cache([source(tmp_path, "a")], MR, tmp_path / "file")


# Once


def test_second_start_opens_without_reading_volumes(tmp_path, monkeypatch, capsys):
    sources = [labelled(tmp_path, name) for name in "ab"]
    first = build_cache(sources, MR, tmp_path / "cache", **LABELS)
    monkeypatch.setattr(build_module, "read_volume", None)
    second = build_cache(sources, MR, tmp_path / "cache", **LABELS)
    assert second.directory == first.directory
    assert second.volumes == first.volumes
    assert second.settings == first.settings
    assert "(found)" in capsys.readouterr().out


def test_changes_of_content_settings_and_names_make_another_cache(tmp_path):
    item = labelled(tmp_path, "a")
    root = tmp_path / "cache"
    directories = [build_cache([item], MR, root, **LABELS).directory]
    other = CacheSettings("ct", window=(0.0, 100.0))
    directories.append(build_cache([item], other, root, **LABELS).directory)
    directories.append(build_cache([item], MR, root).directory)
    renamed = Source("b", "patient", item.image, item.label)
    directories.append(build_cache([renamed], MR, root, **LABELS).directory)
    changed = ramp()
    changed[2, 2, 2] += 1
    save_volume(item.image, changed)
    directories.append(build_cache([item], MR, root, **LABELS).directory)
    save_volume(item.label, np.uint8([0, 5, 2])[ramp() % 3])
    directories.append(build_cache([item], MR, root, **LABELS).directory)
    assert len(set(directories)) == len(directories)


def test_change_in_the_middle_of_a_large_uncompressed_file_is_noticed(tmp_path):
    path = save_volume(tmp_path / "a.nii", ramp((64, 64, 40)))
    items = [Source("a", "a", path)]
    first = build_cache(items, MR, tmp_path / "cache").directory
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert build_cache(items, MR, tmp_path / "cache").directory != first


def test_damaged_cache_is_built_again(tmp_path, capsys):
    item = source(tmp_path, "a")
    cache = build_cache([item], MR, tmp_path / "cache")
    images = cache.directory / "images-00000.u16"
    images.write_bytes(images.read_bytes()[:-4])
    again = build_cache([item], MR, tmp_path / "cache")
    assert again.images(0).shape == (6, 5, 4)
    assert "is damaged, it is built again" in capsys.readouterr().out


def test_files_are_plain_json_a_table_and_shards(tmp_path):
    cache = build_cache([labelled(tmp_path, "a")], MR, tmp_path / "cache", **LABELS)
    index = json.loads((cache.directory / "index.json").read_text())
    assert index["shards"] == [4 * 5 * 6]
    assert len(np.load(cache.directory / "volumes.npy")) == 1
    names = ["images-00000.u16", "index.json", "labels-00000.u8", "volumes.npy"]
    assert sorted(path.name for path in cache.directory.iterdir()) == names


def test_interrupted_build_leaves_no_cache_but_where_to_go_on(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_entry", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_cache([source(tmp_path, "a")], MR, tmp_path / "cache")
    (partial,) = published(tmp_path / "cache")
    assert partial.name.endswith(".partial")


BUILD = """
import sys, time
from pathlib import Path
from medmoco.data import build, cache
folder, pause = Path(sys.argv[1]), float(sys.argv[2])
convert = build._convert_image
def slowly(*arguments):
    (folder / "started").touch()
    time.sleep(pause)
    return convert(*arguments)
build._convert_image = slowly
sources = [cache.Source("a", "a", folder / "a.nii.gz")]
cache.build_cache(sources, cache.CacheSettings(modality="mr"), folder / "cache")
"""


def start_build(folder, pause):
    command = [sys.executable, "-c", BUILD, str(folder), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_two_processes_build_once(tmp_path):
    source(tmp_path, "a")
    processes = [start_build(tmp_path, 0.5) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("(built)" in text for text in printed) == [False, True]
    assert len(published(tmp_path / "cache")) == 1


def test_killed_build_leaves_nothing_that_a_later_run_would_take(tmp_path):
    item = source(tmp_path, "a")
    process = start_build(tmp_path, 60)
    wait_for(tmp_path / "started")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    (partial,) = published(tmp_path / "cache")
    assert partial.name.endswith(".partial")
    cache = build_cache([item], MR, tmp_path / "cache")
    assert published(tmp_path / "cache") == [cache.directory]


# Sources


def test_volumes_of_a_folder_are_named_by_their_files(tmp_path):
    for name in ("x/a.nii.gz", "y/b.nii.gz"):
        save_volume(tmp_path / name, ramp())
    assert [item.case for item in folder_sources(tmp_path)] == ["a", "b"]
    save_volume(tmp_path / "z" / "a.nii.gz", ramp())
    assert [item.case for item in folder_sources(tmp_path)] == ["x/a", "b", "z/a"]


def test_channels_of_one_case_are_one_patient(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000"):
        save_volume(tmp_path / "imagesTr" / f"{name}.nii.gz", ramp())
    assert [item.patient for item in folder_sources(tmp_path / "imagesTr")] == ["a", "a", "b"]


def test_channels_are_known_by_the_folder_they_lie_in(tmp_path):
    for name in ("imagesTr/a_0000", "imagesTr/a_0001", "imagesTs/b_0000", "other/c_0000"):
        save_volume(tmp_path / f"{name}.nii.gz", ramp())
    assert [item.patient for item in folder_sources(tmp_path)] == ["a", "a", "b", "c_0000"]


@pytest.mark.parametrize("excluded", [{"a"}, {"a_0000", "a_0001"}])
@pytest.mark.parametrize("folders", [("imagesTr",), ("imagesTr", "copy/imagesTr")])
def test_an_excluded_case_is_left_out_with_its_channels_wherever_it_lies(
    tmp_path, folders, excluded
):
    for folder in folders:
        for name in ("a_0000", "a_0001", "b_0000"):
            save_volume(tmp_path / folder / f"{name}.nii.gz", ramp())
    left = folder_sources(tmp_path, exclude=excluded)
    assert [item.image.name for item in left] == ["b_0000.nii.gz"] * len(folders)


def test_excluded_cases_are_left_out(tmp_path):
    for name in "abc":
        save_volume(tmp_path / f"{name}.nii.gz", ramp())
    (tmp_path / "exclude.txt").write_text("b.nii.gz\n\n c\n")
    excluded = read_case_list(tmp_path / "exclude.txt")
    assert [item.case for item in folder_sources(tmp_path, exclude=excluded)] == ["a"]
    with pytest.raises(UserError, match="expected volumes besides those of --exclude, got none"):
        folder_sources(tmp_path, exclude="abc")
    with pytest.raises(UserError, match="expected a text file of case names"):
        read_case_list(tmp_path / "missing.txt")


@pytest.mark.data
def test_real_volumes_are_cached_as_nibabel_reads_them(hippocampus, tmp_path):
    task = read_task(hippocampus)
    cache = build_cache(
        task_sources(task)[:12],
        CacheSettings(modality=task.modality),
        tmp_path,
        classes=task.classes,
        values=task.values,
    )
    assert len(cache) == sum(volume.shape[0] for volume in cache.volumes)
    for number, case in enumerate(task.cases[:12]):
        labels = nib.as_closest_canonical(nib.load(case.label)).get_fdata()
        np.testing.assert_array_equal(cache.labels(number), to_stack(labels, cache.axis))
        image = nib.as_closest_canonical(nib.load(case.image)).get_fdata()
        agreement = np.corrcoef(to_stack(image, cache.axis).ravel(), cache.images(number).ravel())
        assert agreement[0, 1] > 0.95  # the percentiles clip
