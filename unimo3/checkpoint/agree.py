"""Steps that succeed on every rank or fail on every rank, so that none waits for one that gave up.

Source: two-phase commit's vote, without its second phase.
"""

from collections.abc import Callable
from typing import Any

from unimo3.distributed import all_gather_object
from unimo3.errors import CheckpointError


def together(doing: str, action: Callable[[], Any], mend: str, group: Any = None) -> list[Any]:
    """Run `action` on every rank and return all results.

    Args:
        doing: what it is, for the message.
        group: to agree through; the default group if none.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    result, failure = None, None
    try:
        result = action()
    except Exception as error:  # whatever it was, the other ranks must hear of it
        failure = f"{type(error).__name__}: {error}"
    outcomes = all_gather_object((result, failure), group)
    failures = [f"rank {rank}: {failed}" for rank, (_, failed) in enumerate(outcomes) if failed]
    if failures:
        more = f"; and {len(failures) - 4} more ranks" if len(failures) > 4 else ""
        raise CheckpointError(f"{doing} failed ({'; '.join(failures[:4])}{more}); {mend}")
    return [outcome for outcome, _ in outcomes]
