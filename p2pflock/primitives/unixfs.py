"""UnixFS files as DAGs of blocks, with the ids that `ipfs add --cid-version=1 --raw-leaves` gives.

Law: a file has exactly one DAG: chunks of 256 KiB as raw leaves, up to 174 links to a node, every level filled
from the left, all leaves at one depth (a lone last child is wrapped too), nodes in one canonical DAG-PB form.
`assemble` accepts that DAG only.  The shape therefore follows from the file size alone, which bounds depth,
forbids cycles and shared-subtree bombs, and keeps one content from having two ids.

Sources: https://specs.ipfs.tech/unixfs/, https://ipld.io/specs/codecs/dag-pb/spec/; the equality is pinned by
tests/vectors/unixfs.json, which npm ipfs-unixfs-importer wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives.cid import CID, DAG_PB, RAW, SIZE_BYTES

CHUNK_BYTES = 262_144
MAX_LINKS = 174
MAX_NODE_BYTES = 16 << 10  # 174 links of at most 56 bytes and 174 sizes of at most 10
MAX_FILE_BYTES = 1 << 50

Put = Callable[[CID, bytes], object]
Get = Callable[[CID], bytes]


@dataclass(frozen=True, slots=True)
class Link:
    """A child: its id, the bytes of file under it, and the bytes of all its blocks (DAG-PB's Tsize)."""

    cid: CID
    file_bytes: int
    dag_bytes: int


# --- DAG-PB ---------------------------------------------------------------------------------------------
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encode_node(links: list[Link]) -> bytes:
    """PBNode: links (Hash, empty Name, Tsize), then UnixFS Data (Type = File, filesize, blocksizes)."""
    out = bytearray()
    for link in links:
        tsize = _varint(link.dag_bytes)
        out += b"\x12" + _varint(2 + SIZE_BYTES + 2 + 1 + len(tsize))
        out += b"\x0a\x24" + link.cid.to_bytes() + b"\x12\x00" + b"\x18" + tsize
    data = b"\x08\x02\x18" + _varint(sum(link.file_bytes for link in links))
    data += b"".join(b"\x20" + _varint(link.file_bytes) for link in links)
    out += b"\x0a" + _varint(len(data)) + data
    return bytes(out)


class _Cursor:
    __slots__ = ("data", "position")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def starts_with(self, prefix: bytes) -> bool:
        if not self.data.startswith(prefix, self.position):
            return False
        self.position += len(prefix)
        return True

    def take(self, size: int) -> bytes:
        start = self.position
        if size > len(self.data) - start:
            raise InvalidMessageError("truncated DAG-PB node")
        self.position = start + size
        return self.data[start : start + size]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise InvalidMessageError("varint too long")


def parse_node(block: bytes) -> tuple[Link, ...]:
    """Links of a file node, in order.  Raises InvalidMessageError for anything `build` would not have written
    (directories, inline data, named links, CIDv0 links, padded varints, unknown fields)."""
    if len(block) > MAX_NODE_BYTES:
        raise InvalidMessageError("DAG-PB node too large")
    cursor = _Cursor(bytes(block))
    heads: list[tuple[CID, int]] = []
    while cursor.starts_with(b"\x12"):
        cursor.varint()
        if not cursor.starts_with(b"\x0a\x24"):
            raise InvalidMessageError("not a link to a CIDv1")
        cid = CID.from_bytes(cursor.take(SIZE_BYTES))
        if not cursor.starts_with(b"\x12\x00\x18"):
            raise InvalidMessageError("not an unnamed link with a size")
        heads.append((cid, cursor.varint()))
    if not 0 < len(heads) <= MAX_LINKS or not cursor.starts_with(b"\x0a"):
        raise InvalidMessageError("not a UnixFS file node")
    cursor.varint()
    if not cursor.starts_with(b"\x08\x02\x18"):
        raise InvalidMessageError("not a UnixFS file node")
    cursor.varint()
    links = []
    for cid, dag_bytes in heads:
        if not cursor.starts_with(b"\x20"):
            raise InvalidMessageError("a link without its block size")
        links.append(Link(cid, cursor.varint(), dag_bytes))
    # Every length and sum that was skipped above is a function of what was read.
    if _encode_node(links) != block:
        raise InvalidMessageError("UnixFS node is not canonical")
    return tuple(links)


def iter_links(block: bytes) -> Iterator[CID]:
    """Ids of a DAG-PB file node's children, in order; for walking, not yet for trusting sizes."""
    for link in parse_node(block):
        yield link.cid


# --- building -------------------------------------------------------------------------------------------
def chunked(data: bytes) -> Iterator[bytes]:
    """Pieces of CHUNK_BYTES, the last one shorter; none for no data."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def _rechunked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for piece in pieces:
        if not buffer and len(piece) == CHUNK_BYTES:
            yield bytes(piece)  # the usual case, without a copy
            continue
        view = memoryview(piece)
        while view:
            taken = min(len(view), CHUNK_BYTES - len(buffer))
            buffer += view[:taken]
            view = view[taken:]
            if len(buffer) == CHUNK_BYTES:
                yield bytes(buffer)
                buffer.clear()
    if buffer:
        yield bytes(buffer)


def build(chunks: Iterable[bytes], put: Put) -> CID:
    """Store a file block by block and return its root.

    Args:
        chunks: the file's bytes in order, in pieces of any size.
        put: called once for each block, children before parents.

    Holds one chunk and at most 174 links a level in memory.
    """
    levels: list[list[Link]] = [[]]

    def close(height: int) -> None:
        """Wrap the open node of a level and hand it up."""
        links = levels[height]
        levels[height] = []
        block = _encode_node(links)
        cid = CID.of(DAG_PB, block)
        put(cid, block)
        file_bytes = sum(link.file_bytes for link in links)
        dag_bytes = len(block) + sum(link.dag_bytes for link in links)
        add(height + 1, Link(cid, file_bytes, dag_bytes))

    def add(height: int, link: Link) -> None:
        if height == len(levels):
            levels.append([])
        if len(levels[height]) == MAX_LINKS:
            close(height)
        levels[height].append(link)

    for chunk in _rechunked(chunks):
        cid = CID.of(RAW, chunk)
        put(cid, chunk)
        add(0, Link(cid, len(chunk), len(chunk)))
    if not levels[0]:
        cid = CID.of(RAW, b"")
        put(cid, b"")
        return cid
    height = 0
    while height < len(levels) - 1 or len(levels[height]) > 1:
        close(height)
        height += 1
    return levels[height][0].cid


def compute_cid(data: bytes) -> CID:
    """Root of the file with these bytes; stores nothing."""
    return build(chunked(data), _discard)


def _discard(_cid: CID, _block: bytes) -> None: ...


# --- reading --------------------------------------------------------------------------------------------
def _capacity(height: int) -> int:
    """File bytes under a full subtree whose leaves are `height` levels down."""
    return CHUNK_BYTES * int(MAX_LINKS**height)


def _height(file_bytes: int) -> int:
    height = 0
    while _capacity(height) < file_bytes:
        height += 1
    return height


def assemble(root: CID, get: Get, *, max_bytes: int) -> Iterator[bytes]:
    """Stream a file's bytes, chunk by chunk, in order.

    Args:
        root: id of the file.
        get: fetches one block; its errors pass through.  What it returns is re-hashed here.
        max_bytes: upper bound on the file size, checked before a second block is fetched.

    Raises InvalidMessageError as soon as a block does not hash to its id, or the DAG is not the one that
    `build` writes for a file of its size.  Bytes yielded before that are a prefix of no file: discard them.
    """
    block = _fetch(root, get)
    if root.codec == RAW:
        if len(block) > min(max_bytes, CHUNK_BYTES):
            raise InvalidMessageError(f"file larger than {min(max_bytes, CHUNK_BYTES)} bytes")
        yield block
        return
    links = parse_node(block)
    file_bytes = sum(link.file_bytes for link in links)
    if file_bytes > min(max_bytes, MAX_FILE_BYTES):
        raise InvalidMessageError(f"file of {file_bytes} bytes, at most {max_bytes}")
    yield from _assemble(links, file_bytes, _height(file_bytes), get)


def _assemble(links: tuple[Link, ...], file_bytes: int, height: int, get: Get) -> Iterator[bytes]:
    _check_shape(links, file_bytes, height)
    for link in links:
        block = _fetch(link.cid, get)
        if height == 1:
            if len(block) != link.file_bytes:
                raise InvalidMessageError("leaf of another size than its parent says")
            yield block
            continue
        children = parse_node(block)
        if (
            sum(child.file_bytes for child in children) != link.file_bytes
            or len(block) + sum(child.dag_bytes for child in children) != link.dag_bytes
        ):
            raise InvalidMessageError("node of another size than its parent says")
        yield from _assemble(children, link.file_bytes, height - 1, get)


def _check_shape(links: tuple[Link, ...], file_bytes: int, height: int) -> None:
    """The sizes and codecs of a node's children follow from its own size and height."""
    if height < 1:
        raise InvalidMessageError("node where a leaf belongs")
    full = _capacity(height - 1)
    if len(links) != -(-file_bytes // full):
        raise InvalidMessageError("node is not filled from the left")
    codec = RAW if height == 1 else DAG_PB
    left = file_bytes
    for link in links:
        expected = min(full, left)
        left -= expected
        if link.file_bytes != expected or link.cid.codec != codec:
            raise InvalidMessageError("node is not filled from the left")
        if height == 1 and link.dag_bytes != expected:
            raise InvalidMessageError("leaf with a wrong total size")


def _fetch(cid: CID, get: Get) -> bytes:
    if cid.codec not in (RAW, DAG_PB):
        raise InvalidMessageError("not a UnixFS file")
    block = get(cid)
    if not cid.matches(block):
        raise InvalidMessageError(f"block does not hash to {cid}")
    return block
