"""Names and writing of an evaluation's files in the run's folder.

    RUN/predictions.json, RUN/accuracy.json               of the split ``val``
    RUN/predictions_test-dev.json                         of another split
    RUN/predictions_val_0a1b2c3d.json                     of other shards whose split has a name that was taken, with
                                                          the beginning of ``data`` in metrics.jsonl, their fingerprint

A split whose answers are not published has no accuracy.json.

Source: none.
"""

from pathlib import Path

from unimo3.atomic_write import replace_text
from unimo3.distributed import on_all_ranks, world
from unimo3.training.metrics import read_metrics

_PLAIN_SPLIT = "val"
_FINGERPRINT_DIGITS = 8
_FIX = "check space, quota and permissions of the run's folder, then start the same command again"


def names_of(folder: Path, files: dict[str, str], split: str, fingerprint: str) -> dict[str, Path]:
    """Where a run keeps an evaluation's files.

    Args:
        folder: of the run, whose metrics record which data had a split's name first.
        files: as a task names them.
        split, fingerprint: of the held-out data.
    """
    parts = [] if split == _PLAIN_SPLIT else [split]
    evaluated = [record["data"] for record in read_metrics(folder, group="eval") if record.get("split") == split]
    if evaluated and evaluated[0] != fingerprint:
        parts = [split, fingerprint[:_FINGERPRINT_DIGITS]]
    paths = {}
    for name in files:
        stem, dot, ending = name.partition(".")
        paths[name] = folder / ("_".join([stem, *parts]) + dot + ending)
    return paths


def write_files(folder: Path, files: dict[str, str], split: str, fingerprint: str) -> list[Path]:
    """Write each file by rename on rank 0, and return their paths; every rank calls it. See `names_of`.

    Raises:
        CheckpointError: on every rank; one cannot be written.
    """

    def write() -> list[Path]:
        if world()[0] != 0:
            return []
        paths = names_of(folder, files, split, fingerprint)
        for name, path in paths.items():
            replace_text(path, files[name], errors="replace")
        return list(paths.values())

    written: list[Path] = on_all_ranks(f"writing the results for {split}", write, _FIX)[0]
    return written
