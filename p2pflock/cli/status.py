"""`p2pflock status`: what this peer is doing, read from its event file: works beside it, and after it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from p2pflock.cli.options import Format, FormatOption, HomeOption
from p2pflock.cli.output import Output, format_bytes, format_seconds


def _is_running(pid: object) -> bool:
    try:
        os.kill(int(str(pid)), 0)
    except (OSError, ValueError):
        return False
    return True


def _collect(home: Path) -> dict[str, Any]:
    import time

    from p2pflock.node.assembly import read_run_file
    from p2pflock.node.events import read_events

    facts: dict[str, Any] = dict(read_run_file(home))
    latest: dict[str, dict[str, Any]] = {}
    counted = dropped = 0
    for entry in read_events(home / "events.jsonl"):
        latest[entry["event"]] = entry
        dropped += entry["event"] == "dropped"
        if entry["event"] == "decided" and latest.get("started", {}).get("seat") in entry["contributors"]:
            counted += 1
    started, decided = latest.get("started", {}), latest.get("decided", {})
    evaluated, traffic = latest.get("evaluated", {}), latest.get("traffic", {})
    newest = max((entry["time"] for entry in latest.values()), default=0)
    return {
        "running": _is_running(facts.get("pid")),
        "peer": started.get("peer"),
        "address": started.get("address"),
        "seat": started.get("seat"),
        "task": facts["task"],
        "chain": facts["rpc"] or None,
        "bootstrap": started.get("swarm_addresses", [])[:1],
        "round": decided.get("round", 0),
        "model_hash": decided.get("model_hash"),
        "contributors": len(decided.get("contributors", [])),
        "absent": decided.get("absent", []),
        "counted_rounds": counted,
        "accuracy": (evaluated.get("accuracy_micro") or 0) / 1e6 or None,
        "anchored_round": latest.get("anchored", {}).get("round", 0),
        "sent_bytes": traffic.get("sent_bytes", 0),
        "received_bytes": traffic.get("received_bytes", 0),
        "dropped_inputs": dropped,
        "seconds_since_last_event": int(time.time()) - newest if newest else None,
        "checkpoint": latest.get("finished", {}).get("checkpoint"),
    }


def status(home: HomeOption, form: FormatOption = Format.TEXT) -> None:
    """Show what this peer is doing: round, model, peers, whether it is being counted."""
    found = _collect(home)
    output = Output(form)
    output.document(found)
    since = found["seconds_since_last_event"]
    output.pairs(
        "peer " + (found["peer"] or "that has not started yet"),
        [
            ("state", "running" if found["running"] else "not running"),
            ("last event", f"{format_seconds(since)} ago" if since is not None else "none"),
            ("round", str(found["round"])),
            ("model", found["model_hash"] or ""),
            ("counted in", f"{found['counted_rounds']} rounds of this run"),
            ("contributors", f"{found['contributors']} in the last round, absent seats: {found['absent'] or 'none'}"),
            ("anchored", f"round {found['anchored_round']}" if found["chain"] else "no chain"),
            ("traffic", f"{format_bytes(found['sent_bytes'])} out, {format_bytes(found['received_bytes'])} in"),
            ("dropped", f"{found['dropped_inputs']} inputs"),
            ("others join with", " ".join(f"--bootstrap {a}" for a in found["bootstrap"])),
        ],
    )
