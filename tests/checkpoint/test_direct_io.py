"""Files past the system's cache, and the checksum that the read-back content is compared with."""

import errno
import itertools
import os
import random
import resource

import pytest

from unimo3.checkpoint import direct_io
from unimo3.checkpoint.block_sums import BlockSums
from unimo3.checkpoint.direct_io import DirectFile

SIZE = 50_000


@pytest.fixture(params=["direct", "refused", "absent"])
def way(request, monkeypatch):
    """With O_DIRECT; where the kernel refuses each transfer of that size; where the file system has no such thing."""
    if request.param == "refused":
        monkeypatch.setattr(direct_io, "BLOCK_BYTES", 100)
    if request.param == "absent":
        opened = os.open

        def refuse(path, flags, *arguments):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, flags, *arguments)

        monkeypatch.setattr(os, "open", refuse)
    return request.param


@pytest.mark.parametrize("chunk", [2**22, 8192])
def test_bytes_written_at_any_offset_in_any_order_are_read_back(tmp_path, way, chunk, monkeypatch):
    monkeypatch.setattr(direct_io, "CHUNK_BYTES", chunk)
    draw = random.Random(chunk)
    content = draw.randbytes(SIZE)
    cuts = [0, 8, 4096, 8192, 8200, *sorted(draw.sample(range(8201, SIZE), 12)), SIZE]
    parts = list(itertools.pairwise(cuts))
    draw.shuffle(parts)
    file = DirectFile(tmp_path / "file", SIZE)
    for first, last in parts:
        file.write(memoryview(content)[first:last], first)
    for first, last in parts:
        last = min(last, first + chunk)
        assert bytes(file.read(first, last - first)) == content[first:last]
    file.flush()
    file.close()
    assert (tmp_path / "file").read_bytes() == content
    again = DirectFile(tmp_path / "file")
    assert bytes(again.read(SIZE - 10, 100)) == content[-10:]
    again.close()


def test_a_full_disk_is_an_error(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            DirectFile(tmp_path / "file", SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_block_sums_depend_on_bytes_and_blocks_and_not_on_pieces():
    draw = random.Random(0)
    content = bytearray(draw.randbytes(5 * 4096 + 77))

    def sums(data: bytes, pieces: int) -> str:
        digest = BlockSums()
        for first in range(0, len(data), pieces):
            digest.update(memoryview(data)[first : first + pieces])
        return digest.hexdigest()

    expected = sums(content, len(content))
    for pieces in (1, 100, 4095, 4096, 5000, 8192):
        assert sums(content, pieces) == expected
    for offset in (0, 4096 * 3 + 1, len(content) - 1):
        changed = bytearray(content)
        changed[offset] ^= 128
        assert sums(changed, 4096) != expected
    swapped = content[4096:8192] + content[:4096] + content[8192:]
    assert sums(swapped, 4096) != expected
    assert sums(b"", 1) != expected
