"""The payload codec: a pseudo-gradient in, some hundredths of its bytes out.

Law: one compressed array has one byte string, on every machine, and every other byte string is refused with
InvalidMessageError before it can allocate more than a small multiple of its own length.  This file says what
a payload means; how payloads are added up is fold.py's business.

Method (SparseLoCo, arXiv 2508.15706, after Deep Gradient Compression's error feedback): the vector is cut
into chunks; of each chunk the `k` largest magnitudes are sent, as a sign, one of two integer levels (2 or 3)
and a scale per chunk; what was not sent stays in the error feedback.  All tensors lie in one vector
in the order of their names, so small tensors share chunks instead of paying for their own.

A scale is a float32 whose lower 16 bits are zero (a bfloat16), rounded to the nearest, ties to even; the error
feedback keeps what this rounding leaves, too.

Layout, little endian, bit streams most significant bit first, each padded with zero bits to a whole byte::

    magic "PFK2" | parameters u32 | chunk u32 | k u32
    full        u8                 1: every chunk sends its share of k, no counts follow; 0: at least one does not
    counts      u16 per chunk      entries sent of it, at most its share of k
    scales      upper half of a float32 (u16) per chunk with entries
    unary       quotient of each index gap, in ones, ended by a zero        (Rice coding; the parameter follows
    remainders  low bits of each index gap                                   from chunk length and count)
    values      2 bits per entry: sign (1 is negative), level (1 is three)

Ties between equal magnitudes go to the lower index.  At least one entry of a chunk has the lower level, so no
scale can be traded against a level.

Tiny models may send everything instead (`Shape.is_dense`, name = "int8"): a scale per chunk, its largest
magnitude / 127 rounded as above, and one signed byte per parameter, the value / scale to the nearest, ties to
even, cut to [-127, 127]; the rest stays in the error feedback as well.  A chunk of scale 0 has the level 0 alone,
any other reaches 127 or -127: so here, too, no scale can be traded against levels.  Its layout::

    magic "PFI1" | parameters u32 | chunk u32 | k u32, equal to chunk
    scales      u16 per chunk, as above
    levels      i8 per parameter

The numpy code here is the definition.  For large vectors the loops marked `kernels` do the same, to the bit,
in a tenth of the time (compiled.py).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import compiled

MAGIC, MAGIC_DENSE = b"PFK2", b"PFI1"
NOT_FINITE = "codec: the pseudo-gradient is not finite", "lower the learning rate"
HEADER = struct.Struct("<4sIII")
MAX_CHUNK = 1 << 15  # counts travel as u16
MAX_PARAMETERS = 1 << 30
LOW, HIGH = 2, 3  # levels; about 0.8 and 1.2 times the mean magnitude of what is sent
LEVEL_LIMIT = 127  # of a dense payload; with -128 a largest magnitude would have two spellings
# Scales outside this range are worth nothing or wreck a model; inside it the fold never meets a subnormal.
MIN_SCALE, MAX_SCALE = 2.0**-60, 2.0**20
BLOCK = 1 << 16  # elements that element-wise passes take at a time: they stay in a cache, and temporaries small

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shape:
    """What both ends know of a payload: `parameters` floats in chunks of `chunk`, at most `k` sent of each.

    `is_dense`: all of them, as bytes; then `k` is `chunk`.
    """

    parameters: int
    chunk: int
    k: int
    is_dense: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.parameters <= MAX_PARAMETERS:
            raise LocalProtocolError(f"codec: {self.parameters} parameters")
        if not 1 <= self.k <= self.chunk <= MAX_CHUNK:
            raise LocalProtocolError(f"codec: k {self.k} of chunk {self.chunk}")
        if self.is_dense and self.k != self.chunk:
            raise LocalProtocolError(f"codec: k {self.k} of a dense chunk of {self.chunk}")

    @property
    def head(self) -> bytes:
        """What a payload of this shape begins with."""
        return HEADER.pack(MAGIC_DENSE if self.is_dense else MAGIC, self.parameters, self.chunk, self.k)

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
        """No payload of this shape is longer; a dense one is not shorter either."""
        if self.is_dense:
            return HEADER.size + 2 * self.chunks + self.parameters
        last = self.parameters - (self.chunks - 1) * self.chunk
        entries = (self.chunks - 1) * self.k - (-last * self.k // self.chunk)  # without an array, as decode asks first
        # A gap costs its quotient, one stop bit and its remainder: at most 16 bits a entry beyond the sum of
        # quotients, which is at most the sum of the chunk lengths.
        return HEADER.size + 1 + 4 * self.chunks + (self.parameters + 18 * entries) // 8 + 3


@dataclass(frozen=True, slots=True)
class Sparse:
    """A decoded payload.  Entry j is the value levels[j] * scales[chunk of indices[j]] at indices[j]."""

    shape: Shape
    counts: I64  # (chunks,) entries per chunk
    scales: F32  # (chunks,) zero where a chunk has no entry, or none but zeros
    indices: I64  # (entries,) ascending positions in the vector
    levels: NDArray[np.int8]  # (entries,) one of -3, -2, 2, 3; of a dense payload -127 to 127

    def values(self) -> F32:
        """(entries,) the values at `indices`; int times float32 is one rounding, the same everywhere."""
        return self.levels.astype(np.float32) * np.repeat(self.scales, self.counts)

    def norm(self) -> float:
        """L2 norm.  Integer sums per chunk, then a correctly rounded sum of correctly rounded products."""
        scales = self.scales.astype(np.float64)
        return math.sqrt(math.fsum((self._squares() * (scales * scales)).tolist()))

    def _squares(self) -> I64:
        """(chunks,) sum of the squared levels of each chunk."""
        if kernels := compiled.find(self.shape.parameters):
            check_lengths(self)
            squares = np.empty(len(self.counts), np.int64)
            kernels.sum_squares(self.levels, self.counts, squares)
            return squares
        ends = np.cumsum(self.counts)
        running = np.concatenate(([0], np.cumsum(self.levels.astype(np.int64) ** 2)))
        sums: I64 = running[ends] - running[ends - self.counts]
        return sums


def check_lengths(sparse: Sparse) -> None:
    """The compiled loops trust these."""
    entries = int(sparse.counts.sum())
    if (
        not len(sparse.counts) == len(sparse.scales) == sparse.shape.chunks
        or not len(sparse.indices) == len(sparse.levels) == entries
        or (sparse.counts < 0).any()
    ):
        raise LocalProtocolError("codec: a payload whose parts do not fit together")


# --- compress -------------------------------------------------------------------------------------------
def compress(vector: F32, shape: Shape) -> Sparse:
    """The top k of each chunk of `vector` (parameters,), quantised.  Raises LocalProtocolError on NaN or Inf."""
    if vector.shape != (shape.parameters,) or vector.dtype != np.float32:
        raise LocalProtocolError(f"codec: expected {shape.parameters} float32, got {vector.shape} {vector.dtype}")
    if shape.is_dense:
        return _compress_dense(vector, shape)
    if kernels := compiled.find(shape.parameters):
        return _compress_compiled(vector, shape, kernels)
    if not np.isfinite(vector).all():
        raise LocalProtocolError(*NOT_FINITE)
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
    return Sparse(shape, counted, round_scales(np.array(scales, np.float32)), indices, levels)


def _compress_compiled(vector: F32, shape: Shape, kernels: ModuleType) -> Sparse:
    shares = shape.shares()
    indices, levels = np.empty(shares.sum(), np.int64), np.empty(shares.sum(), np.int8)
    counts, low_counts, sums = np.empty_like(shares), np.empty_like(shares), np.zeros((len(shares), 2))
    entries = kernels.pick(np.ascontiguousarray(vector), shape.chunk, shares, indices, levels, counts, sums, low_counts)
    if entries < 0:
        raise LocalProtocolError(*NOT_FINITE)
    indices, levels, ends = indices[:entries], levels[:entries], np.cumsum(counts)
    for number in np.flatnonzero(low_counts < 0).tolist():  # magnitudes too far apart for a plain sum
        own = slice(int(ends[number] - counts[number]), int(ends[number]))
        values = vector[indices[own]]
        is_high = np.abs(values).astype(np.float64) > _mean(np.abs(values))
        levels[own] = np.where(is_high, HIGH, LOW) * np.where(values < 0, -1, 1)
        sums[number] = [math.fsum(np.abs(values[chosen]).tolist()) for chosen in (~is_high, is_high)]
        low_counts[number] = np.count_nonzero(~is_high)
    # The same operations in the same order as in _scale.
    weights = LOW * LOW * low_counts + HIGH * HIGH * (counts - low_counts)
    scales = (LOW * sums[:, 0] + HIGH * sums[:, 1]) / np.maximum(weights, 1)
    is_sent = scales >= MIN_SCALE
    scales = np.where(is_sent, np.minimum(scales, MAX_SCALE), 0.0)
    if (counts[~is_sent] > 0).any():
        kept = np.repeat(is_sent, counts)
        indices, levels, counts = indices[kept], levels[kept], np.where(is_sent, counts, 0)
    return Sparse(shape, counts, round_scales(scales.astype(np.float32)), indices, levels)


def _compress_dense(vector: F32, shape: Shape) -> Sparse:
    """Every value of `vector`; element-wise throughout, and a maximum does not round."""
    if not np.isfinite(vector).all():
        raise LocalProtocolError(*NOT_FINITE)
    lengths = shape.lengths()
    wanted = _largest(np.abs(vector), shape).astype(np.float64) / LEVEL_LIMIT
    is_sent = wanted >= MIN_SCALE
    scales = round_scales(np.where(is_sent, np.minimum(wanted, MAX_SCALE), 0.0).astype(np.float32))
    divisors = np.where(is_sent, scales.astype(np.float64), np.inf)
    levels = np.rint(vector.astype(np.float64) / np.repeat(divisors, lengths))
    levels = np.clip(levels, -LEVEL_LIMIT, LEVEL_LIMIT).astype(np.int8)
    return Sparse(shape, lengths, scales, np.arange(shape.parameters), levels)


def _largest(values: NDArray[Any], shape: Shape) -> NDArray[Any]:
    """(chunks,) the largest of each chunk."""
    largest: NDArray[Any] = np.maximum.reduceat(values, np.arange(0, shape.parameters, shape.chunk))
    return largest


def round_scales(scales: F32) -> F32:
    """The nearest floats whose lower 16 bits are zero, ties to even, by integers; for [0, MAX_SCALE]."""
    bits = scales.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


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
    bit_lengths = np.frexp(mean_gaps.astype(np.float64))[1].astype(np.int64)  # exact for integers below 2^53
    low_bits: I64 = np.maximum(bit_lengths - 2, 0)
    return low_bits


def encode(sparse: Sparse) -> bytes:
    """The one byte string of `sparse`."""
    shape, counts = sparse.shape, sparse.counts
    if shape.is_dense:
        return b"".join((shape.head, _write_scales(sparse.scales), sparse.levels.tobytes()))
    is_full = bool((counts == shape.shares()).all())
    kernels = compiled.find(shape.parameters)
    return b"".join(
        (
            shape.head,
            b"\1" if is_full else b"\0" + counts.astype("<u2").tobytes(),
            _write_scales(sparse.scales[counts > 0]),
            *(_pack_compiled(sparse, kernels) if kernels else _pack(sparse)),
        )
    )


def _write_scales(scales: F32) -> bytes:
    bits = scales.view(np.uint32)
    if (bits & np.uint32(0xFFFF)).any():
        raise LocalProtocolError("codec: a scale that was not rounded")
    return (bits >> np.uint32(16)).astype("<u2").tobytes()


def _pack(sparse: Sparse) -> tuple[bytes, bytes, bytes]:
    """The three bit streams."""
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
    return np.packbits(unary).tobytes(), np.packbits(remainders).tobytes(), np.packbits(values).tobytes()


def _pack_compiled(sparse: Sparse, kernels: ModuleType) -> tuple[bytes, bytes, bytes]:
    check_lengths(sparse)
    shape, counts = sparse.shape, sparse.counts
    lengths = shape.lengths()
    widths = _rice_parameters(lengths, counts)
    entries = int(counts.sum())
    # Of a chunk's quotients no more than its length allows, and a stop bit for each entry.
    unary = np.empty(_bytes_of(int((lengths >> widths).sum()) + entries), np.uint8)
    remainders = np.empty(_bytes_of(int((widths * counts).sum())), np.uint8)
    values = np.empty(_bytes_of(2 * entries), np.uint8)
    used = kernels.pack(
        counts, widths, lengths, shape.chunk, sparse.indices, sparse.levels, unary, remainders, values
    )
    if used < 0:
        raise LocalProtocolError("codec: positions do not ascend within their chunks")
    return unary[:used].tobytes(), remainders.tobytes(), values.tobytes()


def _bytes_of(bits: int) -> int:
    return -(-bits // 8)


def decode(data: bytes, shape: Shape) -> Sparse:
    """The inverse of `encode`.

    Raises:
        InvalidMessageError: `data` is not what `encode` writes for an array of this shape.
    """
    if not HEADER.size <= len(data) <= shape.max_bytes():
        raise InvalidMessageError(f"payload: {len(data)} bytes")
    if not data.startswith(shape.head):
        raise InvalidMessageError("payload: another format, model or density")
    reader = _Reader(data, HEADER.size)
    return _decode_dense(reader, shape) if shape.is_dense else _decode(reader, shape)


def _decode(reader: _Reader, shape: Shape) -> Sparse:
    data = reader.data
    # Two bytes of each chunk are there in any case: its scale, or its count.
    full = reader.take(1)
    if len(data) - reader.at < 2 * shape.chunks:
        raise InvalidMessageError("payload: cut short")
    lengths, counts = shape.lengths(), shape.shares()
    if full == b"\0":
        shares, counts = counts, np.frombuffer(reader.take(2 * shape.chunks), "<u2").astype(np.int64)
        if (counts > shares).any():
            raise InvalidMessageError("payload: more entries than its share")
        if (counts == shares).all():
            raise InvalidMessageError("payload: counts that go without saying")
    elif full != b"\1":
        raise InvalidMessageError("payload: neither full nor not")
    entries = int(counts.sum())
    if 3 * entries > 8 * len(data):  # before anything is allocated per entry
        raise InvalidMessageError("payload: cut short")
    scales = np.zeros(shape.chunks, np.float32)
    filled = counts > 0
    scales[filled] = _read_scales(reader.take(2 * int(filled.sum())))
    if not (scales[filled] > 0).all():
        raise InvalidMessageError("payload: a scale of nothing")

    remainder_bytes = _bytes_of(int((_rice_parameters(lengths, counts) * counts).sum()))
    value_bytes = _bytes_of(2 * entries)
    streams = (
        reader.take(len(data) - reader.at - remainder_bytes - value_bytes),
        reader.take(remainder_bytes),
        reader.take(value_bytes),
    )
    if kernels := compiled.find(shape.parameters):
        indices, levels = _unpack_compiled(shape, counts, streams, kernels)
    else:
        indices, levels = _unpack(shape, counts, streams)
    return Sparse(shape, counts, scales, indices, levels)


def _decode_dense(reader: _Reader, shape: Shape) -> Sparse:
    if len(reader.data) != shape.max_bytes():
        raise InvalidMessageError(f"payload: {len(reader.data)} bytes, expected {shape.max_bytes()}")
    scales = _read_scales(reader.take(2 * shape.chunks))
    levels = np.frombuffer(reader.take(shape.parameters), np.int8)
    if (levels < -LEVEL_LIMIT).any():
        raise InvalidMessageError("payload: the level -128")
    if (_largest(np.abs(levels), shape) != np.where(scales > 0, LEVEL_LIMIT, 0)).any():
        raise InvalidMessageError("payload: a scale that its levels do not fill")
    return Sparse(shape, shape.lengths(), scales, np.arange(shape.parameters), levels)


def _read_scales(data: bytes) -> F32:
    """Each 0 or within the range of scales."""
    scales = (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    # NaN compares false on both sides; of the two zeros only the one without a sign has no bits.
    if not ((scales >= MIN_SCALE) & (scales <= MAX_SCALE) | (scales.view(np.uint32) == 0)).all():
        raise InvalidMessageError("payload: a scale is not finite or out of range")
    return scales


Streams = tuple[bytes, bytes, bytes]


def _unpack(shape: Shape, counts: I64, streams: Streams) -> tuple[I64, NDArray[np.int8]]:
    """(indices, levels), the inverse of _pack.  Raises InvalidMessageError."""
    entries, lengths = int(counts.sum()), shape.lengths()
    widths = np.repeat(_rice_parameters(lengths, counts), counts)
    gaps = _read_unary(streams[0], entries)
    bits = _read_bits(streams[1], int(widths.sum()))
    offsets = np.cumsum(widths) - widths
    for bit in range(int(widths.max(initial=0))):
        has = widths > bit
        gaps[has] = (gaps[has] << 1) | bits[offsets[has] + bit]
    indices = _positions(gaps, counts, lengths, shape.chunk)

    codes = _read_bits(streams[2], 2 * entries).reshape(entries, 2).astype(np.int8)
    levels: NDArray[np.int8] = (codes[:, 1] + np.int8(LOW)) * (1 - 2 * codes[:, 0])
    lows = np.concatenate(([0], np.cumsum(codes[:, 1] == 0)))
    ends, filled = np.cumsum(counts), counts > 0
    if (lows[ends][filled] == lows[ends - counts][filled]).any():
        raise InvalidMessageError("payload: a chunk without the lower level")
    return indices, levels


def _unpack_compiled(
    shape: Shape, counts: I64, streams: Streams, kernels: ModuleType
) -> tuple[I64, NDArray[np.int8]]:
    entries, lengths = int(counts.sum()), shape.lengths()
    indices, levels = np.empty(entries, np.int64), np.empty(entries, np.int8)
    raw = (np.frombuffer(stream + bytes(kernels.PADDING), np.uint8) for stream in streams)
    status = kernels.unpack(
        counts, _rice_parameters(lengths, counts), lengths, shape.chunk, *raw, indices, levels
    )
    if status != kernels.OK:
        raise InvalidMessageError(f"payload: {_REFUSED[-status]}")
    return indices, levels


_REFUSED = (
    "",
    "not finite",
    "an index beyond its chunk",
    "index stream has the wrong length",
    "padding is not zero",
    "a chunk without the lower level",
)


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
    if delta.shape != feedback.shape:
        raise LocalProtocolError(f"codec: {feedback.size} of error feedback for {delta.size} parameters")
    error = np.empty_like(feedback)
    for begin in range(0, len(error), BLOCK):
        part = error[begin : begin + BLOCK]
        np.multiply(feedback[begin : begin + BLOCK], np.float32(beta), out=part)
        part += delta[begin : begin + BLOCK]  # numpy rounds each operation for itself
    sparse = compress(error, shape)
    error[sparse.indices] -= sparse.values()
    return encode(sparse), error
