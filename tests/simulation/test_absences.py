"""Three of ten peers are away in every round, others each time: no round stalls, and nobody is left behind.

What this costs in loss, over 200 rounds of a real task: benchmarks/churn.py.
"""

from __future__ import annotations

import random
import statistics

from p2pflock.testing.absences import draw_plans, play
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm

PEERS, AWAY, ROUNDS, SEED = 10, 3, 8, 4
STALL_MEDIANS = 10


def test_three_of_ten_away_in_every_round():
    """Seven remain: just more than two thirds, so that each of them must contribute and vote, and those who were
    away a moment ago must have caught up first."""
    plans = draw_plans(random.Random(SEED), PEERS, AWAY, ROUNDS)
    assert any(plan.dead for plan in plans)
    assert any(plan.cut for plan in plans)

    async def main():
        async with SimulatedSwarm.open(peers=PEERS, rounds=ROUNDS, seed=SEED, snapshot_every_rounds=4) as swarm:
            await swarm.start_all()
            took = await play(swarm, plans, stall_seconds=100)
            await swarm.until_round(ROUNDS)
            await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers), what="everybody's end")
            swarm.check()
            assert len({peer.told("finished")[-1]["model_hash"] for peer in swarm.peers}) == 1
            for round_, plan in enumerate(plans, 1):
                contributors = {entry.seat for entry in swarm.peers[0].record(round_).contributions}
                assert contributors == set(range(PEERS)) - plan.away
            # A partner that is cut off keeps a swap for 15 s, a dead proposer a view for 10 s: neither holds up a round.
            assert statistics.median(took) < 10
            assert max(took) <= STALL_MEDIANS * statistics.median(took)

    run_simulation(main, seed=SEED)
