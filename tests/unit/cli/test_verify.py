"""`p2pflock verify` on homes and CAR files of built histories: verdicts, exit codes, one line for bad input.

The fold is left out here (a learning process takes seconds); tests/process/test_verify_real.py runs it.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2pflock.cli import main as cli
from p2pflock.node import assembly, verification
from p2pflock.primitives import car
from p2pflock.primitives.cid import CID
from p2pflock.protocol.provenance import Trust
from p2pflock.testing import history as histories
from p2pflock.testing.history import History

OPEN = "NOT CHECKED"


@pytest.fixture(scope="module")
def history() -> History:
    return histories.build_now(rounds=2, with_chain=True, absent=[(1, 2)], snapshots=(0, 1))


@pytest.fixture
def home(history: History, tmp_path: Path) -> Path:
    histories.write_home(history, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def archive(history: History, home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.car"
    verification.export_car(verification.open_home(home), history.checkpoint, path)
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, str], str]:
    """Exit code, verdicts and stderr of `verify … --no-recompute --format json`."""
    capsys.readouterr()
    code = cli.main(["verify", *map(str, arguments), "--no-recompute", "--format", "json"])
    printed = capsys.readouterr()
    document = json.loads(printed.out) if printed.out else {"verdicts": {}}
    return code, {name: entry["verdict"] for name, entry in document["verdicts"].items()}, printed.err


def remember(home: Path, **facts: str) -> None:
    (home / "run.json").write_text(json.dumps({**assembly.read_run_file(home), **facts}))


GOOD = dict.fromkeys(("integrity", "authorship", "lineage", "participation"), "PASS") | {"recomputed": OPEN}


def test_a_home_passes(history: History, home: Path, capsys) -> None:
    assert call(capsys, history.checkpoint, "--home", home) == (0, GOOD, "")


def test_an_older_checkpoint_passes(history: History, home: Path, capsys) -> None:
    from p2pflock.node.ledger import build_manifest

    first = build_manifest(history.decisions[1].record, history.spec.cid())
    assert call(capsys, first.cid(), "--home", home)[:2] == (0, GOOD)


def test_people_get_a_table(history: History, home: Path, capsys) -> None:
    assert cli.main(["verify", str(history.checkpoint), "--home", str(home), "--no-recompute"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 4 and printed.count(OPEN) == 1
    assert "each with a quorum" in printed


def test_without_a_committee_lineage_is_not_checked(history: History, home: Path, capsys) -> None:
    remember(home, committee="")
    (home / "committee.cbor").rename(home / "elsewhere")
    code, found, _ = call(capsys, history.checkpoint, "--home", home)
    assert (code, found) == (0, GOOD | {"lineage": OPEN})
    assert call(capsys, history.checkpoint, "--home", home, "--committee", home / "elsewhere")[:2] == (0, GOOD)


def test_a_foreign_committee_fails(history: History, home: Path, archive: Path, tmp_path: Path, capsys) -> None:
    foreign = tmp_path / "foreign.cbor"
    foreign.write_bytes(histories.build_now(rounds=1, first_key=50).committee.to_block().encode())
    for what in ((history.checkpoint, "--home", home), (archive,)):
        code, found, error = call(capsys, *what, "--committee", foreign)
        assert (code, found) == (40, GOOD | {"lineage": "FAIL"})
        assert "VerificationError" in error


# --- CAR files --------------------------------------------------------------------------------------------
def test_a_car_file_offline(home: Path, archive: Path, capsys) -> None:
    assert call(capsys, archive, "--committee", home / "committee.cbor") == (0, GOOD, "")
    assert call(capsys, archive)[:2] == (0, GOOD | {"lineage": OPEN})


def test_export_and_verify_again(history: History, home: Path, tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "a.car", tmp_path / "b.car"
    assert call(capsys, history.checkpoint, "--home", home, "--export", first)[0] == 0
    assert call(capsys, first, "--export", second)[0] == 0
    assert first.read_bytes() == second.read_bytes()
    roots, blocks = car.read(io.BytesIO(first.read_bytes()), max_block_bytes=1 << 21)
    held = {cid for cid, _ in blocks}
    assert roots == (history.checkpoint, history.head.attestation.cid())
    assert history.decisions[0].record.weights in held
    assert history.decisions[1].record.weights not in held  # the payloads give it
    assert list(tmp_path.glob("*.tmp")) == []


def test_nothing_is_exported_that_fails_or_is_not_whole(history: History, home: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "bad.car"
    block = _file_of(home, history.head.record.contributions[0].header)
    data = block.read_bytes()
    block.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert call(capsys, history.checkpoint, "--home", home, "--export", target)[0] == 40
    block.unlink()
    assert call(capsys, history.checkpoint, "--home", home, "--export", target)[0] == 2
    assert not target.exists()


def _file_of(home: Path, cid: CID) -> Path:
    (path,) = [path for path in (home / "blocks").rglob("*") if path.is_file() and str(cid) in str(path)]
    return path


def sections(data: bytes) -> tuple[tuple[CID, ...], list[tuple[CID, bytes]]]:
    roots, blocks = car.read(io.BytesIO(data), max_block_bytes=1 << 21)
    return roots, list(blocks)


def write(path: Path, roots, blocks) -> Path:
    with path.open("wb") as out:
        car.write(out, roots, blocks)
    return path


def test_a_truncated_car(archive: Path, tmp_path: Path, capsys) -> None:
    data = archive.read_bytes()
    path = tmp_path / "short.car"
    for size in (0, 1, 10, 60, 200, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        code, found, error = call(capsys, path)
        assert code == 2, size
        assert found == {}
        assert len(error.strip().splitlines()) == 1
    # Cut between two blocks it is whole as a file, and misses blocks as a checkpoint.
    roots, blocks = sections(data)
    code, found, _ = call(capsys, write(path, roots, blocks[: len(blocks) // 2]))
    assert code == 40  # the attestation stands last
    assert found["integrity"] == OPEN and found["lineage"] != "PASS"
    code, found, _ = call(capsys, write(path, roots, [*blocks[:5], *blocks[6:]]))
    assert code == 0
    assert found["integrity"] == OPEN


def test_a_flipped_bit_anywhere_in_a_car_is_noticed(home: Path, archive: Path, tmp_path: Path, capsys) -> None:
    data = archive.read_bytes()
    path = tmp_path / "flipped.car"
    codes = set()
    places = [*range(0, 200, 7), *range(200, len(data), len(data) // 40)]
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        code, found, _ = call(capsys, path, "--committee", home / "committee.cbor")
        assert code in {2, 40}, place
        codes.add(code)
        assert code == 2 or "FAIL" in found.values()
    assert codes == {2, 40}


def test_a_block_too_many_in_a_car(archive: Path, tmp_path: Path, capsys) -> None:
    roots, blocks = sections(archive.read_bytes())
    junk = CID.of_raw(b"junk"), b"junk"
    path = write(tmp_path / "junk.car", roots, [*blocks[:4], junk, *blocks[4:]])
    assert call(capsys, path)[:2] == (0, GOOD | {"lineage": OPEN})
    path = write(tmp_path / "bad.car", roots, [*blocks, (junk[0], b"other")])
    assert call(capsys, path)[:2] == (40, GOOD | {"integrity": "FAIL", "lineage": OPEN})
    path = write(tmp_path / "twice.car", roots, [*blocks, *blocks])
    assert call(capsys, path)[:2] == (0, GOOD | {"lineage": OPEN})
    # A false block under a true id, before or after the true one.
    for order in ([(blocks[3][0], b"x"), *blocks], [*blocks, (blocks[3][0], b"x")]):
        assert call(capsys, write(path, roots, order))[0] == 40


def test_a_car_is_indexed_and_not_loaded(archive: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(verification, "MAX_CAR_BLOCKS", 5)
    code, _, error = call(capsys, archive)
    assert code == 2 and "more than 5 blocks" in error


def test_a_car_without_its_checkpoint(archive: Path, tmp_path: Path, capsys) -> None:
    roots, blocks = sections(archive.read_bytes())
    for chosen in ((), (CID.of_raw(b"not here"),)):
        assert call(capsys, write(tmp_path / "x.car", chosen, blocks))[0] == 2
    code, found, _ = call(capsys, write(tmp_path / "x.car", roots[:1], blocks))
    assert (code, found) == (40, GOOD | {"lineage": "FAIL"})


# --- bad input --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense", "--home", "HOME"], 2),
        (["bafy", "--home", "HOME"], 2),
        (["none.car"], 2),
        (["HOME.car"], 2),
        ([str(CID.of_dag_cbor(b"nothing")), "--home", "HOME"], 2),
        ([str(CID.of_dag_cbor(b"nothing")), "--home", "EMPTY"], 11),
        (["CHECKPOINT", "--home", "HOME", "--committee", "none.cbor"], 2),
        (["CHECKPOINT", "--home", "HOME", "--committee", "HOME"], 2),
        (["CHECKPOINT", "--home", "HOME", "--committee", "RUNFILE"], 2),
        (["CHECKPOINT", "--home", "HOME", "--rpc", "http://127.0.0.1:9"], 12),
        (["CHECKPOINT", "--home", "HOME", "--rpc", "http://127.0.0.1:9", "--committee", "RUNFILE"], 2),
        (["CHECKPOINT", "--home", "HOME", "--rpc", "http://127.0.0.1:9", "--address-book", "BOOK"], 31),
        (["CHECKPOINT", "--home", "HOME", "--export", "EMPTY/none/x.car"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(arguments, code, history: History, home: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "home.car").mkdir()
    names = {
        "HOME": home, "HOME.car": tmp_path / "home.car", "EMPTY": tmp_path / "empty",
        "EMPTY/none/x.car": tmp_path / "empty" / "none" / "x.car", "CHECKPOINT": history.checkpoint,
        "RUNFILE": home / "run.json", "BOOK": _book(tmp_path),
    }  # fmt: skip
    given = [str(names.get(argument, argument)) for argument in arguments]
    assert cli.main(["verify", *given, "--no-recompute"]) == code
    error = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in error] == ["error", "fix"]


def _book(tmp_path: Path) -> Path:
    address = "0x" + "11" * 20
    names = ("token", "registry", "staking", "tasks", "anchor", "rewards")
    path = tmp_path / "book.json"
    path.write_text(json.dumps({"chain_id": 84532, "deployed_block": 0, **dict.fromkeys(names, address)}))
    return path


def test_a_remembered_chain_that_is_gone_leaves_lineage_open(history: History, home: Path, tmp_path: Path, capsys) -> None:
    remember(home, rpc="http://127.0.0.1:9", address_book=str(_book(tmp_path)))
    assert call(capsys, history.checkpoint, "--home", home) == (0, GOOD | {"lineage": OPEN}, "")


# --- the chain as a root of trust -------------------------------------------------------------------------
def test_the_chain_names_committee_and_anchors(history: History, home: Path) -> None:
    def lineage(chain, checkpoint=history.checkpoint, source=None) -> tuple[str, str]:
        source = source or verification.open_home(home)
        found = verification.verify(checkpoint, source, chain=chain, recompute=False).findings["lineage"]
        return found.verdict.value, found.reason

    assert history.chain is not None
    assert lineage(history.chain) == ("PASS", "2 rounds from genesis, each with a quorum, anchored on chain")
    # The chain's own copy of the attestation stands in for a lost one.
    bare = replace(verification.open_home(home), attestation=lambda _: None)
    assert lineage(history.chain, source=bare)[0] == "PASS"
    assert lineage(None, source=bare)[0] == "FAIL"
    # A chain that does not know the task trusts nobody for it.
    assert lineage(histories.FakeChain())[0] == "FAIL"
    chain = histories.build_now(rounds=2, with_chain=True).chain  # same keys and task, another history
    assert chain is not None
    assert lineage(chain) == ("FAIL", "round 1: another record is anchored on chain")
    shorter = histories.build_now(rounds=2, with_chain=True, absent=[(1, 2)], snapshots=()).chain
    assert shorter is not None
    shorter.reorganise(history.spec.task_id, 1)
    assert lineage(shorter) == (OPEN, "round 2 is not anchored yet")


def test_a_strangers_round_number_costs_no_calls(history: History) -> None:
    from p2pflock.protocol.messages import Manifest

    asked = []

    class Counting:
        def __getattr__(self, name):
            asked.append(name)
            return getattr(history.chain, name)

    record = history.head.record
    absurd = Manifest(record.task, history.spec.cid(), (1 << 32) - 1, history.head.cid, record.weights, bytes(32))
    trust = verification.build_trust(absurd, Counting(), None)
    assert set(trust.anchors or ()) == {1, 2}
    assert asked.count("anchored_call") == 3
    assert isinstance(trust, Trust)
