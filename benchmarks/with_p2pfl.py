"""MNIST to 98 %, 8 peers, Dirichlet 0.5: ours beside p2pfl, on the same plan as benchmarks/flower.py.

Law: as there, but p2pfl's nodes are real ones: gRPC on loopback, its own gossip and aggregation, all nodes in one
process (p2pfl_app.py).  Its bytes are those of all protobuf messages that its nodes send; its seconds are of the
wall clock, with its waiting and with eight nodes on one core, so they are stated and not judged.

    python benchmarks/with_p2pfl.py --p2pfl PYTHON [--seeds 1] [--out FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flower import ALPHA, CHOSEN, GOAL, PEERS, Rows, run
from benchmarks.report import Report, spread


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/with_p2pfl.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--p2pfl", default="build/venvs/p2pfl/bin/python", help="Python of p2pfl's environment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=40, help="at most")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    # FedAvg among peers: what was best for Flower's FedAvg.
    settings = {"ours": CHOSEN["ours"], "p2pfl": CHOSEN["flower"]}
    rows: Rows = {
        system: {seed: run(system, chosen, seed, options.rounds, options.p2pfl) for seed in options.seeds}
        for system, chosen in settings.items()
    }
    report = Report("p2pfl", facts={"peers": PEERS, "alpha": ALPHA, "goal": GOAL, "runs": rows})
    for what, target in (("bytes", 20.0), ("samples", 1 / 1.2)):
        ratio = spread([rows["p2pfl"][seed][-1][what] / rows["ours"][seed][-1][what] for seed in options.seeds])
        report.judge(f"{what} of p2pfl / ours, worst seed", ratio["min"], target, at_least=True)
    report.save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
