"""Local copies of shards: from a real https server, by real processes, complete or refused, within their limit."""

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tests.data.test_remote import GB, SIZE, certificate, https_store, quick  # noqa: F401  (three are fixtures)
from tests.spawn import start_process
from tests.waiting import PATIENCE_S, wait_for, wait_for_end
from unimo3.data.cache import ShardCache
from unimo3.errors import DataError


@pytest.fixture
def open_cache(store, tmp_path):
    """Make a cache over the store, or over another source, in one folder."""

    def make(source: str = "", limit_bytes: int = GB) -> ShardCache:
        return ShardCache(source or f"{store.url}/shards", tmp_path / "cache", limit_bytes)

    return make


def files_in(cache: ShardCache) -> list[str]:
    """Copies and parts in the cache's folder."""
    if not cache.folder.is_dir():
        return []
    return sorted(path.name for path in cache.folder.iterdir() if path.suffix != ".lock")


def make_old(path: Path, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(path, (then, then))


def end_well(processes) -> None:
    for process in processes:
        wait_for_end(process, "a reader")
    assert [process.exitcode for process in processes] == [0] * len(processes)


def fetch_all(cache: ShardCache, shards, contents) -> None:
    """What a reader process does with each shard."""
    for shard, content in zip(shards, contents, strict=True):
        descriptor = cache.open(*shard)
        assert os.pread(descriptor, len(content) + 1, 0) == content
        os.close(descriptor)


def test_a_shard_is_fetched_once_and_then_read_from_the_cache(store, open_cache, caplog):
    shard = store.add("000000.tar")
    with caplog.at_level(logging.INFO, "unimo3.data.cache"):
        path = open_cache().path(*shard)
    assert path.read_bytes() == store.files["/shards/000000.tar"]
    assert open_cache().path(*shard) == open_cache(f"{store.url}/shards/").path(*shard) == path
    assert store.requests == {"/shards/000000.tar": 1}
    assert files_in(open_cache()) == [path.name]
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"fetched {store.url}/shards/000000.tar: 3.1 MB in ")


def test_names_are_quoted_in_the_url(store, open_cache):
    shard = store.add("a%20b%3F%25.tar")
    assert open_cache().path("a b?%.tar", *shard[1:]).is_file()


@pytest.mark.integration
def test_processes_that_want_the_same_shards_fetch_each_once(store, open_cache):
    shards = [store.add(f"{number:06d}.tar") for number in range(4)]
    contents = list(store.files.values())
    end_well([start_process(fetch_all, open_cache(), shards, contents) for _ in range(5)])
    assert store.requests == dict.fromkeys(store.files, 1)
    assert files_in(open_cache()) == sorted(f"{sha256}.shard" for _, _, sha256 in shards)


@pytest.mark.integration
def test_different_shards_are_fetched_concurrently(store, open_cache):
    meeting = threading.Barrier(2, timeout=PATIENCE_S)
    shards = [store.add(f"{number}.tar") for number in range(2)]
    for path in store.files:
        store.instead[path] = [meeting.wait]  # neither is answered before both are asked for
    end_well([start_process(fetch_all, open_cache(), [s], [store.files[f"/shards/{s[0]}"]]) for s in shards])
    assert not meeting.broken


def test_the_least_recently_used_copy_is_removed_first(store, open_cache):
    cache = open_cache(limit_bytes=3 * SIZE)
    a, b, c, d, e = (store.add(name) for name in "abcde")
    for age_s, shard in ((30, a), (20, b), (10, c)):
        make_old(cache.path(*shard), age_s)
    cache.path(*a)
    for new, remaining in ((d, (a, c, d)), (e, (a, d, e))):
        cache.path(*new)
        assert files_in(cache) == sorted(f"{sha256}.shard" for _, _, sha256 in remaining)
    assert store.requests["/shards/a"] == 1
    cache.path(*b)
    assert store.requests["/shards/b"] == 2


def test_only_as_many_copies_are_removed_as_a_new_one_needs(store, open_cache):
    cache = open_cache(limit_bytes=1000)
    old, older = store.add("old", 400), store.add("older", 500)
    make_old(cache.path(*older), 20)
    make_old(cache.path(*old), 10)
    cache.path(*store.add("exact", 100))
    assert len(files_in(cache)) == 3
    cache.path(*store.add("more", 101))
    assert f"{older[2]}.shard" not in files_in(cache)
    assert len(files_in(cache)) == 3


def test_sources_have_one_limit_and_separate_copies(store, open_cache):
    one, other = open_cache(limit_bytes=2 * SIZE), open_cache(f"{store.url}/others", limit_bytes=2 * SIZE)
    first, second, third = store.add("0.tar"), store.add("0.tar", folder="/others"), store.add("1.tar")
    make_old(one.path(*first), 20)
    assert other.path(*second).read_bytes() == store.files["/others/0.tar"]
    assert one.path(*first).read_bytes() == store.files["/shards/0.tar"]
    make_old(other.path(*second), 20)
    one.path(*third)
    assert files_in(one) == sorted(f"{sha256}.shard" for _, _, sha256 in (first, third))


def test_a_new_shard_of_the_same_name_and_size_is_fetched_again(store, open_cache):
    open_cache().path(*store.add("0.tar"))
    again = store.add("0.tar")
    assert open_cache().path(*again).read_bytes() == store.files["/shards/0.tar"]
    assert store.requests["/shards/0.tar"] == 2


def test_files_that_do_not_belong_to_the_cache_stay(store, open_cache):
    cache = open_cache(limit_bytes=SIZE)
    cache.folder.mkdir()
    for name in ("thesis.shard", "notes.txt", f"{'0' * 63}.shard", "0.1.part"):
        (cache.folder / name).write_bytes(b"mine")
        make_old(cache.folder / name, 1000)
    for name in "ab":
        cache.path(*store.add(name))
    assert len(files_in(cache)) == 5


@pytest.mark.integration
def test_the_limit_applies_while_processes_fetch_different_shards(store, open_cache):
    cache = open_cache(limit_bytes=2 * SIZE)
    shards = [store.add(f"{number}.tar") for number in range(8)]
    contents = list(store.files.values())
    has_part = threading.Event()
    store.instead["/shards/0.tar"] = [lambda: has_part.wait(PATIENCE_S)]  # a fetch that is seen under way
    processes = [start_process(fetch_all, cache, shards[k::4] * 2, contents[k::4] * 2) for k in range(4)]
    most, most_parts = 0, 0
    wait_for(cache.folder.is_dir, "the cache's folder")

    def look_until_all_ended() -> bool:
        nonlocal most, most_parts
        with FileLock(cache.folder / "room.lock"):  # else a listing may show what never was there at once
            names = [name.split(".") for name in files_in(cache)]
        parts = [int(announced) for _, announced, *rest in names if rest]
        most = max(most, sum(parts) + SIZE * (len(names) - len(parts)))
        most_parts = max(most_parts, len(parts))
        if parts:
            has_part.set()
        return not any(process.is_alive() for process in processes)

    wait_for(look_until_all_ended, "the end of the readers", poll_s=0.002)
    end_well(processes)
    assert 0 < most <= cache.limit_bytes
    assert most_parts >= 1
    assert len(files_in(cache)) == 2


@pytest.mark.integration
def test_a_fetch_waits_for_space_that_another_fetch_uses(store, open_cache):
    cache = open_cache(limit_bytes=SIZE)
    a, b = store.add("a"), store.add("b")
    answer = threading.Event()
    store.instead["/shards/a"] = [lambda: answer.wait(PATIENCE_S)]
    first = start_process(fetch_all, cache, [a], [store.files["/shards/a"]])
    wait_for(lambda: store.requests["/shards/a"], "the first request")
    second = start_process(fetch_all, cache, [b], [store.files["/shards/b"]])
    time.sleep(0.3)  # an early request would come within this; a slow machine may miss it, but never fails wrongly
    assert store.requests["/shards/b"] == 0
    assert files_in(cache) == [f"{a[2]}.{SIZE}.part"]
    answer.set()
    end_well([first, second])
    # The second may remove the first's copy before the first has opened it; the first then fetches it again.
    last = b if store.requests["/shards/a"] == 1 else a
    assert files_in(cache) == [f"{last[2]}.shard"]
    assert store.requests["/shards/b"] == 1


def test_an_open_copy_stays_readable_when_it_is_removed(store, open_cache):
    cache = open_cache(limit_bytes=SIZE)
    a, b = store.add("a"), store.add("b")
    descriptor = cache.open(*a)
    cache.path(*b)
    assert files_in(cache) == [f"{b[2]}.shard"]
    assert os.pread(descriptor, SIZE + 1, 0) == store.files["/shards/a"]
    os.close(descriptor)


def test_open_asks_again_when_the_copy_was_removed_meanwhile(store, open_cache, monkeypatch):
    cache = open_cache()
    shard = store.add("a")
    path_of, removed = cache.path, []

    def path_then_removed(*args):
        path = path_of(*args)
        if not removed:
            removed.append(path.unlink())
        return path

    monkeypatch.setattr(cache, "path", path_then_removed)
    descriptor = cache.open(*shard)
    assert os.fstat(descriptor).st_size == SIZE
    os.close(descriptor)
    assert store.requests["/shards/a"] == 2


def flipped(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def test_a_flipped_byte_causes_one_retry_and_then_an_error(store, open_cache):
    shard = store.add("0.tar")
    bad = flipped(store.files["/shards/0.tar"])
    store.instead["/shards/0.tar"] = [bad]
    good = open_cache().path(*shard)
    assert good.read_bytes() == store.files["/shards/0.tar"]
    good.unlink()
    store.files["/shards/0.tar"] = bad
    with pytest.raises(DataError, match=r"0\.tar: the source's file is not the one that was indexed: .*index it"):
        open_cache().path(*shard)
    assert store.requests["/shards/0.tar"] == 4
    assert files_in(open_cache()) == []


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content * 2])
def test_a_file_of_another_size_is_refused(store, open_cache, change):
    shard = store.add("0.tar")
    store.files["/shards/0.tar"] = change(store.files["/shards/0.tar"])
    with pytest.raises(DataError, match="not the one that was indexed"):
        open_cache().path(*shard)
    assert store.requests["/shards/0.tar"] == 2
    assert files_in(open_cache()) == []


def test_a_fetch_that_fails_leaves_no_part(store, open_cache):
    shard = store.add("0.tar")
    store.instead["/shards/0.tar"] = [("cut",)] * 5
    with pytest.raises(DataError, match=r"0\.tar: .*, at the last of 5 tries"):
        open_cache().path(*shard)
    assert files_in(open_cache()) == []
    assert open_cache().path(*shard).read_bytes() == store.files["/shards/0.tar"]


def test_a_truncated_copy_in_the_cache_is_replaced(store, open_cache):
    shard = store.add("0.tar")
    path = open_cache().path(*shard)
    os.truncate(path, SIZE - 1)
    assert open_cache().path(*shard).read_bytes() == store.files["/shards/0.tar"]
    assert files_in(open_cache()) == [path.name]


@pytest.mark.integration
def test_a_process_killed_during_a_fetch_blocks_nothing(store, open_cache):
    cache = open_cache(limit_bytes=2 * SIZE)
    shard, other = store.add("0.tar"), store.add("1.tar")
    store.instead["/shards/0.tar"] = [("stall",), ("stall",)]
    part = cache.folder / f"{shard[2]}.{SIZE}.part"
    for wanted in (other, shard):
        process = start_process(cache.path, *shard)
        wait_for(lambda: part.is_file() and part.stat().st_size, "the event of the test")
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert part.is_file()
        assert cache.path(*wanted).read_bytes() == store.files[f"/shards/{wanted[0]}"]
        assert not part.exists()
    assert files_in(cache) == sorted(f"{sha256}.shard" for _, _, sha256 in (shard, other))


@pytest.mark.integration
def test_a_part_that_is_still_being_written_is_not_a_leftover(store, open_cache):
    cache = open_cache()
    shard, other = store.add("0.tar"), store.add("1.tar")
    answer = threading.Event()
    store.instead["/shards/0.tar"] = [lambda: answer.wait(PATIENCE_S)]
    process = start_process(fetch_all, cache, [shard], [store.files["/shards/0.tar"]])
    wait_for(lambda: store.requests["/shards/0.tar"], "the event of the test")
    cache.path(*other)
    assert f"{shard[2]}.{SIZE}.part" in files_in(cache)
    answer.set()
    end_well([process])
    assert store.requests["/shards/0.tar"] == 1


def test_a_mounted_folder_is_a_source_too(store, open_cache, tmp_path):
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    shard = store.add("0.tar")
    (mounted / "0.tar").write_bytes(store.files["/shards/0.tar"])
    (mounted / "index.json").write_text("{}")
    cache = open_cache(str(mounted))
    assert cache.read("index.json", 2) == b"{}"
    path = cache.path(*shard)
    assert path.parent == cache.folder
    (mounted / "0.tar").unlink()
    assert cache.path(*shard).read_bytes() == store.files["/shards/0.tar"]
    path.unlink()
    with pytest.raises(DataError, match=rf"{mounted}/0\.tar: cannot be read \(No such file.*mount its folder"):
        cache.path(*shard)
    (mounted / "0.tar").write_bytes(flipped(store.files["/shards/0.tar"]))
    with pytest.raises(DataError, match="not the one that was indexed"):
        cache.path(*shard)
    assert files_in(cache) == []


def test_small_files_are_read_up_to_a_limit_and_not_cached(store, open_cache):
    store.files["/shards/index.json"] = b"x" * 100
    store.instead["/shards/index.json"] = [("cut",)]
    assert open_cache().read("index.json", 100) == b"x" * 100
    assert open_cache().read("index.json", 100) == b"x" * 100
    assert store.requests["/shards/index.json"] == 3
    with pytest.raises(DataError, match=r"index\.json: has more than 99 bytes"):
        open_cache().read("index.json", 99)
    assert files_in(open_cache()) == []


def test_a_limit_below_one_shard_names_the_setting_and_what_is_needed(store, open_cache):
    shard = store.add("0.tar")
    with pytest.raises(DataError, match=rf"data\.cache_gb: 0\.002: .*0\.tar alone has {SIZE} bytes; .*least 0\.004"):
        open_cache(limit_bytes=2 * 10**6).path(*shard)
    assert not store.requests
    assert open_cache(limit_bytes=SIZE).path(*shard).is_file()


def test_a_folder_that_cannot_be_written_is_named(store, open_cache, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=rf"{tmp_path}/cache: the cache cannot be written \(.*\); free space"):
        open_cache().path(*store.add("0.tar"))


def test_a_source_that_is_not_accepted_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(DataError, match="pipe: runs a shell"):
        ShardCache("pipe:curl https://host/shards", tmp_path / "cache", GB)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "..", ".", "", "a\0b", "..\\x", "\ud800"])
def test_names_that_could_lie_outside_the_source_are_refused(store, open_cache, tmp_path, name):
    for cache in (open_cache(), open_cache(str(tmp_path))):
        with pytest.raises(DataError, match="could lie outside it"):
            cache.path(name, 1, "0" * 64)
        with pytest.raises(DataError, match="could lie outside it"):
            cache.read(name, 100)
    assert not store.requests


@pytest.mark.parametrize("sha256", ["", "../" * 21 + "x", "F" * 64, "0" * 63])
def test_a_checksum_of_another_form_is_refused(store, open_cache, sha256):
    with pytest.raises(DataError, match="for its sha256; index it again"):
        open_cache().path("0.tar", 1, sha256)
    assert not store.requests
