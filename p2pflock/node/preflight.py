"""Cheap checks before anything slow is started: a mistyped option is told at once, not by a child much later.

Law: a check finds reasons not to start and changes nothing; what passes here may still fail later, and whoever
fails then says the same words.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

import trio

from p2pflock.errors import BootstrapError, InvalidMessageError, PortTakenError, SpecError, UserError
from p2pflock.learning.spec import TaskSpec
from p2pflock.primitives import peerid

BOOTSTRAP_SECONDS = 10.0  # a bootstrap peer that was started at the same moment needs its time
RETRY_SECONDS = 0.5
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")


def check_modules(spec: TaskSpec, trusted: Sequence[str]) -> None:
    """Attack: a spec that was passed around names code of its author's.  Raises SpecError."""
    for module in spec.foreign_modules():
        if not any(module == root or module.startswith(root + ".") for root in trusted):
            raise SpecError(
                f"the task wants to run code of {module!r}, which is not trusted here",
                f"read that code; if you trust it, pass --trust-module {module}",
            )


def check_port(host: str, port: int, option: str) -> None:
    """Raises PortTakenError, UserError when the address is none of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As listening servers do it: a connection in TIME_WAIT does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError as error:
            raise PortTakenError(f"port {port} needs privileges", f"choose a {option} above 1023") from error
        except OSError as error:
            if port and _can_bind(family, host):
                raise PortTakenError(
                    f"port {port} on {host} is in use", f"choose another {option}, or 0 for any"
                ) from error
            raise UserError(f"cannot listen on {host}: {error.strerror}", "give an address of this machine") from error


def _can_bind(family: int, host: str) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
        probe.bind((host, 0))
        return True
    return False


def parse_bootstrap(address: str) -> tuple[bytes, tuple[str, int] | None]:
    """Peer id, and host and port where it is plain TCP.  Raises SpecError."""
    parts = address.split("/")
    try:
        if len(parts) < 5 or parts[0] or parts[-2] != "p2p":
            raise ValueError("not a multiaddress that ends with /p2p/ and a peer id")
        peer = peerid.from_text(parts[-1])
        if parts[1] in _HOSTS and parts[3] == "tcp" and len(parts) == 7:
            return peer, (parts[2], int(parts[4]))
    except (ValueError, InvalidMessageError) as error:
        raise SpecError(
            f"malformed bootstrap address: {address[:200]}", "like /ip4/1.2.3.4/tcp/4001/p2p/12D3Koo…"
        ) from error
    return peer, None


async def check_bootstrap(
    addresses: Sequence[str], own_peer: bytes, *, seconds: float = BOOTSTRAP_SECONDS
) -> None:
    """Returns as soon as one of the addresses takes a TCP connection.

    Raises:
        SpecError: one is malformed.
        BootstrapError: none did within `seconds`; the message has the cause for each.
    """
    parsed = [parse_bootstrap(address) for address in addresses]
    targets = [target for peer, target in parsed if peer != own_peer]
    if not targets or None in targets:
        return  # alone, or a transport that only the daemon speaks
    causes: dict[str, str] = {}

    async def knock(host: str, port: int) -> None:
        name = f"{host}:{port}"
        causes.setdefault(name, "no answer")
        while True:
            try:
                stream = await trio.open_tcp_stream(host, port)
            except OSError as error:
                causes[name] = _describe(error)
                await trio.sleep(RETRY_SECONDS)
            else:
                await stream.aclose()
                nursery.cancel_scope.cancel()
                return

    with trio.move_on_after(seconds) as limit:
        async with trio.open_nursery() as nursery:
            for target in targets:
                if target is not None:
                    nursery.start_soon(knock, *target)
    if limit.cancelled_caught:
        shown = ", ".join(f"{name} ({cause})" for name, cause in sorted(causes.items())[:3])
        raise BootstrapError(
            f"no bootstrap peer answered within {seconds:.0f} s: {shown}",
            "check that one of them runs, and its address and firewall; any live peer prints one that works",
        )


def _describe(error: BaseException) -> str:
    """The system's own words: trio wraps them once for each address that a name has."""
    while error.__cause__ is not None:
        error = error.__cause__
    inner = getattr(error, "exceptions", (error,))[0]
    return str(getattr(inner, "strerror", None) or inner)
