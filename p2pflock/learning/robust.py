"""Robust aggregates of dense vectors, bit for bit on any machine: trimmed mean, CenteredClip, geometric median.

Law: a function of the set of vectors (and of the start) alone; the order of the arguments does not matter, since they
are put in the order of their bytes.  Element-wise IEEE-754 in a fixed order, one correctly rounded operation at a
time; norms are correctly rounded sums (math.fsum) of exact squares; no BLAS, no library reduction, no fused
multiply-add.  What is not finite, too large or of another size is refused.  tests/vectors/robust.json pins the bits.

Where they serve: a rule needs every peer's vector, which sparse payloads give and hivemind's all-reduce does not (a
part of the vector is averaged by one peer, who sees the others' parts and nobody checks).  On sparse payloads they
lose power: honest ones are orthogonal, hence equidistant (docs/design.md, "Gate").  So they are here for comparison
and for exchanges in which everybody holds dense vectors; the network's fold does not use them.

Sources: trimmed mean: Yin et al., arXiv 1803.01498.  CenteredClip: Karimireddy, He and Jaggi, arXiv 2012.10333.
Geometric median by smoothed Weiszfeld steps: Pillutla, Kakade and Harchaoui, arXiv 1912.13445.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning.codec import F32
from p2pflock.learning.fold import MAX_INPUTS, TINY

MAX_VALUE = np.float32(2.0**40)  # squares and sums of MAX_INPUTS of them stay far from infinity
CLIP_STEPS = 3
MEDIAN_STEPS = 8
SMOOTHING = 1e-6  # of the median distance: a vector at the centre does not get infinite weight


def trimmed_mean(vectors: Sequence[F32], trim: int | None = None) -> F32:
    """Mean of each coordinate without its `trim` largest and smallest values.

    Args:
        vectors: each (parameters,) float32.
        trim: default a fifth of them, rounded up where three are left otherwise.

    Raises:
        InvalidMessageError: a vector that is not finite, too large or of another size.
        LocalProtocolError: no vector, too many, or nothing left after trimming.
    """
    stack = _stack(vectors)
    n = len(stack)
    cut = (-(-n // 5) if n >= 3 else 0) if trim is None else trim
    if not 0 <= 2 * cut < n:
        raise LocalProtocolError(f"robust: trimming {cut} at both ends of {n}")
    stack.sort(axis=0)
    total = np.zeros(stack.shape[1], np.float64)
    for row in stack[cut : n - cut]:
        total += row.astype(np.float64)
    return _round(total / float(n - 2 * cut))


def centered_clip(vectors: Sequence[F32], start: F32 | None = None) -> F32:
    """v += mean(clip(x_i - v, tau)), three times; tau is the median distance from v at each step.

    Args:
        start: v at first, say the aggregate of the round before; zero when there is none.

    Raises as `trimmed_mean`.
    """
    stack = _stack(vectors)
    centre: F32 = np.zeros(stack.shape[1], np.float32) if start is None else _check(start, stack.shape[1])
    for _ in range(CLIP_STEPS):
        offsets = [row - centre for row in stack]
        distances = [_norm(offset) for offset in offsets]
        tau = _median(distances)
        total = np.zeros(len(centre), np.float64)
        for offset, distance in zip(offsets, distances, strict=True):
            total += offset.astype(np.float64) * (tau / distance if distance > tau else 1.0)
        total /= float(len(stack))
        centre = _round(centre.astype(np.float64) + total)
    return centre


def geometric_median(vectors: Sequence[F32], start: F32 | None = None) -> F32:
    """Where the sum of distances is least, after eight smoothed Weiszfeld steps from the trimmed mean or `start`.

    Raises as `trimmed_mean`.
    """
    stack = _stack(vectors)
    centre = trimmed_mean(vectors) if start is None else _check(start, stack.shape[1])
    for _ in range(MEDIAN_STEPS):
        distances = [_norm(np.subtract(row, centre)) for row in stack]
        least = max(SMOOTHING * _median(distances), float(TINY))
        weights = [1.0 / max(distance, least) for distance in distances]
        total = np.zeros(len(centre), np.float64)
        for row, weight in zip(stack, weights, strict=True):
            total += row.astype(np.float64) * weight
        centre = _round(total / math.fsum(weights))
    return centre


RULES: Mapping[str, Callable[[Sequence[F32]], F32]] = {
    "trimmed mean": trimmed_mean,
    "CenteredClip": centered_clip,
    "geometric median": geometric_median,
}


def _stack(vectors: Sequence[F32]) -> NDArray[np.float32]:
    """(vectors, parameters), a copy in the order of their bytes."""
    if not 1 <= len(vectors) <= MAX_INPUTS:
        raise LocalProtocolError(f"robust: {len(vectors)} vectors, expected 1..{MAX_INPUTS}")
    checked: list[F32] = [_check(vector, len(vectors[0])) for vector in vectors]
    checked.sort(key=lambda vector: vector.astype("<f4", copy=False).tobytes())
    return np.stack(checked)


def _check(vector: F32, size: int) -> F32:
    """A copy in which zero has one sign and nothing is subnormal."""
    if vector.dtype != np.float32 or vector.shape != (size,) or size == 0:
        raise InvalidMessageError(f"robust: expected {size} float32, got {vector.shape} {vector.dtype}")
    if not (np.abs(vector) <= MAX_VALUE).all():  # NaN compares false
        raise InvalidMessageError("robust: a value is not finite or too large")
    return np.where(np.abs(vector) < TINY, np.float32(0), vector)


def _round(values: NDArray[np.float64]) -> F32:
    rounded = values.astype(np.float32)
    rounded[np.abs(rounded) < TINY] = 0.0
    return rounded


def _norm(vector: F32) -> float:
    """Squares of float32 are exact in float64, and fsum rounds once."""
    return math.sqrt(math.fsum(np.square(vector.astype(np.float64)).tolist()))


def _median(distances: Sequence[float]) -> float:
    """Lower median: a distance that a vector really has."""
    return sorted(distances)[(len(distances) - 1) // 2]
