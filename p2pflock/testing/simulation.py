"""A swarm of real node/Peers in one program and in virtual time: every port is a fake, everything else ships.

Law: one seed is one run, as in testing.network.  A killed peer loses its memory and keeps what a disk keeps:
block store, vote journal, ledger journal, the trainer's own state.  A peer's `Conduct` is how it lies; its keys
sign the lies, so they pass every check that looks at signatures alone.  An error that leaves a peer ends the
run, and the test with it: no honest peer may fall over whatever the others do.

    async def main() -> None:
        async with SimulatedSwarm.open(peers=7, rounds=5, seed=1) as swarm:
            await swarm.start_all()
            await swarm.until_round(5)
            swarm.check()

    run_simulation(main, seed=1)
"""

from __future__ import annotations

import contextlib
import math
import random
import tempfile
import unittest.mock
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import trio

from p2pflock.learning.learner import Network
from p2pflock.learning.spec import TaskSpec
from p2pflock.node.assembly import build_committee
from p2pflock.node.context import PeerContext, TaskFacts
from p2pflock.node.events import EventLog
from p2pflock.node.ledger import Ledger
from p2pflock.node.peer import Peer
from p2pflock.params import FLOCK_WEI, LOCAL
from p2pflock.ports import (
    GossipMessage,
    Host,
    RequestHandler,
    Swarm,
    Traffic,
    Trainer,
    Validator,
)
from p2pflock.primitives import bls, peerid
from p2pflock.protocol.collection import Pacing
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import DEFAULT_COHORT, RoundRecord, Seat, Vote
from p2pflock.protocol.messages import Trainer as Registered
from p2pflock.protocol.timeouts import Timeouts
from p2pflock.storage.journal import Entry
from p2pflock.storage.keystore import Identity
from p2pflock.testing import memo
from p2pflock.testing.chain import FakeChain
from p2pflock.testing.network import FakeNetwork
from p2pflock.testing.storage import MemoryStore
from p2pflock.testing.swarm import FakeSwarmNetwork
from p2pflock.testing.tiny_task import build_spec
from p2pflock.testing.trainer import FakeTrainer
from p2pflock.testing.wires import Wires

STAKE_WEI = 1_000 * FLOCK_WEI
REWARD_A_ROUND_WEI = 10 * FLOCK_WEI
START_UNIX_SECONDS = 1_800_000_000
PACING = Pacing(grace_share=0.5, minimum_grace_seconds=2.0, maximum_grace_seconds=60.0)
STEP_SECONDS = 0.2  # a round's five local steps take one second
POLL_SECONDS = 0.1

Result = TypeVar("Result")
BuildTrainer = Callable[["SimulatedPeer"], Trainer]


class MemoryJournal:
    """A journal that survives its process and nothing else."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, kind: str, body: bytes, *, round_: int) -> None:
        self.entries.append(Entry(round_, kind, bytes(body)))

    def replay(self) -> list[Entry]:
        return list(self.entries)


class SimulatedClock:
    """Virtual time for both clocks."""

    def monotonic_seconds(self) -> float:
        return trio.current_time()

    def unix_seconds(self) -> int:
        return START_UNIX_SECONDS + int(trio.current_time())


class Conduct:
    """How a peer behaves towards others.  This one is honest; rogues override what they do otherwise."""

    me: SimulatedPeer  # set before the peer starts

    def publish(self, topic: str, data: bytes) -> Iterable[bytes | tuple[str, bytes]]:
        """What goes out in place of a message, on its topic or on another; `topic` is the last part of its
        name ("vote", "status", …)."""
        return (data,)

    def judge(self, topic: str, validator: Validator) -> Validator:
        """What the peer makes of gossip that comes in."""
        return validator

    def serve(self, protocol: str, handler: RequestHandler) -> RequestHandler:
        return handler

    def trainer(self, trainer: Trainer) -> Trainer:
        return trainer

    def swarm(self, swarm: Swarm) -> Swarm:
        return swarm


class ConductedHost:
    """A Host as its owner's conduct lets others see it."""

    def __init__(self, inner: Host, conduct: Conduct) -> None:
        self._inner = inner
        self._conduct = conduct

    async def publish(self, topic: str, data: bytes) -> None:
        task, _, name = topic.rpartition("/")
        for item in self._conduct.publish(name, data):
            other, version = item if isinstance(item, tuple) else (name, item)
            await self._inner.publish(f"{task}/{other}", version)

    async def subscribe(self, topic: str, validator: Validator) -> AsyncIterator[GossipMessage]:
        return await self._inner.subscribe(topic, self._conduct.judge(topic.rpartition("/")[2], validator))

    async def unsubscribe(self, topic: str) -> None:
        await self._inner.unsubscribe(topic)

    def serve(self, protocol: str, handler: RequestHandler, *, max_request_bytes: int) -> None:
        handler = self._conduct.serve(protocol, handler)
        self._inner.serve(protocol, handler, max_request_bytes=max_request_bytes)

    async def request(
        self, peer: bytes, protocol: str, data: bytes, *, max_response_bytes: int, deadline_seconds: float
    ) -> bytes:
        return await self._inner.request(
            peer, protocol, data, max_response_bytes=max_response_bytes, deadline_seconds=deadline_seconds
        )

    @property
    def addresses(self) -> Sequence[str]:
        return self._inner.addresses

    async def connect(self, addresses: Sequence[str]) -> bytes:
        return await self._inner.connect(addresses)

    async def disconnect(self, peer: bytes) -> None:
        await self._inner.disconnect(peer)

    def connected_peers(self) -> frozenset[bytes]:
        return self._inner.connected_peers()

    def note_neighbours(self, peer: bytes, neighbours: frozenset[bytes]) -> None:
        self._inner.note_neighbours(peer, neighbours)

    def traffic(self) -> Traffic:
        return self._inner.traffic()


@dataclass
class SimulatedPeer:
    """What is left of a peer when it is killed, and its running parts while it runs."""

    number: int
    signer: Identity
    conduct: Conduct
    step_seconds: float
    store: MemoryStore = field(default_factory=MemoryStore)
    votes: MemoryJournal = field(default_factory=MemoryJournal)
    index: MemoryJournal = field(default_factory=MemoryJournal)
    events: list[dict[str, Any]] = field(default_factory=list)
    context: PeerContext | None = None
    peer: Peer | None = None
    is_finished: bool = False
    scope: trio.CancelScope | None = None

    @property
    def is_running(self) -> bool:
        return self.scope is not None

    @property
    def is_honest(self) -> bool:
        return type(self.conduct) is Conduct

    @property
    def head(self) -> int:
        """Last decided round; -1 before the first start."""
        return len(self.index.entries) - 1

    def record(self, round_: int) -> RoundRecord | None:
        """A decided round as the disk has it."""
        for number, (cid, _) in enumerate(Ledger.read_index(self.index.replay())):
            if number == round_:
                return RoundRecord.decode(self.store.get(cid))
        return None

    def told(self, event: str, **facts: object) -> list[dict[str, Any]]:
        """Events of this name that carry these facts."""
        return [
            entry
            for entry in self.events
            if entry["event"] == event and all(entry.get(name) == value for name, value in facts.items())
        ]


class SimulatedSwarm:
    """Use `open`.  Peers are numbered as in the roster: seats, then trainers."""

    def __init__(self, network: FakeNetwork, nursery: trio.Nursery) -> None:
        self.network = network
        self.swarms = FakeSwarmNetwork(self._latency, self._lost, network.wires)
        self.peers: list[SimulatedPeer] = []
        self.chain: FakeChain | None = None
        self.committee: Committee
        self.facts: TaskFacts
        self.spec = build_spec()
        self._model: Network | None = None
        self._disk = Path()
        self._build_trainer: BuildTrainer = self._fake_trainer
        self._nursery = nursery

    @classmethod
    @contextlib.asynccontextmanager
    async def open(  # noqa: PLR0913 - each is one knob of a scenario, all by name
        cls,
        *,
        peers: int = 7,
        rounds: int = 5,
        seed: int = 1,
        delay_seconds: tuple[float, float] = (0.002, 0.020),
        loss: float = 0.0,
        conducts: Mapping[int, Conduct] | None = None,
        step_seconds: Mapping[int, float] | None = None,
        stakes_wei: Sequence[int] = (),
        has_chain: bool = False,
        snapshot_every_rounds: int = 1,
        averaging: str = "gossip",
        local: Mapping[str, Any] | None = None,
        spec: TaskSpec | None = None,
        model: Network | None = None,
        seats: int | None = None,
        cohort: int = DEFAULT_COHORT,
        wires: Wires | None = None,
        build_trainer: BuildTrainer | None = None,
    ) -> AsyncIterator[SimulatedSwarm]:
        """A swarm in which nobody has started yet.

        Args:
            conducts: seat -> how it lies; the others are honest.
            step_seconds: seat -> duration of one local step, where it is not STEP_SECONDS.
            stakes_wei: one a seat, in place of equal ones.
            local: keys of the spec's [local] in place of the tiny task's.
            spec, model: what is trained in place of the tiny task, and its model and data, shared by all peers;
                `spec` has its own number of rounds and averaging.
            seats: how many of the peers vote, by default all; the others are trainers.
            cohort: contributors of one round.
            wires: latency, loss and bandwidth of a large network, in place of `delay_seconds` and `loss`.
            build_trainer: makes a peer's trainer; by default a FakeTrainer.
        """
        rng = random.Random(seed)
        async with (
            FakeNetwork.open(rng, delay_seconds=delay_seconds, loss=loss, wires=wires) as network,
            trio.open_nursery() as nursery,
        ):
            swarm = cls(network, nursery)
            spec = spec or build_spec(rounds=rounds, averaging=averaging)
            swarm.spec = replace(spec, local=replace(spec.local, **(local or {})))
            swarm._model = model
            for number in range(peers):
                conduct = (conducts or {}).get(number) or Conduct()
                pace = (step_seconds or {}).get(number, STEP_SECONDS)
                peer = SimulatedPeer(number, Identity.generate(rng.randbytes), conduct, pace)
                conduct.me = peer
                swarm.peers.append(peer)
            swarm._build_trainer = build_trainer or swarm._build_trainer
            stakes = list(stakes_wei) or [STAKE_WEI] * (peers if seats is None else seats)
            swarm._found(stakes, cohort, has_chain=has_chain, snapshot_every_rounds=snapshot_every_rounds)
            with _fast_and_inline(), tempfile.TemporaryDirectory(prefix="p2pflock-simulation-") as disk:
                swarm._disk = Path(disk)
                yield swarm
                nursery.cancel_scope.cancel()

    def _found(self, stakes: Sequence[int], cohort: int, *, has_chain: bool, snapshot_every_rounds: int) -> None:
        task, rounds = self.spec.task_id, self.spec.task.rounds
        signers = [peer.signer for peer in self.peers]
        if has_chain:
            self.chain = chain = FakeChain(now=SimulatedClock().unix_seconds)
            for signer, stake in zip(signers, stakes, strict=True):
                chain.mint(signer.address, stake)
                chain.register(signer)
                chain.stake(signer, stake)
            chain.mint(signers[0].address, REWARD_A_ROUND_WEI * rounds)
            chain.create_task(signers[0], task, rounds, REWARD_A_ROUND_WEI * rounds)
            chain.open_epoch(signers[0], task, 0)
            self.committee = build_committee(task, 0, chain)
        else:
            seats = tuple(
                Seat(signer.peer_id, signer.address, signer.bls_public_key, stake)
                for signer, stake in zip(signers, stakes, strict=False)
            )
            trainers = tuple(Registered(s.peer_id, s.address, s.bls_public_key) for s in signers[len(stakes) :])
            self.committee = Committee(task, 0, 0, bytes(20), seats, REWARD_A_ROUND_WEI, trainers, cohort)
        self.facts = TaskFacts.of(self.spec, snapshot_every_rounds=snapshot_every_rounds)

    # --- life and death ---
    def start(self, number: int) -> None:
        """Start a peer, or start it again with what its disk holds."""
        peer = self.peers[number]
        if peer.scope is not None:
            raise ValueError(f"peer {number} runs already")
        peer.scope, peer.is_finished = trio.CancelScope(), False
        self._nursery.start_soon(self._live, peer, peer.scope)

    async def start_all(self) -> None:
        """Everybody who is not running, in order, as a person would start them."""
        for peer in self.peers:
            if not peer.is_running:
                self.start(peer.number)
                await trio.sleep(POLL_SECONDS)

    async def kill(self, *numbers: int) -> None:
        """Gone without a word."""
        for number in numbers:
            scope = self.peers[number].scope
            if scope is not None:
                scope.cancel()
        while any(self.peers[number].is_running for number in numbers):
            await trio.lowlevel.checkpoint()

    def _fake_trainer(self, peer: SimulatedPeer) -> Trainer:
        return FakeTrainer(
            self.spec,
            network=self._model,
            step_seconds=peer.step_seconds,
            state_dir=self._disk / str(peer.number),
        )

    async def _live(self, peer: SimulatedPeer, scope: trio.CancelScope) -> None:
        try:
            with scope:
                async with self.network.host(peer.signer.ed25519_seed()) as host:
                    conduct, clock = peer.conduct, SimulatedClock()
                    peer.context = PeerContext(
                        signer=peer.signer,
                        committee=self.committee,
                        seat=self.committee.seat_of(peer.signer.peer_id),
                        facts=self.facts,
                        params=LOCAL,
                        host=ConductedHost(host, conduct),
                        swarm=conduct.swarm(self.swarms.join(peer.signer.peer_id)),
                        trainer=conduct.trainer(self._build_trainer(peer)),
                        store=peer.store,
                        journal=peer.votes,
                        ledger=Ledger(peer.store, peer.index, self.facts.spec),
                        chain=self.chain,
                        clock=clock,
                        events=EventLog(None, clock, peer.events.append),
                    )
                    peer.peer = Peer(peer.context, pacing=PACING, timeouts=Timeouts.create())
                    await peer.peer.run(finished=lambda: setattr(peer, "is_finished", True))
        finally:
            self.swarms.kill(peer.signer.peer_id)
            peer.context = peer.peer = peer.scope = None

    # --- the network between them ---
    def _latency(self, sender: bytes, receiver: bytes) -> float:
        if sender != receiver and self.network.is_separated(sender, receiver):
            return math.inf
        return self.network.rng.uniform(*self.network.delay_seconds)

    def _lost(self, sender: bytes, receiver: bytes) -> bool:
        return self.network.rng.random() < self.network.loss

    def partition(self, *islands: Iterable[int]) -> None:
        """Nothing passes between islands of seats."""
        self.network.partition(*([self.peers[n].signer.peer_id for n in island] for island in islands))

    def heal(self) -> None:
        self.network.heal()

    # --- watching ---
    async def until(self, condition: Callable[[], bool], *, seconds: float = 300.0, what: str = "") -> float:
        """Wait in virtual time; returns the seconds it took.  AssertionError with everyone's state if it does
        not come true."""
        begun = trio.current_time()
        while not condition():
            if trio.current_time() - begun > seconds:
                raise AssertionError(f"not within {seconds:g} s: {what}\n{self.describe()}")
            await trio.sleep(POLL_SECONDS)
        return trio.current_time() - begun

    async def until_round(
        self, round_: int, numbers: Iterable[int] | None = None, *, seconds: float = 300.0
    ) -> float:
        """Until these peers (by default: every honest one that runs) have decided a round."""
        chosen = None if numbers is None else [self.peers[n] for n in numbers]

        def is_there() -> bool:
            watched = self.running_honest() if chosen is None else chosen
            return all(peer.head >= round_ for peer in watched)

        return await self.until(is_there, seconds=seconds, what=f"round {round_}")

    def running_honest(self) -> list[SimulatedPeer]:
        return [peer for peer in self.peers if peer.is_honest and peer.is_running]

    def describe(self) -> str:
        lines = [f"time {trio.current_time():.1f}"]
        for peer in self.peers:
            last = [f"{e['event']}:{e.get('reason') or e.get('round', '')}" for e in peer.events[-6:]]
            state = "runs" if peer.is_running else "down"
            lines.append(f"peer {peer.number} {state} {type(peer.conduct).__name__} head {peer.head} {last}")
        return "\n".join(lines)

    # --- what must hold at any time ---
    def check(self) -> None:
        """Honest peers decided the same records, and nobody honest contradicted a vote that it had saved."""
        honest = [peer for peer in self.peers if peer.is_honest]
        longest = max((list(Ledger.read_index(peer.index.replay())) for peer in honest), key=len)
        for peer in honest:
            own = [record for record, _ in Ledger.read_index(peer.index.replay())]
            assert own == [record for record, _ in longest[: len(own)]], f"peer {peer.number} decided otherwise"
            check_votes(peer)


def check_votes(peer: SimulatedPeer) -> None:
    """One header a round and one vote a slot, ever."""
    slots: dict[tuple[object, ...], bytes] = {}
    for entry in peer.votes.entries:
        slot: tuple[object, ...]
        if entry.kind == "vote":
            vote = Vote.decode(entry.body)
            if vote.validator != peer.signer.peer_id:
                continue  # another's, saved as a justification
            slot = ("vote", entry.round, vote.view, vote.step)
        elif entry.kind == "header":
            slot = ("header", entry.round)
        else:
            continue
        assert slots.setdefault(slot, entry.body) == entry.body, f"peer {peer.number} contradicts itself: {slot}"


@contextlib.contextmanager
def _fast_and_inline() -> Iterator[None]:
    """Pure checks are computed once for all peers, and blocking calls run in place: a clock that jumps
    would take a worker thread for idleness, and no two runs would be equal."""

    async def run_in_place(call: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    once = lru_cache(maxsize=1 << 16)
    aggregate_once = once(bls.fast_aggregate_verify)

    def verify_aggregate(keys: Sequence[bytes], message: bytes, signature: bytes) -> bool:
        return aggregate_once(tuple(keys), message, signature)

    with contextlib.ExitStack() as stack:
        for module, name in (
            (bls, "verify"),
            (bls, "verify_possession"),
            (bls.Scheme, "_read_signature"),
            (peerid, "verify_ed25519"),
            (peerid, "recover_address"),
        ):
            stack.enter_context(unittest.mock.patch.object(module, name, once(getattr(module, name))))
        stack.enter_context(unittest.mock.patch.object(bls, "fast_aggregate_verify", verify_aggregate))
        for patch in memo.patches():
            stack.enter_context(patch)
        stack.enter_context(unittest.mock.patch.object(trio.to_thread, "run_sync", run_in_place))
        yield
