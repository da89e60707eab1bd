"""A network of its own for every peer: namespaces joined by links of a stated rate and delay, counted per packet.

Law: peer i has one device, `p0`, with the address 10.77.0.i, in a network namespace of its own, and no other way
out.  All packets pass through one relay process that counts them and, where asked, shapes them: each peer has a
link of `rate` in either direction with a queue of 1,000 full packets (netem's default) that drops what does not
fit, and a packet is under way for `delay` between two peers.  What is counted are IP packets of at most 1,500
bytes as they would be on a wire, so TCP and IP headers, acknowledgements and what is sent again all count.

The devices are TUN devices rather than veth pairs for two reasons: a veth pair carries 64 KB super-packets, so its
counters miss most headers, and delay on it takes the netem module, which not every kernel has.  Whether the links
are what they claim to be is measured, not believed: `measure_link`.

Needs root and /dev/net/tun.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pflock.errors import MissingToolError

SUBNET = "10.77.0"
MTU = 1500
QUEUE_PACKETS = 1000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True, slots=True)
class Link:
    """Each peer's way to the others.  0: not limited."""

    megabits: float = 0.0
    delay_seconds: float = 0.0  # one way, from peer to peer


def require_root() -> None:
    """Raises MissingToolError where namespaces cannot be made."""
    if os.geteuid() != 0:
        raise MissingToolError("network namespaces need root", "run the target with sudo")
    if not Path("/dev/net/tun").exists():
        raise MissingToolError("/dev/net/tun is missing", "load the tun module, or give the container the device")
    if not shutil.which("ip"):
        raise MissingToolError("the ip command is missing", "apt-get install iproute2")


def address_of(peer: int) -> str:
    """Peers count from 1."""
    return f"{SUBNET}.{peer}"


class Network:
    """N namespaces and their relay.  Use `open_network`."""

    def __init__(self, peers: int, link: Link, *, is_bound: bool = False) -> None:
        self.peers = peers
        self.link = link
        self._cores = sorted(os.sched_getaffinity(0)) if is_bound else []
        self._names = [f"p2pflock-{os.getpid()}-{peer}" for peer in range(1, peers + 1)]
        devices = [f"fl{os.getpid()}x{peer}" for peer in range(1, peers + 1)]
        self._relay = subprocess.Popen(
            [sys.executable, __file__, "relay", str(link.megabits), str(link.delay_seconds), *devices],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read_line()
        for peer, (name, device) in enumerate(zip(self._names, devices, strict=True), 1):
            _ip("netns", "add", name)
            _ip("link", "set", device, "netns", name, "name", "p0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "address", "add", f"{address_of(peer)}/24", "dev", "p0")
            _ip("-n", name, "link", "set", "p0", "mtu", str(MTU), "up")

    def command(self, peer: int, command: Sequence[str]) -> list[str]:
        """`command`, to be run in a peer's namespace (replaces itself, so pid and signals are the command's)."""
        bound = ["taskset", "--cpu-list", str(self._cores[peer % len(self._cores)])] if self._cores else []
        return [*bound, "nsenter", f"--net=/run/netns/{self._names[peer - 1]}", *command]

    def count(self) -> list[dict[str, Any]]:
        """Per peer, since the start, IP bytes: `sent`, `received`, `dropped`, `ports`, where ports has
        [data bytes, header bytes, packets] that the peer sent by the lower of the two TCP ports."""
        assert self._relay.stdin is not None
        self._relay.stdin.write("\n")
        self._relay.stdin.flush()
        counts: list[dict[str, Any]] = json.loads(self._read_line())
        return counts

    def count_at_interface(self) -> list[tuple[int, int]]:
        """Per peer (sent, received) as the kernel counts them at the device."""
        rows = []
        for name in self._names:
            found = json.loads(_ip("-n", name, "-s", "-j", "link", "show", "dev", "p0"))[0]["stats64"]
            rows.append((int(found["tx"]["bytes"]), int(found["rx"]["bytes"])))
        return rows

    def _read_line(self) -> str:
        assert self._relay.stdout is not None
        line = self._relay.stdout.readline()
        if not line:
            raise MissingToolError("the packet relay did not start", "its error is above")
        return line

    def close(self) -> None:
        self._relay.kill()
        self._relay.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@contextlib.contextmanager
def open_network(peers: int, link: Link, *, is_bound: bool = False) -> Iterator[Network]:
    """Namespaces until the block ends.  Raises MissingToolError.

    `is_bound`: each peer with all its processes has one core of this machine, or its equal share of one."""
    require_root()
    network = Network(peers, link, is_bound=is_bound)
    try:
        yield network
    finally:
        network.close()


def measure_link(network: Network, seconds: float = 4.0) -> dict[str, float]:
    """Between the first two peers: round trip (how long a TCP connection takes to open), and what TCP carries."""
    sink = subprocess.Popen(
        network.command(2, [sys.executable, __file__, "sink", address_of(2)]), stdout=subprocess.PIPE, text=True
    )
    assert sink.stdout is not None
    sink.stdout.readline()
    source = network.command(1, [sys.executable, __file__, "source", address_of(2), str(seconds)])
    trip = float(subprocess.run(source, check=True, stdout=subprocess.PIPE, text=True).stdout)
    rate = float(sink.stdout.readline())
    sink.wait()
    return {"round_trip_ms": round(1e3 * trip, 1), "tcp_megabits": round(rate, 1)}


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise MissingToolError(f"ip {' '.join(arguments)}: {done.stderr.strip()}", "see `man ip-netns`")
    return done.stdout


# --- the relay process ------------------------------------------------------------------------------------
class _Relay:
    def __init__(self, devices: Sequence[str], link: Link) -> None:
        self._fds = [_open_tun(device) for device in devices]
        self._bytes_per_second = link.megabits * 1e6 / 8
        self._delay = link.delay_seconds
        # A full queue of full packets takes this long to drain.
        self._longest = QUEUE_PACKETS * MTU / self._bytes_per_second if link.megabits else 0.0
        self._up_free = [0.0] * len(devices)
        self._down_free = [0.0] * len(devices)
        self._flying: list[deque[tuple[float, bytes]]] = [deque() for _ in devices]
        self._counts: list[dict[str, Any]] = [
            {"sent": 0, "received": 0, "dropped": 0, "ports": {}} for _ in devices
        ]

    def run(self) -> None:
        poll = select.epoll()
        for fd in (*self._fds, 0):
            poll.register(fd, select.EPOLLIN)
        places = {fd: place for place, fd in enumerate(self._fds)}
        print("ready", flush=True)
        while True:
            for fd, _ in poll.poll(self._wait_seconds()):
                if fd == 0:
                    if not sys.stdin.readline():
                        return
                    print(json.dumps(self._counts), flush=True)
                else:
                    self._drain(places[fd], fd)
            self._deliver()

    def _wait_seconds(self) -> float:
        heads = [queue[0][0] for queue in self._flying if queue]
        return max(0.0, min(heads) - time.monotonic()) if heads else -1

    def _drain(self, source: int, fd: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(fd, 65536)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:
                continue  # IPv6 neighbour discovery: there is no IPv6 here
            target = packet[19] - 1
            if not 0 <= target < len(self._fds):
                continue
            self._note(source, packet)
            due = self._schedule(source, target, len(packet))
            if due is None:
                self._counts[source]["dropped"] += 1
            else:
                self._flying[target].append((due, packet))

    def _schedule(self, source: int, target: int, size: int) -> float | None:
        """When the packet has arrived, or None when a queue is full."""
        now = time.monotonic()
        if not self._bytes_per_second:
            return now + self._delay
        takes = size / self._bytes_per_second
        leaves = max(now, self._up_free[source]) + takes
        if leaves - now > self._longest:
            return None
        self._up_free[source] = leaves
        # The last byte leaves the narrow link up and enters the one down, which is as narrow: only waiting for
        # other senders' packets adds to it.
        arrives = max(leaves + self._delay, self._down_free[target] + takes)
        if arrives - leaves - self._delay > self._longest:
            return None
        self._down_free[target] = arrives
        return arrives

    def _deliver(self) -> None:
        now = time.monotonic()
        for target, queue in enumerate(self._flying):
            while queue and queue[0][0] <= now:
                packet = queue.popleft()[1]
                with contextlib.suppress(OSError):  # the device is down: as good as lost
                    os.write(self._fds[target], packet)
                self._counts[target]["received"] += len(packet)

    def _note(self, source: int, packet: bytes) -> None:
        counts = self._counts[source]
        counts["sent"] += len(packet)
        if packet[9] != 6:
            port, header = "other", len(packet)
        else:
            start = 4 * (packet[0] & 15)
            port = str(min(struct.unpack_from(">HH", packet, start)))
            header = start + 4 * (packet[start + 12] >> 4)
        row = counts["ports"].setdefault(port, [0, 0, 0])
        row[0] += len(packet) - header
        row[1] += header
        row[2] += 1


def _open_tun(device: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", device.encode(), IFF_TUN | IFF_NO_PI))
    return fd


# --- the two ends of a throughput test --------------------------------------------------------------------
def _sink(address: str) -> None:
    import socket

    with socket.create_server((address, 5001)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        buffer, received, begin = bytearray(1 << 16), 0, None
        while size := connection.recv_into(buffer):
            now = time.monotonic()
            if begin is None:
                begin = now
            received += size
    print(8e-6 * received / max(1e-9, now - (begin or 0.0)), flush=True)


def _source(address: str, seconds: float) -> None:
    import socket

    begin = time.monotonic()
    with socket.create_connection((address, 5001)) as connection:
        print(time.monotonic() - begin, flush=True)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            connection.sendall(bytes(1 << 14))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["relay", megabits, delay, *names]:
            _Relay(names, Link(float(megabits), float(delay))).run()
        case ["sink", where]:
            _sink(where)
        case ["source", where, duration]:
            _source(where, float(duration))
