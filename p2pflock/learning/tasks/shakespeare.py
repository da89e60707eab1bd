"""Shakespeare's plays, byte by byte: a small GPT that predicts the next byte.

Law: the texts are those of learning/data.py, in the order of their names, checked by sha256.  A sample is one
block of bytes; blocks are cut without overlap, so shards share no text.  The last twentieth of every text is
not trained on: half of it is the public pool, half the test set.
The model follows nanoGPT (github.com/karpathy/nanoGPT, CPU configuration), with learned positions and tied
weights; biases are left out, as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from p2pflock.errors import SpecError
from p2pflock.learning import data
from p2pflock.learning.dataset import Split
from p2pflock.learning.network import initialise

VOCABULARY = 128  # the texts are ASCII; other bytes become spaces


class Block(nn.Module):
    """Pre-norm attention and feed-forward: (batch, time, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            part.view(batch, time, self.heads, width // self.heads).transpose(1, 2)  # (batch, heads, time, ...)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class ByteGPT(nn.Module):
    """(batch, time) bytes -> (batch, time, VOCABULARY) logits of the next byte."""

    def __init__(self, layers: int, heads: int, width: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(block, width)
        self.layers = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.bytes.weight)


def build_model(layers: int = 4, heads: int = 4, width: int = 128, block: int = 64) -> nn.Module:
    if width % heads:
        raise SpecError(f"width = {width} is not a multiple of heads = {heads}", "change one of them")
    model = ByteGPT(layers, heads, width, block)

    def bound(name: str, parameter: Tensor) -> float | None:
        if "norm" in name:
            return None
        # GPT-2: standard deviation 0.02, less on the way into the residual stream; uniform has b / sqrt(3).
        narrow = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1.0
        return 0.02 * math.sqrt(3) / narrow

    initialise(model, bound)
    return model


class Blocks:
    """Dataset of non-overlapping blocks; a target is the block one byte on."""

    def __init__(self, splits: dict[str, np.ndarray[tuple[int], np.dtype[np.uint8]]], block: int) -> None:
        self._block = block
        self._texts = {name: torch.from_numpy(text.astype(np.int64)) for name, text in splits.items()}

    def size(self, split: Split) -> int:
        return (len(self._texts[split]) - 1) // self._block

    def batch(self, split: Split, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        text = self._texts[split]
        starts = torch.tensor(list(indices)) * self._block
        places = starts[:, None] + torch.arange(self._block)  # (batch, block)
        return text[places], text[places + 1]


def load_data(block: int = 64, test_blocks: int = 1000) -> Blocks:
    """Raises MissingToolError when the texts are not there and cannot be fetched."""
    train, public, test = [], [], []
    for _, raw in sorted(data.ensure("shakespeare").items()):
        text = np.frombuffer(raw.replace(b"\r\n", b"\n"), np.uint8).copy()
        text[text >= VOCABULARY] = ord(" ")
        held_out = len(text) // 20
        train.append(text[: len(text) - held_out])
        public.append(text[len(text) - held_out : len(text) - held_out // 2])
        test.append(text[len(text) - held_out // 2 :])
    return Blocks(
        {
            "train": np.concatenate(train),
            "public": np.concatenate(public),
            "test": np.concatenate(test)[: test_blocks * block + 1],
        },
        block,
    )


def sample(model: nn.Module, length: int, prompt: str = "\n", temperature: float = 0.8) -> str:
    """Text from a fixed seed, so that the same weights say the same thing."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.tensor([list(prompt.encode())])
    block = int(model.block)  # type: ignore[arg-type]
    for _ in range(length):
        logits = model(tokens[:, -block:])[0, -1] / temperature
        following = torch.multinomial(F.softmax(logits, -1), 1, generator=draw)
        tokens = torch.cat((tokens, following[None]), 1)
    return bytes(tokens[0, len(prompt) :].tolist()).decode("ascii")
