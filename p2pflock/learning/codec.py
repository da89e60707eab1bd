"""The payload codec: a pseudo-gradient in, some hundredths of its bytes out.

Law: one compressed array has one byte string, on every machine, and every other byte string is refused with
InvalidMessageError before it can allocate more than a small multiple of its own length.  This file says what
a payload means; how payloads are added up is fold.py's business.

Method (SparseLoCo, arXiv 2508.15706, after Deep Gradient Compression's error feedback): the vector is cut
into chunks; of each chunk the `k` largest magnitudes are sent, as a sign, one of two integer levels (2 or 3)
and a float32 scale per chunk; what was not sent stays in the error feedback.  All tensors lie in one vector
in the order of their names, so small tensors share chunks instead of paying for their own.

Layout, little endian, bit streams most significant bit first, each padded with zero bits to a whole byte::

    magic "PFK1" | parameters u32 | chunk u32 | k u32
    counts      u16 per chunk      entries sent of it, at most its share of k
    scales      f32 per chunk with entries
    unary       quotient of each index gap, in ones, ended by a zero        (Rice coding; the parameter follows
    remainders  low bits of each index gap                                   from chunk length and count)
    values      2 bits per entry: sign (1 is negative), level (1 is three)

Ties between equal magnitudes go to the lower index.  At least one entry of a chunk has the lower level, so no
scale can be traded against a level.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError

MAGIC = b"PFK1"
HEADER = struct.Struct("<4sIII")
MAX_CHUNK = 1 << 15  # counts travel as u16
MAX_PARAMETERS = 1 << 30
LOW, HIGH = 2, 3  # levels; about 0.8 and 1.2 times the mean magnitude of what is sent
# Scales outside this range are worth nothing or wreck a model; inside it the fold never meets a subnormal.
MIN_SCALE, MAX_SCALE = 2.0**-60, 2.0**20

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What both ends know of a payload: `parameters` floats in chunks of `chunk`, at most `k` sent of each."""

    parameters: int
    chunk: int
    k: int

    def __post_init__(self) -> None:
        if not 1 <= self.parameters <= MAX_PARAMETERS:
            raise LocalProtocolError(f"codec: {self.parameters} parameters")
        if not 1 <= self.k <= self.chunk <= MAX_CHUNK:
            raise LocalProtocolError(f"codec: k {self.k} of chunk {self.chunk}")

    @property
    def chunks(self) -> int:
        return -(-self.parameters // self.chunk)

    def lengths(self) -> I64:
        """Elements of each chunk, shape (chunks,); only the last may be shorter."""
        lengths = np.full(self.chunks, self.chunk, np.int64)
        lengths[-1] = self.parameters - (self.chunks - 1) * self.chunk
        return lengths

    def shares(self) -> I64:
        """Most entries of each chunk, shape (chunks,): k, or the same fraction of a shorter last chunk."""
        return -(-self.lengths() * self.k // self.chunk)

    def max_bytes(self) -> int:
        """No payload of this shape is longer."""
        entries = int(self.shares().sum())
        # A gap costs its quotient, one stop bit and its remainder: at most 16 bits a entry beyond the sum of
        # quotients, which is at most the sum of the chunk lengths.
        return HEADER.size + 6 * self.chunks + (self.parameters + 18 * entries) // 8 + 3


@dataclass(frozen=True, slots=True)
class Sparse:
    """A decoded payload.  Entry j is the value levels[j] * scales[chunk of indices[j]] at indices[j]."""

    shape: Shape
    counts: I64  # (chunks,) entries per chunk
    scales: F32  # (chunks,) zero where a chunk has no entry
    indices: I64  # (entries,) ascending positions in the vector
    levels: NDArray[np.int8]  # (entries,) one of -3, -2, 2, 3

    def values(self) -> F32:
        """(entries,) the values at `indices`; int times float32 is one rounding, the same everywhere."""
        return self.levels.astype(np.float32) * np.repeat(self.scales, self.counts)

    def norm(self) -> float:
        """L2 norm.  Integer sums per chunk, then a correctly rounded sum of correctly rounded products."""
        ends = np.cumsum(self.counts)
        running = np.concatenate(([0], np.cumsum(self.levels.astype(np.int64) ** 2)))
        squares = (running[ends] - running[ends - self.counts]).tolist()
        return math.sqrt(
            math.fsum(
                square * (scale * scale) for square, scale in zip(squares, self.scales.tolist(), strict=True)
            )
        )


# --- compress -------------------------------------------------------------------------------------------
def compress(vector: F32, shape: Shape) -> Sparse:
    """The top k of each chunk of `vector` (parameters,), quantised.  Raises LocalProtocolError on NaN or Inf."""
    if vector.shape != (shape.parameters,) or vector.dtype != np.float32:
        raise LocalProtocolError(f"codec: expected {shape.parameters} float32, got {vector.shape} {vector.dtype}")
    if not np.isfinite(vector).all():
        raise LocalProtocolError("codec: the pseudo-gradient is not finite", "lower the learning rate")
    magnitudes = np.abs(vector)
    picked, counts, scales = [], [], []
    for number, share in enumerate(shape.shares().tolist()):
        begin = number * shape.chunk
        part = magnitudes[begin : begin + shape.chunk]
        chosen = _top(part, share)
        scale = _scale(part[chosen])
        if scale == 0.0:
            chosen = chosen[:0]
        picked.append(chosen + begin)
        counts.append(len(chosen))
        scales.append(scale)
    indices = np.concatenate(picked)
    counted = np.array(counts, np.int64)
    chosen_values = magnitudes[indices]
    is_high = chosen_values.astype(np.float64) > np.repeat(_means(chosen_values, counted), counted)
    levels = np.where(is_high, HIGH, LOW).astype(np.int8)
    levels[vector[indices] < 0] *= -1
    return Sparse(shape, counted, np.array(scales, np.float32), indices, levels)


def _top(magnitudes: F32, k: int) -> I64:
    """Ascending positions of the k largest non-zero magnitudes; of equal ones the first."""
    if k < len(magnitudes):
        threshold = np.partition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k]
        above = np.flatnonzero(magnitudes > threshold)
        equal = np.flatnonzero(magnitudes == threshold)[: k - len(above)]
        chosen = np.sort(np.concatenate((above, equal)))
    else:
        chosen = np.arange(len(magnitudes))
    return chosen[magnitudes[chosen] > 0]


def _mean(magnitudes: F32) -> float:
    return math.fsum(magnitudes.tolist()) / len(magnitudes)


def _means(magnitudes: F32, counts: I64) -> NDArray[np.float64]:
    """Mean magnitude per chunk, shape (chunks,)."""
    parts = np.split(magnitudes, np.cumsum(counts)[:-1])
    return np.array([_mean(part) if len(part) else 0.0 for part in parts])


def _scale(magnitudes: F32) -> float:
    """The least-squares scale for the levels 2 below or at the mean and 3 above; 0 sends nothing."""
    if not len(magnitudes):
        return 0.0
    mean = _mean(magnitudes)
    low = [value for value in magnitudes.tolist() if value <= mean]
    high = [value for value in magnitudes.tolist() if value > mean]
    scale = (LOW * math.fsum(low) + HIGH * math.fsum(high)) / (LOW * LOW * len(low) + HIGH * HIGH * len(high))
    return float(np.float32(min(scale, MAX_SCALE))) if scale >= MIN_SCALE else 0.0


# --- bytes ----------------------------------------------------------------------------------------------
def _rice_parameters(lengths: I64, counts: I64) -> I64:
    """Low bits per gap for each chunk: about log2(0.7 * mean gap), in integers so that everyone agrees."""
    mean_gaps = lengths // np.maximum(counts, 1)
    return np.array([max(0, int(gap).bit_length() - 2) for gap in mean_gaps.tolist()], np.int64)


def encode(sparse: Sparse) -> bytes:
    """The one byte string of `sparse`."""
    shape, counts = sparse.shape, sparse.counts
    widths = np.repeat(_rice_parameters(shape.lengths(), counts), counts)
    gaps = np.diff(sparse.indices, prepend=-1) - 1
    firsts = np.cumsum(counts)[counts > 0] - counts[counts > 0]
    gaps[firsts] = sparse.indices[firsts] % shape.chunk
    quotients = gaps >> widths

    ends = np.cumsum(quotients + 1)
    unary = np.ones(int(ends[-1]) if len(ends) else 0, np.uint8)
    unary[ends - 1] = 0

    remainders = np.zeros(int(widths.sum()), np.uint8)
    offsets = np.cumsum(widths) - widths
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        remainders[offsets[has] + bit] = (gaps[has] >> (widths[has] - 1 - bit)) & 1

    values = np.empty((len(gaps), 2), np.uint8)
    values[:, 0] = sparse.levels < 0
    values[:, 1] = np.abs(sparse.levels) == HIGH
    return b"".join(
        (
            HEADER.pack(MAGIC, shape.parameters, shape.chunk, shape.k),
            counts.astype("<u2").tobytes(),
            sparse.scales[counts > 0].astype("<f4").tobytes(),
            np.packbits(unary).tobytes(),
            np.packbits(remainders).tobytes(),
            np.packbits(values.reshape(-1)).tobytes(),
        )
    )


def decode(data: bytes, shape: Shape) -> Sparse:
    """The inverse of `encode`.

    Raises:
        InvalidMessageError: `data` is not what `encode` writes for an array of this shape.
    """
    if not HEADER.size <= len(data) <= shape.max_bytes():
        raise InvalidMessageError(f"payload: {len(data)} bytes")
    if HEADER.unpack_from(data) != (MAGIC, shape.parameters, shape.chunk, shape.k):
        raise InvalidMessageError("payload: another format, model or density")
    reader = _Reader(data, HEADER.size)
    lengths = shape.lengths()
    counts = np.frombuffer(reader.take(2 * shape.chunks), "<u2").astype(np.int64)
    if (counts > shape.shares()).any():
        raise InvalidMessageError("payload: more entries than its share")
    entries = int(counts.sum())
    if 3 * entries > 8 * len(data):  # before anything is allocated per entry
        raise InvalidMessageError("payload: cut short")
    scales = np.zeros(shape.chunks, np.float32)
    filled = counts > 0
    scales[filled] = np.frombuffer(reader.take(4 * int(filled.sum())), "<f4")
    # NaN compares false on both sides.
    if not ((scales[filled] >= MIN_SCALE) & (scales[filled] <= MAX_SCALE)).all():
        raise InvalidMessageError("payload: a scale is not finite or out of range")

    widths = np.repeat(_rice_parameters(lengths, counts), counts)
    remainder_bits = int(widths.sum())
    tail = -(-remainder_bits // 8) + -(-2 * entries // 8)
    quotients = _read_unary(reader.take(len(data) - reader.at - tail), entries)
    bits = _read_bits(reader.take(-(-remainder_bits // 8)), remainder_bits)
    gaps = quotients
    offsets = np.cumsum(widths) - widths
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        gaps[has] = (gaps[has] << 1) | bits[offsets[has] + bit]
    indices = _positions(gaps, counts, lengths, shape.chunk)

    codes = _read_bits(reader.take(-(-2 * entries // 8)), 2 * entries).reshape(entries, 2).astype(np.int8)
    levels: NDArray[np.int8] = (codes[:, 1] + np.int8(LOW)) * (1 - 2 * codes[:, 0])
    lows = np.concatenate(([0], np.cumsum(codes[:, 1] == 0)))
    ends = np.cumsum(counts)
    if (lows[ends][filled] == lows[ends - counts][filled]).any():
        raise InvalidMessageError("payload: a chunk without the lower level")
    return Sparse(shape, counts, scales, indices, levels)


class _Reader:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise InvalidMessageError("payload: cut short")
        self.at += count
        return self.data[self.at - count : self.at]


def _read_bits(data: bytes, count: int) -> NDArray[np.uint8]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if bits[count:].any():
        raise InvalidMessageError("payload: padding is not zero")
    return bits[:count]


def _read_unary(data: bytes, entries: int) -> I64:
    """Lengths of `entries` runs of ones, (entries,); the stream must end in the byte of the last stop bit."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    if entries == 0:
        if len(data):
            raise InvalidMessageError("payload: bytes left over")
        return np.zeros(0, np.int64)
    stops = np.flatnonzero(bits == 0)
    if len(stops) < entries or stops[entries - 1] // 8 != len(data) - 1:
        raise InvalidMessageError("payload: index stream has the wrong length")
    if bits[stops[entries - 1] + 1 :].any():
        raise InvalidMessageError("payload: padding is not zero")
    return np.diff(stops[:entries], prepend=-1) - 1


def _positions(gaps: I64, counts: I64, lengths: I64, chunk: int) -> I64:
    """Positions in the vector; refuses any beyond the end of its chunk."""
    running = np.cumsum(gaps + 1)  # gaps are below 8 * len(data) << 15: no overflow
    begins = np.concatenate(([0], running))[np.cumsum(counts) - counts]
    within = running - np.repeat(begins, counts) - 1
    if (within >= np.repeat(lengths, counts)).any():
        raise InvalidMessageError("payload: an index beyond its chunk")
    positions: I64 = within + np.repeat(np.arange(len(counts)) * chunk, counts)
    return positions


# --- error feedback -------------------------------------------------------------------------------------
def compress_with_feedback(delta: F32, feedback: F32, beta: float, shape: Shape) -> tuple[bytes, F32]:
    """One round of error feedback: e = beta * e + delta; send Q(top k of e); e -= what was sent.

    Returns the payload and the new feedback, (parameters,); neither argument is changed.
    """
    error: F32 = np.float32(beta) * feedback + delta
    sparse = compress(error, shape)
    error[sparse.indices] -= sparse.values()
    return encode(sparse), error
