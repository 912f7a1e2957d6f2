"""Sources in the public releases' files, as small as they can be, and what the converters make of them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pretrain import toy
from unimo3.data.formats import CONVERTERS, Sample
from unimo3.errors import DataError

BOM = b"\xef\xbb\xbf"


class Read(NamedTuple):
    """What a converter gave."""

    samples: list[tuple[str, Sample]]
    omitted: Counter[str]

    def split(self, name: str) -> list[Sample]:
        return [sample for split, sample in self.samples if split == name]


def convert(name: str, source: Path, images: Path | None = None) -> Read:
    """Read a complete source and check the rules for the keys of every format."""
    omitted: Counter[str] = Counter()
    samples = list(CONVERTERS[name](source, images or source, omitted))
    # The counter is optional, and counting changes nothing.
    assert list(CONVERTERS[name](source, images or source)) == samples
    keys = [(split, sample.key) for split, sample in samples]
    assert len(set(keys)) == len(keys)
    assert not any(set("./") & set(sample.key) for _, sample in samples)
    return Read(samples, omitted)


def write_json(path: Path, content: Any, bom: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((BOM if bom else b"") + json.dumps(content, ensure_ascii=False, indent=1).encode())
    return path


def write_lines(path: Path, records: Iterable[Any], end: str = "\n", bom: bool = False) -> Path:
    """JSON lines, or strings as they are."""
    texts = (record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((BOM if bom else b"") + "".join(text + end for text in texts).encode())
    return path


def set_at(*path: Any, value: Any) -> Callable[[Any], Any]:
    """A change that puts `value` at a path of keys and numbers."""

    def change(content: Any) -> Any:
        content = deepcopy(content)
        parent = content
        for step in path[:-1]:
            parent = parent[step]
        parent[path[-1]] = value
        return content

    return change


def lose(*path: Any) -> Callable[[Any], Any]:
    """A change that removes the value at a path of keys and numbers."""

    def change(content: Any) -> Any:
        content = deepcopy(content)
        parent = content
        for step in path[:-1]:
            parent = parent[step]
        del parent[path[-1]]
        return content

    return change


def error_of(name: str, source: Path, images: Path | None = None) -> str:
    """The message of the one error that reading a source ends with."""
    with pytest.raises(DataError) as caught:
        list(CONVERTERS[name](source, images or source))
    return str(caught.value)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """Toy data in the public formats."""
    out = tmp_path_factory.mktemp("toy") / "data"
    with pytest.raises(SystemExit) as end:
        toy.main([str(out), "--images", "60", "--size", "32"])
    assert not end.value.code
    return out
