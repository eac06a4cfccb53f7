import gzip
import os
import struct

import nibabel as nib
import numpy as np
import pytest
from volume_files import OBLIQUE, as_stored, ramp, save_volume

from medmoco.data import nifti
from medmoco.data.cache import CacheSettings, Source, build_cache
from medmoco.data.volumes import (
    find_volumes,
    from_stack,
    read_grid,
    read_volume,
    to_stack,
    write_label_map,
)
from medmoco.errors import UserError

ORIENTATIONS = ["RAS", "LAS", "RPI", "LPS", "SAR", "PIR"]
AFFINES = [np.diag([2.0, 3, 4, 1]), OBLIQUE]


def patched(path, offset: int, content: bytes):
    """Overwrites bytes of a gzipped file's content."""
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[offset : offset + len(content)] = content
    path.write_bytes(gzip.compress(bytes(raw)))
    return path


@pytest.fixture
def volume(tmp_path):
    return save_volume(tmp_path / "a.nii.gz", ramp())


# Reading


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("affine", AFFINES, ids=["straight", "oblique"])
def test_volume_is_read_as_nibabel_brings_it_to_canonical_order(tmp_path, codes, affine):
    stored, stored_affine = as_stored(ramp(), affine, codes)
    path = save_volume(tmp_path / "a.nii.gz", stored, stored_affine)
    expected = nib.as_closest_canonical(nib.load(path))
    got = read_volume(path)
    np.testing.assert_array_equal(got.voxels, expected.get_fdata())
    np.testing.assert_allclose(got.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(got.spacing, expected.header.get_zooms(), rtol=1e-5)
    grid = read_grid(path)
    assert grid.shape == got.voxels.shape
    np.testing.assert_array_equal(grid.affine, got.affine)


def test_header_scaling_is_applied(tmp_path):
    image = nib.Nifti1Image(ramp().astype(float), np.eye(4))
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(2.0, -1000.0)
    nib.save(image, tmp_path / "a.nii.gz")
    expected = nib.load(tmp_path / "a.nii.gz").get_fdata()
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").voxels, expected, atol=1e-3)


@pytest.mark.parametrize("kind", [">i2", "<f8", "u1"])
def test_voxel_types_and_byte_orders_are_read(tmp_path, kind):
    header = nib.Nifti1Header(endianness=kind[0] if kind[0] in "<>" else "<")
    header.set_data_dtype(np.dtype(kind))
    image = nib.Nifti1Image(ramp(kind=np.dtype(kind).type), np.eye(4), header)
    nib.save(image, tmp_path / "a.nii")
    voxels = read_volume(tmp_path / "a.nii").voxels
    np.testing.assert_array_equal(voxels, ramp())
    assert voxels.dtype == np.float32


def test_nifti_2_is_read(tmp_path):
    nib.save(nib.Nifti2Image(ramp(), np.eye(4)), tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels, ramp())


def test_channel_of_a_4d_file_is_chosen(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", ramp((2, 3, 4, 3)))
    for channel in range(3):
        expected = ramp((2, 3, 4, 3))[..., channel]
        np.testing.assert_array_equal(read_volume(path, channel).voxels, expected)
    with pytest.raises(UserError, match="expected a channel below 3, got --channel 3"):
        read_volume(path, 3)


def test_label_of_floating_point_becomes_integer(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", ramp(kind=np.float32))
    labels = read_volume(path, label=True).voxels
    assert labels.dtype.kind == "i"
    np.testing.assert_array_equal(labels, ramp())


@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (1, 3), (2, 0), (2, -1)])
def test_header_scaling_of_a_label_is_applied(tmp_path, slope, intercept):
    image = nib.Nifti1Image(ramp(kind=np.uint8), np.eye(4))
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope, intercept], "<f4").tobytes()
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    expected = np.asarray(nib.load(path).dataobj)
    assert expected.flat[2] == 2 * slope + intercept
    np.testing.assert_array_equal(read_volume(path, label=True).voxels, expected)


def test_constant_label_is_fine(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", np.zeros((3, 3, 3), np.uint8))
    assert not read_volume(path, label=True).voxels.any()


# Bad files


def test_truncated_gzip_is_named(volume):
    volume.write_bytes(volume.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.nii\.gz: truncated: the gzip stream breaks off"):
        read_volume(volume)


def test_stream_that_ends_before_the_header_says_is_named(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", ramp((10, 10, 10)))
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-50]))
    with pytest.raises(UserError, match="the header promises 2,352 bytes, 50 are missing"):
        read_volume(path)


def test_truncated_uncompressed_file_is_named(tmp_path):
    path = save_volume(tmp_path / "a.nii", ramp())
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=r"promises 4 x 5 x 6 x 1 voxels .* the file of 400 bytes"):
        read_volume(path)


def test_damage_that_only_the_checksum_shows_is_found(volume):
    content = bytearray(volume.read_bytes())
    content[-8] ^= 1  # of the CRC
    volume.write_bytes(content)
    with pytest.raises(UserError, match="damaged gzip stream: CRC check failed"):
        read_volume(volume)


def test_damage_behind_the_wanted_channel_is_found(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", ramp((4, 4, 4, 5)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged gzip stream"):
        read_volume(path, channel=0)


def test_text_in_place_of_gzip_is_named(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"expected a gzip stream, got a file that starts b'<html"):
        read_volume(path)


def test_gzip_of_something_else_is_named(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(b"hello " * 200))
    with pytest.raises(UserError, match="expected a NIfTI header, got a file that starts b'hello"):
        read_volume(path)


def test_empty_file_is_named(tmp_path):
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(UserError, match="expected a NIfTI file, got an empty file"):
        read_volume(tmp_path / "a.nii.gz")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a\.nii: expected a NIfTI file, got no such file"):
        read_volume(tmp_path / "a.nii")


def test_dicom_under_a_nifti_name_is_named(tmp_path):
    for name in ("a.nii", "b.nii.gz"):
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + bytes(600))
        with pytest.raises(UserError, match="got DICOM; convert it with dcm2niix"):
            read_volume(tmp_path / name)


def test_absurd_dimensions_are_refused_before_memory_is_allocated(volume):
    patched(volume, 40, struct.pack("<4h", 3, 32767, 32767, 32767))
    with pytest.raises(UserError, match="promises 32767 x 32767 x 32767 x 1 voxels"):
        read_volume(volume)


def test_more_voxels_than_memory_holds_are_refused(volume, monkeypatch):
    monkeypatch.setattr(nifti, "available_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"which need 0\.0 GiB of memory; 0\.0 GiB are available"):
        read_volume(volume)


def test_bytes_far_behind_the_voxels_are_no_padding(volume, monkeypatch):
    monkeypatch.setattr(nifti, "MAX_TRAILING_BYTES", 1000)
    bomb = gzip.decompress(volume.read_bytes()) + bytes(10_000_000)
    volume.write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match="expected 240 bytes of voxels as the header promises"):
        read_volume(volume)


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (40, struct.pack("<4h", 3, 4, 0, 6), r"at least 1 voxel, got 3: \[4, 0, 6\]"),
        (40, struct.pack("<4h", 3, 4, -5, 6), r"at least 1 voxel, got 3: \[4, -5, 6\]"),
        (70, struct.pack("<2h", 128, 24), "expected one real number a voxel, got type"),
        (70, struct.pack("<2h", 32, 64), "expected one real number a voxel, got type complex64"),
        (70, struct.pack("<2h", 999, 16), "expected a valid NIfTI header, got: data code 999"),
        (108, struct.pack("<f", float("inf")), "expected vox_offset within the file, got inf"),
        (280, struct.pack("<12f", *[0] * 12), "expected an invertible affine"),
        (344, b"ni1\0", "got the header of a pair"),
    ],
)
def test_header_that_makes_no_sense_is_named(volume, offset, content, message):
    with pytest.raises(UserError, match=message):
        read_volume(patched(volume, offset, content))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_counted(tmp_path, value):
    voxels = ramp(kind=np.float32)
    voxels[1, 2, :2] = value
    path = save_volume(tmp_path / "a.nii.gz", voxels)
    with pytest.raises(UserError, match="expected finite voxels, got 2 NaN or infinite ones"):
        read_volume(path)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (10, 1)])
def test_lengths_in_metres_and_microns_become_millimetres(tmp_path, unit, factor):
    path = save_volume(tmp_path / "a.nii", ramp(), np.diag([0.5, 0.5, 2.0, 1.0]))
    with_unit(path, unit)
    np.testing.assert_allclose(read_grid(path).spacing, np.array([0.5, 0.5, 2.0]) * factor)
    np.testing.assert_allclose(read_volume(path).spacing, np.array([0.5, 0.5, 2.0]) * factor)


def test_a_label_map_keeps_the_unit_of_its_image(tmp_path):
    path = save_volume(tmp_path / "a.nii", ramp((4, 5, 6)), np.diag([0.001, 0.001, 0.002, 1.0]))
    with_unit(path, 1)
    labels = np.ones((6, 5, 4), np.uint8)
    write_label_map(tmp_path / "label.nii", labels, path, 2)
    header = nib.load(tmp_path / "label.nii").header
    assert header.get_xyzt_units()[0] == "meter"
    np.testing.assert_allclose(header.get_zooms(), (0.001, 0.001, 0.002))
    np.testing.assert_allclose(read_grid(tmp_path / "label.nii").spacing, (1.0, 1.0, 2.0))


@pytest.mark.parametrize(
    ("unit", "size", "message"),
    [
        (1, 40.0, "expected voxels of 1e-05 to 5000 mm a side, got 40000 x 40000 x 40000 mm"),
        (2, 1e-6, "expected voxels of 1e-05 to 5000 mm a side, got 1e-06 x 1e-06 x 1e-06 mm"),
        (3, 1e-3, "expected voxels of 1e-05"),
        (5, 1.0, "expected lengths in m, mm or microns, got xyzt_units 5"),
    ],
)
def test_absurd_lengths_are_named(tmp_path, unit, size, message):
    path = save_volume(tmp_path / "a.nii", ramp(), np.diag([size, size, size, 1.0]))
    with_unit(path, unit)
    with pytest.raises(UserError, match=rf"a\.nii: {message}"):
        read_grid(path)


def with_unit(path, unit):
    """Sets xyzt_units, byte 123 of a header of NIfTI-1."""
    content = bytearray(path.read_bytes())
    content[123] = unit
    path.write_bytes(content)


def test_constant_volume_is_named(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", np.full((3, 3, 3), -7, np.int16))
    with pytest.raises(UserError, match=r"got a constant volume \(all voxels -7\)"):
        read_volume(path)


def test_label_with_fractions_is_named(tmp_path):
    path = save_volume(tmp_path / "a.nii.gz", ramp(kind=np.float32) / 2)
    with pytest.raises(UserError, match="expected a label map of whole numbers"):
        read_volume(path, label=True)


# Folders


def test_volumes_are_found_in_all_folders_below(tmp_path):
    for name in ("b/x.nii", "a/deep/y.nii.gz", "._a.nii.gz", ".git/z.nii", "notes.txt"):
        save = tmp_path / name
        save.parent.mkdir(parents=True, exist_ok=True)
        save.touch()
    found = [str(path.relative_to(tmp_path)) for path in find_volumes(tmp_path)]
    assert found == ["a/deep/y.nii.gz", "b/x.nii"]


def test_labels_beside_images_are_not_found(tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.nii.gz").touch()
    assert find_volumes(tmp_path) == [tmp_path / "imagesTr" / "a.nii.gz"]
    assert find_volumes(tmp_path / "labelsTr") == [tmp_path / "labelsTr" / "a.nii.gz"]


def test_links_in_circles_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.nii").touch()
    (tmp_path / "a" / "circle").symlink_to(tmp_path)
    assert [path.name for path in find_volumes(tmp_path)] == ["x.nii"]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_pipe_and_a_device_are_no_volumes(tmp_path, suffix):
    """Neither is waited for nor read without end, also not to tell a change or DICOM by it."""
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"device{suffix}").symlink_to("/dev/zero")
    for path in find_volumes(tmp_path):
        with pytest.raises(nifti.VolumeError, match="cannot be read: not a regular file"):
            read_volume(path)
        with pytest.raises(UserError, match="1 bad file among 1 volumes"):
            build_cache([Source("a", "a", path)], CacheSettings(), tmp_path / "cache")
    (tmp_path / "others").mkdir()
    os.mkfifo(tmp_path / "others" / "pipe")
    with pytest.raises(UserError, match="got none in it"):
        find_volumes(tmp_path / "others")


def test_folder_without_volumes_is_named(tmp_path):
    (tmp_path / "readme.txt").touch()
    with pytest.raises(UserError, match=r"expected \.nii or \.nii\.gz volumes, got none in it"):
        find_volumes(tmp_path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: expected a folder of .* got no folder"):
        find_volumes(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["scan.dcm", "IM0001"])
def test_dicom_in_place_of_nifti_is_recognised(tmp_path, name):
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / name).write_bytes(bytes(128) + b"DICM" + bytes(100))
    with pytest.raises(UserError, match=f"got DICOM \\({name}\\); convert it with `dcm2niix"):
        find_volumes(tmp_path)


# Stacks


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stack_and_volume_are_inverse(axis):
    np.testing.assert_array_equal(from_stack(to_stack(ramp(), axis), axis), ramp())


def test_slices_are_in_radiological_display():
    volume = np.zeros((4, 5, 6), np.uint8)
    volume[-1, -1, -1] = 1  # most to the right, anterior and superior
    assert to_stack(volume, 0)[-1, 0, 0] == 1  # sagittal: superior row, anterior column
    assert to_stack(volume, 1)[-1, 0, 0] == 1  # coronal: superior row, right column
    assert to_stack(volume, 2)[-1, 0, 0] == 1  # axial: anterior row, right column
    assert to_stack(volume, 2).shape == (6, 5, 4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("affine", AFFINES, ids=["straight", "oblique"])
def test_written_label_lies_where_its_voxel_was(tmp_path, codes, affine, axis):
    stored, stored_affine = as_stored(ramp(), affine, codes)
    image = save_volume(tmp_path / "image.nii.gz", stored, stored_affine)
    volume = read_volume(image)
    marked = np.array([1, 3, 2])
    labels = np.zeros(volume.voxels.shape, np.uint8)
    labels[tuple(marked)] = 7
    write_label_map(tmp_path / "label.nii.gz", to_stack(labels, axis), image, axis)

    written, original = nib.load(tmp_path / "label.nii.gz"), nib.load(image)
    assert written.shape == original.shape
    np.testing.assert_array_equal(written.affine, original.affine)
    assert written.get_data_dtype() == np.uint8
    (found,) = np.argwhere(np.asarray(written.dataobj) == 7)
    np.testing.assert_allclose(
        nib.affines.apply_affine(written.affine, found),
        nib.affines.apply_affine(volume.affine, marked),
        atol=1e-4,
    )


def test_label_of_a_4d_image_is_3d_and_unscaled(tmp_path):
    image = nib.Nifti1Image(ramp((2, 3, 4, 2)).astype(float), None)
    image.header.set_data_dtype(np.int16)
    image.header.set_slope_inter(2.0, 5.0)
    image.header.set_intent("z score")
    nib.save(image, tmp_path / "image.nii")
    labels = ramp((2, 3, 4), np.uint8)
    write_label_map(tmp_path / "label.nii", to_stack(labels, 2), tmp_path / "image.nii", 2)
    written = nib.load(tmp_path / "label.nii")
    assert written.shape == (2, 3, 4)
    assert written.header.get_intent()[0] == "none"
    np.testing.assert_array_equal(written.affine, nib.load(tmp_path / "image.nii").affine)
    np.testing.assert_array_equal(
        read_volume(tmp_path / "label.nii", label=True).voxels,
        nib.as_closest_canonical(written).get_fdata(),
    )


def test_label_for_an_image_of_another_grid_is_refused(tmp_path, volume):
    with pytest.raises(UserError, match=r"expected a grid of \(4, 5, 7\) voxels, got \(4, 5, 6\)"):
        write_label_map(tmp_path / "l.nii", np.zeros((7, 5, 4), np.uint8), volume, 2)


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("how", ["written to", "replaced", "deleted"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, suffix, how):
    path, other = tmp_path / f"scan.{suffix}", tmp_path / f"other.{suffix}"
    for file in (path, other):
        nib.save(nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)), file)
    fill = nifti._fill

    def changing(*arguments):
        if how == "written to":
            os.utime(path, (0, 0))  # the same bytes, so that nothing else is wrong with them
        elif how == "replaced":
            other.replace(path)
        else:
            path.unlink()
        return fill(*arguments)

    monkeypatch.setattr(nifti, "_fill", changing)
    reason = "got no such file" if how == "deleted" else "changed while it was read"
    with pytest.raises(nifti.VolumeError, match=rf"{path.name}: .*{reason}"):
        read_volume(path)
