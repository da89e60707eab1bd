"""The parts of a local swarm that start no process: its home, its committee, what it reads of its peers."""

from __future__ import annotations

import json
import stat
import subprocess
from types import SimpleNamespace

import pytest

from p2pflock.errors import StartupError, UserError
from p2pflock.node.assembly import COMMITTEE_FILE
from p2pflock.node.local_swarm import LocalSwarm, PeerProcess
from p2pflock.params import FLOCK_WEI, LOCAL
from p2pflock.protocol.committee import Committee
from p2pflock.protocol.messages import CommitteeBlock
from p2pflock.storage import keystore
from p2pflock.testing.tiny_task import build_spec


@pytest.fixture
def swarm(tmp_path):
    return LocalSwarm(tmp_path / "swarm", build_spec(), 3, "none", LOCAL)


def ended(swarm, code, log=""):
    """A peer whose process has ended with this code."""
    home = swarm.home / "peer"
    (home / "logs").mkdir(parents=True)
    (home / "logs" / "peer.log").write_text(log)
    process = SimpleNamespace(poll=lambda: code, returncode=code)
    return PeerProcess("peer", home, None, process)


@pytest.mark.parametrize(("peers", "stakes"), [(0, None), (-1, None), (2, [1])])
def test_impossible_swarms_are_refused(tmp_path, peers, stakes):
    with pytest.raises(UserError):
        LocalSwarm(tmp_path, build_spec(), peers, "none", LOCAL, stakes=stakes)


def test_prepared_without_a_chain_it_has_keys_a_spec_and_a_committee(swarm):
    swarm.start_chain()
    swarm.prepare(lambda _: None)
    committee = Committee.from_block(CommitteeBlock.decode((swarm.home / COMMITTEE_FILE).read_bytes()))
    assert [seat.peer for seat in committee.seats] == [peer.signer.peer_id for peer in swarm.peers]
    assert committee.task == swarm.spec.task_id
    facts = json.loads((swarm.home / "swarm.json").read_text())
    assert [peer["name"] for peer in facts["peers"]] == ["peer-1", "peer-2", "peer-3"]
    password = (swarm.home / "password").read_text().strip()
    assert stat.S_IMODE((swarm.home / "password").stat().st_mode) == 0o600
    assert keystore.unlock(swarm.peers[0].home / "keystore", password).public == swarm.peers[0].signer.public
    assert password not in json.dumps(facts)


def test_who_stakes_nothing_has_no_seat(tmp_path):
    swarm = LocalSwarm(tmp_path / "s", build_spec(), 3, "none", LOCAL, stakes=[FLOCK_WEI, 0, 3 * FLOCK_WEI])
    swarm.start_chain()
    swarm.prepare(lambda _: None)
    committee = Committee.from_block(CommitteeBlock.decode((swarm.home / COMMITTEE_FILE).read_bytes()))
    assert [seat.weight_wei for seat in committee.seats] == [FLOCK_WEI, 3 * FLOCK_WEI]


def test_a_home_of_something_else_is_not_touched(swarm):
    swarm.home.mkdir()
    (swarm.home / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError):
        swarm.start_chain()
    assert (swarm.home / "thesis.txt").read_text() == "years of work"


def test_a_home_of_an_earlier_swarm_is_begun_anew(swarm):
    swarm.start_chain()
    (swarm.home / "old").write_text("x")
    swarm.start_chain()
    assert not (swarm.home / "old").exists()


def test_events_are_read_once_and_only_whole_lines(swarm):
    peer = ended(swarm, None)
    peer.events_file.write_text('{"event":"started","n":1}\n{"event":"deci')
    assert [entry["event"] for entry in swarm.read_new_events(peer)] == ["started"]
    assert swarm.read_new_events(peer) == []
    with peer.events_file.open("a") as file:
        file.write('ded","round":1}\n')
    assert [entry["event"] for entry in swarm.read_new_events(peer)] == ["decided"]
    assert set(peer.facts) == {"started", "decided"}


def test_a_peer_that_fails_is_an_error_in_its_own_words(swarm):
    peer = ended(swarm, 20, "starting\nerror: port 7 is taken\nfix: choose another\n")
    with pytest.raises(StartupError, match="port 7 is taken") as failure:
        swarm.raise_if_failed(peer)
    assert "20" in failure.value.message


@pytest.mark.parametrize("code", [None, 0, -9])
def test_running_finished_and_killed_peers_have_not_failed(swarm, code):
    swarm.raise_if_failed(ended(swarm, code))


def test_stop_insists(swarm):
    """A process that ignores SIGTERM for good is killed."""
    calls = []

    def wait(timeout=None):
        calls.append("wait")
        if calls.count("wait") == 1:
            raise subprocess.TimeoutExpired("p", timeout)

    process = SimpleNamespace(
        poll=lambda: None, terminate=lambda: calls.append("terminate"), kill=lambda: calls.append("kill"), wait=wait
    )
    swarm.peers.append(PeerProcess("p", swarm.home, None, process))
    swarm.stop()
    assert calls == ["terminate", "wait", "kill", "wait"]
