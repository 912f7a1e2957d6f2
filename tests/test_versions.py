"""Each format that programs write and read again: of now, from before versions, and of a newer program."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import save_file

from pretrain.train import PretrainConfig
from slurm import bad_nodes, history
from tests.checkpoint.test_store import committed_checkpoint
from tests.data.conftest import index_again, write_tar
from tests.tiny import tiny_config
from unimo3 import config
from unimo3.checkpoint import load, store
from unimo3.checkpoint.best_record import BestRecord, read_best, write_best
from unimo3.data.answers import AnswerVocabulary
from unimo3.data.index import ShardIndex
from unimo3.errors import Unimo3Error
from unimo3.inference import search_index
from unimo3.json_lines import append_record, read_records
from unimo3.model.pretrained.fill import read_config
from unimo3.training.metrics import MetricsWriter, drop_after, read_metrics

RUN = Path("run")


class Format(NamedTuple):
    """One that is written below the current folder.

    Attributes:
        fix: of a newer file.
    """

    path: str
    write: Callable[[], Any]
    read: Callable[[], Any]
    fix: str = "update this program to the version that wrote it"


def write_shards() -> None:
    write_tar(Path("000000.tar"), {"one": {"jpg": b"x", "json": b"{}"}})
    index_again(Path())


def write_metrics() -> None:
    writer = MetricsWriter(RUN, None, enabled=True)
    writer.write({"step": 1, "loss": 2.0})
    writer.close()


def weights() -> Path:
    folder = Path("weights")
    tiny_config().save_pretrained(folder)
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def write_search_index() -> None:
    search_index.save(
        search_index.SearchIndex("texts", ["a"], Path(), torch.zeros(1, 4)), weights(), Path("search_index")
    )


best = BestRecord("step_00000001", 1, "accuracy", 0.5, "val")
FORMATS = [
    Format(
        "index.json", write_shards, lambda: list(ShardIndex(Path()).shards), "index it again with python -m pretrain"
    ),
    Format(
        "run/checkpoints/step_00000001/MANIFEST.json",
        lambda: committed_checkpoint(RUN, 1),
        lambda: load.choose(RUN),
    ),
    Format(
        "run/config.yaml",
        lambda: config.save(PretrainConfig(), RUN / "config.yaml"),
        lambda: config.read_flat(RUN / "config.yaml", PretrainConfig),
    ),
    Format("run/best.json", lambda: write_best(RUN, best), lambda: read_best(RUN)),
    Format("run/metrics.jsonl", write_metrics, lambda: read_metrics(RUN)),
    Format("run/metrics.jsonl", write_metrics, lambda: drop_after(RUN / "metrics.jsonl", 1)),
    Format(
        "run/ledger.jsonl",
        lambda: append_record(RUN / "ledger.jsonl", {"step": 1, "keys": []}),
        lambda: read_records(RUN / "ledger.jsonl"),
    ),
    Format(
        "run/slurm/history.jsonl",
        lambda: history.append(RUN, "begin", job="1", restart=0, nodes="n1", checkpoint=None),
        lambda: history.read(RUN),
    ),
    Format("bad_nodes.jsonl", lambda: bad_nodes.add(RUN, "n1", "slow", "1"), bad_nodes.current),
    Format("answers.json", lambda: AnswerVocabulary(["a"]).save(Path("answers.json")), lambda: answers().answers),
    Format("weights/config.json", weights, lambda: read_config("--weights", "weights", "UNIMO-3").to_dict()),
    Format(
        "search_index/index.json",
        write_search_index,
        lambda: opened_search_index().names,
        "remove it and make it again",
    ),
]


def answers() -> AnswerVocabulary:
    return AnswerVocabulary.load(Path("answers.json"))


def opened_search_index() -> search_index.SearchIndex:
    return search_index.open_search_index(Path("search_index"), Path("weights"))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Format], Path]:
    """Writes a format into an empty folder; its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAD_NODES", "bad_nodes.jsonl")
    RUN.mkdir()

    def write(one: Format) -> Path:
        one.write()
        return Path(one.path)

    return write


def with_version(path: Path, version: int | None) -> None:
    """Give a file another version, or take it away."""
    is_yaml = path.suffix == ".yaml"
    content = yaml.safe_load(path.read_text()) if is_yaml else json.loads(path.read_text())
    content.pop("version", None)
    content |= {} if version is None else {"version": version}
    path.write_text(yaml.safe_dump(content, sort_keys=False) if is_yaml else json.dumps(content) + "\n")


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.path)
def test_a_newer_version_is_one_error_that_names_file_version_and_fix(written, one):
    path = written(one)
    one.read()
    with_version(path, 5)
    with pytest.raises(Unimo3Error) as error:
        one.read()
    assert error.value.exit_status == 78
    assert path.name in str(error.value)
    assert str(path.parent) in str(error.value)
    assert "version 5, this program reads " in str(error.value)
    assert one.fix in str(error.value)


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.path)
def test_a_file_from_before_versions_is_read_or_names_its_conversion(written, one):
    path = written(one)
    now = repr(one.read())
    with_version(path, None)
    if path.name == "index.json" and path.parent == Path():  # its first version has no table of members
        with pytest.raises(Unimo3Error, match="version 1, this program reads 2, 3, 4; index it again with python"):
            one.read()
    else:
        assert repr(one.read()) == now


def test_a_newer_checkpoint_is_neither_damaged_nor_skipped(written):
    committed_checkpoint(RUN, 1)
    path = written(FORMATS[1]._replace(write=lambda: committed_checkpoint(RUN, 2)))
    with_version(path.parents[1] / "step_00000002" / path.name, 2)
    with pytest.raises(Unimo3Error, match=r"step_00000002/MANIFEST\.json: version 2"):
        load.choose(RUN)
    assert len(store.list_checkpoints(RUN)) == 2


def test_fields_that_a_newer_program_adds_to_the_history_are_ignored(written):
    history.append(RUN, "begin", job="1", restart=0, nodes="n1", checkpoint=None, weather="fine")
    history.append(RUN, "end", job="1", status=0, action="done", reason="", checkpoint=4, weather="fine")
    assert [attempt.action for attempt in history.read(RUN)] == ["done"]
