"""CARv1: a checkpoint's blocks in one file, for `verify` offline and for IPFS tools.

Law: this file decides framing and bounds only.  A reader streams, never holds more than one block, and leaves it
to the caller to check `cid.matches(data)` and to decide which blocks it wants.  Only ids of our kind
(cid.py) are read or written.
Source: https://ipld.io/specs/transport/car/carv1/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from p2pflock.errors import InvalidMessageError
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID, SIZE_BYTES

MAX_ROOTS = 1024
_MAX_HEADER_BYTES = 64 + 48 * MAX_ROOTS
_VARINT_BYTES = 9  # the multiformats bound: 63 bits


def write(out: BinaryIO, roots: Sequence[CID], blocks: Iterable[tuple[CID, bytes]]) -> None:
    """Write header and blocks, in the order given."""
    if len(roots) > MAX_ROOTS:
        raise InvalidMessageError(f"{len(roots)} roots, at most {MAX_ROOTS}")
    header = dagcbor.encode({"roots": list(roots), "version": 1})
    out.write(_varint(len(header)) + header)
    for cid, data in blocks:
        out.write(_varint(SIZE_BYTES + len(data)) + cid.to_bytes())
        out.write(data)


def read(
    source: BinaryIO, *, max_block_bytes: int
) -> tuple[tuple[CID, ...], Iterator[tuple[CID, bytes]]]:
    """(roots, blocks in file order).  The header is read at once, blocks as the iterator is drawn.

    Raises InvalidMessageError for a broken, truncated or oversized frame.
    """
    size = _read_varint(source)
    if size is None or size > _MAX_HEADER_BYTES:
        raise InvalidMessageError("not a CARv1 file")
    header = dagcbor.decode(_read_exactly(source, size))
    if type(header) is not dict or header.keys() != {"roots", "version"}:
        raise InvalidMessageError("not a CARv1 header")
    if type(header["version"]) is not int or header["version"] != 1:  # True == 1
        raise InvalidMessageError("not a CARv1 header")
    roots = header["roots"]
    if type(roots) is not list or len(roots) > MAX_ROOTS or not all(type(root) is CID for root in roots):
        raise InvalidMessageError("CAR roots are links")
    return tuple(roots), _blocks(source, max_block_bytes)


def _blocks(source: BinaryIO, max_block_bytes: int) -> Iterator[tuple[CID, bytes]]:
    while (size := _read_varint(source)) is not None:
        if not SIZE_BYTES <= size <= SIZE_BYTES + max_block_bytes:
            raise InvalidMessageError(f"CAR section of {size} bytes")
        cid = CID.from_bytes(_read_exactly(source, SIZE_BYTES))
        yield cid, _read_exactly(source, size - SIZE_BYTES)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(source: BinaryIO) -> int | None:
    """None at the end of the file."""
    value = 0
    for index in range(_VARINT_BYTES):
        byte = source.read(1)
        if not byte:
            if index == 0:
                return None
            raise InvalidMessageError("truncated CAR file")
        value |= (byte[0] & 0x7F) << 7 * index
        if byte[0] < 0x80:
            if byte[0] == 0 and index:
                raise InvalidMessageError("padded varint")
            return value
    raise InvalidMessageError("varint too long")


def _read_exactly(source: BinaryIO, size: int) -> bytes:
    parts = []
    while size:
        part = source.read(size)
        if not part:
            raise InvalidMessageError("truncated CAR file")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
