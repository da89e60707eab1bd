"""One exchange of ten million parameters among eight peers, ours against hivemind's.  `make bench-exchange`.

Law: both sides are eight processes on this machine that speak over real sockets, alive at the same time, and take
turns round by round; a round lasts until the last peer has its result.  Ours: encode with error feedback, exchange
over hivemind's P2P daemons, decode and fold (all peers' bits are compared).  Theirs: DecentralizedAverager, one group
of eight, from the moment everybody is matched (the mean is checked: on a busy machine some are silently not
everybody's; their times count all the same, and they are counted); with its matchmaking beside it.  Ours has none: the beacon draws the partners.
Twice: on loopback, where bytes cost next to nothing, and behind links of 50 Mb/s with 100 ms there and back
(namespaces.py; root), which is what peers have.

    python benchmarks/exchange.py [--parameters N] [--peers N] [--repeats N] [--only loopback|links] [--out FILE]
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
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.namespaces import Link, Network, address_of, measure_link, open_network
from benchmarks.report import Report
from p2pflock.errors import FlockError

PEER = Path(__file__).resolve().with_name("exchange_peer.py")
GOAL = 5.0
LINK = Link(megabits=50, delay_seconds=0.05)
LOOPBACK, LINKS = "loopback", "50 Mb/s, 100 ms"
COMPRESSIONS = {"fp16": 2.0, "8-bit": 1.0, "fp32": 4.0}  # bytes a parameter
LARGEST_ERROR = {"fp16": 1e-3, "8-bit": 0.1, "fp32": 1e-5}


class Group:
    """N peer processes of one kind."""

    def __init__(self, kind: str, peers: int, parameters: int, network: Network | None = None) -> None:
        self._network = network
        self.facts: list[dict[str, Any]] = []
        self._peers: list[subprocess.Popen[str]] = []
        try:
            first = self._start(kind, 0, peers, parameters, [])
            self.facts.append(self._read(first))
            address = self.facts[0]["addresses"][:1]
            others = [self._start(kind, number, peers, parameters, address) for number in range(1, peers)]
            self.facts += [self._read(peer) for peer in others]
        except BaseException:
            self.close()
            raise

    def _start(self, kind: str, number: int, peers: int, parameters: int, bootstrap: list[str]) -> subprocess.Popen[str]:
        host = "127.0.0.1" if self._network is None else address_of(number + 1)
        command = [sys.executable, str(PEER), kind, str(number), str(peers), str(parameters), host, *bootstrap]
        peer = subprocess.Popen(
            command if self._network is None else self._network.command(number + 1, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._peers.append(peer)
        return peer

    def tell(self, **command: object) -> None:
        for number in range(len(self._peers)):
            self.tell_one(number, **command)

    def tell_one(self, number: int, **command: object) -> None:
        pipe = self._peers[number].stdin
        assert pipe is not None
        pipe.write(json.dumps(command) + "\n")
        pipe.flush()

    def hear(self) -> list[dict[str, Any]]:
        """The next line of every peer, in order."""
        return [self._read(peer) for peer in self._peers]

    @staticmethod
    def _read(peer: subprocess.Popen[str]) -> dict[str, Any]:
        assert peer.stdout is not None
        line = peer.stdout.readline()
        if not line:
            raise RuntimeError("a peer process ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        for peer in self._peers:
            if peer.stdin is not None:
                peer.stdin.close()
        for peer in self._peers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                peer.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(peer.pid, signal.SIGKILL)  # and its forks: hivemind's outlive a main process that fails
            peer.wait()


def play_flock(group: Group, round_: int) -> dict[str, Any]:
    """Seconds until the last peer has folded; raises when the peers' bits differ."""
    group.tell(go=round_, peers=[fact["peer"] for fact in group.facts])
    for number, answer in enumerate(group.hear()):
        for other in range(len(group.facts)):
            if other != number:
                group.tell_one(other, header=[number, *answer["header"]])
    done = group.hear()
    group.tell(check=True)
    if len({answer["hash"] for answer in group.hear()}) != 1 or any(a["payloads"] != len(done) for a in done):
        raise RuntimeError(f"the peers folded different models: {done}")
    last = max(done, key=lambda answer: float(answer["done"]))
    return {"seconds": last["done"], **last["parts"], "payload bytes": last["bytes"]}


def play_hivemind(group: Group, round_: int, compression: str) -> dict[str, Any]:
    begin = time.perf_counter()
    group.tell(go=round_)
    group.hear()
    matched = time.perf_counter() - begin
    group.tell(average=True)
    done = group.hear()
    group.tell(check=True)
    worst = max(answer["error"] for answer in group.hear())
    is_whole = worst <= LARGEST_ERROR[compression] and all(answer["group"] == len(done) for answer in done)
    seconds = max(answer["done"] for answer in done)
    return {"seconds": seconds, "matchmaking": matched, "error": worst, "is_whole": is_whole}


def run(
    parameters: int, peers: int, repeats: int, where: str, network: Network | None, report: Report, out: Path | None
) -> None:
    groups: list[Group] = []
    try:
        groups.append(flock := Group("flock", peers, parameters, network))
        flock.tell(addresses={fact["peer"]: fact["addresses"] for fact in flock.facts})
        groups.append(dense := Group("hivemind", peers, parameters, network))
        print("both groups are up", flush=True)
        play_flock(flock, 0)  # warm: first connections, compiled code
        round_ = 0
        rows: dict[str, Any] = {}
        for compression in COMPRESSIONS:
            dense.tell(use=compression)
            dense.hear()
            pairs = []
            for turn in range(repeats + 1):
                round_ += 1
                pair = play_flock(flock, round_), play_hivemind(dense, round_, compression)
                print(f"  {compression}: ours {pair[0]['seconds']:.2f} s, theirs {pair[1]['seconds']:.2f} s", flush=True)
                if turn:  # the first one opens their connections
                    pairs.append(pair)
            rows[compression] = compare(pairs)
            if broken := sum(not theirs["is_whole"] for _, theirs in pairs):
                print(f"  {compression}: {broken} of {len(pairs)} of their averages are not everybody's mean (no error raised)")
            report.facts[where] = rows
            report.save(out)
    finally:
        for group in groups:
            group.close()
    for compression, row in rows.items():
        ours, theirs = row["ours"]["seconds"], row["hivemind"]["seconds"]
        print(f"{compression}: ours {ours:.2f} s, hivemind {theirs:.2f} s and {row['hivemind']['matchmaking']:.1f} s of matchmaking")
        report.judge(f"{where}: hivemind {compression} over ours, once matched", row["ratio"], GOAL, at_least=True)


def compare(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]
    return {
        "ours": {name: statistics.median(ours[name] for ours, _ in pairs) for name in pairs[0][0]},
        "hivemind": {name: statistics.median(theirs[name] for _, theirs in pairs) for name in pairs[0][1]},
        "ratio": statistics.median(ratios),
        "ratio with matchmaking": statistics.median(
            (theirs["seconds"] + theirs["matchmaking"]) / ours["seconds"] for ours, theirs in pairs
        ),
        "ratios": ratios,
        "averages of hivemind that are not everybody's mean": sum(not theirs["is_whole"] for _, theirs in pairs),
    }


def keep_other(report: Report, where: str, out: Path) -> None:
    """The part that is not measured now stays as it was."""
    before = json.loads(out.read_text())
    report.facts |= {name: before[name] for name in (where, "link measured") if name in before}
    report.targets += [row for row in before["targets"] if row["what"].startswith(where)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/exchange.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--peers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("loopback", "links"), help="one of the two parts; the other stays in --out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    report = Report("exchange", packages=("numpy", "numba", "torch", "hivemind"))
    report.facts |= {"parameters": options.parameters, "peers": options.peers}
    if options.only and options.out and options.out.exists():
        keep_other(report, LINKS if options.only == "loopback" else LOOPBACK, options.out)
    try:
        if options.only != "links":
            run(options.parameters, options.peers, options.repeats, LOOPBACK, None, report, options.out)
        if options.only != "loopback":
            with open_network(options.peers, LINK) as network:
                report.facts["link measured"] = measure_link(network)
                run(options.parameters, options.peers, options.repeats, LINKS, network, report, options.out)
    except FlockError as error:
        report.save(options.out)
        print(f"error: {error.message}\nfix: {error.hint}", file=sys.stderr)
        return 1
    report.save(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
