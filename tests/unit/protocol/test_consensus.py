"""The consensus machine step by step; tests/property/test_consensus.py has the network."""

from __future__ import annotations

import pytest

from p2pflock.errors import LocalProtocolError
from p2pflock.protocol import consensus as c
from p2pflock.protocol.messages import NIL, Step
from p2pflock.protocol.timeouts import Timeouts

PREVOTE, PRECOMMIT = Step.PREVOTE, Step.PRECOMMIT


@pytest.fixture(scope="module")
def four(swarm_of):
    return swarm_of((10, 10, 10, 10))


class Bench:
    """One machine and whatever it needs to hear."""

    def __init__(self, swarm, me=None, saved=()):
        self.swarm = swarm
        probe = c.Consensus(swarm.committee, 1, None, swarm.beacon, Timeouts.create())
        self.order = [probe.get_proposer(view) for view in range(8)]
        self.me = self.order[1] if me is None else me  # proposes in view 1
        self.others = [seat for seat in range(4) if seat != self.me]
        self.machine = c.Consensus.restore(
            swarm.committee, 1, self.me, swarm.beacon, Timeouts.create(), saved
        )
        self.digest = swarm.record().digest()

    def propose(self, view=0, now=0.0, **changes):
        return self.machine.on_proposal(self.swarm.proposal(view, **changes), now)

    def votes(self, step, view=0, seats=None, now=0.0, **changes):
        out = ()
        for seat in self.others if seats is None else seats:
            out += self.machine.on_vote(self.swarm.vote(seat, view, int(step), **changes), now)
        return out

    def vote(self, effects):
        """Do the driver's part for the votes in `effects`; returns what followed."""
        out = ()
        for e in of(effects, c.CastVote):
            vote = self.swarm.vote(
                self.me, e.view, int(e.step), record_digest=e.digest, rewards_root=e.rewards_root
            )
            out += self.machine.on_vote(vote, 0.0)
        return out


def of(effects, kind):
    return [effect for effect in effects if isinstance(effect, kind)]


def casts(effects):
    return [(e.view, e.step, e.digest) for e in of(effects, c.CastVote)]


NO = {"record_digest": NIL, "rewards_root": NIL}


def test_the_good_case(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    effects = bench.propose()
    assert [e.digest for e in of(effects, c.Check)] == [bench.digest]
    assert not casts(effects)  # not before the record was recomputed
    effects = bench.machine.on_checked(bench.digest, True, 1.0)
    assert casts(effects) == [(0, PREVOTE, bench.digest)]
    bench.vote(effects)
    effects = bench.votes(PREVOTE, seats=bench.others[:2])
    assert casts(effects) == [(0, PRECOMMIT, bench.digest)]
    kinds = [type(e) for e in effects if isinstance(e, c.Save | c.CastVote)]
    assert kinds == [c.Save, c.CastVote]  # the reason for the lock is on disk before the vote is sent
    assert len(of(effects, c.Save)[0].messages) == 4
    bench.vote(effects)
    effects = bench.votes(PRECOMMIT, seats=bench.others[:2])
    (decided,) = of(effects, c.Decided)
    assert (decided.digest, decided.view, decided.own_check) == (bench.digest, 0, True)
    assert len(decided.precommits) == 3
    assert decided.record == four.record().encode()
    assert set(bench.machine.resend()) == {four.proposal(0), *decided.precommits}
    assert bench.machine.on_tick(1e9) == ()


def test_an_invalid_record_gets_a_nil_prevote(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    bench.propose()
    assert casts(bench.machine.on_checked(bench.digest, False, 1.0)) == [(0, PREVOTE, NIL)]


def test_a_quorum_decides_for_one_that_has_not_checked_or_disagrees(four) -> None:
    for answer in (None, False):
        bench = Bench(four)
        bench.machine.start(0.0)
        bench.propose()
        if answer is not None:
            bench.machine.on_checked(bench.digest, answer, 0.0)
        (decided,) = of(bench.votes(PRECOMMIT), c.Decided)
        assert decided.own_check is answer  # False: the driver must stop


def test_nothing_is_decided_without_the_record(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    assert not of(bench.votes(PRECOMMIT), c.Decided)
    assert of(bench.propose(), c.Decided)


def test_timeouts_walk_through_a_silent_view(four) -> None:
    bench = Bench(four, me=None)
    (wake,) = of(bench.machine.start(0.0), c.WakeAt)
    assert not casts(bench.machine.on_tick(wake.time - 0.01))
    effects = bench.machine.on_tick(wake.time)
    assert casts(effects) == [(0, PREVOTE, NIL)]
    bench.vote(effects)
    assert casts(bench.votes(PREVOTE, seats=bench.others[:2], now=wake.time, **NO)) == [(0, PRECOMMIT, NIL)]
    effects = bench.votes(PRECOMMIT, now=wake.time, **NO)
    (wake,) = of(effects, c.WakeAt)
    assert bench.machine.view == 0
    bench.machine.on_tick(wake.time)
    assert bench.machine.view == 1


def test_a_proposer_that_is_away_gets_the_least_timeout(four) -> None:
    for is_away, has_proposed, seconds in ((True, False, 2.0), (True, True, 10.0), (False, False, 10.0)):
        bench = Bench(four)
        bench.machine.start(0.0)
        if has_proposed:
            bench.propose()  # and fell silent: its record is being checked
        bench.machine.on_presence(set(bench.order) - ({bench.order[0]} if is_away else set()))
        assert not casts(bench.machine.on_tick(seconds - 0.1))
        assert casts(bench.machine.on_tick(seconds)) == [(0, PREVOTE, NIL)]


def test_however_few_seem_to_be_there_the_timeout_grows(four) -> None:
    bench = Bench(four, me=(Bench(four).order[4]))
    assert bench.me not in bench.order[1:4]
    bench.machine.start(0.0)
    bench.machine.on_presence({bench.me})
    now = 0.0
    for view in range(1, 4):
        bench.votes(PRECOMMIT, view - 1, now=now, **NO)
        now += 100.0
        bench.machine.on_tick(now)
        assert bench.machine.view == view
        least = 2.0 * 2**view
        assert not casts(bench.machine.on_tick(now + least - 0.1))
        assert casts(bench.machine.on_tick(now + least)) == [(view, PREVOTE, NIL)]


def test_both_vote_timers_may_end_in_one_tick(four) -> None:
    """The second must not disarm a timer of the view that the first one opened."""
    bench = Bench(four)
    bench.machine.start(0.0)
    bench.vote(bench.machine.on_tick(100.0))  # nil prevote
    bench.votes(PRECOMMIT, now=100.0, **NO)  # timer
    bench.votes(PREVOTE, seats=bench.others[:1], now=100.0, **NO)
    bench.votes(PREVOTE, seats=bench.others[1:2], now=100.0)  # a quorum that disagrees: timer
    bench.machine.on_tick(200.0)
    assert bench.machine.view == 1
    bench.vote(bench.machine.on_tick(1000.0))
    bench.votes(PREVOTE, view=1, seats=bench.others[:1], now=1000.0, **NO)
    effects = bench.votes(PREVOTE, view=1, seats=bench.others[1:2], now=1000.0)
    assert of(effects, c.WakeAt)


def test_proposes_its_candidate_once_and_the_valid_value_before_it(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    own = four.record(9).encode()
    assert not of(bench.machine.offer(own, 0.0), c.CastProposal)  # not our turn
    effects = bench.votes(PRECOMMIT, now=0.0, **NO)
    effects = bench.machine.on_tick(of(effects, c.WakeAt)[0].time)
    assert [(e.view, e.valid_view, e.record) for e in of(effects, c.CastProposal)] == [(1, -1, own)]
    assert not of(bench.machine.offer(four.record(8).encode(), 0.0), c.CastProposal)

    bench = Bench(four)
    bench.machine.start(0.0)
    bench.machine.offer(own, 0.0)
    bench.propose()
    bench.vote(bench.machine.on_checked(bench.digest, True, 0.0))
    bench.vote(bench.votes(PREVOTE, seats=bench.others[:2]))
    effects = bench.votes(PRECOMMIT, seats=bench.others[:2], **NO)
    effects = bench.machine.on_tick(of(effects, c.WakeAt)[0].time)
    (cast,) = of(effects, c.CastProposal)
    assert (cast.view, cast.valid_view, cast.record) == (1, 0, four.record().encode())


def test_a_late_candidate_is_still_proposed_in_time(four) -> None:
    bench = Bench(four, me=Bench(four).order[0])
    assert not of(bench.machine.start(0.0), c.CastProposal)
    assert len(of(bench.machine.offer(four.record().encode(), 1.0), c.CastProposal)) == 1


def lock(bench):
    """Lock on the record in view 0, then see the view fail."""
    bench.machine.start(0.0)
    saved = [four_proposal := bench.swarm.proposal(0)]
    bench.machine.on_proposal(four_proposal, 0.0)
    effects = bench.machine.on_checked(bench.digest, True, 0.0)
    bench.vote(effects)
    effects = bench.votes(PREVOTE, seats=bench.others[:2])
    bench.vote(effects)
    saved += of(effects, c.Save)[0].messages
    saved += [bench.swarm.vote(bench.me, 0, 1)]
    effects = bench.votes(PRECOMMIT, seats=bench.others[:2], **NO)
    bench.machine.on_tick(of(effects, c.WakeAt)[0].time)
    assert bench.machine.view == 1
    return saved


def other_record(four, bench, view, valid_view):
    record = four.record(5)
    bench.propose(view, record=record.encode(), valid_view=valid_view)
    return record.digest(), bench.machine.on_checked(record.digest(), True, 0.0)


def test_the_lock_holds_against_another_record(four) -> None:
    me = Bench(four).order[2]  # not the proposer of views 0 and 1
    bench = Bench(four, me=me)
    lock(bench)
    _, effects = other_record(four, bench, 1, -1)
    assert casts(effects) == [(1, PREVOTE, NIL)]


def test_a_later_prevote_quorum_unlocks(four) -> None:
    me = Bench(four).order[3]
    bench = Bench(four, me=me)
    lock(bench)
    digest, root = four.record(5).digest(), four.record(5).rewards_root
    bench.votes(PRECOMMIT, view=1, now=0.0, **NO)
    bench.machine.on_tick(1e6)
    assert bench.machine.view == 2
    _, effects = other_record(four, bench, 2, 1)
    assert not casts(effects)  # the quorum it names has not been seen
    effects = bench.votes(PREVOTE, view=1, record_digest=digest, rewards_root=root)
    assert casts(effects) == [(2, PREVOTE, digest)]


def test_the_lock_survives_a_crash(four) -> None:
    me = Bench(four).order[2]
    saved = lock(Bench(four, me=me))
    bench = Bench(four, me=me, saved=reversed(saved))
    assert not casts(bench.machine.start(0.0))  # both votes of view 0 were cast
    effects = bench.votes(PRECOMMIT, seats=bench.others[:2], **NO)
    bench.machine.on_tick(of(effects, c.WakeAt)[0].time)
    _, effects = other_record(four, bench, 1, -1)
    assert casts(effects) == [(1, PREVOTE, NIL)]
    # It can still propose what it is locked on: the quorum was saved with the vote.
    bench.votes(PRECOMMIT, view=1, now=0.0, **NO)
    effects = bench.machine.on_tick(1e6)
    assert [(e.valid_view, e.record) for e in of(effects, c.CastProposal)] == [(0, four.record().encode())]


def test_a_vote_book_that_contradicts_itself_is_a_bug(four) -> None:
    saved = [four.vote(0, 0, 0), four.vote(0, 0, 0, **NO)]
    with pytest.raises(LocalProtocolError):
        Bench(four, me=0, saved=saved)


def test_own_votes_heard_from_others_bind_even_when_the_disk_was_lost(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    bench.machine.on_vote(four.vote(bench.me, 0, 0), 0.0)
    assert not casts(bench.machine.on_tick(100.0))  # no nil prevote against it


def test_more_than_a_third_ahead_pulls_us_along_however_far(four) -> None:
    for view in (3, 5000):
        bench = Bench(four)
        bench.machine.start(0.0)
        bench.votes(PREVOTE, view=view, seats=bench.others[:1], **NO)
        assert bench.machine.view == 0  # one faulty member cannot
        bench.votes(PREVOTE, view=view + 40, seats=bench.others[1:2], **NO)
        assert bench.machine.view == view
        shown = {m.validator for m in bench.machine.resend()}
        assert len(shown) == 2  # others can follow


def test_equivocation_is_reported_once_and_memory_is_bounded(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    liar = bench.others[0]
    bench.votes(PREVOTE, seats=[liar])
    effects = ()
    for number in range(50):
        record = four.record(number)
        effects += bench.machine.on_vote(
            four.vote(liar, 0, 0, record_digest=bytes([number]) * 32, rewards_root=record.rewards_root), 0.0
        )
    (evidence,) = of(effects, c.Equivocation)
    assert evidence.first.validator == evidence.second.validator
    assert len(bench.machine._views[0].tallies[0].all()) == 1
    for view in range(0, 20_000, 7):
        bench.machine.on_vote(c.Vote(four.committee.task, 1, view, 0, NIL, NIL, four.keys[liar].peer, b""), 0.0)
    assert len(bench.machine._views) <= 2 * c.WINDOW + 2
    assert len(bench.machine._far) == 1


def test_a_second_vote_counts_once_honest_members_back_it(four) -> None:
    """A liar tells us nil and the others the record; they decide, and so must we."""
    bench = Bench(four)
    bench.machine.start(0.0)
    bench.propose()
    liar, *honest = bench.others
    bench.votes(PRECOMMIT, seats=[liar], **NO)
    bench.votes(PRECOMMIT, seats=[liar])
    bench.votes(PRECOMMIT, seats=honest)
    assert bench.machine.decision is None
    bench.votes(PRECOMMIT, seats=[liar])  # sent again by one that has decided
    assert bench.machine.decision is not None


def test_resend_lets_others_follow(four) -> None:
    """What a liar sent to us alone, and why we are where we are."""
    bench = Bench(four)
    bench.machine.start(0.0)
    seen = [four.vote(seat, 0, 0, **NO) for seat in bench.others[:2]]
    for vote in seen:
        bench.machine.on_vote(vote, 0.0)
    assert set(bench.machine.resend()) == set(seen)

    bench = Bench(four, me=Bench(four).order[2])
    saved = lock(bench)
    sent = set(bench.machine.resend())
    assert set(saved) <= sent  # proposal, prevote quorum, own votes
    nil = {four.vote(seat, 0, 1, **NO) for seat in bench.others[:2]}
    assert nil <= sent  # the precommits that ended view 0


def test_an_onlooker_decides_and_never_votes(four) -> None:
    bench = Bench(four)
    machine = c.Consensus(four.committee, 1, None, four.beacon, Timeouts.create())
    effects = machine.start(0.0)
    effects += machine.on_proposal(four.proposal(0), 0.0)
    effects += machine.on_checked(bench.digest, True, 0.0)
    for step in Step:
        for seat in range(3):
            effects += machine.on_vote(four.vote(seat, 0, int(step)), 0.0)
    assert of(effects, c.Decided)
    assert not of(effects, c.CastVote)


def test_foreign_messages_change_nothing(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    wrong = next(seat for seat in range(4) if seat != bench.order[0])
    assert bench.machine.on_proposal(four.proposal(0, seat=wrong), 0.0) == ()
    assert bench.machine.on_vote(four.vote(0, round=2), 0.0) == ()
    assert bench.machine.on_vote(four.vote(0, validator=b"\0" * 38), 0.0) == ()
    assert bench.machine.on_checked(b"x" * 32, True, 0.0) == ()
    assert bench.machine.resend() == ()
    with pytest.raises(LocalProtocolError):
        bench.machine.offer(b"nonsense", 0.0)
    with pytest.raises(LocalProtocolError):
        bench.machine.start(1.0)


def test_timeouts_learn_from_slow_checks(four) -> None:
    bench = Bench(four)
    bench.machine.start(0.0)
    before = bench.machine.timeouts.propose.compute_seconds()
    bench.propose()
    bench.machine.on_checked(bench.digest, True, 30.0)  # long after the time-out
    assert bench.machine.timeouts.propose.compute_seconds() > max(before, 30.0)
