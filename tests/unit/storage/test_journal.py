from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pflock.errors import DiskFullError, EnvironmentError_, LocalProtocolError
from p2pflock.storage import durable, journal
from p2pflock.storage.journal import Entry, VoteJournal

ENTRIES = [
    Entry(1, "prevote", b"one"),
    Entry(1, "precommit", b""),
    Entry(2, "prevote", bytes(range(256))),
    Entry(3, "lock", b"\x00" * 40),
]


def write(path: Path, entries: list[Entry]) -> None:
    with VoteJournal.open(path) as file:
        for entry in entries:
            file.append(entry.kind, entry.body, round_=entry.round)


def read(path: Path) -> list[Entry]:
    with VoteJournal.open(path) as file:
        return list(file.replay())


def test_replay_gives_what_was_appended(tmp_path: Path) -> None:
    path = tmp_path / "node" / "votes"
    write(path, ENTRIES[:2])
    write(path, ENTRIES[2:])
    assert read(path) == ENTRIES


def test_append_is_synced_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with VoteJournal.open(tmp_path / "votes") as file:
        seen: list[int] = []
        real = os.fsync

        def fsync(handle: int) -> None:
            seen.append(os.fstat(handle).st_size)
            real(handle)

        monkeypatch.setattr(journal.os, "fsync", fsync)
        file.append("prevote", b"body", round_=1)
        assert seen == [file.size_bytes]


def test_torn_tail_of_every_length_is_cut_and_whole_entries_stay(tmp_path: Path) -> None:
    path = tmp_path / "votes"
    ends = [journal._START]
    with VoteJournal.open(path) as file:
        for entry in ENTRIES:
            file.append(entry.kind, entry.body, round_=entry.round)
            ends.append(file.size_bytes)
    data = path.read_bytes()
    torn = tmp_path / "torn"
    for size in range(journal._START, len(data) + 1):
        torn.write_bytes(data[:size])
        whole = sum(end <= size for end in ends) - 1
        assert read(torn) == ENTRIES[:whole]
        assert torn.stat().st_size == ends[whole]
        write(torn, [Entry(9, "after", b"x")])
        assert read(torn) == [*ENTRIES[:whole], Entry(9, "after", b"x")]


def test_torn_tail_of_zeros_is_cut(tmp_path: Path) -> None:
    """After a power cut a file may have grown without its data."""
    path = tmp_path / "votes"
    write(path, ENTRIES)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read(path) == ENTRIES


def test_damage_before_the_last_entry_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "votes"
    write(path, ENTRIES[:-1])
    last = path.stat().st_size
    write(path, ENTRIES[-1:])
    data = path.read_bytes()
    for offset in range(last):
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 0x41]) + data[offset + 1 :])
        with pytest.raises(EnvironmentError_, match=r"damaged|not a vote journal"):
            VoteJournal.open(path)


def test_emptied_journal_is_refused(tmp_path: Path) -> None:
    """An emptied file must not look like a peer that never voted."""
    path = tmp_path / "votes"
    path.touch()
    with pytest.raises(EnvironmentError_):
        VoteJournal.open(path)


def test_entry_quoted_in_a_body_is_not_taken_for_an_entry(tmp_path: Path) -> None:
    path, other = tmp_path / "votes", tmp_path / "other"
    write(other, ENTRIES)
    write(path, [Entry(1, "proposal", other.read_bytes())])
    assert read(path) == [Entry(1, "proposal", other.read_bytes())]
    os.truncate(path, path.stat().st_size - 1)
    assert read(path) == []


def test_compaction_keeps_young_rounds_and_later_appends(tmp_path: Path) -> None:
    path = tmp_path / "votes"
    with VoteJournal.open(path) as file:
        for entry in ENTRIES:
            file.append(entry.kind, entry.body, round_=entry.round)
        before = file.size_bytes
        assert file.compact(2) == 2
        assert file.compact(2) == 0
        assert file.size_bytes < before
        file.append("prevote", b"later", round_=4)
        assert list(file.replay()) == [*ENTRIES[2:], Entry(4, "prevote", b"later")]
    assert read(path) == [*ENTRIES[2:], Entry(4, "prevote", b"later")]


def test_compaction_that_fails_leaves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "votes"
    write(path, ENTRIES)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with VoteJournal.open(path) as file:
        monkeypatch.setattr(durable, "write_synced", full)
        with pytest.raises(DiskFullError):
            file.compact(2)
        assert list(file.replay()) == ENTRIES


def test_full_disk_writes_nothing_and_the_journal_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "votes"
    real = os.pwrite

    def half(handle: int, data: memoryview, offset: int) -> int:
        real(handle, data[: len(data) // 2], offset)
        raise OSError(28, "No space left on device")

    with VoteJournal.open(path) as file:
        file.append("prevote", b"first", round_=1)
        monkeypatch.setattr(durable.os, "pwrite", half)
        with pytest.raises(DiskFullError, match="No space"):
            file.append("prevote", b"lost", round_=1)
        monkeypatch.undo()
        file.append("prevote", b"second", round_=1)
    assert [entry.body for entry in read(path)] == [b"first", b"second"]


def test_failed_fsync_ends_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsyncgate: after one failure a second fsync may succeed although the data is gone."""

    def fails(handle: int) -> None:
        raise OSError(5, "Input/output error")

    with VoteJournal.open(tmp_path / "votes") as file:
        monkeypatch.setattr(journal.os, "fsync", fails)
        with pytest.raises(EnvironmentError_):
            file.append("prevote", b"x", round_=1)
        monkeypatch.undo()
        with pytest.raises(EnvironmentError_, match="earlier"):
            file.append("prevote", b"x", round_=1)


@pytest.mark.parametrize(
    ("kind", "body", "round_"),
    [("é", b"", 1), ("k" * 256, b"", 1), ("k", bytes(journal.MAX_BODY_BYTES + 1), 1), ("k", b"", -1)],
)
def test_entries_out_of_bounds(tmp_path: Path, kind: str, body: bytes, round_: int) -> None:
    with VoteJournal.open(tmp_path / "votes") as file, pytest.raises(LocalProtocolError):
        file.append(kind, body, round_=round_)
