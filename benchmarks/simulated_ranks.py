"""Hundreds of ranks in one process, by turns: what each of them does alone, and what they exchange.

A rank is a thread. One runs at a time, up to its next collective, so that its seconds are those without the others. The
collectives pickle and exchange objects as torch's do; a network takes no time here, and the bytes are counted.

Source: torch.distributed's all_gather_object, which fills every rank's object up to the longest, and
broadcast_object_list.
"""

import pickle
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
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
    opened: list[str] | None = None
    received_bytes: int = 0
    result: Any = None


def on_simulated_ranks(size: int, action: Callable[[], Any], measured: Collection[int]) -> list[RankCost]:
    """Run `action` on `size` ranks of `unimo3.distributed` and return each one's cost, in rank order.

    Args:
        measured: ranks that unpickle what they receive themselves; the others share one copy, and are not comparable.

    Raises:
        Exception: of the first rank that failed.
    """
    group = _Group(size, measured)
    stock = distributed._process_group
    distributed._process_group = lambda: group  # type: ignore[assignment]
    try:
        return group.run(action)
    finally:
        distributed._process_group = stock


class _Group:
    """The part of torch.distributed that `unimo3.distributed` calls, for the rank of the current thread."""

    def __init__(self, size: int, measured: Collection[int]):
        self._size, self._measured = size, measured
        self._turn = threading.Lock()
        self._sent: list[bytes] = [b""] * size
        self._shared: list[Any] = []
        self._failure: BaseException | None = None
        self._meeting = threading.Barrier(size)
        self._costs = [RankCost(opened=[]) for _ in range(size)]
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
            self._costs[rank].result = action()
            self._end()
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except BaseException as error:
            self._failure = self._failure or error
            self._end()
            self._meeting.abort()

    def _begin(self) -> None:
        self._turn.acquire()
        _opened.paths = self._costs[self.get_rank()].opened
        self._local.began = time.perf_counter()

    def _end(self) -> None:
        self._costs[self.get_rank()].seconds += time.perf_counter() - self._local.began
        _opened.paths = None
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
        self._exchange(pickle.dumps(value))
        longest = max(map(len, self._sent))
        self._receive(values, self._sent, longest * self._size)

    def broadcast_object_list(self, values: list[Any], src: int) -> None:
        """The values of one rank."""
        rank = self.get_rank()
        self._exchange(pickle.dumps(values) if rank == src else b"")
        received: list[Any] = [None]
        self._receive(received, self._sent[src : src + 1], len(self._sent[src]))
        values[:] = received[0]

    def _exchange(self, sent: bytes) -> None:
        rank = self.get_rank()
        self._sent[rank] = sent
        self._end()
        if self._meeting.wait() == 0:  # one of all ranks
            self._shared = []
        self._meeting.wait()
        self._begin()

    def _receive(self, values: list[Any], sent: list[bytes], num_bytes: int) -> None:
        rank = self.get_rank()
        self._costs[rank].received_bytes += num_bytes
        if rank in self._measured:
            values[:] = [pickle.loads(one) for one in sent]
        else:
            self._shared = self._shared or [pickle.loads(one) for one in sent]
            values[:] = self._shared
        self._end()
        self._meeting.wait()  # before anybody sends again
        self._begin()


class _Opened:
    """Where opened paths are noted; the interpreter keeps an audit hook to its end."""

    paths: list[str] | None = None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event in ("open", "os.scandir", "os.listdir") and arguments[0] is not None:
            self.paths.append(str(arguments[0]))


_opened = _Opened()
sys.addaudithook(_opened)
