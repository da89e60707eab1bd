"""How many bytes the Go daemon moved over the network.

Law: what is counted is every byte that p2pd read from or wrote to a socket of its peers: payloads, DHT and
libp2p control traffic, with Noise and Yamux framing, without TCP/IP headers.  It is measured as all that p2pd
read and wrote (/proc/<pid>/io, which outlives closed sockets, unlike per-socket counters) less what it
exchanged with us over its local control sockets, which we count byte by byte here.  Its few log lines are in
the figure; bytes cut off by an aborted stream may be off by one socket buffer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

STREAM_BUFFER_BYTES = 512 << 10

ClientConnected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class _PatientReader(asyncio.StreamReader):
    def set_exception(self, exc: BaseException) -> None:
        """A connection that broke while we wrote is one that ended: asyncio would throw away what had already
        come in, such as the last payload of a peer that was killed."""
        self.feed_eof()


class LocalMeter:
    """Bytes that went through the control sockets between this process and p2pd."""

    def __init__(self) -> None:
        self.written = 0
        self.read = 0

    async def open_unix_connection(
        self, path: str, **_: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As asyncio.open_unix_connection, counted."""
        loop = asyncio.get_running_loop()
        reader = _PatientReader(limit=STREAM_BUFFER_BYTES, loop=loop)
        protocol = _CountingProtocol(self, reader)
        await loop.create_unix_connection(lambda: protocol, path)
        return reader, asyncio.StreamWriter(protocol.counted, protocol, reader, loop)  # type: ignore[arg-type]

    async def start_unix_server(
        self, client_connected: ClientConnected, path: str, **_: Any
    ) -> asyncio.AbstractServer:
        """As asyncio.start_unix_server, counted."""
        loop = asyncio.get_running_loop()

        def build() -> _CountingProtocol:
            reader = _PatientReader(limit=STREAM_BUFFER_BYTES, loop=loop)
            return _CountingProtocol(self, reader, client_connected)

        return await loop.create_unix_server(build, path)


class _CountingTransport:
    def __init__(self, transport: asyncio.Transport, meter: LocalMeter) -> None:
        self._transport = transport
        self._meter = meter

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._meter.written += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class _CountingProtocol(asyncio.StreamReaderProtocol):
    counted: _CountingTransport

    def __init__(
        self, meter: LocalMeter, reader: asyncio.StreamReader, client_connected: ClientConnected | None = None
    ) -> None:
        super().__init__(reader, client_connected, loop=asyncio.get_running_loop())
        self._meter = meter

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.counted = _CountingTransport(cast("asyncio.Transport", transport), self._meter)
        super().connection_made(self.counted)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self._meter.read += len(data)
        super().data_received(data)


class NetworkMeter:
    """Traffic of one p2pd; both figures never go back."""

    def __init__(self, pid: int, local: LocalMeter) -> None:
        self._path = Path(f"/proc/{pid}/io")
        self._local = local
        self._sent = 0
        self._received = 0

    def measure(self) -> tuple[int, int]:
        """Bytes (sent, received) since p2pd started; the last known ones where it is gone."""
        try:
            lines = self._path.read_text(encoding="ascii").splitlines()
        except OSError:
            return self._sent, self._received
        counters = dict(line.split(": ") for line in lines)
        self._sent = max(self._sent, int(counters["wchar"]) - self._local.read)
        self._received = max(self._received, int(counters["rchar"]) - self._local.written)
        return self._sent, self._received
