"""A ZeRO checkpoint's weights -> safetensors files, in bounded memory and in parallel.

Types, files and offsets of all tensors are fixed first. Then threads take a tensor each, read it in pieces, cast,
check and hash them, and write them where they belong. Memory is bounded by a few pieces a thread, and the bytes do not
depend on the number of threads. Threads, not processes: torch alone takes 220 MB of each process, and reading, casting,
hashing and writing all run outside Python's lock.

Source: the safetensors format and transformers' index of sharded files.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from unimo3.checkpoint.casting import Casting, OnOverflow, TensorReport, Workspace, largest_of
from unimo3.checkpoint.safetensors_writer import SafetensorsWriter, TensorLocation, num_bytes_of, read_header
from unimo3.checkpoint.zero_reader import ZeroCheckpoint
from unimo3.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_PIECE_ELEMENTS = 2**21
# Each job takes memory.
_MAX_DEFAULT_JOBS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options:
    """How weights are written.

    Attributes:
        dtype: of floating-point tensors.
        on_overflow: what to do with values beyond the type's largest (float16: 65504): refuse, clamp, or keep that
            tensor in float32.
        max_file_bytes: limit of a file's size, unless one tensor is larger.
        num_jobs: tensors processed at a time.
        is_read_back: whether each tensor is read back and compared once it is written.
    """

    dtype: torch.dtype
    on_overflow: OnOverflow
    max_file_bytes: int
    num_jobs: int
    is_read_back: bool


def default_jobs() -> int:
    """Two threads for each core this process may use, up to a few: one computes while the other waits for the disk."""
    return min(2 * len(os.sched_getaffinity(0)), _MAX_DEFAULT_JOBS)


def write_weights(
    source: ZeroCheckpoint, names: dict[str, str], out: Path, options: Options
) -> tuple[list[TensorReport], list[str]]:
    """Write a checkpoint's tensors into safetensors files, and an index where there are several.

    Args:
        names: of tensors in the checkpoint, and what users call them.

    Returns:
        The tensors' reports, and why some of them cannot be written: if that is not empty, the files are of no use.

    Raises:
        CheckpointError: a tensor that was read back differs from what was written.
    """
    with _one_torch_thread():
        types = _written_types(source, list(names), options)
        files = _assign_files(source, types, options.max_file_bytes)
        written = _write_files(source, names, types, files, out, options)
    if len(files) > 1:
        weight_map = {names[name]: file for file, tensors in files.items() for name in tensors}
        total = sum(num_bytes_of(types[name], source.shape(name)) for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return [report for report, _ in written], [problem for _, problem in written if problem]


def verify_layout(folder: Path, reports: Sequence[TensorReport]) -> None:
    """Open weights as their readers do: the files' headers and the index, and no tensor.

    Raises:
        CheckpointError: tensors are not where or what they should be.
    """
    locations: dict[str, tuple[Path, TensorLocation]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            # The library checks more of a header than `read_header` does.
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path.name}: was not written as it should be ({error})") from error
        locations |= {name: (path, location) for name, location in read_header(path).items()}
    wanted = {report.name for report in reports}
    if wanted != locations.keys():
        raise CheckpointError(f"{folder}: missing or unexpected tensors: {sorted(wanted ^ locations.keys())[:5]}")
    for report in reports:
        path, location = locations[report.name]
        if (str(location.dtype), list(location.shape)) != (f"torch.{report.dtype}", report.shape):
            raise CheckpointError(f"{report.name} in {path.name} is {location.dtype} {list(location.shape)}")
    if (folder / INDEX).exists():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        if weight_map != {name: path.name for name, (path, _) in locations.items()}:
            raise CheckpointError(f"{folder / INDEX}: does not give the offsets of the tensors")


def _written_types(source: ZeroCheckpoint, names: list[str], options: Options) -> dict[str, torch.dtype]:
    """The type each tensor gets; it depends on the values if those out of range keep their tensor in float32."""
    limit, spaces = torch.finfo(options.dtype).max, _Workspaces()
    scan = options.on_overflow == "keep-fp32" and options.dtype != torch.float32

    def written(name: str) -> torch.dtype:
        stored = source.dtype(name)
        if not stored.is_floating_point:
            return stored
        # A value that is not finite exceeds no limit here; the cast detects it.
        over = scan and any(largest_of(piece) > limit for _, piece in _pieces(source, name, spaces.get()))
        return torch.float32 if over else options.dtype

    num_jobs = options.num_jobs if scan else 1
    return dict(zip(names, _in_parallel(written, names, num_jobs, "ranges" if scan else ""), strict=True))


def _assign_files(source: ZeroCheckpoint, types: dict[str, torch.dtype], max_file_bytes: int) -> dict[str, list[str]]:
    """Names of the files that transformers looks for, and the tensors in each, in the checkpoint's order."""
    groups: list[list[str]] = []
    room = 0
    for name, dtype in types.items():
        size = num_bytes_of(dtype, source.shape(name))
        if not groups or size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


def _write_files(
    source: ZeroCheckpoint,
    names: dict[str, str],
    types: dict[str, torch.dtype],
    files: dict[str, list[str]],
    out: Path,
    options: Options,
) -> list[tuple[TensorReport, str]]:
    """Write all files and force them to disk; each tensor's report, and its error if it has one."""
    file_of = {name: file for file, tensors in files.items() for name in tensors}
    spaces = _Workspaces()
    with closing(_OpenWriters(source, names, types, files, out)) as writers:

        def write(name: str) -> tuple[TensorReport, str]:
            writer = writers.of(file_of[name])
            public, clamp = names[name], options.on_overflow == "clamp"
            casting = Casting(public, source.shape(name), options.dtype, types[name], clamp, options.is_read_back)
            space = spaces.get()
            for first, piece in _pieces(source, name, space):
                writer.write(public, first, casting.cast(piece, space))
            sha256 = casting.digest
            if options.is_read_back:
                sha256, digest = writer.read_back(public)
                if digest != casting.digest:
                    raise CheckpointError(
                        f"{public} in {writer.path.name} differs from what was written when read back; check the disk, "
                        "then export again"
                    )
            writers.release(file_of[name])
            return casting.report(sha256), casting.problem()

        # The threads end before the files are closed: none still writes to one when a flush fails.
        with closing(_in_parallel(write, list(names), options.num_jobs, "export")) as done:
            return list(done)


class _OpenWriters:
    """The files in work: each is opened for the first of its tensors, and closed when all are written."""

    def __init__(
        self,
        source: ZeroCheckpoint,
        names: dict[str, str],
        types: dict[str, torch.dtype],
        files: dict[str, list[str]],
        out: Path,
    ):
        self._source, self._names, self._types, self._files, self._out = source, names, types, files, out
        self._open: dict[str, SafetensorsWriter] = {}
        self._num_unwritten = {file: len(tensors) for file, tensors in files.items()}
        self._lock = threading.Lock()

    def of(self, file: str) -> SafetensorsWriter:
        """A file's writer."""
        with self._lock:
            if file not in self._open:
                tensors = {
                    self._names[name]: (self._types[name], self._source.shape(name)) for name in self._files[file]
                }
                self._open[file] = SafetensorsWriter(self._out / file, tensors)
            return self._open[file]

    def release(self, file: str) -> None:
        """Count a tensor of a file as written; after the last one the file is flushed to disk and closed."""
        with self._lock:
            self._num_unwritten[file] -= 1
            if self._num_unwritten[file]:
                return
        self._open[file].flush()
        with self._lock:
            self._open.pop(file).close()

    def close(self) -> None:
        """Close what is open, after an error."""
        for writer in self._open.values():
            writer.close()


def _pieces(source: ZeroCheckpoint, name: str, space: Workspace) -> Iterator[tuple[int, Tensor]]:
    """A tensor's elements in order, each piece with the index of its first one; no piece of an empty tensor."""
    count = source.shape(name).numel()
    # Buffers are small, and may be non-contiguous in the file.
    buffer = source.tensor(name).reshape(-1) if name in source.buffers else None
    for first in range(0, count, _PIECE_ELEMENTS):
        size = min(_PIECE_ELEMENTS, count - first)
        if buffer is not None:
            yield first, buffer[first : first + size]
            continue
        piece = space.take("stored", source.dtype(name), size)
        source.read_fragment(piece, name, first)
        yield first, piece


class _Workspaces(threading.local):
    """A workspace for each thread."""

    def get(self) -> Workspace:
        """This thread's workspace."""
        if not hasattr(self, "_workspace"):
            self._workspace = Workspace(_PIECE_ELEMENTS)
        return self._workspace


def _in_parallel(
    function: Callable[[Item], Result], items: Sequence[Item], num_jobs: int, doing: str
) -> Generator[Result]:
    """Results in the order of the items; the first exception ends all."""
    hidden = None if sys.stderr.isatty() and doing else True
    with ThreadPoolExecutor(num_jobs) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for future in tqdm(futures, desc=doing, unit="tensor", disable=hidden):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Let each thread of this module compute on one core; torch starts no threads in addition."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
