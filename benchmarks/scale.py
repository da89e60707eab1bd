"""Bytes per peer and decision latency from 64 to 1,000 peers, in the simulator.  `make bench-scale`.

Law: real node/Peers in one process on a virtual clock: consensus, gossip validation, exchange, codec and fold are what
ships; the network between them is modelled (testing/wires.py: a latency for each link, one uplink and one downlink a
peer, lost packets as retransmissions; testing/network.py: a GossipSub mesh of degree 6).  In every second round peers are killed without a
word and come back a round later.  Local steps are a stand-in of fixed duration that draws a pseudo-gradient; a payload
is its real encoding.  What is pure (signature checks, decoding, one fold of the same bits) is computed once for all.

Counted for a peer and round, from one decision it knew of to the next, sent and received together:
    payload   bytes of payloads, those that came twice included
    control   gossip with all duplicates on the mesh, requests, what swaps and record look-ups cost beside payloads
Decision latency: from the last contribution of the record to the peer's own fold of the decided record.  Both are judged
over rounds in which nobody of the cohort died, since a death adds two grace windows whatever the size (shown beside).
Round 1 is left out: in it peers find each other.  Not modelled: GossipSub's heartbeats and TCP's headers.

    python benchmarks/scale.py [--sizes 64 128 …] [--rounds N] [--resume] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trio

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import Curve, Report, plot
from p2pflock.errors import InvalidMessageError
from p2pflock.learning import checkpoint, codec, fold
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.codec import F32, Shape
from p2pflock.learning.spec import TaskSpec
from p2pflock.ports import Evaluation, FoldInput, FoldResult, Genesis, PayloadScore, TrainResult
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedPeer, SimulatedSwarm
from p2pflock.testing.wires import Wires

SIZES = (64, 128, 256, 512, 1000)
COMMITTEE, COHORT = 64, 64
PARAMETERS, CHUNK, K = 61_440, 4096, 2048
BITS_PER_SECOND, LATENCY_SECONDS, LOSS, CHURN = 50e6, (0.020, 0.120), 0.01, 0.01
SKIPPED_ROUNDS = 1
JUDGED = (
    "latency_median", "latency_p95", "bytes_median", "bytes_p95", "bytes_active", "bytes_active_p95",
    "payload_median", "control_median",
)  # fmt: skip
FLAT = 1.2  # bytes per peer at the largest size over those at the smallest


# --- the stand-in for training --------------------------------------------------------------------------------
class Crowd:
    """Models by hash and what was computed of them, for all trainers of one run."""

    def __init__(self) -> None:
        self.shape = Shape(PARAMETERS, CHUNK, K)
        self.layout = Layout.of({"weight": (PARAMETERS,)})
        self.models: dict[bytes, F32] = {}
        self.exports: dict[bytes, bytes] = {}
        self.folds: dict[tuple[Any, ...], FoldResult] = {}
        self.decoded: dict[bytes, bool] = {}
        self.genesis = self.add(np.zeros(PARAMETERS, np.float32))

    def add(self, weights: F32) -> FoldResult:
        data = checkpoint.to_bytes(self.layout, weights)
        result = FoldResult(checkpoint.compute_model_hash(data), checkpoint.compute_weights_cid(data))
        self.models[result.model_hash], self.exports[result.model_hash] = weights, data
        return result

    def fold(self, parent: bytes, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        key = parent, round_, tuple(inputs)
        if key not in self.folds:
            rule = fold.FoldRule(floor_divisor=4, gain=1.0, norm_bound=0.0, is_clipped=True)
            weighted = [fold.Weighted(codec.decode(entry.payload, self.shape), entry.weight) for entry in inputs]
            self.folds[key] = self.add(fold.fold(rule, self.models[parent], weighted))
        return self.folds[key]

    def is_payload(self, payload: bytes) -> bool:
        if payload not in self.decoded:
            try:
                codec.decode(payload, self.shape)
                self.decoded[payload] = True
            except InvalidMessageError:
                self.decoded[payload] = False
        return self.decoded[payload]


class CrowdTrainer:
    """The Trainer port: real payloads and folds of pseudo-gradients that are drawn."""

    def __init__(self, crowd: Crowd, spec: TaskSpec, step_seconds: float) -> None:
        self._crowd, self._spec, self._step_seconds = crowd, spec, step_seconds
        self._model = crowd.genesis.model_hash

    async def open(self) -> Genesis:
        await trio.lowlevel.checkpoint()
        return Genesis(self._crowd.genesis.model_hash, self._crowd.genesis.weights, PARAMETERS)

    async def train(self, round_: int, shard: int, shards: int, seed: bytes, steps: int = 0) -> TrainResult:
        local = self._spec.local
        await trio.sleep(local.steps * self._step_seconds)
        digest = hashlib.sha256(seed + shard.to_bytes(4, "big")).digest()
        draw = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        delta = draw.standard_normal(PARAMETERS, dtype=np.float32) * np.float32(0.01)
        payload = codec.encode(codec.compress(delta, self._crowd.shape))
        return TrainResult(payload, local.steps, local.steps * local.batch_size, 1_000_000, digest, digest)

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()

    async def score(self, round_: int, payloads: Sequence[bytes], seed: bytes) -> Sequence[PayloadScore]:
        await trio.lowlevel.checkpoint()
        return [
            PayloadScore(self._crowd.is_payload(p), 100_000 + hashlib.sha256(seed + p[-32:]).digest()[0] * 100, -1000)
            for p in payloads
        ]

    async def fold(self, round_: int, inputs: Sequence[FoldInput]) -> FoldResult:
        await trio.lowlevel.checkpoint()
        return self._crowd.fold(self._model, round_, inputs)

    async def adopt(self, model_hash: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._model = model_hash

    async def set_dense(self, vector: bytes) -> FoldResult:
        raise NotImplementedError

    async def export(self) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._crowd.exports[self._model]

    async def load(self, weights: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        self._model = checkpoint.compute_model_hash(weights)
        self._crowd.models.setdefault(self._model, checkpoint.from_bytes(self._crowd.layout, weights))
        self._crowd.exports.setdefault(self._model, weights)
        return self._model

    async def evaluate(self) -> Evaluation:
        await trio.lowlevel.checkpoint()
        return Evaluation(1_000_000, 0, 1)

    async def sample(self, length: int) -> str:
        await trio.lowlevel.checkpoint()
        return ""


# --- measuring ------------------------------------------------------------------------------------------------
@dataclass
class Meter(list[dict[str, Any]]):
    """A peer's events; notes time and bytes when it knows a decision."""

    peer: SimulatedPeer
    contributed: dict[int, float] = field(default_factory=dict)
    decided: dict[int, tuple[float, int, int]] = field(default_factory=dict)  # round -> (time, payload, control)
    lives: int = 0  # starts: bytes of one life do not compare with those of another
    life_of: dict[int, int] = field(default_factory=dict)

    def append(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "contributed":
            self.contributed[entry["round"]] = trio.current_time()
        elif entry["event"] == "decided" and self.peer.context is not None:
            control, swarm = self.peer.context.host.traffic(), self.peer.context.swarm
            payload = swarm.traffic().sent_bytes + swarm.traffic().received_bytes
            beside = swarm.control_bytes  # type: ignore[attr-defined]
            bytes_ = control.sent_bytes + control.received_bytes + beside
            self.decided[entry["round"]] = trio.current_time(), payload, bytes_
            self.life_of[entry["round"]] = self.lives
        if entry["event"] in {"decided", "dropped", "caught_up"}:
            super().append(entry)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(peers: int, rounds: int, seed: int) -> dict[str, Any]:
    """One run of one size."""
    rng = random.Random(seed)
    crowd = Crowd()
    rows: list[dict[str, Any]] = []

    async def main() -> None:
        async with SimulatedSwarm.open(
            peers=peers,
            seats=min(peers, COMMITTEE),
            cohort=COHORT,
            rounds=rounds + 1,
            seed=seed,
            snapshot_every_rounds=1000,
            wires=Wires(rng, LATENCY_SECONDS, BITS_PER_SECOND, LOSS),
            step_seconds={n: rng.uniform(0.15, 0.25) for n in range(peers)},
            build_trainer=lambda peer: CrowdTrainer(crowd, swarm.spec, peer.step_seconds),
        ) as swarm:
            meters = [Meter(peer) for peer in swarm.peers]
            # Who comes first is dialled most: that should not be the committee.
            for place, number in enumerate(rng.sample(range(peers), peers)):
                swarm.peers[number].events = meters[number]
                swarm.start(number)
                if place % 20 == 19:
                    await trio.sleep(0.05)
            down: list[int] = []
            for round_ in range(1, rounds + 1):
                up = [peer.number for peer in swarm.peers if peer.is_running and peer.number not in down]
                await swarm.until(
                    lambda: sum(swarm.peers[n].head >= round_ for n in up) >= 0.98 * len(up),  # noqa: B023
                    seconds=600,
                    what=f"round {round_} of {peers} peers",
                )
                if round_ > SKIPPED_ROUNDS:
                    rows.append(_summarise(swarm, meters, round_))
                    print(f"  n = {peers} {_show(rows[-1])} at {trio.current_time():.0f} s", flush=True)
                for number in down:
                    swarm.start(number)
                    meters[number].lives += 1
                down = []
                if round_ % 2 == 0:  # the round that has begun is one with deaths
                    await trio.sleep(rng.uniform(0.1, 0.6))
                    down = sorted(rng.sample(up, max(1, round(CHURN * peers))))
                    await swarm.kill(*down)
            swarm.check()

    begun = time.perf_counter()
    run_simulation(main, seed=seed)
    gc.collect()
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0] if key != "round"}
    quiet = [row for row in rows if not row["absent"]]
    for key in JUDGED:
        middle[f"quiet_{key}"] = statistics.median(row[key] for row in quiet or rows)
    return {"peers": peers, **middle, "rounds": rows, "wall_seconds": round(time.perf_counter() - begun, 1)}


def _summarise(swarm: SimulatedSwarm, meters: Sequence[Meter], round_: int) -> dict[str, Any]:
    record = max(swarm.peers, key=lambda peer: peer.head).record(round_)
    assert record is not None
    last = max(meters[entry.seat].contributed[round_] for entry in record.contributions)
    steady = [
        m for m in meters
        if round_ in m.decided and round_ - 1 in m.decided and m.life_of[round_] == m.life_of[round_ - 1]
    ]  # fmt: skip
    latency = [m.decided[round_][0] - last for m in meters if round_ in m.decided]
    payload = [m.decided[round_][1] - m.decided[round_ - 1][1] for m in steady]
    control = [m.decided[round_][2] - m.decided[round_ - 1][2] for m in steady]
    total = [a + b for a, b in zip(payload, control, strict=True)]
    named = {entry.seat for entry in (*record.contributions, *record.absent)} | set(range(len(swarm.committee.seats)))
    active = [bytes_ for m, bytes_ in zip(steady, total, strict=True) if m.peer.number in named]
    return {
        "round": round_,
        "contributions": len(record.contributions),
        "absent": len(record.absent),
        "record_bytes": len(record.encode()),
        "bytes_median": statistics.median(total),
        "bytes_p95": quantile(total, 0.95),
        "bytes_active": statistics.median(active),
        "bytes_active_p95": quantile(active, 0.95),
        "payload_median": statistics.median(payload),
        "payload_p95": quantile(payload, 0.95),
        "control_median": statistics.median(control),
        "control_p95": quantile(control, 0.95),
        "latency_median": statistics.median(latency),
        "latency_p95": quantile(latency, 0.95),
        "decided": len(latency),
    }


def _show(row: dict[str, Any]) -> str:
    return (
        f"round {row['round']}: {row['bytes_median'] / 1e6:.2f} MB a peer (payload {row['payload_median'] / 1e6:.2f},"
        f" control {row['control_median'] / 1e6:.2f}), p95 {row['bytes_p95'] / 1e6:.2f};"
        f" decided after {row['latency_median']:.2f} s, p95 {row['latency_p95']:.2f};"
        f" {row['contributions']} contributions, {row['decided']} peers"
    )


def fit(points: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    """Least squares of a + b ln n."""
    slope, base = np.polyfit([math.log(p["peers"]) for p in points], [p[key] for p in points], 1)
    return float(base), float(slope)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="sizes that run side by side")
    parser.add_argument("--resume", action="store_true", help="keep the sizes that the file has already")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = Report("scale", packages=("numpy", "trio"))
    report.facts.update(
        committee=COMMITTEE, cohort=COHORT, bits_per_second=BITS_PER_SECOND, latency_seconds=LATENCY_SECONDS,
        loss=LOSS, churn_a_round=CHURN, parameters=PARAMETERS, seed=options.seed, sizes=[],
    )  # fmt: skip
    points: list[dict[str, Any]] = report.facts["sizes"]
    if options.resume and options.out and options.out.exists():
        points += [p for p in json.loads(options.out.read_text())["sizes"] if p["peers"] in options.sizes]
    left = sorted(set(options.sizes) - {p["peers"] for p in points}, reverse=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = [pool.submit(measure, peers, options.rounds, options.seed) for peers in left]
        for run in as_completed(runs):
            points.append(run.result())
            print(f"n = {points[-1]['peers']}: {points[-1]['wall_seconds']} s of wall time", flush=True)
            points.sort(key=lambda point: int(point["peers"]))
            report.save(options.out)
    if len(points) > 1:
        conclude(report, points, options.out)
    return 0


def conclude(report: Report, points: Sequence[dict[str, Any]], out: Path | None) -> None:
    first, last = points[0], points[-1]
    growth = math.log(last["peers"]) / math.log(first["peers"])
    span = f"{last['peers']} to {first['peers']} peers"
    report.judge(f"bytes per peer and round, median, ratio of {span}", last["quiet_bytes_median"] / first["quiet_bytes_median"],
                 FLAT, at_least=False)  # fmt: skip
    for key, name in (
        ("quiet_bytes_p95", "p95"), ("quiet_bytes_active", "committee and cohort, median"),
        ("quiet_bytes_active_p95", "committee and cohort, p95"),
    ):  # fmt: skip
        report.judge(f"the same, {name}, ratio of {span}", last[key] / first[key], FLAT, at_least=False)
    for key, name in (("quiet_latency_median", "median peer"), ("quiet_latency_p95", "p95 peer")):
        report.judge(f"decision latency, {name}, ratio of {span} (log n grows by as much)", last[key] / first[key],
                     growth, at_least=False)  # fmt: skip
        base, slope = fit(points, key)
        report.facts[f"{key}_fit"] = {"base": base, "per_ln_n": slope}
        print(f"  {name}: {base:.2f} s + {slope:.3f} s * ln n")
    report.save(out)
    if out is None:
        return
    sizes = [p["peers"] for p in points]
    plot(
        out.with_suffix(".svg"),
        [
            Curve("MB a peer and round, median", sizes, [p["quiet_bytes_median"] / 1e6 for p in points]),
            Curve("MB, p95", sizes, [p["quiet_bytes_p95"] / 1e6 for p in points]),
            Curve("of it payload", sizes, [p["quiet_payload_median"] / 1e6 for p in points]),
            Curve("decision latency, s, median", sizes, [p["quiet_latency_median"] for p in points]),
            Curve("decision latency, s, p95", sizes, [p["quiet_latency_p95"] for p in points]),
        ],
        title="Committee and cohort of 64; 50 Mb/s, 20-120 ms, 1 % loss, 1 % churn a round",
        x_label="peers",
        y_label="MB and seconds",
        log="x",
    )


if __name__ == "__main__":
    raise SystemExit(main())
