"""The fold: a sequence of payloads and a checkpoint in, the next checkpoint out, bit for bit on any machine.

Law: the result is a function of (rule, checkpoint, sequence) alone.  Everything is element-wise IEEE-754
arithmetic in the order of the sequence, one correctly rounded operation at a time: no BLAS, no library
reduction, no fused multiply-add, no threads.  Norms are correctly rounded sums (math.fsum).  Subnormals are
cut to zero, so a processor that flushes them agrees.  The order of the sequence matters in the last bit:
callers sort by content id.  tests/vectors/fold.json pins all of it.

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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import codec
from p2pflock.learning.codec import F32

MAX_WEIGHT = 1 << 40  # times MAX_INPUTS times the largest divisor stays within 64 bits
MAX_INPUTS = 4096
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
    norms = [entry.payload.norm() for entry in inputs]
    median = compute_median_norm(norms)
    total = np.zeros(checkpoint.shape, np.float32)
    count = np.zeros(checkpoint.shape, np.int64)
    for entry, norm in zip(inputs, norms, strict=True):
        if not 1 <= entry.weight <= MAX_WEIGHT:
            raise LocalProtocolError(f"fold: weight {entry.weight}")
        if entry.payload.shape.parameters != checkpoint.size:
            raise LocalProtocolError("fold: a payload of another model")
        clip = median / norm if rule.is_clipped and norm > median else 1.0
        _add(total, count, entry, clip)
    weights = sum(entry.weight for entry in inputs)
    update = _divide(rule, total, count, weights)
    _bound(update, rule.norm_bound * median)
    result = checkpoint - update
    result[np.abs(result) < TINY] = 0.0
    if not np.isfinite(result).all():
        raise InvalidMessageError("fold: the result is not finite")
    return result


def compute_median_norm(norms: Sequence[float]) -> float:
    """Lower median of the positive norms; 0 when there is none.  Empty payloads must not clip the others."""
    positive = sorted(norm for norm in norms if norm > 0)
    return positive[(len(positive) - 1) // 2] if positive else 0.0


def _add(total: F32, count: NDArray[np.int64], entry: Weighted, clip: float) -> None:
    sparse = entry.payload
    # float64 scale * clip * weight, rounded to float32 once per chunk: weights beyond 2^24 stay exact enough.
    coefficients = (sparse.scales.astype(np.float64) * clip * float(entry.weight)).astype(np.float32)
    coefficients[np.abs(coefficients) < TINY] = 0.0
    terms = sparse.levels.astype(np.float32) * np.repeat(coefficients, sparse.counts)
    total[sparse.indices] += terms  # indices are distinct within a payload
    count[sparse.indices] += entry.weight


def _divide(rule: FoldRule, total: F32, count: NDArray[np.int64], weights: int) -> F32:
    # max(count, weights / divisor) over a common factor, so that the comparison is exact.
    denominator = np.maximum(count * rule.floor_divisor, weights).astype(np.float64)
    update: F32 = (total.astype(np.float64) * float(rule.floor_divisor) / denominator).astype(np.float32)
    update *= np.float32(rule.gain)
    update[np.abs(update) < TINY] = 0.0
    return update


def _bound(update: F32, bound: float) -> None:
    touched = update[update != 0].astype(np.float64)
    norm = math.sqrt(math.fsum((touched * touched).tolist()))
    if norm > bound:
        update *= np.float32(bound / norm)
        update[np.abs(update) < TINY] = 0.0
