"""Peers of different speed, and links of different speed, in virtual time."""

from __future__ import annotations

import functools

import pytest

from p2pflock.protocol.messages import ContributionHeader
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import STEP_SECONDS, SimulatedSwarm

BATCH = 8  # of the tiny task


def headers_of(swarm, round_):
    """Seat -> header of everyone whom the decided round counts."""
    record = swarm.peers[0].record(round_)
    store = swarm.peers[0].store
    return {c.seat: ContributionHeader.decode(store.get(c.header)) for c in record.contributions}


@pytest.mark.parametrize("averaging", ["gossip", "dense"])
def test_a_peer_five_times_slower_is_counted_in_with_fewer_samples(averaging):
    slow, rounds = 3, 6

    async def main():
        async with SimulatedSwarm.open(
            peers=7, rounds=rounds, averaging=averaging, step_seconds={slow: 5 * STEP_SECONDS}
        ) as swarm:
            await swarm.start_all()
            await swarm.until_round(rounds)
            swarm.check()
            counted = [headers_of(swarm, round_) for round_ in range(1, rounds + 1)]
            assert sum(slow in headers for headers in counted) >= rounds - 1
            for headers in counted:
                for seat, header in headers.items():
                    assert header.samples == header.steps * BATCH
                    assert 1 <= header.steps <= 5
                    if seat == slow:
                        assert header.steps < 5
            everyone = [sum(h.steps for h in headers.values()) for headers in counted]
            assert min(everyone) >= 6 * 5 - 6 + 1  # hurrying the slow one costs the others a step at most
            assert {len(h) for h in counted[1:]} <= {6, 7}

    run_simulation(main, seed=4)


def chosen_steps(delay, **local):
    """H by round of one peer, with this one-way delay of every message."""
    rounds, told = 6, []

    async def main():
        async with SimulatedSwarm.open(
            peers=4, rounds=rounds, delay_seconds=(delay, delay * 1.1), local=local
        ) as swarm:
            await swarm.start_all()
            await swarm.until_round(rounds)
            swarm.check()
            told.extend(entry["steps"] for entry in swarm.peers[0].told("training"))
            counted = [headers_of(swarm, round_) for round_ in range(1, rounds + 1)]
            assert all(len(headers) == 4 for headers in counted)

    run_simulation(main, seed=2)
    return told


@functools.lru_cache
def adapted(delay):
    return chosen_steps(delay, steps=20, steps_min=15, steps_max=128)


def test_steps_grow_with_the_overhead_and_stay_in_bounds():
    fast, slow, slowest = adapted(0.001), adapted(0.2), adapted(3.0)
    assert fast[0] == slow[0] == slowest[0] == 20  # nothing measured yet
    assert fast[-1] < slow[-1] < slowest[-1]
    assert all(15 <= steps <= 128 for steps in fast + slow + slowest)
    assert slowest[-1] == 128


def test_without_a_range_h_is_fixed():
    assert chosen_steps(0.5) == [5] * 6
