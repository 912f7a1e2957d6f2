"""The checksum that S3 gives of an object: its ETag, by which an object is compared with what was sent.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html for which ETags are checksums; s3fs
for the parts.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

# s3fs sends a file of two parts or more in parts, each a request; S3 takes up to so many.
PART_BYTES, _MAX_PARTS = 50 * 2**20, 10_000


def part_bytes_of(num_bytes: int) -> int:
    """Size of the parts in which a file of this size is sent."""
    return max(PART_BYTES, -(-num_bytes // _MAX_PARTS))


def etag_of(chunks: Iterable[bytes], num_bytes: int, part_bytes: int) -> str:
    """The ETag of an object that was sent as s3fs does: its MD5, or that of its parts' MD5s and their number."""
    if num_bytes < 2 * part_bytes:
        part_bytes = num_bytes + 1
    digests, digest, room = [], hashlib.md5(usedforsecurity=False), part_bytes
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            piece, rest = rest[:room], rest[room:]
            digest.update(piece)
            room -= len(piece)
            if not room:
                digests.append(digest.digest())
                digest, room = hashlib.md5(usedforsecurity=False), part_bytes
    if not digests:
        return digest.hexdigest()
    digests += [digest.digest()] if room < part_bytes else []
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"


def is_encrypted_by_key(store: Any, path: str) -> bool:
    """Whether S3 encrypts an object by a key other than its own, so that its ETag is no checksum."""
    bucket, key, _ = store.split_path(path)
    head = store.call_s3("head_object", Bucket=bucket, Key=key)
    return bool(str(head.get("ServerSideEncryption", "")).startswith("aws:kms") or head.get("SSECustomerAlgorithm"))
