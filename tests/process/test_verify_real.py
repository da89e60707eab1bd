"""A history made by the real learning process, on disk as a peer leaves it, verified by the command itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from p2pflock.cli import main as cli
from p2pflock.learning.client import TrainerProcess
from p2pflock.primitives.cid import CID
from p2pflock.testing import history as histories
from p2pflock.testing import tiny_task
from p2pflock.testing.history import History

TRUSTED = ("--trust-module", tiny_task.MODULE)
QUESTIONS = ("integrity", "authorship", "lineage", "participation", "recomputed")


@pytest.fixture(scope="module")
def history() -> History:
    async def main() -> History:
        spec = tiny_task.build_spec(rounds=3)
        async with trio.open_nursery() as nursery:
            trainer = await TrainerProcess.start(nursery, spec, trusted_modules=(tiny_task.MODULE,))
            try:
                with trio.fail_after(120):
                    return await histories.build(
                        rounds=3, spec=spec, trainer=trainer, absent=[(2, 1)], snapshots=(0, 1)
                    )
            finally:
                await trainer.aclose()

    return trio.run(main)


@pytest.fixture(scope="module")
def home(history: History, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("peer")
    histories.write_home(history, home)
    return home


def verify(*arguments: object) -> tuple[int, dict[str, str], str]:
    """Exit code, verdicts, stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "p2pflock", "verify", *map(str, arguments), "--format", "json"],
        capture_output=True, timeout=120, text=True, check=False,
    )  # fmt: skip
    verdicts = json.loads(done.stdout)["verdicts"] if done.stdout else {}
    return done.returncode, {name: entry["verdict"] for name, entry in verdicts.items()}, done.stderr


def test_all_five_pass(history: History, home: Path, tmp_path: Path) -> None:
    archive = tmp_path / "checkpoint.car"
    passed = dict.fromkeys(QUESTIONS, "PASS")
    code, found, _ = verify(history.checkpoint, "--home", home, *TRUSTED, "--export", archive)
    assert (code, found) == (0, passed)
    # The file alone, with a copy of the committee, as somebody else would get it.
    committee = shutil.copy(home / "committee.cbor", tmp_path)
    code, found, _ = verify(archive, "--committee", committee, *TRUSTED)
    assert (code, found) == (0, passed)


def test_code_that_is_not_trusted_is_not_run(history: History, home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "p2pflock", "verify", str(history.checkpoint), "--home", str(home)],
        capture_output=True, timeout=120, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if "recomputed" in line]
    assert "NOT CHECKED" in line
    assert "not trusted" in done.stdout


def kinds(history: History) -> dict[str, CID]:
    """One block of each kind."""
    record = history.decisions[1].record
    header = histories.ContributionHeader.decode(history.store.get(record.contributions[0].header))
    return {
        "manifest": history.checkpoint,
        "spec": history.spec.cid(),
        "committee": history.committee.cid(),
        "record": history.head.cid,
        "record below": history.decisions[1].cid,
        "genesis": history.decisions[0].cid,
        "header": header.cid(),
        "scorecard": record.scorecards[0],
        "payload": header.payload,
        "weights": history.head.record.weights,
        "snapshot": record.weights,
        "attestation": history.head.attestation.cid(),
    }


def test_one_flipped_bit_on_disk(history: History, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verify_here(*arguments: object) -> tuple[int, dict[str, str], str]:
        """The same command without a process and a fold of its own, which cost seconds."""
        code = cli.main(["verify", *map(str, arguments), "--no-recompute", "--format", "json"])
        printed = capsys.readouterr()
        found = json.loads(printed.out)["verdicts"]
        return code, {name: entry["verdict"] for name, entry in found.items()}, printed.err

    for kind, cid in kinds(history).items():
        (path,) = [p for p in (home / "blocks" / "blocks").rglob("*") if str(cid) in p.name]
        data = path.read_bytes()
        path.chmod(0o600)
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        if kind == "payload":  # the fold has something to say of it
            code, found, error = verify(history.checkpoint, "--home", home, *TRUSTED)
        else:
            code, found, error = verify_here(history.checkpoint, "--home", home)
        path.write_bytes(data)
        expected = {"attestation": {"lineage"}, "payload": {"integrity", "recomputed"}}.get(kind, {"integrity"})
        assert code == 40, (kind, error)
        assert {name for name, verdict in found.items() if verdict == "FAIL"} == expected, kind
        assert "VerificationError" in error
    assert verify_here(history.checkpoint, "--home", home)[0] == 0
