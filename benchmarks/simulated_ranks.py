"""Hundreds of ranks in one process, by turns: what each of them does alone, and what they exchange.

A rank is a thread. One runs at a time, up to its next collective, so that its seconds are those without the others. The
collectives pickle and exchange objects as torch's do. A network takes no time here; its bytes are counted.

Source: torch.distributed's all_gather_object, which fills every rank's object up to the longest, and
broadcast_object_list.
"""

import pickle
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from unimo3 import distributed


@dataclass
class RankCost:
    """What one rank did.

    Attributes:
        seconds: without its waits for others.
        opened: paths of the files and folders that it opened, in order.
        received_bytes: of collectives.
        result: of the action.
    """

    seconds: float = 0.0
    opened: list[str] = field(default_factory=list)
    received_bytes: int = 0
    result: Any = None


def on_simulated_ranks(size: int, action: Callable[[], Any], measured: Collection[int]) -> list[RankCost]:
    """Run `action` on `size` ranks of `unimo3.distributed` and return each one's cost, in rank order.

    Args:
        measured: ranks that unpickle what they receive. The others share one copy, and their seconds mean little.

    Raises:
        Exception: of the first rank that failed.
    """
    group = _Group(size, measured)
    stock = distributed._process_group
    distributed._process_group = lambda: group
    try:
        return group.run(action)
    finally:
        distributed._process_group = stock


@contextmanager
def opened_paths() -> Iterator[list[str]]:
    """Within it, the list gets the path of each file and folder that Python code opens."""
    before, _recorder.paths = _recorder.paths, []
    try:
        yield _recorder.paths
    finally:
        _recorder.paths = before


class _Group:
    """The part of torch.distributed that `unimo3.distributed` calls, for the rank of the current thread."""

    def __init__(self, size: int, measured: Collection[int]):
        self._size, self._measured = size, measured
        self._turn = threading.Lock()
        self._meeting = threading.Barrier(size)
        self._sent: list[bytes] = [b""] * size
        self._shared: list[Any] = []
        self._failure: Exception | None = None
        self._costs = [RankCost() for _ in range(size)]
        self._local = threading.local()

    def run(self, action: Callable[[], Any]) -> list[RankCost]:
        """All ranks to their ends."""
        threads = [threading.Thread(target=self._rank, args=(rank, action)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return self._costs

    def _rank(self, rank: int, action: Callable[[], Any]) -> None:
        self._local.rank = rank
        try:
            self._begin()
            try:
                self._costs[rank].result = action()
            finally:
                self._end()
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except Exception as error:
            self._failure = self._failure or error
            self._meeting.abort()

    def _begin(self) -> None:
        self._turn.acquire()
        _recorder.paths = self._costs[self.get_rank()].opened
        self._local.began = time.perf_counter()

    def _end(self) -> None:
        if self._local.began is not None:
            self._costs[self.get_rank()].seconds += time.perf_counter() - self._local.began
            self._local.began = _recorder.paths = None
            self._turn.release()

    def get_rank(self) -> int:
        """Of the current thread."""
        rank: int = self._local.rank
        return rank

    def get_world_size(self) -> int:
        """All ranks."""
        return self._size

    def all_gather_object(self, values: list[Any], value: Any, group: Any = None) -> None:
        """Every rank's value."""
        self._send(pickle.dumps(value))
        self._receive(values, self._sent, self._size * max(map(len, self._sent)))

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        """The values of one rank."""
        self._send(pickle.dumps(values) if self.get_rank() == src else b"")
        received: list[Any] = [None]
        self._receive(received, self._sent[src : src + 1], len(self._sent[src]))
        values[:] = received[0]

    def _send(self, sent: bytes) -> None:
        self._sent[self.get_rank()] = sent
        self._wait(self._forget_shared)

    def _receive(self, values: list[Any], sent: list[bytes], num_bytes: int) -> None:
        self._costs[self.get_rank()].received_bytes += num_bytes
        if self.get_rank() in self._measured:
            values[:] = [pickle.loads(one) for one in sent]
        else:
            self._shared = self._shared or [pickle.loads(one) for one in sent]
            values[:] = self._shared
        self._wait(lambda: None)  # before anybody sends again

    def _wait(self, last: Callable[[], None]) -> None:
        """Meet all ranks; one of them does `last` before any continues."""
        self._end()
        if self._meeting.wait() == 0:
            last()
        self._meeting.wait()
        self._begin()

    def _forget_shared(self) -> None:
        self._shared = []


class _Recorder:
    """Notes opened paths. An audit hook stays until the interpreter ends."""

    paths: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event in ("open", "os.scandir", "os.listdir"):
            self.paths.append(str(arguments[0]))


_recorder = _Recorder()
sys.addaudithook(_recorder)
