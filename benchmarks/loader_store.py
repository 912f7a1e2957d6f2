"""This project's loader from a bucket of moto, an S3 server on loopback, against the same shards in a local folder.

Source: https://docs.getmoto.org/en/latest/docs/server_mode.html for the server.
"""

import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.loader_contestants import BATCH, SAMPLES_PER_SHARD, Setting, Stream, ours
from unimo3 import object_store
from unimo3.data.cache import ShardCache
from unimo3.data.index import ShardIndex

LOCAL, CACHED = "local folder", "S3, cache warm"
_BUCKET = "shards"
_CACHE_BYTES = 10**11
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "benchmark",
    "AWS_SECRET_ACCESS_KEY": "benchmark",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "no_proxy": "127.0.0.1",
}


class StoreRates(NamedTuple):
    """Samples a second.

    Attributes:
        first_pass: of one epoch from `LOCAL`, and from the bucket through an empty cache.
        by_round: of `LOCAL` and `CACHED` in every round, in turns.
    """

    workers: int
    first_pass: tuple[float, float]
    by_round: dict[str, list[float]]


@dataclass(frozen=True)
class StoredSetting(Setting):
    """Shards in a bucket; the tokenizer is still in `folder`.

    Attributes:
        url: of the shards.
        cache: folder of the copies.
    """

    url: str
    cache: Path

    def index(self) -> ShardIndex:
        """The shards' index, read from the bucket."""
        return ShardIndex(self.url, ShardCache(self.url, self.cache, _CACHE_BYTES))


def missing_packages() -> list[str]:
    """What `measure_store` needs and is not installed."""
    return [name for name in ("moto", "s3fs") if importlib.util.find_spec(name) is None]


def measure_store(setting: Setting, workers: int, rounds: int, seconds: float, scratch: Path) -> StoreRates:
    """Copy the shards into a bucket and read them there and in their folder, in turns."""
    with _bucket() as bucket:
        url = f"{bucket}/train"
        for path in (setting.folder / "train").iterdir():
            object_store.put_file(path, f"{url}/{path.name}")
        stored = StoredSetting(setting.folder, setting.augment, url, scratch / "cache")
        num_batches = len(list((setting.folder / "train").glob("*.tar"))) * SAMPLES_PER_SHARD // BATCH
        first_pass = _first_pass(setting, workers, num_batches), _first_pass(stored, workers, num_batches)
        streams = {name: Stream(ours(each, workers), workers) for name, each in ((LOCAL, setting), (CACHED, stored))}
        rates: dict[str, list[float]] = {name: [] for name in streams}
        for number in tqdm(range(rounds + 1), desc="from a bucket", unit="round"):
            for name, stream in streams.items():
                rate = stream.rate(seconds)
                if number:  # the first warms up
                    rates[name].append(rate)
    return StoreRates(workers, first_pass, rates)


def _first_pass(setting: Setting, workers: int, num_batches: int) -> float:
    """Samples a second of one epoch, from the start of its readers."""
    return Stream(ours(setting, workers), 0).rate_of(num_batches)


@contextmanager
def _bucket() -> Iterator[str]:
    """The URL of an empty bucket; only in it does the environment name the server."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there,), daemon=True)
    server.start()
    before = dict(os.environ)
    os.environ.update(_ENVIRONMENT, AWS_ENDPOINT_URL=here.recv())
    try:
        yield f"s3://{_BUCKET}"
    finally:
        os.environ.clear()
        os.environ.update(before)
        here.send("stop")
        server.join()


def _serve(end: Connection) -> None:
    """Run the server, with its bucket, in this process; send its address, and end it when asked."""
    import logging

    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
    server: Any = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(_ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    boto3.client("s3").create_bucket(Bucket=_BUCKET)
    end.send(os.environ["AWS_ENDPOINT_URL"])
    end.recv()
    server.stop()
