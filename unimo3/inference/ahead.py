"""Reading while computing: the next batch's images are decoded by a thread while the model has this one.

Source: none.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def one_ahead(make: Callable[[Given], Made], given: Iterable[Given]) -> Iterator[Made]:
    """``map(make, given)``, with the next value made in a thread while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        waiting: Future[Made] | None = None
        for one in given:
            started = thread.submit(make, one)
            if waiting is not None:
                yield waiting.result()
            waiting = started
        if waiting is not None:
            yield waiting.result()
