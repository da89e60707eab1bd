"""How much of the time peers compute on narrow, slow links.  `make bench-utilisation`.

Law: four peers, each in a network namespace of its own behind a link of 50 Mb/s both ways with 50 ms to every other
peer (100 ms there and back), train a GPT of 10.7 million parameters.  Utilisation is the time in local steps, as the
learning process measures it around the steps alone, over the wall time of the same rounds; compression, hashes,
writing, exchange, scores, votes, fold and waiting for others all count against it.  The first round is not counted.
Each peer is bound to one core, or, where there are fewer cores than peers, as many peers as another to each: left to
itself a scheduler gives one of them a tenth more than the others, who then keep it waiting.  What comes every ten
rounds only, a stored and evaluated checkpoint, is not among the rounds counted.

Beside it hivemind's DecentralizedAverager (fp16) in the same namespaces over the same links: the same model and
optimizer make the same number of local steps in as many processes, then average their pseudo-gradients; matchmaking
runs while they train, as hivemind's own optimizer does it.

    python benchmarks/utilisation.py [--rounds N] [--steps N] [--only ours|hivemind] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.namespaces import Link, Network, address_of, measure_link, open_network
from benchmarks.report import Report
from benchmarks.swarm import (
    PARAMETERS,
    START_SECONDS,
    NamespacedSwarm,
    build_spec,
    has_decided,
    prepare,
)
from p2pflock.errors import FlockError, StartupError

GOAL, MOST_STEPS = 0.9, 128
OURS, DENSE = "ours", "hivemind fp16"
LINK = Link(megabits=50, delay_seconds=0.05)
DENSE_PEER = Path(__file__).resolve().with_name("dense_peer.py")
ROUND_SECONDS = 600.0


async def run_ours(swarm: NamespacedSwarm, rounds: int) -> None:
    await swarm.start(wait_seconds=START_SECONDS)
    for round_ in range(1, rounds + 1):
        await swarm.watch(lambda events, r=round_: has_decided(events, r, swarm.count), ROUND_SECONDS)  # type: ignore[misc]
        print(f"  round {round_} decided", flush=True)


def measure_ours(swarm: NamespacedSwarm) -> dict[str, Any]:
    """From each peer's event file."""
    peers = []
    for entries in swarm.events_of.values():
        trained = {e["round"]: e for e in entries if e["event"] == "contributed"}
        decided = {e["round"]: e for e in entries if e["event"] == "decided"}
        last = max(decided)
        wall = decided[last]["seen"] - decided[1]["seen"]
        steps = [trained[r]["train_seconds"] for r in range(2, last + 1) if r in trained]
        peers.append(
            {
                "utilisation": sum(steps) / wall,
                "round seconds": wall / (last - 1),
                "train seconds": sum(steps) / (last - 1),
                "rounds": last - 1,
                "seconds beside steps": measure_rest(entries, last),
                "contributions": [len(decided[r]["contributors"]) for r in range(2, last + 1)],
            }
        )
    return {"peers": peers, "utilisation": statistics.fmean(p["utilisation"] for p in peers)}


STAGES = ("training", "contributed", "collected", "scored", "decided")


def measure_rest(entries: list[dict[str, Any]], last: int) -> dict[str, float]:
    """What a counted round is made of beside its steps, mean seconds up to each event; `training`: since the round
    before was decided."""
    seen = {(e["event"], e["round"]): e for e in reversed(entries) if e["event"] in STAGES}
    spent = dict.fromkeys(STAGES, 0.0)
    for round_ in range(2, last + 1):
        before = seen["decided", round_ - 1]["seen"]
        for stage in STAGES:
            if event := seen.get((stage, round_)):
                spent[stage] += event["seen"] - before - event.get("train_seconds", 0.0)
                before = event["seen"]
    return {stage: round(seconds / (last - 1), 2) for stage, seconds in spent.items()}


def run_dense(network: Network, rounds: int, steps: int, batch_size: int) -> dict[str, Any]:
    """The same with hivemind; from each process's own clock."""
    peers: list[subprocess.Popen[str]] = []
    bootstrap: list[str] = []
    try:
        for number in range(1, network.peers + 1):
            values = (number, network.peers, address_of(number), rounds, steps, batch_size)
            command = [sys.executable, str(DENSE_PEER), *map(str, values), *bootstrap]
            peers.append(
                subprocess.Popen(
                    network.command(number, command),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    start_new_session=True,
                )
            )
            if not bootstrap:
                bootstrap = [_read(peers[0])["address"]]
        for peer in peers[1:]:
            _read(peer)
        for round_ in range(1, rounds + 1):
            for peer in peers:
                _read(peer)
            print(f"  hivemind: round {round_} averaged", flush=True)
        found = [_read(peer) for peer in peers]
    finally:
        for peer in peers:
            if peer.stdin is not None:
                peer.stdin.close()
        for peer in peers:
            _end(peer)
    rows = [
        {
            "utilisation": each["train_seconds"] / each["wall_seconds"],
            "round seconds": each["wall_seconds"] / (rounds - 1),
            "train seconds": each["train_seconds"] / (rounds - 1),
            "rounds": rounds - 1,
        }
        for each in found
    ]
    return {"peers": rows, "utilisation": statistics.fmean(row["utilisation"] for row in rows)}


def _end(peer: subprocess.Popen[str]) -> None:
    """And its forks: hivemind's outlive a main process that fails."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        peer.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(peer.pid, signal.SIGKILL)
    peer.wait()


def _read(peer: subprocess.Popen[str]) -> dict[str, Any]:
    assert peer.stdout is not None
    line = peer.stdout.readline()
    if not line:
        raise StartupError("a dense peer ended", "its error is above")
    answer: dict[str, Any] = json.loads(line)
    return answer


def describe(name: str, found: dict[str, Any]) -> None:
    for number, row in enumerate(found["peers"], 1):
        print(
            f"  {name} peer {number}: {100 * row['utilisation']:.1f} %  "
            f"({row['train seconds']:.1f} s of steps in a round of {row['round seconds']:.1f} s)"
        )
        if rest := row.get("seconds beside steps"):
            print("      beside steps: " + ", ".join(f"{seconds} s until {stage}" for stage, seconds in rest.items()))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/utilisation.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="the first is not counted")
    parser.add_argument("--only", choices=("ours", "hivemind"), help="one of the two; the other stays in --out")
    parser.add_argument("--steps", type=int, default=MOST_STEPS, help="local steps a round, at most 128")
    parser.add_argument("--batch-size", type=int, default=4, help="blocks of 64 bytes")
    parser.add_argument("--home", type=Path, help="where the peers live; a temporary directory by default")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = Report("utilisation", packages=("numpy", "numba", "torch", "hivemind"))
    report.facts |= {
        "parameters": PARAMETERS,
        "peers": options.peers,
        "local steps": options.steps,
        "samples a step": options.batch_size,
        "link": {"megabits": LINK.megabits, "one way ms": 1e3 * LINK.delay_seconds},
    }
    if options.only and options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        report.facts |= {name: before[name] for name in (OURS, DENSE) if name in before}
    try:
        with (
            tempfile.TemporaryDirectory() as scratch,
            open_network(options.peers, LINK, is_bound=True) as network,
        ):
            report.facts["link measured"] = measured = measure_link(network)
            print(f"link: {measured['round_trip_ms']} ms there and back, TCP {measured['tcp_megabits']} Mb/s", flush=True)
            if options.only != "hivemind":
                # One more than is run: at the end of a task everybody stores the whole model.
                spec = build_spec(options.rounds + 1, steps=options.steps, batch_size=options.batch_size)
                swarm = prepare(options.home or Path(scratch) / "swarm", spec, network)
                try:
                    trio.run(run_ours, swarm, options.rounds)
                finally:
                    swarm.stop()
                report.facts[OURS] = measure_ours(swarm)
                report.save(options.out)
            if options.only != "ours":
                report.facts[DENSE] = run_dense(network, options.rounds, options.steps, options.batch_size)
    except FlockError as error:
        print(f"error: {error.message}\nfix: {error.hint}", file=sys.stderr)
        return 1
    for name in (OURS, DENSE):
        if found := report.facts.get(name):
            describe(name, found)
            print(f"  {name}: mean {100 * found['utilisation']:.1f} %")
    if ours := report.facts.get(OURS):
        least = min(row["utilisation"] for row in ours["peers"])
        report.judge("utilisation of the least busy peer", least, GOAL, at_least=True)
    report.save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
