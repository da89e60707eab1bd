"""What KuboStore makes of answers that the daemon in tests/interop does not give: Kubo's own dialect, old versions,
a full repository, lies, and servers that are no Kubo at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from p2pflock.errors import DiskFullError, EnvironmentError_, InvalidMessageError, UnavailableError
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID, DAG_CBOR, DAG_PB, RAW
from p2pflock.storage.kubo import KuboStore

Query = dict[str, str]
Answer = tuple[int, object]

pytestmark = pytest.mark.filterwarnings("ignore:The 'strict' parameter:FutureWarning")
VERSION = {"Version": "0.32.1", "Golang": "go1.23", "System": "amd64/linux"}
CODECS = {"raw": RAW, "dag-pb": DAG_PB, "dag-cbor": DAG_CBOR}


def refusal(text: str) -> Answer:
    return 500, {"Message": text, "Code": 0, "Type": "error"}


class Daemon:
    """Answers as the functions in `calls` say; by default as Kubo's block commands do."""

    def __init__(self) -> None:
        self.blocks: dict[str, bytes] = {}
        self.pinned: set[str] = set()
        self.seen: list[tuple[str, Query]] = []
        self.calls: dict[str, Callable[[Query, bytes], Answer]] = {
            "version": lambda query, body: (200, VERSION),
            "block/put": self.put,
            "block/get": lambda query, body: self.lookup(query, lambda data: data),
            "block/stat": lambda query, body: self.lookup(query, lambda d: {"Key": query["arg"], "Size": len(d)}),
            "pin/add": self.pin,
            "pin/rm": self.unpin,
            "pin/ls": lambda query, body: (200, {"Keys": {name: {"Type": "recursive"} for name in self.pinned}}),
        }

    def put(self, query: Query, body: bytes) -> Answer:
        if "format" in query:
            return refusal('unable to use "format" (deprecated) and a custom "cid-codec" at the same time')
        cid = str(CID.of(CODECS[query["cid-codec"]], body))
        self.blocks[cid] = body
        return 200, {"Key": cid, "Size": len(body)}

    def lookup(self, query: Query, make: Callable[[bytes], object]) -> Answer:
        if query.get("offline") != "true":
            return refusal("would have asked the whole IPFS network")
        data = self.blocks.get(query["arg"])
        return refusal("block was not found locally (offline): ipld: could not find") if data is None else (200, make(data))

    def pin(self, query: Query, body: bytes) -> Answer:
        self.pinned.add(query["arg"])
        return 200, {"Pins": [query["arg"]]}

    def unpin(self, query: Query, body: bytes) -> Answer:
        if query["arg"] not in self.pinned:
            return refusal("not pinned or pinned indirectly")
        self.pinned.discard(query["arg"])
        return 200, {"Pins": [query["arg"]]}


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def address(daemon: Daemon) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(url.query).items()}
            name = url.path.removeprefix("/api/v0/")
            daemon.seen.append((name, query))
            status, answer = daemon.calls[name](query, self.read_part())
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream" if data is answer else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def read_part(self) -> bytes:
            """The body of the one part of a chunked multipart request."""
            body = b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            if not body:
                return b""
            boundary = body[: body.index(b"\r\n")]
            return body[body.index(b"\r\n\r\n") + 4 : body.rindex(b"\r\n" + boundary)]

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"/ip4/127.0.0.1/tcp/{server.server_port}/http"
    server.shutdown()
    thread.join()
    server.server_close()


def test_kubos_own_dialect(daemon: Daemon, address: str) -> None:
    from p2pflock.testing.conformance_storage import check_blob_store

    check_blob_store(lambda: KuboStore(address))
    assert not any("format" in query for _, query in daemon.seen)


def test_dialect_is_learnt_once(daemon: Daemon, address: str) -> None:
    def put(query: Query, body: bytes) -> Answer:  # js-ipfs: `cid-codec` is ignored
        return 200, {"Key": str(CID.of(CODECS[query.get("format", "dag-pb")], body)), "Size": len(body)}

    daemon.calls["block/put"] = put
    store = KuboStore(address)
    for data in (b"1", b"2", b"3"):
        store.put(CID.of_raw(data), data)
    block = dagcbor.encode([1])
    store.put(CID.of_dag_cbor(block), block)
    assert sum(name == "block/put" for name, _ in daemon.seen) == 5


def test_another_id_is_refused(daemon: Daemon, address: str) -> None:
    daemon.calls["block/put"] = lambda query, body: (200, {"Key": "QmWrong", "Size": 1})
    with pytest.raises(EnvironmentError_, match="QmWrong"):
        KuboStore(address).put(CID.of_raw(b"x"), b"x")
    with pytest.raises(InvalidMessageError):
        KuboStore(address).put(CID.of_raw(b"x"), b"y")


def test_bytes_that_do_not_hash_to_their_id(daemon: Daemon, address: str) -> None:
    cid = CID.of_raw(b"x")
    daemon.blocks[str(cid)] = b"y"
    with pytest.raises(UnavailableError, match="other bytes"):
        KuboStore(address).get(cid)


def test_full_repository(daemon: Daemon, address: str) -> None:
    for text in ("write /data/blocks/x: no space left on device", "maximum storage limit exceeded"):
        daemon.calls["block/put"] = daemon.calls["add"] = lambda query, body, text=text: refusal(text)
        store = KuboStore(address)
        for act in (lambda: store.put(CID.of_raw(b"x"), b"x"), lambda: store.add_file(b"x")):
            with pytest.raises(DiskFullError) as caught:
                act()
            assert caught.value.hint


def test_files_cut_in_another_way_are_noticed(daemon: Daemon, address: str) -> None:
    other = str(CID.of_raw(b"other"))
    daemon.calls["add"] = lambda query, body: (200, {"Name": "f", "Hash": other, "Size": "1"})
    with pytest.raises(EnvironmentError_, match="Import"):
        KuboStore(address).add_file(b"x")
    query = dict(daemon.seen)["add"]
    wanted = {"cid-version": "1", "raw-leaves": "true", "chunker": "size-262144", "cid-base": "base32", "pin": "true"}
    assert {name: query[name].lower() for name in wanted} == wanted


def test_pins_of_other_kinds_are_passed_over(daemon: Daemon, address: str) -> None:
    mine = CID.of_raw(b"x")
    daemon.pinned = {str(mine), "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG"}
    assert list(KuboStore(address).pins()) == [mine]


def test_refused_unpin(daemon: Daemon, address: str) -> None:
    daemon.calls["pin/rm"] = lambda query, body: refusal("pinner: lock\nheld")
    with pytest.raises(EnvironmentError_, match="pinner: lock") as caught:
        KuboStore(address).unpin(CID.of_raw(b"x"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("version", ["0.4.23", "0.13.0"])
def test_too_old(daemon: Daemon, address: str, version: str) -> None:
    daemon.calls["version"] = lambda query, body: (200, {**VERSION, "Version": version})
    with pytest.raises(EnvironmentError_, match="too old"):
        KuboStore(address)


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore:The 'strict' parameter:FutureWarning")
def test_new_versions_cause_no_warning(address: str) -> None:
    assert KuboStore(address).version == "0.32.1"


@pytest.mark.parametrize("answer", [(200, b"<html>"), (404, b"not here"), (200, {}), (200, [1]), (200, b""), refusal("no")])
def test_servers_that_are_not_kubo(daemon: Daemon, address: str, answer: Answer) -> None:
    daemon.calls["version"] = lambda query, body: answer
    with pytest.raises(EnvironmentError_) as caught:
        KuboStore(address)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_silence(daemon: Daemon, address: str) -> None:
    over = threading.Event()
    cid = CID.of_raw(b"x")
    daemon.calls["block/get"] = lambda query, body: (over.wait(30), (200, b"x"))[1]
    store = KuboStore(address, timeout_seconds=0.2)
    with pytest.raises(UnavailableError, match="in time"):
        store.get(cid)
    over.set()
