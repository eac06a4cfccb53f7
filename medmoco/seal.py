"""A checksum inside a file of torch.save, so that a single changed bit is noticed.

torch.save writes a ZIP archive, and a ZIP archive may end with a comment that its readers skip: the
checksum stands there, and every program that loads such files still loads a sealed one.
"""

import hashlib
from typing import BinaryIO

TAG = b"medmoco:blake2b:"
DIGEST_LENGTH = 64  # hexadecimal digits
COMMENT_LENGTH = len(TAG) + DIGEST_LENGTH
# The record that ends an archive, up to the length of its comment, which is 0 in torch's files.
END_LENGTH = 22
END_SIGNATURE = b"PK\x05\x06"
CHUNK = 1 << 20


class SealBroken(Exception):
    """The content is not what was sealed."""


def seal(archive: bytearray) -> None:
    """Appends the checksum of an archive without comment to it, in place.

    Raises:
        ValueError: this is no archive as torch.save writes it.
    """
    end = archive[-END_LENGTH:]
    if not (end.startswith(END_SIGNATURE) and end.endswith(b"\0\0")):
        raise ValueError("expected a ZIP archive without comment")
    archive[-2:] = COMMENT_LENGTH.to_bytes(2, "little")
    archive += TAG
    archive += _digest(hashlib.blake2b(archive, digest_size=DIGEST_LENGTH // 2))


def check_seal(file: BinaryIO) -> bool:
    """Whether a file has a seal; afterwards it stands at its beginning.

    Raises:
        SealBroken: it has one, and its bytes are others than those that were sealed.
    """
    size = file.seek(0, 2)
    file.seek(max(0, size - COMMENT_LENGTH))
    comment = file.read(COMMENT_LENGTH)
    file.seek(0)
    if not comment.startswith(TAG):
        return False
    found = hashlib.blake2b(digest_size=DIGEST_LENGTH // 2)
    left = size - DIGEST_LENGTH
    while left and (chunk := file.read(min(CHUNK, left))):
        found.update(chunk)
        left -= len(chunk)
    file.seek(0)
    if _digest(found) != comment[len(TAG) :]:
        raise SealBroken("its bytes are not those that were written: the checksum differs")
    return True


def _digest(checksum: "hashlib.blake2b") -> bytes:
    return checksum.hexdigest().encode("ascii")
