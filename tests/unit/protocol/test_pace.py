"""H from measured times: the formula, its bounds, and what two peers of different speed make of it."""

from __future__ import annotations

import pytest

from p2pflock.protocol.pace import Pace, PaceRule, compute_steps

RULE = PaceRule(base=30, least=15, most=128, utilisation=0.9)


@pytest.mark.parametrize(
    ("step", "overhead", "steps"),
    [
        (0.1, 0.999, 90),  # 9 s of training to 1 s of overhead
        (0.1, 1.001, 91),  # rounded up: the target is reached
        (0.1, 0.0, 15),
        (0.1, 0.01, 15),
        (0.1, 100.0, 128),
        (0.0, 1.0, 128),
        (1e-12, 1e12, 128),
    ],
)
def test_steps_for_the_target(step, overhead, steps):
    assert compute_steps(RULE, step, overhead) == steps


@pytest.mark.parametrize("overhead", [0.31, 0.55, 0.9, 1.35])
def test_the_target_is_reached_and_one_step_less_misses_it(overhead):
    steps = compute_steps(RULE, 0.1, overhead)
    assert 15 < steps < 128

    def utilisation(steps):
        return steps * 0.1 / (steps * 0.1 + overhead)

    assert utilisation(steps) >= 0.9 > utilisation(steps - 1)


def test_base_until_measured_and_always_where_fixed():
    pace = Pace(RULE)
    assert pace.next_steps == 30
    pace.on_trained(30, 3.0)
    assert pace.next_steps == 30
    pace.on_decided(0.999)
    assert pace.next_steps == 90
    fixed = Pace(PaceRule(30, 30, 30, 0.9))
    fixed.on_trained(30, 3.0)
    fixed.on_decided(1.0)
    assert fixed.next_steps == 30


def test_one_bad_round_changes_nothing_and_a_slower_link_does():
    pace = Pace(RULE)
    for _ in range(5):
        pace.on_trained(90, 9.0)
        pace.on_decided(0.999)
    pace.on_decided(60.0)
    assert pace.next_steps == 90
    for _ in range(3):
        pace.on_decided(1.299)
    assert pace.next_steps == 117
    for _ in range(5):
        pace.on_decided(0.199)
    assert pace.next_steps == 18


def test_fast_and_slow_peers_aim_at_the_same_wall_time():
    fast, slow = (compute_steps(RULE, step, 0.5) * step for step in (0.05, 0.15))
    assert fast == pytest.approx(slow, rel=0.05)
