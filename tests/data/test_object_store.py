"""Training data in an S3 bucket: the same samples as from a folder, through throttling, cuts and changed objects."""

import hashlib
import io
import itertools
import json
from pathlib import Path

import pytest

from tests.data.test_ledger import STEPS, Run, read, sources  # noqa: F401  (one is a fixture)
from tests.s3 import URL, Refusal, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.spawn import run_alone, run_ranks
from unimo3 import object_store
from unimo3.data import remote
from unimo3.data.args import DataArgs
from unimo3.data.cache import ShardCache
from unimo3.data.index import ShardIndex
from unimo3.data.remote import receive
from unimo3.data.samples import PretrainSamples
from unimo3.data.shard_checks import check_same_indexes
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.distributed import barrier, world
from unimo3.errors import DataError, UnreachableError
from unimo3.object_store import CHUNK_BYTES

THROTTLED = Refusal(503, "SlowDown")
EXPIRED = Refusal(400, "ExpiredToken")


def upload(store, folder, prefix) -> str:
    """Copy a folder of shards to a prefix; its URL."""
    for path in folder.iterdir():
        store.put(f"{prefix}/{path.name}", path.read_bytes())
    return f"{URL}/{prefix}"


def without_source(steps):
    return {step: [row[1:] for row in rows] for step, rows in steps.items()}


def read_without_pauses(*arguments) -> None:
    """A rank that tries again at once."""
    object_store.PAUSES_S = remote._PAUSES_S = (0.01,) * 4
    read(*arguments)


@pytest.mark.integration
def test_ranks_and_readers_read_what_a_folder_has_through_a_kill(s3, sources, tmp_path):  # noqa: F811
    first, second = sources
    (tmp_path / "local").mkdir()
    local = Run(tmp_path / "local", {str(first / "train"): 2, str(second / "train"): 0.5}, first / "tokenizer")
    local.go(1, 12, 0, 0, STEPS)
    train = {upload(s3, first / "train", "a/train"): 2, upload(s3, second / "train", "b/train"): 0.5}
    run = Run(tmp_path, train, first / "tokenizer", read_without_pauses, cache_gb=1)
    for world_size, micro_batch, workers, start, stop, kill_after in (
        (2, 3, 1, 0, 1000, 2),
        (1, 4, 3, 3, 6, None),
        (3, 2, 0, 6, STEPS, None),
    ):
        s3.instead["GET", "*"] = [THROTTLED, 100, THROTTLED]  # one of which is a cut
        s3.instead["HEAD", "*"] = [THROTTLED]
        run.settings["cache_dir"] = str(tmp_path / f"cache_{world_size}")
        run.go(world_size, micro_batch, workers, start, stop, kill_after)
        assert not s3.instead["GET", "*"]
    assert without_source(run.steps) == without_source(local.steps)
    assert {row[0] for rows in run.steps.values() for row in rows} == set(train)


def read_until_it_fails(data: DataArgs, tokenizer: str) -> tuple[str, str, int, str]:
    """In a process of its own: the error that ends reading, its kind, its status and another source's split."""
    encoder = load_tokenizer(tokenizer)
    samples = [PretrainSamples(index, encoder, 16, ImageTransform(32), 0.15, 0) for index in data.open_train()]
    loader = data.training_loader(samples, 4, 4, 0, 1, seed=0, start_step=0)
    try:
        for _ in itertools.islice(loader, 20):
            pass
    except DataError as error:
        return str(error), type(error).__name__, error.exit_status, data.open_val().split
    raise AssertionError("nothing failed")


def failure_of(store, coco, tmp_path, workers, change) -> tuple[str, str, int]:
    """How reading ends after `change` once the index was read, and that this process reads after its readers did."""
    train = upload(store, coco / "train", "train")
    val = upload(store, coco / "val", "val")
    data = DataArgs(train=train, val=val, num_workers=workers, prefetch=1, cache_dir=str(tmp_path / "cache"))
    store.instead["GET", "train/index.members"] = [change]
    *failure, split = run_alone(read_until_it_fails, data, str(coco / "tokenizer"))
    assert split == "val"
    assert "Traceback" not in failure[0]
    return tuple(failure)


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
def test_credentials_that_expire_in_a_run_end_it_with_status_78(s3, coco, tmp_path, workers):  # noqa: F811
    def expire():
        for number in range(6):
            s3.instead["GET", f"train/{number:06d}.tar"] = [EXPIRED] * 100

    message, kind, status = failure_of(s3, coco, tmp_path, workers, expire)
    assert (kind, status) == ("DataError", 78)
    assert "the credentials expired (ExpiredToken as a sentence); renew them (AWS_PROFILE" in message
    assert message.startswith(f"{URL}/train/00000")


@pytest.mark.integration
def test_a_shard_that_is_replaced_in_a_run_is_refused_by_name(s3, coco, tmp_path):  # noqa: F811
    def replace():
        for path in (coco / "train").glob("*.tar"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            s3.put(f"train/{path.name}", bytes(content))

    message, kind, status = failure_of(s3, coco, tmp_path, 1, replace)
    assert (kind, status) == ("DataError", 78)
    assert "the source's file is not the one that was indexed" in message


def reads_same_shards(url: str, cache: str, other: str) -> str:
    """One rank, whose copy of the shards another process replaces before rank 1 opens them; the error."""
    data = DataArgs(train=url, val=url, cache_dir=cache)
    if world()[0] == 0:
        first = data.open_train()
    barrier()
    if world()[0] == 1:
        for path in Path(other).iterdir():
            object_store.put_file(path, f"{url}/{path.name}")
        first = data.open_train()
    barrier()
    check_same_indexes(data.open_train(), data.open_val())
    try:
        check_same_indexes(first, None)
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.integration
def test_shards_replaced_while_ranks_start_end_all_of_them(s3, coco, tmp_path):  # noqa: F811
    url = upload(s3, coco / "train", "train")
    errors = run_ranks(2, reads_same_shards, url, str(tmp_path / "cache"), str(coco / "val"))
    assert errors[0] == errors[1]
    before, after = (ShardIndex(coco / split).fingerprint[:12] for split in ("train", "val"))
    assert errors[0].startswith(f"data.train: '{url}': rank 1 has read the index {after}, rank 0 {before}; let all")


def test_an_object_replaced_between_its_ranges_is_never_a_mixture(s3):  # noqa: F811
    old, new = b"o" * (CHUNK_BYTES + 1), b"n" * (CHUNK_BYTES + 1)
    url = s3.put("0.tar", old)
    s3.instead["GET", "0.tar"] = [lambda: None, lambda: s3.put("0.tar", new)]
    file = io.BytesIO()
    assert receive(url, file, 10**9) == (len(new), hashlib.sha256(new).hexdigest())
    assert file.getvalue() == new


def test_a_wrong_checksum_causes_one_retry_and_then_an_error(s3, tmp_path):  # noqa: F811
    url = s3.put("shards/0.tar", b"x" * 1000)
    cache = ShardCache(url.rpartition("/")[0], tmp_path / "cache", 10**9)
    with pytest.raises(DataError, match=r"0\.tar: the source's file is not the one that was indexed"):
        cache.path("0.tar", 1000, "0" * 64)
    assert sum(request.method == "GET" for request in s3.requests) == 2
    sha256 = hashlib.sha256(b"x" * 1000).hexdigest()
    assert cache.path("0.tar", 1000, sha256).read_bytes() == b"x" * 1000


def test_names_of_objects_are_not_escaped(s3, tmp_path):  # noqa: F811
    s3.put("shards/a%20b.tar", b"")  # would be read instead
    content = b"x"
    object_store.put_bytes(content, f"{URL}/shards/a b.tar")
    cache = ShardCache(f"{URL}/shards/", tmp_path / "cache", 10**9)
    assert cache.read("a b.tar", 10) == content


def test_sources_that_cannot_be_used_are_errors_of_the_setting(s3, coco, tmp_path):  # noqa: F811
    def errors_of(source, **settings):
        return DataArgs(train=source, **settings).shard_errors("captions")

    train = upload(s3, coco / "train", "train")
    cached = {"cache_dir": str(tmp_path / "cache")}
    assert errors_of(train, **cached) == []
    (problem,) = errors_of(train)
    assert "needs a cache; set data.cache_dir and data.cache_gb" in problem
    (problem,) = errors_of(f"{URL}/nowhere", **cached)
    assert problem.startswith(f"data.train: '{URL}/nowhere': {URL}/nowhere/index.json: no such bucket or object")
    (problem,) = errors_of("gs://bucket/shards", **cached)
    assert "pip install gcsfs" in problem
    s3.always = EXPIRED
    (problem,) = errors_of(train, **cached)
    assert "the credentials expired" in problem
    s3.always = THROTTLED
    with pytest.raises(UnreachableError, match="at the last of 5 tries"):
        errors_of(train, **cached)


def test_an_index_of_a_bucket_equals_that_of_the_folder(s3, coco, tmp_path):  # noqa: F811
    url = upload(s3, coco / "train", "train")
    remote, local = ShardIndex(url, ShardCache(url, tmp_path / "cache", 10**9)), ShardIndex(coco / "train")
    assert remote.fingerprint == local.fingerprint
    for shard, number in enumerate(local.samples_per_shard):
        for sample in range(number):
            assert remote.read(shard, sample) == local.read(shard, sample)
    assert json.loads((coco / "train" / "index.json").read_text())["num_samples"] == sum(remote.samples_per_shard)
