"""Objects of a real S3 server: read in ranges, listed and written, through throttling, cuts, changes and refusals."""

import logging
import os
import ssl
import sys
import threading

import numpy as np
import pytest

from tests.data.test_remote import certificate  # noqa: F401  (a fixture)
from tests.s3 import URL, Headers, Refusal, Short, connected_again, s3, s3_server  # noqa: F401  (two are fixtures)
from tests.spawn import start_process
from tests.waiting import PATIENCE_S, wait_for_end
from unimo3 import object_store
from unimo3.errors import UnreachableError, exit_with_status
from unimo3.object_store import ObjectChangedError, StoredObject, StoreError, check_url, is_store

CHUNK = 2**16
SIZE = 3 * CHUNK + 17


def content_of(seed: int, num_bytes: int = SIZE) -> bytes:
    return np.random.default_rng(seed).bytes(num_bytes)


@pytest.fixture
def url(s3) -> str:  # noqa: F811
    """Of an object of four ranges."""
    return s3.put("folder/0.tar", content_of(0))


def read(url: str) -> bytes:
    return b"".join(object_store.read(url, CHUNK))


def ranges(store) -> list[str]:
    return [request.range for request in store.requests if request.range]


def test_an_object_is_read_in_ranges(s3, url):  # noqa: F811
    assert read(url) == content_of(0)
    ends = [(start, min(start + CHUNK, SIZE) - 1) for start in range(0, SIZE, CHUNK)]
    assert ranges(s3) == [f"bytes={start}-{end}" for start, end in ends]
    assert read(s3.put("empty", b"")) == b""


def test_ranges_in_parallel_come_in_order_and_no_more_than_asked_for(s3, url):  # noqa: F811
    together = threading.Barrier(3, timeout=PATIENCE_S)
    s3.instead["GET", "folder/0.tar"] = [together.wait] * 3 + [Refusal(503, "SlowDown")]
    chunks = object_store.read(url, CHUNK, num_parallel=3)
    first = next(chunks)
    assert len(ranges(s3)) == 3
    assert first + b"".join(chunks) == content_of(0)
    assert len(set(ranges(s3))) == 4
    s3.requests.clear()
    assert b"".join(object_store.read(url, CHUNK, 3, range(2 * CHUNK, sys.maxsize))) == content_of(0)[2 * CHUNK :]
    assert len(ranges(s3)) == 2
    s3.instead["GET", "folder/0.tar"] = [Refusal(403, "AccessDenied")]
    with pytest.raises(StoreError, match="access is denied"):
        list(object_store.read(url, CHUNK, num_parallel=3))
    s3.instead["GET", "folder/0.tar"] = [lambda: s3.put("folder/0.tar", content_of(1))]
    with pytest.raises(ObjectChangedError):
        list(object_store.read(url, CHUNK, num_parallel=3))


def test_a_small_object_takes_two_requests(s3):  # noqa: F811
    assert read(s3.put("small", b"x" * CHUNK)) == b"x" * CHUNK
    assert [request.method for request in s3.requests] == ["HEAD", "GET"]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (Refusal(503, "SlowDown"), "SlowDown as a sentence"),
        (Refusal(500, "InternalError"), "InternalError as a sentence"),
        (Refusal(429, "TooManyRequests"), "TooManyRequests as a sentence"),
        (Refusal(400, "RequestTimeout"), "RequestTimeout as a sentence"),
        (CHUNK // 2, "payload"),
        (Short(CHUNK // 2), f"the answer ended {CHUNK // 2} bytes early"),
    ],
)
def test_only_the_range_that_failed_is_requested_again(s3, url, turn, message, caplog):  # noqa: F811
    key = "folder/0.tar"
    s3.instead["GET", key] = [lambda: None, turn, turn]
    assert read(url) == content_of(0)
    assert len(ranges(s3)) == 4 + 2
    assert ranges(s3)[1] == ranges(s3)[2] == ranges(s3)[3]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all(message in line and line.endswith("trying again in 0.01 s") for line in warnings)
    s3.requests.clear()
    s3.instead["GET", key] = [turn] * 5
    with pytest.raises(UnreachableError, match=r"0\.tar: .*, at the last of 5 tries; see whether the store works"):
        read(url)
    assert len(ranges(s3)) == 5


def test_a_throttled_first_request_is_tried_again(s3, url):  # noqa: F811
    s3.instead["HEAD", "folder/0.tar"] = [Refusal(503, "SlowDown")] * 4
    assert read(url) == content_of(0)


def test_a_store_that_is_gone_is_unreachable(s3, url, monkeypatch):  # noqa: F811
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with connected_again(), pytest.raises(UnreachableError, match=r"Could not connect.*at the last of 5 tries"):
        read(url)


@pytest.mark.parametrize("num_bytes", [SIZE, CHUNK + 5, 2 * SIZE])
@pytest.mark.parametrize("before_range", [1, 3])
def test_an_object_replaced_between_two_ranges_is_noticed(s3, url, num_bytes, before_range):  # noqa: F811
    content = content_of(1, num_bytes)
    replace = [lambda: None] * before_range + [lambda: s3.put("folder/0.tar", content)]
    s3.instead["GET", "folder/0.tar"] = replace
    with pytest.raises(ObjectChangedError, match="was replaced while it was read"):
        read(url)
    assert read(url) == content


@pytest.mark.parametrize(
    ("code", "status", "fix"),
    [
        ("ExpiredToken", 400, r"the credentials expired \(ExpiredToken as a sentence\); renew them \(AWS_PROFILE"),
        ("InvalidAccessKeyId", 403, "does not accept the credentials .*AWS_PROFILE"),
        ("SignatureDoesNotMatch", 403, "does not accept the credentials .*AWS_PROFILE"),
        ("AccessDenied", 403, "access is denied"),
        ("MethodNotAllowed", 405, "the store answers 405 .*fix the URL, the region or the endpoint"),
    ],
)
def test_what_another_try_cannot_fix_is_refused_with_a_fix(s3, url, code, status, fix, caplog):  # noqa: F811
    s3.always = Refusal(status, code)
    for call in (lambda: read(url), lambda: object_store.put_bytes(b"x", url), lambda: object_store.list_objects(URL)):
        s3.requests.clear()
        with pytest.raises(StoreError, match=fix) as refused:
            call()
        assert "test-secret" not in str(refused.value)
        assert len(s3.requests) <= 3 * (1 + (code == "ExpiredToken"))  # also with credentials that are read again
    assert not [record for record in caplog.records if "trying again" in record.getMessage()]


@pytest.mark.parametrize("missing", [f"{URL}/none", f"{URL}/folder", "s3://no-such-bucket/0.tar"])
def test_an_object_or_bucket_that_does_not_exist_is_refused(s3, url, missing):  # noqa: F811
    with pytest.raises(StoreError, match=r"no such bucket or object .*; fix the URL"):
        read(missing)


def test_missing_credentials_are_refused_before_a_request(s3, url, monkeypatch):  # noqa: F811
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with connected_again(), pytest.raises(StoreError, match=r"no usable credentials .*; set them"):
        read(url)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with connected_again(), pytest.raises(StoreError, match=r"no usable credentials .*nobody.*; set them"):
        read(url)
    assert not s3.requests


def test_expired_credentials_are_read_again_once(s3, url, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "credentials"
    path.write_text("[default]\naws_access_key_id = old\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    renewed = path.read_text().replace("old", "new")
    s3.instead["GET", "folder/0.tar"] = [lambda: path.write_text(renewed), Refusal(400, "ExpiredToken")]
    with connected_again():
        assert read(url) == content_of(0)
    assert list(dict.fromkeys(s3.signers)) == ["old", "new"]


def test_a_package_that_is_not_installed_is_named():
    for url, package in (("gs://bucket/x", "pip install gcsfs"), ("az://bucket/x", "pip install adlfs")):
        with pytest.raises(StoreError, match=f"{url}: its package is not installed .*{package}"):
            object_store.look_up(url)


def test_an_untrusted_certificate_is_refused_at_once(s3, url, certificate, monkeypatch, caplog):  # noqa: F811
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with s3.encrypted(context) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with connected_again(), pytest.raises(StoreError, match=r"certificate is not trusted .*AWS_CA_BUNDLE"):
            read(url)
        assert not caplog.records
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        with connected_again():
            assert read(url) == content_of(0)


def test_written_objects_are_listed_with_their_size_and_version(s3, tmp_path):  # noqa: F811
    (tmp_path / "file").write_bytes(content_of(2))
    put = object_store.put_file(tmp_path / "file", f"{URL}/a/b/0.tar")
    other = object_store.put_bytes(b"{}", f"{URL}/a/index.json")
    object_store.put_bytes(b"x", f"{URL}/ab/index.json")
    assert object_store.list_objects(f"{URL}/a") == {"b/0.tar": put, "index.json": other}
    assert object_store.list_objects(f"{URL}/a/") == {"b/0.tar": put, "index.json": other}
    assert put == object_store.look_up(f"{URL}/a/b/0.tar") == StoredObject(SIZE, put.identity)
    assert other.identity != put.identity
    assert read(f"{URL}/a/b/0.tar") == content_of(2)
    for _ in range(2):
        object_store.delete(f"{URL}/a/b/0.tar")
    assert list(object_store.list_objects(f"{URL}/a")) == ["index.json"]
    assert object_store.list_objects(f"{URL}/nothing") == {}
    # By another program.
    s3.put("a/index.json", b"{ }")
    s3.put("a/new", b"x")
    assert object_store.list_objects(f"{URL}/a").keys() == {"index.json", "new"}
    assert object_store.look_up(f"{URL}/a/index.json").num_bytes == 3


def test_a_write_that_fails_is_tried_again(s3, tmp_path):  # noqa: F811
    (tmp_path / "file").write_bytes(content_of(2))
    s3.instead["PUT", "0.tar"] = [Refusal(503, "SlowDown"), Refusal(400, "BadDigest")]
    object_store.put_file(tmp_path / "file", f"{URL}/0.tar")
    assert read(f"{URL}/0.tar") == content_of(2)
    with pytest.raises(FileNotFoundError):
        object_store.put_file(tmp_path / "none", f"{URL}/0.tar")


OTHER_ETAG = Headers({"ETag": f'"{"0" * 32}"'})
OF_A_KEY = Headers({**OTHER_ETAG.values, "x-amz-server-side-encryption": "aws:kms"})


def test_a_stored_object_that_is_not_the_one_that_was_sent_is_sent_again(s3, tmp_path, caplog):  # noqa: F811
    (tmp_path / "file").write_bytes(content_of(2))
    for put in (
        lambda: object_store.put_file(tmp_path / "file", f"{URL}/0.tar"),
        lambda: object_store.put_bytes(content_of(2), f"{URL}/0.tar"),
    ):
        damage = [lambda: s3.put("0.tar", content_of(3))]
        s3.instead["HEAD", "0.tar"] = list(damage)
        caplog.clear()
        s3.requests.clear()
        put()
        assert "the object is not what was sent; trying again" in caplog.text
        assert [request.method for request in s3.requests].count("PUT") == 2
        assert s3.call("GET", "0.tar") == content_of(2)
    s3.instead["HEAD", "0.tar"] = [turn for _ in range(5) for turn in (*damage, lambda: None)]
    with pytest.raises(UnreachableError, match="the object is not what was sent, at the last of 5 tries"):
        put()


@pytest.mark.parametrize(("turn", "num_read"), [(OTHER_ETAG, 1), (OF_A_KEY, 0)])
def test_an_etag_that_is_no_checksum_refuses_nothing(s3, turn, num_read):  # noqa: F811
    s3.instead["HEAD", "0.tar"] = [turn, turn]
    object_store.put_bytes(content_of(2), f"{URL}/0.tar")
    assert [request.method for request in s3.requests] == ["PUT", "HEAD", "HEAD"] + ["GET"] * num_read


def read_in_all(url: str, content: bytes) -> None:
    """Read in this process, then in two forks of it, and again here while they read."""
    assert read(url) == content
    children = []
    for _ in range(2):
        if not (pid := os.fork()):
            os._exit(0 if all(read(url) == content for _ in range(3)) else 1)
        children.append(pid)
    assert all(read(url) == content for _ in range(5))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    assert read(url) == content


@pytest.mark.integration
def test_forked_processes_and_their_parent_read_at_once(s3, url):  # noqa: F811
    process = start_process(read_in_all, url, content_of(0))
    wait_for_end(process, "the reader")
    assert process.exitcode == 0


def test_threads_share_a_store(s3, url):  # noqa: F811
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(read(url) == content_of(0))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://key:secret@bucket/x", "is no URL of an object store"),
        ("s3://secret@bucket/x", "is no URL of an object store"),
        ("s3://bucket/x?versionId=secret", "is no URL of an object store"),
        ("s3://bucket/x#secret", "is no URL of an object store"),
        ("s3://bucket/a/../x", "is no URL of an object store"),
        ("s3://bucket//x", "is no URL of an object store"),
        ("s3://", "is no URL of an object store"),
        ("s3://bucket/x\ny", "is no URL of an object store"),
        ("s3://bucket/x::zip", "is no URL of an object store"),
        ("store://bucket/x", "store: is not read by this program"),
    ],
)
def test_urls_with_more_than_a_bucket_and_a_path_are_refused(url, message):
    with pytest.raises(StoreError, match=message) as refused:
        check_url(url)
    assert "secret" not in str(refused.value)


def test_urls_of_stores_differ_from_paths_and_other_urls():
    for url in ("s3://bucket", "s3://my.bucket-1/a b/c/", "gs://b/x", "az://container/x", "hf://datasets/a/b"):
        assert is_store(url)
        check_url(url)
    for source in ("https://host/x", "http://host/x", "file:///x", "memory://x", "zip://x", "pipe:cat x", "/a", "a:b"):
        assert not is_store(source)


def test_an_error_of_a_store_ends_a_program_with_its_status(s3, url, capsys, monkeypatch):  # noqa: F811
    for turns, status in (([Refusal(503, "SlowDown")] * 5, 1), ([Refusal(400, "ExpiredToken")] * 9, 78)):
        s3.instead["HEAD", "folder/0.tar"] = list(turns)
        s3.instead["GET", "folder/0.tar"] = list(turns)
        with pytest.raises(SystemExit) as end:
            exit_with_status(lambda: read(url) and None)()
        assert end.value.code == status
