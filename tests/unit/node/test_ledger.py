"""The ledger: in order, blocks before the index, and the same after a restart at any point."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.node.ledger import Ledger, build_manifest, compute_head
from p2pflock.testing.simulation import MemoryJournal
from p2pflock.testing.storage import MemoryStore


class Crash(BaseException):
    """Nothing catches a power cut."""


class FailingJournal(MemoryJournal):
    def append(self, kind, body, *, round_):
        raise Crash


@pytest.fixture
def disk():
    return MemoryStore(), MemoryJournal()


def filled(members, store, journal, rounds=2):
    ledger = Ledger(store, journal, members.spec.cid())
    ledger.append(members.genesis, None, [members.committee.to_block().encode()])
    for _ in range(rounds):
        head = ledger.head
        record = members.record(head.record)
        blocks = [members.header(seat, parent=head.record).encode() for seat in range(4)]
        ledger.append(record, members.attestation(record, head.head), blocks)
    return ledger


def test_reopened_it_is_the_same(members, disk):
    ledger = filled(members, *disk)
    again = Ledger(*disk, members.spec.cid())
    assert [again.at(n) for n in range(4)] == [ledger.at(n) for n in range(4)]
    assert again.at(3) is None
    assert again.at(-1) is None


def test_the_head_chain_begins_with_the_task(members, disk):
    ledger = filled(members, *disk)
    assert ledger.at(0).head == members.task
    assert ledger.at(1).head == compute_head(ledger.at(1).record, members.task)
    assert ledger.head.head == compute_head(ledger.at(2).record, ledger.at(1).head)


@pytest.mark.parametrize("after", ["the first blocks", "all blocks"])
def test_a_crash_before_the_index_loses_the_entry_and_nothing_else(members, disk, after):
    store, journal = disk
    ledger = filled(members, store, journal, rounds=1)
    head = ledger.head
    record = members.record(head.record)
    attestation = members.attestation(record, head.head)
    blocks = [members.header(seat, parent=head.record).encode() for seat in range(4)]
    if after == "all blocks":
        broken = Ledger(store, journal, members.spec.cid())
        broken._journal = FailingJournal()
        with pytest.raises(Crash):
            broken.append(record, attestation, blocks)
    else:
        store.put(members.header(0, parent=head.record).cid(), blocks[0])
    again = Ledger(store, journal, members.spec.cid())
    assert again.head == head
    again.append(record, attestation, blocks)  # what is repeated after the restart
    assert Ledger(store, journal, members.spec.cid()).head.record == record


def test_what_the_index_names_is_in_the_store_at_that_moment(members, disk):
    store, journal = disk
    ledger = filled(members, store, journal, rounds=0)
    seen = []

    class Watching(MemoryJournal):
        def append(self, kind, body, *, round_):
            journal.append(kind, body, round_=round_)
            (record, attestation), *_ = list(Ledger.read_index(journal.entries[-1:]))
            seen.extend([store.has(record), store.has(attestation)])

    ledger._journal = Watching()
    record = members.record()
    ledger.append(record, members.attestation(record, members.task), [])
    assert seen == [True, True]


def test_only_the_newest_manifest_and_the_attestations_are_pinned(members, disk):
    store, _ = disk
    ledger = filled(members, *disk)
    newest = build_manifest(ledger.head.record, members.spec.cid()).cid()
    attestations = {ledger.at(n).attestation.cid() for n in (1, 2)}
    assert set(store.pins()) == {newest} | attestations


def test_out_of_order_is_our_bug_and_another_parent_a_lie(members, disk):
    ledger = filled(members, *disk, rounds=1)
    record = members.record(ledger.head.record)
    attestation = members.attestation(record, ledger.head.head)
    with pytest.raises(LocalProtocolError):
        ledger.append(replace(record, round=3), attestation, [])
    with pytest.raises(InvalidMessageError):
        ledger.append(replace(record, parent=members.genesis.cid()), attestation, [])
    assert ledger.head.record.round == 1
    assert len(disk[1].entries) == 2


def test_other_entries_in_the_index_are_passed_over(members, disk):
    _, journal = disk
    filled(members, *disk, rounds=1)
    journal.append("note", b"x", round_=9)
    assert Ledger(*disk, members.spec.cid()).head.record.round == 1
