"""What a validator says of a payload, in integers.

Law: measures only; what follows from a score is settlement's business.  The public batch is drawn after the
payloads are committed (its seed contains the validator's signature), so nobody can train towards it.  A score
may differ in its last digits between machines, since gradients do: settlement takes a weighted median.

cosine: of the payload to the public batch's gradient, each value of which is replaced by its signed square root.
A payload is subtracted from the weights, so an honest one points along the gradient and has a positive cosine in
the mean; single rounds are often negative.  Late in training a few large values are most of a gradient's square;
the root lets the many others speak, which told label flips and sign flips from honest work more often
(docs/design.md, "Gate").

loss change: on held-out public samples, after minus before subtracting this payload alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from p2pflock.learning.codec import F32, Sparse
from p2pflock.ports import PayloadScore

MICRO = 1_000_000
LIMIT = 1 << 53  # bounds of loss_delta_micro on the wire

INVALID = PayloadScore(is_valid=False, cosine_micro=0, loss_delta_micro=0)


def to_micro(value: float, limit: int = LIMIT) -> int:
    """Millionths, cut to [-limit, limit]; what is not a number counts as the worst, +limit."""
    if math.isnan(value):
        return limit
    return round(max(-limit, min(limit, value * MICRO)))


def compute_cosine(payload: Sparse | F32, direction: F32) -> float:
    """In [-1, 1]; 0 where one of the two is zero.  `payload` sparse, or dense (parameters,)."""
    return _compute_cosine(payload, direction, _compute_length(direction))


def _compute_cosine(payload: Sparse | F32, direction: F32, direction_length: float) -> float:
    if isinstance(payload, Sparse):
        values, facing = payload.values().astype(np.float64), direction[payload.indices].astype(np.float64)
    else:
        values, facing = payload.astype(np.float64), direction.astype(np.float64)
    length = float(np.linalg.norm(values)) * direction_length
    return float(np.dot(values, facing)) / length if length > 0 else 0.0


def _compute_length(direction: F32) -> float:
    return float(np.linalg.norm(direction.astype(np.float64)))


def compute_direction(gradient: F32) -> F32:
    """The signed square root of each value, (parameters,)."""
    direction: F32 = np.copysign(np.sqrt(np.abs(gradient)), gradient)
    return direction


class Yardstick:
    """What all payloads of a round are measured by: made once, so that each can be scored as it arrives.

    Args:
        weights: the checkpoint, (parameters,).
        gradient: of the public batch there, (parameters,).
        loss: of weights, on the held-out samples.
    """

    def __init__(self, weights: F32, gradient: F32, loss: Callable[[F32], float]) -> None:
        self._weights = weights
        self._trial = weights.copy()  # equal to weights between two scores
        self._direction = compute_direction(gradient)
        self._length = _compute_length(self._direction)
        self._loss = loss
        self._before = loss(weights)

    def score(self, payload: Sparse | F32 | None) -> PayloadScore:
        """None stands for one that does not decode."""
        if payload is None:
            return INVALID
        cosine = _compute_cosine(payload, self._direction, self._length)
        cosine_micro = -MICRO if math.isnan(cosine) else to_micro(cosine, MICRO)
        return PayloadScore(True, cosine_micro, to_micro(self._try_out(payload) - self._before))

    def _try_out(self, payload: Sparse | F32) -> float:
        """The loss after this payload alone."""
        if not isinstance(payload, Sparse):
            return self._loss(self._weights - payload)
        self._trial[payload.indices] -= payload.values()
        try:
            return self._loss(self._trial)
        finally:
            self._trial[payload.indices] = self._weights[payload.indices]
