"""What the parts of a running peer share: its keys, its ports and the facts of the task."""

from __future__ import annotations

from dataclasses import dataclass

from p2pflock.learning.spec import TaskSpec
from p2pflock.node.events import EventLog
from p2pflock.node.ledger import Journal, Ledger
from p2pflock.params import NetworkParams
from p2pflock.ports import BlobStore, Chain, Clock, Host, Signer, Swarm, Trainer
from p2pflock.primitives.cid import CID
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.pace import PaceRule
from p2pflock.storage import graph


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What the network side needs of a task spec (learning/spec.py has the rest)."""

    task: bytes  # 32 bytes
    spec: CID
    rounds: int
    is_dense: bool
    snapshot_every_rounds: int
    batch_size: int  # samples of a local step
    max_steps: int  # that a contribution may claim
    pace: PaceRule

    @classmethod
    def of(cls, spec: TaskSpec, *, snapshot_every_rounds: int) -> TaskFacts:
        local = spec.local
        adapted = (local.steps_min, local.steps_max) if local.is_adaptive else (local.steps, local.steps)
        return cls(
            task=spec.task_id,
            spec=spec.cid(),
            rounds=spec.task.rounds,
            is_dense=spec.averaging == "dense",
            snapshot_every_rounds=snapshot_every_rounds,
            batch_size=local.batch_size,
            max_steps=local.most_steps,
            pace=PaceRule(local.steps, *adapted, utilisation=float(local.target_utilisation)),
        )


@dataclass(frozen=True)
class PeerContext:
    """Frozen: the parts keep their own state, nobody keeps it here."""

    signer: Signer
    committee: Committee
    seat: int | None  # None: no vote
    facts: TaskFacts
    params: NetworkParams
    host: Host
    swarm: Swarm
    trainer: Trainer
    store: BlobStore
    journal: Journal
    ledger: Ledger
    chain: Chain | None
    clock: Clock
    events: EventLog

    @property
    def now(self) -> float:
        return self.clock.monotonic_seconds()

    def round_key(self, round_: int) -> bytes:
        """40 bytes that name a round in the exchange."""
        return self.facts.task + round_.to_bytes(8, "big")

    @property
    def index(self) -> int | None:
        """Own place in the roster; None: an onlooker, who folds along and serves blocks."""
        return self.committee.index_of(self.signer.peer_id)

    def peer_of(self, place: int) -> bytes:
        return self.committee.at(place).peer

    def store_file(self, data: bytes) -> CID:
        return graph.put_file(self.store, data)
