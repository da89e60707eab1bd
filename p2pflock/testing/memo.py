"""Pure functions of immutable messages, computed once for all peers of a simulation.

Law: only what has no side effect and depends on its arguments alone stands here, so a simulation decides exactly
what it would decide without: a thousand peers decode, encode and judge the same message, and one answer serves them
all.  Objects are known by identity, which is cheap; a cache holds what it names, so no identity comes back as
another's, and begins anew when it is full.
"""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from p2pflock.node import driver, intake
from p2pflock.primitives import schema
from p2pflock.primitives.cid import CID
from p2pflock.protocol import committee, consensus, validation

SIZE = 1 << 16


class _Memo:
    def __init__(self) -> None:
        self._known: dict[Any, tuple[Any, Any]] = {}

    def get(self, key: Any, held: Any, compute: Callable[[], Any]) -> Any:
        """`held`: what must live as long as the entry, because the key names it by identity."""
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= SIZE:
                self._known.clear()
            known = self._known[key] = held, compute()
        return known[1]


def patches() -> Iterator[AbstractContextManager[Any]]:
    """Context managers under which these functions remember."""
    decode = schema.Record.decode.__func__  # type: ignore[attr-defined]
    encode, compute_cid = schema.Record.encode, schema.Record.cid
    order, panels = committee.compute_proposer_order, committee.compute_panels
    decoded, encoded, cids, orders, rulings, drawn = (_Memo() for _ in range(6))

    def decode_once(cls: type[schema.Record], data: bytes) -> Any:
        return decoded.get((cls, data), None, lambda: decode(cls, data))

    def encode_once(self: schema.Record) -> bytes:
        return encoded.get(id(self), self, lambda: encode(self))  # type: ignore[no-any-return]

    def cid_once(self: schema.Record) -> CID:
        return cids.get(id(self), self, lambda: compute_cid(self))  # type: ignore[no-any-return]

    def order_once(of: committee.Committee, beacon: bytes, cycle: int) -> tuple[int, ...]:
        return orders.get((id(of), beacon, cycle), of, lambda: order(of, beacon, cycle))  # type: ignore[no-any-return]

    def panels_once(of: committee.Committee, cohort: committee.Cohort, beacon: bytes) -> committee.Panels:
        return drawn.get((id(of), cohort.members, beacon), of, lambda: panels(of, cohort, beacon))  # type: ignore[no-any-return]

    def judge_once(rule: Callable[..., validation.Ruling]) -> Callable[..., validation.Ruling]:
        def judge(facts: validation.RoundFacts, message: Any) -> validation.Ruling:
            key = rule, id(message), id(facts.committee), facts.parent, facts.previous_head, facts.beacon
            return rulings.get(key, (message, facts.committee), lambda: rule(facts, message))  # type: ignore[no-any-return]

        return judge

    yield unittest.mock.patch.object(schema.Record, "decode", classmethod(decode_once))
    yield unittest.mock.patch.object(schema.Record, "encode", encode_once)
    yield unittest.mock.patch.object(schema.Record, "cid", cid_once)
    for module in (committee, consensus):
        yield unittest.mock.patch.object(module, "compute_proposer_order", order_once)
    for module in (driver, validation):
        yield unittest.mock.patch.object(module, "compute_panels", panels_once)
    rules = {kind: judge_once(rule) for kind, rule in intake.RULES.items()}
    yield unittest.mock.patch.object(intake, "RULES", rules)
