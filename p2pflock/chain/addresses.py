"""Where the contracts of one network are.

Law: an address book is what one needs to know to use a deployment, and is no secret.  Its JSON form has one
key per contract, 0x-prefixed checksum-free hex, and travels beside the task spec.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from p2pflock.errors import SpecError


@dataclass(frozen=True, slots=True)
class AddressBook:
    chain_id: int
    deployed_block: int  # events are searched from here on
    token: bytes  # 20 bytes, as all below
    registry: bytes
    staking: bytes
    tasks: bytes
    anchor: bytes
    rewards: bytes

    def to_json(self) -> str:
        values = {
            name: "0x" + value.hex() if isinstance(value, bytes) else value
            for name, value in asdict(self).items()
        }
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AddressBook:
        """Raises SpecError for anything but what `to_json` writes."""
        try:
            values = json.loads(text)
            if not isinstance(values, dict) or values.keys() != {field.name for field in fields(cls)}:
                raise ValueError("wrong set of keys")
            numbers: dict[str, int] = {name: values.pop(name) for name in ("chain_id", "deployed_block")}
            if not all(type(number) is int and number >= 0 for number in numbers.values()):
                raise ValueError("chain_id and deployed_block are whole numbers")
            addresses = {name: bytes.fromhex(str(value).removeprefix("0x")) for name, value in values.items()}
            if not all(len(address) == 20 for address in addresses.values()):
                raise ValueError("an address has 20 bytes")
        except ValueError as error:
            raise SpecError(
                f"malformed address book: {error}", "use the file that the deployment wrote"
            ) from error
        return cls(numbers["chain_id"], numbers["deployed_block"], **addresses)

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        partial.write_text(self.to_json())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> AddressBook:
        try:
            return cls.from_json(path.read_text())
        except OSError as error:
            raise SpecError(
                f"cannot read address book {path}: {error.strerror}", "name the file of a deployment"
            ) from error
