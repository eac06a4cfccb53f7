"""NIfTI files and gzip streams that are wrong on purpose."""

import gzip
import zlib
from functools import lru_cache
from random import Random

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header

from fuzz_values import damaged

INTEGERS = (0, 1, -1, 2, 3, 4, 7, 8, 16, 127, 255, 32767, 65535, 2**31 - 1, -(2**31), 2**62)
REALS = (0.0, -0.0, 1.0, -1.0, 352.0, 1e-45, 1e-12, 1e6, 3e38, np.nan, np.inf, -np.inf, 2.0**31)
TYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -1)
DIMENSIONS = (0, 1, 2, 3, 5, 100, 1000, 32767, -1, -32768)
SHAPE = (5, 4, 6)
BOMB_BYTES = 200 << 20


def nifti_file(random: Random) -> tuple[str, bytes]:
    """A file's name and content: a valid one, one with odd header fields, a damaged stream."""
    content = _volume(random)
    kind = random.randrange(10)
    if kind == 0:
        content = damaged(random, content)
    if random.random() < 0.4:
        return "volume.nii", content
    return "volume.nii.gz", _compressed(random, content)


def valid_nifti(label: bool = False) -> bytes:
    """A small image, or the label map that lies on it."""
    voxels = np.arange(np.prod(SHAPE)).reshape(SHAPE, order="F") % (2 if label else 97)
    return _with_header(Nifti1Header(), voxels.astype(np.uint8 if label else np.int16))


def _with_header(header: Nifti1Header, voxels: np.ndarray) -> bytes:
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    header.set_qform(np.diag([1.0, 1.0, 2.5, 1.0]), 1)
    header["xyzt_units"] = 2
    padding = bytes(header.single_vox_offset - header.sizeof_hdr)
    swapped = voxels.astype(header.get_data_dtype())
    return header.binaryblock + padding + swapped.tobytes(order="F")


def _volume(random: Random) -> bytes:
    make = random.choice((Nifti1Header, Nifti1Header, Nifti2Header))
    kind = random.choice((np.int16, np.int16, np.uint8, np.float32, np.float64, np.uint16))
    shape = random.choice((SHAPE, SHAPE, (*SHAPE, 2), SHAPE[:2], (1, 1, 1)))
    voxels = np.random.default_rng(random.randrange(2**32)).integers(0, 90, shape)
    content = bytearray(_with_header(make(endianness=random.choice("<>")), voxels.astype(kind)))
    header = make(bytes(content[: make.sizeof_hdr]))
    names = list(header.keys())
    likely = ["dim", "pixdim", "datatype", "vox_offset", "scl_slope", "scl_inter", "xyzt_units"]
    likely += ["qform_code", "sform_code", "srow_x", "quatern_b", "qoffset_x", "magic", "bitpix"]
    for _ in range(random.choice((0, 1, 1, 2, 4, 8))):
        _set_odd(random, header, random.choice(likely if random.random() < 0.8 else names))
    content[: make.sizeof_hdr] = header.binaryblock
    if random.random() < 0.1:  # NaN and infinity, where voxels are real numbers
        content[-8:] = random.choice((b"\xff", b"\x7f")) * 8
    return bytes(content)


def _set_odd(random: Random, header: Nifti1Header, name: str) -> None:
    field = header[name]
    if field.dtype.kind == "S":
        value: object = random.choice((b"", b"n+1", b"ni1", b"n+2", b"\xff" * 4, b"%s%n<"))
    elif name == "datatype":
        value = random.choice(TYPES)
    elif name == "dim":
        value = random.choice(DIMENSIONS)
    elif field.dtype.kind == "f":
        value = random.choice(REALS)
    else:
        value = random.choice(INTEGERS)
    with np.errstate(all="ignore"):
        odd = np.array(value).astype(field.dtype)
    if field.ndim:
        field = field.copy()
        field[random.randrange(len(field))] = odd
        odd = field
    header[name] = odd


def _compressed(random: Random, content: bytes) -> bytes:
    kind = random.randrange(14)
    if kind == 0:
        return damaged(random, content)  # no gzip at all
    if kind == 1:
        return gzip.compress(content, 1) + _bomb()
    if kind == 2:
        cut = len(content) // 2  # two members, which is valid
        return gzip.compress(content[:cut], 1) + gzip.compress(content[cut:], 1)
    if kind == 3:
        return gzip.compress(gzip.compress(content, 1), 1)
    packed = gzip.compress(content, 1, mtime=0)
    if kind == 4:
        return packed[:-8] + random.randbytes(8)  # CRC and length
    if kind == 5:
        return packed + bytes(random.choice((8, 512, 100_000)))
    return damaged(random, packed) if kind < 10 else packed


@lru_cache(maxsize=1)
def _bomb() -> bytes:
    """Far more zeros than any header here promises."""
    packer = zlib.compressobj(9, wbits=31)
    packed = [packer.compress(bytes(1 << 20)) for _ in range(BOMB_BYTES >> 20)]
    return b"".join([*packed, packer.flush()])
