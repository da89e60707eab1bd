"""KuboStore against a daemon that speaks Kubo's RPC: the npm packages of js-ipfs, offline, on loopback.

The first run installs them under build/kubo (some 250 MB; a minute or so without npm's cache).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pflock.errors import EnvironmentError_, UnavailableError
from p2pflock.primitives import dagcbor, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.storage import graph
from p2pflock.storage.kubo import KuboStore
from p2pflock.testing.conformance_storage import check_blob_store
from p2pflock.testing.storage import MemoryStore

HERE = Path(__file__).parent / "kubo"
BUILD = Path(__file__).parents[2] / "build" / "kubo"


@pytest.fixture(scope="session")
def program() -> Path:
    """Installed packages and daemon.mjs in one directory; installed again when the lock file changes."""
    lock = (HERE / "package-lock.json").read_bytes() + (HERE / "package.json").read_bytes()
    stamp, wanted = BUILD / "stamp", hashlib.sha256(lock).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(BUILD, ignore_errors=True)
        BUILD.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, BUILD)
        command = "npm ci --ignore-scripts --omit=optional --no-audit --no-fund --loglevel=error"
        subprocess.run(command.split(), cwd=BUILD, check=True, timeout=900)
        stamp.write_text(wanted)
    shutil.copy(HERE / "daemon.mjs", BUILD)
    return BUILD / "daemon.mjs"


@pytest.fixture(scope="session")
def address(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(program, tmp_path_factory.mktemp("kubo") / "repo") as (address, _):
        yield address


class running:
    def __init__(self, program: Path, repo: Path) -> None:
        self.child = subprocess.Popen(
            ["node", str(program), str(repo)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "HOME": str(repo)},
        )
        assert self.child.stdout is not None
        port = self.child.stdout.readline()
        assert port.strip().isdigit(), "the daemon did not start"
        self.address = f"/ip4/127.0.0.1/tcp/{int(port)}/http"

    def __enter__(self) -> tuple[str, subprocess.Popen[bytes]]:
        return self.address, self.child

    def __exit__(self, *_: object) -> None:
        self.child.kill()
        self.child.wait()


@pytest.fixture
def store(address: str) -> KuboStore:
    return KuboStore(address)


# A foreign Warning (version mismatch) must not reach our users
pytestmark = [
    pytest.mark.filterwarnings("error::ipfshttpclient.exceptions.VersionMismatch"),
    pytest.mark.filterwarnings("ignore:The 'strict' parameter:FutureWarning"),
]


def test_conformance(address: str) -> None:
    check_blob_store(lambda: KuboStore(address))


@pytest.mark.parametrize("size", [0, 1, 262144, 262145, 1_000_000, 174 * 262144 + 1])
def test_files_get_our_ids(store: KuboStore, size: int) -> None:
    data = hashlib.shake_256(size.to_bytes(8, "big")).digest(size)
    cid = store.add_file(data)
    assert cid == unixfs.compute_cid(data)
    assert cid in set(store.pins())
    assert b"".join(graph.read_file(store, cid, max(size, 1))) == data


def test_checkpoint_is_copied_and_pinned(store: KuboStore) -> None:
    source = MemoryStore()
    data = hashlib.shake_256(b"weights").digest(700_000)
    manifest = dagcbor.encode({"kind": "test", "weights": graph.put_file(source, data)})
    root = CID.of_dag_cbor(manifest)
    source.put(root, manifest)
    assert store.pin_graph(source, root) == 5
    assert store.pin_graph(source, root) == 0
    assert root in set(store.pins())
    assert store.get(root) == manifest
    assert list(graph.find_missing(store, [root])) == []


def test_incomplete_graph_is_not_pinned(store: KuboStore) -> None:
    block = dagcbor.encode([CID.of_raw(b"nobody has this leaf")])
    store.put(CID.of_dag_cbor(block), block)
    with pytest.raises(UnavailableError, match="cannot pin"):
        store.pin(CID.of_dag_cbor(block))


def test_daemon_that_is_gone(program: Path, tmp_path: Path) -> None:
    with running(program, tmp_path / "repo") as (address, child):
        store = KuboStore(address)
        child.kill()
        child.wait()
        cid = CID.of_raw(b"x")
        for act in (
            lambda: store.put(cid, b"x"),
            lambda: store.get(cid),
            lambda: store.has(cid),
            lambda: store.pin(cid),
            lambda: store.unpin(cid),
            lambda: store.pins(),
            lambda: store.add_file(b"x"),
            lambda: KuboStore(address),
        ):
            with pytest.raises(EnvironmentError_, match="no Kubo daemon") as caught:
                act()
            assert "ipfs daemon" in caught.value.hint
            assert "\n" not in str(caught.value)


def test_address_that_is_none() -> None:
    with pytest.raises(EnvironmentError_, match="not an RPC address"):
        KuboStore("/ip4/127.0.0.1/udp/5001")
