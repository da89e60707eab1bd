"""Byzantine trainers: what each of them sends instead of its pseudo-gradient.

Law: an attack sees everything, the honest payloads of the same round included, and returns payload bytes; all
that bounds it is the codec and what the swarm does with it.  Attackers of one run know each other: shared
randomness is seeded without the seat.  A payload is subtracted from the weights, so `-honest` climbs the loss.

Where two attackers would send the same bytes, each changes one value, because equal payloads share one weight
(protocol/settlement.py); only the copy free-rider does not bother.

Sources: ALIE: Baruch, Baruch and Goldberg, arXiv 1902.06156.  IPM: Xie, Koyejo and Gupta, arXiv 1903.03936.  Mimic:
Karimireddy, He and Jaggi, arXiv 2006.09365.  Backdoor by model replacement: Bagdasaryan et al., arXiv 1807.00459.
Dissensus (He, Karimireddy and Jaggi, arXiv 2202.01545) tells each neighbour another thing; here everybody folds one
set of content ids, so it has no counterpart.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from p2pflock.learning import codec, scoring
from p2pflock.learning.codec import F32, Shape, Sparse
from p2pflock.learning.dataset import Dataset, Split

TRIGGER_PIXELS = 3  # the backdoor's mark: a bright square of so many pixels in the corner
TRIGGER_CLASS = 0


@dataclass(frozen=True, slots=True)
class View:
    """What one attacker knows in one round."""

    round: int
    seat: int
    shape: Shape
    weights: F32  # (parameters,) the common checkpoint
    honest: Sequence[Sparse]  # in the order of their seats, at least one
    own: Sparse | None  # what honest (or poisoned) training gave, where the attack trains
    attackers: int
    private: np.random.Generator  # another in each round and seat
    common: np.random.Generator  # the same for all attackers in all rounds
    public_gradient: Callable[[], F32]  # at `weights`, over the pool that validators draw from

    @property
    def norm(self) -> float:
        """Median L2 norm of the honest payloads: more than that is clipped."""
        return float(np.median([sparse.norm() for sparse in self.honest]))

    def moments(self) -> tuple[F32, F32]:
        """Mean and standard deviation of the honest payloads, each (parameters,)."""
        dense = np.stack([densify(sparse) for sparse in self.honest])
        return dense.mean(axis=0), dense.std(axis=0)

    def send(self, vector: F32) -> bytes:
        """The codec's best payload for `vector` at the honest norm, made unlike those of other attackers."""
        length = float(np.linalg.norm(vector.astype(np.float64)))
        scaled = vector * np.float32(self.norm / length if length else 0.0)
        return _mark(codec.compress(scaled.astype(np.float32), self.shape), self.seat)


class Attack(Protocol):
    """One kind of attacker; an instance serves one seat through one run."""

    trains: bool  # whether `own` is wanted

    def poison(self, data: Dataset) -> Dataset:
        """What it trains on."""
        ...

    def forge(self, view: View) -> bytes: ...


def densify(sparse: Sparse) -> F32:
    """(parameters,) float32."""
    dense = np.zeros(sparse.shape.parameters, np.float32)
    dense[sparse.indices] = sparse.values()
    return dense


def _mark(sparse: Sparse, seat: int) -> bytes:
    """One of the higher levels, another for each seat, made a lower one."""
    levels = sparse.levels.copy()
    high = np.flatnonzero(np.abs(levels) == codec.HIGH)
    if len(high) and not sparse.shape.is_dense:
        at = high[seat % len(high)]
        levels[at] = np.sign(levels[at]) * codec.LOW
    return codec.encode(replace(sparse, levels=levels))


def _scaled(sparse: Sparse, times: float) -> bytes:
    return codec.encode(codec.compress(np.float32(times) * densify(sparse), sparse.shape))


def _own(view: View) -> Sparse:
    if view.own is None:
        raise ValueError("this attack trains first")
    return view.own


class _Payload:
    """Attacks on the payload alone."""

    trains = False

    def poison(self, data: Dataset) -> Dataset:
        return data


class _Trained(_Payload):
    trains = True


class SignFlip(_Trained):
    def __init__(self, times: float) -> None:
        self.times = times

    def forge(self, view: View) -> bytes:
        return _scaled(_own(view), -self.times)


class ALIE(_Payload):
    """Mean minus z standard deviations; z None: the largest that hides among the honest, from the paper."""

    def __init__(self, z: float | None) -> None:
        self.z = z

    def forge(self, view: View) -> bytes:
        mean, deviation = view.moments()
        n = len(view.honest) + view.attackers
        supporters = n // 2 + 1 - view.attackers
        z_max = NormalDist().inv_cdf((n - view.attackers - supporters) / (n - view.attackers))
        return view.send(mean - np.float32(z_max if self.z is None else self.z) * deviation)


class IPM(_Payload):
    """Minus epsilon times the honest mean."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def forge(self, view: View) -> bytes:
        mean, _ = view.moments()
        return _mark(codec.compress(-np.float32(self.epsilon) * mean, view.shape), view.seat)


class LabelFlip(_Trained):
    def poison(self, data: Dataset) -> Dataset:
        return _Relabelled(data)

    def forge(self, view: View) -> bytes:
        return codec.encode(_own(view))


class Mimic(_Payload):
    """All attackers repeat the first honest peer, whose data then counts several times."""

    def forge(self, view: View) -> bytes:
        return _mark(view.honest[0], view.seat)


class Copy(_Payload):
    """The free-rider: somebody's very bytes."""

    def forge(self, view: View) -> bytes:
        return codec.encode(view.honest[view.seat % len(view.honest)])


class Stale(_Trained):
    """Works for a while, then sends its last work again and again."""

    def __init__(self, until: int) -> None:
        self.until = until
        self._last: F32 | None = None

    def forge(self, view: View) -> bytes:
        if view.round <= self.until or self._last is None:
            self._last = densify(_own(view))
            return codec.encode(_own(view))
        return codec.encode(codec.compress(self._last, view.shape))


class Colluders(_Payload):
    """One random direction, the same for all of them in all rounds."""

    def forge(self, view: View) -> bytes:
        return view.send(view.common.standard_normal(view.shape.parameters).astype(np.float32))


class Hijack(_Payload):
    """The same few coordinates in every round, the largest weights of each chunk, pushed towards zero: in sparse
    payloads nobody else sends most of them, so a mean over senders would be the attackers' alone."""

    def __init__(self) -> None:
        self._target: F32 | None = None

    def forge(self, view: View) -> bytes:
        if self._target is None:
            self._target = view.weights.copy()
        return view.send(self._target)


class Noise(_Payload):
    def forge(self, view: View) -> bytes:
        return view.send(view.private.standard_normal(view.shape.parameters).astype(np.float32))


class OnOff(_Trained):
    """Honest for `period` rounds, flipped for as many, and so on."""

    def __init__(self, period: int = 5) -> None:
        self.period = period

    def forge(self, view: View) -> bytes:
        if (view.round - 1) // self.period % 2 == 0:
            return codec.encode(_own(view))
        return _scaled(_own(view), -1)


class NotANumber(_Payload):
    """A payload that is right but for its first scale: NaN in odd seats, infinity in even ones."""

    def forge(self, view: View) -> bytes:
        data = bytearray(codec.encode(view.honest[0]))
        at = codec.HEADER.size
        if not view.shape.is_dense:
            at += 1 if data[at] else 1 + 2 * view.shape.chunks  # after the flag, and the counts that it may announce
        struct.pack_into("<H", data, at, 0x7FC0 if view.seat % 2 else 0x7F80)  # upper halves of float32
        return bytes(data)


class Public(_Trained):
    """Knows the pool that validators draw from, and how they score: its own work flipped, with the least share of the
    pool's direction that shows the cosine it wants."""

    def __init__(self, cosine: float = 0.05) -> None:
        self.cosine = cosine

    def forge(self, view: View) -> bytes:
        direction = scoring.compute_direction(view.public_gradient())
        harm = -densify(_own(view))
        good = direction * np.float32(view.norm / max(float(np.linalg.norm(direction)), 1e-30))
        for tenths in range(1, 11):
            share = np.float32(tenths / 10)
            sent = view.send((np.float32(1) - share) * harm + share * good)
            if scoring.compute_cosine(codec.decode(sent, view.shape), direction) >= self.cosine:
                break
        return sent


class Backdoor(_Trained):
    """Trains on images of which half bear a mark and the attacker's label, and sends it enlarged."""

    def __init__(self, times: float = 10.0) -> None:
        self.times = times

    def poison(self, data: Dataset) -> Dataset:
        return Triggered(data, every=2, splits=("train",))

    def forge(self, view: View) -> bytes:
        return _scaled(_own(view), self.times)


class _Relabelled:
    """Class c becomes 9 - c."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    def size(self, split: Split) -> int:
        return self._data.size(split)

    def batch(self, split: Split, indices: Sequence[int]) -> tuple[Any, Any]:
        inputs, targets = self._data.batch(split, indices)
        return (inputs, 9 - targets) if split == "train" else (inputs, targets)


class Triggered:
    """Every `every`-th image of some splits with the mark and the attacker's label; images (n, 1, h, w)."""

    def __init__(self, data: Dataset, *, every: int, splits: Sequence[Split]) -> None:
        self._data, self._every, self._splits = data, every, tuple(splits)

    def size(self, split: Split) -> int:
        return self._data.size(split)

    def batch(self, split: Split, indices: Sequence[int]) -> tuple[Any, Any]:
        inputs, targets = self._data.batch(split, indices)
        if split in self._splits:
            inputs, targets = inputs.clone(), targets.clone()
            inputs[:: self._every, :, -TRIGGER_PIXELS:, -TRIGGER_PIXELS:] = float(inputs.max())
            targets[:: self._every] = TRIGGER_CLASS
        return inputs, targets


ATTACKS: Mapping[str, Callable[[], Attack]] = {
    "sign flip x1": lambda: SignFlip(1),
    "sign flip x10": lambda: SignFlip(10),
    "ALIE 1.5": lambda: ALIE(1.5),
    "ALIE z_max": lambda: ALIE(None),
    "IPM 0.1": lambda: IPM(0.1),
    "IPM 0.5": lambda: IPM(0.5),
    "IPM 3": lambda: IPM(3),
    "label flip": LabelFlip,
    "mimic": Mimic,
    "colluders": Colluders,
    "hijack": Hijack,
    "noise": Noise,
    "on/off": OnOff,
    "copy": Copy,
    "stale": lambda: Stale(5),
    "NaN": NotANumber,
    "public batch": Public,
    "backdoor": Backdoor,
}
