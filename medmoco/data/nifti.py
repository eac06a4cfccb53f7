"""Checked reading of one NIfTI file: its header is never believed before the file bears it out."""

import errno
import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import io_orientation
from nibabel.spatialimages import HeaderDataError

from medmoco.data.memory import available_memory
from medmoco.errors import Fault, UserError
from medmoco.regular_file import open_regular

# Deflate packs at most 1032 bytes into one (zlib technical notes, "maximum compression factor").
MAX_GZIP_RATIO = 1032
MAX_TRAILING_BYTES = 64 << 20  # padding that some writers leave; more than that is no padding
CHUNK_BYTES = 1 << 20
IDENTITY = ("st_dev", "st_ino", "st_size", "st_mtime_ns")  # of a file that nobody has touched
# The float64 values of a label map and a temporary; an image takes half of it.
WORKING_BYTES_PER_VOXEL = 16
# Millimetres in the header's units, by the lowest three bits of xyzt_units; 0 stands for none.
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
UNIT_BITS = 7
MIN_SPACING, MAX_SPACING = 1e-5, 5000.0  # mm: from below microscopy to beyond any scanner


# What an OSError tells of the file itself. Others are of the disk, the network or the process.
OF_THE_FILE = (
    *(errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV),
)


class VolumeError(UserError):
    """One file that cannot be used. `reason` is the message without the path."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class ReadFault(VolumeError, Fault):
    """One file that cannot be read now, which says nothing of the file: too little memory, too many
    open files, an error of the disk or of the network.
    """


@dataclass(frozen=True)
class Layout:
    """Where the voxels of a file lie, as its header promises."""

    header: Nifti1Header
    shape: tuple[int, int, int]  # (x, y, z) as stored
    channels: int  # volumes one after another: the product of the axes behind the third
    affine: np.ndarray  # (4, 4), voxel index to millimetres in RAS+, whatever the header's unit
    offset: int  # bytes before the first voxel

    @property
    def dtype(self) -> np.dtype:
        return self.header.get_data_dtype()

    @property
    def channel_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def read_layout(path: Path) -> Layout:
    """Reads and checks the header alone, a few hundred bytes.

    Raises:
        VolumeError: not readable, not NIfTI, or a header that makes no sense.
    """
    with _opened(path) as stream:
        return _parse_header(path, stream)


def read_channel(
    path: Path, channel: int, kind: type[np.generic] | None = None
) -> tuple[np.ndarray, Layout]:
    """Reads one volume of a file, and the stream to its end, so that the CRC is checked.

    Args:
        kind: type to convert to while reading, so that the voxels are in memory once; None for the
            file's own.

    Returns:
        (x, y, z) as stored, without the header's scaling; and the layout.

    Raises:
        VolumeError: what `read_layout` raises, a truncated or damaged stream, a header that
            promises more than the file or the memory holds, or no such channel.
        ReadFault: of these, what need not be so another time.
    """
    with _opened(path) as stream:
        layout = _parse_header(path, stream)
        if not 0 <= channel < layout.channels:
            raise VolumeError(
                path, f"expected a channel below {layout.channels}, got --channel {channel}"
            )
        _check_promise(path, layout)
        voxels = np.empty(prod(layout.shape), kind or layout.dtype)
        stream.seek(layout.offset + channel * layout.channel_bytes)
        got = _fill(stream, voxels, layout.dtype)
        behind = (layout.channels - 1 - channel) * layout.channel_bytes
        if got == layout.channel_bytes:
            got += _drain(stream, behind + MAX_TRAILING_BYTES)
    promised = layout.channel_bytes + behind
    if got < promised:
        whole = layout.offset + layout.channels * layout.channel_bytes
        raise VolumeError(
            path, f"truncated: the header promises {whole:,} bytes, {promised - got:,} are missing"
        )
    if got > promised + MAX_TRAILING_BYTES:
        raise VolumeError(
            path, f"expected {promised:,} bytes of voxels as the header promises, got far more"
        )
    return voxels.reshape(layout.shape, order="F"), layout


def read_error(path: Path, error: OSError) -> VolumeError:
    """What to raise for a file that the system refuses: a ReadFault unless it tells of the file."""
    if isinstance(error, FileNotFoundError):
        return VolumeError(path, "expected a NIfTI file, got no such file")
    kind = VolumeError if error.errno in OF_THE_FILE else ReadFault
    return kind(path, f"cannot be read: {error.strerror or error}")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The decompressed stream; whatever goes wrong while it is read becomes a VolumeError."""
    try:
        with open_regular(path) as file:
            before = os.fstat(file.fileno())
            if path.name.endswith(".gz"):
                _require_gzip(path, file)
                with gzip.GzipFile(fileobj=file, mode="rb") as stream:
                    yield stream  # type: ignore[misc]
            else:
                yield file
            after = os.stat(path)  # by its name: a file that took its place is another one
            if any(getattr(before, name) != getattr(after, name) for name in IDENTITY):
                raise VolumeError(path, "changed while it was read")
    except EOFError:
        raise VolumeError(path, "truncated: the gzip stream breaks off before its end") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise VolumeError(path, f"damaged gzip stream: {error}") from None
    except MemoryError:
        raise ReadFault(path, "cannot be read: its voxels need more memory than there is") from None
    except OSError as error:
        raise read_error(path, error) from None


def _require_gzip(path: Path, file: BinaryIO) -> None:
    start = file.read(132)
    file.seek(0)
    if not start:
        raise VolumeError(path, "expected a NIfTI file, got an empty file")
    if is_dicom(start):
        raise VolumeError(path, "expected a NIfTI file, got DICOM; convert it with dcm2niix")
    if start[:2] != b"\x1f\x8b":
        raise VolumeError(path, f"expected a gzip stream, got a file that starts {start[:8]!r}")


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts with these 132 bytes is DICOM part 10."""
    return start[128:132] == b"DICM"


def _parse_header(path: Path, stream: BinaryIO) -> Layout:
    start = stream.read(Nifti2Header.sizeof_hdr)
    if is_dicom(start):
        raise VolumeError(path, "expected a NIfTI file, got DICOM; convert it with dcm2niix")
    kind = {348: Nifti1Header, 540: Nifti2Header}.get(_header_size(start))
    if kind is None or len(start) < kind.sizeof_hdr:
        raise VolumeError(path, f"expected a NIfTI header, got a file that starts {start[:8]!r}")
    try:
        # From the bytes, not from the stream: nibabel would read extensions of any claimed length.
        with np.errstate(all="ignore"):  # numbers out of range are refused below
            header = kind(start[: kind.sizeof_hdr])
            affine = np.asarray(header.get_best_affine(), np.float64)
            header.get_slope_inter()
    except (HeaderDataError, ValueError, OverflowError) as error:
        raise VolumeError(path, f"expected a valid NIfTI header, got: {error}") from None
    if header["magic"].item()[:3] not in (b"n+1", b"n+2"):
        raise VolumeError(path, "expected header and voxels in one file, got the header of a pair")
    shape, channels = _shape(path, header)
    affine = _in_millimetres(path, header, _checked_affine(path, affine))
    return Layout(header, shape, channels, affine, _offset(path, header))


def _header_size(start: bytes) -> int:
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    return next(iter(sizes & {348, 540}), 0)


def _shape(path: Path, header: Nifti1Header) -> tuple[tuple[int, int, int], int]:
    axes = int(header["dim"][0])
    sizes = [int(size) for size in header["dim"][1 : axes + 1]]
    if not 2 <= axes <= 7 or min(sizes) < 1:
        raise VolumeError(path, f"expected 2 to 7 axes of at least 1 voxel, got {axes}: {sizes}")
    kind = header.get_data_dtype()
    if kind.fields or kind.kind not in "iuf":
        raise VolumeError(path, f"expected one real number a voxel, got type {kind}")
    x, y, z = [*sizes, 1][:3]
    return (x, y, z), prod(sizes[3:])


def _checked_affine(path: Path, affine: np.ndarray) -> np.ndarray:
    whole = np.isfinite(affine).all() and np.linalg.matrix_rank(affine[:3, :3]) == 3
    # Axes of wildly different lengths can be of full rank and yet have no orientation.
    if not whole or np.isnan(io_orientation(affine)).any():
        raise VolumeError(path, f"expected an invertible affine, got {affine[:3].tolist()}")
    return affine


def _in_millimetres(path: Path, header: Nifti1Header, affine: np.ndarray) -> np.ndarray:
    unit = int(header["xyzt_units"]) & UNIT_BITS
    if unit not in MILLIMETRES:
        raise VolumeError(path, f"expected lengths in m, mm or microns, got xyzt_units {unit}")
    affine = np.diag([MILLIMETRES[unit]] * 3 + [1.0]) @ affine
    sizes = voxel_sizes(affine)
    if not ((sizes >= MIN_SPACING) & (sizes <= MAX_SPACING)).all():
        got = " x ".join(f"{size:g}" for size in sizes)
        raise VolumeError(
            path, f"expected voxels of {MIN_SPACING:g} to {MAX_SPACING:g} mm a side, got {got} mm"
        )
    return affine


def _offset(path: Path, header: Nifti1Header) -> int:
    offset = float(header["vox_offset"])
    if not np.isfinite(offset) or not 0 <= offset < 2**40:
        raise VolumeError(path, f"expected vox_offset within the file, got {offset}")
    return max(int(offset), header.single_vox_offset)


def _check_promise(path: Path, layout: Layout) -> None:
    """Compares the header with file and memory before a byte is allocated on its word."""
    promised = layout.offset + layout.channels * layout.channel_bytes
    held = path.stat().st_size * (MAX_GZIP_RATIO if path.name.endswith(".gz") else 1)
    size = " x ".join(map(str, [*layout.shape, layout.channels]))
    if promised > held:
        raise VolumeError(
            path,
            f"truncated: the header promises {size} voxels ({promised:,} bytes), "
            f"the file of {path.stat().st_size:,} bytes cannot hold them",
        )
    needed = layout.channel_bytes + WORKING_BYTES_PER_VOXEL * prod(layout.shape)
    available = available_memory()
    if needed > available:
        raise ReadFault(
            path,
            f"the header promises {size} voxels, which need {needed / 2**30:.1f} GiB of memory; "
            f"{available / 2**30:.1f} GiB are available",
        )


def _fill(stream: BinaryIO, voxels: np.ndarray, stored: np.dtype) -> int:
    """Reads voxels of type `stored` until all are there or the stream ends; the bytes read."""
    step = CHUNK_BYTES // stored.itemsize
    filled = 0
    for start in range(0, len(voxels), step):
        part = voxels[start : start + step]
        buffer = part if part.dtype == stored else np.empty(len(part), stored)
        got = _fill_bytes(stream, buffer.data.cast("B"))
        filled += got
        if got < buffer.nbytes:
            break
        if buffer is not part:
            with np.errstate(over="ignore", invalid="ignore"):  # found as infinite later on
                part[:] = buffer
    return filled


def _fill_bytes(stream: BinaryIO, buffer: memoryview) -> int:
    filled = 0
    while filled < len(buffer):
        count = stream.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not count:
            break
        filled += count
    return filled


def _drain(stream: BinaryIO, limit: int) -> int:
    """Reads to the end of the stream, or a little past `limit`; returns the bytes read."""
    drained = 0
    while drained <= limit and (chunk := stream.read(CHUNK_BYTES)):
        drained += len(chunk)
    return drained
