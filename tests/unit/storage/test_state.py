from __future__ import annotations

from pathlib import Path

import pytest

from p2pflock.errors import DiskFullError, EnvironmentError_
from p2pflock.primitives.cid import CID
from p2pflock.storage import durable
from p2pflock.storage.state import StateFile

VALUES = {"head": CID.of_raw(b"x"), "round": 7, "digest": bytes(32), "task": None, "peers": ["a", b"b"]}


def test_values_come_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state"
    StateFile.open(path).update(VALUES)
    again = StateFile.open(path)
    assert again.snapshot() == {k: v for k, v in VALUES.items() if v is not None}
    again.update({"round": 8, "head": None})
    assert StateFile.open(path).snapshot() == {"round": 8, "digest": bytes(32), "peers": ["a", b"b"]}
    assert StateFile.open(path).get("head", b"none") == b"none"


def test_every_flipped_byte_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state"
    StateFile.open(path).update(VALUES)
    data = path.read_bytes()
    for offset in range(len(data)):
        for damaged in (data[:offset], data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(EnvironmentError_, match="damaged"):
                StateFile.open(path)


def test_failed_write_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    state = StateFile.open(path)
    state.update({"round": 1})

    def full(handle: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "write", full)
    with pytest.raises(DiskFullError) as caught:
        state.update({"round": 2})
    assert caught.value.hint
    assert state.get("round") == 1
    assert StateFile.open(path).get("round") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_unreadable_path_is_ours_to_explain(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_):
        StateFile.open(tmp_path)
