"""Loss at equal samples: eight peers of ours, eight of dense DiLoCo, one process with the eightfold batch.

Law: one model (nanoGPT's CPU configuration on Shakespeare's plays), the same samples in the same order for all
three, several seeds, one fixed set of validation blocks.  Each method has settings of its own, the best of those
that `--tune` tries on a smaller model, with half the learning rate for twice the width; the gain of our fold was
chosen at full size, on seed 1.  Every finished run is kept in build/, so a stopped benchmark goes on where
it was; a run made with other settings is not taken from there.

    python benchmarks/quality.py [--seeds 1 2 3] [--rounds N] [--tune] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import methods
from benchmarks.report import Curve, Report, plot, spread
from p2pflock.learning.codec import F32
from p2pflock.learning.learner import Network
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.spec import TaskSpec, load_spec

PEERS = 8
KEPT = Path("build/quality")
VALIDATION = range(0, 999, 3)  # blocks of the test set
EVALUATED_AT_ONCE = 37
SMALL = {"layers": 2, "heads": 2, "width": 64, "block": 64}


@dataclass(frozen=True)
class Settings:
    """What is tuned.  Codec and fold count for ours alone, the outer optimizer for DiLoCo alone."""

    lr: str
    momentum: str = "0.9"  # beta1 of the inner AdamW
    k: int = 256
    k_start: int = 1024
    start_rounds: int = 5
    beta: str = "0.95"
    gain: str = "1"
    floor_divisor: int = 4
    outer_lr: float = 0.7
    outer_momentum: float = 0.9


LABELS = {"ours": "p2pflock", "diloco": "dense DiLoCo", "alone": "one process, eightfold batch"}
CHOSEN = {
    "ours": Settings("0.006", momentum="0.6", gain="1.5"),
    "diloco": Settings("0.006", outer_lr=1.0, outer_momentum=0.0),
    "alone": Settings("0.008"),
}


# What --tune tries on the small model.
CANDIDATES = {
    "ours": [
        Settings("0.006"),
        Settings("0.012"),
        Settings("0.012", momentum="0.95"),
        Settings("0.012", momentum="0.6"),
        Settings("0.024", momentum="0.6"),
        Settings("0.012", momentum="0"),
        Settings("0.012", k=128),
        Settings("0.012", k=512),
        Settings("0.006", k=128, floor_divisor=2),
        Settings("0.003", k=128, gain="1.5"),
        Settings("0.012", momentum="0.6", gain="1.5"),
    ],
    "diloco": [
        Settings("0.001"),
        Settings("0.003"),
        Settings("0.003", outer_momentum=0.6),
        Settings("0.006", outer_lr=1.0, outer_momentum=0.5),
        Settings("0.006", outer_lr=1.0, outer_momentum=0.0),
        Settings("0.012", outer_lr=1.0, outer_momentum=0.0),
        Settings("0.012", momentum="0.6", outer_lr=1.0, outer_momentum=0.0),
    ],
    "alone": [Settings("0.003"), Settings("0.008"), Settings("0.016"), Settings("0.032")],
}


def build_spec(settings: Settings, rounds: int, steps: int, seed: int, model: dict[str, Any]) -> TaskSpec:
    """nanoGPT's CPU configuration: batch 12, AdamW, warm-up, decay to a tenth, clipped gradients."""
    spec = load_spec("shakespeare")
    return replace(
        spec,
        task=replace(spec.task, rounds=rounds, seed=seed),
        model=replace(spec.model, arguments=model),
        local=replace(
            spec.local,
            steps=steps,
            batch_size=12,
            lr=Decimal(settings.lr),
            momentum=Decimal(settings.momentum),
            beta2=Decimal("0.99"),
            weight_decay=Decimal("0.1"),
            warmup_steps=100,
            final_lr_fraction=Decimal("0.1"),
            grad_clip=Decimal(1),
        ),
        codec=replace(
            spec.codec,
            k=settings.k,
            k_start=settings.k_start,
            start_rounds=settings.start_rounds,
            beta=Decimal(settings.beta),
        ),
        fold=replace(spec.fold, gain=Decimal(settings.gain), floor_divisor=settings.floor_divisor),
    )


def validate(network: Network, weights: F32) -> float:
    """Mean loss, in nats per byte."""
    total = 0.0
    for begin in range(0, len(VALIDATION), EVALUATED_AT_ONCE):
        indices = VALIDATION[begin : begin + EVALUATED_AT_ONCE]
        total += network.loss(weights, "test", indices)[0] * len(indices)
    return total / len(VALIDATION)


def run(method: str, settings: Settings, spec: TaskSpec, network: Network) -> dict[str, Any]:
    """Rows of one method and seed, from build/ if it has been run before."""
    what = [asdict(settings), spec.task.rounds, spec.local.steps, sorted(spec.model.arguments.items())]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    path = KEPT / f"{method}-{spec.task.seed}-{key}.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    peers = [methods.Peer(network, shard, PEERS) for shard in range(PEERS)]
    rounds = {
        "ours": lambda: methods.train_ours(spec, peers),
        "diloco": lambda: methods.train_diloco(spec, peers, settings.outer_lr, settings.outer_momentum),
        "alone": lambda: methods.train_alone(spec, peers),
    }[method]()
    losses, sent, seconds = [], 0.0, 0.0
    for round_ in rounds:
        losses.append(round(validate(network, round_.weights), 5))
        sent += round_.payload_bytes
        seconds += round_.seconds
        if round_.number % 10 == 0 or round_.number == spec.task.rounds:
            print(f"  {method} seed {spec.task.seed} round {round_.number}: {losses[-1]:.4f}", flush=True)
    row = {"losses": losses, "payload bytes": sent, "seconds": round(seconds, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return row


def measure(rounds: int, steps: int, seeds: Sequence[int]) -> dict[str, dict[int, dict[str, Any]]]:
    """method -> seed -> rows; seed by seed, so that a stopped run has whole seeds."""
    rows: dict[str, dict[int, dict[str, Any]]] = {method: {} for method in LABELS}
    for seed in seeds:
        network = None
        for method, settings in CHOSEN.items():
            spec = build_spec(settings, rounds, steps, seed, {})
            network = network or TorchNetwork(spec)  # the seed alone decides its weights and data
            rows[method][seed] = run(method, settings, spec, network)
    return rows


def tune(rounds: int, steps: int, seed: int = 1) -> None:
    """Prints the last loss of every candidate on the small model."""
    network = None
    for method, candidates in CANDIDATES.items():
        for settings in candidates:
            spec = build_spec(settings, rounds, steps, seed, SMALL)
            network = network or TorchNetwork(spec)
            print(f"{run(method, settings, spec, network)['losses'][-1]:.4f}  {method}: {settings}", flush=True)


def _over_seeds(rows: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]] | None = None) -> list[dict[str, float]]:
    """Round by round: the spread of the loss, or of its excess over a reference's, in per cent."""
    columns = []
    for seed, row in rows.items():
        base = reference[seed]["losses"] if reference else None
        columns.append([100 * (a / b - 1) for a, b in zip(row["losses"], base, strict=True)] if base else row["losses"])
    return [spread(values) for values in zip(*columns, strict=True)]


def judge(report: Report, rows: dict[str, dict[int, dict[str, Any]]]) -> dict[str, list[dict[str, float]]]:
    """Prints and records the targets; returns method -> gap to one process, round by round, in per cent."""
    to_dense = _over_seeds(rows["ours"], rows["diloco"])
    gaps = {method: _over_seeds(rows[method], rows["alone"]) for method in ("ours", "diloco")}
    gap = [value["mean"] for value in gaps["ours"]]
    tail = max(2, len(gap) // 4)
    # Least squares over the last quarter: one noisy round decides nothing.
    slope = statistics.linear_regression(range(tail), gap[-tail:]).slope
    seeds = len(rows["ours"])
    report.judge(f"excess loss over dense DiLoCo, mean of {seeds} seeds, %", to_dense[-1]["mean"], 1.0, at_least=False)
    report.judge("excess loss over dense DiLoCo, worst seed, %", to_dense[-1]["max"], 1.0, at_least=False)
    report.judge("gap to one process with the eightfold batch, mean, %", gap[-1], 4.0, at_least=False)
    report.judge("the same, worst seed, %", gaps["ours"][-1]["max"], 4.0, at_least=False)
    report.judge("its slope over the last quarter, % per round", slope, 0.0, at_least=False)
    for method, label in LABELS.items():
        final = _over_seeds(rows[method])[-1]
        print(f"{label}: {final['mean']:.4f} ({final['min']:.4f} to {final['max']:.4f})")
    return gaps


def draw(out: Path, rows: dict[str, dict[int, dict[str, Any]]], gaps: dict[str, list[dict[str, float]]]) -> None:
    plot(
        out.with_suffix(".svg"),
        [_curve(LABELS[method], _over_seeds(rows[method])) for method in LABELS],
        title=f"Shakespeare, {PEERS} peers: validation loss at equal samples",
        x_label="round",
        y_label="nats per byte",
    )
    plot(
        out.with_name(out.stem + "-gap.svg"),
        [_curve(LABELS[method], gap) for method, gap in gaps.items()],
        title="Excess loss over one process with the eightfold batch",
        x_label="round",
        y_label="per cent",
        lines={"target at the end": 4.0},
    )


def _curve(label: str, values: Sequence[dict[str, float]]) -> Curve:
    columns = {name: [value[name] for value in values] for name in ("mean", "min", "max")}
    return Curve(label, range(1, len(values) + 1), columns["mean"], columns["min"], columns["max"])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/quality.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=15, help="H: steps of a peer in a round")
    parser.add_argument("--tune", action="store_true", help="print what candidates reach on a smaller model")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.tune:
        tune(options.rounds, options.steps)
        return 0
    rows = measure(options.rounds, options.steps, options.seeds)
    report = Report("quality")
    gaps = judge(report, rows)
    report.facts = {
        "peers": PEERS,
        "rounds": options.rounds,
        "steps": options.steps,
        "settings": {method: asdict(settings) for method, settings in CHOSEN.items()},
        "runs": {LABELS[method]: per_seed for method, per_seed in rows.items()},
        "gap to one process, per cent": {LABELS[method]: gap for method, gap in gaps.items()},
    }
    report.save(options.out)
    if options.out:
        draw(options.out, rows, gaps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
