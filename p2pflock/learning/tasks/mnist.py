"""Handwritten digits: the 60,000 + 10,000 images of MNIST and a small convolutional network.

Law: the images are the original idx files (learning/data.py checks their sha256).  2,000 of the training images,
the same for everyone, are the public pool that validators score with; the others are cut into shards.
Source: http://yann.lecun.com/exdb/mnist (format).
"""

from __future__ import annotations

import math
import struct

import numpy as np
import torch
from torch import Tensor, nn

from p2pflock.errors import MissingToolError
from p2pflock.learning import data
from p2pflock.learning.dataset import TensorDataset
from p2pflock.learning.network import initialise

MEAN, STD = 0.1307, 0.3081  # of the training images, in [0, 1]


def build_model(channels: int = 16, hidden: int = 64) -> nn.Module:
    """(batch, 1, 28, 28) -> (batch, 10) logits."""
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1),  # 14 x 14
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),  # 7 x 7
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 49, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )

    def bound(name: str, parameter: Tensor) -> float | None:
        # He: variance 2 / fan in; a uniform range of half width b has variance b^2 / 3.
        return 0.0 if parameter.dim() == 1 else math.sqrt(6 / parameter[0].numel())

    initialise(model, bound)
    return model


def load_data(public: int = 2000) -> TensorDataset:
    """Raises MissingToolError when the files are not there and cannot be fetched."""
    files = data.ensure("mnist")
    return TensorDataset(
        train=_read(files["train-images-idx3-ubyte"], files["train-labels-idx1-ubyte"]),
        test=_read(files["t10k-images-idx3-ubyte"], files["t10k-labels-idx1-ubyte"]),
        public=public,
    )


def _read(image_bytes: bytes, label_bytes: bytes) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) float32, labels (n,) int64."""
    magic, count, rows, columns = struct.unpack_from(">IIII", image_bytes)
    label_magic, label_count = struct.unpack_from(">II", label_bytes)
    if (magic, label_magic, rows, columns) != (2051, 2049, 28, 28) or count != label_count:
        raise MissingToolError("the MNIST files are damaged", "fetch them again")
    pixels = np.frombuffer(image_bytes, np.uint8, offset=16).reshape(count, 1, 28, 28)
    images = (pixels.astype(np.float32) / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    labels = np.frombuffer(label_bytes, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(images), torch.from_numpy(labels)
