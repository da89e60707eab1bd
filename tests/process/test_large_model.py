"""Ten million parameters through a real learning process: every frame, bound and block on a payload's way."""

from __future__ import annotations

from pathlib import Path

import trio

from p2pflock.learning import codec
from p2pflock.learning.client import TrainerProcess
from p2pflock.learning.codec import Shape
from p2pflock.learning.spec import parse_spec
from p2pflock.ports import FoldInput
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID
from p2pflock.protocol.messages import MAX_PAYLOAD_BYTES

MNIST = (Path(codec.__file__).parent / "tasks" / "mnist.toml").read_text()
SEED = bytes(32)


def build_spec():
    text = MNIST.replace('build_model"', 'build_model"\narguments = { hidden = 6400 }', 1)
    for old, new in (("steps = 60", "steps = 1"), ("k = 128", "k = 64"), ("start_rounds = 5", "start_rounds = 1")):
        assert old in text
        text = text.replace(old, new)
    return parse_spec(text)


def test_ten_million_parameters():
    async def main():
        async with trio.open_nursery() as nursery:
            trainer = await TrainerProcess.start(nursery, build_spec())
            try:
                with trio.fail_after(120):
                    await follow(trainer)
            finally:
                await trainer.aclose()

    trio.run(main)


async def follow(trainer):
    genesis = await trainer.open()
    assert genesis.parameters > 10_000_000
    weights = await trainer.export()
    assert len(weights) > 4 * genesis.parameters
    for round_, k in ((1, 1024), (2, 64)):
        result = await trainer.train(round_, 0, 1, SEED)
        shape = Shape(genesis.parameters, 4096, k)
        assert len(result.payload) <= shape.max_bytes() <= MAX_PAYLOAD_BYTES
        assert len(codec.decode(result.payload, shape).indices) > 0
        blocks: dict[CID, bytes] = {}
        root = unixfs.build(unixfs.chunked(result.payload), blocks.__setitem__)
        assert b"".join(unixfs.assemble(root, blocks.__getitem__, max_bytes=MAX_PAYLOAD_BYTES)) == result.payload
        # Eight of them in one frame, as in a round of eight peers.
        folded = await trainer.fold(round_, [FoldInput(result.payload, weight) for weight in range(1, 9)])
        await trainer.adopt(folded.model_hash)
    assert 4 * genesis.parameters > 190 * len(result.payload)
    assert await trainer.load(weights) == genesis.model_hash
