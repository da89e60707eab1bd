"""The gossip child process: `python -m p2pflock.gossip.process`, started by client.HivemindSwarm.

Law: this file translates calls from the pipe into calls of the stack and nothing else; no policy lives here.
One asyncio loop holds hivemind's P2P and DHT node, with no forks.  The process ends with its parent
(processes.py), p2pd with this process (limits.py), and this process with p2pd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from p2pflock import processes
from p2pflock.errors import UnavailableError
from p2pflock.gossip import validator
from p2pflock.gossip.daemon import Stack, StackConfig, open_stack
from p2pflock.gossip.dense import DenseAverager
from p2pflock.gossip.exchange import PayloadExchange
from p2pflock.gossip.pool import MAX_TOTAL_BYTES, PayloadPool
from p2pflock.primitives.cid import CID

TRAFFIC_SECONDS = 0.5
FRAME_BYTES = 8 << 20  # of payloads in one answer over the pipe, unless one alone is larger
MAX_LOGGED_FAULTS = 50


class GossipProcess:
    """The handlers of the pipe."""

    def __init__(self, stack: Stack, config: Mapping[str, Any], emit: processes.Emit) -> None:
        self._stack = stack
        self._emit = emit
        self._expiries: dict[str, float] = {}
        self._stream = f"p2pflock/1/{config['task'].hex()}/exchange"
        self._tasks: list[asyncio.Task[Any]] = []
        self._pool = PayloadPool(
            lambda round_key, cid: emit("arrival", [round_key, cid.to_bytes()]),
            max_total_bytes=config.get("max_total_bytes", MAX_TOTAL_BYTES),
        )
        self._exchange = PayloadExchange(self._pool, stack.peer, self._open_stream)
        self._dense = DenseAverager(stack.p2p, stack.connect)

    async def start(self) -> dict[str, Any]:
        async def serve(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._exchange.serve(info.peer_id.to_bytes(), reader, writer)

        await self._stack.p2p.add_binary_stream_handler(self._stream, serve)
        await self._dense.add_p2p_handlers(self._stack.p2p, namespace=None)
        for work in (self._report_traffic(), self._watch_daemon(), self._stack.maintain()):
            self._tasks.append(asyncio.create_task(work))
        return {
            "ready_value": {"peer": self._stack.peer, "addresses": list(self._stack.addresses)},
            "announce": self.announce,
            "lookup": self.lookup,
            "offer": self.offer,
            "expect": self.expect,
            "swap": self.swap,
            "give": self.give,
            "held": self.held,
            "payloads": self.payloads,
            "forget": self.forget,
            "restrict": self.restrict,
            "average": self.average,
            "traffic": self.traffic,
            "stats": self.stats,
            "close": self.close,
        }

    async def _open_stream(self, partner: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        await self._stack.connect(partner)
        try:
            _, reader, writer = await self._stack.p2p.call_binary_stream_handler(PeerID(partner), self._stream)
        except BaseException:
            self._stack.met.discard(partner)  # gone, or never reached: dialled again next time
            raise
        return reader, writer

    # --- discovery ------------------------------------------------------------------------------------
    async def announce(self, params: dict[str, Any]) -> None:
        """Raises LocalProtocolError for a value that is too large, UnavailableError when nobody stored it."""
        key, value = params["key"], params["value"]
        validator.encode_value(value)
        ttl = min(float(params["ttl_seconds"]), validator.MAX_TTL_SECONDS)
        # Replicas keep the later expiry, so a shorter-lived update would lose against what we said before.
        expiry = max(time.time() + ttl, self._expiries.get(key, 0.0) + 0.001)
        if not await self._store(key, value, expiry):
            # We may have been restarted: the swarm still holds a record of ours that expires later.
            _, expiry = (await self._find(key)).get(self._stack.peer, (b"", expiry))
            expiry += 0.001
            if not await self._store(key, value, expiry):
                raise UnavailableError("no peer of the DHT took our record")
        if len(self._expiries) >= 64:
            self._expiries.clear()
        self._expiries[key] = expiry

    async def _store(self, key: str, value: bytes, expiry: float) -> bool:
        return bool(await self._stack.node.store(key, value, expiry, subkey=self._stack.peer))

    async def lookup(self, params: dict[str, Any]) -> dict[bytes, bytes]:
        return {peer: value for peer, (value, _) in (await self._find(params["key"])).items()}

    async def _find(self, key: str) -> dict[bytes, tuple[bytes, float]]:
        found = await self._stack.node.get(key, latest=True)
        if found is None or not isinstance(found.value, dict):
            return {}
        now = time.time()
        return {
            peer: (entry.value, entry.expiration_time)
            for peer, entry in found.value.items()
            if entry.expiration_time > now and type(entry.value) is bytes
        }

    # --- exchange -------------------------------------------------------------------------------------
    async def offer(self, params: dict[str, Any]) -> None:
        self._pool.offer(params["round"], CID.from_bytes(params["cid"]), params["payload"])

    async def expect(self, params: dict[str, Any]) -> None:
        self._pool.expect(params["round"], CID.from_bytes(params["cid"]), params["size"])

    async def swap(self, params: dict[str, Any]) -> list[bytes]:
        self._stack.remember(params["partner"], params["addresses"])
        arrived = await self._exchange.swap(params["round"], params["partner"], params["deadline"])
        return [cid.to_bytes() for cid in arrived]

    async def give(self, params: dict[str, Any]) -> list[bytes]:
        for peer, addresses in params["addresses"].items():
            self._stack.remember(peer, addresses)
        cid = CID.from_bytes(params["cid"])
        return list(await self._exchange.give(params["round"], cid, params["partners"], params["deadline"]))

    async def held(self, params: dict[str, Any]) -> list[bytes]:
        return [cid.to_bytes() for cid in self._pool.collect(params["round"])]

    async def payloads(self, params: dict[str, Any]) -> list[list[bytes]]:
        """The first of these that are here, and as many of the next as make up a frame of bounded size."""
        found: list[list[bytes]] = []
        size = 0
        for raw in params["cids"]:
            payload = self._pool.find(params["round"], CID.from_bytes(raw))
            if payload is None:
                continue
            size += len(payload)
            if found and size > FRAME_BYTES:
                break
            found.append([raw, payload])
        return found

    async def forget(self, params: dict[str, Any]) -> None:
        self._pool.forget(params["round"])

    async def restrict(self, params: dict[str, Any]) -> None:
        self._exchange.restrict(params["peers"])

    # --- dense average --------------------------------------------------------------------------------
    async def average(self, params: dict[str, Any]) -> bytes:
        for peer, addresses in params["addresses"].items():
            self._stack.remember(peer, addresses)
        return await self._dense.average(
            params["round"], params["vector"], params["members"], params["deadline"]
        )

    # --- figures --------------------------------------------------------------------------------------
    async def traffic(self, params: dict[str, Any]) -> list[int]:
        return list(self._stack.network.measure())

    async def stats(self, params: dict[str, Any]) -> dict[str, int]:
        """Counts of what was sent, received and refused."""
        protocol = self._stack.node.protocol
        return {
            "payload_bytes_sent": self._exchange.payload_bytes_sent,
            "payload_bytes_received": self._exchange.payload_bytes_received,
            "payloads_refused": self._pool.refused,
            "sessions_refused": self._exchange.refused_sessions,
            "sessions_broken": self._exchange.broken_sessions,
            "records_held": len(protocol.storage),
            "records_refused": protocol.record_validator.refused + protocol.storage.refused,
            "requests_refused": protocol.refused,
            "routing_entries": len(protocol.routing_table.uid_to_peer_id),
            "averages_refused": self._dense.refused,
            "daemon_pid": self._stack.p2p._child.pid,
        }

    async def _report_traffic(self) -> None:
        last = None
        while True:
            figures = list(self._stack.network.measure())
            if figures != last:
                self._emit("traffic", figures)
                last = figures
            await asyncio.sleep(TRAFFIC_SECONDS)

    async def close(self, params: dict[str, Any]) -> None:
        """Leave in order: p2pd says goodbye, nothing stays in the temporary directory."""
        for task in self._tasks:
            task.cancel()
        await self._stack.aclose()

    async def _watch_daemon(self) -> None:
        status = await self._stack.p2p._child.wait()
        sys.stderr.write(f"the libp2p daemon ended with status {status}\n")
        sys.stderr.flush()
        os._exit(1)


def _calm_faults(loop: asyncio.AbstractEventLoop) -> None:
    """Attack: faults provoked by peers in hivemind's background tasks fill the log.  The first ones say enough."""
    seen = 0

    def note(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen <= MAX_LOGGED_FAULTS:
            sys.stderr.write(f"background fault: {context.get('message')} {context.get('exception')!r}\n"[:500])

    loop.set_exception_handler(note)


async def setup(config: dict[str, Any], emit: processes.Emit) -> dict[str, Any]:
    """For processes.serve_asyncio.  Config: see client.HivemindSwarm.start."""
    _calm_faults(asyncio.get_running_loop())
    logging.getLogger("hivemind").setLevel(logging.ERROR)
    stack = await open_stack(
        StackConfig(
            task=config["task"],
            seed=config["seed"],
            listen_host=config["listen_host"],
            listen_port=config["listen_port"],
            announce_host=config["announce_host"],
            initial_peers=config["initial_peers"],
            startup_seconds=config["startup_seconds"],
            bootstrap_seconds=config["bootstrap_seconds"],
        )
    )
    return await GossipProcess(stack, config, emit).start()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt, P2PDaemonError):
        processes.serve_asyncio(setup)
