"""How long the codec and the fold take, what they allocate and how small a payload is.  `make bench-codec`.

Law: a time is a ratio to one np.copyto of the same vector, taken in the same loop right before it, since this is
what a machine's memory can do at that moment; of the ratios the median counts, and the quartiles are shown.
What misses its target is printed as missed.  One process, one thread.

Counted as memory of a fold: the checkpoint and the decoded payloads that it is given, and whatever it allocates,
its result included (tracemalloc, which sees numpy's arrays and Python's objects; and beside it, on Linux, the
growth of the resident set to its high-water mark).

    python benchmarks/codec.py [--parameters N] [--repeats N] [--out FILE] [--without-model]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from p2pflock.learning import codec, compiled
from p2pflock.learning.codec import F32, Shape
from p2pflock.learning.fold import FoldRule, Weighted, fold

CHUNK, K, K_START, PEERS = 4096, 64, 1024, 8
ENCODE_LIMIT, FOLD_LIMIT, MEMORY_LIMIT, PAYLOAD_GOAL = 15.0, 10.0, 3.0, 200.0


def draw(seed: int, size: int) -> F32:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def measure(operations: Mapping[str, Callable[[], object]], vector: F32, repeats: int) -> dict[str, Any]:
    """Per operation: milliseconds and the ratio to the np.copyto right before it; median and quartiles."""
    target = np.empty_like(vector)
    np.copyto(target, vector)
    copies: list[float] = []
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in operations}
    for _ in range(repeats):
        for name, operation in operations.items():
            begin = time.perf_counter()
            np.copyto(target, vector)
            between = time.perf_counter()
            operation()
            times[name].append((time.perf_counter() - between, between - begin))
            copies.append(between - begin)
    rows: dict[str, Any] = {"np.copyto": {"ms": 1e3 * statistics.median(copies), "runs": len(copies)}}
    for name, pairs in times.items():
        ratios = [own / copy for own, copy in pairs]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        rows[name] = {
            "ms": 1e3 * statistics.median(own for own, _ in pairs),
            "ratio": median,
            "quartiles": [low, high],
            "runs": len(pairs),
        }
    return rows


def build_operations(parameters: int, k: int) -> tuple[dict[str, Callable[[], object]], F32, list[Weighted], int]:
    """(operations, checkpoint, payloads to fold, bytes of one of them)."""
    shape = Shape(parameters, CHUNK, k)
    checkpoint, delta = draw(0, parameters), draw(1, parameters)
    feedback = draw(2, parameters) * np.float32(0.5)
    payloads = [codec.encode(codec.compress(draw(10 + i, parameters), shape)) for i in range(PEERS)]
    inputs = [Weighted(codec.decode(payload, shape), 1920) for payload in payloads]
    tight = FoldRule(norm_bound=0.1)
    operations: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(codec.compress(delta, shape)),
        "encode with error feedback": lambda: codec.compress_with_feedback(delta, feedback, 0.95, shape),
        "decode one": lambda: codec.decode(payloads[0], shape),
        f"fold of {PEERS}": lambda: fold(FoldRule(), checkpoint, inputs),
        f"fold of {PEERS}, bounded": lambda: fold(tight, checkpoint, inputs),
        f"decode and fold {PEERS}": lambda: fold(
            FoldRule(), checkpoint, [Weighted(codec.decode(payload, shape), 1920) for payload in payloads]
        ),
    }
    return operations, checkpoint, inputs, len(payloads[0])


def measure_memory(checkpoint: F32, inputs: list[Weighted]) -> dict[str, float]:
    """In multiples of the model's float32 bytes."""
    model = checkpoint.nbytes
    given = sum(
        array.nbytes
        for entry in inputs
        for array in (entry.payload.counts, entry.payload.scales, entry.payload.indices, entry.payload.levels)
    )
    tracemalloc.start()
    fold(FoldRule(), checkpoint, inputs)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    rows = {
        "checkpoint": 1.0,
        "payloads": given / model,
        "allocated": peak / model,
        "total": (model + given + peak) / model,
    }
    if (grown := _grow(lambda: fold(FoldRule(), checkpoint, inputs))) is not None:
        rows["resident growth"] = grown / model
    return rows


def _grow(operation: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grows at most; None where the kernel does not say."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        operation()
        return _status("VmHWM") - before
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(field)


def measure_model(steps: int = 6) -> dict[str, Any]:
    """A real pseudo-gradient: a byte-level GPT of 10.7 million parameters, some AdamW steps from its genesis."""
    from p2pflock.learning.learner import Learner
    from p2pflock.learning.network import TorchNetwork
    from p2pflock.learning.spec import parse_spec
    from p2pflock.ports import FoldInput

    text = (Path(codec.__file__).parent / "tasks" / "shakespeare.toml").read_text()
    for old, new in (
        ("layers = 3, heads = 4, width = 96", "layers = 6, heads = 6, width = 384"),
        ("warmup_steps = 60", "warmup_steps = 2"),
        ("\nsteps = 60", f"\nsteps = {steps}"),
        ("k = 256\nk_start = 1024\nstart_rounds = 5", f"k = {K}\nk_start = {K}\nstart_rounds = 1"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    learner = Learner(parse_spec(text), TorchNetwork(parse_spec(text)))
    seed = bytes(32)
    payloads = []
    for shard in range(2):
        training = learner.train(1, shard, 2, seed)
        while True:
            try:
                next(training)
            except StopIteration as done:
                payloads.append(done.value.payload)
                break
    parameters = learner.open().parameters
    begin = time.perf_counter()
    learner.fold(1, [FoldInput(payload, 1) for payload in payloads])
    return {
        "parameters": parameters,
        "steps": steps,
        "payload bytes": [len(payload) for payload in payloads],
        "payload ratio": 4 * parameters * len(payloads) / sum(map(len, payloads)),
        "learner.fold of 2 with model hash and CID, seconds": time.perf_counter() - begin,
    }


def judge(name: str, value: float, limit: float, *, is_least: bool = False) -> dict[str, Any]:
    is_met = value >= limit if is_least else value <= limit
    miss = 100 * abs(value / limit - 1)
    word = "met" if is_met else f"MISSED by {miss:.2f} %"
    print(f"  {name:<42} {value:8.2f}   target {'>=' if is_least else '<='} {limit:g}   {word}")
    return {"value": value, "target": limit, "is_least": is_least, "is_met": is_met}


def report(title: str, rows: Mapping[str, Any]) -> None:
    print(f"{title}: np.copyto {rows['np.copyto']['ms']:.2f} ms")
    for name, row in rows.items():
        if "ratio" in row:
            low, high = row["quartiles"]
            print(f"  {name:<28} {row['ms']:9.2f} ms  {row['ratio']:7.2f} x  ({low:.2f} to {high:.2f}, {row['runs']} runs)")


def run(parameters: int, repeats: int, *, has_model: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    has_kernels = compiled.find(parameters) is not None
    loaded = time.perf_counter() - begin
    out: dict[str, Any] = {
        "parameters": parameters,
        "chunk": CHUNK,
        "compiled": has_kernels,
        "seconds to load the compiled code": loaded,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load average": os.getloadavg()[0],
            "python": platform.python_version(),
            **{name: version(name) for name in (["numpy", "numba"] if has_kernels else ["numpy"])},
        },
    }
    print(f"{parameters:,} parameters, chunks of {CHUNK}; compiled: {has_kernels} (loaded in {loaded:.1f} s)")
    for label, k, choice, runs in (
        ("k 64, compiled", K, "by size", repeats),
        ("k 1024, compiled", K_START, "by size", max(3, repeats // 3)),
        ("k 64, numpy", K, "never", 3),
    ):
        if choice == "by size" and not has_kernels:
            continue
        with compiled.choose("never" if choice == "never" else "by size"):
            operations, checkpoint, inputs, size = build_operations(parameters, k)
            rows = measure(operations, checkpoint, runs)
            memory = measure_memory(checkpoint, inputs)
        out[label] = {"times": rows, "memory": memory, "payload bytes": size, "payload ratio": 4 * parameters / size}
        report(label, rows)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in memory.items())
        print(f"  memory of a fold, in models: {parts}\n  payload {size:,} bytes, {4 * parameters / size:.2f} x below float32")
        del operations, checkpoint, inputs
    if has_model:
        out["model"] = measure_model()
        print("a real pseudo-gradient: " + json.dumps(out["model"]))
    main_label = "k 64, compiled" if has_kernels else "k 64, numpy"
    main, times = out[main_label], out[main_label]["times"]
    print(f"targets ({main_label}):")
    out["targets"] = {
        name: judge(name, value, limit, is_least=is_least)
        for name, value, limit, is_least in (
            ("encode, copies", times["encode"]["ratio"], ENCODE_LIMIT, False),
            ("encode with error feedback, copies", times["encode with error feedback"]["ratio"], ENCODE_LIMIT, False),
            (f"fold of {PEERS}, copies", times[f"fold of {PEERS}"]["ratio"], FOLD_LIMIT, False),
            (f"fold of {PEERS}, bounded, copies", times[f"fold of {PEERS}, bounded"]["ratio"], FOLD_LIMIT, False),
            ("peak memory of a fold, models", main["memory"]["total"], MEMORY_LIMIT, False),
            ("payload, times below float32 (noise)", main["payload ratio"], PAYLOAD_GOAL, True),
            *([("payload, the same (a real model)", out["model"]["payload ratio"], PAYLOAD_GOAL, True)] if has_model else []),
        )
    }
    return out


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/codec.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--without-model", action="store_true", help="no real pseudo-gradient (no torch, no data)")
    options = parser.parse_args(arguments)
    result = run(options.parameters, options.repeats, has_model=not options.without_model)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(_short(result), indent=1) + "\n")
        print(f"written to {options.out}")
    return 0


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
