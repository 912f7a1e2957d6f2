"""Reading files of a source: from a real https server or a folder, complete or refused; and training from one."""

import hashlib
import io
import itertools
import re
import ssl
import subprocess
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from unimo3.data import remote as remote_module
from unimo3.data.args import DataArgs
from unimo3.data.remote import check_source, is_remote, receive
from unimo3.data.samples import PretrainSamples
from unimo3.data.tokenizer import load_tokenizer
from unimo3.data.transforms import ImageTransform
from unimo3.errors import DataError

SIZE = 3 * 2**20 + 17  # of a shard: more than three chunks
GB = 10**9
SHARD = "/shards/0.tar"


class Store:
    """An https server: its files, what it answers instead (by path, each once), and how often each was asked for."""

    def __init__(self, certificate: Path | None = None):
        self.files: dict[str, bytes] = {}
        self.instead: dict[str, list] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        self.is_closed = threading.Event()
        self.has_ranges = True
        self.num_parts = 0
        store = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                store.requests[self.path] += 1
                turns = store.instead[self.path]
                turn = turns.pop(0) if turns else None
                if callable(turn):
                    turn()
                content = store.files.get(self.path)
                if isinstance(turn, str):
                    self.send_response(302)
                    self.send_header("Location", turn)
                    self.end_headers()
                elif isinstance(turn, int) or content is None:
                    self.send_error(turn if isinstance(turn, int) else 404)
                else:
                    wanted = self.headers.get("Range", "") if store.has_ranges else ""
                    part = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
                    content = content[int(part[1]) : int(part[2]) + 1] if part else content
                    store.num_parts += part is not None
                    self.send_response(206 if part else 200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    content = turn if isinstance(turn, bytes) else content
                    self.wfile.write(content[: len(content) // 2])
                    if turn == ("stall",):
                        store.is_closed.wait()
                    if turn != ("cut",):
                        self.wfile.write(content[len(content) // 2 :])

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # readers are killed here

        self.server = Server(("localhost", 0), Handler)
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def add(self, name: str, num_bytes: int = SIZE, folder: str = "/shards") -> tuple[str, int, str]:
        """Offer a shard; return the arguments that fetch it."""
        content = np.random.default_rng(len(self.files)).bytes(num_bytes)
        self.files[f"{folder}/{name}"] = content
        return name, num_bytes, hashlib.sha256(content).hexdigest()

    def close(self) -> None:
        self.is_closed.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """A self-signed certificate for localhost and its key, in one file."""
    path = tmp_path_factory.mktemp("certificate") / "localhost.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", f"{path}.key", "-out", path],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + Path(f"{path}.key").read_text())
    return path


@pytest.fixture
def quick(monkeypatch):
    """Pauses between tries that a test can wait for."""
    monkeypatch.setattr(remote_module, "_PAUSES_S", (0.01, 0.01, 0.01, 0.01))


@pytest.fixture(name="store")
def https_store(certificate, quick, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("no_proxy", "localhost")
    store = Store(certificate)
    yield store
    store.close()


def received(where: str, limit: int = GB) -> bytes:
    """The received content of a file, after a check of its size and checksum."""
    file = io.BytesIO()
    assert receive(where, file, limit) == (len(file.getvalue()), hashlib.sha256(file.getvalue()).hexdigest())
    return file.getvalue()


@pytest.fixture
def shard(store) -> str:
    """The URL of a shard, which is answered unchanged unless a test changes that."""
    store.add("0.tar")
    return f"{store.url}{SHARD}"


def test_a_complete_file_replaces_the_old_one_with_size_and_checksum(store, shard):
    content = store.files[SHARD]
    file = io.BytesIO(b"x" * (SIZE + 1))
    assert receive(shard, file, SIZE) == (SIZE, hashlib.sha256(content).hexdigest())
    assert file.getvalue() == content


def test_a_truncated_body_is_requested_again_and_never_accepted(store, shard, caplog):
    store.instead[SHARD] = [("cut",)] * 2
    assert received(shard) == store.files[SHARD]
    assert sum("bytes early; trying again in 0.01 s" in record.getMessage() for record in caplog.records) == 2
    assert store.requests[SHARD] == 3
    store.instead[SHARD] = [("cut",)] * 5
    with pytest.raises(DataError, match=r"0\.tar: the connection ended \d+ bytes early, at the last of 5 tries"):
        received(shard)
    assert store.requests[SHARD] == 3 + 5


@pytest.mark.parametrize(("status", "fix"), [(401, "sends no login"), (403, "sends no login"), (404, "fix the sour")])
def test_errors_that_a_retry_cannot_fix_are_refused_at_once(store, shard, status, fix):
    store.instead[SHARD] = [status]
    with pytest.raises(DataError, match=rf"{shard}: the server answers {status}.*{fix}"):
        received(shard)
    assert store.requests[SHARD] == 1


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_retried_up_to_four_times(store, shard, status, caplog):
    store.instead[SHARD] = [status] * 4
    assert received(shard) == store.files[SHARD]
    assert sum(f"answers {status}" in record.getMessage() for record in caplog.records) == 4
    store.instead[SHARD] = [status] * 5
    with pytest.raises(DataError, match=rf"0\.tar: the server answers {status} .*last of 5 tries"):
        received(shard)
    assert store.requests[SHARD] == 5 + 5


def test_a_server_that_is_gone_is_named_in_the_error(store, shard):
    store.close()
    with pytest.raises(DataError, match=r"Connection refused.*see whether its server or mount works"):
        received(shard)


def test_an_untrusted_certificate_is_refused_at_once(shard, monkeypatch, caplog):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DataError, match=r"certificate is not trusted .*SSL_CERT_FILE"):
        received(shard)
    assert not caplog.records


def test_a_redirect_is_followed_to_https_only(store):
    plain = Store()
    store.add("0.tar", folder="/moved")
    plain.files = store.files
    store.instead[SHARD] = [f"{plain.url}/moved/0.tar?key=secret", "/moved/0.tar", "ftp://localhost/0.tar"]
    with pytest.raises(DataError, match=rf"redirects to {plain.url}/moved/0\.tar\.\.\.; only https") as refused:
        received(f"{store.url}{SHARD}")
    assert "secret" not in str(refused.value)
    assert not plain.requests
    assert received(f"{store.url}{SHARD}") == store.files["/moved/0.tar"]
    with pytest.raises(DataError, match="only https"):
        received(f"{store.url}{SHARD}")
    plain.close()


def test_a_file_that_changes_between_two_tries_is_the_later_one(store, shard):
    store.instead[SHARD] = [("cut",), lambda: store.files.update({SHARD: b"new"})]
    assert received(shard) == b"new"


def test_receiving_ends_once_the_byte_limit_is_passed(store):
    store.files["/shards/index.json"] = bytes(4 * 2**20)
    store.instead["/shards/index.json"] = [("stall",)]
    file = io.BytesIO()
    # The server stalls until the test ends.
    assert receive(f"{store.url}/shards/index.json", file, 1000)[0] > 1000
    assert len(file.getvalue()) <= 1000


@pytest.mark.parametrize("has_ranges", [True, False])
def test_a_part_of_a_file_is_received_alone(store, shard, tmp_path, has_ranges):
    store.has_ranges = has_ranges
    content = store.files[SHARD]
    (tmp_path / "a.tar").write_bytes(content)
    for part in (range(10), range(7, 8), range(100, len(content))):
        expected = content[part.start : part.stop]
        for where in (shard, str(tmp_path / "a.tar")):
            file = io.BytesIO()
            assert receive(where, file, len(part), part) == (len(part), hashlib.sha256(expected).hexdigest())
            assert file.getvalue() == expected
    assert store.num_parts == (3 if has_ranges else 0)
    store.instead[SHARD] = [("cut",)]
    assert receive(shard, io.BytesIO(), 10, range(10))[0] == 10  # at the second try, if there were fewer at the first
    assert receive(shard, io.BytesIO(), 10, range(len(content) - 5, len(content) + 5))[0] == 5


def test_a_file_of_a_mounted_folder_is_received_too(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(SIZE))
    assert received(str(tmp_path / "0.tar")) == bytes(SIZE)
    assert receive(str(tmp_path / "0.tar"), io.BytesIO(), SIZE - 1)[0] > SIZE - 1


@pytest.mark.parametrize("name", ["1.tar", "0.tar/x", "."])
def test_a_file_missing_from_a_mounted_folder_is_refused_without_retry(quick, tmp_path, caplog, name):
    (tmp_path / "0.tar").write_bytes(b"x")
    with pytest.raises(DataError, match=rf"{tmp_path}.*: cannot be read \(.*mount its folder with all of its files"):
        received(str(tmp_path / name))
    assert not caplog.records


def test_a_mount_that_fails_is_tried_again(quick, caplog):
    with pytest.raises(DataError, match=r"cannot be read \(Input/output error\), at the last of 5 tries.*mount works"):
        received("/proc/self/mem")  # Linux gives this error for its first page
    assert len(caplog.records) == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:curl https://host/shards", "pipe: runs a shell"),
        ("PIPE:cat x", "pipe: runs a shell"),
        ("http://host/shards", "http: lets anybody on the way read and change"),
        ("s3://key:secret@bucket/shards", "is no URL of an object store"),
        ("store://bucket/shards", "store: is not read"),
        ("file:///data/shards", "file: is not read"),
        ("https://", "is no URL of a folder"),
        ("https://me:secret@host/shards", "is no URL of a folder"),
        ("https://host/shards?key=secret", "is no URL of a folder"),
        ("https://host/sh\nards", "is no URL of a folder"),
    ],
)
def test_sources_that_are_not_read_are_refused(source, message):
    with pytest.raises(DataError, match=message) as refused:
        check_source(source)
    assert "secret" not in str(refused.value)


def test_urls_are_remote_and_paths_are_not():
    for source in ("https://host/shards", "HTTPS://host:8443/a%20b/", "https://127.0.0.1", "https://[::1]:80/x"):
        check_source(source)
        assert is_remote(source)
    for source in ("s3://bucket", "gs://bucket/shards/coco/", "az://container/shards"):
        check_source(source)
        assert is_remote(source)
    for source in ("shards/coco", "/data/a:b", "./odd:name", "../x"):
        check_source(source)
        assert not is_remote(source)


@pytest.fixture
def remote_coco(coco, store):
    """The store with COCO's training shards and their index."""
    for path in (coco / "train").iterdir():
        store.files[f"/coco/train/{path.name}"] = path.read_bytes()
    return store


def read(data: DataArgs, tokenizer: str, num_steps: int = 5) -> list[list[str]]:
    encoder = load_tokenizer(tokenizer)
    sources = [PretrainSamples(index, encoder, 16, ImageTransform(32), 0.15, 0) for index in data.open_train()]
    loader = data.training_loader(sources, 4, 4, 0, 1, seed=0, start_step=0)
    return [batch["keys"] for (batch,) in itertools.islice(loader, num_steps)]


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 2])
def test_a_remote_source_is_read_as_a_local_one_within_its_bounds(remote_coco, coco, tmp_path, workers):
    tokenizer, limit = str(coco / "tokenizer"), 40_000
    local = DataArgs(train=str(coco / "train"), window_shards=2, num_workers=0)
    remote = DataArgs(
        train=f"{remote_coco.url}/coco/train/",
        window_shards=2,
        num_workers=workers,
        prefetch=1,
        cache_dir=str(tmp_path / "cache"),
        cache_gb=limit / 1e9,
    )
    assert remote.validate()[1:] == []  # the tokenizer is not set
    assert remote.shard_errors("captions") == []
    assert read(remote, tokenizer) == read(local, tokenizer)
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix == ".shard"]
    assert sizes
    assert sum(sizes) <= limit
    assert remote.fingerprint(remote.open_train()) == local.fingerprint(local.open_train())


def test_a_mounted_source_may_go_through_the_cache_too(coco, tmp_path):
    cached = DataArgs(train=str(coco / "train"), num_workers=0, cache_dir=str(tmp_path / "cache"))
    plain = DataArgs(train=str(coco / "train"), num_workers=0)
    assert read(cached, str(coco / "tokenizer")) == read(plain, str(coco / "tokenizer"))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.suffix == ".shard"]) > 1


@pytest.mark.integration
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_not_the_one_indexed_is_refused_by_name(remote_coco, coco, tmp_path, workers):
    for number in range(4):
        name = f"/coco/train/00000{number}.tar"
        content = bytearray(remote_coco.files[name])
        content[len(content) // 2] ^= 1
        remote_coco.files[name] = bytes(content)
    data = DataArgs(
        train=f"{remote_coco.url}/coco/train", num_workers=workers, cache_dir=str(tmp_path / "cache"), cache_gb=1
    )
    with pytest.raises(DataError, match=r"00000\d\.tar: the source.s file is not the one that was indexed") as error:
        read(data, str(coco / "tokenizer"))
    assert "Traceback" not in str(error.value)


def test_urls_that_cannot_be_used_are_errors_of_the_setting(remote_coco, tmp_path):
    def errors_of(source, **settings):
        return DataArgs(train=source, **settings).shard_errors("captions")

    (problem,) = errors_of(f"{remote_coco.url}/coco/train")
    assert "a URL needs a cache; set data.cache_dir and data.cache_gb" in problem
    (problem,) = errors_of("pipe:cat x.tar")
    assert problem.startswith("data.train: ")
    assert "pipe: runs a shell" in problem
    (problem,) = errors_of(f"{remote_coco.url}/nowhere", cache_dir=str(tmp_path / "cache"))
    assert "404" in problem
