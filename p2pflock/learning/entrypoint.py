"""Python code that a task spec names, found and called.

Law: a spec can come from a peer, and naming a function is running it.  So only code below p2pflock.learning.tasks
is looked up, and modules that the person at the keyboard listed as trusted, with everything below them.
`os:system` in a stranger's spec is refused before anything is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

from p2pflock.errors import FlockError, SpecError
from p2pflock.learning.spec import BUILTIN, Argument


def resolve(name: str, trusted_modules: Iterable[str] = ()) -> Callable[..., Any]:
    """The function that "package.module:function" names.  Raises SpecError."""
    module, _, function = name.partition(":")
    allowed = (BUILTIN, *trusted_modules)
    if not any(module == root or module.startswith(root + ".") for root in allowed):
        raise SpecError(
            f"the task wants to run code of {module!r}, which is not trusted here",
            f"read that code; if you trust it, list {module} as a trusted module",
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise SpecError(f"{name}: cannot import {module}: {error}", "install it, or correct the name") from error
    target = vars(found).get(function)  # not getattr: no module-level __getattr__
    if not callable(target):
        raise SpecError(f"{name}: {module} has no function {function}", "correct the name")
    return target  # type: ignore[no-any-return]


def call(name: str, arguments: Mapping[str, Argument], trusted_modules: Iterable[str] = ()) -> Any:
    """What `name(**arguments)` returns, decimals given as floats.  Raises SpecError for its failures."""
    function = resolve(name, trusted_modules)
    try:
        return function(**{key: _plain(value) for key, value in arguments.items()})
    except FlockError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise SpecError(f"{name} failed: {kind}: {error}", "correct its arguments or its code") from error


def _plain(value: Argument) -> Any:
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
