from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from p2pflock.errors import (
    DiskFullError,
    EnvironmentError_,
    InvalidMessageError,
    LocalProtocolError,
    UnavailableError,
)
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID, DAG_CBOR
from p2pflock.storage import blocks, durable, graph
from p2pflock.storage.blocks import DiskStore
from p2pflock.testing.conformance_storage import check_blob_store
from p2pflock.testing.storage import MemoryStore

FILE = bytes(range(256)) * 4096  # 1 MiB, 4 chunks, of which all are equal
SPREAD = b"".join(i.to_bytes(4, "big") * 65536 for i in range(5))  # 5 different chunks


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store", clock=clock, grace_seconds=60) as opened:
        yield opened


def add(store: DiskStore, data: bytes) -> CID:
    cid = CID.of_raw(data)
    store.put(cid, data)
    return cid


def link(store: DiskStore, *cids: CID) -> CID:
    block = dagcbor.encode({"links": list(cids)})
    store.put(CID.of_dag_cbor(block), block)
    return CID.of_dag_cbor(block)


def files(store: DiskStore) -> list[Path]:
    return sorted(p for p in store._root.rglob("*") if p.is_file() and p.name not in {"lock", "format"})


def check_account(store: DiskStore) -> None:
    """What the store believes it holds is what a fresh look finds."""
    fresh = DiskStore.open_readonly(store._root).stats()
    assert (store.stats().blocks, store.stats().used_bytes) == (fresh.blocks, fresh.used_bytes)
    assert list((store._root / "tmp").iterdir()) == []


# --- the port -------------------------------------------------------------------------------------------
def test_conformance(tmp_path: Path) -> None:
    names = count()
    check_blob_store(lambda: DiskStore.open(tmp_path / str(next(names))))
    check_blob_store(MemoryStore)


def test_memory_store_faults() -> None:
    store = MemoryStore(quota_bytes=10)
    cid = CID.of_raw(b"12345678")
    store.put(cid, b"12345678")
    with pytest.raises(DiskFullError):
        store.put(CID.of_raw(b"123"), b"123")
    store.damage(cid)
    with pytest.raises(UnavailableError):
        store.get(cid)
    assert not store.has(cid)
    assert store.used_bytes == 0


def test_blocks_and_pins_survive_reopening(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path / "s") as store:
        cid = graph.put_file(store, SPREAD)
        store.pin(cid)
        stats = store.stats()
    with DiskStore.open(tmp_path / "s") as store:
        assert b"".join(graph.read_file(store, cid, len(SPREAD))) == SPREAD
        assert list(store.pins()) == [cid]
        assert store.stats() == stats
        assert stats.blocks == 6
        assert len(list(store.blocks())) == 6


# --- crashes --------------------------------------------------------------------------------------------
def test_contents_are_synced_before_names_and_names_before_return(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[str] = []
    monkeypatch.setattr(blocks, "_sync", lambda path: trace.append("sync file"))
    monkeypatch.setattr(blocks.durable, "sync_directory", lambda path: trace.append("sync directory"))
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        trace.append("rename")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    add(store, b"x")
    assert trace == ["sync file", "rename", "sync directory"]


def test_leftovers_of_a_crash_are_removed(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path) as store:
        add(store, b"whole")
    (tmp_path / "tmp" / "17").write_bytes(b"torn")
    (tmp_path / ".tmp-format").write_bytes(b"torn")
    with DiskStore.open(tmp_path) as store:
        check_account(store)


def test_crash_while_the_store_is_made(tmp_path: Path) -> None:
    (tmp_path / "blocks" / "a").mkdir(parents=True)
    (tmp_path / ".tmp-format").write_bytes(b"")
    with DiskStore.open(tmp_path) as store:
        assert store.get(add(store, b"x")) == b"x"


def test_failed_batch_leaves_nothing(store: DiskStore) -> None:
    before = add(store, b"before")

    def store_three() -> None:
        with store.batch() as put:
            put(CID.of_raw(b"one"), b"one")
            put(CID.of_raw(b"before"), b"before")
            put(CID.of_raw(b"two"), b"another two")

    with pytest.raises(InvalidMessageError):
        store_three()
    assert not store.has(CID.of_raw(b"one"))
    assert store.get(before) == b"before"
    check_account(store)


# --- damage ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("damaged", [b"", b"xontent", b"content and more", b"conten"])
def test_damaged_block_is_removed_and_can_be_stored_again(store: DiskStore, damaged: bytes) -> None:
    cid = add(store, b"content")
    store._path(cid).write_bytes(damaged)
    reader = DiskStore.open_readonly(store._root)
    with pytest.raises(UnavailableError, match="damaged"):
        reader.get(cid)
    assert reader.has(cid), "a reader changes nothing"
    with pytest.raises(UnavailableError, match="damaged"):
        store.get(cid)
    assert not store.has(cid)
    assert store.stats().damaged == 1
    add(store, b"content")
    assert store.get(cid) == b"content"


def test_storing_over_a_damaged_block_heals_it(store: DiskStore) -> None:
    cid = add(store, b"content")
    store._path(cid).write_bytes(b"damaged content")
    add(store, b"content")
    assert store.get(cid) == b"content"


def test_unreadable_sector_is_damage(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cid = add(store, b"content")

    def fails(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(UnavailableError, match="damaged"):
        store.get(cid)
    monkeypatch.undo()
    assert not store.has(cid)


# --- room -----------------------------------------------------------------------------------------------
def test_quota(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, quota_bytes=1000) as store:
        first = add(store, bytes(600))
        with pytest.raises(DiskFullError, match="quota") as caught:
            add(store, b"x" * 401)
        assert caught.value.hint
        assert caught.value.exit_code == 21
        add(store, bytes(600))  # here already: costs nothing
        add(store, b"x" * 400)
        check_account(store)
        assert store.get(first) == bytes(600)


def test_quota_counts_what_a_batch_is_about_to_store(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, quota_bytes=len(SPREAD) - 1) as store:
        with pytest.raises(DiskFullError):
            graph.put_file(store, SPREAD)
        check_account(store)
        assert store.stats().used_bytes == 0


def test_full_disk(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def half(handle: int, data: memoryview) -> int:
        if len(data) < 2:
            raise OSError(28, "No space left on device")
        return real(handle, data[: len(data) // 2])

    monkeypatch.setattr(durable.os, "write", half)
    with pytest.raises(DiskFullError, match="No space") as caught:
        add(store, bytes(600))
    assert caught.value.hint
    monkeypatch.undo()
    check_account(store)
    assert store.stats().used_bytes == 0
    add(store, bytes(600))


# --- garbage --------------------------------------------------------------------------------------------
def test_garbage_is_what_no_pin_reaches(store: DiskStore, clock: Clock) -> None:
    file = graph.put_file(store, SPREAD)
    leaf = add(store, b"leaf")
    kept = link(store, file, link(store, leaf))
    loose_file = graph.put_file(store, SPREAD[::-1])
    loose = link(store, kept, loose_file)
    store.pin(kept)
    clock.now += 61
    before = store.stats()
    freed = store.collect_garbage()
    assert freed == before.used_bytes - store.stats().used_bytes
    assert freed > len(SPREAD) - 262144
    check_account(store)
    assert not store.has(loose)
    assert not store.has(loose_file)
    assert b"".join(graph.read_file(store, file, len(SPREAD))) == SPREAD
    assert store.get(leaf) == b"leaf"
    assert store.collect_garbage() == 0
    store.unpin(kept)
    store.collect_garbage()
    assert store.stats().blocks == 0
    check_account(store)


def test_young_blocks_stay(store: DiskStore, clock: Clock) -> None:
    old, renewed = add(store, b"old"), add(store, b"renewed")
    clock.now += 59
    young = add(store, b"young")
    add(store, b"renewed")
    clock.now += 2
    assert store.collect_garbage() == len(b"old")
    assert [store.has(cid) for cid in (old, renewed, young)] == [False, True, True]


def test_direct_pin_keeps_one_block(store: DiskStore, clock: Clock) -> None:
    parent = link(store)
    head = link(store, parent)
    store.pin_direct(head)
    assert list(store.pins()) == [head]
    clock.now += 61
    store.collect_garbage()
    assert (store.has(head), store.has(parent)) == (True, False)
    store.unpin(head)
    assert list(store.pins()) == []


def test_pin_before_fetch(store: DiskStore, clock: Clock) -> None:
    leaf = CID.of_raw(b"leaf")
    block = dagcbor.encode([leaf])
    store.pin(CID.of_dag_cbor(block))
    add(store, b"leaf")
    store.put(CID.of_dag_cbor(block), block)
    clock.now += 61
    assert store.collect_garbage() == 0
    assert store.has(leaf)


def test_blocks_that_are_not_what_their_codec_says_are_leaves(store: DiskStore, clock: Clock) -> None:
    for codec in (0x70, 0x71):
        cid = CID.of(codec, b"\xff not a node")
        store.put(cid, b"\xff not a node")
        store.pin(cid)
    clock.now += 61
    assert store.collect_garbage() == 0


def in_mid_collection(store: DiskStore, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Run `act` in another thread once marking is over and the first block is about to be swept."""
    real = store._sweep
    done = threading.Event()

    def sweep(cid: CID) -> int:
        if not done.is_set():
            done.set()
            thread = threading.Thread(target=act)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
        return real(cid)

    monkeypatch.setattr(DiskStore, "_sweep", lambda self, cid: sweep(cid))
    store.collect_garbage()
    assert done.is_set()


def test_put_during_collection_is_kept(
    store: DiskStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store._grace_seconds = 0
    old = [add(store, bytes([i])) for i in range(50)]
    clock.now += 1
    again = set(old[::2])

    def act() -> None:
        now, clock.now = clock.now, 0.0  # even when the clock is wrong
        for cid in again:
            store.put(cid, bytes([old.index(cid)]))
        add(store, b"new")
        clock.now = now

    in_mid_collection(store, monkeypatch, act)
    assert {cid for cid in old if store.has(cid)} == again
    assert store.has(CID.of_raw(b"new"))
    check_account(store)


def test_pin_during_collection_keeps_the_whole_graph(
    store: DiskStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = link(store, graph.put_file(store, SPREAD), add(store, b"leaf"))
    clock.now += 61
    in_mid_collection(store, monkeypatch, lambda: store.pin(root))
    assert list(graph.find_missing(store, [root])) == []


def test_open_batch_during_collection_keeps_what_it_relies_on(
    store: DiskStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cid = add(store, b"here before")
    store._grace_seconds = -1  # nothing is young
    clock.now += 61
    with store.batch() as put:
        put(cid, b"here before")
        store.collect_garbage()
    assert store.get(cid) == b"here before"


def test_threads_may_store_and_collect_at_once(store: DiskStore) -> None:
    store._grace_seconds = 1e9  # the clock of this test stands
    failures: list[BaseException] = []

    def work(name: bytes) -> None:
        try:
            for i in range(30):
                data = (name if i % 2 else b"same") + bytes([i])
                assert store.get(add(store, data)) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(bytes([65 + i]),)) for i in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        store.collect_garbage()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert store.stats().blocks == 15 + 3 * 15
    check_account(store)


# --- who may open it ------------------------------------------------------------------------------------
def test_one_writer_many_readers(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path) as store:
        cid = add(store, b"x")
        with pytest.raises(EnvironmentError_, match=f"in use by process {os.getpid()}") as caught:
            DiskStore.open(tmp_path)
        assert caught.value.hint
        reader = DiskStore.open_readonly(tmp_path)
        assert reader.get(cid) == b"x"
        later = add(store, b"later")
        assert reader.get(later) == b"later"
        for act in (
            lambda: reader.put(cid, b"x"),
            lambda: reader.pin(cid),
            lambda: reader.unpin(cid),
            reader.collect_garbage,
        ):
            with pytest.raises(LocalProtocolError):
                act()
    with pytest.raises(LocalProtocolError):
        store.put(cid, b"x")
    DiskStore.open(tmp_path).close()


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="not a block store"):
        DiskStore.open_readonly(tmp_path / "none")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EnvironmentError_, match="other files"):
        DiskStore.open(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(EnvironmentError_):
        DiskStore.open(file)
    DiskStore.open(tmp_path / "s").close()
    (tmp_path / "s" / "format").write_bytes(b"p2pflock block store 2\n")
    with pytest.raises(EnvironmentError_, match="another version"):
        DiskStore.open(tmp_path / "s")


def test_a_foreign_id_cannot_leave_the_directory(store: DiskStore) -> None:
    """Names come from `str(cid)` alone: 59 base32 digits."""
    for data in (b"", b"a", bytes(999)):
        for codec in (0x55, DAG_CBOR):
            path = store._path(CID.of(codec, data))
            assert path.parent.parent == store._root / "blocks"
            assert path.name.isalnum()
