from __future__ import annotations

import io
from pathlib import Path

import pytest

from p2pflock.errors import InvalidMessageError, UnavailableError
from p2pflock.primitives import car, dagcbor, unixfs
from p2pflock.primitives.cid import CID
from p2pflock.storage import graph
from p2pflock.storage.blocks import DiskStore
from p2pflock.testing.storage import MemoryStore

DATA = b"".join(i.to_bytes(4, "big") * 50_000 for i in range(9))  # 1.8 MB, 7 chunks


def cbor(store: MemoryStore, value: object) -> CID:
    block = dagcbor.encode(value)
    store.put(CID.of_dag_cbor(block), block)
    return CID.of_dag_cbor(block)


def test_links_of_each_codec() -> None:
    store = MemoryStore()
    root = graph.put_file(store, DATA)
    leaves = [CID.of_raw(chunk) for chunk in unixfs.chunked(DATA)]
    assert list(graph.iter_links(root, store.get(root))) == leaves
    nested = cbor(store, {"a": [leaves[0], {"b": root}], "c": leaves[0], "d": None, "e": b"bytes"})
    assert list(graph.iter_links(nested, store.get(nested))) == [leaves[0], root, leaves[0]]
    looks_like_a_node = store.get(root)
    assert list(graph.iter_links(CID.of_raw(looks_like_a_node), looks_like_a_node)) == []
    for codec in (0x70, 0x71):
        with pytest.raises(InvalidMessageError):
            list(graph.iter_links(CID.of(codec, b"\xff"), b"\xff"))


def test_walk_visits_once_parents_first() -> None:
    store = MemoryStore()
    shared = cbor(store, "shared")
    left, right = cbor(store, [shared, 1]), cbor(store, [shared, 2])
    root = cbor(store, [left, right])
    gone = CID.of_dag_cbor(b"\xa0")
    head = cbor(store, [root, gone])

    def get(cid: CID) -> bytes | None:
        return store.get(cid) if store.has(cid) else None

    assert list(graph.walk(get, [head, root])) == [head, root, left, shared, right, gone]
    assert list(graph.walk(get, [head], follow=lambda parent, child: parent != root)) == [head, root, gone]
    assert list(graph.find_missing(store, [head])) == [gone]


def test_a_deep_chain_does_not_exhaust_the_stack() -> None:
    store = MemoryStore()
    cid = CID.of_raw(b"")
    for i in range(5000):
        cid = cbor(store, [cid, i])
    assert sum(1 for _ in graph.walk(lambda c: store.get(c) if store.has(c) else None, [cid])) == 5001


@pytest.mark.parametrize("data", [b"", b"x", bytes(262144), bytes(262145), DATA])
def test_files_come_back(tmp_path: Path, data: bytes) -> None:
    with DiskStore.open(tmp_path / "s") as store:
        cid = graph.put_file(store, data)
        assert cid == unixfs.compute_cid(data)
        assert b"".join(graph.read_file(store, cid, max(len(data), 1))) == data
        pieces = (data[i : i + 100_001] for i in range(0, len(data), 100_001))
        assert graph.put_file(store, pieces) == cid


def test_reading_is_bounded_and_notices_loss() -> None:
    store = MemoryStore()
    cid = graph.put_file(store, DATA)
    with pytest.raises(InvalidMessageError):
        list(graph.read_file(store, cid, len(DATA) - 1))
    store.lose(CID.of_raw(DATA[262144 : 2 * 262144]))
    with pytest.raises(UnavailableError):
        list(graph.read_file(store, cid, len(DATA)))


def archive(store: MemoryStore, roots: list[CID]) -> bytes:
    out = io.BytesIO()
    graph.export_car(store, roots, out)
    return out.getvalue()


@pytest.fixture
def source() -> tuple[MemoryStore, CID]:
    store = MemoryStore()
    return store, cbor(store, {"weights": graph.put_file(store, DATA), "parent": cbor(store, "parent")})


def test_archive_round_trip(source: tuple[MemoryStore, CID], tmp_path: Path) -> None:
    store, root = source
    data = archive(store, [root])
    assert archive(store, [root]) == data, "the same graph gives the same archive"
    with DiskStore.open(tmp_path / "s") as other:
        assert graph.import_car(io.BytesIO(data), other, max_bytes=store.used_bytes) == (root,)
        assert set(other.blocks()) == set(store.blocks())
        assert list(graph.find_missing(other, [root])) == []


def test_archive_of_a_part(source: tuple[MemoryStore, CID]) -> None:
    store, root = source
    out = io.BytesIO()
    assert graph.export_car(store, [root], out, follow=lambda parent, child: child.codec == 0x71) == 2
    out.seek(0)
    assert [cid for cid, _ in car.read(out, max_block_bytes=1 << 20)[1]] == [
        root,
        CID.of_dag_cbor(dagcbor.encode("parent")),
    ]


def test_incomplete_graph_is_not_exported(source: tuple[MemoryStore, CID]) -> None:
    store, root = source
    store.lose(CID.of_raw(DATA[:262144]))
    with pytest.raises(UnavailableError):
        archive(store, [root])


def test_bad_archives_leave_nothing(source: tuple[MemoryStore, CID], tmp_path: Path) -> None:
    store, root = source
    data = archive(store, [root])
    forged = bytearray(data)
    forged[-1] ^= 1
    rootless = io.BytesIO()
    car.write(rootless, [root], [(cid, store.get(cid)) for cid in store.blocks() if cid != root])
    with DiskStore.open(tmp_path / "s") as other:
        for bad in (bytes(forged), data[:-1], rootless.getvalue(), b"", data + b"\x01"):
            with pytest.raises(InvalidMessageError):
                graph.import_car(io.BytesIO(bad), other, max_bytes=1 << 30)
            assert other.stats().blocks == 0
            assert other.stats().used_bytes == 0
        with pytest.raises(InvalidMessageError, match="more than"):
            graph.import_car(io.BytesIO(data), other, max_bytes=store.used_bytes - 1)
        with pytest.raises(InvalidMessageError):
            graph.import_car(io.BytesIO(data), other, max_bytes=1 << 30, max_block_bytes=262143)
        assert other.stats().blocks == 0
