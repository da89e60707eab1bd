"""Graphs of blocks: links, whole files, CAR archives; over any BlobStore.

Law: nothing here trusts a block's shape.  Blocks are checked against their ids by the store or right here, walks
visit a block once (so no graph is larger than its blocks), and every read from outside has a bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Protocol, runtime_checkable

from p2pflock.errors import InvalidMessageError
from p2pflock.ports import BlobStore
from p2pflock.primitives import car, dagcbor, unixfs
from p2pflock.primitives.cid import CID, DAG_CBOR, DAG_PB

MAX_BLOCK_BYTES = 2 << 20  # what Bitswap and Kubo take at most

Put = Callable[[CID, bytes], None]
Follow = Callable[[CID, CID], bool]  # (parent, child) -> whether to go on into the child


@runtime_checkable
class Batching(Protocol):
    """A store that can take many blocks as one durable whole."""

    def batch(self) -> contextlib.AbstractContextManager[Put]: ...


def iter_links(cid: CID, block: bytes) -> Iterator[CID]:
    """Ids that a block links to, in order, repetitions included; none for a raw block.

    Raises InvalidMessageError when the block is not what its codec says (for dag-pb: a UnixFS file node).
    """
    if cid.codec == DAG_PB:
        yield from unixfs.iter_links(block)
    elif cid.codec == DAG_CBOR:
        stack: list[Any] = [dagcbor.decode(block)]
        while stack:
            value = stack.pop()
            if type(value) is CID:
                yield value
            elif type(value) is list:
                stack.extend(reversed(value))
            elif type(value) is dict:
                stack.extend(reversed(value.values()))


def walk(
    get: Callable[[CID], bytes | None], roots: Iterable[CID], *, follow: Follow | None = None
) -> Iterator[CID]:
    """Every id that the roots reach, each once, parents before children, depth first.

    Args:
        get: a block, or None where it is not here; it is then a leaf, and its id is yielded all the same.
            Raw blocks are never asked for.
        roots: where to start.
        follow: leave out children for which it is False.

    A block that its codec cannot read is a leaf too.
    """
    seen: set[CID] = set()
    stack = list(reversed(list(roots)))
    while stack:
        cid = stack.pop()
        if cid in seen:
            continue
        seen.add(cid)
        yield cid
        block = get(cid) if cid.codec in (DAG_PB, DAG_CBOR) else None
        if block is None:
            continue
        try:
            links = list(iter_links(cid, block))
        except InvalidMessageError:
            continue
        stack.extend(link for link in reversed(links) if follow is None or follow(cid, link))


def find_missing(store: BlobStore, roots: Iterable[CID], *, follow: Follow | None = None) -> Iterator[CID]:
    """Ids that the roots reach and whose blocks are not here; what is below them is not known."""

    def get(cid: CID) -> bytes | None:
        return store.get(cid) if store.has(cid) else None

    return (cid for cid in walk(get, roots, follow=follow) if not store.has(cid))


def put_file(store: BlobStore, data: bytes | Iterable[bytes]) -> CID:
    """Store a file under the id that `ipfs add --cid-version=1 --raw-leaves` gives; returns its root.

    Args:
        store: where to.
        data: the bytes, or pieces of any size.

    Raises DiskFullError; a store that batches then holds nothing of the file.
    """
    pieces = unixfs.chunked(data) if isinstance(data, bytes) else data
    with _batch(store) as put:
        return unixfs.build(pieces, put)


def read_file(store: BlobStore, cid: CID, max_bytes: int) -> Iterator[bytes]:
    """The file's bytes, chunk by chunk.

    Raises UnavailableError when a block is missing, InvalidMessageError when the graph is no file of at most
    `max_bytes`; what was yielded before is then to be thrown away.
    """
    return unixfs.assemble(cid, store.get, max_bytes=max_bytes)


def export_car(
    store: BlobStore, roots: Sequence[CID], out: BinaryIO, *, follow: Follow | None = None
) -> int:
    """Write everything the roots reach as CARv1; returns the number of blocks.

    Raises UnavailableError when a block is missing: the archive is then unfinished.
    """
    count = 0

    def blocks() -> Iterator[tuple[CID, bytes]]:
        nonlocal count
        for cid in walk(store.get, roots, follow=follow):
            yield cid, store.get(cid)
            count += 1

    car.write(out, roots, blocks())
    return count


def import_car(
    source: BinaryIO,
    store: BlobStore,
    *,
    max_bytes: int,
    max_block_bytes: int = MAX_BLOCK_BYTES,
) -> tuple[CID, ...]:
    """Store every block of a CARv1 archive; returns its roots, which must be among the blocks.

    Raises InvalidMessageError for a malformed archive, a block that does not hash to its id, a missing root or
    more than `max_bytes` of blocks; a store that batches then holds nothing of it.
    """
    roots, blocks = car.read(source, max_block_bytes=max_block_bytes)
    missing = set(roots)
    total = 0
    with _batch(store) as put:
        for cid, data in blocks:
            total += len(data)
            if total > max_bytes:
                raise InvalidMessageError(f"archive of more than {max_bytes} bytes")
            put(cid, data)  # checks the hash
            missing.discard(cid)
        if missing:
            raise InvalidMessageError(f"archive lacks its root {min(missing)}")
    return roots


@contextlib.contextmanager
def _batch(store: BlobStore) -> Iterator[Put]:
    if isinstance(store, Batching):
        with store.batch() as put:
            yield put
    else:
        yield store.put
