"""Inner loops of codec.py and fold.py, compiled by numba; compiled.py decides whether they are used.

Law: the same bits as the numpy code they stand in for, on any processor.  Therefore a product never meets an
addition here unless the product is exact: whether a compiler fuses the two into one rounding cannot matter
(tests/unit/learning/test_compiled.py looks for fused instructions all the same).  Sums are exact integers, or
floats that are checked to have lost nothing.  No fastmath, no threads.

Law of memory: numba checks no index, and `unpack` reads what a stranger wrote.  Every position that comes from
an argument's contents is compared with its bounds before it is used, and a code from below is returned.  What
callers promise is said where it is relied upon.
"""

# Numbers change their numpy type from line to line here, as numba's signatures want it; `int` stands for them all.
# mypy: disable-error-code="assignment, return-value"

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

OK = 0
NOT_FINITE, BAD_POSITION, WRONG_LENGTH, BAD_PADDING, NO_LOW_LEVEL = -1, -2, -3, -4, -5

ABSOLUTE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
STRIDE = 4096
PADDING = 3  # a remainder of at most 15 bits lies in three bytes
LEADING_ONES = np.array([f"{byte:08b}0".index("0") for byte in range(256)], np.uint8)
LARGEST = np.finfo(np.float32).max
NEAR = 1 << 18  # 1/32 of an octave: how far a chunk's threshold usually is from the one before


def _in(kind: Any, dimensions: int = 1) -> Any:
    return numba.types.Array(kind, dimensions, "C", readonly=True)


def _out(kind: Any, dimensions: int = 1) -> Any:
    return numba.types.Array(kind, dimensions, "C")


_u8, _i8, _i32, _i64, _u32 = numba.uint8, numba.int8, numba.int32, numba.int64, numba.uint32
_f32, _f64 = numba.float32, numba.float64


# fastmath off keeps every rounding; "numpy" lets a division by zero pass, as numpy does.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}


def _compile(result: Any, *arguments: Any) -> Any:
    def decorate(function: Any) -> Any:
        try:
            return numba.njit(result(*arguments), cache=True, **OPTIONS)(function)
        except RuntimeError:  # nowhere to write the cache: compiled anew in every process
            return numba.njit(result(*arguments), **OPTIONS)(function)

    return decorate


@_compile(_i64, _in(_u32), _i64, _u32)
def _count_from(bits: NDArray[np.uint32], size: int, threshold: int) -> int:
    """How many of bits[:size] are `threshold` or more."""
    count = np.uint32(0)
    for i in range(size):
        count += np.uint32(bits[i] >= threshold)
    return np.int64(count)


@_compile(_i64, _in(_u32), _i64, _i64, _i64, _i64, _out(_i64))
def _find_threshold(
    bits: NDArray[np.uint32], size: int, k: int, largest: int, guess: int, found: NDArray[np.int64]
) -> int:
    """The largest t >= 1 with k or more of bits[:size] at or above it; found[0] = how many are above it.

    If fewer than k are not zero: t = 0, and found[0] counts those.  `guess` only saves time.
    """
    low, high, above = np.int64(0), largest + 1, np.int64(0)  # count(low) >= k > count(high) = above
    step = np.int64(NEAR)
    probe = guess
    while high - low > 1:
        if not low < probe < high:
            probe = low + (high - low) // 2
        count = _count_from(bits, size, np.uint32(probe))
        if count == k:  # nothing lies between: everything from here on is above
            found[0] = k
            return probe - 1
        if count > k:
            low = probe
            probe = low + step if high - low > 2 * step else low + (high - low) // 2
        else:
            high, above = probe, count
            probe = high - step if high - low > 2 * step else low + (high - low) // 2
        if step < high - low:
            step *= 2
    found[0] = above
    return low


@_compile(_u32, _in(_u32), _out(_u32))
def _load(raw: NDArray[np.uint32], bits: NDArray[np.uint32]) -> int:
    """bits = the magnitudes of `raw` as integers, which order like the floats; returns the largest."""
    largest = np.uint32(0)
    for i in range(len(raw)):
        value = raw[i] & ABSOLUTE
        bits[i] = value
        largest = max(largest, value)
    return largest


@_compile(_i64, _in(_u32), _i64, _u32, _out(_i64))
def _collect(bits: NDArray[np.uint32], size: int, threshold: int, chosen: NDArray[np.int64]) -> int:
    """Ascending positions of bits[:size] at or above `threshold`; `chosen` has room for one more than size."""
    count = 0
    for i in range(size):  # no branch: which of them is chosen cannot be predicted
        chosen[count] = i
        count += np.int64(bits[i] >= threshold)
    return count


@_compile(_i64, _in(_f32), _in(_i64), _i64, _out(_i8), _out(_f64))
def _judge(
    part: NDArray[np.float32],
    chosen: NDArray[np.int64],
    count: int,
    levels: NDArray[np.int8],
    sums: NDArray[np.float64],
) -> int:
    """Levels of a chunk's chosen entries, sums of the lower and of the upper ones; returns how many are lower.

    -1: a float64 could not hold a sum, levels and sums are not to be used.
    """
    total, smallest = 0.0, np.inf
    for j in range(count):
        magnitude = abs(np.float64(part[chosen[j]]))
        total += magnitude
        smallest = min(smallest, magnitude)
    # All are multiples of the last place of the smallest, which is 2^-24 of it or more; up to 2^53 of those a
    # float64 adds without rounding, and a sum that ever went beyond stays there.
    if total >= smallest * 2.0**29:
        return -1
    mean = total / count
    low, low_count = 0.0, 0
    for j in range(count):
        value = np.float64(part[chosen[j]])
        is_low = abs(value) <= mean
        low += abs(value) if is_low else 0.0
        low_count += is_low
        level = 2 if is_low else 3
        levels[j] = level if value > 0 else -level
    sums[0], sums[1] = low, total - low
    return low_count


@_compile(_i64, _in(_f32), _i64, _in(_i64), _out(_i64), _out(_i8), _out(_i64), _out(_f64, 2), _out(_i64))
def pick(
    vector: NDArray[np.float32],
    chunk: int,
    shares: NDArray[np.int64],
    positions: NDArray[np.int64],
    levels: NDArray[np.int8],
    counts: NDArray[np.int64],
    sums: NDArray[np.float64],
    low_counts: NDArray[np.int64],
) -> int:
    """The largest of each chunk and their levels: codec.compress up to the scales.

    Returns the number of entries written to `positions` and `levels` (sum(shares),), or NOT_FINITE.  Per chunk:
    counts; sums[:, 0] and [:, 1] of the magnitudes of the lower and the higher level; low_counts, or -1 where
    sums and levels are still to be found because a float64 could not hold a sum.
    """
    bits = np.zeros(chunk, np.uint32)
    chosen = np.empty(chunk + 1, np.int64)
    found = np.zeros(1, np.int64)
    entries = 0
    threshold = np.int64(0)  # that of the chunk before is the first guess
    raw = vector.view(np.uint32)
    for number in range(len(shares)):
        begin = number * chunk
        part = vector[begin : begin + chunk]
        largest = _load(raw[begin : begin + chunk], bits)
        if largest >= INFINITY:
            return NOT_FINITE
        k = shares[number]
        threshold = _find_threshold(bits, len(part), k, np.int64(largest), threshold, found)
        count = _collect(bits, len(part), np.uint32(max(threshold, 1)), chosen)
        if count > k:  # of those that equal the threshold the first
            ties, kept = k - found[0], 0
            for j in range(count):
                if np.int64(bits[chosen[j]]) == threshold:
                    if ties == 0:
                        continue
                    ties -= 1
                chosen[kept] = chosen[j]
                kept += 1
            count = kept
        for j in range(count):
            positions[entries + j] = begin + chosen[j]
        counts[number] = count
        low_counts[number] = _judge(part, chosen, count, levels[entries:], sums[number]) if count else 0
        entries += count
    return entries


@_compile(_i64, _in(_i64), _in(_i64), _in(_i64), _i64, _in(_i64), _in(_i8), _out(_u8), _out(_u8), _out(_u8))
def pack(
    counts: NDArray[np.int64],
    widths: NDArray[np.int64],
    lengths: NDArray[np.int64],
    chunk: int,
    indices: NDArray[np.int64],
    levels: NDArray[np.int8],
    unary: NDArray[np.uint8],
    remainders: NDArray[np.uint8],
    values: NDArray[np.uint8],
) -> int:
    """The three bit streams of codec.encode.  Returns the bytes used of `unary`, or BAD_POSITION.

    `widths`: remainder bits of each chunk, at most 15.  Sizes of the outputs: unary for every entry's stop bit
    and lengths >> widths ones a chunk; the others exactly what they take.
    """
    unary_at = remainder_at = value_at = 0
    unary_word = remainder_word = value_word = np.int64(0)  # bits not yet written, below 8 between two puts
    unary_bits = remainder_bits = value_bits = 0
    entry = 0
    for number in range(len(counts)):
        width, begin = widths[number], number * chunk
        previous = begin - 1
        for _ in range(counts[number]):
            at = indices[entry]
            if not previous < at < begin + lengths[number]:
                return BAD_POSITION
            gap = at - previous - 1
            previous = at
            quotient = gap >> width
            while quotient >= 8:
                unary_word = (unary_word << 8) | 0xFF
                unary[unary_at] = (unary_word >> unary_bits) & 0xFF
                unary_at += 1
                unary_word &= (1 << unary_bits) - 1
                quotient -= 8
            unary_word = (unary_word << (quotient + 1)) | ((1 << (quotient + 1)) - 2)
            unary_bits += quotient + 1
            while unary_bits >= 8:
                unary_bits -= 8
                unary[unary_at] = (unary_word >> unary_bits) & 0xFF
                unary_at += 1
                unary_word &= (1 << unary_bits) - 1
            remainder_word = (remainder_word << width) | (gap & ((1 << width) - 1))
            remainder_bits += width
            while remainder_bits >= 8:
                remainder_bits -= 8
                remainders[remainder_at] = (remainder_word >> remainder_bits) & 0xFF
                remainder_at += 1
                remainder_word &= (1 << remainder_bits) - 1
            level = np.int64(levels[entry])
            value_word = (value_word << 2) | (2 if level < 0 else 0) | (1 if abs(level) == 3 else 0)
            value_bits += 2
            if value_bits == 8:
                values[value_at] = value_word
                value_at += 1
                value_word, value_bits = np.int64(0), 0
            entry += 1
    if unary_bits:
        unary[unary_at] = (unary_word << (8 - unary_bits)) & 0xFF
        unary_at += 1
    if remainder_bits:
        remainders[remainder_at] = (remainder_word << (8 - remainder_bits)) & 0xFF
    if value_bits:
        values[value_at] = (value_word << (8 - value_bits)) & 0xFF
    return unary_at


@_compile(
    _i64, _in(_i64), _in(_i64), _in(_i64), _i64, _in(_u8), _in(_u8), _in(_u8), _out(_i64), _out(_i8)
)
def unpack(
    counts: NDArray[np.int64],
    widths: NDArray[np.int64],
    lengths: NDArray[np.int64],
    chunk: int,
    unary: NDArray[np.uint8],
    remainders: NDArray[np.uint8],
    values: NDArray[np.uint8],
    indices: NDArray[np.int64],
    levels: NDArray[np.int8],
) -> int:
    """The inverse of `pack`, as strict as codec.decode.  Returns OK or what is wrong.

    `remainders` and `values` have the bytes that counts and widths call for; `unary` may be anything.  Each has
    PADDING zero bytes more, so that a window of bits never ends beyond it.
    """
    unary_end = 8 * (len(unary) - PADDING)
    unary_bit = remainder_bit = value_bit = 0
    entry = 0
    for number in range(len(counts)):
        width, begin = widths[number], number * chunk
        mask, rest = (1 << width) - 1, 24 - width
        end = begin + lengths[number]
        previous = begin - 1
        has_low = counts[number] == 0
        for _ in range(counts[number]):
            quotient = 0
            while unary_bit < unary_end:
                at = unary_bit >> 3
                window = (np.int64(unary[at]) << 8 | np.int64(unary[at + 1])) >> (8 - (unary_bit & 7)) & 0xFF
                ones = np.int64(LEADING_ONES[window])
                quotient += ones
                unary_bit += ones
                if ones < 8:
                    break
            unary_bit += 1  # the stop bit
            if unary_bit > unary_end:
                return WRONG_LENGTH
            at = remainder_bit >> 3
            word = np.int64(remainders[at]) << 16 | np.int64(remainders[at + 1]) << 8 | np.int64(remainders[at + 2])
            gap = quotient << width | (word >> (rest - (remainder_bit & 7)) & mask)
            remainder_bit += width
            position = previous + 1 + gap
            if position >= end:
                return BAD_POSITION
            previous = position
            indices[entry] = position
            code = np.int64(values[value_bit >> 3]) >> (6 - (value_bit & 7)) & 3
            value_bit += 2
            has_low |= code & 1 == 0
            levels[entry] = (2 + (code & 1)) * (1 - (code & 2))
            entry += 1
        if not has_low:
            return NO_LOW_LEVEL
    if (unary_bit + 7) >> 3 != len(unary) - PADDING:
        return WRONG_LENGTH
    for stream, used in ((unary, unary_bit), (remainders, remainder_bit), (values, value_bit)):
        if used & 7 and np.int64(stream[used >> 3]) & (0xFF >> (used & 7)):
            return BAD_PADDING
    return OK


@_compile(_i64, _in(_i8), _in(_i64), _out(_i64))
def sum_squares(levels: NDArray[np.int8], counts: NDArray[np.int64], squares: NDArray[np.int64]) -> int:
    """squares[c] = the sum of level^2 over chunk c; sum(counts) must be len(levels)."""
    entry = 0
    for number in range(len(counts)):
        total = 0
        for _ in range(counts[number]):
            level = np.int64(levels[entry])
            total += level * level
            entry += 1
        squares[number] = total
    return OK


@_compile(
    _i64, _out(_f32), _i64, _in(_i64), _in(_i8), _in(_i64), _in(_i64), _in(_i64), _in(_i64), _in(_f32, 2),
    _i64, _i64, _f32, _f32, _out(_i64, 2),
)  # fmt: skip
def combine(
    update: NDArray[np.float32],
    base: int,
    indices: NDArray[np.int64],
    levels: NDArray[np.int8],
    starts: NDArray[np.int64],
    chunks: NDArray[np.int64],
    rows: NDArray[np.int64],
    part_weights: NDArray[np.int64],
    terms: NDArray[np.float32],
    weights: int,
    divisor: int,
    gain: float,
    tiny: float,
    squares: NDArray[np.int64],
) -> int:
    """The update of the block that begins at `base`; `update` is zero on entry.  Returns OK or what is wrong.

    Entries starts[p] to starts[p + 1] are payload p's; it has chunks of chunks[p] elements, and an entry of its
    chunk c adds terms[rows[p] + c, level + half], half of them for negative levels, in the order of the payloads.
    Added to squares (2, 256): the
    squared significands of the update by exponent, split at bit 24; integers, so that their sum has no order.
    """
    bits, half = update.view(np.uint32), terms.shape[1] // 2
    count = np.zeros(STRIDE, np.int64)
    touched = np.empty(STRIDE + 1, np.int32)
    recent = np.zeros((2, 256), np.int64)
    cursors = starts[:-1].copy()
    for begin in range(base, base + len(update), STRIDE):  # as much as the nearest cache holds
        size = min(STRIDE, base + len(update) - begin)
        total, pattern_of = update[begin - base : begin - base + size], bits[begin - base : begin - base + size]
        touches = 0
        for part in range(len(cursors)):
            chunk, weight = chunks[part], part_weights[part]
            row = rows[part] + begin // chunk
            end = (begin // chunk + 1) * chunk - begin
            j, last, previous = cursors[part], starts[part + 1], -1
            while j < last:
                at = indices[j] - begin
                if at >= size:
                    break
                while at >= end:
                    row += 1
                    end += chunk
                if at <= previous or not -half <= levels[j] <= half:
                    return BAD_POSITION
                previous = at
                # No branch on what a payload says: neither level nor first touch can be predicted.
                term = terms[row, np.int64(levels[j]) + half]
                touched[touches] = at
                touches += np.int64(count[at] == 0)
                count[at] += weight
                total[at] += term
                j += 1
            cursors[part] = j
        for j in range(touches):
            at = touched[j]
            denominator = np.float64(max(count[at] * divisor, weights))
            count[at] = 0
            value = np.float32(np.float64(total[at]) * np.float64(divisor) / denominator) * gain
            total[at] = np.float32(0) if abs(value) < tiny else value
        for j in range(touches):  # apart from the division: together they wait for one another
            pattern = np.int64(pattern_of[touched[j]])
            exponent = (pattern >> 23) & 0xFF
            if exponent == 0xFF:
                return NOT_FINITE
            if exponent:
                significand = (pattern & 0x7FFFFF) | 0x800000
                recent[j & 1, exponent] += significand * significand  # 48 bits, and no more than STRIDE of them
        for row in range(2):  # two rows, since most exponents are alike and an addition waits for the one before
            for exponent in range(256):
                squares[0, exponent] += recent[row, exponent] & 0xFFFFFF
                squares[1, exponent] += recent[row, exponent] >> 24
                recent[row, exponent] = 0
    for part in range(len(cursors)):
        if cursors[part] != starts[part + 1]:
            return BAD_POSITION
    return OK


@_compile(_i64, _in(_f32), _out(_f32), _f32, _f32)
def subtract(checkpoint: NDArray[np.float32], update: NDArray[np.float32], factor: float, tiny: float) -> int:
    """update = checkpoint - factor * update, in place, tiny values cut to zero.  Returns OK or NOT_FINITE."""
    zero = np.float32(0)
    if factor != 1:
        for i in range(len(update)):
            scaled = update[i] * factor
            update[i] = zero if abs(scaled) < tiny else scaled
    is_bad = False
    for i in range(len(update)):
        value = checkpoint[i] - update[i]
        is_bad |= not abs(value) <= LARGEST
        update[i] = zero if abs(value) < tiny else value
    return NOT_FINITE if is_bad else OK
