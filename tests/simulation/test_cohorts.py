"""Twelve peers in virtual time, four of whom vote and five of whom contribute in a round."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import trio

from p2pflock.primitives.cid import CID
from p2pflock.protocol import provenance
from p2pflock.protocol.committee import OPINIONS, compute_beacon, compute_cohort
from p2pflock.protocol.messages import Absence, Score, Scorecard
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import Conduct, SimulatedSwarm
from p2pflock.testing.wires import Wires


def simulate(scenario, *, seed=1, **options):
    async def main():
        async with SimulatedSwarm.open(peers=12, seats=4, cohort=5, seed=seed, **options) as swarm:
            await scenario(swarm)
            swarm.check()

    run_simulation(main, seed=seed)


def cohort_of(swarm, round_):
    parent = swarm.peers[0].record(round_ - 1)
    return compute_cohort(swarm.committee, compute_beacon(swarm.facts.task, 0, round_, parent.digest()))


def named(record):
    return sorted([c.seat for c in record.contributions] + [a.seat for a in record.absent])


def test_the_drawn_contribute_and_everybody_folds():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
        contributed = set()
        for round_ in range(1, 5):
            records = {peer.record(round_) for peer in swarm.peers}
            assert len(records) == 1
            record = records.pop()
            assert not record.absent
            assert named(record) == list(cohort_of(swarm, round_).members)
            contributed |= set(named(record))
        assert len(contributed) > 5
        assert len({peer.told("finished")[0]["model_hash"] for peer in swarm.peers}) == 1
        # Nobody had to ask for what was decided: those without a vote followed it.
        assert not any(peer.told("caught_up") for peer in swarm.peers)
        for peer in swarm.peers[4:]:
            assert not any(entry.kind in {"vote", "proposal"} for entry in peer.votes.entries)
        tables = swarm.peers[11].context.ledger.tables
        assert {entry.address for entry in tables.rewards} >= {
            swarm.committee.at(place).address for place in contributed
        }

    simulate(scenario, rounds=4)


def test_verify_accounts_for_the_cohort():
    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
        peer = swarm.peers[10]
        checkpoint = provenance.CID.parse(peer.told("finished")[0]["checkpoint"])
        trust = provenance.Trust(frozenset({swarm.committee.cid()}))
        report = provenance.check(checkpoint, peer.store.get, peer.context.ledger.head.attestation, trust)
        assert not report.failed
        assert report.findings["participation"].verdict is provenance.Verdict.PASS
        assert report.findings["authorship"].verdict is provenance.Verdict.PASS
        assert "15 seats" in report.findings["participation"].reason

    simulate(scenario, rounds=3)


def test_dead_trainers_are_absent_and_later_drawn_ones_take_over():
    """A third of those without a vote die for good; cohorts in which they are few close after the grace."""

    async def scenario(swarm):
        await swarm.start_all()
        await swarm.until_round(1)
        await swarm.kill(9, 10, 11)
        await swarm.until_round(6, range(9), seconds=900)
        absent = [entry for n in range(3, 7) for entry in swarm.peers[0].record(n).absent]
        assert absent
        assert {entry.seat for entry in absent} <= {9, 10, 11}
        assert {Absence(entry.reason) for entry in absent} == {Absence.SILENT}

    simulate(scenario, rounds=6)


def test_a_cohort_that_is_mostly_gone_does_not_stall_the_swarm():
    async def scenario(swarm):
        await swarm.start_all()
        round_ = 1
        while True:  # until seats are in the cohort, but no quorum of it
            await swarm.until_round(round_)
            drawn = cohort_of(swarm, round_ + 1).members
            seats = [place for place in drawn if place < 4]
            if 1 <= len(seats) <= 3:
                break
            round_ += 1
        await swarm.kill(*(place for place in drawn if place >= 4))
        await swarm.until_round(round_ + 1, range(4), seconds=300)
        record = swarm.peers[0].record(round_ + 1)
        assert [entry.seat for entry in record.contributions] == seats
        assert {Absence(entry.reason) for entry in record.absent} == {Absence.SILENT}

    simulate(scenario, rounds=9)


class Meddler(Conduct):
    """Has its say on a contribution that was not drawn for it, its own, in the place of one that was."""

    def publish(self, topic, data):
        if topic == "header":
            self.own = CID.of_dag_cbor(data)
        if topic != "scorecard":
            return (data,)
        card = Scorecard.decode(data)
        card = replace(card, scores=(Score(self.own, True, 1_000_000, 0), *card.scores[1:]), signature=b"")
        return (replace(card, signature=self.me.signer.sign_bls(card.signing_root())).encode(),)


def test_a_large_committee_scores_in_panels_and_leaves_a_meddlers_card_out():
    """28 peers, all of whom vote and contribute."""

    async def main():
        wires = Wires(random.Random(2))
        async with SimulatedSwarm.open(peers=28, rounds=2, seed=2, conducts={5: Meddler()}, wires=wires) as swarm:
            for peer in swarm.peers:
                swarm.start(peer.number)
            await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers))
            swarm.check()
            for round_ in (1, 2):
                record = swarm.peers[0].record(round_)
                cards = [Scorecard.decode(swarm.peers[0].store.get(cid)) for cid in record.scorecards]
                scorers = {swarm.committee.seat_of(card.validator) for card in cards}
                assert scorers == set(range(28)) - {5}
                opinions = Counter(line.contribution for card in cards for line in card.scores)
                assert len(opinions) == 28
                assert {count for count in opinions.values()} == {OPINIONS - 1, OPINIONS}  # without the meddler's
                assert not record.absent
            peer = swarm.peers[9]
            checkpoint = CID.parse(peer.told("finished")[0]["checkpoint"])
            trust = provenance.Trust(frozenset({swarm.committee.cid()}))
            report = provenance.check(checkpoint, peer.store.get, peer.context.ledger.head.attestation, trust)
            assert report.findings["participation"].verdict is provenance.Verdict.PASS

    run_simulation(main, seed=2)


def test_two_runs_on_wires_are_equal():
    def run():
        histories = []

        async def scenario(swarm):
            await swarm.start_all()
            await swarm.until_round(2)
            histories.extend(tuple(map(str, peer.events)) for peer in swarm.peers)

        simulate(scenario, rounds=2, seed=5, wires=Wires(random.Random(5), loss=0.02))
        return histories

    assert run() == run()


@pytest.mark.parametrize("size_bytes", [125_000, 1_250_000])
def test_a_byte_takes_its_time_on_the_wires(size_bytes):
    async def main():
        wires = Wires(random.Random(1), latency_seconds=(0.05, 0.05), bits_per_second=10e6)
        alone = wires.send(b"a", b"b", size_bytes)
        assert alone == pytest.approx(0.05 + size_bytes * 8 / 10e6)
        assert wires.send(b"a", b"c", size_bytes) == pytest.approx(alone + size_bytes * 8 / 10e6)  # a's uplink
        assert wires.send(b"d", b"b", size_bytes) == pytest.approx(alone + size_bytes * 8 / 10e6)  # b's downlink
        await trio.sleep(3)
        assert wires.send(b"e", b"b", size_bytes) == pytest.approx(alone)

    run_simulation(main, seed=1)
