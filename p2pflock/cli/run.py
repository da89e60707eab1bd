"""`p2pflock run`: one peer of one task, until it is told to stop.

Law: this command parses, unlocks and prints; what a peer does is in node/.  Ends with 0 on SIGINT or SIGTERM
after the last round, or with --exit-when-done by itself.
"""

from __future__ import annotations

import enum
import functools
import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pflock.cli.options import (
    Format,
    FormatOption,
    HomeOption,
    PasswordFileOption,
    ask_password,
    keystore_path,
)
from p2pflock.cli.output import Output, ProgressLine
from p2pflock.errors import InvalidMessageError, SpecError, UserError

DIE_WITH_PARENT_VARIABLE = "P2PFLOCK_DIE_WITH_PARENT"
DEVICE_VARIABLE = "P2PFLOCK_DEVICE"  # also reaches the peers of `p2pflock up`


class Device(str, enum.Enum):
    """This peer's own hardware, which the task says nothing of."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


TaskOption = Annotated[
    str, typer.Option("--task", help="A shipped task (mnist, shakespeare), a .toml spec, or a .cbor one.")
]


def read_task(name: str) -> Any:
    """A TaskSpec from a shipped name, TOML or its canonical encoding.  Raises SpecError."""
    from p2pflock.learning.spec import TaskSpec, load_spec

    if not name.endswith(".cbor"):
        return load_spec(name)
    try:
        return TaskSpec.decode(Path(name).read_bytes())
    except OSError as error:
        raise SpecError(f"cannot read {name}: {error.strerror}", "give the path of a task spec") from error
    except InvalidMessageError as error:
        raise SpecError(f"{name}: {error.message}", "give the spec file that the swarm was started with") from error


def run(
    task: TaskOption,
    home: HomeOption,
    password_file: PasswordFileOption = None,
    bootstrap: Annotated[
        list[str] | None,
        typer.Option("--bootstrap", help="Multiaddress of any live peer; repeat for more. None: start alone."),
    ] = None,
    rpc: Annotated[str, typer.Option("--rpc", help="RPC endpoint of the chain. None: run without a chain.")] = "",
    address_book: Annotated[
        Path | None, typer.Option("--address-book", help="Contract addresses on that chain (JSON).")
    ] = None,
    committee: Annotated[
        Path | None, typer.Option("--committee", help="Static committee file, for runs without a chain.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    announce: Annotated[
        list[str] | None, typer.Option("--announce", help="Address by which others reach this machine.")
    ] = None,
    control_port: Annotated[int, typer.Option("--control-port", min=0, max=65535, help="libp2p; 0: any.")] = 0,
    swarm_port: Annotated[int, typer.Option("--swarm-port", min=0, max=65535, help="hivemind; 0: any.")] = 0,
    network: Annotated[str, typer.Option("--network", help="local, testnet or base.")] = "local",
    trust_module: Annotated[
        list[str] | None,
        typer.Option("--trust-module", help="Python module outside p2pflock that the task may import."),
    ] = None,
    kubo: Annotated[
        str, typer.Option("--kubo", help="RPC of an IPFS daemon to pin at, e.g. /ip4/127.0.0.1/tcp/5001/http.")
    ] = "",
    threads: Annotated[int, typer.Option("--threads", min=1, max=256, help="CPU threads of the trainer.")] = 1,
    device: Annotated[
        Device,
        typer.Option("--device", envvar=DEVICE_VARIABLE, help="Where the trainer computes. auto: a GPU if there is one."),
    ] = Device.AUTO,
    exit_when_done: Annotated[
        bool, typer.Option("--exit-when-done", help="End after the last round instead of serving on.")
    ] = False,
    form: FormatOption = Format.TEXT,
) -> None:
    """Run one peer: join, train, agree, and serve blocks until interrupted."""
    import trio

    from p2pflock import processes
    from p2pflock.node.assembly import PeerConfig, run_peer
    from p2pflock.params import get_preset
    from p2pflock.storage import keystore

    if os.environ.get(DIE_WITH_PARENT_VARIABLE):
        processes.die_with_parent()
    spec = read_task(task)
    if rpc and address_book is None:
        raise UserError("--rpc needs the contracts' addresses", "add --address-book FILE")
    signer = keystore.unlock(keystore_path(home), ask_password(password_file))
    config = PeerConfig(
        home=home,
        spec=spec,
        network=get_preset(network),
        bootstrap=tuple(bootstrap or ()),
        listen_host=host,
        announce=tuple(announce or ()),
        control_port=control_port,
        swarm_port=swarm_port,
        rpc_url=rpc,
        address_book=address_book,
        committee_file=committee,
        trusted_modules=tuple(trust_module or ()),
        threads=threads,
        device=device.value,
        kubo=kubo,
    )
    output = Output(form)

    async def main() -> None:
        screen = _Screen(output, spec.task.rounds, trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope)
            done = functools.partial(screen.finish, nursery.cancel_scope if exit_when_done else None)
            await run_peer(config, signer, finished=done, listen=screen.show)
            nursery.cancel_scope.cancel()

    trio.run(main, strict_exception_groups=True)


async def _end_on_signal(scope: Any) -> None:
    import trio

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


class _Screen:
    """Events of this peer as a join line, a progress line and notes."""

    def __init__(self, output: Output, rounds: int, started: float) -> None:
        self._output = output
        self._line = ProgressLine(output.form, rounds, started=started)
        self._loss = 0.0
        self._accuracy: float | None = None
        self._now = started

    def show(self, entry: dict[str, Any]) -> None:
        import trio

        match entry["event"]:
            case "started":
                self._line.note(f"peer {entry['peer']}")
                for address in entry["swarm_addresses"][:1]:
                    self._line.note(f"others join with: --bootstrap {address}")
            case "contributed":
                self._loss = entry["loss_micro"] / 1e6
            case "evaluated":
                self._accuracy = entry["accuracy_micro"] / 1e6 or None
            case "decided":
                self._line.update(
                    entry["round"],
                    loss=self._loss,
                    peers=len(entry["contributors"]),
                    accuracy=self._accuracy,
                    now=trio.current_time(),
                )
            case "caught_up":
                self._line.note(f"caught up from round {entry['from_round']} to {entry['to_round']}")
            case "finished":
                self._line.note(f"finished: checkpoint {entry['checkpoint']}")
                self._output.document(entry)

    def finish(self, scope: Any) -> None:
        self._line.close()
        if scope is not None:
            scope.cancel()

