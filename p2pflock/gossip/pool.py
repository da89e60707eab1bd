"""The payloads of the current rounds that this peer holds or waits for, in memory.

Law: what is held is bounded by what the node itself asked for.  A payload enters only when `expect` named its
content id and a size that it does not exceed beforehand and the bytes hash to that id; an own payload enters
through `offer`.  No I/O here: exchange.py moves the bytes, testing.swarm uses the same pool.

Attack: a member names another's content id with a false size, so that the true payload is refused wherever
the lie was heard first.  The id alone says what the bytes are; a size is only a bound, and the largest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field

from p2pflock.errors import InvalidMessageError, LocalProtocolError
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID

MAX_ROUND_KEY_BYTES = 64
MAX_ROUNDS = 16
MAX_PAYLOADS_PER_ROUND = 1024
MAX_TOTAL_BYTES = 4 << 30

# A payload that somebody is about to send is not asked of another: so long, and this many times at most.
CLAIM_SECONDS = 5.0
MAX_CLAIMS = 2

Arrived = Callable[[bytes, CID], None]


@dataclass(slots=True)
class _Claim:
    until: float = 0.0
    times: int = 0


@dataclass(slots=True)
class _Round:
    expected: dict[CID, int] = field(default_factory=dict)
    held: dict[CID, bytes] = field(default_factory=dict)
    claims: dict[CID, _Claim] = field(default_factory=dict)


class PayloadPool:
    """Payloads by round and content id.

    Args:
        arrived: called once for each payload as it becomes available, own ones included.
        max_total_bytes: bound on the sum of all held and expected sizes.
    """

    def __init__(self, arrived: Arrived, *, max_total_bytes: int = MAX_TOTAL_BYTES) -> None:
        self._arrived = arrived
        self._rounds: dict[bytes, _Round] = {}
        self._max_total_bytes = max_total_bytes
        self._promised_bytes = 0  # sum over all expected sizes, held or not
        self._watching: set[tuple[bytes, CID, Callable[[], object]]] = set()
        self.refused = 0

    @property
    def promised_bytes(self) -> int:
        return self._promised_bytes

    def offer(self, round_key: bytes, cid: CID, payload: bytes) -> None:
        """Take in an own payload.  Raises LocalProtocolError when it does not hash to `cid`."""
        if unixfs.compute_cid(payload) != cid:
            raise LocalProtocolError("offered payload does not match its content id")
        self.expect(round_key, cid, len(payload))
        self._keep(self._rounds[round_key], round_key, cid, payload)

    def expect(self, round_key: bytes, cid: CID, size_bytes: int) -> None:
        """Allow one payload of at most this size.  Naming it again is fine; the larger size counts.

        Raises:
            InvalidMessageError: the payloads promised by peers would not fit the memory bound.
            LocalProtocolError: too many rounds are open; `forget` old ones.
        """
        if len(round_key) > MAX_ROUND_KEY_BYTES:
            raise LocalProtocolError("round key too long")
        round_ = self._rounds.get(round_key)
        if round_ is None:
            if len(self._rounds) >= MAX_ROUNDS:
                raise LocalProtocolError(f"more than {MAX_ROUNDS} rounds open: forget the old ones")
            round_ = self._rounds[round_key] = _Round()
        known = round_.expected.get(cid)
        if known is not None and known >= size_bytes:
            return
        if size_bytes < 0 or (known is None and len(round_.expected) >= MAX_PAYLOADS_PER_ROUND):
            raise InvalidMessageError("too many payloads in this round")
        more_bytes = size_bytes - (known or 0)
        if self._promised_bytes + more_bytes > self._max_total_bytes:
            raise InvalidMessageError("payloads of the open rounds exceed the memory bound")
        round_.expected[cid] = size_bytes
        self._promised_bytes += more_bytes
        for key, named, tell in list(self._watching):
            if (key, named) == (round_key, cid):
                tell()

    def is_expected(self, round_key: bytes, cid: CID, size_bytes: int) -> bool:
        """Whether a payload of this size would be taken in."""
        round_ = self._rounds.get(round_key)
        return round_ is not None and size_bytes <= round_.expected.get(cid, -1)

    @contextmanager
    def watch(self, round_key: bytes, cid: CID, tell: Callable[[], object]) -> Iterator[None]:
        """Within the block `tell` is called when the node names this content id, or a larger size of it."""
        entry = round_key, cid, tell
        self._watching.add(entry)
        try:
            yield
        finally:
            self._watching.discard(entry)

    def wanted(self, round_key: bytes) -> dict[CID, int]:
        """Content id -> largest size of what is expected and not here."""
        round_ = self._rounds.get(round_key)
        if round_ is None:
            return {}
        return {cid: size for cid, size in round_.expected.items() if cid not in round_.held}

    # --- who sends what -------------------------------------------------------------------------------
    def unclaimed(self, round_key: bytes, now: float) -> dict[CID, int]:
        """`wanted`, without what a session that began lately brings already: two partners would send the same."""
        round_ = self._rounds.get(round_key)
        claims = {} if round_ is None else round_.claims
        return {
            cid: size
            for cid, size in self.wanted(round_key).items()
            if cid not in claims or claims[cid].until <= now
        }

    def claim(self, round_key: bytes, cids: AbstractSet[CID], now: float) -> None:
        """A partner has these and is about to send them.

        Attack: partners that promise everything and send nothing.  A claim ends by itself, and a payload can be
        claimed a few times only; from then on it is asked of everybody."""
        round_ = self._rounds.get(round_key)
        if round_ is None:
            return
        for cid in round_.expected.keys() & cids:
            claim = round_.claims.setdefault(cid, _Claim())
            if claim.times < MAX_CLAIMS:
                claim.times, claim.until = claim.times + 1, now + CLAIM_SECONDS

    def release(self, round_key: bytes, cids: AbstractSet[CID]) -> None:
        """The session that claimed these is over."""
        round_ = self._rounds.get(round_key)
        claims = {} if round_ is None else round_.claims
        for cid in claims.keys() & cids:
            claims[cid].until = 0.0

    def find(self, round_key: bytes, cid: CID) -> bytes | None:
        round_ = self._rounds.get(round_key)
        return None if round_ is None else round_.held.get(cid)

    def accept(self, round_key: bytes, cid: CID, payload: bytes) -> bool:
        """Take in a foreign payload; whether it is new here.  Raises InvalidMessageError when it was not
        expected, is larger than that, or does not hash to its id."""
        if unixfs.compute_cid(payload) != cid:
            self.refused += 1
            raise InvalidMessageError("payload does not match its content id")
        return self.accept_hashed(round_key, cid, payload)

    def accept_hashed(self, round_key: bytes, cid: CID, payload: bytes) -> bool:
        """As `accept`, for a payload whose id was just computed (in a thread, when it is large)."""
        round_ = self._rounds.get(round_key)
        if round_ is None or len(payload) > round_.expected.get(cid, -1):
            self.refused += 1
            raise InvalidMessageError("payload was not expected")
        return self._keep(round_, round_key, cid, payload)

    def collect(self, round_key: bytes) -> dict[CID, bytes]:
        round_ = self._rounds.get(round_key)
        return {} if round_ is None else dict(round_.held)

    def forget(self, round_key: bytes) -> None:
        round_ = self._rounds.pop(round_key, None)
        if round_ is not None:
            self._promised_bytes -= sum(round_.expected.values())

    def _keep(self, round_: _Round, round_key: bytes, cid: CID, payload: bytes) -> bool:
        if cid in round_.held:
            return False
        round_.held[cid] = payload
        self._arrived(round_key, cid)
        return True
