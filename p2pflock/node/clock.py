"""The one place that reads the clock for the node; tests pass another Clock."""

from __future__ import annotations

import time

import trio


class SystemClock:
    """Clock port over trio's monotonic time (so a MockClock rules it) and the system's wall clock."""

    def monotonic_seconds(self) -> float:
        return trio.current_time()

    def unix_seconds(self) -> int:
        return int(time.time())
