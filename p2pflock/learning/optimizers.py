"""Inner optimizers over one flat float32 vector.

Law: the state is step counts and at most two vectors that hash, store and restore exactly; a step changes
weights and state together.  It stays with its peer between rounds (measured: that learns faster than resetting
it) and only its hash is published.  AdamW and SGD are element-wise, hence the same bits everywhere; Muon multiplies
matrices, so its bits are those of one machine, like the gradients'.

AdamW: Loshchilov and Hutter, arXiv 1711.05101.  SGD: heavy-ball momentum as in torch.optim.SGD.
Muon: Jordan, kellerjordan.github.io/posts/muon, github.com/KellerJordan/Muon; as the inner optimizer of such rounds:
MuLoCo, Therien et al., arXiv 2505.23725; the scale by which it shares AdamW's learning rate and weight decay: Liu et
al., "Muon is scalable for LLM training", arXiv 2502.16982.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError
from p2pflock.learning.checkpoint import Layout
from p2pflock.learning.spec import Local

F32 = NDArray[np.float32]
EPSILON = np.float32(1e-8)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
RMS_OF_ADAMW = 0.2


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
        return b"".join([head, *(moment.astype("<f4", copy=False).data.cast("B") for moment in self.moments)])

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


@dataclass(frozen=True, slots=True)
class Matrix:
    """A tensor in the vector, seen as (rows, columns): a convolution's filters are its rows."""

    begin: int
    rows: int
    columns: int

    @property
    def span(self) -> slice:
        return slice(self.begin, self.begin + self.rows * self.columns)


def find_matrices(layout: Layout, names: Container[str]) -> tuple[Matrix, ...]:
    """Where the named tensors of two and more dimensions lie."""
    found, begin = [], 0
    for tensor in layout.tensors:
        if len(tensor.shape) > 1 and tensor.name in names and tensor.size:
            found.append(Matrix(begin, tensor.shape[0], tensor.size // tensor.shape[0]))
        begin += tensor.size
    return tuple(found)


def orthogonalise(matrix: F32) -> F32:
    """About U V^T of a matrix U S V^T: five Newton-Schulz iterations in float32.

    The coefficients are Jordan's: they take small singular values up fast and leave all between about 0.7 and
    1.2, which does as well as 1.  Same shape as the input; zero stays zero.
    """
    a, b, c = (np.float32(value) for value in NEWTON_SCHULZ)
    is_tall = matrix.shape[0] > matrix.shape[1]
    x: F32 = matrix.T if is_tall else matrix
    x = np.multiply(x, np.float32(1 / (float(np.linalg.norm(x)) + 1e-7)), dtype=np.float32)  # largest singular value at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.T  # of the shorter side
        x = np.add(a * x, (b * square + c * (square @ square)) @ x, dtype=np.float32)
    return np.ascontiguousarray(x.T if is_tall else x)


class Muon:
    """Momentum, orthogonalised, for `matrices`; AdamW for everything between them."""

    name = b"muon"

    def __init__(
        self, parameters: int, matrices: Sequence[Matrix], momentum: float, weight_decay: float, rest: AdamW
    ) -> None:
        """`rest` is of as many parameters as the matrices leave over."""
        self.matrices = tuple(matrices)
        self.momentum, self.weight_decay = momentum, weight_decay
        self._moment = np.zeros(sum(m.rows * m.columns for m in matrices), np.float32)
        self._rest = rest
        self._gaps = _find_gaps(parameters, matrices)

    def step(self, weights: F32, gradient: F32, lr: float) -> None:
        begin = 0
        for matrix in self.matrices:
            own = gradient[matrix.span]
            moment = self._moment[begin : begin + own.size]
            begin += own.size
            # m = b m + (1 - b) g, looked ahead as Nesterov: b m + (1 - b) g once more
            moment += np.float32(1 - self.momentum) * (own - moment)
            ahead = own + np.float32(self.momentum) * (moment - own)
            update = orthogonalise(ahead.reshape(matrix.rows, matrix.columns))
            # root mean square of an update as AdamW's, about 0.2, so that one lr and weight decay serve both
            update *= np.float32(lr * RMS_OF_ADAMW * math.sqrt(max(matrix.rows, matrix.columns)))
            part = weights[matrix.span]
            if self.weight_decay:
                part *= np.float32(1 - lr * self.weight_decay)
            part -= update.reshape(-1)
        if self._gaps:
            rest = np.concatenate([weights[gap] for gap in self._gaps])
            self._rest.step(rest, np.concatenate([gradient[gap] for gap in self._gaps]), lr)
            begin = 0
            for gap in self._gaps:
                weights[gap] = rest[begin : begin + gap.stop - gap.start]
                begin += gap.stop - gap.start

    def state(self) -> bytes:
        return self.name + self._moment.astype("<f4", copy=False).tobytes() + self._rest.state()

    def restore(self, state: bytes) -> None:
        head, end = len(self.name), len(self.name) + 4 * self._moment.size
        if not state.startswith(self.name):
            raise InvalidMessageError("optimizer state of another kind or size")
        self._rest.restore(state[end:])
        moment = np.frombuffer(state[head:end], "<f4").astype(np.float32)
        if not np.isfinite(moment).all():
            raise InvalidMessageError("optimizer state is not finite")
        self._moment = moment


def _find_gaps(parameters: int, matrices: Sequence[Matrix]) -> tuple[slice, ...]:
    """What lies between matrices that are sorted and do not overlap."""
    begins = [0, *(matrix.span.stop for matrix in matrices)]
    ends = [*(matrix.begin for matrix in matrices), parameters]
    return tuple(slice(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end)


def build_optimizer(local: Local, layout: Layout, hidden: Container[str] = ()) -> Optimizer:
    """The fresh optimizer that a spec's [local] section asks for.

    Args:
        layout: of the vectors.
        hidden: names of the tensors that Muon is for (learner.Network.hidden).
    """
    parameters = layout.parameters
    if local.optimizer == "muon":
        matrices = find_matrices(layout, hidden)
        left = parameters - sum(m.rows * m.columns for m in matrices)
        decay = float(local.weight_decay)
        rest = AdamW(left, float(local.momentum), float(local.beta2), decay)
        return Muon(parameters, matrices, float(local.momentum), decay, rest)
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
