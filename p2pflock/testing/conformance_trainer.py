"""What every implementation of ports.Trainer must do; one suite over FakeTrainer and TrainerProcess.

Law: each check takes two open trainers of one gossip task, two peers, that stand at genesis, and asserts one
promise.  `CHECKS` lists them; `run` puts both back to genesis first, so that two expensive trainers serve all
checks.  Trainers of a dense task go through `check_dense`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import trio

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.ports import FoldInput, FoldResult, Trainer, TrainResult
from p2pflock.primitives import unixfs

SEED = hashlib.sha256(b"trainer conformance").digest()
SHARDS = 4
MICRO = 1_000_000

Check = Callable[[Trainer, Trainer], Awaitable[None]]


async def _raises(error: type[Exception], call: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
    try:
        await call(*arguments)
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


async def _hash(trainer: Trainer) -> bytes:
    return hashlib.sha256(await trainer.export()).digest()


async def _payloads(trainer: Trainer, round_: int, shards: Sequence[int]) -> list[bytes]:
    """Payloads of several shards from one trainer, sorted by digest."""
    results = [await trainer.train(round_, shard, SHARDS, SEED) for shard in shards]
    return sorted((result.payload for result in results), key=lambda payload: hashlib.sha256(payload).digest())


async def _advance(trainers: Sequence[Trainer], round_: int) -> FoldResult:
    """One honest round of two peers."""
    payloads = sorted([(await t.train(round_, i, len(trainers), SEED)).payload for i, t in enumerate(trainers)])
    results = [await trainer.fold(round_, [FoldInput(p, 40) for p in payloads]) for trainer in trainers]
    assert results.count(results[0]) == len(results)
    for trainer in trainers:
        await trainer.adopt(results[0].model_hash)
    return results[0]


async def check_genesis_is_the_same_everywhere(a: Trainer, b: Trainer) -> None:
    genesis = await a.open()
    assert await b.open() == genesis
    weights = await a.export()
    assert hashlib.sha256(weights).digest() == genesis.model_hash
    assert unixfs.compute_cid(weights) == genesis.weights
    assert genesis.parameters * 4 < len(weights)


async def check_open_again_changes_nothing(a: Trainer, b: Trainer) -> None:
    await _advance([a, b], 1)
    before = await _hash(a)
    assert (await a.open()).model_hash != before
    assert await _hash(a) == before


async def check_training_is_a_function_of_its_arguments(a: Trainer, b: Trainer) -> None:
    before = await _hash(a)
    first = await a.train(1, 0, SHARDS, SEED)
    assert await a.train(1, 0, SHARDS, SEED) == first  # the same slot again: no second payload for it
    assert await b.train(1, 0, SHARDS, SEED) == first
    assert await _hash(a) == before
    assert first.steps > 0
    assert first.samples >= first.steps
    assert len(first.leaf_root) == len(first.optimizer_hash) == 32
    others = [
        await b.train(1, 1, SHARDS, SEED),
        await b.train(1, 0, SHARDS, hashlib.sha256(SEED).digest()),
        await b.train(2, 0, SHARDS, SEED),
    ]
    assert first.payload not in [other.payload for other in others]


async def check_repeating_a_round_does_not_use_up_state(a: Trainer, b: Trainer) -> None:
    """Optimizer and error feedback after a repeated round are those after a single one."""
    for _ in range(3):
        await a.train(1, 0, SHARDS, SEED)
    await b.train(1, 0, SHARDS, SEED)
    assert await a.train(2, 0, SHARDS, SEED) == await b.train(2, 0, SHARDS, SEED)


async def check_cancelled_training_leaves_no_trace(a: Trainer, b: Trainer) -> None:
    """Weights, optimizer and error feedback are as before, so the next attempt gives what an undisturbed peer
    gives."""
    for trainer in (a, b):
        await trainer.train(1, 0, SHARDS, SEED)
    before = await _hash(a)
    for delay in (0.0, 0.001, 0.003, 0.02):
        with trio.move_on_after(delay):
            await a.train(2, 1, SHARDS, SEED)
            await trio.sleep_forever()
    assert await _hash(a) == before
    assert await a.train(2, 0, SHARDS, SEED) == await b.train(2, 0, SHARDS, SEED)


async def check_fewer_steps_are_the_beginning_of_more(a: Trainer, b: Trainer) -> None:
    whole = await a.train(1, 0, SHARDS, SEED)
    assert await b.train(1, 0, SHARDS, SEED, whole.steps) == whole
    part = await b.train(1, 0, SHARDS, SEED, whole.steps - 1)
    assert (part.steps, part.samples) == (whole.steps - 1, whole.samples // whole.steps * (whole.steps - 1))
    assert part.leaf_root != whole.leaf_root
    assert part.optimizer_hash != whole.optimizer_hash
    for steps in (-1, 1 << 20):
        await _raises(LocalProtocolError, b.train, 1, 0, SHARDS, SEED, steps)


async def check_finished_training_is_as_good_as_one_of_so_many_steps(a: Trainer, b: Trainer) -> None:
    """What was made counts, whenever the word comes: payload, hashes and the state for the next round."""
    await a.finish()  # nothing is under way: nobody is told
    full = (await a.train(1, 0, SHARDS, SEED)).steps
    for round_ in (2, 3, 4):
        results: list[TrainResult] = []

        async def train(round_: int = round_, results: list[TrainResult] = results) -> None:
            results.append(await a.train(round_, 0, SHARDS, SEED))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(train)
            for _ in range(round_):  # a little later each time; the training may be over by then
                await trio.lowlevel.checkpoint()
            await a.finish()
        assert 1 <= results[0].steps <= full
        fresh = await a.train(round_, 0, SHARDS, SEED, results[0].steps)
        assert fresh == results[0]
    assert (await a.train(5, 0, SHARDS, SEED)).steps == full


async def check_scores_tell_honest_from_opposed(a: Trainer, b: Trainer) -> None:
    (payload,) = await _payloads(a, 1, [0])
    mine, again = await a.score(1, [payload, payload], SEED)
    assert mine == again
    assert mine.is_valid
    assert 0 < mine.cosine_micro <= MICRO  # at genesis any honest step points downhill
    assert mine.loss_delta_micro < 0
    assert [mine] == list(await b.score(1, [payload], SEED))
    assert list(await a.score(1, [], SEED)) == []


async def check_score_and_fold_agree_on_validity(a: Trainer, b: Trainer) -> None:
    before = await _hash(a)
    (payload,) = await _payloads(a, 1, [0])
    damaged = bytearray(payload)
    damaged[0] ^= 1
    suspects = [payload, b"", b"\0" * 64, payload[:-1], payload + b"\0", bytes(damaged), b"\xff" * (1 << 20)]
    scores = await a.score(1, suspects, SEED)
    assert [score.is_valid for score in scores] == [True] + [False] * 6
    assert all(score.cosine_micro == score.loss_delta_micro == 0 for score in scores[1:])
    for suspect in suspects[1:]:
        await _raises(InvalidMessageError, a.fold, 1, [FoldInput(payload, 1), FoldInput(suspect, 1)])
    # The dense start is over: the density of round 1 is refused later, by both.
    assert not (await a.score(1_000_000, [payload], SEED))[0].is_valid
    await _raises(InvalidMessageError, a.fold, 1_000_000, [FoldInput(payload, 1)])
    assert await _hash(a) == before


async def check_fold_is_the_same_everywhere(a: Trainer, b: Trainer) -> None:
    payloads = await _payloads(a, 1, range(SHARDS))
    inputs = [FoldInput(payload, 10 + number) for number, payload in enumerate(payloads)]
    result = await a.fold(1, inputs)
    assert await b.fold(1, inputs) == result
    assert await a.fold(1, inputs) == result
    assert await a.fold(1, [replace(entry, weight=entry.weight + 1) for entry in inputs[:2]]) != result
    genesis = await a.open()
    assert (await a.fold(1, [])).model_hash == genesis.model_hash


async def check_nothing_changes_until_adopted(a: Trainer, b: Trainer) -> None:
    genesis = (await a.open()).model_hash
    payloads = await _payloads(b, 1, [0, 1])
    one = await a.fold(1, [FoldInput(payloads[0], 1)])
    both = await a.fold(1, [FoldInput(payload, 1) for payload in payloads])
    assert await _hash(a) == genesis
    await _raises(LocalProtocolError, a.adopt, bytes(32))
    assert await _hash(a) == genesis
    await a.adopt(one.model_hash)  # an earlier view's record may win
    weights = await a.export()
    assert hashlib.sha256(weights).digest() == one.model_hash
    assert unixfs.compute_cid(weights) == one.weights
    await a.adopt(one.model_hash)  # again is no error
    await _raises(LocalProtocolError, a.adopt, both.model_hash)  # it was a fold over the old parent


async def check_load_takes_only_this_models_weights(a: Trainer, b: Trainer) -> None:
    genesis = await a.open()
    weights = await a.export()
    await _advance([a, b], 1)
    before = await _hash(a)
    nan = np.float32("nan").tobytes()
    for bad in (b"", weights[:-4], weights + b"\0", b"\x01" + weights[1:], weights[:-4] + nan, bytes(len(weights))):
        await _raises(InvalidMessageError, a.load, bad)
    assert await _hash(a) == before
    assert await a.load(weights) == genesis.model_hash
    assert await a.export() == weights


async def check_it_learns(a: Trainer, b: Trainer) -> None:
    before = await a.evaluate()
    assert before.samples > 0
    for round_ in range(1, 6):
        await _advance([a, b], round_)
    after = await a.evaluate()
    assert after == await b.evaluate()
    assert after.loss_micro < before.loss_micro
    assert 0 <= after.accuracy_micro <= MICRO
    assert isinstance(await a.sample(8), str)


CHECKS: tuple[Check, ...] = (
    check_genesis_is_the_same_everywhere,
    check_open_again_changes_nothing,
    check_training_is_a_function_of_its_arguments,
    check_repeating_a_round_does_not_use_up_state,
    check_cancelled_training_leaves_no_trace,
    check_fewer_steps_are_the_beginning_of_more,
    check_finished_training_is_as_good_as_one_of_so_many_steps,
    check_scores_tell_honest_from_opposed,
    check_score_and_fold_agree_on_validity,
    check_fold_is_the_same_everywhere,
    check_nothing_changes_until_adopted,
    check_load_takes_only_this_models_weights,
    check_it_learns,
)


async def check_dense(a: Trainer, b: Trainer) -> None:
    """Two trainers of a task with averaging = "dense": vectors out, a mean vector in."""
    genesis = await a.open()
    vectors = [(await trainer.train(1, shard, 2, SEED)).payload for shard, trainer in enumerate((a, b))]
    assert [len(vector) for vector in vectors] == [4 * genesis.parameters] * 2
    mean = np.mean([np.frombuffer(vector, "<f4") for vector in vectors], axis=0).astype("<f4")
    before = await a.evaluate()
    results = [await trainer.set_dense(mean.tobytes()) for trainer in (a, b)]
    assert results[0] == results[1]
    assert await _hash(a) == genesis.model_hash
    await a.adopt(results[0].model_hash)
    assert await _hash(a) == results[0].model_hash
    assert (await a.evaluate()).loss_micro < before.loss_micro
    assert (await a.set_dense(bytes(len(mean.tobytes())))).model_hash == results[0].model_hash
    for bad in (b"", mean.tobytes()[:-1], np.full_like(mean, np.inf).tobytes()):
        await _raises(InvalidMessageError, a.set_dense, bad)
        assert not (await a.score(1, [bad], SEED))[0].is_valid
    await _raises(LocalProtocolError, a.fold, 1, [FoldInput(vectors[0], 1)])


async def run(check: Check, a: Trainer, b: Trainer, genesis: bytes) -> None:
    """One check from `genesis` weights on."""
    for trainer in (a, b):
        await trainer.load(genesis)
    await check(a, b)
