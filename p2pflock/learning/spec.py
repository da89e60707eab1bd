"""The task spec: what is trained and by which rules, as TOML for people and as one DAG-CBOR block for peers.

Law: two spec files that mean the same have the same content id, and the id covers everything that shapes the
training.  Every mistake is a SpecError that names the key and says how to fix it; an unknown key is refused,
because a misspelt one would silently train something else.  A spec that arrived from a peer is decoded as
strictly as any message.  This file imports no torch: the command line reads it at every start.

Numbers with a fraction are kept as `decimal.Decimal` and travel as decimal text, since DAG-CBOR as we use it
has no floats and "0.1" has one spelling.  Sections and keys: docs/design.md and the shipped tasks/*.toml.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from p2pflock.errors import InvalidMessageError, SpecError
from p2pflock.primitives import dagcbor
from p2pflock.primitives.cid import CID

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KIND = "p2pflock/spec/1"
MAX_BYTES = 64 << 10
BUILTIN = "p2pflock.learning.tasks"

Argument = str | int | bool | Decimal | tuple[Any, ...]

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*:[A-Za-z_][\w]*", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_ARGUMENT_NAME = re.compile(r"[A-Za-z_]\w{0,62}", re.ASCII)


# --- field kinds: each check takes a TOML value and returns it, or raises ValueError saying what it wants ---
Check = Callable[[Any], Any]


def _key(check: Check, default: Any = MISSING, factory: Any = MISSING) -> Any:
    if factory is not MISSING:
        return field(default_factory=factory, metadata={"check": check})
    if default is MISSING:
        return field(metadata={"check": check})
    return field(default=default, metadata={"check": check})


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _real(low: str, high: str, *, above: bool = False) -> Check:
    least, most = Decimal(low), Decimal(high)

    def check(value: Any) -> Decimal:
        if type(value) is int:
            value = Decimal(value)
        if type(value) is not Decimal or not value.is_finite() or not least <= value <= most or (
            above and value == least
        ):
            raise ValueError(f"a number {'above' if above else 'from'} {low} up to {high}")
        return _plain(value)

    return check


def _one_of(*choices: str) -> Check:
    def check(value: Any) -> str:
        if value not in choices or type(value) is not str:
            raise ValueError("one of " + ", ".join(f'"{choice}"' for choice in choices))
        return value

    return check


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _name(value: Any) -> str:
    if type(value) is not str or not _NAME.fullmatch(value):
        raise ValueError("lower-case letters, digits and dashes, at most 63")
    return value


def _entry_point(value: Any) -> str:
    if type(value) is not str or len(value) > 256 or not _ENTRY_POINT.fullmatch(value):
        raise ValueError('a Python entry point, "package.module:function"')
    return value


def _optional_entry_point(value: Any) -> str:
    return "" if value == "" else _entry_point(value)


def _arguments(value: Any) -> dict[str, Argument]:
    if not isinstance(value, Mapping) or len(value) > 64:
        raise ValueError("a table of at most 64 arguments")
    for name in value:
        if not _ARGUMENT_NAME.fullmatch(name):
            raise ValueError(f"argument names that Python accepts, not {name!r}")
    return {name: _argument(value[name], 0) for name in sorted(value)}


def _argument(value: Any, depth: int) -> Argument:
    if type(value) is int and -(1 << 63) <= value < 1 << 63:
        return value
    if type(value) is bool or (type(value) is str and len(value) <= 4096):
        return value
    if type(value) is Decimal and value.is_finite() and -64 <= value.adjusted() <= 64:
        return _plain(value)
    if isinstance(value, list | tuple) and len(value) <= 256 and depth < 4:
        return tuple(_argument(item, depth + 1) for item in value)
    raise ValueError("text, numbers, true or false, or lists of those")


def _plain(value: Decimal) -> Decimal:
    """The same number with one spelling: no exponent, no trailing zeros, no minus zero."""
    normal = value.normalize()
    return Decimal(format(normal + 0 if normal else Decimal(0), "f"))


# --- sections -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Task:
    """[task]"""

    name: str = _key(_name)
    rounds: int = _key(_whole(1, 1_000_000))
    seed: int = _key(_whole(0, (1 << 63) - 1), 0)
    kind: str = _key(_one_of("swarm"), "swarm")


@dataclass(frozen=True, slots=True)
class Model:
    """[model]: `factory(**arguments)` gives a torch.nn.Module.  Its loss is cross entropy over the last axis
    unless `loss` names a function of (outputs, targets); `sample` names a function of (model, length)."""

    factory: str = _key(_entry_point)
    arguments: dict[str, Argument] = _key(_arguments, factory=dict)
    loss: str = _key(_optional_entry_point, "")
    sample: str = _key(_optional_entry_point, "")


@dataclass(frozen=True, slots=True)
class Data:
    """[data]: `factory(**arguments)` gives a p2pflock.learning.dataset.Dataset."""

    factory: str = _key(_entry_point)
    arguments: dict[str, Argument] = _key(_arguments, factory=dict)


@dataclass(frozen=True, slots=True)
class Local:
    """[local]: what one peer does in a round."""

    lr: Decimal = _key(_real("0", "10", above=True))
    steps: int = _key(_whole(1, 1 << 20), 30)  # H
    steps_max: int = _key(_whole(0, 1 << 20), 0)  # above `steps`: each peer adapts H (protocol/pace.py); 0: fixed
    steps_min: int = _key(_whole(1, 1 << 20), 15)  # of an adapted H
    target_utilisation: Decimal = _key(_real("0", "0.99", above=True), Decimal("0.9"))  # what H is adapted to
    batch_size: int = _key(_whole(1, 1 << 16), 32)
    micro_batch: int = _key(_whole(0, 1 << 16), 0)  # samples that go through the model at once; 0: the batch
    precision: str = _key(_one_of("float32", "bfloat16"), "float32")  # of activations; weights are float32
    optimizer: str = _key(_one_of("adamw", "sgd", "muon"), "adamw")
    momentum: Decimal = _key(_real("0", "0.9999"), Decimal("0.9"))  # beta1 of adamw
    beta2: Decimal = _key(_real("0", "0.99999"), Decimal("0.95"))  # adamw, and what muon leaves to it
    weight_decay: Decimal = _key(_real("0", "1"), Decimal(0))
    warmup_steps: int = _key(_whole(0, 1 << 20), 0)
    final_lr_fraction: Decimal = _key(_real("0", "1"), Decimal(1))  # linear decay over all rounds
    grad_clip: Decimal = _key(_real("0", "1000000"), Decimal(0))  # L2 norm; 0 is none
    leaf_steps: int = _key(_whole(1, 1 << 20), 10)  # J: a leaf hash of the weights every so many steps

    @property
    def is_adaptive(self) -> bool:
        return self.steps_max > self.steps

    @property
    def most_steps(self) -> int:
        """The largest H that anyone may claim."""
        return max(self.steps, self.steps_max)


@dataclass(frozen=True, slots=True)
class Codec:
    """[codec]: error feedback, and top k per chunk or all as bytes (learning/codec.py)."""

    name: str = _key(_one_of("topk", "int8"), "topk")  # int8: k, k_start and start_rounds mean nothing
    chunk: int = _key(_whole(16, 1 << 15), 4096)
    k: int = _key(_whole(1, 1 << 15), 128)
    k_start: int = _key(_whole(1, 1 << 15), 1024)  # in the first `start_rounds`
    start_rounds: int = _key(_whole(0, 1_000_000), 5)
    beta: Decimal = _key(_real("0", "1"), Decimal("0.95"))


@dataclass(frozen=True, slots=True)
class Fold:
    """[fold]: the rule of learning/fold.py."""

    clip: str = _key(_one_of("median", "none"), "median")
    floor_divisor: int = _key(_whole(1, 512), 4)
    gain: Decimal = _key(_real("0", "4", above=True), Decimal(1))
    norm_bound: Decimal = _key(_real("0", "16", above=True), Decimal(2))


@dataclass(frozen=True, slots=True)
class Scoring:
    """[scoring]: how validators judge payloads."""

    batch_size: int = _key(_whole(1, 1 << 16), 256)  # public samples for the gradient
    held_out: int = _key(_whole(1, 1 << 16), 256)  # public samples for the loss change


@dataclass(frozen=True, slots=True)
class Committee:
    """[committee]: who decides, and how often that changes."""

    size: int = _key(_whole(1, 218), 64)
    epoch_rounds: int = _key(_whole(1, 1_000_000), 1_000_000)
    cohort: int = _key(_whole(1, 512), 64)  # contributors of one round, drawn when there are more


_SECTIONS: tuple[tuple[str, type[Any]], ...] = (
    ("task", Task),
    ("model", Model),
    ("data", Data),
    ("local", Local),
    ("codec", Codec),
    ("fold", Fold),
    ("scoring", Scoring),
    ("committee", Committee),
)
_AVERAGING = _one_of("gossip", "dense")


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """A whole, valid spec.  Build it with load_spec, parse_spec or TaskSpec.decode."""

    task: Task
    model: Model
    data: Data
    local: Local
    codec: Codec
    fold: Fold
    scoring: Scoring
    committee: Committee
    averaging: str = "gossip"  # "gossip": payloads and the deterministic fold; "dense": hivemind's mean

    def encode(self) -> bytes:
        """The one canonical DAG-CBOR encoding."""
        wire: dict[str, Any] = {"kind": KIND, "averaging": self.averaging}
        for name, _ in _SECTIONS:
            section = getattr(self, name)
            wire[name] = {key.name: _to_wire(getattr(section, key.name)) for key in fields(section)}
        return dagcbor.encode(wire)

    @classmethod
    def decode(cls, data: bytes) -> TaskSpec:
        """Raises InvalidMessageError for anything that `encode` would not have written."""
        if len(data) > MAX_BYTES:
            raise InvalidMessageError(f"spec: {len(data)} bytes, at most {MAX_BYTES}")
        wire = dagcbor.decode(data)
        if not isinstance(wire, dict) or wire.pop("kind", None) != KIND:
            raise InvalidMessageError(f"not a {KIND}")
        try:
            spec = _build(_from_wire(wire), "spec")
        except (SpecError, InvalidOperation, RecursionError) as error:
            raise InvalidMessageError(f"spec: {error}") from error
        if spec.encode() != data:
            raise InvalidMessageError("spec: not canonical")
        return spec

    def cid(self) -> CID:
        return CID.of_dag_cbor(self.encode())

    @property
    def task_id(self) -> bytes:
        """32 bytes that name the task in messages and on chain: the digest of the spec's CID."""
        return self.cid().digest

    def entry_points(self) -> tuple[str, ...]:
        """Every "module:function" that opening this task would import and call."""
        named = (self.model.factory, self.data.factory, self.model.loss, self.model.sample)
        return tuple(name for name in named if name)

    def foreign_modules(self) -> tuple[str, ...]:
        """Modules outside the shipped tasks that it names.  A spec from a peer must not choose what runs
        here: the trainer refuses these unless the user lists them as trusted (learning/entrypoint.py)."""
        modules = {name.partition(":")[0] for name in self.entry_points()}
        return tuple(sorted(module for module in modules if not module.startswith(BUILTIN + ".")))

    def with_rounds(self, rounds: int) -> TaskSpec:
        """The same task with another number of rounds, hence another content id.  Raises SpecError."""
        _check(_whole(1, 1_000_000), rounds, "task.rounds", "command line")
        return replace(self, task=replace(self.task, rounds=rounds))


# --- reading --------------------------------------------------------------------------------------------
def builtin_names() -> tuple[str, ...]:
    """Names of the shipped tasks."""
    files = resources.files(BUILTIN).iterdir()
    return tuple(sorted(entry.name[:-5] for entry in files if entry.name.endswith(".toml")))


def load_spec(path_or_builtin_name: str | Path) -> TaskSpec:
    """Read a spec file, or a shipped task by its name.  Raises SpecError."""
    name = str(path_or_builtin_name)
    if _NAME.fullmatch(name) and not Path(name).is_file():
        if name not in builtin_names():
            raise SpecError(
                f"no task is called {name!r}",
                f"use one of {', '.join(builtin_names())}, or give the path of a .toml file",
            )
        text = (resources.files(BUILTIN) / f"{name}.toml").read_text(encoding="utf-8")
        return parse_spec(text, f"{name}.toml")
    try:
        raw = Path(name).read_bytes()
    except OSError as error:
        raise SpecError(f"cannot read {name}: {error.strerror}", "give the path of a task spec") from error
    if len(raw) > MAX_BYTES:
        raise SpecError(f"{name}: {len(raw)} bytes, at most {MAX_BYTES}", "this does not look like a task spec")
    try:
        return parse_spec(raw.decode(), name)
    except UnicodeDecodeError as error:
        raise SpecError(f"{name}: not UTF-8 text", "save the file as UTF-8") from error


def parse_spec(text: str, origin: str = "spec") -> TaskSpec:
    """A spec from TOML text; `origin` names it in errors.  Raises SpecError."""
    try:
        table = tomllib.loads(text, parse_float=Decimal)
    except (tomllib.TOMLDecodeError, InvalidOperation, RecursionError) as error:
        raise SpecError(f"{origin}: not TOML: {error}", "fix the line it names") from error
    return _build(table, origin)


S = TypeVar("S")


def _build(table: Mapping[str, Any], origin: str) -> TaskSpec:
    known = {name for name, _ in _SECTIONS} | {"averaging"}
    for name in table:
        if name not in known:
            raise SpecError(f"{origin}: unknown section [{name}]", _suggest(name, known))
    averaging = _check(_AVERAGING, table.get("averaging", "gossip"), "averaging", origin)
    sections = {name: _section(cls, table.get(name, {}), name, origin) for name, cls in _SECTIONS}
    spec = TaskSpec(averaging=averaging, **sections)
    _validate_together(spec, origin)
    return spec


def _section(cls: type[S], table: Any, name: str, origin: str) -> S:
    if not isinstance(table, Mapping):
        raise SpecError(f"{origin}: {name} must be a section", f"write [{name}] and its keys below it")
    keys = {entry.name: entry for entry in fields(cls)}  # type: ignore[arg-type]
    for key in table:
        if key not in keys:
            raise SpecError(f"{origin}: unknown key {name}.{key}", _suggest(key, set(keys)))
    values: dict[str, Any] = {}
    for key, entry in keys.items():
        if key in table:
            values[key] = _check(entry.metadata["check"], table[key], f"{name}.{key}", origin)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise SpecError(f"{origin}: {name}.{key} is missing", f"add it to section [{name}]")
    return cls(**values)


def _check(check: Check, value: Any, key: str, origin: str) -> Any:
    try:
        return check(value)
    except ValueError as wanted:
        shown = str(value)[:40] if not isinstance(value, Mapping) else "a section"
        raise SpecError(f"{origin}: {key} = {shown} is not allowed", f"it must be {wanted}") from None


def _suggest(wrong: str, known: set[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"


def _validate_together(spec: TaskSpec, origin: str) -> None:
    for key in ("k", "k_start"):
        if getattr(spec.codec, key) > spec.codec.chunk:
            raise SpecError(f"{origin}: codec.{key} is larger than codec.chunk", "send at most the whole chunk")
    local = spec.local
    if local.steps_max and local.steps_max < local.steps:
        raise SpecError(f"{origin}: local.steps_max is below local.steps", "raise it, or leave it out for a fixed H")
    if local.is_adaptive and local.steps_min > local.steps:
        raise SpecError(f"{origin}: local.steps_min is above local.steps", "H is adapted around local.steps")
    if local.micro_batch > local.batch_size:
        raise SpecError(f"{origin}: local.micro_batch is larger than local.batch_size", "lower it, or leave it out")
    if spec.averaging == "dense" and spec.task.kind != "swarm":
        raise SpecError(f'{origin}: averaging = "dense" needs task.kind = "swarm"', 'use averaging = "gossip"')


# --- decimals on the wire -------------------------------------------------------------------------------
def _to_wire(value: Any) -> Any:
    if type(value) is Decimal:
        return {_DECIMAL_KEY: format(value, "f")}
    if isinstance(value, tuple):
        return [_to_wire(item) for item in value]
    if isinstance(value, dict):
        return {key: _to_wire(item) for key, item in value.items()}
    return value


_DECIMAL_KEY = "$"  # no key or argument can be called so
_DECIMAL = re.compile(r"-?[0-9]{1,80}(\.[0-9]{1,80})?", re.ASCII)


def _from_wire(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_wire(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_DECIMAL_KEY}:
            text = value[_DECIMAL_KEY]
            if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
                raise InvalidMessageError("spec: malformed decimal")
            return Decimal(text)
        return {key: _from_wire(item) for key, item in value.items()}
    return value
