"""200 rounds with three of ten peers away in every one, beside the same run with everybody there.

Law: both runs are the same swarm of real node/Peers in virtual time (testing/simulation.py) over one real torch
model: engine, codec, fold, consensus, exchange and catching up are what ships; network, clock and disk are simulated.
Who is away, and whether dead or cut off, is drawn anew each round from the seed (testing/absences.py).  Seven of ten
equal stakes are just more than two thirds: nobody who is present can be spared.

Two tasks: characters of Shakespeare, whose loss is far from its floor, and MNIST, whose loss is near it, so that any
relative difference is large and noisy.  Loss: on test samples, mean over the last checkpoints.  "Equal rounds" compares the two runs' ends;
"equal samples" compares the end of the run with absences with the other run at the round by which it had seen as many
samples.

    python benchmarks/churn.py --out docs/benchmarks/churn.json
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import Curve, Report, plot, spread

from p2pflock.learning import checkpoint
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.spec import TaskSpec, parse_spec
from p2pflock.primitives import unixfs
from p2pflock.testing.absences import Plan, draw_plans, play
from p2pflock.testing.network import run_simulation
from p2pflock.testing.simulation import SimulatedSwarm

PEERS, AWAY = 10, 3
STALL_MEDIANS = 10  # a round that takes longer than so many median rounds has stalled
STALL_SECONDS = 300.0  # virtual; here the run is given up
LOSS_PERCENT = 2.0
EVALUATE_EVERY = 5
LAST = 3  # checkpoints whose mean is the final loss
BATCH = 500
TESTED = 2000
BUILTIN = "p2pflock.learning.tasks"
SPEC = """
[task]
name = "churn-{task}"
rounds = {rounds}
seed = {seed}
[model]
factory = "{builtin}.{task}:build_model"
arguments = {{ {model} }}
[data]
factory = "{builtin}.{task}:load_data"
arguments = {{ {data} }}
[local]
steps = 5
batch_size = {batch}
optimizer = "adamw"
lr = {lr}
final_lr_fraction = 0.05
grad_clip = 1
[codec]
k = 128
k_start = 1024
start_rounds = 5
[scoring]
batch_size = 32
held_out = 16
"""
TASKS: dict[str, dict[str, Any]] = {
    "shakespeare": {
        "model": "layers = 1, heads = 2, width = 32, block = 32", "data": "block = 32", "batch": 16, "lr": "0.005"
    },
    "mnist": {"model": "channels = 8, hidden = 32", "data": "", "batch": 32, "lr": "0.001"},
}  # fmt: skip


class Quiet(TorchNetwork):
    """The task with a test set of one sample: peers in turn would evaluate every round, and we do it afterwards."""

    def size(self, split: Any) -> int:
        return 1 if split == "test" else super().size(split)

    def evaluate(self, weights: Any) -> tuple[float, float]:
        """(loss, accuracy) on the first test samples."""
        size = min(TESTED, super().size("test"))
        sums = [0.0, 0.0]
        for begin in range(0, size, BATCH):
            indices = range(begin, min(size, begin + BATCH))
            for which, value in enumerate(self.loss(weights, "test", indices)):
                sums[which] += value * len(indices)
        return sums[0] / size, sums[1] / size


def run(spec: TaskSpec, network: Quiet, seed: int, away: int) -> dict[str, Any]:
    """One swarm from genesis to its last round."""
    rounds = spec.task.rounds
    plans = draw_plans(random.Random(seed), PEERS, away, rounds) if away else [Plan(frozenset(), frozenset())] * rounds
    found: dict[str, Any] = {}

    async def main() -> None:
        async with SimulatedSwarm.open(
            peers=PEERS, seed=seed, spec=spec, model=network, snapshot_every_rounds=EVALUATE_EVERY
        ) as swarm:
            await swarm.start_all()
            took = await play(swarm, plans, stall_seconds=STALL_SECONDS)
            await swarm.until_round(rounds)
            await swarm.until(lambda: all(peer.is_finished for peer in swarm.peers), what="everybody's end")
            swarm.check()
            records = [swarm.peers[0].record(round_) for round_ in range(rounds + 1)]
            seats = [{entry.seat for entry in record.contributions} for record in records[1:] if record]
            finals = {peer.told("finished")[-1]["model_hash"] for peer in swarm.peers}
            found.update(
                round_seconds=[round(seconds, 2) for seconds in took],
                samples=sum(map(len, seats)) * spec.local.steps * spec.local.batch_size,
                intruders=sum(len(present & plan.away) for present, plan in zip(seats, plans, strict=True)),
                final_models=len(finals),
                caught_up=len(back := [entry for peer in swarm.peers for entry in peer.told("caught_up")]),
                catching_up_seconds=spread([entry["seconds"] for entry in back] or [0.0]),
                dead=sum(len(plan.dead) for plan in plans),
                cut=sum(len(plan.cut) for plan in plans),
                curve=[],
            )
            wanted = {*range(EVALUATE_EVERY, rounds + 1, EVALUATE_EVERY), rounds}
            for round_ in sorted(wanted):
                record = records[round_]
                assert record is not None
                store = next(peer.store for peer in swarm.peers if peer.store.has(record.weights))
                data = b"".join(unixfs.assemble(record.weights, store.get, max_bytes=1 << 30))
                loss, accuracy = network.evaluate(checkpoint.from_bytes(network.layout, data))
                found["curve"].append({"round": round_, "loss": loss, "accuracy": accuracy})

    run_simulation(main, seed=seed)
    return found


def final_loss(curve: Sequence[dict[str, float]], at: int = 0) -> float:
    """Mean over the last checkpoints up to the first at or after round `at` (0: the end)."""
    reached = [point["loss"] for point in curve if not at or point["round"] < at + EVALUATE_EVERY]
    return statistics.fmean(reached[-LAST:])


def summarise(report: Report, task: str, pairs: Sequence[dict[str, Any]]) -> None:
    """Judge what the seeds so far show."""
    report.targets[:] = [row for row in report.targets if not row["what"].startswith(task)]
    ratios, at_equal_samples, stalls = [], [], []
    for pair in pairs:
        with_, without = pair["away"], pair["all"]
        ratios.append(100 * (final_loss(with_["curve"]) / final_loss(without["curve"]) - 1))
        round_ = math.ceil(with_["samples"] / (without["samples"] / len(without["round_seconds"])))
        at_equal_samples.append(100 * (final_loss(with_["curve"]) / final_loss(without["curve"], round_) - 1))
        stalls.append(max(with_["round_seconds"]) / statistics.median(with_["round_seconds"]))
    equal_rounds, equal_samples = spread(ratios), spread(at_equal_samples)
    rounds = sum(len(pair["away"]["round_seconds"]) for pair in pairs)
    report.facts.setdefault("excess_percent", {})[task] = {
        "seeds": {str(pair["seed"]): {"rounds": len(pair["away"]["round_seconds"]), "equal rounds": rounds_, "equal samples": samples}
                  for pair, rounds_, samples in zip(pairs, ratios, at_equal_samples, strict=True)},
        "at equal rounds": equal_rounds, "at equal samples": equal_samples,
    }  # fmt: skip
    print(f"\n{task}: {len(pairs)} seeds, {rounds} rounds with {AWAY} of {PEERS} away; loss above the run without absences,")
    print(f"  %: {_show(equal_rounds)} at equal rounds, {_show(equal_samples)} at equal samples")
    judged = (
        ("final loss above the run without absences, %", equal_rounds["mean"], LOSS_PERCENT),
        ("longest round, in median rounds", max(stalls), STALL_MEDIANS),
        ("final models", max(pair["away"]["final_models"] for pair in pairs), 1),
        ("contributions of absent peers", sum(pair["away"]["intruders"] for pair in pairs), 0),
    )
    for what, measured, target in judged:
        report.judge(f"{task}: {what}", measured, target, at_least=False)


def _show(values: dict[str, float]) -> str:
    return f"{values['mean']:+.1f} ({values['min']:+.1f} to {values['max']:+.1f})"


def draw(out: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    curves = []
    for task, pairs in runs.items():
        for key, label in (("all", "all ten present"), ("away", "three of ten away in every round")):
            longest = max(len(pair[key]["curve"]) for pair in pairs)  # seeds of shorter runs decay their step elsewhere
            lines = [pair[key]["curve"] for pair in pairs if len(pair[key]["curve"]) == longest]
            points = [[line[n]["loss"] for line in lines] for n in range(len(lines[0]))]
            curves.append(
                Curve(
                    f"{task}, {label}",
                    [point["round"] for point in lines[0]],
                    [statistics.fmean(values) for values in points],
                    [min(values) for values in points],
                    [max(values) for values in points],
                )
            )
    plot(
        Path(out).with_suffix(".svg"), curves, title="Absences: another three of ten peers in every round",
        x_label="round", y_label="test loss", log="y",
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--add", nargs="+", default=[], help="files that other runs of this benchmark wrote: their seeds too")
    options = parser.parse_args(arguments)
    runs: dict[str, list[dict[str, Any]]] = {}
    report = Report("churn", facts={"peers": PEERS, "away": AWAY, "rounds": options.rounds, "runs": runs})
    for path in options.add:
        for task, pairs in json.loads(Path(path).read_text(encoding="utf-8"))["runs"].items():
            runs.setdefault(task, []).extend(pairs)
    for task, pairs in runs.items():
        summarise(report, task, pairs)
    for task in options.tasks:
        known = {pair["seed"] for pair in runs.get(task, [])}
        for seed in (seed for seed in options.seeds if seed not in known):
            rounds = options.rounds
            spec = parse_spec(SPEC.format(task=task, rounds=rounds, seed=seed, builtin=BUILTIN, **TASKS[task]))
            network = Quiet(spec)
            pair: dict[str, Any] = {"seed": seed}
            for key, away in (("away", AWAY), ("all", 0)):
                begun = time.monotonic()
                found = pair[key] = run(spec, network, seed, away)
                took = found["round_seconds"]
                print(
                    f"{task}, seed {seed}, {away} away: final loss {final_loss(found['curve']):.4f}, rounds of "
                    f"{statistics.median(took):.1f} s (longest {max(took):.1f} s), {found['dead']} deaths, {found['cut']} "
                    f"splits, {sum(took):.0f} virtual s in {time.monotonic() - begun:.0f} s",
                    flush=True,
                )
            runs.setdefault(task, []).append(pair)
            summarise(report, task, runs[task])
            report.save(options.out)
    report.save(options.out)
    if options.out:
        draw(options.out, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
