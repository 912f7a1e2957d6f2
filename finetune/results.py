"""Names and writing of an evaluation's files in the run's folder.

    RUN/predictions.json, RUN/accuracy.json               of the split ``val``
    RUN/predictions_test-dev.json                         of another split
    RUN/predictions_val_0a1b2c3d.json                     of other shards whose split has a name that was taken, with
                                                          the beginning of ``data`` in metrics.jsonl, their fingerprint

A split whose answers are not published has no accuracy.json.

Source: none.
"""

from pathlib import Path

from unimo3.training.metrics import read_metrics

_PLAIN_SPLIT = "val"
_FINGERPRINT_DIGITS = 8


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
    """Write each file by rename; see `names_of`."""
    paths = names_of(folder, files, split, fingerprint)
    for name, path in paths.items():
        staging = path.with_name(f"{path.name}.tmp")
        staging.write_text(files[name], encoding="utf-8", errors="replace")
        staging.replace(path)
    return list(paths.values())
