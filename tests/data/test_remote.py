"""Training shards at an https: address, through the cache: what is read is what lies there."""

import itertools

import pytest

from tests.data.test_cache import certificate, store  # noqa: F401  (fixtures)
from unimo3.data.args import DataArgs
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError


@pytest.fixture
def served(coco, store):  # noqa: F811
    """The store with COCO's training shards and their index."""
    for path in (coco / "train").iterdir():
        store.files[f"/coco/train/{path.name}"] = path.read_bytes()
    return store


def read(data: DataArgs, tokenizer: str, num_steps: int = 5) -> list[list[str]]:
    encoder = load_tokenizer(tokenizer)
    sources = [PretrainSamples(index, encoder, 16, ImageTransform(32), 0.15, 0) for index in data.open_train()]
    loader = data.training_loader(sources, 4, 4, 0, 1, seed=0, start_step=0)
    return [batch["keys"] for (batch,) in itertools.islice(loader, num_steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_source_is_read_as_a_local_one_within_its_bounds(served, coco, tmp_path, workers):
    tokenizer, limit = str(coco / "tokenizer"), 40_000
    local = DataArgs(train=str(coco / "train"), window_shards=2, num_workers=0)
    remote = DataArgs(
        train=f"{served.url}/coco/train/", window_shards=2, num_workers=workers, prefetch=1,
        cache_dir=str(tmp_path / "cache"), cache_gb=limit / 1e9,
    )  # fmt: skip
    assert remote.faults()[1:] == []  # the tokenizer is not set
    assert remote.shard_faults("captions") == []
    assert read(remote, tokenizer) == read(local, tokenizer)
    kept = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix == ".shard"]
    assert kept
    assert sum(kept) <= limit
    assert remote.fingerprint(remote.open_train()) == local.fingerprint(local.open_train())


def test_a_mounted_source_may_go_through_the_cache_too(coco, tmp_path):
    cached = DataArgs(train=str(coco / "train"), num_workers=0, cache_dir=str(tmp_path / "cache"))
    plain = DataArgs(train=str(coco / "train"), num_workers=0)
    assert read(cached, str(coco / "tokenizer")) == read(plain, str(coco / "tokenizer"))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".shard"]) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_not_the_one_indexed_is_refused_by_name(served, coco, tmp_path, workers):
    for number in range(4):
        name = f"/coco/train/00000{number}.tar"
        content = bytearray(served.files[name])
        content[len(content) // 2] ^= 1
        served.files[name] = bytes(content)
    data = DataArgs(
        train=f"{served.url}/coco/train", num_workers=workers, cache_dir=str(tmp_path / "cache"), cache_gb=1
    )
    with pytest.raises(DataError, match=r"00000\d\.tar: the source.s file is not the one that was indexed") as error:
        read(data, str(coco / "tokenizer"))
    assert "Traceback" not in str(error.value)


def test_addresses_that_cannot_be_used_are_faults_of_the_setting(served, tmp_path):
    def faults(source, **settings):
        return DataArgs(train=source, **settings).shard_faults("captions")

    (fault,) = faults(f"{served.url}/coco/train")
    assert "an address needs a cache; set data.cache_dir and data.cache_gb" in fault
    (fault,) = faults("pipe:cat x.tar")
    assert fault.startswith("data.train: ")
    assert "pipe: runs a shell" in fault
    (fault,) = faults(f"{served.url}/nowhere", cache_dir=str(tmp_path / "cache"))
    assert "404" in fault
