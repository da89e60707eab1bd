"""Do all peers hold the same model after every one of 500 rounds, however each of them computes?  `make bench-determinism`.

Law: nothing is compared with a recorded answer.  Six peers, each a process of its own under another configuration
(compiled and numpy loops, 1 to 4 threads, machine code for this processor and for any, vector instructions of
numpy and torch switched off, subnormals flushed, payloads arriving in another order), train MNIST's network for
real: some are away for a while and catch up by folding what they missed.  After each round the SHA-256 of every
model must be one and the same, and so must a chain of payloads that each peer encodes from the common update.
Then other builds of numpy and numba, in environments of their own without torch, fold the 500 rounds again from
the log of payloads.  Last the controls, which must differ: payloads in reverse order; a fused multiply-add.

    python benchmarks/determinism.py [--rounds N] [--folder DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from p2pflock.learning import codec, compiled, fold
from p2pflock.learning.codec import F32, Shape

ROUNDS, START_ROUNDS, K, K_START, STEPS, BATCH = 500, 20, 64, 1024, 2, 16
CHANCE_TO_LEAVE, LONGEST_ABSENCE, FEWEST_PRESENT = 0.12, 6, 3
ROOT = Path(__file__).resolve().parents[1]
SEED = bytes(range(32))


@dataclass(frozen=True)
class Configuration:
    """How one peer of the live run computes."""

    name: str
    codec: str  # "always" compiled, or "never"
    threads: int = 1
    order: str = "as sent"
    is_flushing: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def list_configurations() -> list[Configuration]:
    from numpy._core._multiarray_umath import __cpu_dispatch__

    plain = {"NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__)}
    portable = {"NUMBA_CPU_NAME": "x86-64" if os.uname().machine == "x86_64" else "generic", "NUMBA_CPU_FEATURES": ""}
    return [
        Configuration("compiled, 1 thread", "always"),
        Configuration("numpy, 1 thread, reversed", "never", order="reversed"),
        Configuration("compiled, 4 threads, shuffled", "always", threads=4, order="shuffled"),
        Configuration("numpy, 2 threads, subnormals flushed", "never", threads=2, order="shuffled", is_flushing=True),
        Configuration("compiled for any processor, 2 threads", "always", threads=2, order="reversed", environment=portable),
        Configuration(
            "numpy and torch without vector instructions, 4 threads", "never", threads=4, order="shuffled",
            environment={**plain, "ATEN_CPU_CAPABILITY": "default"},
        ),
    ]  # fmt: skip


# Environments of their own, wheels alone; none has torch.  (name, packages, compiled loops)
BUILDS = (
    ("numpy 1.26, without numba", ("numpy==1.26.4",), "never"),
    ("numpy 1.26, numba 0.60", ("numpy==1.26.4", "numba==0.60.0"), "always"),
    ("numpy 2.0, without numba", ("numpy==2.0.2",), "never"),
    ("numpy 2.2, numba 0.61", ("numpy==2.2.6", "numba==0.61.2"), "always"),
    ("numpy 2.4, without numba", ("numpy==2.4.6",), "never"),
)
CONTROLS = ("payloads in reverse order", "fused multiply-add")


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Chain:
    """What a peer makes of the common update with its own encoder, round after round; equal where encoders are."""

    def __init__(self, size: int) -> None:
        self.kept, self.digest = np.zeros(size, np.float32), ""

    def add(self, delta: F32, shape: Shape) -> str:
        payload, self.kept = codec.compress_with_feedback(delta, self.kept, 0.95, shape)
        self.digest = sha256(self.digest.encode(), payload, self.kept.astype("<f4").tobytes())
        return self.digest


# --- a peer of the live run -----------------------------------------------------------------------------
def build_spec(rounds: int) -> Any:
    from p2pflock.learning.spec import parse_spec

    text = (ROOT / "p2pflock" / "learning" / "tasks" / "mnist.toml").read_text()
    for old, new in (
        ("rounds = 12", f"rounds = {rounds}"),
        ("steps = 60", f"steps = {STEPS}"),
        ("batch_size = 64", f"batch_size = {BATCH}"),
        ("k = 128", f"k = {K}"),
        ("k_start = 1024\nstart_rounds = 5", f"k_start = {K_START}\nstart_rounds = {START_ROUNDS}"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_spec(text)


def be_peer(pipe: Connection, configuration: Configuration, rounds: int) -> None:
    import torch

    from p2pflock.learning import checkpoint
    from p2pflock.learning.learner import Learner
    from p2pflock.learning.network import TorchNetwork
    from p2pflock.ports import FoldInput
    from p2pflock.primitives.cid import CID

    torch.set_num_threads(configuration.threads)
    torch.set_flush_denormal(configuration.is_flushing)
    compiled._choice = "always" if configuration.codec == "always" else "never"  # noqa: SLF001 - for all its life
    spec = build_spec(rounds)
    network = TorchNetwork(spec)
    learner = Learner(spec, network)

    def weigh() -> F32:
        return checkpoint.from_bytes(network.layout, learner.export())

    weights, chain = weigh(), Chain(network.layout.parameters)
    is_compiled = compiled.find(1) is not None
    rule = asdict(learner._rule)  # noqa: SLF001 - the log says by which rule it was folded
    pipe.send((weights.astype("<f4").tobytes(), rule, is_compiled, numpy_features()))
    while (request := pipe.recv()) is not None:
        kind, round_, *rest = request
        if kind == "train":
            steps = learner.train(round_, *rest, SEED)
            try:
                while True:
                    next(steps)
            except StopIteration as done:
                pipe.send((done.value.payload, done.value.samples))
        elif kind == "evaluate":
            pipe.send(learner.evaluate().accuracy_micro / 1e6)
        else:
            (arrived,) = rest
            ordered = sorted(arrived, key=lambda pair: CID.of_raw(pair[0]))  # as a node does
            folded = learner.fold(round_, [FoldInput(payload, weight) for payload, weight in ordered])
            learner.adopt(folded.model_hash)
            before, weights = weights, weigh()
            own = chain.add(before - weights, learner._shape(round_))  # noqa: SLF001
            pipe.send((folded.model_hash.hex(), sha256(weights.astype("<f4").tobytes()), own, [p for p, _ in ordered]))


def numpy_features() -> list[str]:
    """What numpy's dispatch uses in this process."""
    try:
        from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    except ImportError:
        from numpy.core._multiarray_umath import __cpu_dispatch__, __cpu_features__
    return [name for name in __cpu_dispatch__ if __cpu_features__[name]]


class Peer:
    """The parent's end of one."""

    def __init__(self, number: int, configuration: Configuration, rounds: int) -> None:
        self.number, self.configuration = number, configuration
        self.next_round = 1  # the first it has not folded
        self.until = 0  # it is away up to this round
        self.draw = random.Random(number)
        threads = str(configuration.threads)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",  # numpy's about features it was told not to use
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "NUMBA_NUM_THREADS": threads,
            **configuration.environment,
        }
        self.pipe, theirs = Pipe()
        command = [sys.executable, __file__, "--peer", str(number), "--fd", str(theirs.fileno()), "--rounds", str(rounds)]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()

    def arrange(self, entries: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
        """Payloads in the order in which they reach this peer."""
        arrived = list(entries)
        if self.configuration.order == "reversed":
            arrived.reverse()
        elif self.configuration.order == "shuffled":
            self.draw.shuffle(arrived)
        return arrived

    def close(self) -> None:
        with suppress(OSError):
            self.pipe.send(None)
        self.pipe.close()
        self.process.wait(60)


@dataclass
class Live:
    rounds: int
    agreed: int = 0  # rounds after which all models were one
    folds: int = 0
    away: int = 0  # rounds missed, over all peers
    encoded_alike: int = 0
    differing: dict[str, int] = field(default_factory=dict)  # configuration -> first round
    configurations: list[dict[str, Any]] = field(default_factory=list)
    final: str = ""
    accuracy: float = 0.0
    payload_bytes: int = 0
    seconds: float = 0.0


def run_live(rounds: int, folder: Path) -> Live:
    """Train, fold, compare; writes genesis, payloads and hashes into `folder`."""
    begin = time.monotonic()
    peers = [Peer(number, each, rounds) for number, each in enumerate(list_configurations())]
    live, absent = Live(rounds), random.Random(7)
    log: list[dict[str, Any]] = []
    history: list[list[tuple[bytes, int]]] = []
    reports: list[dict[str, tuple[str, str, str]]] = [{} for _ in range(rounds)]
    try:
        hellos = [peer.pipe.recv() for peer in peers]
        for peer, (_, _, is_compiled, features) in zip(peers, hellos, strict=True):
            each = peer.configuration
            assert is_compiled == (each.codec == "always"), f"{each.name}: the loops that run are not those it names"
            live.configurations.append({**asdict(each), "numpy uses": features})
            print(f"  peer {peer.number}: {each.name}; numpy uses {' '.join(features) or 'its baseline'}", flush=True)
        assert len({genesis for genesis, *_ in hellos}) == 1, "peers begin with different models"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "genesis.f32").write_bytes(hellos[0][0])
        with (folder / "payloads.bin").open("wb") as payloads:
            for round_ in range(1, rounds + 1):
                present = [peer for peer in peers if peer.until < round_]
                for peer in absent.sample(present, len(present))[FEWEST_PRESENT:]:
                    if absent.random() < CHANCE_TO_LEAVE:
                        peer.until = round_ + absent.randrange(LONGEST_ABSENCE)
                present = [peer for peer in present if peer.until < round_]
                live.away += len(peers) - len(present)
                for peer in present:  # first what it missed
                    _fold_up_to(peer, round_ - 1, history, reports)
                for shard, peer in enumerate(present):
                    peer.pipe.send(("train", round_, shard, len(present)))
                history.append([peer.pipe.recv() for peer in present])
                for peer in present:
                    _fold_up_to(peer, round_, history, reports)
                live.payload_bytes += sum(len(payload) for payload, _ in history[-1])
                if round_ % 50 == 0:
                    print(f"  round {round_}: {time.monotonic() - begin:.0f} s, {len(present)} present", flush=True)
            for peer in peers:
                _fold_up_to(peer, rounds, history, reports)
            for number, (entries, report) in enumerate(zip(history, reports, strict=True)):
                live.folds += len(report)
                live.agreed += len({hashes[:2] for hashes in report.values()}) == 1 and len(report) == len(peers)
                live.encoded_alike += len({hashes[2] for hashes in report.values()}) == 1
                usual = max((list(report.values())), key=list(report.values()).count)
                for name, hashes in report.items():
                    if hashes != usual:
                        live.differing.setdefault(name, number + 1)
                rows = [[len(payload), weight] for payload, weight in _canonical(entries)]
                for payload, _ in _canonical(entries):
                    payloads.write(payload)
                log.append({"entries": rows, "model": usual[1], "encoded": usual[2]})
        live.final = log[-1]["model"]
        peers[0].pipe.send(("evaluate", rounds))
        live.accuracy = peers[0].pipe.recv()
    finally:
        for peer in peers:
            peer.close()
    body = {"rule": hellos[0][1], "chunk": 4096, "k": K, "k_start": K_START, "start_rounds": START_ROUNDS, "rounds": log}
    (folder / "log.json").write_text(json.dumps(body))
    live.seconds = time.monotonic() - begin
    return live


def _canonical(entries: Sequence[tuple[bytes, int]]) -> list[tuple[bytes, int]]:
    from p2pflock.primitives.cid import CID

    return sorted(entries, key=lambda pair: CID.of_raw(pair[0]))


def _fold_up_to(peer: Peer, round_: int, history: Any, reports: Any) -> None:
    while peer.next_round <= round_:
        entries = history[peer.next_round - 1]
        peer.pipe.send(("fold", peer.next_round, peer.arrange(entries)))
        model_hash, raw, encoded, order = peer.pipe.recv()
        assert order == [payload for payload, _ in _canonical(entries)]
        reports[peer.next_round - 1][peer.configuration.name] = (model_hash, raw, encoded)
        peer.next_round += 1


# --- a replay, in any environment that has numpy --------------------------------------------------------
def replay(folder: Path, choice: str, control: str) -> dict[str, Any]:
    """Fold the log again; the first round after which the model, or what it encodes to, is another."""
    begin = time.monotonic()
    body = json.loads((folder / "log.json").read_text())
    data = (folder / "payloads.bin").read_bytes()
    weights = np.frombuffer((folder / "genesis.f32").read_bytes(), "<f4").astype(np.float32)
    rule, chain, at = fold.FoldRule(**body["rule"]), Chain(weights.size), 0
    if control == "fused multiply-add":
        vars(fold)["_add"] = _add_fused
    first: int | None = None
    first_encoded: int | None = None
    with compiled.choose("always" if choice == "always" else "never"):
        is_compiled = compiled.find(1) is not None
        for number, line in enumerate(body["rounds"]):
            shape = Shape(weights.size, body["chunk"], body["k_start"] if number < body["start_rounds"] else body["k"])
            inputs = []
            for size, weight in line["entries"]:
                payload, at = data[at : at + size], at + size
                sparse = codec.decode(payload, shape)
                assert codec.encode(sparse) == payload
                inputs.append(fold.Weighted(sparse, weight))
            if control == "payloads in reverse order":
                inputs.reverse()
            before, weights = weights, fold.fold(rule, weights, inputs)
            if first is None and sha256(weights.astype("<f4").tobytes()) != line["model"]:
                first = number + 1
            if first_encoded is None and chain.add(before - weights, shape) != line["encoded"]:
                first_encoded = number + 1
            if control and first is not None:
                break
    numba = sys.modules.get("numba")
    return {
        "rounds": number + 1,
        "first round that differs": first,
        "first round encoded differently": first_encoded,
        "compiled": is_compiled,
        "numpy": np.__version__,
        "numba": numba.__version__ if numba else None,
        "torch": "torch" in sys.modules,
        "final": sha256(weights.astype("<f4").tobytes()),
        "seconds": time.monotonic() - begin,
    }


def _add_fused(total: F32, count: Any, part: Any, number: int, begin: int) -> None:
    """fold._add as a compiler that fuses would have it: the product is not rounded before it is added."""
    own = part.block(number)
    indices = part.sparse.indices[own]
    coefficients = part.coefficients[indices // part.sparse.shape.chunk].astype(np.float64)
    indices = indices - begin
    total[indices] = (total[indices].astype(np.float64) + part.sparse.levels[own] * coefficients).astype(np.float32)
    count[indices] += part.weight


def run_replay(python: str | Path, folder: Path, choice: str, control: str = "") -> dict[str, Any]:
    command = [str(python), str(Path(__file__).resolve()), "--replay", str(folder), "--codec", choice, "--control", control]
    # What other versions of numba compile is kept apart.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder.parent / f"numba-{sha256(str(python).encode())[:8]}")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def build_environment(folder: Path, packages: Sequence[str]) -> Path | str:
    """Its python, or why there is none."""
    name = "-".join(package.replace("==", "") for package in packages)
    python = folder / name / "bin" / "python"
    stamp = folder / name / "complete"
    if not stamp.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *packages]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"not installed: {done.stderr.strip().splitlines()[-1]}"
        stamp.touch()
    return python


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/determinism.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "determinism")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--replay", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--codec", choices=("always", "never"), help=argparse.SUPPRESS)
    parser.add_argument("--control", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peer is not None:
        be_peer(Connection(options.fd), list_configurations()[options.peer], options.rounds)
        return 0
    if options.replay:
        print(json.dumps(replay(options.replay, options.codec, options.control)))
        return 0

    from report import Report

    report = Report("determinism")
    log = options.folder / "log"
    print(f"{options.rounds} rounds, {len(list_configurations())} peers, {STEPS} steps of {BATCH} each")
    live = run_live(options.rounds, log)
    report.facts["live"] = asdict(live)
    print(f"  {live.folds} folds, {live.away} absences made good later, accuracy {live.accuracy:.4f}, {live.seconds:.0f} s")
    for configuration in live.configurations:
        name = configuration["name"]
        first = live.differing.get(name)
        print(f"  {'PASS' if first is None else f'FAIL, from round {first}'}  {name}  {live.final[:16]}")
    report.judge("rounds after which all peers held one model", live.agreed, options.rounds, at_least=True)
    report.judge("rounds that all peers encoded alike", live.encoded_alike, options.rounds, at_least=True)
    report.save(options.out)

    replays: dict[str, Any] = {}
    report.facts["replays"] = replays
    here = Path(sys.executable)
    rows: list[tuple[str, Path | str, str]] = [("this build, compiled", here, "always"), ("this build, numpy", here, "never")]
    rows += [(name, build_environment(options.folder / "environments", packages), choice) for name, packages, choice in BUILDS]
    for name, python, choice in rows:
        result = run_replay(python, log, choice) if isinstance(python, Path) else {"error": python}
        replays[name] = result
        is_same = (
            "error" not in result
            and result["first round that differs"] is None
            and result["first round encoded differently"] is None
            and result["rounds"] == options.rounds
            and result["final"] == live.final
            and result["compiled"] == (choice == "always")
            and not result["torch"]
        )
        result["same"] = is_same
        print(f"  {'PASS' if is_same else 'FAIL'}  {name}: {json.dumps(result)}", flush=True)
    report.judge("builds that fold the log to the same models", sum(r["same"] for r in replays.values()), len(rows), at_least=True)

    controls = {name: run_replay(here, log, "never", name) for name in CONTROLS}
    report.facts["controls, which must differ"] = controls
    for name, result in controls.items():
        print(f"  {name}: differs from round {result.get('first round that differs')}")
    noticed = sum(result.get("first round that differs") is not None for result in controls.values())
    report.judge("controls that were noticed", noticed, len(CONTROLS), at_least=True)
    report.save(options.out)
    return 0 if all(target["met"] for target in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
