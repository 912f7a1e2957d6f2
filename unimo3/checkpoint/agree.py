"""Steps that succeed on every rank or fail on every rank, so that none waits for one that gave up.

Source: two-phase commit's vote, without its second phase.
"""

from collections.abc import Callable
from typing import Any

from unimo3.distributed import all_gather_object
from unimo3.errors import CheckpointError, Unimo3Error


def together(doing: str, action: Callable[[], Any], fix: str, group: Any = None) -> list[Any]:
    """Run `action` on every rank and return all results.

    Args:
        doing: what it is, for the message.
        fix: what to do, unless the errors themselves say it.
        group: to agree through; the default group if none.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    result: Any = None
    failure: tuple[str, bool] | None = None
    try:
        result = action()
    except Unimo3Error as error:
        failure = (str(error), True)
    except Exception as error:  # whatever it was, the other ranks must hear of it
        failure = (f"{type(error).__name__}: {error}", False)
    outcomes = all_gather_object((result, failure), group)
    failures = {rank: failed for rank, (_, failed) in enumerate(outcomes) if failed}
    if failures:
        told = [f"rank {rank}: {message}" for rank, (message, _) in failures.items()]
        more = f"; and {len(told) - 4} more ranks" if len(told) > 4 else ""
        end = "" if all(says_fix for _, says_fix in failures.values()) else f"; {fix}"
        raise CheckpointError(f"{doing} failed ({'; '.join(told[:4])}{more}){end}")
    return [outcome for outcome, _ in outcomes]
