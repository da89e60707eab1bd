"""The presets hold together, and values that would open an attack are refused."""

from __future__ import annotations

import dataclasses

import pytest

from p2pflock import params
from p2pflock.errors import SpecError


@pytest.mark.parametrize("preset", params.PRESETS.values(), ids=lambda p: p.name)
def test_stake_stays_slashable_until_evidence_can_be_final(preset: params.NetworkParams) -> None:
    chain = preset.chain
    assert chain.cooldown_seconds > chain.epoch_seconds + chain.challenge_window_seconds + chain.finality_seconds


def test_a_short_cooldown_is_refused() -> None:
    with pytest.raises(SpecError, match="cooldown"):
        dataclasses.replace(params.BASE.chain, cooldown_seconds=params.BASE.chain.epoch_seconds)


def test_only_real_chains_settle_on_finalized() -> None:
    assert {p.name: p.chain.settle_on for p in params.PRESETS.values()} == {
        "local": "latest",
        "testnet": "finalized",
        "base": "finalized",
    }


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(SpecError) as caught:
        params.get_preset("bsae")
    assert "local, testnet, base" in caught.value.hint
