"""One peer of benchmarks/exchange.py, a process of its own: `flock` or `hivemind`, told what to do line by line.

Law: it computes, moves and measures; the parent only says when.  Every line in and out is a JSON object.

    flock     {"go": round, "peers": [peer id, ...]} -> {"header": [content id, bytes]} as soon as it is encoded;
              {"header": [peer, content id, bytes]} from the parent stands for the header that gossip brings;
              -> {"done": seconds, "parts": {...}};
              {"check": true} -> {"hash": of the folded model}, once all are done: nobody's check slows another down
    hivemind  {"use": compression} -> {"ready": true}
              {"go": round} -> {"matched": seconds}, once the group is formed;
              {"average": true} -> {"done": seconds};
              {"check": true} -> {"error": distance to the true mean, relative}

The steps of `flock` are those of a round: what node/driver.py has its trainer and its swarm process do, by the same
code (node/spreading.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import trio

    from p2pflock.learning.codec import F32
    from p2pflock.node.spreading import Spreading
    from p2pflock.primitives.cid import CID

CHUNK, K, WEIGHT = 4096, 64, 1920
HIVEMIND_SECONDS = 300.0


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def draw(seed: int, size: int) -> F32:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


# --- ours -------------------------------------------------------------------------------------------------
async def be_flock(number: int, peers: int, parameters: int, host: str, bootstrap: list[str]) -> None:
    import trio

    from p2pflock.gossip.client import HivemindSwarm, SwarmConfig

    config = SwarmConfig(
        task=hashlib.sha256(b"benchmarks/exchange").digest(),
        seed=hashlib.sha256(b"benchmarks/exchange %d" % number).digest(),
        listen_host=host,
        initial_peers=bootstrap,
    )
    async with trio.open_nursery() as nursery:
        swarm = await HivemindSwarm.start(nursery, config)
        peer = _Flock(number, peers, parameters, swarm, nursery)
        say(peer=swarm.peer.hex(), addresses=list(swarm.bootstrap_addresses))
        arrived = await swarm.arrivals()
        nursery.start_soon(peer.note_arrivals, arrived)
        async for command in _commands():
            if "go" in command:
                nursery.start_soon(peer.play, command["go"], [bytes.fromhex(each) for each in command["peers"]])
            elif "header" in command:
                await peer.take_header(*command["header"])
            elif "check" in command:
                say(hash=peer.compute_hash())
            elif "addresses" in command:
                for other, addresses in command["addresses"].items():
                    swarm.add_addresses(bytes.fromhex(other), addresses)
        await swarm.aclose()
        nursery.cancel_scope.cancel()


async def _commands() -> AsyncIterator[dict[str, Any]]:
    import trio

    stream, buffer = trio.lowlevel.FdStream(os.dup(0)), b""
    while chunk := await stream.receive_some(1 << 16):
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


class _Flock:
    def __init__(self, number: int, peers: int, parameters: int, swarm: Any, nursery: trio.Nursery) -> None:
        import trio

        from p2pflock.learning import compiled
        from p2pflock.learning.codec import Shape

        compiled.find(parameters)
        self._number, self._peers, self._swarm, self._nursery = number, peers, swarm, nursery
        self._spreading: Spreading | None = None
        self._shape = Shape(parameters, CHUNK, K)
        self._checkpoint = self._result = draw(0, parameters)
        self._delta = draw(1 + number, parameters)
        self._feedback = np.zeros(parameters, np.float32)
        self._headers: dict[bytes, tuple[int, int]] = {}  # content id -> (author, bytes)
        self._held: set[bytes] = set()
        self._key = b""
        self._wanted = trio.lowlevel.ParkingLot()

    async def note_arrivals(self, arrived: Any) -> None:
        async for key, cid in arrived:
            if key == self._key:
                self._held.add(cid.to_bytes())
                self._wake()

    async def take_header(self, author: int, cid: str, size: int) -> None:
        from p2pflock.primitives.cid import CID

        raw = bytes.fromhex(cid)
        self._headers[raw] = author, size
        await self._swarm.expect(self._key, CID.from_bytes(raw), size)
        self._wake()

    def _wake(self) -> None:
        self._wanted.unpark_all()
        if self._spreading is not None:
            self._spreading.wake()

    async def play(self, round_: int, members: list[bytes]) -> None:
        """Encode, exchange, decode and fold."""
        from p2pflock.learning import codec
        from p2pflock.learning.fold import FoldRule, Weighted, fold
        from p2pflock.primitives import unixfs

        begin = time.perf_counter()
        self._key = _round_key(round_)
        self._headers.clear()
        self._held.clear()
        payload, self._feedback = codec.compress_with_feedback(self._delta, self._feedback, 0.95, self._shape)
        cid = unixfs.compute_cid(payload)
        encoded = time.perf_counter()
        await self._swarm.offer(self._key, cid, payload)
        self._headers[cid.to_bytes()] = self._number, len(payload)
        say(header=[cid.to_bytes().hex(), len(payload)])
        await self._spread(members, cid)
        payloads = await self._swarm.collect(self._key)
        exchanged = time.perf_counter()
        ordered = sorted(payloads, key=lambda each: self._headers[each.to_bytes()][0])
        inputs = [Weighted(codec.decode(payloads[each], self._shape), WEIGHT) for each in ordered]
        result = fold(FoldRule(), self._checkpoint, inputs)
        end = time.perf_counter()
        say(
            done=end - begin,
            parts={"encode": encoded - begin, "exchange": exchanged - encoded, "decode and fold": end - exchanged},
            payloads=len(payloads),
            bytes=len(payload),
        )
        self._result = result
        await self._swarm.forget(_round_key(round_ - 2))  # the last ones may still be asked for

    def compute_hash(self) -> str:
        return hashlib.sha256(self._result.tobytes()).hexdigest()

    async def _spread(self, members: list[bytes], cid: CID) -> None:
        """The driver's own code (node/spreading.py), until everything is here."""
        import trio

        from p2pflock.node.spreading import Spreading, Surroundings
        from p2pflock.primitives.cid import CID

        around = Surroundings(
            group=lambda: frozenset(range(self._peers)),
            missing=lambda: {
                author: CID.from_bytes(raw) for raw, (author, _) in self._headers.items() if raw not in self._held
            },
            peer_of=members.__getitem__,
            neighbours=lambda: members,
            may_hop=lambda: True,
            now=time.monotonic,
            on_failed=lambda reason: print(f"peer {self._number}: {reason}", file=sys.stderr),
        )
        beacon = hashlib.sha256(self._key).digest()
        self._spreading = Spreading(self._swarm, self._key, beacon, self._number, around)
        self._nursery.start_soon(self._spreading.give, cid)  # to its end: others may wait for it when we have all
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._spreading.run)
            while len(self._held) < self._peers:
                await self._wanted.park()
            nursery.cancel_scope.cancel()


def _round_key(round_: int) -> bytes:
    return b"exchange benchmark %d" % max(0, round_)


# --- theirs -----------------------------------------------------------------------------------------------
def be_hivemind(number: int, peers: int, parameters: int, host: str, bootstrap: list[str]) -> None:
    import hivemind
    from hivemind import compression

    compressions = {
        "fp16": compression.Float16Compression,
        "8-bit": compression.Uniform8BitQuantization,
        "fp32": compression.NoCompression,
    }
    dht = hivemind.DHT(initial_peers=bootstrap, host_maddrs=[f"/ip4/{host}/tcp/0"], start=True)
    say(addresses=[str(address) for address in dht.get_visible_maddrs() if host in str(address)])
    averager: Any = None
    control: Any = None
    # All hold a multiple of the same vector, so that everybody knows the mean.
    base = draw(0, parameters)
    for line in sys.stdin:
        command = json.loads(line)
        if "use" in command:
            if averager is not None:
                averager.shutdown()
            averager = build_averager(dht, base * (number + 1), f"exchange{command['use']}", peers, compressions[command["use"]]())
            say(ready=True)
        elif "go" in command:
            with averager.get_tensors() as tensors:
                tensors[0].numpy()[:] = base * (number + 1)
            begin = time.perf_counter()
            control = averager.step(wait=False, require_trigger=True, timeout=HIVEMIND_SECONDS)
            wait_for_group(control)
            say(matched=time.perf_counter() - begin)
        elif "average" in command:
            begin = time.perf_counter()
            control.allow_allreduce()
            group = control.result(timeout=HIVEMIND_SECONDS)
            say(done=time.perf_counter() - begin, group=len(group))
        elif "check" in command:
            with averager.get_tensors() as tensors:
                mean = base * ((peers + 1) / 2)
                error = float(np.linalg.norm(tensors[0].numpy() - mean) / np.linalg.norm(mean))
            say(error=error)
    if averager is not None:
        averager.shutdown()
    dht.shutdown()


def build_averager(dht: Any, vector: F32, prefix: str, peers: int, compression: Any) -> Any:
    """hivemind's own, as it comes, for one group of everybody."""
    import hivemind
    import torch

    return hivemind.DecentralizedAverager(
        [torch.from_numpy(vector.copy())],
        dht,
        prefix=prefix,
        target_group_size=1 << math.ceil(math.log2(peers)),
        min_group_size=peers,
        min_matchmaking_time=5.0,
        compression=compression,
        start=True,
    )


def wait_for_group(control: Any) -> None:
    from hivemind.averaging.control import AveragingStage

    while control.stage in {AveragingStage.IDLE, AveragingStage.LOOKING_FOR_GROUP}:
        if control.done():
            control.result()
            raise RuntimeError("the step ended before it had a group")
        time.sleep(0.01)


if __name__ == "__main__":
    kind, number_, peers_, parameters_, host_, *bootstrap_ = sys.argv[1:]
    if kind == "flock":
        import trio

        trio.run(be_flock, int(number_), int(peers_), int(parameters_), host_, bootstrap_)
    else:
        be_hivemind(int(number_), int(peers_), int(parameters_), host_, bootstrap_)
