"""kill -9 and full disks, on real processes and real file systems."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from p2pflock.primitives.cid import CID
from p2pflock.storage import graph
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal
from p2pflock.storage.state import StateFile

# Stores files, pins them, votes and moves on as fast as it can; says on its standard output what is acknowledged.
WRITER = """
import random, sys
from pathlib import Path
from p2pflock.processes import die_with_parent
from p2pflock.storage import graph
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal
from p2pflock.storage.state import StateFile

die_with_parent()
root, seed = Path(sys.argv[1]), int(sys.argv[2])
draw = random.Random(seed)
store = DiskStore.open(root / "blocks", grace_seconds=0)
votes, state = VoteJournal.open(root / "votes"), StateFile.open(root / "state")
print("open", flush=True)
for i in range(1 << 30):
    cid = graph.put_file(store, draw.randbytes(draw.choice((100, 300_000, 900_000))))
    store.pin(cid)
    print("pinned", cid, flush=True)
    votes.append("prevote", cid.to_bytes() + draw.randbytes(draw.randrange(2000)), round_=i)
    print("voted", cid, flush=True)
    state.update({"head": cid, "round": i})
    print("head", cid, flush=True)
    if i % 7 == 6:
        votes.compact(i - 3)
        store.collect_garbage()
"""


def kill_after(root: Path, lines: int, extra: int, seed: int) -> list[list[str]]:
    """Run the writer until it has said `lines` lines and `extra` more bytes; kill it; give all whole lines."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(seed)], stdout=subprocess.PIPE, bufsize=0
    ) as child:
        assert child.stdout is not None
        try:
            said = b"".join(child.stdout.readline() for _ in range(lines))
            said += child.stdout.read(extra)
        finally:
            child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    assert child.returncode == -signal.SIGKILL, "it was to die in mid-work"
    whole = said[: said.rfind(b"\n") + 1]
    return [line.split() for line in whole.decode().splitlines()]


def test_kill_9_at_any_moment(tmp_path: Path) -> None:
    draw = random.Random(7)
    pinned: list[CID] = []
    for seed in range(6):
        said = kill_after(tmp_path, draw.randrange(1, 40), draw.randrange(60), seed)
        pinned += [CID.parse(text) for what, *rest in said for text in rest if what == "pinned"]
        voted = [CID.parse(text) for what, *rest in said for text in rest if what == "voted"]
        heads = [CID.parse(text) for what, *rest in said for text in rest if what == "head"]

        with DiskStore.open(tmp_path / "blocks", grace_seconds=0) as store:
            assert set(pinned) <= set(store.pins())
            store.collect_garbage()
            for cid in pinned:
                assert sum(len(part) for part in graph.read_file(store, cid, 1 << 20)) in (100, 300_000, 900_000)
            assert store.stats().damaged == 0
            assert list((tmp_path / "blocks" / "tmp").iterdir()) == []
            assert list(graph.find_missing(store, pinned)) == []

        with VoteJournal.open(tmp_path / "votes") as votes:
            on_disk = {CID.from_bytes(entry.body[:36]): entry.round for entry in votes.replay()}
        forgotten = max((i - 3 for i in range(len(voted)) if i % 7 == 6), default=0)
        for index, cid in enumerate(voted):
            assert index < forgotten or on_disk[cid] == index
        if heads:
            state = StateFile.open(tmp_path / "state")
            assert state.get("round") in (len(heads) - 1, len(heads))
            assert state.get("head") in pinned
    assert len(pinned) > 10


SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from p2pflock.errors import DiskFullError
from p2pflock.primitives.cid import CID
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal

root = Path(sys.argv[1])
store, votes = DiskStore.open(root / "blocks"), VoteJournal.open(root / "votes")
stored, voted = [], 0
try:
    for i in range(1000):
        data = i.to_bytes(4, "big") * 16384
        store.put(CID.of_raw(data), data)
        stored.append((CID.of_raw(data), data))
except DiskFullError as error:
    print(error)
else:
    sys.exit("the disk never filled")
try:
    for i in range(10000):
        votes.append("prevote", bytes(1000), round_=i)
        voted += 1
except DiskFullError as error:
    print(error)
else:
    sys.exit("the disk never filled")
assert len(stored) > 3
assert all(store.get(cid) == data for cid, data in stored)
assert [entry.round for entry in votes.replay()] == list(range(voted))
assert store.stats().used_bytes == 65536 * len(stored)
assert list((root / "blocks" / "tmp").iterdir()) == []
store.close(), votes.close()
with DiskStore.open(root / "blocks") as store, VoteJournal.open(root / "votes") as votes:
    assert all(store.get(cid) == data for cid, data in stored)
    assert sum(1 for _ in votes.replay()) == voted
print("whole")
"""


def mounts_allowed() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """ENOSPC from a 1 MiB file system where the machine lets us mount one, else EFBIG from a file size limit."""
    command = [sys.executable, "-c", SMALL_DISK, str(tmp_path)]
    if mounts_allowed():
        script = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", *command]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout.splitlines()[-1:] == ["whole"], done.stderr
        assert done.stdout.count("No space left on device") == 2
    limited = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "limited")], capture_output=True, text=True, timeout=60, check=False
    )
    assert limited.stdout.splitlines()[-1:] == ["whole"], limited.stderr


LIMITED = """
import resource, signal, sys
from pathlib import Path
from p2pflock.errors import DiskFullError
from p2pflock.primitives.cid import CID
from p2pflock.storage.blocks import DiskStore
from p2pflock.storage.journal import VoteJournal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
root = Path(sys.argv[1])
with DiskStore.open(root / "blocks") as store, VoteJournal.open(root / "votes") as votes:
    small, large = bytes(10_000), bytes(30_000)
    store.put(CID.of_raw(small), small)
    try:
        store.put(CID.of_raw(large), large)
        sys.exit("no limit")
    except DiskFullError:
        pass
    assert store.get(CID.of_raw(small)) == small and store.stats().used_bytes == 10_000
    voted = 0
    try:
        while True:
            votes.append("prevote", bytes(999), round_=voted)
            voted += 1
    except DiskFullError:
        pass
    assert voted > 10
    votes.append("prevote", b"fits", round_=voted)
with VoteJournal.open(root / "votes") as votes:
    assert [entry.round for entry in votes.replay()] == list(range(voted + 1))
print("whole")
"""


def test_second_process_is_told_who_holds_the_store(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), "1"], stdout=subprocess.PIPE, bufsize=0
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"open\n"
            with pytest.raises(Exception, match=f"in use by process {child.pid}"):
                DiskStore.open(tmp_path / "blocks")
        finally:
            child.kill()
    DiskStore.open(tmp_path / "blocks").close()
