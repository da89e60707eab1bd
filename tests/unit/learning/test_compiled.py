"""The compiled loops give the bits of the numpy code, or are not used."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

from p2pflock.errors import LocalProtocolError
from p2pflock.learning import codec, compiled, kernels
from p2pflock.learning.codec import Shape
from p2pflock.learning.fold import FoldRule, Weighted, fold
from p2pflock.learning.kernels import OPTIONS

VECTORS = Path(__file__).parents[2] / "vectors"
CODEC = json.loads((VECTORS / "codec.json").read_text())
FOLD = json.loads((VECTORS / "fold.json").read_text())
WITH_FLOATS = ("_judge", "pick", "combine", "subtract")


def floats(text):
    return np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float32)


def test_they_are_used_for_large_models_alone():
    assert compiled.find(compiled.FROM_PARAMETERS) is kernels
    assert compiled.find(compiled.FROM_PARAMETERS - 1) is None
    with compiled.choose("always"):
        assert compiled.find(1) is kernels
    with compiled.choose("never"):
        assert compiled.find(1 << 30) is None
    assert compiled.find(1) is None


def test_a_compiler_that_computes_something_else_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "KNOWN_ANSWER", "0" * 64)
    assert compiled._load.__wrapped__() is None
    assert "something else" in caplog.text


def test_the_known_answer_notices_a_single_rounding(monkeypatch):
    """What a fused multiply-add would do to one step: u * gain rounded together with what follows."""

    class Fused:
        def __getattr__(self, name):
            return getattr(kernels, name)

        @staticmethod
        def subtract(checkpoint, update, factor, tiny):
            product = update.astype(np.float64) * np.float64(factor)
            update[:] = (checkpoint.astype(np.float64) - product).astype(np.float32)

    assert compiled.compute_answer(kernels) == compiled.KNOWN_ANSWER
    assert compiled.compute_answer(Fused()) != compiled.KNOWN_ANSWER


def test_without_numba_numpy_does_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled._load.__wrapped__() is None


def test_numbas_own_switch_turns_them_off(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert compiled._load.__wrapped__() is None


def test_nowhere_to_keep_what_was_compiled(monkeypatch):
    real = numba.njit

    def njit(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*arguments, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert kernels._compile(numba.int64, numba.int64)(lambda x: x + 1)(1) == 2


# --- one rounding per operation -------------------------------------------------------------------------
def test_multiply_and_add_round_twice():
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24 if the product is not rounded, and 0 if it is."""
    compute = numba.njit(numba.float32(*[numba.float32] * 3), **OPTIONS)(lambda a, b, c: a * b + c)
    a, c = np.float32(1 + 2.0**-12), np.float32(-1 - 2.0**-11)
    assert compute(a, a, c) == np.float32(a * a) + c == 0


def llvm(function, signature, **options):
    fresh = numba.njit(signature, **{**OPTIONS, **options})(function)  # one from the cache has no text
    return "\n".join(fresh.inspect_llvm().values()), "\n".join(fresh.inspect_asm().values())


def may_fuse(text):
    """LLVM fuses only where it is allowed to: by a flag on the operation, or the intrinsic."""
    lines = [line for line in text.splitlines() if any(f" {op} " in line for op in ("fmul", "fadd", "fsub", "fdiv"))]
    flags = ("fast", "contract", "reassoc", "arcp", "afn")
    return [line for line in lines if any(f" {flag} " in line for flag in flags)] + [
        line for line in text.splitlines() if "llvm.fma" in line or "llvm.fmuladd" in line
    ]


def test_the_look_for_fusing_finds_it():
    signature = numba.float32(*[numba.float32] * 3)
    assert may_fuse(llvm(lambda a, b, c: a * b + c, signature, fastmath=True)[0])
    assert not may_fuse(llvm(lambda a, b, c: a * b + c, signature)[0])


@pytest.mark.parametrize("name", WITH_FLOATS)
def test_no_kernel_may_be_fused(name):
    kernel = getattr(kernels, name)
    text, machine = llvm(kernel.py_func, kernel.nopython_signatures[0])
    assert " fsub " in text or " fadd " in text or name == "pick"
    assert not may_fuse(text)
    fused = ("vfmadd", "vfmsub", "vfnmadd", "fmadd", "fmla", "fmls", "fmsub", "fnmsub")
    assert not [line for line in machine.splitlines() if line.strip().startswith(fused)]


# --- the same bytes -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CODEC)
def test_codec_vectors(name):
    case = CODEC[name]
    values = floats(case["vector"])
    shape = Shape(len(values), case["chunk"], case["k"], case.get("is_dense", False))
    with compiled.choose("always"):
        assert codec.encode(codec.compress(values, shape)).hex() == case["payload"]
        assert codec.encode(codec.decode(bytes.fromhex(case["payload"]), shape)).hex() == case["payload"]


@pytest.mark.parametrize("name", FOLD)
def test_fold_vectors(name):
    case = FOLD[name]
    checkpoint = floats(case["checkpoint"])
    shape = Shape(len(checkpoint), case["chunk"], case["k"], case.get("is_dense", False))
    with compiled.choose("always"):
        inputs = [
            Weighted(codec.decode(bytes.fromhex(line["payload"]), shape), line["weight"])
            for line in case["inputs"]
        ]
        assert fold(FoldRule(**case["rule"]), checkpoint, inputs).astype("<f4").tobytes().hex() == case["result"]


def draw(seed, size):
    """Heavy tails, some exact ties, some zeros: like a pseudo-gradient over tensors of unlike scale."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(size) * np.exp(3 * rng.standard_normal(-(-size // 1000)).repeat(1000)[:size])).astype(
        np.float32
    )
    values[rng.random(size) < 0.05] = 0
    values[rng.random(size) < 0.05] = np.float32(2.5)
    return values


@pytest.mark.parametrize(
    ("size", "chunk", "k"),
    [
        (300_017, 4096, 64),  # the shape that ships; several blocks of the fold and a short last chunk
        (300_017, 4096, 1024),  # the start
        (262_145, 4096, 4096),  # everything is sent; a last chunk of one
        (140_000, 1 << 15, 100),  # chunks larger than what the fold adds up at a time
        (20_000, 37, 5),  # that do not fit into it
        (20_000, 4096, "dense"),
    ],
)
def test_large_vectors(size, chunk, k):
    shape = Shape(size, chunk, chunk, is_dense=True) if k == "dense" else Shape(size, chunk, k)
    checkpoint, *vectors = (draw(seed, size) for seed in range(5))
    results = []
    for choice in ("always", "never"):
        with compiled.choose(choice):
            pairs = [codec.compress_with_feedback(vector, checkpoint, 0.95, shape) for vector in vectors]
            decoded = [codec.decode(payload, shape) for payload, _ in pairs]
            inputs = [Weighted(sparse, 1 + 1000 * i) for i, sparse in enumerate(decoded)]
            folds = [
                fold(rule, checkpoint, inputs)
                for rule in (FoldRule(), FoldRule(norm_bound=0.3, gain=1.3), FoldRule(is_clipped=False, norm_bound=0))
            ]
            results.append(
                [
                    *(payload for payload, _ in pairs),
                    *(feedback.tobytes() for _, feedback in pairs),
                    *(sparse.norm() for sparse in decoded),
                    *(result.tobytes() for result in folds),
                ]
            )
    assert results[0] == results[1]


def test_payloads_cut_into_unlike_chunks_fold_together():
    checkpoint = draw(0, 9000)
    results = []
    for choice in ("always", "never"):
        with compiled.choose(choice):
            inputs = [
                Weighted(codec.compress(draw(seed, 9000), Shape(9000, chunk, 7)), seed)
                for seed, chunk in ((1, 100), (2, 4096), (3, 8192), (4, 9000))
            ]
            inputs.append(Weighted(codec.compress(draw(5, 9000), Shape(9000, 500, 500, is_dense=True)), 5))
            results.append(fold(FoldRule(), checkpoint, inputs).tobytes())
    assert results[0] == results[1]


def test_parts_that_do_not_fit_are_refused_before_they_are_trusted():
    shape = Shape(500, 128, 9)
    good = codec.compress(draw(1, 500), shape)
    wrong = [
        codec.Sparse(shape, good.counts + 1, good.scales, good.indices, good.levels),
        codec.Sparse(shape, good.counts, good.scales, good.indices[:-1], good.levels),
        codec.Sparse(shape, good.counts, good.scales, good.indices[::-1].copy(), good.levels),
        codec.Sparse(shape, good.counts, good.scales, good.indices + 500, good.levels),
        codec.Sparse(shape, good.counts, good.scales, good.indices - 500, good.levels),
    ]
    loud = codec.Sparse(shape, good.counts, good.scales, good.indices, good.levels * np.int8(2))
    with compiled.choose("always"):
        for sparse in wrong:
            with pytest.raises(LocalProtocolError):
                codec.encode(sparse)
            with pytest.raises(LocalProtocolError):
                fold(FoldRule(), draw(0, 500), [Weighted(sparse, 1)])
        with pytest.raises(LocalProtocolError):
            fold(FoldRule(), draw(0, 500), [Weighted(loud, 1)])
