"""The contracts' ABI and creation code, as contracts/tools/build.sh wrote them and CI compares them.

Law: nothing here is edited by hand; contracts/src is the source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

TOKEN: Final = "FlockToken"  # noqa: S105 - a contract's name
REGISTRY: Final = "PeerRegistry"
STAKING: Final = "Staking"
TASKS: Final = "Tasks"
ANCHOR: Final = "CheckpointAnchor"
REWARDS: Final = "Rewards"
NAMES: Final = (TOKEN, REGISTRY, STAKING, TASKS, ANCHOR, REWARDS)


@dataclass(frozen=True, slots=True)
class Artifact:
    name: str
    abi: list[dict[str, Any]]
    bytecode: str  # 0x…, creation code without constructor arguments


@cache
def get_artifact(name: str) -> Artifact:
    text = resources.files("p2pflock.chain").joinpath("artifacts", f"{name}.json").read_text()
    value = json.loads(text)
    return Artifact(name, value["abi"], value["bytecode"])
