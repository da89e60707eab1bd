"""The whole exception tree, and the exit code of each branch.

Law: an error is named after who is at fault, carries one line that says what happened and one that says
how to fix it, and maps to exactly one documented exit code (docs/exit-codes.md).  Foreign exceptions are
turned into these at the edge of the adapter that met them.

::

    FlockError                      1   anything of ours
    ├── UserError                   2   bad input from the person at the keyboard
    │   ├── PasswordError          10   wrong or missing keystore password
    │   ├── KeystoreError          11   keystore missing, damaged or readable by others
    │   └── SpecError              12   malformed task spec or configuration
    ├── EnvironmentError_           3   this machine lacks something
    │   ├── PortTakenError         20   a listening port is in use
    │   ├── DiskFullError          21   no space, or the store's quota is used up
    │   ├── MissingToolError       22   anvil, a native library or a data file is not there
    │   └── StartupError           23   a child process (DHT daemon, trainer) did not come up
    ├── NetworkError                4   the outside world did not answer
    │   ├── BootstrapError         30   no bootstrap address could be reached
    │   ├── ChainUnavailableError  31   the RPC endpoint is down or on another chain
    │   └── ChainRejectedError     32   the chain refused a transaction, with the contract's reason
    ├── VerificationError          40   a verdict that was asked for is FAIL
    ├── LocalProtocolError         50   our own code broke a rule of the protocol: a bug
    └── RemoteProtocolError         –   a peer broke a rule: dropped and counted, never fatal
        ├── InvalidMessageError     –   malformed, oversized, non-canonical or badly signed
        └── UnavailableError        –   a peer did not deliver in time
"""

from __future__ import annotations

from typing import ClassVar


class FlockError(Exception):
    """Root of every error raised on purpose by p2pflock.

    Args:
        message: one line, what happened.
        hint: one line, what the user can do about it; empty where there is nothing to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UserError(FlockError):
    """Bad input from the person at the keyboard."""

    exit_code = 2


class PasswordError(UserError):
    """The keystore password is wrong or missing."""

    exit_code = 10


class KeystoreError(UserError):
    """The keystore is missing, damaged, incomplete, or readable by other users."""

    exit_code = 11


class SpecError(UserError):
    """A task spec or configuration file is malformed."""

    exit_code = 12


class EnvironmentError_(FlockError):  # noqa: N801, N818 - the builtin owns the plain name
    """This machine lacks something the command needs."""

    exit_code = 3


class PortTakenError(EnvironmentError_):
    """A listening port is already in use."""

    exit_code = 20


class DiskFullError(EnvironmentError_):
    """No space left on the device, or the block store's quota is used up."""

    exit_code = 21


class MissingToolError(EnvironmentError_):
    """A program, native library or data file is not installed."""

    exit_code = 22


class StartupError(EnvironmentError_):
    """A child process did not become ready within its start-up allowance."""

    exit_code = 23


class NetworkError(FlockError):
    """The outside world did not answer."""

    exit_code = 4


class BootstrapError(NetworkError):
    """No bootstrap address could be reached."""

    exit_code = 30


class ChainUnavailableError(NetworkError):
    """The RPC endpoint is down, not answering in time, or serves another chain."""

    exit_code = 31


class ChainRejectedError(NetworkError):
    """The chain refused a transaction; the message carries the contract's custom error."""

    exit_code = 32


class VerificationError(FlockError):
    """A verdict that the user asked for is FAIL."""

    exit_code = 40


class LocalProtocolError(FlockError):
    """Our own code tried to break a rule of the protocol: always a bug, never a peer's doing."""

    exit_code = 50


class RemoteProtocolError(FlockError):
    """A peer broke a rule of the protocol: its message is dropped and counted."""


class InvalidMessageError(RemoteProtocolError):
    """A message is malformed, oversized, not canonical, or badly signed."""


class UnavailableError(RemoteProtocolError):
    """A peer did not deliver something within its deadline."""
