"""A real S3 server on loopback, and a proxy in front of it that refuses, cuts answers and records requests."""

import http.client
import logging
import re
import ssl
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "shards"
# moto does not check signatures.
_SIGNED = "AWS4-HMAC-SHA256 Credential=direct/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
URL = f"s3://{BUCKET}"
# Of the test's own: no file of the user's, no request to a cloud's metadata.
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test-key-id",
    "AWS_SECRET_ACCESS_KEY": "test-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "no_proxy": "127.0.0.1",
}


class Refusal(NamedTuple):
    """An answer of S3's with an error."""

    status: int
    code: str

    @property
    def body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>{self.code} as a sentence</Message></Error>".encode()


class Short(NamedTuple):
    """An answer with fewer bytes, of which its header knows."""

    num_bytes: int


class Headers(NamedTuple):
    """An answer in which headers are others."""

    values: dict[str, str]


# Instead of an answer or before it: an error, a short answer, other headers, a cut after so many bytes of the body, a
# call.
Turn = Refusal | Short | Headers | int | Callable[[], object]


class Request(NamedTuple):
    """One that came in; `range` is its header's value."""

    method: str
    key: str
    range: str


class Store:
    """A bucket behind the proxy.

    Attributes:
        instead: turns by method and key, each taken once; those of key ``*`` are for any key.
        always: an answer to every request.
        requests: all that came in.
        signers: the access keys that signed them.
        failures: calls of turns that did not return.
    """

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for each request
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.direct = f"http://{host}:{port}"
        self.instead: dict[tuple[str, str], list[Turn]] = defaultdict(list)
        self.always: Refusal | None = None
        self.requests: list[Request] = []
        self.signers: list[str] = []
        self.failures: list[Turn] = []
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self):
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                key = self.path.partition("?")[0].removeprefix(f"/{BUCKET}").removeprefix("/")
                store.requests.append(Request(self.command, key, self.headers.get("Range", "")))
                store.signers += re.findall("Credential=([^/]*)/", self.headers.get("Authorization", ""))
                turns = store.instead[self.command, key] or store.instead[self.command, "*"]
                turn = store.always or (turns.pop(0) if turns else None)
                if callable(turn):
                    store.failures.append(turn)
                    turn()
                    store.failures.pop()
                if isinstance(turn, Refusal):
                    self._answer(turn.status, {"Content-Type": "application/xml"}, turn.body)
                    return
                connection = http.client.HTTPConnection(host, port)
                connection.request(self.command, self.path, content, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                content = content[: turn.num_bytes] if isinstance(turn, Short) else content
                headers = dict(answer.headers) | (turn.values if isinstance(turn, Headers) else {})
                self._answer(answer.status, headers, content, turn)
                connection.close()

            def _answer(self, status, headers, body, turn=None):
                self.send_response_only(status)
                length = headers.pop("Content-Length", None) if self.command == "HEAD" else None
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[:turn] if isinstance(turn, int) else body)
                self.close_connection = isinstance(turn, int)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _handle

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):
                pass  # clients are killed

        self._make_proxy = lambda address: Server(address, Handler)
        self._proxy = self._make_proxy(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._proxy.server_port}"
        threading.Thread(target=self._proxy.serve_forever, args=(0.02,), daemon=True).start()

    @contextmanager
    def encrypted(self, context: ssl.SSLContext) -> Iterator[str]:
        """The endpoint of a second proxy, of https."""
        proxy = self._make_proxy(("localhost", 0))
        proxy.socket = context.wrap_socket(proxy.socket, server_side=True)
        threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
        yield f"https://localhost:{proxy.server_port}"
        proxy.shutdown()
        proxy.server_close()

    def call(self, method: str, key: str = "", content: bytes | None = None) -> bytes:
        """A request past the proxy."""
        headers = {"Content-Type": "application/octet-stream", "Authorization": _SIGNED}
        request = urllib.request.Request(f"{self.direct}/{BUCKET}/{key}".rstrip("/"), content, headers, method=method)
        with urllib.request.urlopen(request) as response:
            return response.read()

    def put(self, key: str, content: bytes) -> str:
        """Write an object past the proxy; its URL."""
        self.call("PUT", key, content)
        return f"{URL}/{key}"

    def clear(self) -> None:
        """An empty bucket, and no turns."""
        urllib.request.urlopen(urllib.request.Request(f"{self.direct}/moto-api/reset", method="POST")).close()
        self.call("PUT")
        self.instead.clear()
        self.requests.clear()
        self.signers.clear()
        self.failures.clear()
        self.always = None

    def close(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.stop()


@contextmanager
def environment_of(endpoint: str) -> Iterator[None]:
    """What the commands of a test read of the store."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in {**_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        yield


@contextmanager
def connected_again() -> Iterator[None]:
    """Let this process read the environment and the files of the credentials again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unimo3.object_store._open", {})
        yield


@pytest.fixture(scope="module")
def s3_server() -> Iterator[Store]:
    store = Store()
    with environment_of(store.endpoint), connected_again():
        yield store
    store.close()


@pytest.fixture
def s3(s3_server, monkeypatch) -> Iterator[Store]:
    """An empty bucket of `URL`, with pauses between tries that a test can wait for."""
    for module in ("unimo3.object_store.PAUSES_S", "unimo3.data.remote._PAUSES_S"):
        monkeypatch.setattr(module, (0.01,) * 4)
    s3_server.clear()
    yield s3_server
    assert not s3_server.failures
