from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.learning import codec
from p2pflock.learning.codec import Shape
from p2pflock.learning.fold import FoldRule, Weighted, compute_median_norm, fold
from p2pflock.primitives.cid import CID

PATH = Path(__file__).parents[2] / "vectors" / "fold.json"
VECTORS = json.loads(PATH.read_text())
SHAPE = Shape(500, 128, 40)


def draw(seed, size=SHAPE.parameters, gain=1.0):
    return (np.random.default_rng(seed).standard_normal(size) * gain).astype(np.float32)


def payload(seed, gain=1.0):
    return codec.compress(draw(seed, gain=gain), SHAPE)


def sha(vector):
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def run_case(case):
    checkpoint = np.frombuffer(bytes.fromhex(case["checkpoint"]), "<f4").astype(np.float32)
    shape = Shape(len(checkpoint), case["chunk"], case["k"], case.get("is_dense", False))
    inputs = [
        Weighted(codec.decode(bytes.fromhex(line["payload"]), shape), line["weight"]) for line in case["inputs"]
    ]
    return fold(FoldRule(**case["rule"]), checkpoint, inputs).astype("<f4").tobytes().hex()


@pytest.mark.parametrize("name", VECTORS)
def test_vectors(name):
    assert run_case(VECTORS[name]) == VECTORS[name]["result"]


def test_sorted_input_gives_one_hash_and_a_wrong_order_another():
    encoded = [codec.encode(payload(seed)) for seed in range(6)]
    canonical = sorted(encoded, key=CID.of_raw)
    expected = None
    others = set()
    for order in itertools.islice(itertools.permutations(encoded), 0, 720, 61):
        ordered = sorted(order, key=CID.of_raw)
        result = sha(fold(FoldRule(), draw(99), [Weighted(codec.decode(p, SHAPE), 7) for p in ordered]))
        expected = expected or result
        assert result == expected
        if list(order) != canonical:
            unsorted = [Weighted(codec.decode(p, SHAPE), 7) for p in order]
            others.add(sha(fold(FoldRule(), draw(99), unsorted)))
    assert others - {expected}  # order does matter: the fold is no bag


def test_same_bits_with_any_number_of_threads_and_flushed_subnormals():
    """numpy alone is enough for the fold; torch's thread pool and denormal flag must not reach it."""
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from test_fold import VECTORS, run_case\n"
        "for threads, is_flushed in ((1, False), (2, True), (7, False)):\n"
        "    torch.set_num_threads(threads); torch.set_flush_denormal(is_flushed)\n"
        "    assert all(run_case(c) == c['result'] for c in VECTORS.values())"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        check=True,
        timeout=120,
        env={"PYTHONPATH": str(PATH.parents[2]), "PATH": ""},
    )


def test_nobody_gives_the_same_checkpoint_and_a_copy():
    before = draw(1)
    after = fold(FoldRule(), before, [])
    assert np.array_equal(after, before)
    assert after is not before


def test_one_peer_is_followed_exactly():
    one = payload(1)
    after = fold(FoldRule(), np.zeros(500, np.float32), [Weighted(one, 5)])
    assert np.allclose(-after[one.indices], one.values(), rtol=1e-6)
    assert np.count_nonzero(after) == len(one.indices)


def test_a_lone_sender_does_not_own_a_coordinate():
    """Sparse-coordinate hijack: eight peers, one coordinate that only the attacker sends."""
    values = draw(0)
    values[:128] = 0
    honest = codec.compress(values, SHAPE)
    hijack = np.zeros(500, np.float32)
    hijack[7] = 1
    attack = codec.compress(hijack, SHAPE)
    after = fold(FoldRule(), np.zeros(500, np.float32), [*([Weighted(honest, 1)] * 7), Weighted(attack, 1)])
    assert after[7] == pytest.approx(-1 / 2)  # 1 / max(1, 8 / 4)


def test_a_large_payload_is_clipped_to_the_median():
    inputs = [Weighted(payload(seed), 1) for seed in range(4)]
    shouting = Weighted(payload(0, gain=1000), 1)
    moved = fold(FoldRule(), np.zeros(500, np.float32), [shouting, *inputs[1:]])
    assert float(np.linalg.norm(moved)) <= 2.001 * max(entry.payload.norm() for entry in inputs)


def test_empty_payloads_do_not_clip_the_others_away():
    empty = codec.compress(np.zeros(500, np.float32), SHAPE)
    inputs = [Weighted(empty, 1), Weighted(empty, 1), Weighted(payload(1), 1)]
    assert np.count_nonzero(fold(FoldRule(), np.zeros(500, np.float32), inputs)) == len(payload(1).indices)


def test_median_is_the_lower_middle_of_the_positive():
    assert compute_median_norm([4.0, 1.0, 3.0, 2.0]) == 2.0
    assert compute_median_norm([0.0, 0.0, 5.0]) == 5.0
    assert compute_median_norm([]) == compute_median_norm([0.0]) == 0.0


def test_update_norm_is_bounded():
    inputs = [Weighted(payload(seed), 1) for seed in range(5)]
    rule = FoldRule(gain=4.0, norm_bound=1.0)
    moved = fold(rule, np.zeros(500, np.float32), inputs)
    median = compute_median_norm([entry.payload.norm() for entry in inputs])
    assert math.isclose(float(np.linalg.norm(moved.astype(np.float64))), median, rel_tol=1e-5)


def test_no_subnormal_survives():
    tiny = codec.compress(np.full(500, 2.0**-58, np.float32), SHAPE)
    before = np.full(500, 1e-41, np.float32)
    after = fold(FoldRule(), before, [Weighted(tiny, 1), Weighted(payload(0), 1 << 40)])
    assert not np.any((after != 0) & (np.abs(after) < np.finfo(np.float32).tiny))


@pytest.mark.parametrize("weight", [0, -1, (1 << 40) + 1])
def test_refuses_weights_out_of_bounds(weight):
    with pytest.raises(LocalProtocolError):
        fold(FoldRule(), draw(0), [Weighted(payload(0), weight)])


def test_refuses_another_models_payload_and_too_many():
    with pytest.raises(LocalProtocolError):
        fold(FoldRule(), draw(0)[:-1], [Weighted(payload(0), 1)])
    with pytest.raises(LocalProtocolError):
        fold(FoldRule(), draw(0), [Weighted(payload(0), 1)] * 4097)


def test_a_result_that_is_not_finite_is_refused():
    largest = np.full(500, np.finfo(np.float32).max, np.float32)
    inputs = [Weighted(codec.compress(np.full(500, -(2.0**22), np.float32), SHAPE), 1)]
    assert np.isfinite(fold(FoldRule(), largest, inputs)).all()  # far too small to overflow
    largest[3] = np.inf
    with pytest.raises(InvalidMessageError):
        fold(FoldRule(), largest, inputs)
