"""What to do with a payload that missed the record, and with error feedback kept across an absence.

Law: every rule runs over the shipped Learner, fold and codec, on the same data parts, shards and draws of who is
late or away; only the rule differs.  No network: who is late is drawn from the seed.  What the peers do is "dropped" and "kept";
the other rules exist here alone.

Late: 3 of 10 peers, drawn anew each round, train and are not in the record.
    dropped     the payload is lost, as with plain error feedback
    returned    the payload goes back into its author's error feedback
    folded late the payload is folded one round later with half its weight
Away: 3 of 10 peers train nothing for n rounds, then the next three (n = 1, 2, 5).  Their error feedback is
    kept, cleared, or decayed by beta for every round away.

    python benchmarks/late.py --out docs/benchmarks/late.json
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from report import Report, spread

from p2pflock.learning import codec
from p2pflock.learning.learner import Learner, Network
from p2pflock.learning.partition import PrivateShard, draw_dirichlet
from p2pflock.learning.spec import TaskSpec, parse_spec
from p2pflock.ports import FoldInput
from p2pflock.primitives import shuffle
from p2pflock.testing import tiny_task
from p2pflock.testing.tiny_task import NumpyNetwork

PEERS, OUT = 10, 3
TESTED = 2000
LAST = 5  # the final loss is the mean over so many rounds
MNIST = """
[task]
name = "mnist-late"
rounds = {rounds}
seed = {seed}
[model]
factory = "p2pflock.learning.tasks.mnist:build_model"
arguments = {{ channels = 8, hidden = 32 }}
[data]
factory = "p2pflock.learning.tasks.mnist:load_data"
[local]
steps = 10
batch_size = 32
optimizer = "adamw"
lr = 0.002
final_lr_fraction = 0.1
[codec]
k = 128
k_start = 1024
start_rounds = 5
"""


class Keeper(Learner):
    """A Learner with rules of its own: for feedback after an absence, and for a payload that was not counted."""

    keep: Callable[[bytes, int], bytes] | None = None  # (feedback, rounds away) -> what is left of it

    def _state_before(self, round_: int) -> Any:
        before, state = super()._state_before(round_), self._state
        if self.keep and 0 < state.round < round_ - 1:
            before.feedback = self.keep(state.feedback, round_ - 1 - state.round)
        return before

    def take_back(self, payload: bytes) -> None:
        """The error feedback as if this round's payload had not been sent."""
        sparse = codec.decode(payload, self._shape(self._state.round))
        feedback = np.frombuffer(self._state.feedback, "<f4").copy()
        feedback[sparse.indices] += sparse.values()
        self._state = replace(self._state, feedback=feedback.tobytes())


def _decay(feedback: bytes, away: int) -> bytes:
    values: bytes = (np.frombuffer(feedback, "<f4") * np.float32(0.95**away)).tobytes()
    return values


AWAY: dict[str, Callable[[bytes, int], bytes]] = {
    "kept": lambda feedback, _: feedback,
    "decayed": _decay,
    "cleared": lambda _feedback, _away: b"",
}


def build(task: str, seed: int, rounds: int) -> tuple[TaskSpec, list[Network], list[tuple[int, int]]]:
    """Spec, a network for each peer, and (shard, shards) of each peer."""
    if task == "tiny":
        spec = tiny_task.build_spec(rounds=rounds, seed=seed)
        return spec, [NumpyNetwork(seed)] * PEERS, [(number, PEERS) for number in range(PEERS)]
    from p2pflock.learning.network import TorchNetwork

    spec = parse_spec(MNIST.format(rounds=rounds, seed=seed))
    whole = TorchNetwork(spec)
    labels = whole._data.batch("train", range(whole.size("train")))[1].tolist()  # noqa: SLF001 - no port for labels
    parts = draw_dirichlet(labels, PEERS, 0.5, seed)
    return spec, [PrivateShard(whole, part) for part in parts], [(0, 1)] * PEERS


def train(learner: Learner, round_: int, place: tuple[int, int], seed: bytes) -> bytes:
    steps = learner.train(round_, *place, seed)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            payload: bytes = done.value.payload
            return payload


def run(task: str, seed: int, rounds: int, rule: str, away: int = 0) -> list[float]:
    """Test loss after every round."""
    spec, networks, places = build(task, seed, rounds)
    learners = [Keeper(spec, network) for network in networks]
    for learner in learners:
        learner.keep = AWAY.get(rule)
    draw = np.random.Generator(np.random.PCG64(seed))
    late: list[FoldInput] = []
    losses, out, tested = [], np.arange(0), min(TESTED, networks[0].size("test"))
    for round_ in range(1, rounds + 1):
        if rule != "nobody" and (not away or (round_ - 1) % away == 0):
            out = draw.permutation(PEERS)[:OUT]
        beacon = shuffle.derive(bytes(32), "late", seed, round_)
        inputs, following = [], []
        for number, learner in enumerate(learners):
            if away and number in out:
                continue
            payload = train(learner, round_, places[number], beacon)
            if away or number not in out:
                inputs.append(FoldInput(payload, 2))
                continue
            following.append(FoldInput(payload, 1))
            if rule == "returned":
                learner.take_back(payload)
        if rule == "folded late" and learners[0]._shape(round_) == learners[0]._shape(round_ - 1):  # noqa: SLF001
            inputs += late
        late = following
        for learner in learners:
            learner.adopt(learner.fold(round_, inputs).model_hash)
        losses.append(networks[0].loss(learners[0]._weights, "test", range(tested))[0])  # noqa: SLF001
    return losses


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tasks", nargs="+", default=["tiny", "mnist"])
    options = parser.parse_args(arguments)
    report = Report("late", facts={"peers": PEERS, "out": OUT, "rounds": options.rounds, "results": []})
    plans = [("nobody", 0), ("dropped", 0), ("returned", 0), ("folded late", 0)]
    plans += [(rule, away) for away in (1, 2, 5) for rule in AWAY]
    for task in options.tasks:
        reference: list[float] = []
        for rule, away in plans:
            begun = time.monotonic()
            curves = [run(task, seed, options.rounds, rule, away) for seed in range(1, options.seeds + 1)]
            finals = [statistics.fmean(curve[-LAST:]) for curve in curves]
            middles = [statistics.fmean(curve[len(curve) // 2 - LAST : len(curve) // 2]) for curve in curves]
            reference = reference or finals
            excess = [100 * (loss / base - 1) for loss, base in zip(finals, reference, strict=True)]
            row = {"task": task, "rule": rule, "away": away, "final": finals, "half": middles, "excess_percent": excess}
            report.facts["results"].append(row)
            report.save(options.out)
            print(
                f"{task:6} {rule:12} away {away}: final {statistics.fmean(finals):.4f} (half {statistics.fmean(middles):.4f})  "
                f"excess % {({key: round(value, 1) for key, value in spread(excess).items()})}  {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
