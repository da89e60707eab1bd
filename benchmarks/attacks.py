"""Byzantine peers against the rules that are to bear them.  `make bench-attacks`.

Law: every figure is of a whole run of the real learner, codec, settlement and fold (testing/byzantine_swarm.py): all
rounds, the checkpoint that every honest peer ends with, the whole test set.  "Absent" is the same run without its
attackers: the same honest peers, data, seeds and rule.  Losses are differences within one seed; their mean over
the seeds is what counts, their extremes are shown.  A row that misses its target is printed as missed.

MNIST: ten peers, the last two attack, parts drawn by label from Dirichlet(0.3).  Shakespeare: eight peers, two attack,
equal parts.  Validators: four honest ones, and the attackers, who lie (equal stake).

    python benchmarks/attacks.py [--task mnist|shakespeare] [--seeds 1,2,3] [--quick] [--out FILE] [--resume]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from report import Report, spread

from p2pflock.learning import robust
from p2pflock.learning.network import TorchNetwork
from p2pflock.learning.partition import draw_dirichlet
from p2pflock.learning.spec import TaskSpec, load_spec
from p2pflock.protocol import gate
from p2pflock.protocol.messages import Judgement, Trust
from p2pflock.testing.attackers import ATTACKS, Triggered
from p2pflock.testing.byzantine_swarm import ByzantineSwarm, Setup

ATTACKERS = 2
# What the issue names, and what goes beyond it (first seed alone); "clean" has honest peers in all seats.  With ten
# peers ALIE's z_max is 0: its payload is the honest mean.
NAMED = (
    "label flip", "ALIE 1.5", "noise", "on/off", "hijack", "colluders", "mimic", "copy", "sign flip x10", "IPM 3",
    "sign flip x1", "NaN",
)  # fmt: skip
BEYOND = ("backdoor", "public batch", "IPM 0.5", "stale", "IPM 0.1", "ALIE z_max")
COMPARED = ("clean", "absent", "sign flip x10", "ALIE 1.5", "label flip", "on/off", "hijack", "noise")
LEAST_ACCURACY, MOST_LOSS, MOST_COST = 97.5, 0.4, 0.5  # points
MOST_PERPLEXITY = 3.0  # per cent above clean


# --- rules ----------------------------------------------------------------------------------------------
def judge_nothing(candidates: Sequence[gate.Candidate], before: Sequence[Trust]) -> gate.Outcome:
    """The fold alone: clipped to the median norm, floor under the contributors of a coordinate."""
    return gate.Outcome(frozenset(), tuple(before))


def judge_as_published(candidates: Sequence[gate.Candidate], before: Sequence[Trust]) -> gate.Outcome:
    """The gate we began with: E = 0.7 E + 0.3 cosine, dropped iff E < min(median E, 0)."""
    means = {entry.peer: entry.recent_micro for entry in before}
    for entry in candidates:
        if entry.opinions:
            score = gate.compute_weighted_median([(line.cosine_micro, stake) for line, stake in entry.opinions])
            means[entry.peer] = (7 * means.get(entry.peer, 0) + 3 * score) // 10
    bar = min(gate.compute_median([means.get(entry.peer, 0) for entry in candidates]), 0)
    dropped = frozenset(entry.seat for entry in candidates if means.get(entry.peer, 0) < bar)
    return gate.Outcome(dropped, tuple(Trust(peer, 0, 0, means[peer]) for peer in sorted(means)))


RULES: dict[str, dict[str, Any]] = {
    "ours": {},
    "none": {"rule": judge_nothing},
    "EMA gate": {"rule": judge_as_published},
    # Most coordinates have one sender: the mean over all peers times the floor's divisor is our step.
    "CenteredClip": {"rule": judge_nothing, "dense_rule": robust.centered_clip, "dense_gain": 4.0},
}


# --- tasks ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Plan:
    spec: TaskSpec
    peers: int
    is_quick: bool

    def parts(self, network: TorchNetwork, seed: int) -> list[list[int]]:
        if self.spec.task.name == "mnist":
            _, labels = network.data.batch("train", range(network.size("train")))
            return draw_dirichlet(labels.tolist(), self.peers, 0.3, seed)
        return [list(range(seat, network.size("train"), self.peers)) for seat in range(self.peers)]


def build_plan(task: str, *, is_quick: bool) -> Plan:
    spec = load_spec(task)
    if task == "mnist":
        rounds, peers = (8 if is_quick else 30), 10
        local = replace(
            spec.local, steps=10 if is_quick else 30, batch_size=32, lr=Decimal("0.003"), final_lr_fraction=Decimal("0.1")
        )
        codec = replace(spec.codec, k=256)
        scoring = replace(spec.scoring, batch_size=256, held_out=16)
    else:
        rounds, peers = (6 if is_quick else 24), 8
        arguments = {"layers": 2, "heads": 4, "width": 64, "block": 64}
        spec = replace(spec, model=replace(spec.model, arguments=arguments))
        local = replace(
            spec.local, steps=10 if is_quick else 30, batch_size=8, warmup_steps=30, final_lr_fraction=Decimal("0.1")
        )
        codec = replace(spec.codec, k=256)
        scoring = replace(spec.scoring, batch_size=32, held_out=4)
    spec = replace(spec, task=replace(spec.task, rounds=rounds), local=local, codec=codec, scoring=scoring)
    return Plan(spec, peers, is_quick)


def run(plan: Plan, network: TorchNetwork, rule: str, attack: str, seed: int) -> dict[str, Any]:
    """One whole run: what its honest peers end with, and how often the gate dropped whom."""
    begin = time.perf_counter()
    setup = Setup(
        plan.spec,
        plan.parts(network, seed),
        attackers=0 if attack == "clean" else ATTACKERS,
        attack=ATTACKS.get(attack),
        seed=seed,
        **RULES[rule],
    )
    swarm = ByzantineSwarm(setup, network)
    dropped: dict[bool, list[bool]] = {False: [], True: []}
    for _ in range(plan.spec.task.rounds):
        for seat, judgement in swarm.step().judgements.items():
            dropped[seat in swarm.attacks].append(judgement is Judgement.GATED)
    evaluation = swarm.evaluate()
    row = {
        "rule": rule,
        "attack": attack,
        "seed": seed,
        "accuracy": evaluation.accuracy_micro / 1e4,
        "perplexity": math.exp(min(50.0, evaluation.loss_micro / 1e6)),
        "honest_dropped": _share(dropped[False]),
        "attackers_dropped": _share(dropped[True]),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if attack == "backdoor":
        marked = network.over(Triggered(network.data, every=1, splits=("test",)))
        row["backdoor_success"] = swarm.evaluate(marked).accuracy_micro / 1e4
    return row


def _share(flags: Sequence[bool]) -> float | None:
    return round(sum(flags) / len(flags), 3) if flags else None


# --- figures --------------------------------------------------------------------------------------------
class Results:
    """Rows by (rule, attack, seed); written after each."""

    def __init__(self, report: Report, out: Path | None) -> None:
        self.report, self.out = report, out
        self.rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        report.facts["runs"] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows[row["rule"], row["attack"], row["seed"]] = row
        self.report.facts["runs"] = list(self.rows.values())
        self.report.save(self.out)

    def seeds(self, rule: str, attack: str, figure: str) -> dict[int, float]:
        return {row["seed"]: row[figure] for (r, a, _), row in self.rows.items() if (r, a) == (rule, attack)}

    def differences(self, of: tuple[str, str], to: tuple[str, str], figure: str) -> list[float]:
        """`of` minus `to`, seed by seed where there are both."""
        left, right = self.seeds(*of, figure), self.seeds(*to, figure)
        return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def plan_runs(task: str, seeds: Sequence[int], *, is_quick: bool) -> list[tuple[str, str, int]]:
    """Ours in full, the others where they are compared; the first seed of everything before the second of anything."""
    if task == "shakespeare":
        return [("ours", attack, seed) for seed in seeds for attack in ("clean", "absent", "sign flip x10", "ALIE 1.5")]
    if is_quick:
        return [("ours", attack, seeds[0]) for attack in ("clean", "absent", *NAMED)]
    runs = []
    for seed in seeds:
        runs += [("ours", attack, seed) for attack in ("absent", *NAMED, "clean")]
        runs.append(("none", "clean", seed))
    first = seeds[0]
    runs += [("ours", attack, first) for attack in BEYOND]
    return runs + [(rule, attack, first) for rule in RULES if rule != "ours" for attack in COMPARED if (rule, attack) != ("none", "clean")]


def judge_mnist(results: Results) -> None:
    report = results.report
    table = report.facts["table"] = []
    print(f"\n{'attack':14} {'rule':13} {'accuracy mean (min..max)':>28}  against absent: mean (worst)   dropped: attackers, honest")
    for rule in RULES:
        for attack in ("clean", "absent", *NAMED, *BEYOND):
            accuracy = list(results.seeds(rule, attack, "accuracy").values())
            if not accuracy:
                continue
            losses = [-gain for gain in results.differences((rule, attack), (rule, "absent"), "accuracy")]
            row = {"rule": rule, "attack": attack, "seeds": len(accuracy), "accuracy": spread(accuracy)}
            if losses and attack not in ("clean", "absent"):
                row["loss"] = spread(losses)
            for key in ("attackers_dropped", "honest_dropped"):
                shares = [share for share in results.seeds(rule, attack, key).values() if share is not None]
                row[key] = sum(shares) / len(shares) if shares else None
            table.append(row)
            print(_line(row), flush=True)
    print()
    for attack in NAMED:
        accuracy = list(results.seeds("ours", attack, "accuracy").values())
        losses = [-gain for gain in results.differences(("ours", attack), ("ours", "absent"), "accuracy")]
        if accuracy and losses:
            report.judge(f"{attack}: least accuracy over {len(accuracy)} seeds, %", min(accuracy), LEAST_ACCURACY, at_least=True)
            report.judge(f"{attack}: points lost to attackers absent, mean", sum(losses) / len(losses), MOST_LOSS, at_least=False)
    costs = results.differences(("none", "clean"), ("ours", "clean"), "accuracy")
    if costs:
        report.facts["cost_without_attackers"] = spread(costs)
        report.judge("points that the gate costs without attackers, mean", sum(costs) / len(costs), MOST_COST, at_least=False)


def _line(row: dict[str, Any]) -> str:
    accuracy, loss = row["accuracy"], row.get("loss")
    text = f"{row['attack']:14} {row['rule']:13} {accuracy['mean']:7.2f} ({accuracy['min']:.2f}..{accuracy['max']:.2f}) of {row['seeds']}"
    text += f"    {loss['mean']:+.2f} ({loss['max']:+.2f})" if loss else " " * 19
    shares = [row["attackers_dropped"], row["honest_dropped"]]
    return text + "    " + ", ".join("-" if share is None else f"{share:.0%}" for share in shares)


def judge_shakespeare(results: Results) -> None:
    print()
    for attack in ("absent", "sign flip x10", "ALIE 1.5"):
        perplexity, clean = results.seeds("ours", attack, "perplexity"), results.seeds("ours", "clean", "perplexity")
        excess = [100 * (perplexity[seed] / clean[seed] - 1) for seed in sorted(perplexity.keys() & clean.keys())]
        if not excess:
            continue
        figures = results.report.facts[attack] = spread(excess)
        print(f"{attack}: {figures['min']:+.2f} .. {figures['max']:+.2f} % perplexity against clean over {len(excess)} seeds")
        if attack != "absent":
            results.report.judge(f"{attack}: perplexity above clean, %, mean", figures["mean"], MOST_PERPLEXITY, at_least=False)


def draw_plot(results: Results, path: Path) -> None:
    """Bars: points lost to the run without attackers, by attack and rule."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "p2pflock"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.4, 4.2), layout="constrained")
    attacks = [*NAMED, *BEYOND]
    rows = {(row["rule"], row["attack"]): row for row in results.report.facts["table"] if "loss" in row}
    width = 0.8 / len(RULES)
    for number, rule in enumerate(RULES):
        places = [place for place, attack in enumerate(attacks) if (rule, attack) in rows]
        losses = [rows[rule, attacks[place]]["loss"] for place in places]
        axes.bar(
            [place + (number - (len(RULES) - 1) / 2) * width for place in places],
            [max(0.01, loss["mean"]) for loss in losses],
            width,
            label=rule,
        )
    axes.axhline(MOST_LOSS, color="grey", linestyle="--", linewidth=1, label=f"{MOST_LOSS} points")
    axes.set_yscale("log")
    axes.set_xticks(range(len(attacks)), attacks, rotation=40, ha="right")
    axes.set(title="MNIST, Dirichlet 0.3, 2 of 10 peers attack", ylabel="accuracy lost to attackers absent, points")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("mnist", "shakespeare"), default="mnist")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--quick", action="store_true", help="a few small rounds: shows that it runs, not the figures")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out holds")
    parser.add_argument("--only", default="", help="rule or attack: run what has it in its name")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    plan = build_plan(options.task, is_quick=options.quick)
    network = TorchNetwork(plan.spec)
    report = Report("attacks" if options.task == "mnist" else "attacks_lm")
    report.facts.update(parameters=network.layout.parameters, peers=plan.peers, attackers=ATTACKERS, rounds=plan.spec.task.rounds)
    results = Results(report, options.out)
    if options.resume and options.out and options.out.exists():
        for row in json.loads(options.out.read_text())["runs"]:
            results.add(row)
    for rule, attack, seed in plan_runs(options.task, seeds, is_quick=options.quick):
        if (rule, attack, seed) in results.rows or options.only not in f"{rule} {attack}":
            continue
        results.add(run(plan, network, rule, attack, seed))
        print(json.dumps(results.rows[rule, attack, seed]), flush=True)
    (judge_mnist if options.task == "mnist" else judge_shakespeare)(results)
    report.save(options.out)
    if options.out and options.task == "mnist":
        draw_plot(results, options.out.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
