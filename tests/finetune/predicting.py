"""Runs finetune.predict on runs' own shards and on files of lines."""

import json
import tarfile

import pytest

from finetune import predict
from tests.finetune.formats import read_lines


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as end:
        predict.main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def members(shards):
    """Contents of a split's tars, by name."""
    contents = {}
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            contents |= {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}
    return contents


def unpack(shards, folder):
    """Write a split's images into a folder; return the JSON of its samples, by key."""
    samples = {}
    for name, content in members(shards).items():
        key, _, ending = name.partition(".")
        if ending == "json":
            samples[key] = json.loads(content)
        elif ending.rpartition(".")[2] in ("jpg", "png"):
            (folder / name).write_bytes(content)
    return samples


def write_lines(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers_to(task, tuned, folder, entries, *options):
    """Run predict on a file of these lines."""
    source = write_lines(folder / "in.jsonl", entries)
    weights = tuned / f"{task}_weights"
    assert run(task, "--weights", weights, "--input", source, "--output", folder / "out.jsonl", *options) == 0
    return read_lines(folder / "out.jsonl")


def scores_of(record):
    return {answer["answer"]: answer["score"] for answer in record["answers"]}


def image_of(folder, key):
    (path,) = folder.glob(f"{key}.*")
    return path.name
