"""The Swarm port over a child process that holds hivemind.

Law: this is the only file of gossip/ that the node imports; it knows trio and no hivemind.  It moves values
over the pipe (processes.py), keeps fetched payloads until their round is forgotten, and hands out arrivals.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from p2pflock.errors import FlockError
from p2pflock.gossip.pool import MAX_TOTAL_BYTES
from p2pflock.ports import Traffic
from p2pflock.primitives.cid import CID
from p2pflock.processes import Child

MODULE = "p2pflock.gossip.process"
ARRIVALS_BUFFERED = 8192
DISCOVERY_SECONDS = 60.0
CLOSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class SwarmConfig:
    task: bytes  # 32-byte task id; peers of other tasks are not met
    seed: bytes = field(repr=False)  # 32-byte Ed25519 seed of the peer id
    listen_host: str = "127.0.0.1"
    listen_port: int = 0  # any
    announce_host: str = ""  # address or DNS name to tell others, where this machine does not see it
    initial_peers: Sequence[str] = ()  # ending in /p2p/<peer id>; one live one is enough, own ones are skipped
    startup_seconds: float = 120.0  # to import hivemind and start p2pd on a busy machine
    bootstrap_seconds: float = 15.0  # how long to retry while no bootstrap peer answers
    max_total_bytes: int = MAX_TOTAL_BYTES  # all payloads held and expected


class HivemindSwarm:
    """ports.Swarm.  Create with `start`."""

    def __init__(self, child: Child) -> None:
        self._child = child
        self._peer: bytes = child.ready["peer"]
        self._addresses: tuple[str, ...] = tuple(child.ready["addresses"])
        self._known: dict[bytes, tuple[str, ...]] = {}
        self._payloads: dict[bytes, dict[CID, bytes]] = {}
        self._listeners: set[trio.MemorySendChannel[tuple[bytes, CID]]] = set()
        self._traffic = Traffic(0, 0)
        self.dropped_arrivals = 0

    @classmethod
    async def start(
        cls, nursery: trio.Nursery, config: SwarmConfig, *, stderr_path: Path | None = None
    ) -> HivemindSwarm:
        """Start the child and join the swarm.

        Args:
            nursery: holds the pipe's readers; cancelling it leaves the child to `aclose`.
            config: who we are and whom we join.
            stderr_path: where the child's log goes.

        Raises:
            PortTakenError, BootstrapError, SpecError, StartupError: one line each, with the cause.
        """
        child = await Child.start(
            nursery,
            MODULE,
            {**asdict(config), "initial_peers": list(config.initial_peers)},
            name="swarm",
            ready_seconds=config.startup_seconds,
            stderr_path=stderr_path,
        )
        swarm = cls(child)
        nursery.start_soon(swarm._pump)
        return swarm

    async def aclose(self) -> None:
        """Leave the swarm and end the child.  Safe to call twice."""
        with trio.CancelScope(shield=True):
            if self._child.alive:
                with contextlib.suppress(FlockError):
                    await self._child.call("close", {}, deadline_seconds=CLOSE_SECONDS)
            await self._child.aclose()

    @property
    def peer(self) -> bytes:
        """Our 38-byte peer id."""
        return self._peer

    @property
    def child(self) -> Child:
        """The process, for whoever watches over it."""
        return self._child

    # --- discovery ------------------------------------------------------------------------------------
    @property
    def bootstrap_addresses(self) -> Sequence[str]:
        return self._addresses

    async def announce(self, key: str, value: bytes, *, ttl_seconds: float) -> None:
        """Lives at most 600 s, at most 8 KiB.  Raises UnavailableError when nobody stored it."""
        params = {"key": key, "value": value, "ttl_seconds": float(ttl_seconds)}
        await self._child.call("announce", params, deadline_seconds=DISCOVERY_SECONDS)

    async def lookup(self, key: str) -> Mapping[bytes, bytes]:
        found: dict[bytes, bytes] = await self._child.call(
            "lookup", {"key": key}, deadline_seconds=DISCOVERY_SECONDS
        )
        return found

    def add_addresses(self, peer: bytes, addresses: Sequence[str]) -> None:
        """Travels with the next call that concerns the peer."""
        self._known[peer] = tuple(addresses)

    # --- exchange -------------------------------------------------------------------------------------
    async def offer(self, round_key: bytes, cid: CID, payload: bytes) -> None:
        self._payloads.setdefault(round_key, {})[cid] = payload
        await self._child.call("offer", {"round": round_key, "cid": cid.to_bytes(), "payload": payload})

    async def expect(self, round_key: bytes, cid: CID, size_bytes: int) -> None:
        await self._child.call("expect", {"round": round_key, "cid": cid.to_bytes(), "size": size_bytes})

    async def swap(self, round_key: bytes, partner: bytes, *, deadline_seconds: float) -> Sequence[CID]:
        params = {
            "round": round_key,
            "partner": partner,
            "deadline": float(deadline_seconds),
            "addresses": list(self._known.get(partner, ())),
        }
        # The child keeps the deadline; the margin is for a busy machine.
        arrived = await self._child.call("swap", params, deadline_seconds=deadline_seconds + 5.0)
        return [CID.from_bytes(cid) for cid in arrived]

    async def give(
        self, round_key: bytes, cid: CID, partners: Sequence[bytes], *, deadline_seconds: float
    ) -> Sequence[bytes]:
        params = {
            "round": round_key,
            "cid": cid.to_bytes(),
            "partners": list(partners),
            "deadline": float(deadline_seconds),
            "addresses": {peer: list(self._known[peer]) for peer in partners if peer in self._known},
        }
        has: list[bytes] = await self._child.call("give", params, deadline_seconds=deadline_seconds + 5.0)
        return has

    async def collect(self, round_key: bytes) -> Mapping[CID, bytes]:
        held = await self._child.call("held", {"round": round_key})
        if not held:
            return {}
        payloads = self._payloads.setdefault(round_key, {})
        lacking = [raw for raw in held if CID.from_bytes(raw) not in payloads]
        while lacking:  # a frame of the pipe has a size limit, a round has none
            some = await self._child.call("payloads", {"round": round_key, "cids": lacking})
            if not some:
                break
            payloads.update((CID.from_bytes(raw), payload) for raw, payload in some)
            lacking = [raw for raw in lacking if CID.from_bytes(raw) not in payloads]
        return dict(payloads)

    async def forget(self, round_key: bytes) -> None:
        self._payloads.pop(round_key, None)
        await self._child.call("forget", {"round": round_key})

    async def arrivals(self) -> AsyncIterator[tuple[bytes, CID]]:
        """From now on, own payloads included; ends when the child ends.  A reader that falls far behind loses
        the newest (counted): `collect` has everything."""
        send, receive = trio.open_memory_channel[tuple[bytes, CID]](ARRIVALS_BUFFERED)
        self._listeners.add(send)
        if not self._child.alive:
            send.close()
        return receive

    async def restrict(self, partners: Iterable[bytes] | None) -> None:
        """Serve exchanges with these peers only; None for everybody."""
        await self._child.call("restrict", {"peers": None if partners is None else list(partners)})

    # --- dense average --------------------------------------------------------------------------------
    async def average(
        self, round_key: bytes, vector: bytes, members: Sequence[bytes], *, deadline_seconds: float
    ) -> bytes:
        params = {
            "round": round_key,
            "vector": vector,
            "members": list(members),
            "deadline": float(deadline_seconds),
            "addresses": {peer: list(self._known[peer]) for peer in members if peer in self._known},
        }
        mean: bytes = await self._child.call("average", params, deadline_seconds=deadline_seconds + 5.0)
        return mean

    # --- figures --------------------------------------------------------------------------------------
    def traffic(self) -> Traffic:
        """As of at most half a second ago; see meter.py for what is counted."""
        return self._traffic

    async def measure_traffic(self) -> Traffic:
        self._traffic = Traffic(*await self._child.call("traffic", {}))
        return self._traffic

    async def stats(self) -> Mapping[str, int]:
        counts: dict[str, int] = await self._child.call("stats", {})
        return counts

    async def _pump(self) -> None:
        async for name, value in self._child.events():
            if name == "traffic":
                self._traffic = Traffic(*value)
            elif name == "arrival":
                self._tell((value[0], CID.from_bytes(value[1])))
        for listener in self._listeners:
            listener.close()

    def _tell(self, arrival: tuple[bytes, CID]) -> None:
        for listener in list(self._listeners):
            try:
                listener.send_nowait(arrival)
            except trio.WouldBlock:
                self.dropped_arrivals += 1
            except trio.BrokenResourceError:
                self._listeners.discard(listener)
