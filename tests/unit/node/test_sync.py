"""Catching up: nothing that is fetched is believed.  Real rounds from a simulated run, then lies about them."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import trio

from p2pflock.errors import InvalidMessageError, RemoteProtocolError, UnavailableError
from p2pflock.node.ledger import Ledger
from p2pflock.node.sync import BLOCK_PROTOCOL, MAX_FAILURES, ROUNDS_PROTOCOL, BlockExchange, RoundSync
from p2pflock.primitives import wire
from p2pflock.primitives.cid import CID
from p2pflock.protocol.messages import Attestation, RoundRecord
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import MemoryJournal, SimulatedSwarm
from p2pflock.testing.storage import MemoryStore
from p2pflock.testing.trainer import FakeTrainer

ROUNDS = 3


class Wires:
    """The Requests port as a table: peer and protocol to what answers."""

    def __init__(self, answers=None):
        self.answers = dict(answers or {})
        self.served = {}
        self.asked = []

    def serve(self, protocol, handler, *, max_request_bytes):
        self.served[protocol] = handler

    async def request(self, peer, protocol, data, *, max_response_bytes, deadline_seconds):
        await trio.lowlevel.checkpoint()
        self.asked.append((peer, protocol))
        answer = self.answers.get((peer, protocol))
        if answer is None:
            raise UnavailableError("nobody there")
        return await answer(peer, data)


@pytest.fixture(scope="module")
def history():
    """(committee, spec cid, store, index, spec) of a peer after three rounds, and a second signer set of none."""
    kept = []

    async def main():
        async with SimulatedSwarm.open(peers=4, rounds=ROUNDS, seed=2, snapshot_every_rounds=10) as swarm:
            await swarm.start_all()
            await swarm.until_round(ROUNDS)
            peer = swarm.peers[0]
            kept.append((swarm.committee, swarm.facts.spec, peer.store, peer.index, swarm.spec))

    run_simulation(main, seed=2)
    return kept[0]


class Late:
    """A peer that holds genesis only and asks `b"honest"` and others."""

    def __init__(self, history, **answers):
        self.committee, spec_cid, store, index, self.spec = history
        honest = Wires()
        ledger = Ledger(store, index, spec_cid)
        RoundSync(honest, BlockExchange(honest, store), store, ledger, FakeTrainer(self.spec), self.committee)
        self.truth = ledger
        self.wires = Wires({(b"honest", protocol): serve for protocol, serve in honest.served.items()})
        self.wires.answers |= {(peer.encode(), protocol): serve for (peer, protocol), serve in answers.items()}
        self.store, self.trainer = MemoryStore(), FakeTrainer(self.spec)
        self.ledger = Ledger(self.store, MemoryJournal(), spec_cid)
        self.ledger.append(ledger.at(0).record, None, [])
        self.blocks = BlockExchange(self.wires, self.store)
        self.sync = RoundSync(self.wires, self.blocks, self.store, self.ledger, self.trainer, self.committee)

    def lie(self, peer, protocol, change):
        """`peer` gives the honest answer, changed."""
        honest = self.wires.answers[b"honest", protocol]

        async def answer(asker, data):
            return change(await honest(asker, data))

        self.wires.answers[peer, protocol] = answer

    async def model(self):
        return hashlib.sha256(await self.trainer.export()).digest()


def test_catches_up_to_the_same_bits(history):
    async def main():
        late = Late(history)
        done = await late.sync.catch_up(b"honest", [])
        assert (done.from_round, done.to_round) == (0, ROUNDS)
        assert late.ledger.head == late.truth.head
        assert await late.model() == late.truth.head.record.model_hash

    trio.run(main)


def test_uses_what_was_fetched_already_and_drops_what_is_stale(history):
    async def main():
        late = Late(history)
        fetched = await late.sync.fetch_decisions(b"honest")
        await late.sync.catch_up(b"honest", [], fetched)
        asked = [protocol for _, protocol in late.wires.asked].count(ROUNDS_PROTOCOL)
        assert asked == 2  # what came, and that there is no more
        assert (await late.sync.catch_up(b"honest", [], fetched)).to_round == ROUNDS

    trio.run(main)


def forge(change):
    def answer(data):
        entries = [
            (RoundRecord.decode(record), Attestation.decode(attestation))
            for record, attestation in wire.unpack(data, max_bytes=1 << 21)
        ]
        return wire.pack([[r.encode(), a.encode()] for r, a in change(entries)])

    return answer


def resigned(entries):
    """Another model, and an attestation that names it under the old signature."""
    record, attestation = entries[0]
    lie = replace(record, model_hash=bytes(32))
    return [(lie, replace(attestation, record=lie.cid()))]


LIES = {
    "another model under the true signatures": forge(
        lambda e: [(replace(e[0][0], model_hash=bytes(32)), e[0][1]), *e[1:]]
    ),
    "another model with its own attestation": forge(resigned),
    "other rewards": forge(lambda e: [(replace(e[0][0], rewards_root=b"r" * 32), e[0][1])]),
    "an attestation of another view": forge(lambda e: [(e[0][0], replace(e[0][1], view=7))]),
    "fewer signers than a quorum": forge(lambda e: [(e[0][0], replace(e[0][1], signers=b"\x03"))]),
    "more signers than have signed": forge(
        lambda e: [(e[0][0], replace(e[0][1], signers=b"\x07" if e[0][1].signers != b"\x07" else b"\x0f"))]
    ),
    "the second round first": forge(lambda e: e[1:]),
    "the first round twice": forge(lambda e: [e[0], e[0]]),
    "no list": lambda data: wire.pack(7),
    "entries of one part": lambda data: wire.pack([[b"x"]]),
    "entries of text": lambda data: wire.pack([["x", "y"]]),
    "seventeen rounds": lambda data: wire.pack([[b"", b""]] * 17),
    "no message pack": lambda data: b"\xc1\xff",
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("lie", LIES)
def test_poisoned_rounds_are_refused(history, lie):
    async def main():
        late = Late(history)
        genesis = await late.model()
        late.lie(b"liar", ROUNDS_PROTOCOL, LIES[lie])
        with pytest.raises(InvalidMessageError):
            await late.sync.catch_up(b"liar", [b"honest"])
        assert late.ledger.head.record.round == 0
        assert await late.model() == genesis

    trio.run(main)


def test_a_liar_that_starts_truthfully_leaves_the_true_part(history):
    """What a quorum signed stays; the forged rest is refused before anything of the answer is used."""

    async def main():
        late = Late(history)
        late.lie(b"liar", ROUNDS_PROTOCOL, forge(lambda e: [e[0], (replace(e[1][0], epoch=9), e[1][1])] if len(e) > 1 else e))
        with pytest.raises(InvalidMessageError):
            await late.sync.catch_up(b"liar", [b"honest"])
        assert late.ledger.head.record.round == 0

    trio.run(main)


@pytest.mark.parametrize("answer", [b"", b"junk", None])
def test_poisoned_blocks_come_from_somebody_else(history, answer):
    async def main():
        late = Late(history)
        late.lie(b"liar", ROUNDS_PROTOCOL, lambda data: data)
        if answer is not None:
            late.lie(b"liar", BLOCK_PROTOCOL, lambda data: answer)
        await late.sync.catch_up(b"liar", [b"honest"])
        assert late.ledger.head == late.truth.head
        assert late.wires.asked.count((b"liar", BLOCK_PROTOCOL)) == 1  # then it is asked last

    trio.run(main)


def test_without_the_blocks_nothing_changes(history):
    async def main():
        late = Late(history)
        late.lie(b"liar", ROUNDS_PROTOCOL, lambda data: data)
        with pytest.raises(UnavailableError):
            await late.sync.catch_up(b"liar", [])
        assert late.ledger.head.record.round == 0

    trio.run(main)


def test_restored_from_payloads_alone(history):
    """No snapshot of the head: genesis and the folds since."""

    async def main():
        late = Late(history)
        await late.sync.catch_up(b"honest", [])
        late.wires.answers.clear()
        late.store.lose(late.ledger.head.record.weights) if late.store.has(late.ledger.head.record.weights) else None
        late.trainer = FakeTrainer(late.spec)
        again = RoundSync(late.wires, late.blocks, late.store, late.ledger, late.trainer, late.committee)
        assert await again.restore() == ROUNDS
        assert await late.model() == late.truth.head.record.model_hash

    trio.run(main)


@pytest.mark.parametrize("request_", [[1], 7, [b"task", 1, 2], [b"another task", 1], [b"", "x"], [b"", -1]])
def test_malformed_requests_are_the_askers_fault(history, request_):
    async def main():
        late = Late(history)
        try:
            answer = await late.wires.answers[b"honest", ROUNDS_PROTOCOL](b"asker", wire.pack(request_))
        except RemoteProtocolError:
            return
        assert answer == wire.pack([])

    trio.run(main)


def test_blocks_are_served_by_id_and_nothing_else_is(history):
    async def main():
        late = Late(history)
        serve = late.wires.answers[b"honest", BLOCK_PROTOCOL]
        known = late.truth.head.cid
        assert known.matches(await serve(b"asker", known.to_bytes()))
        assert await serve(b"asker", CID.of_raw(b"unknown").to_bytes()) == b""
        with pytest.raises(RemoteProtocolError):
            await serve(b"asker", b"../../etc/passwd")

    trio.run(main)


def test_a_damaged_block_is_healed_from_a_peer(history):
    async def main():
        late = Late(history)
        cid = late.truth.head.cid
        late.store.put(cid, late.truth.head.record.encode())
        late.store.damage(cid)
        assert cid.matches(await late.blocks.get(cid, [b"honest"]))
        assert cid.matches(late.store.get(cid))

    trio.run(main)


def test_what_is_remembered_of_failures_is_bounded(history):
    async def main():
        late = Late(history)
        peers = [n.to_bytes(4, "big") for n in range(MAX_FAILURES + 50)]
        with pytest.raises(UnavailableError):
            await late.blocks.get(CID.of_raw(b"nowhere"), peers)
        assert len(late.blocks._failures) == MAX_FAILURES

    trio.run(main)
