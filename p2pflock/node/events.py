"""What happened, as one JSON object a line: the single source for progress lines, `up`'s table and reports.

Law: an event is a fact with a name from EVENTS and plain values; secrets never enter.  Writing never raises
into the caller: a full disk must not stop a round (the failure is counted instead).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from p2pflock.ports import Clock

EVENTS = frozenset(
    {
        "started",  # peer, address, swarm_address, control_address
        "connected",  # peers
        "training",  # round, steps: the H that this peer has chosen
        "contributed",  # round, payload_bytes, steps, samples, loss_micro, train_seconds
        "collected",  # round, seats
        "scored",  # round, contributions
        "decided",  # round, view, model_hash, record, contributors, absent, seconds
        "evaluated",  # round, loss_micro, accuracy_micro
        "traffic",  # round, sent_bytes, received_bytes
        "anchored",  # round, transaction, gas_used
        "anchor_delayed",  # round, reason
        "pinned",  # round, checkpoint, blocks: a Kubo daemon holds it
        "caught_up",  # from_round, to_round, folded, seconds
        "dropped",  # what, reason: something from a peer was refused
        "finished",  # round, checkpoint, accuracy_micro
        "sample",  # text
        "failed",  # error, hint
    }
)


class EventLog:
    """Append-only event file plus an optional listener in the same process."""

    def __init__(
        self, path: Path | None, clock: Clock, listen: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1) if path else None
        self._clock = clock
        self._listen = listen
        self.lost = 0

    def emit(self, event: str, **facts: object) -> None:
        if event not in EVENTS:
            raise ValueError(f"unknown event {event!r}")
        entry = {"time": self._clock.unix_seconds(), "event": event, **facts}
        if self._file:
            try:
                self._file.write(json.dumps(entry, separators=(",", ":")) + "\n")
            except OSError:
                self.lost += 1
        if self._listen:
            self._listen(entry)

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of an event file; a torn last line is left for the next read."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
