"""Files written to the disk and read from it past the system's cache, where the file system allows that.

Weights are written once and not read soon: in the cache they would only push out what training needs, and finding room
for them takes the processor longer than the disk takes to write. Bytes that are read back come from the disk, not from
memory. Such transfers consist of complete blocks, from and to memory at block boundaries; the ends of a range go
through the cache.

Source: open(2), O_DIRECT.
"""

import errno
import mmap
import os
import threading
from pathlib import Path

BLOCK_BYTES = max(4096, mmap.PAGESIZE)
CHUNK_BYTES = 2**22


class DirectFile:
    """One open file, for several threads.

    Args:
        path: a new file if it is to be written.
        size: bytes the new file will have; None: it is there, to be read.
    """

    def __init__(self, path: Path, size: int | None = None):
        flags = os.O_RDONLY if size is None else os.O_RDWR | os.O_CREAT | os.O_TRUNC
        self._cached = os.open(path, flags, 0o666)
        self._direct: int | None = None
        try:
            if size is not None:
                os.ftruncate(self._cached, size)
            self._direct = os.open(path, (os.O_RDONLY if size is None else os.O_RDWR) | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:  # the answer of a file system without it
                os.close(self._cached)
                raise

    def write(self, memory: memoryview, start: int) -> None:
        """Write bytes to the file, from offset `start` on."""
        first, last = _round_up(start) - start, (start + len(memory)) // BLOCK_BYTES * BLOCK_BYTES - start
        if last <= first:
            _write_all(self._cached, memory, start)
            return
        _write_all(self._cached, memory[:first], start)
        for offset in range(first, last, CHUNK_BYTES):
            size = min(CHUNK_BYTES, last - offset)
            if not self._write_blocks(memory[offset : offset + size], start + offset):
                _write_all(self._cached, memory[offset : offset + size], start + offset)
        _write_all(self._cached, memory[last:], start + last)

    def read(self, start: int, count: int) -> memoryview:
        """Bytes from offset `start` on, fewer at the file's end.

        Args:
            count: at most `CHUNK_BYTES`.

        Returns:
            Memory that contains them until this thread reads or writes again.
        """
        first, end = start // BLOCK_BYTES * BLOCK_BYTES, _round_up(start + count)
        buffer = _buffers.get()[: end - first]
        done = self._read_blocks(buffer, first)
        return buffer[start - first : min(done, start - first + count)]

    def flush(self) -> None:
        """Force to disk what was written."""
        os.fsync(self._cached)

    def close(self) -> None:
        """Close the file."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _write_blocks(self, memory: memoryview, start: int) -> bool:
        """Whether the file system allowed a write past the cache."""
        if self._direct is None:
            return False
        buffer = _buffers.get()[: len(memory)]
        buffer[:] = memory
        try:
            _write_all(self._direct, buffer, start)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False
        return True

    def _read_blocks(self, buffer: memoryview, start: int) -> int:
        if self._direct is not None:
            try:
                return _read_all(self._direct, buffer, start)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return _read_all(self._cached, buffer, start)


class _Buffers(threading.local):
    """A buffer at block boundaries for each thread."""

    def get(self) -> memoryview:
        if not hasattr(self, "_memory"):
            # Room for a chunk that begins inside one block and ends inside another.
            self._memory = memoryview(mmap.mmap(-1, CHUNK_BYTES + 2 * BLOCK_BYTES))
        return self._memory


_buffers = _Buffers()


def _round_up(offset: int) -> int:
    return -(-offset // BLOCK_BYTES) * BLOCK_BYTES


def _write_all(descriptor: int, memory: memoryview, start: int) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(descriptor, memory[done:], start + done)


def _read_all(descriptor: int, memory: memoryview, start: int) -> int:
    """Fill memory and return the number of bytes read."""
    done = 0
    while done < len(memory):
        count = os.preadv(descriptor, [memory[done:]], start + done)
        done += count
        if count == 0 or done % BLOCK_BYTES:  # the file's end
            break
    return done
