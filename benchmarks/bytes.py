"""What a round costs on the wire, every byte of it: eight real peers, each in a network of its own.

Law: counted are all IP packets that a peer sends: payloads, headers, scorecards, proposals, votes, status messages,
the DHT, Noise, Yamux, TCP, acknowledgements, retransmissions.  Rounds count in which everybody contributes, so receives seven payloads.  A
round is counted from everybody's decision to everybody's next one.  Since part of the control traffic goes on
whatever happens, bytes per minute without a round are measured too, and the length of a round is stated.

The dense figures it is compared with are computed: a ring all-reduce of n peers sends 2 (n - 1) / n times 4 bytes
for each parameter and peer, without any overhead of its own.

    python benchmarks/bytes.py [--peers N] [--rounds N] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.namespaces import Link, Network, open_network
from benchmarks.report import Report
from benchmarks.swarm import (
    CONTROL_PORT,
    PARAMETERS,
    START_SECONDS,
    SWARM_PORT,
    NamespacedSwarm,
    build_spec,
    has_decided,
    prepare,
)
from p2pflock.errors import FlockError, StartupError

ROUND_GOAL, STEP_GOAL, STEPS = 45.0, 1000.0, 30
ROUND_SECONDS, IDLE_SECONDS = 900.0, 60.0
ETHERNET_BYTES = 14 + 4  # what a frame adds to each packet


async def run(swarm: NamespacedSwarm, network: Network, rounds: int, idle_seconds: float) -> dict[str, Any]:
    marks: list[list[dict[str, Any]]] = []
    times: list[float] = []
    await swarm.start(wait_seconds=START_SECONDS)
    print("peers started", flush=True)
    for round_ in range(1, rounds + 1):
        await swarm.watch(lambda events, r=round_: has_decided(events, r, swarm.count), ROUND_SECONDS)  # type: ignore[misc]
        marks.append(network.count())
        times.append(trio.current_time())
        print(f"  round {round_} decided", flush=True)
    await swarm.watch(lambda events: all(e[-1]["event"] == "finished" for e in events.values()), ROUND_SECONDS)
    await trio.sleep(5.0)
    before = network.count()
    await trio.sleep(idle_seconds)
    idle = compute_split(before, network.count())
    idle = {name: value * 60 / idle_seconds for name, value in idle.items()}
    counted, seen = network.count(), network.count_at_interface()
    return {
        "rounds": [compute_split(a, b) for a, b in itertools.pairwise(marks)],
        "round seconds": [b - a for a, b in itertools.pairwise(times)],
        "idle bytes a minute": idle,
        "relay over interface": sum(c["sent"] for c in counted) / sum(sent for sent, _ in seen),
    }


def compute_split(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
    """Mean over the peers of bytes sent, by what for."""
    rows: dict[str, float] = {"sent": 0, "control": 0, "swarm": 0, "TCP/IP headers": 0, "packets": 0}
    for old, new in zip(before, after, strict=True):
        rows["sent"] += new["sent"] - old["sent"]
        for port, (data, headers, packets) in new["ports"].items():
            old_data, old_headers, old_packets = old["ports"].get(port, (0, 0, 0))
            name = {str(CONTROL_PORT): "control", str(SWARM_PORT): "swarm"}.get(port, "swarm")
            rows[name] += data - old_data
            rows["TCP/IP headers"] += headers - old_headers
            rows["packets"] += packets - old_packets
    return {name: value / len(after) for name, value in rows.items()}


def judge(report: Report, found: dict[str, Any], swarm: NamespacedSwarm) -> None:
    peers = swarm.count
    payloads = [e["payload_bytes"] for entries in swarm.events_of.values() for e in entries if e["event"] == "contributed"]
    folded = [len(e["contributors"]) for e in swarm.events_of["peer-1"] if e["event"] == "decided"]
    # A round in which somebody was late moves fewer payloads: counting it would flatter us.
    whole = [row for row, count in zip(found["rounds"], folded[1:], strict=False) if count == peers]
    if not whole:
        raise StartupError("no round had everybody's contribution", "run it on a less busy machine")
    ring = 2 * (peers - 1) / peers * 4 * PARAMETERS
    sent = statistics.fmean(row["sent"] for row in whole)
    swapped = (peers - 1) * statistics.fmean(payloads)
    split = {name: statistics.fmean(row[name] for row in whole) for name in whole[0]}
    split["payloads of the others"] = swapped
    report.facts |= {
        "parameters": PARAMETERS,
        "peers": peers,
        "bytes a payload": statistics.fmean(payloads),
        "payload, times below float32": 4 * PARAMETERS / statistics.fmean(payloads),
        "contributions in each round": folded,
        "rounds with all of them, which count": len(whole),
        "bytes of a float32 ring all-reduce, a peer and round": ring,
        "bytes sent, a peer and round": sent,
        "the same with Ethernet frames": sent + ETHERNET_BYTES * split["packets"],
        "of these": split,
        **found,
    }
    print(f"{PARAMETERS:,} parameters, {peers} peers, rounds of {statistics.fmean(found['round seconds']):.0f} s")
    print(f"  payload {statistics.fmean(payloads):,.0f} bytes; contributions a round: {folded}")
    for name, value in split.items():
        print(f"  {name:<24} {value:>12,.0f} bytes a peer and round".replace("packets ", "(packets)"))
    print(f"  without a round: {found['idle bytes a minute']['sent']:,.0f} bytes a peer and minute")
    report.judge("bytes a round, times below a float32 ring all-reduce", ring / sent, ROUND_GOAL, at_least=True)
    report.judge(
        f"the same against an all-reduce each step, at H = {STEPS}", STEPS * ring / sent, STEP_GOAL, at_least=True
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/bytes.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="the first is not counted")
    parser.add_argument("--steps", type=int, default=2, help="local steps; they cost time and no bytes")
    parser.add_argument("--idle", type=float, default=IDLE_SECONDS, help="seconds without a round")
    parser.add_argument("--home", type=Path, help="where the peers live; a temporary directory by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = Report("bytes")
    try:
        with tempfile.TemporaryDirectory() as scratch, open_network(options.peers, Link()) as network:
            spec = build_spec(options.rounds, steps=options.steps, batch_size=1)
            swarm = prepare(options.home or Path(scratch) / "swarm", spec, network)
            try:
                found = trio.run(run, swarm, network, options.rounds, options.idle)
            finally:
                swarm.stop()
        judge(report, found, swarm)
        report.save(options.out)
    except FlockError as error:
        print(f"error: {error.message}\nfix: {error.hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
