"""Blocks and pins in a Kubo daemon (or one that speaks its RPC), for checkpoints that IPFS should serve.

Law: the daemon is a disk with an HTTP port, not an authority: ids are computed here and compared with its own,
and what it returns is hashed before anybody sees it.  Reads never go out to the IPFS network; the daemon answers
from what it holds.

Differences from the embedded store: `pin` needs the whole graph to be in the daemon, and the quota is the
daemon's.  ipfshttpclient is unmaintained and thinks that Kubo ended at 0.8; the few calls used here are the same
in every release since, so its version check is left out and ours names what is too old.

Source: https://docs.ipfs.tech/reference/kubo/rpc/.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import ipfshttpclient
from ipfshttpclient import exceptions

from p2pflock.errors import (
    DiskFullError,
    EnvironmentError_,
    FlockError,
    InvalidMessageError,
    UnavailableError,
)
from p2pflock.ports import BlobStore
from p2pflock.primitives import unixfs
from p2pflock.primitives.cid import CID, DAG_CBOR, DAG_PB, RAW
from p2pflock.storage import graph

DEFAULT_ADDRESS = "/ip4/127.0.0.1/tcp/5001/http"
MIN_VERSION = (0, 14)  # block/put learnt `cid-codec`
_CODECS = {RAW: "raw", DAG_PB: "dag-pb", DAG_CBOR: "dag-cbor"}
_NO_ROOM = re.compile(r"no space left|maximum storage|storage limit", re.IGNORECASE)
_FIX_DAEMON = "start it with `ipfs daemon`, or leave Kubo out of the configuration"

# ipfshttpclient passes urllib3 an argument that it no longer needs; nothing a user could mend
warnings.filterwarnings("ignore", "The 'strict' parameter is no longer needed", FutureWarning)


class KuboStore:
    """A BlobStore in a Kubo daemon.  Blocking: call it in a thread, one call at a time."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, timeout_seconds: float = 60.0) -> None:
        """Connect and check the version.

        Args:
            address: multiaddress of the RPC port, e.g. /ip4/127.0.0.1/tcp/5001/http.
            timeout_seconds: for each answer.

        Raises EnvironmentError_ when nothing answers there, or something that is not Kubo's RPC.
        """
        self.address = address
        self._put_options: dict[str, str] = {}
        with self._mapped("cannot connect"):
            self._client: Any = ipfshttpclient.Client(address, timeout=timeout_seconds)
            answer = self._client.version()
            self.version = str(answer["Version"])
            # js-ipfs counts on its own, and is told by its interface's version
            is_kubo = "interface-ipfs-core" not in answer.as_json()
        found = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        if is_kubo and found < MIN_VERSION:
            raise EnvironmentError_(f"Kubo {self.version} at {address} is too old", "install Kubo 0.14 or newer")

    # --- BlobStore --------------------------------------------------------------------------------------
    def put(self, cid: CID, data: bytes) -> None:
        """Also raises EnvironmentError_ when the daemon is gone or files the block under another id."""
        if not cid.matches(data):
            raise InvalidMessageError(f"block does not hash to {cid}")
        # Kubo refuses `format` beside `cid-codec`; js-ipfs knows `format` only.  The returned id tells them apart
        codec = _CODECS[cid.codec]
        dialects = ({"cid-codec": codec}, {"format": codec, "version": "1"})
        for options in sorted(dialects, key=lambda d: d.keys() != self._put_options.keys()):
            with self._mapped(f"cannot store block {cid}"):
                answer = self._client.block.put(
                    io.BytesIO(data), opts={**options, "mhtype": "sha2-256", "cid-base": "base32"}
                )
            if answer["Key"] == str(cid):
                self._put_options = options
                return
        raise EnvironmentError_(f"the daemon at {self.address} stores {cid} as {answer['Key']}", "upgrade Kubo")

    def get(self, cid: CID) -> bytes:
        try:
            with self._mapped(f"cannot read block {cid}", may_refuse=True):
                data = bytes(self._client.block.get(str(cid), offline=True))
        except exceptions.ErrorResponse as error:
            raise UnavailableError(f"block {cid} is not in Kubo") from error
        if not cid.matches(data):  # a raw block that looks like dag-pb has come back re-encoded before
            raise UnavailableError(f"Kubo returned other bytes for block {cid}")
        return data

    def has(self, cid: CID) -> bool:
        try:
            with self._mapped(f"cannot look up block {cid}", may_refuse=True):
                self._client.block.stat(str(cid), offline=True)
        except exceptions.ErrorResponse:
            return False
        return True

    def pin(self, cid: CID) -> None:
        """Raises UnavailableError unless everything that the root links to is in the daemon."""
        try:
            with self._mapped(f"cannot pin {cid}", may_refuse=True):
                self._client.pin.add(str(cid), offline=True)
        except exceptions.ErrorResponse as error:
            raise UnavailableError(f"Kubo cannot pin {cid}: {_first_line(error)}") from error

    def unpin(self, cid: CID) -> None:
        try:
            with self._mapped(f"cannot unpin {cid}", may_refuse=True):
                self._client.pin.rm(str(cid))
        except exceptions.ErrorResponse as error:
            if "not pinned" not in str(error):
                raise self._refused(f"cannot unpin {cid}", error) from error

    def pins(self) -> Iterator[CID]:
        """Recursive pins, in order; those of other programs included, as far as their ids are of our kind."""
        with self._mapped("cannot list pins"):
            names = list(self._client.pin.ls(type="recursive", opts={"cid-base": "base32"})["Keys"])
        found = []
        for name in names:
            with contextlib.suppress(InvalidMessageError):  # CIDv0, blake2, …
                found.append(CID.parse(name))
        return iter(sorted(found))

    # --- beyond the port --------------------------------------------------------------------------------
    def add_file(self, data: bytes) -> CID:
        """`ipfs add --cid-version=1 --raw-leaves`, pinned; the id is the one that we compute.

        Raises EnvironmentError_ when the daemon is configured to cut files in another way.
        """
        cid = unixfs.compute_cid(data)
        with self._mapped("cannot add a file"):
            answer = self._client.add(
                io.BytesIO(data),
                cid_version=1,
                raw_leaves=True,
                chunker=f"size-{unixfs.CHUNK_BYTES}",
                pin=True,
                opts={"cid-base": "base32"},
            )
        if answer["Hash"] != str(cid):
            raise EnvironmentError_(
                f"Kubo gives {answer['Hash']} to a file that is {cid}", "reset the Import section of Kubo's configuration"
            )
        return cid

    def pin_graph(self, source: BlobStore, root: CID, *, follow: graph.Follow | None = None) -> int:
        """Copy what `root` reaches in `source`, then pin it; returns the number of blocks copied.

        With `follow` parts are left out; the daemon then has to hold them, or it cannot pin.
        """
        copied = 0
        for cid in graph.walk(source.get, [root], follow=follow):
            if not self.has(cid):
                self.put(cid, source.get(cid))
                copied += 1
        self.pin(root)
        return copied

    # --- errors -----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _mapped(self, doing: str, *, may_refuse: bool = False) -> Iterator[None]:
        """Foreign errors become ours; with `may_refuse` the caller itself reads what an ErrorResponse means."""
        try:
            yield
        except exceptions.ErrorResponse as error:
            if may_refuse:
                raise
            raise self._refused(doing, error) from error
        except exceptions.TimeoutError as error:
            raise UnavailableError(f"{doing}: Kubo at {self.address} did not answer in time") from error
        except exceptions.ConnectionError as error:
            raise EnvironmentError_(f"{doing}: no Kubo daemon at {self.address}", _FIX_DAEMON) from error
        except exceptions.AddressError as error:
            raise EnvironmentError_(
                f"{self.address} is not an RPC address", f"write it like {DEFAULT_ADDRESS}"
            ) from error
        except (exceptions.Error, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise EnvironmentError_(
                f"{doing}: what answers at {self.address} does not speak Kubo's RPC", "check address and port"
            ) from error

    def _refused(self, doing: str, error: Exception) -> FlockError:
        reason = f"{doing}: Kubo says {_first_line(error)}"
        if _NO_ROOM.search(reason):
            return DiskFullError(reason, "run `ipfs repo gc`, or raise Datastore.StorageMax")
        return EnvironmentError_(reason, "see the daemon's log")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
