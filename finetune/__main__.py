"""Starts a fine-tuning task's program: ``finetune TASK ARGUMENTS...`` is the same as ``python -m finetune.TASK``."""

import importlib
import sys

from finetune.tasks import PROGRAMS
from unimo3.errors import CommandParser, exit_with_status


@exit_with_status
def main(argv: list[str] | None = None) -> None:
    """Start the task's program."""
    words = sys.argv[1:] if argv is None else argv
    parser = CommandParser(prog="python -m finetune", description=__doc__)
    parser.add_argument("task", choices=PROGRAMS, help="with --help after it: its settings")
    task = parser.parse_args(words[:1]).task
    sys.argv[0] += f" {task}"  # the program's name in its help
    importlib.import_module(f"finetune.{task}").main(words[1:])


if __name__ == "__main__":
    main()
