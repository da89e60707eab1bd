"""MNIST to 98 %, 8 peers, Dirichlet 0.5: samples, bytes and seconds of ours beside Flower's FedAvg.

Law: both train the same network from the same weights on the same parts; each has the best of the settings that
`--tune` tries for it.  Bytes are what all peers send of serialised messages until the goal: ours is every payload
times the seven that receive it, Flower's is every protobuf message from and to the server (flower_app.py).
Neither figure has the cost of transport or of our consensus in it: benchmarks/bytes.py measures that at the socket.
Seconds are of computing and encoding when every peer has a core of its own; no network, no evaluation.

Flower runs in an environment of its own, whose Python `--flower` names (make bench-flower builds it).

    python benchmarks/flower.py --flower PYTHON [--seeds 1 2 3] [--tune] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import methods
from benchmarks.mnist_peers import Plan, compute_accuracy, draw_parts, open_peers
from benchmarks.report import Curve, Report, plot, spread
from p2pflock.errors import MissingToolError
from p2pflock.learning.spec import TaskSpec, load_spec

PEERS, ALPHA, GOAL = 8, 0.5, 0.98
PLANS = Path("build/flower")


@dataclass(frozen=True)
class Settings:
    """What is tuned; codec and fold count for ours alone."""

    optimizer: str
    lr: str
    local_steps: int  # per round; 0 is one epoch, for Flower alone
    k: int = 128
    k_start: int = 1024
    start_rounds: int = 5
    gain: str = "1"


CHOSEN = {"ours": Settings("adamw", "0.002", 80, start_rounds=0), "flower": Settings("adamw", "0.002", 0)}
# What --tune tries.
CANDIDATES = {
    "flower": [
        Settings("sgd", "0.1", 0),
        Settings("sgd", "0.1", 60),
        Settings("adamw", "0.002", 60),
        Settings("adamw", "0.002", 0),
        Settings("adamw", "0.004", 0),
    ],
    "ours": [
        Settings("adamw", "0.002", 60),
        *(Settings("adamw", "0.002", steps, start_rounds=0) for steps in (30, 60, 80, 120)),
        Settings("adamw", "0.004", 60, start_rounds=0),
        Settings("adamw", "0.003", 60, k=64, start_rounds=0),
        Settings("adamw", "0.003", 60, start_rounds=0, gain="1.5"),
    ],
}
LABELS = {"ours": "p2pflock", "flower": "Flower FedAvg", "p2pfl": "p2pfl"}
APPS = {"flower": "flower_app.py", "p2pfl": "p2pfl_app.py"}


def build_spec(settings: Settings, rounds: int, seed: int) -> TaskSpec:
    spec = load_spec("mnist")
    return replace(
        spec,
        task=replace(spec.task, rounds=rounds, seed=seed),
        local=replace(
            spec.local,
            steps=settings.local_steps or spec.local.steps,
            optimizer=settings.optimizer,
            lr=Decimal(settings.lr),
        ),
        codec=replace(spec.codec, k=settings.k, k_start=settings.k_start, start_rounds=settings.start_rounds),
        fold=replace(spec.fold, gain=Decimal(settings.gain)),
    )


def run_ours(plan: Plan) -> list[dict[str, float]]:
    peers = open_peers(plan)
    rows: list[dict[str, float]] = []
    sent = seconds = 0.0
    for round_ in methods.train_ours(plan.spec, peers):
        sent += round_.payload_bytes * PEERS * (PEERS - 1)
        seconds += round_.seconds
        accuracy = compute_accuracy(peers[0].network, round_.weights)
        samples = round_.number * PEERS * plan.spec.local.steps * plan.spec.local.batch_size
        rows.append({"accuracy": accuracy, "samples": samples, "bytes": sent, "seconds": seconds})
        if accuracy >= plan.goal:
            break
    return rows


def run_elsewhere(plan: Plan, python: str, script: str) -> list[dict[str, float]]:
    """Run `script` of this folder on the plan, by the Python of another environment.

    Raises MissingToolError when its process fails.
    """
    name = script.removesuffix("_app.py")
    path = PLANS / f"{name}-{plan.spec.task.seed}.json"
    plan.write(path)
    done = subprocess.run(
        [python, str(Path(__file__).with_name(script)), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        raise MissingToolError(f"{script} failed in {python}", f"run make bench-{name}, which sets up its environment")
    batch = plan.spec.local.batch_size
    per_round = sum((plan.local_steps or max(1, len(part) // batch)) * batch for part in plan.parts)
    for row in rows:
        row["samples"] = row.pop("round") * per_round
    return rows


def run(system: str, settings: Settings, seed: int, rounds: int, python: str) -> list[dict[str, float]]:
    spec = build_spec(settings, rounds, seed)
    plan = Plan(spec, draw_parts(PEERS, ALPHA, seed), rounds, settings.local_steps, GOAL)
    rows = run_ours(plan) if system == "ours" else run_elsewhere(plan, python, APPS[system])
    last, mark = rows[-1], "" if rows[-1]["accuracy"] >= GOAL else "  NOT REACHED"
    print(
        f"{LABELS[system]:14} seed {seed}: {len(rows):3} rounds, {last['accuracy']:.2%}, {last['samples']:9,.0f} samples, "
        f"{last['bytes'] / 1e6:8.2f} MB, {last['seconds']:6.1f} s{mark}",
        flush=True,
    )
    return rows


def tune(seeds: Sequence[int], rounds: int, python: str) -> None:
    """Prints what each candidate needs; CHOSEN is then the best of them."""
    for system, candidates in CANDIDATES.items():
        for settings in candidates:
            print(settings)
            for seed in seeds:
                run(system, settings, seed, rounds, python)


Rows = dict[str, dict[int, list[dict[str, float]]]]  # system -> seed -> one row per round


def judge(report: Report, rows: Rows) -> None:
    reached = [rows[system][seed][-1]["accuracy"] >= GOAL for system in rows for seed in rows[system]]
    report.judge("share of runs that reach 98 %", statistics.fmean(reached), 1.0, at_least=True)
    ratios = {
        what: spread([rows["flower"][seed][-1][what] / rows["ours"][seed][-1][what] for seed in rows["ours"]])
        for what in ("bytes", "samples", "seconds")
    }
    report.facts["ratios, Flower to ours"] = ratios
    report.judge("bytes of Flower / ours, mean", ratios["bytes"]["mean"], 20, at_least=True)
    report.judge("bytes of Flower / ours, worst seed", ratios["bytes"]["min"], 20, at_least=True)
    report.judge("samples of ours / Flower, mean", statistics.fmean(
        rows["ours"][seed][-1]["samples"] / rows["flower"][seed][-1]["samples"] for seed in rows["ours"]
    ), 1.2, at_least=False)
    print("seconds of Flower / ours: {mean:.2f} ({min:.2f} to {max:.2f})".format(**ratios["seconds"]))


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/flower.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flower", default="build/venvs/flower/bin/python", help="Python of Flower's environment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=60, help="at most")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.tune:
        tune(options.seeds, options.rounds, options.flower)
        return 0
    rows: Rows = {
        system: {seed: run(system, settings, seed, options.rounds, options.flower) for seed in options.seeds}
        for system, settings in CHOSEN.items()
    }
    report = Report("flower")
    report.facts = {"peers": PEERS, "alpha": ALPHA, "goal": GOAL, "settings": _describe(), "runs": rows}
    judge(report, rows)
    report.save(options.out)
    if options.out:
        curves = [
            Curve(f"{LABELS[system]}, seed {seed}", [row["bytes"] / 1e6 for row in run_], [row["accuracy"] for row in run_])
            for system, runs in rows.items()
            for seed, run_ in runs.items()
        ]
        plot(
            options.out.with_suffix(".svg"),
            curves,
            title="MNIST, 8 peers, Dirichlet 0.5: accuracy over bytes sent by all",
            x_label="MB",
            y_label="test accuracy",
            log="x",
            lines={"goal": GOAL},
        )
    return 0


def _describe() -> dict[str, Any]:
    return {LABELS[system]: asdict(settings) for system, settings in CHOSEN.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
