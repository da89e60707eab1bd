"""Seven real peers in virtual time: whatever the network or a third of the stake does, one history."""

from __future__ import annotations

import functools

import pytest
import trio

from p2pflock.params import LOCAL
from p2pflock.protocol.committee import compute_beacon, compute_proposer
from p2pflock.protocol.messages import Absence
from p2pflock.protocol.settlement import compute_genesis
from p2pflock.testing import rogues
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm
from p2pflock.testing.trainer import FakeTrainer


def simulate(scenario, *, seed=1, **options):
    async def main():
        async with SimulatedSwarm.open(seed=seed, **options) as swarm:
            await scenario(swarm)
            swarm.check()

    run_simulation(main, seed=seed)


def absent(record):
    return {entry.seat: Absence(entry.reason) for entry in record.absent}


def contributors(record):
    return {entry.seat for entry in record.contributions}


def seat_of_view(swarm, round_, view=0):
    """Who proposes in a view of a round whose parent is decided."""
    parent = swarm.peers[0].record(round_ - 1)
    beacon = compute_beacon(swarm.facts.task, 0, round_, parent.digest())
    return compute_proposer(swarm.committee, beacon, view)


# --- no fault ---------------------------------------------------------------------------------------------
def test_all_hold_the_same_model_after_every_round():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(5)
        await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
        for round_ in range(6):
            records = {peer.record(round_) for peer in swarm.peers}
            assert len(records) == 1
            record = records.pop()
            if round_:
                assert contributors(record) == set(range(7))
                assert not record.absent
        hashes = [swarm.peers[0].record(round_).model_hash for round_ in range(6)]
        assert len(set(hashes)) == 6
        for peer in swarm.peers:
            assert [e["view"] for e in peer.told("decided")] == [0] * 5
            assert not peer.told("dropped")
            assert peer.told("finished")[0]["model_hash"] == hashes[5].hex()
            assert (await peer.context.trainer.export()) is not None
        first, last = (swarm.peers[0].told("evaluated") or [None])[:1], swarm.peers[0].told("finished")[0]
        assert last["accuracy_micro"] > 500_000, first

    simulate(scenario, rounds=5)


def test_two_runs_of_one_seed_are_equal():
    def run():
        histories = []

        async def scenario(swarm):
            await swarm.start_all()
            await swarm.until_round(2)
            histories.extend(tuple(map(str, peer.events)) for peer in swarm.peers)

        simulate(scenario, rounds=2, peers=4, loss=0.05, seed=9)
        return histories

    assert run() == run()


def test_slow_and_lossy_network():
    async def scenario(swarm):
        await swarm.start_all()
        seconds = await swarm.until_round(3)
        assert seconds < 90

    simulate(scenario, rounds=3, delay_seconds=(0.1, 0.3), loss=0.05)


# --- absences ---------------------------------------------------------------------------------------------
def test_killed_in_mid_round_then_back():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await trio.sleep(0.5)  # all are training
        await swarm.kill(3)
        await swarm.until_round(3)
        assert absent(swarm.peers[0].record(2)) == {3: Absence.SILENT}
        swarm.start(3)
        await swarm.until(lambda: swarm.peers[3].told("caught_up"), what="catching up")
        caught = swarm.peers[3].told("caught_up")[0]
        known = swarm.peers[0].record(caught["to_round"])
        assert caught["from_round"] == 1
        assert caught["to_round"] >= 3
        assert caught["model_hash"] == known.model_hash.hex()
        await swarm.until(
            lambda: any(3 in contributors(swarm.peers[0].record(r)) for r in range(4, swarm.peers[0].head + 1)),
            what="contributing again",
        )

    simulate(scenario, rounds=12, snapshot_every_rounds=4)


def test_killed_after_its_contribution_is_out():
    """Its payload may be with some only: whoever decides without it takes it from those."""

    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await swarm.until(lambda: swarm.peers[5].told("contributed", round=2))
        await trio.sleep(0.06)
        await swarm.kill(5)
        await swarm.until_round(3)
        assert contributors(swarm.peers[0].record(2)) >= {0, 1, 2, 3, 4, 6}

    for seed in (1, 2):
        simulate(scenario, rounds=3, seed=seed)


def test_the_first_peer_is_not_special():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await swarm.kill(0)
        await swarm.until_round(2)
        swarm.start(4) if not swarm.peers[4].is_running else None
        await swarm.kill(4)
        await trio.sleep(1)
        swarm.start(4)  # joins without the peer that everybody else joined by
        await swarm.until_round(4, [4])

    simulate(scenario, rounds=6)


def test_slow_trainer_is_left_out_and_the_round_does_not_stall():
    """A quorum is complete after 1 s, the grace is 2 s, and it has not made one step by then."""

    async def scenario(swarm):
        await swarm.start_all()
        seconds = await swarm.until_round(3)
        for round_ in (1, 2, 3):
            assert absent(swarm.peers[0].record(round_)) == {2: Absence.SILENT}
        assert seconds < 3 * 8
        assert swarm.peers[2].head >= 3

    simulate(scenario, rounds=3, step_seconds={2: 5.0})


def test_slightly_slow_trainer_is_waited_for():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(2)
        for round_ in (1, 2):
            assert contributors(swarm.peers[0].record(round_)) == set(range(7))

    simulate(scenario, rounds=2, step_seconds={2: 0.4})


def test_everybody_dies_in_mid_round():
    """Twice: while training, and while voting.  Saved headers and votes bind whoever comes back."""

    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await trio.sleep(0.5)
        await swarm.kill(*range(7))
        await swarm.start_all()
        await swarm.until(
            lambda: all(any(e.kind == "vote" and e.round == 3 for e in p.votes.entries) for p in swarm.peers[:4])
        )
        await swarm.kill(*range(7))
        swarm.check()
        await swarm.start_all()
        await swarm.until_round(4)

    simulate(scenario, rounds=4)


def test_partition_and_heal():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await trio.sleep(0.3)
        swarm.partition({0, 1, 2}, {3, 4, 5, 6})
        await trio.sleep(45)
        heads = {peer.head for peer in swarm.peers}
        assert heads <= {1, 2}  # neither side is a quorum; what was on its way may still have decided
        swarm.check()
        swarm.heal()
        await swarm.until_round(max(heads) + 2)

    simulate(scenario, rounds=5)


# --- the chain --------------------------------------------------------------------------------------------
def test_chain_away_for_some_rounds():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await swarm.until(lambda: swarm.chain.task(swarm.facts.task).last_round == 1)
        swarm.chain.is_down = True
        await swarm.until_round(3)
        swarm.chain.is_down = False
        assert swarm.chain.task(swarm.facts.task).last_round < 3
        await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
        task = swarm.chain.task(swarm.facts.task)
        assert (task.last_round, task.head) == (4, swarm.peers[0].context.ledger.head.head)
        for peer in swarm.peers:
            assert [entry["round"] for entry in peer.told("anchored")] == [1, 2, 3, 4]
        assert any(peer.told("anchor_delayed") for peer in swarm.peers)

    simulate(scenario, rounds=4, has_chain=True)


def test_reorganised_anchors_are_made_again():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until(lambda: swarm.chain.task(swarm.facts.task).last_round == 2)
        swarm.chain.reorganise(swarm.facts.task, 2)
        await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
        task = swarm.chain.task(swarm.facts.task)
        assert (task.last_round, task.head) == (4, swarm.peers[0].context.ledger.head.head)

    simulate(scenario, rounds=4, has_chain=True)


@functools.lru_cache
def seed_in_which_a_liar_begins():
    """Turns follow from the task's id and the peers' keys: a seed in which seat 0 or 1 proposes first."""

    async def first_proposer(seed, found):
        async with SimulatedSwarm.open(seed=seed, rounds=2) as swarm:
            genesis = await FakeTrainer(swarm.spec).open()
            parent = compute_genesis(swarm.committee, genesis.model_hash, genesis.weights)
            found.append(compute_proposer(swarm.committee, compute_beacon(swarm.facts.task, 0, 1, parent.digest()), 0))

    for seed in range(1, 100):
        found = []
        run_simulation(functools.partial(first_proposer, seed, found), seed=seed)
        if found[0] < 2:
            return seed
    raise AssertionError("no such seed")


# --- liars: two of seven, less than a third of the stake ----------------------------------------------------
def run_with(*conducts, rounds=3, seed=1, expect=None, **options):
    """The first seats lie; the honest ones must reach the last round."""

    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(rounds, seconds=400)
        if expect:
            expect(swarm)

    simulate(scenario, rounds=rounds, conducts=dict(enumerate(conducts)), seed=seed, **options)


def test_two_headers_for_one_slot():
    def expect(swarm):
        honest = swarm.peers[2:]
        for peer in honest:
            evidence = [e for e in peer.votes.entries if e.kind == "evidence" and e.round == 1]
            assert len(evidence) <= 4  # one pair a liar, however many versions it sends
        assert any(peer.told("dropped", what="equivocation") for peer in honest)

    run_with(rogues.TwoHeaders(2), rogues.TwoHeaders(20), expect=expect)


def test_two_votes_for_one_slot():
    def expect(swarm):
        assert any(peer.told("dropped", what="equivocation", reason="Vote") for peer in swarm.peers[2:])

    run_with(rogues.TwoVotes(), rogues.TwoVotes(), expect=expect)


def test_payloads_that_do_not_decode_or_never_come():
    def expect(swarm):
        honest = [n for n in (1, 2, 3) if seat_of_view(swarm, n) > 1]  # a liar may be honest about itself
        assert honest
        for round_ in honest:
            record = swarm.peers[2].record(round_)
            judged = {entry.seat: entry.weight for entry in record.contributions}
            assert judged.get(0, 0) == 0  # left out, or judged invalid by the scorecards
            view = swarm.peers[2].told("decided", round=round_)[0]["view"]
            if seat_of_view(swarm, round_, view) != 1:  # who proposes itself may be honest about itself
                assert absent(record)[1] in (Absence.UNDELIVERED, Absence.SILENT)

    run_with(rogues.Garbage(), rogues.NeverDelivers(), expect=expect)


@pytest.mark.parametrize("liar", [rogues.WrongModel, rogues.MuteProposer, rogues.HastyProposer])
def test_what_a_lying_proposer_proposes_is_not_decided(liar):
    def expect(swarm):
        turns = [seat_of_view(swarm, round_) < 2 for round_ in range(1, 3)]
        views = [entry["view"] for entry in swarm.peers[2].told("decided")]
        assert turns[0]
        assert [view > 0 for view in views] == turns
        assert bool(swarm.peers[2].told("dropped", what="proposal")) == (liar is not rogues.MuteProposer)
        for round_ in (1, 2):  # all had the time to train
            assert contributors(swarm.peers[2].record(round_)) == set(range(7))

    run_with(liar(), liar(), rounds=2, seed=seed_in_which_a_liar_begins(), expect=expect)


def test_a_quorum_for_genesis_is_refused_and_harms_nobody():
    def expect(swarm):
        decided = swarm.peers[2].told("decided", round=1)[0]
        assert decided["view"] > 0
        assert swarm.peers[2].told("dropped", what="proposal")
        assert swarm.peers[2].record(1).parent_attestation is None

    run_with(rogues.GenesisAttester(), rogues.GenesisAttester(), rounds=2, seed=seed_in_which_a_liar_begins(), expect=expect)


def test_a_censor_costs_its_victim_no_more_than_its_own_turns():
    def expect(swarm):
        censored = []
        for entry in swarm.peers[2].told("decided"):
            record = swarm.peers[2].record(entry["round"])
            censored.append(seat_of_view(swarm, entry["round"], entry["view"]) < 2)
            assert (4 in contributors(record)) != censored[-1]
        assert censored[0]

    run_with(rogues.Censor(4), rogues.Censor(4), rounds=2, seed=seed_in_which_a_liar_begins(), expect=expect)


def test_one_content_id_with_two_sizes():
    def expect(swarm):
        for round_ in (1, 2, 3):
            record = swarm.peers[2].record(round_)
            weights = {entry.seat: entry.weight for entry in record.contributions}
            assert all(weights[seat] > 0 for seat in range(2, 7))  # nobody's payload was kept out
            if not seat_of_view(swarm, round_) < 2:  # who proposes itself may be honest about itself
                assert all(weights.get(seat, 0) == 0 for seat in (0, 1))

    run_with(rogues.WrongSize(), rogues.WrongSize(), seed=3, expect=expect)


def test_boasters_halt_nobody():
    """They claim to be ahead; asking them must not cost the others their rounds."""

    def expect(swarm):
        decided = swarm.peers[3].told("decided")
        assert len(decided) == 3  # played, not caught up with
        assert sum(entry["seconds"] for entry in decided) < 30

    run_with(rogues.Boaster(), rogues.Boaster(seconds=60), expect=expect)


def test_liars_cannot_poison_who_catches_up():
    boasters = rogues.Boaster(), rogues.Boaster(seconds=60)

    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await swarm.kill(6)
        await swarm.until_round(3)
        swarm.start(6)
        await swarm.until(lambda: swarm.peers[6].head >= 3, seconds=200, what="catching up among liars")
        assert all(boaster.asked for boaster in boasters)

    simulate(scenario, rounds=14, conducts=dict(enumerate(boasters)), snapshot_every_rounds=4)


def test_flood_of_early_messages_is_bounded():
    def expect(swarm):
        for peer in swarm.peers[2:]:
            assert peer.peer.intake.early_bytes <= 7 << 20

    run_with(rogues.Flooder(), rogues.Flooder(400), expect=expect, rounds=2)


def test_liars_with_less_than_a_third_of_unequal_stake():
    """Seat 0 alone may have a lot: what counts is stake, not heads."""
    stakes = [LOCAL.chain.min_stake_wei * n for n in (32, 2, 13, 13, 13, 13, 17)]
    run_with(rogues.TwoVotes(), stakes_wei=stakes, rounds=2)
