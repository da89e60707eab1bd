"""The fold: a sequence of payloads and a checkpoint in, the next checkpoint out, bit for bit on any machine.

Law: the result is a function of (rule, checkpoint, sequence) alone.  Everything is element-wise IEEE-754
arithmetic in the order of the sequence, one correctly rounded operation at a time: no BLAS, no library
reduction, no fused multiply-add, no threads.  Norms are correctly rounded sums (math.fsum).  Subnormals are
cut to zero, so a processor that flushes them agrees.  The order of the sequence matters in the last bit:
callers sort by content id.  tests/vectors/fold.json pins all of it.  The numpy code is the definition; for large
models the loops of kernels.py do the same, to the bit, in a tenth of the time (compiled.py).

Rule (training.md, after SparseLoCo's sum and the floor that survived simulation)::

    c_i     = min(1, median norm / norm_i)                    clip to the median norm
    sum_x   = Σ_i  w_i * c_i * payload_i[x]                   over those that sent coordinate x
    count_x = Σ_i  w_i                                        the same ones
    u_x     = gain * sum_x / max(count_x, Σ w / floor_divisor)   one sender cannot own a coordinate
    u      *= min(1, norm_bound * median norm / norm(u))      bounded update
    next    = checkpoint - u

The median of an even number is the lower middle: a value that a payload really has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import codec, compiled
from p2pflock.learning.codec import F32

MAX_WEIGHT = 1 << 40  # times MAX_INPUTS times the largest divisor stays within 64 bits
MAX_INPUTS = 4096
BLOCK = 1 << 18  # elements folded at a time: bounds what is allocated beside the result
NOT_FINITE = "fold: the result is not finite"
OUT_OF_PLACE = "fold: a payload whose positions do not ascend within the model"
TINY = np.float32(2.0**-100)  # far above the subnormals, far below anything that trains


@dataclass(frozen=True, slots=True)
class FoldRule:
    """Parameters of the rule; see the head of the file."""

    floor_divisor: int = 4
    gain: float = 1.0
    norm_bound: float = 2.0  # in median norms; equal weights and floor_divisor 4 never reach it
    is_clipped: bool = True


@dataclass(frozen=True, slots=True)
class Weighted:
    payload: codec.Sparse
    weight: int  # in [1, 2^40]


def fold(rule: FoldRule, checkpoint: F32, inputs: Sequence[Weighted]) -> F32:
    """The next checkpoint, (parameters,) float32; an empty sequence gives a copy of `checkpoint`.

    Raises:
        LocalProtocolError: weights, lengths or count out of bounds: the caller let through what it must not.
        InvalidMessageError: the result would not be finite.
    """
    if len(inputs) > MAX_INPUTS:
        raise LocalProtocolError(f"fold: {len(inputs)} payloads, at most {MAX_INPUTS}")
    if not inputs:
        return checkpoint.copy()
    for entry in inputs:
        if not 1 <= entry.weight <= MAX_WEIGHT:
            raise LocalProtocolError(f"fold: weight {entry.weight}")
        if entry.payload.shape.parameters != checkpoint.size:
            raise LocalProtocolError("fold: a payload of another model")
    norms = [entry.payload.norm() for entry in inputs]
    median = compute_median_norm(norms)
    clips = [median / norm if rule.is_clipped and norm > median else 1.0 for norm in norms]
    parts = [_Part(entry, clip) for entry, clip in zip(inputs, clips, strict=True)]
    bound = rule.norm_bound * median
    if kernels := compiled.find(checkpoint.size):
        return _fold_compiled(rule, checkpoint, parts, bound, kernels)
    return _fold(rule, checkpoint, parts, bound)


class _Part:
    """A payload and its coefficient of each chunk, (chunks,) float32."""

    def __init__(self, entry: Weighted, clip: float) -> None:
        self.sparse, self.weight = entry.payload, entry.weight
        # float64 scale * clip * weight, rounded to float32 once per chunk: weights beyond 2^24 stay exact enough.
        scales = self.sparse.scales.astype(np.float64)
        self.coefficients = (scales * clip * float(self.weight)).astype(np.float32)
        self.coefficients[np.abs(self.coefficients) < TINY] = 0.0
        begins = np.arange(0, self.sparse.shape.parameters + BLOCK, BLOCK)
        self.ends = np.searchsorted(self.sparse.indices, begins).tolist()  # entries before each block

    def block(self, number: int) -> slice:
        """Its entries that lie in a block."""
        return slice(self.ends[number], self.ends[number + 1])


def _blocks(size: int) -> Iterator[tuple[int, slice]]:
    """(number, elements of it): what is added up at a time stays in a processor's cache, and scratch is small."""
    for number, begin in enumerate(range(0, size, BLOCK)):
        yield number, slice(begin, min(begin + BLOCK, size))


def _fold(rule: FoldRule, checkpoint: F32, parts: Sequence[_Part], bound: float) -> F32:
    """The definition, in numpy."""
    weights = sum(part.weight for part in parts)
    result = np.empty_like(checkpoint)  # the update until it is subtracted
    for number, block in _blocks(checkpoint.size):
        total = np.zeros(block.stop - block.start, np.float32)
        count = np.zeros(block.stop - block.start, np.int64)
        for part in parts:
            _add(total, count, part, number, block.start)
        touched = np.flatnonzero(count)
        total[touched] = _divide(rule, total[touched], count[touched], weights)  # the others stay zero
        result[block] = total
    _bound(result, bound)
    for _, block in _blocks(checkpoint.size):
        next_ = checkpoint[block] - result[block]
        next_[np.abs(next_) < TINY] = 0.0
        if not np.isfinite(next_).all():
            raise InvalidMessageError(NOT_FINITE)
        result[block] = next_
    return result


def _add(total: F32, count: NDArray[np.int64], part: _Part, number: int, begin: int) -> None:
    own = part.block(number)
    indices = part.sparse.indices[own]
    coefficients = part.coefficients[indices // part.sparse.shape.chunk]
    indices = indices - begin  # distinct within a payload
    total[indices] += part.sparse.levels[own].astype(np.float32) * coefficients
    count[indices] += part.weight


def _divide(rule: FoldRule, total: F32, count: NDArray[np.int64], weights: int) -> F32:
    # max(count, weights / divisor) over a common factor, so that the comparison is exact.
    denominator = np.maximum(count * rule.floor_divisor, weights).astype(np.float64)
    update: F32 = (total.astype(np.float64) * float(rule.floor_divisor) / denominator).astype(np.float32)
    update *= np.float32(rule.gain)
    update[np.abs(update) < TINY] = 0.0
    return update


def _bound(update: F32, bound: float) -> None:
    squares = (
        np.square(update[block][update[block] != 0].astype(np.float64)).tolist()
        for _, block in _blocks(update.size)
    )
    factor = _factor(math.fsum(itertools.chain.from_iterable(squares)), bound)
    if factor is None:
        return
    for _, block in _blocks(update.size):
        update[block] *= factor
        update[block][np.abs(update[block]) < TINY] = 0.0


def _factor(squares: float, bound: float) -> np.float32 | None:
    """What an update of this sum of squares is multiplied by, if by anything."""
    norm = math.sqrt(squares)
    return np.float32(bound / norm) if norm > bound else None


def _fold_compiled(
    rule: FoldRule, checkpoint: F32, parts: Sequence[_Part], bound: float, kernels: ModuleType
) -> F32:
    result = np.zeros(checkpoint.size, np.float32)  # the update, until it is subtracted
    squares = np.zeros((2, 256), np.int64)
    for part in parts:
        codec.check_lengths(part.sparse)
        if part.ends[0] != 0 or part.ends[-1] != len(part.sparse.indices):
            raise LocalProtocolError(OUT_OF_PLACE)
    chunks = np.array([part.sparse.shape.chunk for part in parts])
    sizes = [part.sparse.shape.chunks for part in parts]
    rows = np.cumsum([0, *sizes[:-1]])
    # What an entry adds, by chunk and level: so no product meets a sum.
    highest = codec.LEVEL_LIMIT if any(part.sparse.shape.is_dense for part in parts) else codec.HIGH
    levels = np.arange(-highest, highest + 1, dtype=np.float32)
    terms = np.concatenate([np.outer(part.coefficients, levels) for part in parts])
    part_weights = np.array([part.weight for part in parts])
    for number, block in _blocks(checkpoint.size):
        indices = [part.sparse.indices[part.block(number)] for part in parts]
        status = kernels.combine(
            result[block],
            block.start,
            np.concatenate(indices),
            np.concatenate([part.sparse.levels[part.block(number)] for part in parts]),
            np.cumsum([0, *map(len, indices)]),
            chunks,
            rows,
            part_weights,
            terms,
            int(part_weights.sum()),
            rule.floor_divisor,
            np.float32(rule.gain),
            TINY,
            squares,
        )
        if status == kernels.BAD_POSITION:
            raise LocalProtocolError(OUT_OF_PLACE)
        if status != kernels.OK:
            raise InvalidMessageError(NOT_FINITE)
    factor = _factor(_sum_squares(squares), bound)
    factor = np.float32(1) if factor is None else factor
    for _, block in _blocks(checkpoint.size):
        if kernels.subtract(checkpoint[block], result[block], factor, TINY) != kernels.OK:
            raise InvalidMessageError(NOT_FINITE)
    return result


def _sum_squares(squares: NDArray[np.int64]) -> float:
    """The float nearest to the exact sum; Python's integers have no end, and `float` of one is rounded right."""
    whole = 0
    for exponent, (low, high) in enumerate(squares.T.tolist()):
        whole += (low + (high << 24)) << (2 * exponent)
    return math.ldexp(float(whole), -2 * (127 + 23))


def compute_median_norm(norms: Sequence[float]) -> float:
    """Lower median of the positive norms; 0 when there is none.  Empty payloads must not clip the others."""
    positive = sorted(norm for norm in norms if norm > 0)
    return positive[(len(positive) - 1) // 2] if positive else 0.0
