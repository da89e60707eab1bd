"""Consensus under a hostile network: safety always, liveness once it is calm, and a harness that can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import consensus_network as world

from p2pflock.protocol.committee import Committee
from p2pflock.protocol.consensus import Consensus, Value, compute_value

SCHEDULES = 120


@pytest.mark.parametrize("start", range(0, SCHEDULES, 20))
def test_all_honest_decide_the_same_valid_record(start: int) -> None:
    """Delay, loss, reordering, duplication, splits, crashes, and less than a third of the stake lying."""
    for seed in range(start, start + 20):
        weights, faulty = world.draw_committee(seed)
        weather = world.draw_weather(seed)
        net = world.Network(seed, weights, faulty, weather)
        net.run(limit=weather.calm + 700)  # the largest time-out is 300 s; raises Violation on any breach
        assert all(node.decided for node in net.honest), f"seed {seed}: not decided"
        views = max(node.views for node in net.honest)
        assert views <= net.view_at_calm + len(weights) + 1, f"seed {seed}: {views} views"


def test_schedules_are_as_hostile_as_they_claim() -> None:
    crashes = evidence = late = 0
    for seed in range(30):
        weights, faulty = world.draw_committee(seed)
        net = world.Network(seed, weights, faulty, world.draw_weather(seed))
        net.run(limit=1000)
        crashes, evidence = crashes + net.crashes, evidence + net.evidence
        late += any(node.views > 0 for node in net.honest)
    assert crashes > 10
    assert evidence > 100
    assert late > 10


def test_same_seed_same_history() -> None:
    histories = []
    for _ in range(2):
        weights, faulty = world.draw_committee(3)
        net = world.Network(3, weights, faulty, world.draw_weather(3))
        net.run(limit=1000)
        histories.append((net.now, net.count, net.outcome))
    assert histories[0] == histories[1]


# --- the harness must be able to find what it looks for -------------------------------------------------
class WeakQuorum(Committee):
    __slots__ = ()

    def is_quorum(self, weight_wei: int) -> bool:
        return 2 * weight_wei > self.total_wei


class NoLock(Consensus):
    def _may_prevote(self, value: Value, valid_view: int) -> bool:
        return True


class Forgetful(Consensus):
    @classmethod
    def restore(cls, committee, round_, me, beacon, timeouts, saved):
        return super().restore(committee, round_, me, beacon, timeouts, ())


class Credulous(Consensus):
    def _take_proposal(self, proposal, seat):
        super()._take_proposal(proposal, seat)
        value = compute_value(proposal.record)
        if value is not None:
            self._checked[value.digest] = True


CRUEL = world.Weather(
    loss=0.0, crash=0.0, calm=100.0, delay=0.5, check_delay=0.1, precommit_loss=0.5, is_cruel=True
)
SPLIT = world.Weather(loss=0.0, crash=0.0, calm=60.0, delay=0.3, check_delay=0.1, is_split=True)
CRASHING = world.Weather(crash=0.05, calm=60.0)


@pytest.mark.parametrize(
    ("machine", "committee", "weights", "faulty", "weather", "breach"),
    [
        (Consensus, WeakQuorum, [1] * 7, {0, 3}, SPLIT, "decided differently"),
        (NoLock, Committee, [1] * 4, {1}, CRUEL, "decided differently"),
        (Forgetful, Committee, [1] * 4, {1}, CRASHING, "voted twice"),
        (Credulous, Committee, [1] * 4, {1}, CRUEL, "invalid record"),
    ],
    ids=["quorum of a half", "no lock", "votes not restored", "unchecked proposals"],
)
def test_a_broken_rule_is_found(machine, committee, weights, faulty, weather, breach) -> None:
    for seed in range(60):
        world.Network(seed, weights, frozenset(faulty), weather).run(limit=weather.calm)  # sound: no breach
    with pytest.raises(world.Violation, match=breach):
        for seed in range(60):
            world.Network(seed, weights, frozenset(faulty), weather, machine, committee).run(weather.calm)


def test_a_third_of_the_stake_is_too_much() -> None:
    """The bound is tight: with f = n/3 by weight the same adversary wins."""
    with pytest.raises(world.Violation, match="decided differently"):
        for seed in range(60):
            world.Network(seed, [1] * 7, frozenset({0, 3, 5}), SPLIT).run(limit=SPLIT.calm)
