"""Inner optimizers over one flat float32 vector.

Law: element-wise arithmetic on whole vectors, so the state is a step count and at most two vectors that hash,
store and restore exactly; a step changes weights and state together.  It stays with its peer between rounds
(training.md: that learns faster than resetting it) and only its hash is published.

AdamW: Loshchilov and Hutter, arXiv 1711.05101.  SGD: heavy-ball momentum as in torch.optim.SGD.
"""

from __future__ import annotations

import hashlib
import math
import struct
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError
from p2pflock.learning.spec import Local

F32 = NDArray[np.float32]
EPSILON = np.float32(1e-8)


class Optimizer(Protocol):
    def step(self, weights: F32, gradient: F32, lr: float) -> None:
        """Changes `weights` and its own state in place; `gradient` is left as it is."""
        ...

    def state(self) -> bytes: ...

    def restore(self, state: bytes) -> None:
        """Raises InvalidMessageError when `state` is not of this optimizer and size."""
        ...


class _Base:
    name: bytes
    vectors: int

    def __init__(self, parameters: int) -> None:
        self.steps = 0
        self.moments = [np.zeros(parameters, np.float32) for _ in range(self.vectors)]
        self._scratch = np.empty(parameters, np.float32)

    def state(self) -> bytes:
        head = self.name + struct.pack("<Q", self.steps)
        return head + b"".join(moment.astype("<f4", copy=False).tobytes() for moment in self.moments)

    def restore(self, state: bytes) -> None:
        size, head = self._scratch.size, len(self.name) + 8
        if not state.startswith(self.name) or len(state) != head + 4 * size * self.vectors:
            raise InvalidMessageError("optimizer state of another kind or size")
        self.steps = struct.unpack_from("<Q", state, len(self.name))[0]
        whole = np.frombuffer(state, "<f4", offset=head).astype(np.float32)
        if not np.isfinite(whole).all():
            raise InvalidMessageError("optimizer state is not finite")
        self.moments = [whole[i * size : (i + 1) * size].copy() for i in range(self.vectors)]


class AdamW(_Base):
    name, vectors = b"adamw", 2

    def __init__(self, parameters: int, beta1: float, beta2: float, weight_decay: float) -> None:
        super().__init__(parameters)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def step(self, weights: F32, gradient: F32, lr: float) -> None:
        self.steps += 1
        mean, square = self.moments
        work = self._scratch
        # m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
        mean *= np.float32(self.beta1)
        np.multiply(gradient, np.float32(1 - self.beta1), out=work)
        mean += work
        square *= np.float32(self.beta2)
        np.multiply(gradient, gradient, out=work)
        work *= np.float32(1 - self.beta2)
        square += work
        # w -= lr wd w;  w -= lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)
        np.sqrt(square, out=work)
        work *= np.float32(1 / math.sqrt(1 - self.beta2**self.steps))
        work += EPSILON
        np.divide(mean, work, out=work)
        work *= np.float32(lr / (1 - self.beta1**self.steps))
        if self.weight_decay:
            weights *= np.float32(1 - lr * self.weight_decay)
        weights -= work


class SGD(_Base):
    name, vectors = b"sgd", 1

    def __init__(self, parameters: int, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters)
        self.momentum, self.weight_decay = momentum, weight_decay

    def step(self, weights: F32, gradient: F32, lr: float) -> None:
        self.steps += 1
        (velocity,) = self.moments
        work = self._scratch
        velocity *= np.float32(self.momentum)
        velocity += gradient
        if self.weight_decay:
            np.multiply(weights, np.float32(self.weight_decay), out=work)
            velocity += work
        np.multiply(velocity, np.float32(lr), out=work)
        weights -= work


def build_optimizer(local: Local, parameters: int) -> Optimizer:
    """The fresh optimizer that a spec's [local] section asks for."""
    if local.optimizer == "sgd":
        return SGD(parameters, float(local.momentum), float(local.weight_decay))
    return AdamW(parameters, float(local.momentum), float(local.beta2), float(local.weight_decay))


def compute_lr(local: Local, rounds: int, round_: int, step: int) -> float:
    """Learning rate of a step, counted from 0 within its round: linear warm-up, then linear decay to
    `final_lr_fraction` at the last round.

    A function of the round and not of the steps somebody has made: peers with different H, and one that
    rejoins, are in tune.  Steps beyond the spec's H go on at the rate where that ends."""
    lr = float(local.lr)
    at = (round_ - 1) * local.steps + min(step, local.steps - 1)
    if at < local.warmup_steps:
        return lr * (at + 1) / (local.warmup_steps + 1)
    progress = min(1.0, at / max(1, rounds * local.steps))
    return lr * (1.0 - progress * (1.0 - float(local.final_lr_fraction)))


def compute_state_hash(state: bytes) -> bytes:
    """32 bytes: what a header publishes of an optimizer's state."""
    return hashlib.sha256(state).digest()
