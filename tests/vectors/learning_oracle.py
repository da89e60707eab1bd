"""Codec, fold and robust rules again, the slow way, from their file heads: plain Python, no numpy, one number at a time.

Run it to write codec.json, fold.json and robust.json; tests/unit/learning compares them with the package, and the property
tests compare the two on random input.  A change of these files is a change of the protocol.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path

HERE = Path(__file__).parent


def f32(value: float) -> float:
    """Rounded once to float32 (double rounding is harmless for + - * / of two float32)."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def upper_half(value: float) -> float:
    """Rounded to float32, and that to a multiple of 2^16 of its pattern, ties to even."""
    (pattern,) = struct.unpack("<I", struct.pack("<f", value))
    halves, rest = divmod(pattern, 1 << 16)
    halves += rest > 1 << 15 or (rest == 1 << 15 and halves % 2 == 1)
    return struct.unpack("<f", struct.pack("<I", halves << 16))[0]


def write_scale(scale: float) -> bytes:
    low, high = struct.unpack("<HH", struct.pack("<f", scale))
    assert low == 0
    return struct.pack("<H", high)


def pack_bits(bits: str) -> bytes:
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


# --- codec ----------------------------------------------------------------------------------------------
def compress(vector: list[float], chunk: int, k: int) -> list[tuple[float, list[tuple[int, int]]]]:
    """Per chunk: (scale, [(index in chunk, level)])."""
    chunks = []
    for begin in range(0, len(vector), chunk):
        part = vector[begin : begin + chunk]
        share = math.ceil(len(part) * k / chunk)
        order = sorted((i for i in range(len(part)) if part[i]), key=lambda i: (-abs(part[i]), i))
        top = sorted(order[:share])
        if not top:
            chunks.append((0.0, []))
            continue
        mean = math.fsum(abs(part[i]) for i in top) / len(top)
        size = {i: 3 if abs(part[i]) > mean else 2 for i in top}
        low = math.fsum(abs(part[i]) for i in top if size[i] == 2)
        high = math.fsum(abs(part[i]) for i in top if size[i] == 3)
        scale = (2 * low + 3 * high) / (
            4 * sum(s == 2 for s in size.values()) + 9 * sum(s == 3 for s in size.values())
        )
        if scale < 2.0**-60:
            chunks.append((0.0, []))
            continue
        chunks.append((upper_half(min(scale, 2.0**20)), [(i, size[i] if part[i] > 0 else -size[i]) for i in top]))
    return chunks


def encode(vector: list[float], chunk: int, k: int) -> bytes:
    chunks = compress(vector, chunk, k)
    shares = [math.ceil(min(chunk, len(vector) - begin) * k / chunk) for begin in range(0, len(vector), chunk)]
    if [len(entries) for _, entries in chunks] == shares:
        counts = b"\1"
    else:
        counts = b"\0" + b"".join(struct.pack("<H", len(entries)) for _, entries in chunks)
    scales = b"".join(write_scale(scale) for scale, entries in chunks if entries)
    unary = remainders = values = ""
    for number, (_, entries) in enumerate(chunks):
        length = min(chunk, len(vector) - number * chunk)
        low_bits = max(0, (length // max(1, len(entries))).bit_length() - 2)
        previous = -1
        for index, level in entries:
            gap = index - previous - 1
            previous = index
            unary += "1" * (gap >> low_bits) + "0"
            if low_bits:
                remainders += format(gap & ((1 << low_bits) - 1), f"0{low_bits}b")
            values += ("1" if level < 0 else "0") + ("1" if abs(level) == 3 else "0")
    head = b"PFK2" + struct.pack("<III", len(vector), chunk, k)
    return head + counts + scales + pack_bits(unary) + pack_bits(remainders) + pack_bits(values)


def compress_dense(vector: list[float], chunk: int) -> list[tuple[float, list[tuple[int, int]]]]:
    """The same for name = "int8"; every index is there."""
    chunks = []
    for begin in range(0, len(vector), chunk):
        part = vector[begin : begin + chunk]
        scale = max(abs(value) for value in part) / 127
        scale = upper_half(min(scale, 2.0**20)) if scale >= 2.0**-60 else 0.0
        levels = [max(-127, min(127, round(value / scale))) if scale else 0 for value in part]
        chunks.append((scale, list(enumerate(levels))))
    return chunks


def encode_dense(vector: list[float], chunk: int) -> bytes:
    chunks = compress_dense(vector, chunk)
    scales = b"".join(write_scale(scale) for scale, _ in chunks)
    levels = [level for _, entries in chunks for _, level in entries]
    return b"PFI1" + struct.pack(f"<III{len(scales)}s{len(levels)}b", len(vector), chunk, chunk, scales, *levels)


# --- fold -----------------------------------------------------------------------------------------------
def fold(
    checkpoint: list[float],
    inputs: list[tuple[list[float], int]],
    chunk: int,
    k: int,
    *,
    is_dense: bool = False,
    floor_divisor: int = 4,
    gain: float = 1.0,
    norm_bound: float = 2.0,
    is_clipped: bool = True,
) -> list[float]:
    """`inputs` are (uncompressed vector, weight)."""
    if not inputs:
        return list(checkpoint)
    tiny = 2.0**-100
    payloads = [
        (compress_dense(vector, chunk) if is_dense else compress(vector, chunk, k), weight) for vector, weight in inputs
    ]
    norms = [
        math.sqrt(math.fsum(sum(lv * lv for _, lv in es) * (scale * scale) for scale, es in chunks))
        for chunks, _ in payloads
    ]
    positive = sorted(norm for norm in norms if norm > 0)
    median = positive[(len(positive) - 1) // 2] if positive else 0.0
    total, count = [0.0] * len(checkpoint), [0] * len(checkpoint)
    for (chunks, weight), norm in zip(payloads, norms, strict=True):
        clip = median / norm if is_clipped and norm > median else 1.0
        for number, (scale, entries) in enumerate(chunks):
            coefficient = f32(scale * clip * weight)
            coefficient = coefficient if abs(coefficient) >= tiny else 0.0
            for index, level in entries:
                at = number * chunk + index
                total[at] = f32(total[at] + f32(level * coefficient))
                count[at] += weight
    weights = sum(weight for _, weight in payloads)
    cut = lambda value: value if abs(value) >= tiny else 0.0  # noqa: E731
    update = [
        cut(f32(f32(total[x] * floor_divisor / max(count[x] * floor_divisor, weights)) * f32(gain)))
        for x in range(len(checkpoint))
    ]
    norm = math.sqrt(math.fsum(u * u for u in update))
    if norm > norm_bound * median:
        factor = f32(norm_bound * median / norm)
        update = [cut(f32(u * factor)) for u in update]
    return [cut(f32(w - u)) for w, u in zip(checkpoint, update, strict=True)]


# --- vectors --------------------------------------------------------------------------------------------
def noise(label: str, size: int, *, is_sparse: bool = False) -> list[float]:
    """float32 values over several orders of magnitude; ties and zeros where `is_sparse`."""
    values = []
    for i in range(size):
        block = hashlib.sha256(f"{label} {i}".encode()).digest()
        whole = int.from_bytes(block[:3], "big") - (1 << 23)
        value = math.ldexp(whole, -23 - block[3] % 12)
        if is_sparse:
            value = 0.0 if block[4] % 3 else math.copysign(0.5, value)
        values.append(f32(value))
    return values


def pack(values: list[float]) -> str:
    return struct.pack(f"<{len(values)}f", *values).hex()


CODEC_CASES = {
    "one value": ([1.5], 16, 1),
    "all zero": ([0.0] * 40, 16, 4),
    "ties and zeros": (noise("ties", 70, is_sparse=True), 16, 3),
    "a chunk and a bit": (noise("bit", 65), 64, 5),
    "everything is sent": (noise("dense", 48), 16, 16),
    "sparse": (noise("sparse", 600), 256, 4),
    "dense start": (noise("start", 600), 256, 64),
    "too small to send": ([math.ldexp(1.0, -70)] * 16 + [math.ldexp(1.0, -58)] * 16, 16, 4),
    "too large to send": ([math.ldexp(1.0, 30)] * 16, 16, 4),
    # equal values have half of them as their scale: here half way between two bfloat16
    "a scale half way, down": ([2 + 2.0**-7] * 16, 16, 4),
    "a scale half way, up": ([2 + 3 * 2.0**-7] * 16, 16, 4),
}
DENSE_CASES = {
    "dense: one value": ([1.5], 16),
    "dense: ties and zeros": (noise("ties", 70, is_sparse=True), 16),
    "dense: a chunk of zeros": (noise("bit", 20) + [0.0] * 44, 16),
    "dense: halves": ([0.5 * i for i in range(-127, 128)], 255),
    "dense: noise": (noise("dense", 300), 128),
    "dense: too small to send": ([math.ldexp(1.0, -70)] * 16 + [math.ldexp(1.0, -50)] * 16, 16),
    "dense: too large to send": ([math.ldexp(1.0, 30), -1.0], 16),
}
FOLD_CASES = {
    "nobody": ([], {}),
    "one peer": ([1], {}),
    "four peers": ([1, 1, 1, 1], {}),
    "four weights": ([1920, 960, 3840, 7], {}),
    "nine peers, floor": ([3, 1, 4, 1, 5, 9, 2, 6, 5], {}),
    "huge weights": ([1 << 40, (1 << 40) - 1, 3], {}),
    "not clipped": ([1, 2, 3], {"is_clipped": False, "norm_bound": 16.0}),
    "gain and bound": ([1, 2, 3, 4, 5], {"gain": 1.5, "norm_bound": 0.5}),
    "another floor": ([1, 2, 3, 4, 5], {"floor_divisor": 2}),
    "dense": ([1920, 960, 3840, 7], {"is_dense": True}),
    "dense, gain and bound": ([1, 2, 3, 4, 5], {"is_dense": True, "gain": 1.5, "norm_bound": 0.5}),
}


# --- robust rules ---------------------------------------------------------------------------------------
def settle_zero(value: float) -> float:
    return value if abs(value) >= 2.0**-100 else 0.0


def length(row: list[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in row))


def trimmed_mean(rows: list[list[float]]) -> list[float]:
    cut = math.ceil(len(rows) / 5) if len(rows) >= 3 else 0
    result = []
    for column in zip(*rows, strict=True):
        total = 0.0
        for value in sorted(column)[cut : len(rows) - cut]:
            total += value
        result.append(settle_zero(f32(total / (len(rows) - 2 * cut))))
    return result


def centered_clip(rows: list[list[float]]) -> list[float]:
    centre = [0.0] * len(rows[0])
    for _ in range(3):
        offsets = [[f32(value - middle) for value, middle in zip(row, centre, strict=True)] for row in rows]
        distances = [length(offset) for offset in offsets]
        tau = sorted(distances)[(len(rows) - 1) // 2]
        factors = [tau / distance if distance > tau else 1.0 for distance in distances]
        for at in range(len(centre)):
            total = 0.0
            for offset, factor in zip(offsets, factors, strict=True):
                total += offset[at] * factor
            centre[at] = settle_zero(f32(centre[at] + total / len(rows)))
    return centre


def geometric_median(rows: list[list[float]]) -> list[float]:
    centre = trimmed_mean(rows)
    for _ in range(8):
        distances = [
            length([f32(value - middle) for value, middle in zip(row, centre, strict=True)]) for row in rows
        ]
        least = max(1e-6 * sorted(distances)[(len(rows) - 1) // 2], 2.0**-100)
        weights = [1.0 / max(distance, least) for distance in distances]
        for at in range(len(centre)):
            total = 0.0
            for row, weight in zip(rows, weights, strict=True):
                total += row[at] * weight
            centre[at] = settle_zero(f32(total / math.fsum(weights)))
    return centre


ROBUST_RULES = {"trimmed mean": trimmed_mean, "CenteredClip": centered_clip, "geometric median": geometric_median}
ROBUST_CASES = {"one": [1], "four": [1, 1, -8, 2], "nine and two far away": [1, 1, 1, 1, 1, 1, 1, -10, 1e6]}


def write() -> None:
    codec = {
        name: {"vector": pack(vector), "chunk": chunk, "k": k, "payload": encode(vector, chunk, k).hex()}
        for name, (vector, chunk, k) in CODEC_CASES.items()
    }
    codec |= {
        name: {
            "vector": pack(vector), "chunk": chunk, "k": chunk, "is_dense": True,
            "payload": encode_dense(vector, chunk).hex(),
        }
        for name, (vector, chunk) in DENSE_CASES.items()
    }  # fmt: skip
    folds = {}
    for name, (weights, rule) in FOLD_CASES.items():
        checkpoint = noise("checkpoint", 150)
        vectors = [[f32(v * (1 + 3 * (i % 3))) for v in noise(f"{name} {i}", 150)] for i in range(len(weights))]
        inputs = list(zip(vectors, weights, strict=True))
        is_dense = rule.get("is_dense", False)
        payloads = [encode_dense(v, 64) if is_dense else encode(v, 64, 9) for v, _ in inputs]
        folds[name] = {
            "rule": {key: value for key, value in rule.items() if key != "is_dense"},
            "chunk": 64,
            "k": 64 if is_dense else 9,
            "is_dense": is_dense,
            "checkpoint": pack(checkpoint),
            "inputs": [{"payload": p.hex(), "weight": w} for p, (_, w) in zip(payloads, inputs, strict=True)],
            "result": pack(fold(checkpoint, inputs, 64, 9, **rule)),
        }
    robust = {}
    for rule, compute in ROBUST_RULES.items():
        for name, gains in ROBUST_CASES.items():
            rows = [[f32(gain * v) for v in noise(f"robust {i}", 40)] for i, gain in enumerate(gains)]
            rows.sort(key=lambda row: bytes.fromhex(pack(row)))
            robust[f"{rule}, {name}"] = {
                "rule": rule, "vectors": [pack(row) for row in reversed(rows)], "result": pack(compute(rows)),
            }  # fmt: skip
    for name, cases in (("codec", codec), ("fold", folds), ("robust", robust)):
        (HERE / f"{name}.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    write()
