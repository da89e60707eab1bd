"""Reading bounded frames from a libp2p stream.

Law: a length is checked before a byte of the body is read, and nothing here waits without the caller's
deadline.  libp2p's own `read_exactly` gives up after a hundred short reads, which a slow but honest link needs.
"""

from __future__ import annotations

from typing import Protocol

from libp2p.io.exceptions import IncompleteReadError

from p2pflock.errors import InvalidMessageError

LENGTH_BYTES = 4


class Readable(Protocol):
    async def read(self, n: int | None = None) -> bytes: ...


class Buffered:
    """Reads ahead: a Yamux read costs four locks, and a small frame is five reads."""

    _AHEAD_BYTES = 64 << 10

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._buffer = b""

    async def read(self, n: int | None = None) -> bytes:
        if not self._buffer:
            self._buffer = await self._stream.read(self._AHEAD_BYTES)
        taken = self._buffer if n is None else self._buffer[:n]
        self._buffer = self._buffer[len(taken) :]
        return taken


async def read_exactly(stream: Readable, size: int) -> bytes:
    """`size` bytes.  Raises libp2p's IncompleteReadError or stream errors when the other side stops."""
    buffer = bytearray()
    while len(buffer) < size:
        chunk = await stream.read(size - len(buffer))
        if not chunk:
            raise IncompleteReadError("stream ended within a frame")
        buffer += chunk
    return bytes(buffer)


async def read_length(stream: Readable, max_bytes: int) -> int:
    """Big-endian 32-bit length.  Raises InvalidMessageError above `max_bytes`."""
    size = int.from_bytes(await read_exactly(stream, LENGTH_BYTES), "big")
    if size > max_bytes:
        raise InvalidMessageError(f"frame of {size} bytes, at most {max_bytes}")
    return size


def prefix(data: bytes) -> bytes:
    """Length and data, as `read_length` and `read_exactly` expect them."""
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def read_varint(stream: Readable, first: bytes, max_value: int) -> int:
    """Unsigned varint whose first byte was read already.  Raises InvalidMessageError."""
    value = first[0] & 0x7F
    shift = 7
    byte = first[0]
    while byte & 0x80:
        if shift > 28:
            raise InvalidMessageError("length prefix too long")
        byte = (await read_exactly(stream, 1))[0]
        value |= (byte & 0x7F) << shift
        shift += 7
    if value > max_value:
        raise InvalidMessageError(f"frame of {value} bytes, at most {max_value}")
    return value
