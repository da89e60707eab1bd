"""`p2pflock up`: a whole swarm on this machine, with a development chain, shown round by round.

Law: everything shown was read from the peers' event files and from the chain; nothing is computed here that a
peer did not say.  With --report the same facts are written as one JSON document.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from p2pflock.cli.options import Format, FormatOption
from p2pflock.cli.output import Output, ProgressLine, format_bytes, format_flock, to_json
from p2pflock.cli.run import TaskOption, read_task
from p2pflock.errors import VerificationError

START_SECONDS = 180.0


def up(
    task: TaskOption = "mnist",
    peers: Annotated[int, typer.Option("--peers", "-n", min=1, max=64, help="Peer processes.")] = 4,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Instead of the task's own.")] = None,
    chain: Annotated[str, typer.Option("--chain", help="anvil: an embedded Base-like chain; none.")] = "anvil",
    home: Annotated[Path, typer.Option("--home", help="Directory of the swarm.", file_okay=False)] = Path(
        "build/swarm"
    ),
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of each trainer.")] = 1,
    trust_module: Annotated[
        list[str] | None,
        typer.Option("--trust-module", help="Python module outside p2pflock that the task may import."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Afterwards verify the checkpoint and claim rewards.")] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Where the JSON report goes. [default: HOME/report.json]")
    ] = None,
    form: FormatOption = Format.TEXT,
) -> None:
    """Start a local swarm of N peers, watch it train, and stop it."""
    import trio

    from p2pflock.errors import UserError
    from p2pflock.node.local_swarm import LocalSwarm
    from p2pflock.params import LOCAL

    if chain not in ("anvil", "none"):
        raise UserError(f"--chain {chain} is not known", "use --chain anvil or --chain none")
    spec = read_task(task)
    if rounds is not None:
        spec = spec.with_rounds(rounds)
    swarm = LocalSwarm(
        home.resolve(), spec, peers, chain, LOCAL, threads=threads, trusted_modules=tuple(trust_module or ())
    )
    output = Output(form)

    async def main() -> dict[str, Any]:
        view = SwarmView(output, swarm, started=trio.current_time())
        try:
            swarm.start_chain()
            await trio.to_thread.run_sync(swarm.prepare, view.note)
            view.note(f"starting {peers} peers")
            await swarm.start(wait_seconds=START_SECONDS)
            async for peer, entry in swarm.events():
                view.take(peer.name, entry, trio.current_time())
            view.close()
            if demo:
                await trio.to_thread.run_sync(view.verify_and_claim)
            return view.report()
        finally:
            view.close()
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(swarm.stop)

    document = trio.run(main, strict_exception_groups=True)
    target = report or home / "report.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(to_json(document), indent=2) + "\n", encoding="utf-8")
    show(output, document)
    output.line(f"report: {target}")
    output.document(document)
    split = [row["round"] for row in document["rounds"] if len(set(row["model_hash"].values())) > 1]
    if split:
        raise VerificationError(f"peers hold different models after round {split[0]}", "this is a bug: report it")
    failed = [name for name, found in document["verify"].items() if found["verdict"] == "FAIL"]
    if failed:
        raise VerificationError(f"verification failed: {', '.join(failed)}", "see the reasons in the report")


class SwarmView:
    """Collects the events of all peers into the report, and shows progress meanwhile."""

    def __init__(self, output: Output, swarm: Any, *, started: float) -> None:
        self._output = output
        self._swarm = swarm
        self._line = ProgressLine(output.form, swarm.spec.task.rounds, started=started)
        self._rounds: dict[int, dict[str, Any]] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        self._verify: dict[str, dict[str, str]] = {}
        self._rewards: dict[str, dict[str, Any]] = {}
        self._samples = ""
        self._closed = False

    def note(self, text: str) -> None:
        self._line.note(text)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._line.close()

    def _round(self, number: int) -> dict[str, Any]:
        return self._rounds.setdefault(
            number,
            {
                "round": number,
                "model_hash": {},
                "record": {},
                "accuracy": None,
                "loss": None,
                "train_loss": {},
                "payload_bytes": {},
                "wire_bytes": {},
                "contributors": [],
                "absent": [],
                "view": None,
                "seconds": {},
                "anchor_tx": None,
                "gas": None,
            },
        )

    def take(self, peer: str, entry: dict[str, Any], now: float) -> None:
        match entry["event"]:
            case "started":
                self._line = ProgressLine(self._output.form, self._swarm.spec.task.rounds, started=now)
            case "contributed":
                row = self._round(entry["round"])
                row["payload_bytes"][peer] = entry["payload_bytes"]
                row["train_loss"][peer] = entry["loss_micro"] / 1e6
            case "decided":
                self._take_decided(peer, entry, now)
            case "evaluated":
                row = self._round(entry["round"])
                row["loss"] = entry["loss_micro"] / 1e6
                row["accuracy"] = entry["accuracy_micro"] / 1e6 or None
            case "traffic":
                self._round(entry["round"])["wire_bytes"][peer] = {
                    "sent": entry["sent_bytes"],
                    "received": entry["received_bytes"],
                }
            case "anchored":
                row = self._round(entry["round"])
                row["anchor_tx"], row["gas"] = entry["transaction"], entry["gas_used"]
            case "caught_up":
                self.note(f"{peer} caught up: round {entry['from_round']} to {entry['to_round']}")
                self._round(entry["to_round"])["model_hash"][peer] = entry["model_hash"]
            case "sample":
                self._samples = entry["text"]
            case "finished":
                self._finished[peer] = entry
            case "failed":
                self.note(f"{peer}: {entry['error']}")

    def _take_decided(self, peer: str, entry: dict[str, Any], now: float) -> None:
        row = self._round(entry["round"])
        is_first = not row["model_hash"]
        row["model_hash"][peer] = entry["model_hash"]
        row["record"][peer] = entry["record"]
        row["seconds"][peer] = entry["seconds"]
        if not is_first:
            return
        names = [p.name for p in self._swarm.peers]
        row["contributors"] = [names[seat] for seat in entry["contributors"]]
        row["absent"] = [names[seat] for seat, _ in entry["absent"]]
        row["view"] = entry["view"]
        losses = [row["train_loss"][name] for name in row["contributors"] if name in row["train_loss"]]
        accuracy = next(
            (r["accuracy"] for _, r in sorted(self._rounds.items(), reverse=True) if r["accuracy"] is not None), None
        )
        self._line.update(
            entry["round"],
            loss=sum(losses) / max(1, len(losses)),
            peers=len(row["contributors"]),
            now=now,
            accuracy=accuracy,
        )

    # --- afterwards ---
    @property
    def checkpoint(self) -> str | None:
        return next((entry["checkpoint"] for entry in self._finished.values()), None)

    def verify_and_claim(self) -> None:
        """Blocking: verify from a peer's own store and chain, then claim for everybody."""
        from p2pflock.node import claiming, verification

        peer = next(p for p in self._swarm.peers if "finished" in p.facts)
        assert self.checkpoint is not None
        found = verification.verify_home(peer.home, self.checkpoint, trusted_modules=self._swarm.trusted_modules)
        self._verify = {
            name: {"verdict": finding.verdict.value, "reason": finding.reason}
            for name, finding in found.findings.items()
        }
        if self._swarm.chain is None:
            return
        for each in self._swarm.peers:
            claimed = claiming.claim_home(each.home, each.signer)
            self._rewards["0x" + each.signer.address.hex()] = {
                "peer": each.name,
                "claimed_wei": str(claimed.amount_wei),
                "transaction": claimed.transaction,
                "balance_wei": str(claimed.balance_wei),
            }

    def report(self) -> dict[str, Any]:
        last = next(iter(self._finished.values()), {})
        return {
            "task": self._swarm.spec.task.name,
            "task_id": self._swarm.spec.task_id.hex(),
            "peers": [p.name for p in self._swarm.peers],
            "rounds": [row for _, row in sorted(self._rounds.items())],
            "checkpoint_cid": self.checkpoint,
            "final_accuracy": last.get("accuracy_micro", 0) / 1e6 or None,
            "final_loss": last.get("loss_micro", 0) / 1e6,
            "samples": self._samples,
            "verify": self._verify,
            "rewards": self._rewards,
        }


def show(output: Output, document: dict[str, Any]) -> None:
    """The tables a person reads."""
    has_chain = any(row["anchor_tx"] for row in document["rounds"])
    columns = ("round", "accuracy", "loss", "peers", "model hash", "payload", "wire so far")
    rows = []
    for row in document["rounds"]:
        hashes = set(row["model_hash"].values())
        payloads = list(row["payload_bytes"].values())
        wire = [w["sent"] + w["received"] for w in row["wire_bytes"].values()]
        rows.append(
            (
                row["round"],
                f"{row['accuracy']:.2%}" if row["accuracy"] else "",
                f"{row['loss']:.4f}" if row["loss"] is not None else "",
                f"{len(row['contributors'])}/{len(document['peers'])}",
                next(iter(hashes))[:12] if len(hashes) == 1 else "DIFFERENT",
                format_bytes(sum(payloads) / len(payloads)) if payloads else "",
                format_bytes(sum(wire) / len(wire)) if wire else "",
                *((row["anchor_tx"] or "")[:10], f"{row['gas']:,}" if row["gas"] else "")[: 2 * has_chain],
            )
        )
    output.table(
        f"{document['task']}: {len(document['peers'])} peers, no server",
        (*columns, "anchor", "gas") if has_chain else columns,
        rows,
        right=("round", "accuracy", "loss", "peers", "payload", "wire so far", "gas"),
    )
    if document["rewards"]:
        output.table(
            "rewards",
            ("peer", "address", "claimed FLOCK", "balance FLOCK"),
            [
                (r["peer"], address, format_flock(int(r["claimed_wei"])), format_flock(int(r["balance_wei"])))
                for address, r in document["rewards"].items()
            ],
            right=("claimed FLOCK", "balance FLOCK"),
        )
    if document["verify"]:
        output.table(
            f"checkpoint {document['checkpoint_cid']}",
            ("question", "verdict", "reason"),
            [(name, found["verdict"], found["reason"]) for name, found in document["verify"].items()],
        )
    if document["samples"]:
        output.line("sample:")
        output.line(document["samples"])
