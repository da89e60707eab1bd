"""A coverage-guided fuzzer (atheris, libFuzzer) over the payload decoder.  `make fuzz`, FUZZ_SECONDS=600.

Law: whatever the bytes, only InvalidMessageError may leave codec.decode; what decodes encodes to the same bytes;
numpy, the compiled loops and those loops read as Python (so that coverage sees into them) give the same payload
or all refuse; what decodes also folds by the first two, to the same bits, or is refused as not finite; memory stays below a
constant and a small multiple of the message, time below what libFuzzer is told.  Anything else ends the command
with an error, and the input that did it lies in the folder it prints.

First a control: with one check taken out of the decoder the same fuzzer must find that it is gone.

    python tests/fuzz/decoder.py [--seconds N] [--folder DIR] [--out FILE]

The first byte of an input chooses shape and whether the true header stands before the rest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import atheris
import numpy as np

from p2pflock.errors import InvalidMessageError

with atheris.instrument_imports(include=["p2pflock.learning.codec"]):
    from p2pflock.learning import codec

from p2pflock.learning import compiled, fold, kernels
from p2pflock.learning.codec import Shape
from p2pflock.learning.fold import FoldRule, Weighted

SHAPES = (
    Shape(1, 1, 1),
    Shape(40, 16, 4),
    Shape(70, 64, 1),
    Shape(100, 17, 17),
    Shape(300, 128, 9),
    Shape(700, 600, 40),
    Shape(1, 16, 16, is_dense=True),
    Shape(40, 16, 16, is_dense=True),
    Shape(130, 64, 64, is_dense=True),
    Shape(1 << 20, 4096, 64),  # claims much; a message of some kilobytes cannot fill it
    Shape(1 << 20, 1 << 15, 1 << 15),
)
MAX_BYTES = 2048
MEMORY_LIMIT = 20_000, 400  # bytes, and bytes for each of the message: an entry takes 3 bits of it
CONTROL_SECONDS = 120


class Finding(Exception):
    """The decoder breaks its law."""


def read_as_python():
    """kernels.py as Python, each branch of it seen by the fuzzer."""
    names = ("pack", "unpack", "sum_squares")
    functions = {name: atheris.instrument_func(getattr(kernels, name).py_func) for name in names}
    constants = {name: getattr(kernels, name) for name in ("OK", "NOT_FINITE", "BAD_POSITION", "PADDING")}
    return SimpleNamespace(**functions, **constants)


as_python = read_as_python()
as_machine = compiled._load()
engine = as_machine
compiled._load = lambda: engine
PATHS = (("numpy", "never", None), ("compiled", "always", as_machine), ("compiled, as Python", "always", as_python))


def read(data, shape):
    """(payload or None, its parts)"""
    try:
        sparse = codec.decode(data, shape)
    except InvalidMessageError:
        return None, None
    return sparse, [getattr(sparse, name).tobytes() for name in ("counts", "scales", "indices", "levels")]


def combine(sparse):
    checkpoint = np.linspace(-1, 1, sparse.shape.parameters, dtype=np.float32)
    try:
        return fold.fold(FoldRule(), checkpoint, [Weighted(sparse, 3), Weighted(sparse, 1 << 40)]).tobytes()
    except InvalidMessageError as error:
        return str(error)


def test_one(data):
    global engine
    if not data:
        return
    shape = SHAPES[(data[0] >> 1) % len(SHAPES)]
    message = data[1:] if data[0] & 1 else shape.head + data[1:]
    results = []
    for name, choice, chosen in PATHS:
        engine = chosen
        with compiled.choose(choice):
            tracemalloc.reset_peak()
            before, _ = tracemalloc.get_traced_memory()
            sparse, parts = read(message, shape)
            peak = tracemalloc.get_traced_memory()[1] - before
            if peak > MEMORY_LIMIT[0] + MEMORY_LIMIT[1] * len(message):
                raise Finding(f"{name}: {peak} bytes of memory for {len(message)} of message")
            if sparse is None:
                results.append(None)
                continue
            if codec.encode(sparse) != message:
                raise Finding(f"{name}: decodes, but encodes to other bytes")
            results.append((parts, sparse.norm(), None if chosen is as_python else combine(sparse)))
    first, second, third = results
    if first != second or (first and first[:2]) != (third and third[:2]):
        raise Finding(f"{shape}: the paths disagree on {message.hex()}")


def write_seeds(folder):
    """Real payloads of every shape that a message can fill: noise, ties, zeros, everything."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for number, shape in enumerate(SHAPES[:-2]):
        noise = draw.standard_normal(shape.parameters).astype(np.float32)
        for kind, vector in enumerate(
            (noise, np.sign(noise), noise * (draw.random(noise.size) < 0.02), np.zeros_like(noise))
        ):
            body = codec.encode(codec.compress(vector.astype(np.float32), shape))
            (folder / f"seed-{number}-{kind}").write_bytes(bytes([number << 1]) + body[codec.HEADER.size :])
            (folder / f"whole-{number}-{kind}").write_bytes(bytes([number << 1 | 1]) + body)


def take_out_a_check():
    """The control: numpy forgets that bits after the end of a stream are zero."""

    def read_bits(data, count):
        return np.unpackbits(np.frombuffer(data, np.uint8))[:count]

    codec._read_bits = read_bits


# --- the command ----------------------------------------------------------------------------------------
STATUS = re.compile(r"#(\d+)\s.*cov: (\d+) ft: (\d+) corp: (\d+)")


def run(seconds, folder, *, is_control):
    """(exit status of the fuzzer, what it covered, seconds)"""
    corpus, findings = folder / ("control" if is_control else "corpus"), folder / "findings"
    write_seeds(corpus)
    findings.mkdir(exist_ok=True)
    command = [
        sys.executable, __file__, "--fuzz", *(["--without-a-check"] if is_control else []), "--", str(corpus),
        f"-max_total_time={seconds}", f"-max_len={MAX_BYTES}", "-timeout=10", "-rss_limit_mb=2048",
        f"-artifact_prefix={findings}/", "-use_value_profile=1", "-print_final_stats=1", "-seed=1",
    ]  # fmt: skip
    begin, covered = time.monotonic(), {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stderr:
            if found := STATUS.search(line):
                names = ("executions", "edges", "features", "inputs kept")
                covered = dict(zip(names, map(int, found.groups()), strict=True))
                if " NEW " in line or " REDUCE " in line:
                    continue
            print("  " + line.rstrip(), flush=True)
    return process.returncode, covered, time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(prog="tests/fuzz/decoder.py", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(f"control, at most {CONTROL_SECONDS} s: a decoder without one of its checks")
    status, covered, seconds = run(CONTROL_SECONDS, options.folder, is_control=True)
    if status == 0:
        print("FAIL: the fuzzer did not notice that a check is gone")
        return 1
    control = {"executions": covered.get("executions", 0), "seconds": round(seconds, 1)}
    print(f"noticed after {seconds:.0f} s; now the decoder as it is, {options.seconds} s")
    status, covered, seconds = run(options.seconds, options.folder, is_control=False)
    result = {"benchmark": "fuzz", "seconds": round(seconds, 1), **covered, "control": control}
    result["targets"] = [
        {"what": what, "measured": measured, "relation": relation, "target": target, "met": met}
        for what, measured, relation, target, met in (
            ("seconds of fuzzing the decoder", seconds, ">=", 600, seconds >= 600),
            ("inputs that broke it", int(status != 0), "<=", 0, status == 0),
        )
    ]
    print(json.dumps(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if status:
        print(f"FAIL: see above; the input lies in {options.folder / 'findings'}")
        return 1
    print("PASS: nothing found")
    return 0


def fuzz(arguments):
    if "--without-a-check" in arguments:
        take_out_a_check()
    # Once: started for every input it would itself lose memory.  What the process gains all the same, some kilobytes
    # an input, is the instrumentation's: without it the same inputs leave the resident set as it is.
    tracemalloc.start()
    atheris.Setup([sys.argv[0], *arguments[arguments.index("--") + 1 :]], test_one)
    atheris.Fuzz()


if __name__ == "__main__":
    if "--fuzz" in sys.argv:
        fuzz(sys.argv)
    sys.exit(main())
