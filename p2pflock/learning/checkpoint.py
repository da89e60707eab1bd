"""A checkpoint: the model's parameters as one vector, and as one canonical safetensors file.

Law: a model's layout (names, shapes) and a vector determine the file's bytes, and the file's bytes are the
checkpoint: model_hash is their sha256, weights their UnixFS CID.  Loading compares the header byte for byte
with the one this layout would write, so no foreign header is ever parsed.

Canonical form: float32 only, names in code point order, no metadata, compact JSON, header padded with spaces
to a multiple of 8 (as the safetensors library pads), data in the order of names without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID

F32 = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each tensor lies in the vector: sorted by name, without gaps."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Layout:
        return cls(tuple(Tensor(name, tuple(shapes[name])) for name in sorted(shapes)))

    @property
    def parameters(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    def header(self) -> bytes:
        """Length prefix and JSON header of the safetensors file."""
        entries: dict[str, object] = {}
        begin = 0
        for tensor in self.tensors:
            end = begin + 4 * tensor.size
            entries[tensor.name] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            begin = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def split(self, vector: F32) -> dict[str, F32]:
        """Views of `vector` (parameters,) by name, each in its tensor's shape."""
        views: dict[str, F32] = {}
        at = 0
        for tensor in self.tensors:
            views[tensor.name] = vector[at : at + tensor.size].reshape(tensor.shape)
            at += tensor.size
        return views


def to_bytes(layout: Layout, vector: F32) -> bytes:
    """Canonical safetensors bytes.  Raises LocalProtocolError for another length or type."""
    if vector.shape != (layout.parameters,) or vector.dtype != np.float32:
        raise LocalProtocolError(f"checkpoint: expected {layout.parameters} float32, got {vector.shape}")
    return layout.header() + vector.astype("<f4", copy=False).tobytes()


def from_bytes(layout: Layout, data: bytes) -> F32:
    """The vector in canonical safetensors bytes; a copy.  Raises InvalidMessageError for anything else."""
    header = layout.header()
    if len(data) != len(header) + 4 * layout.parameters:
        raise InvalidMessageError(f"weights: {len(data)} bytes do not fit this model")
    if data[: len(header)] != header:
        raise InvalidMessageError("weights: other names, shapes or types than this model's, or not canonical")
    vector = np.frombuffer(data, "<f4", offset=len(header)).astype(np.float32)
    if not np.isfinite(vector).all():
        raise InvalidMessageError("weights: not finite")
    return vector


def compute_model_hash(data: bytes) -> bytes:
    """32 bytes, of canonical safetensors bytes."""
    return hashlib.sha256(data).digest()


def compute_weights_cid(data: bytes) -> CID:
    return unixfs.compute_cid(data)
