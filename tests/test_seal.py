"""The checksum of a file: it fits or it does not, and it disturbs no other reader."""

import io
import zipfile

import pytest
import torch

from medmoco.output import save_torch
from medmoco.seal import COMMENT_LENGTH, SealBroken, check_seal, seal

CONTENT = {"weight": torch.arange(300.0), "step": 7}


@pytest.fixture
def sealed(tmp_path):
    save_torch(tmp_path / "state.pt", CONTENT)
    return tmp_path / "state.pt"


def check(content: bytes) -> bool:
    return check_seal(io.BytesIO(content))


def test_a_sealed_file_is_whole_and_still_an_archive_of_torch(sealed):
    assert check(sealed.read_bytes())
    assert zipfile.ZipFile(sealed).testzip() is None
    for mapped in (False, True):
        loaded = torch.load(sealed, weights_only=True, mmap=mapped)
        torch.testing.assert_close(loaded["weight"], CONTENT["weight"], rtol=0, atol=0)


def test_a_file_of_others_has_no_seal():
    file = io.BytesIO()
    torch.save(CONTENT, file)
    assert not check_seal(file)
    assert file.tell() == 0
    assert not check(b"") and not check(b"short")


def test_any_bit_that_changes_is_noticed(sealed):
    """Every eighth byte, a bit that differs from byte to byte; those of the tag unmake the seal."""
    content = sealed.read_bytes()
    tag = range(len(content) - COMMENT_LENGTH, len(content) - 64)
    for place in {*range(0, len(content), 8), len(content) - 1} - {*tag}:
        flipped = bytearray(content)
        flipped[place] ^= 1 << (place // 8 % 8)
        with pytest.raises(SealBroken, match="checksum differs"):
            check(bytes(flipped))


def test_what_is_no_archive_cannot_be_sealed():
    with pytest.raises(ValueError, match="expected a ZIP archive without comment"):
        seal(bytearray(b"x" * 100))
