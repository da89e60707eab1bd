"""Bytes at the socket.

Law: counts what the kernel was handed or handed us, handshakes, control traffic and encryption included, on
connections dialed and accepted alike; TCP and IP headers are not seen here.
"""

from __future__ import annotations

from libp2p.abc import IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from p2pflock.ports import Traffic


class Meter:
    """Two running sums."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0

    def read(self) -> Traffic:
        return Traffic(sent_bytes=self.sent, received_bytes=self.received)


class CountingStream(ReadWriteCloser):
    """A raw stream that counts."""

    def __init__(self, stream: ReadWriteCloser, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter

    async def read(self, n: int | None = None) -> bytes:
        data = await self._stream.read(n)
        self._meter.received += len(data)
        return data

    async def write(self, data: bytes) -> None:
        await self._stream.write(data)
        self._meter.sent += len(data)

    async def close(self) -> None:
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._stream.get_remote_address()


class CountingTCP(TCP):
    """The dialing half; the accepting half wraps its sockets in host.py."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    async def _dial_resolved(
        self, maddr: Multiaddr, source: tuple[str, int] | None = None
    ) -> IRawConnection:
        connection = await super()._dial_resolved(maddr, source)
        if isinstance(connection, RawConnection):
            connection.stream = CountingStream(connection.stream, self._meter)
        return connection
