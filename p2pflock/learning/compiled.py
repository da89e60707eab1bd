"""Whether the compiled loops of kernels.py stand in for the numpy code of codec.py and fold.py.

Law: the numpy code is the definition, and it alone is needed; the compiled loops give the same bits or are not
used.  They are used for large vectors where numba is installed (the extra `fast`), after they have reproduced
known answers in this very process: a peer whose compiler is wrong is slow, not split from the swarm.

numba keeps what it compiled beside this file or in the user's cache folder, as Python keeps its bytecode; the
first use on a machine compiles for some seconds.  NUMBA_DISABLE_JIT=1, numba's own switch, turns them off.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Literal

import numpy as np

# Below this many parameters numpy takes milliseconds, and loading numba would cost more than it ever saves.
FROM_PARAMETERS = 1 << 20
KNOWN_ANSWER = "0f7bc0cf9dffe7713cdcb1e2cb9c2893f60a426a65faf65a9ee73cfe4751c3d4"

Choice = Literal["by size", "always", "never"]
_choice: Choice = "by size"
_log = logging.getLogger(__name__)


def find(parameters: int) -> ModuleType | None:
    """The module kernels for a vector of this length, or None: then numpy does it."""
    if _choice == "never" or (_choice == "by size" and parameters < FROM_PARAMETERS):
        return None
    return _load()


@contextmanager
def choose(choice: Choice) -> Iterator[None]:
    """Tests and measurements choose for themselves; "always" still means numpy where numba does not work."""
    global _choice  # noqa: PLW0603 - one setting of the process
    before, _choice = _choice, choice
    try:
        yield
    finally:
        _choice = before


@functools.cache
def _load() -> ModuleType | None:
    try:
        import numba

        if vars(numba.config)["DISABLE_JIT"]:
            return None
        from p2pflock.learning import kernels
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - whatever a compiler dies of, numpy works
        _log.warning("numba does not compile here, the codec runs on numpy: %s", error)
        return None
    answer = compute_answer(kernels)
    if answer != KNOWN_ANSWER:
        _log.warning("numba computes something else here (%s), the codec runs on numpy", answer[:16])
        return None
    return kernels


def compute_answer(kernels: ModuleType) -> str:
    """SHA-256 over everything the kernels make of one fixed input: products, sums and quotients that round."""
    chunk, size = 64, 200
    grid = np.arange(1, size + 1, dtype=np.int64) * 2654435761 % 16777213
    vector = ((grid - 8388606).astype(np.float32) / np.float32(12582911)).astype(np.float32)
    shares = np.array([9, 9, 9, 2])
    lengths = np.array([64, 64, 64, 8])
    positions, levels = np.empty(29, np.int64), np.empty(29, np.int8)
    counts, lows, sums = np.empty(4, np.int64), np.empty(4, np.int64), np.empty((4, 2))
    kernels.pick(vector, chunk, shares, positions, levels, counts, sums, lows)
    widths = np.array([1, 1, 1, 1])
    unary, remainders, values = (np.zeros(length, np.uint8) for length in (64, 4, 8))
    used = kernels.pack(counts, widths, lengths, chunk, positions, levels, unary, remainders, values)
    back, signs = np.empty_like(positions), np.empty_like(levels)
    padded = [np.append(stream, np.zeros(kernels.PADDING, np.uint8)) for stream in (unary[:used], remainders, values)]
    status = kernels.unpack(counts, widths, lengths, chunk, *padded, back, signs)
    squares = np.empty(4, np.int64)
    kernels.sum_squares(signs, counts, squares)
    # Three payloads: this one, one at other positions, this one again.
    positions = np.concatenate((back, (size - 1) - back[::-1], back))
    weights = np.array([3, 5, 7])
    terms = np.outer(np.repeat(weights / 9, 4).astype(np.float32), np.arange(-3, 4, dtype=np.float32))
    total, square_sums, tiny = np.zeros(size, np.float32), np.zeros((2, 256), np.int64), np.float32(2.0**-100)
    folded = kernels.combine(
        total, 0, positions, np.tile(signs, 3), np.arange(4) * len(back), np.full(3, chunk), np.arange(3) * 4,
        weights, terms, 15, 4, np.float32(1.1), tiny, square_sums,
    )  # fmt: skip
    kernels.subtract(vector, total, np.float32(1 / 3), tiny)
    digest = hashlib.sha256(f"{used} {status} {folded}".encode())
    for made in (positions, levels, counts, sums, lows, unary, remainders, values, back, squares, total, square_sums):
        digest.update(np.ascontiguousarray(made).astype(made.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()
