"""Time-outs follow what was measured, grow with the view and stay within their bounds."""

from __future__ import annotations

from p2pflock.protocol.timeouts import AdaptiveTimeout


def test_before_any_measurement() -> None:
    timeout = AdaptiveTimeout(4.0, 1.0, 60.0)
    assert [timeout.compute_seconds(view) for view in (0, 1, 2, 4, 10**9)] == [4, 8, 16, 60, 60]


def test_first_measurement_as_in_rfc_6298() -> None:
    assert AdaptiveTimeout(4.0, 1.0, 60.0).observe(2.0).compute_seconds() == 2.0 + 4 * 1.0


def test_follows_steady_durations_down_and_jumps_up_on_surprise() -> None:
    timeout = AdaptiveTimeout(10.0, 0.5, 60.0)
    for _ in range(60):
        timeout = timeout.observe(2.0)
    assert 2.0 <= timeout.compute_seconds() < 2.1
    surprised = timeout.observe(6.0)
    assert surprised.compute_seconds() > 6.0  # one slow round is enough not to time out on the next


def test_bounds_hold_whatever_is_measured() -> None:
    timeout = AdaptiveTimeout(10.0, 0.5, 60.0)
    for seconds in (-5.0, 0.0, 0.0):
        timeout = timeout.observe(seconds)
    assert timeout.compute_seconds() == 0.5
    for _ in range(50):
        timeout = timeout.observe(1e12)
    assert timeout.compute_seconds() == 60.0
