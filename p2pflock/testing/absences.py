"""A simulated swarm in which a share of the peers is away in every round, another one each time.

Law: who is away in a round leaves as soon as it has decided the round before, so that it has no part in this one,
and may come back when the others have decided it.  Half of the absences are deaths, memory lost and disk kept; half
are splits: the peer is up, trains, and nothing it says arrives.  Everything is drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from p2pflock.testing.simulation import SimulatedSwarm

POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """Seats that are away in a round: dead, or up and cut off."""

    dead: frozenset[int]
    cut: frozenset[int]

    @property
    def away(self) -> frozenset[int]:
        return self.dead | self.cut


def draw_plans(rng: random.Random, peers: int, away: int, rounds: int) -> list[Plan]:
    """One plan a round."""
    plans = []
    for _ in range(rounds):
        out = rng.sample(range(peers), away)
        dead = frozenset(seat for seat in out if rng.random() < 0.5)
        plans.append(Plan(dead, frozenset(out) - dead))
    return plans


async def play(swarm: SimulatedSwarm, plans: Sequence[Plan], *, stall_seconds: float) -> list[float]:
    """Play one round a plan from the swarm's head on, then bring everybody back.

    Returns the seconds that each round took, from the first decision of the round before to its own first decision.
    AssertionError with everyone's state when one takes longer than `stall_seconds`.
    """
    head = max(peer.head for peer in swarm.peers)
    took, last = [], Plan(frozenset(), frozenset())
    for plan in plans:
        begun, before, head = trio.current_time(), head, head + 1
        gone = set(last.away & plan.away)  # away in two rounds in a row: does not come back in between
        await _arrange(swarm, plan, gone)
        while all(peer.head < head for peer in swarm.peers):
            if trio.current_time() - begun > stall_seconds:
                raise AssertionError(f"round {head} stalls without {sorted(plan.away)}\n{swarm.describe()}")
            if leaving := {seat for seat in plan.away - gone if swarm.peers[seat].head >= before}:
                gone |= leaving
                await _arrange(swarm, plan, gone)
            await trio.sleep(POLL_SECONDS)
        took.append(trio.current_time() - begun)
        last = plan
    await _arrange(swarm, last, set())
    return took


async def _arrange(swarm: SimulatedSwarm, plan: Plan, gone: set[int]) -> None:
    """Those who are gone are dead or each on an island; all others are up and together."""
    for peer in swarm.peers:
        if peer.number in gone & plan.dead:
            await swarm.kill(peer.number)
        elif not peer.is_running:
            swarm.start(peer.number)
    swarm.heal()
    if islands := [{seat} for seat in sorted(gone & plan.cut)]:
        swarm.partition(*islands)
