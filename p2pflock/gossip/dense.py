"""The dense average: hivemind's butterfly all-reduce, made to end with the same bits at every member.

Law: each member averages its share of the vector and sends the averaged share to all, over hivemind's
AllReduceRunner (its partitioning, messages and streams).  The whole group's mean or nothing: one missing,
slow or malformed member ends the run at every member that notices, with UnavailableError.  A member can still
send any numbers and any averages it likes: for trusted LANs and as the baseline, as the port says.

Not hivemind's DecentralizedAverager: it forks, wants the main thread, finds its groups by DHT matchmaking, and
averages half a group when one member dies.  What is changed in the runner, and why:

* weights that peers send are ignored (attack: `weight=1e9` makes the mean its sender's vector);
* shares are summed in the order of the peer ids, not of arrival, and travel as averages, not as differences to
  the local vector, whose rounding would differ from member to member: a record needs one model hash;
* a lost member fails the run (stock: the mean of whoever is left, another one at each reducer);
* a part must be float32, uncompressed, of the size and number agreed on (stock: whatever deserialises).
"""
# No `from __future__ import annotations`: hivemind reads the type hints of rpc_* methods.

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, AsyncIterator  # noqa: UP035 - hivemind knows the alias of typing only

import numpy as np
import torch
from hivemind.averaging.allreduce import AllReduceRunner
from hivemind.averaging.partition import AllreduceException
from hivemind.compression import serialize_torch_tensor
from hivemind.p2p import P2P, P2PContext, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, runtime_pb2

from p2pflock.errors import InvalidMessageError, LocalProtocolError, UnavailableError

PART_BYTES = 256 << 10
MAX_WAITING = 16  # partners that came before our own node called `average`
WAIT_SECONDS = 60.0

Connect = Callable[[bytes], Awaitable[None]]


class DenseAverager(ServicerBase):
    """All runs of this process; one stream handler for all of them."""

    def __init__(self, p2p: P2P, connect: Connect) -> None:
        self._p2p = p2p
        self._peer: bytes = p2p.peer_id.to_bytes()
        self._connect = connect
        self._runners: dict[bytes, asyncio.Future[_Runner]] = {}
        self._waiting = 0
        self.refused = 0

    async def average(
        self, round_key: bytes, vector: bytes, members: Sequence[bytes], deadline_seconds: float
    ) -> bytes:
        """Mean over `members` of little-endian float32 vectors; the same bits at every member.

        Raises:
            LocalProtocolError: we are not a member, or the vector is no float32 array.
            UnavailableError: a member failed or was late; nothing was averaged.
        """
        group = sorted(set(members))
        if self._peer not in group or len(vector) % 4:
            raise LocalProtocolError("average() needs a float32 vector and a group that we belong to")
        if len(group) == 1 or not vector:
            return vector
        parts = (b"p2pflock/1/dense\0", len(vector).to_bytes(8, "big"), round_key, b"".join(group))
        group_id = hashlib.sha256(b"".join(parts)).digest()
        try:
            return await asyncio.wait_for(self._run(group_id, vector, group), deadline_seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise UnavailableError(f"dense average not finished within {deadline_seconds:g} s") from error
        except (AllreduceException, InvalidMessageError, OSError, EOFError) as error:
            raise UnavailableError(f"dense average failed: {error}") from error
        finally:
            self._runners.pop(group_id, None)

    async def _run(self, group_id: bytes, vector: bytes, group: Sequence[bytes]) -> bytes:
        tensor = torch.from_numpy(np.frombuffer(vector, dtype="<f4").copy())
        runner = _Runner(
            p2p=self._p2p,
            servicer_type=type(self),
            prefix=None,
            group_id=group_id,
            tensors=[tensor],
            ordered_peer_ids=[PeerID(peer) for peer in group],
            peer_fractions=(1.0,) * len(group),
            part_size_bytes=PART_BYTES,
        )
        self._future(group_id).set_result(runner)
        try:
            await asyncio.gather(*(self._connect(peer) for peer in group if peer != self._peer))
            async for mean in runner:
                return bytes(mean.numpy().astype("<f4", copy=False).tobytes())
            raise AllreduceException("no result")
        except asyncio.CancelledError:
            runner.fail(AllreduceException("cancelled"))
            raise
        except Exception as error:
            raise AllreduceException(f"{runner.cause or error}") from error

    def _future(self, group_id: bytes) -> "asyncio.Future[_Runner]":
        return self._runners.setdefault(group_id, asyncio.get_running_loop().create_future())

    async def rpc_aggregate_part(
        self, stream: AsyncIterator[averaging_pb2.AveragingData], context: P2PContext
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """A member sends us its part of our share, and gets the averages."""
        first = await asyncio.wait_for(stream.__anext__(), WAIT_SECONDS)
        runner = await self._find_runner(bytes(first.group_id))
        if runner is None:
            self.refused += 1
            return
        async for message in runner.answer(first, stream, context.remote_id):
            yield message

    async def _find_runner(self, group_id: bytes) -> "_Runner | None":
        # Attack: streams for groups that never come to be, each with its prefetched parts.
        if len(group_id) != 32 or (group_id not in self._runners and self._waiting >= MAX_WAITING):
            return None
        known = self._future(group_id)
        self._waiting += 1
        try:
            return await asyncio.wait_for(asyncio.shield(known), WAIT_SECONDS)
        except (TimeoutError, asyncio.TimeoutError):
            if not known.done() and self._runners.get(group_id) is known:
                del self._runners[group_id]
            return None
        finally:
            self._waiting -= 1


class _Runner(AllReduceRunner):
    """One all-reduce of one group."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.cause: Exception | None = None
        shapes = [tuple(part.shape) for part in self.parts_for_local_averaging]
        self.tensor_part_reducer = _OrderedReducer(shapes, len(self.sender_peer_ids))
        self._part_shapes = [
            [tuple(part.shape) for part, _ in parts]
            for parts in self.tensor_part_container._input_parts_by_peer
        ]

    def fail(self, error: Exception) -> None:
        """End the run for us and for whoever waits for our share."""
        if self.cause is None:
            self.cause = error
        self.tensor_part_reducer.fail(error)
        if not self._future.done():
            self._future.set_exception(error)
            self._future.exception()
            self.tensor_part_container.finalize()

    async def _ban_sender(self, peer_id: PeerID) -> None:
        self.fail(AllreduceException("a member did not send its vector"))

    async def _communicate_with_peer(self, peer_id: PeerID) -> None:
        index = self.ordered_peer_ids.index(peer_id)
        container, reducer = self.tensor_part_container, self.tensor_part_reducer
        try:
            if peer_id == self.peer_id:
                for part, tensor in enumerate(self.parts_for_local_averaging):
                    container.register_processed_part(index, part, await reducer.accumulate(index, part, tensor))
                return
            shapes = self._part_shapes[index]
            stream = await self._get_peer_stub(peer_id).rpc_aggregate_part(self._generate_input_for_peer(index))
            part = 0
            async for message in stream:
                if message.code != averaging_pb2.AVERAGED_PART:
                    raise AllreduceException("a member gave up")
                container.register_processed_part(index, part, _read_part(message.tensor_part, shapes[part]))
                part += 1
                if part == len(shapes):
                    break  # not to the end of the stream, which may as well be a reset
            await stream.aclose()
            if part != len(shapes):
                raise AllreduceException("a member hung up")
        except Exception as error:
            self.fail(error)
            raise

    async def answer(
        self,
        first: averaging_pb2.AveragingData,
        stream: AsyncIterator[averaging_pb2.AveragingData],
        sender: PeerID,
    ) -> AsyncIterator[averaging_pb2.AveragingData]:
        """The averages of our share, one for each part that the sender sends."""
        if sender not in self.sender_peer_ids or sender in self.active_senders:
            return
        self.active_senders.add(sender)
        if len(self.active_senders) == len(self.sender_peer_ids):
            self.all_senders_started.set()
        index, reducer = self.sender_peer_ids.index(sender), self.tensor_part_reducer
        message, part = first, 0
        try:
            while True:
                tensor = _read_part(message.tensor_part, reducer.shape(part))
                mean = await reducer.accumulate(index, part, tensor)
                yield averaging_pb2.AveragingData(
                    code=averaging_pb2.AVERAGED_PART, tensor_part=serialize_torch_tensor(mean)
                )
                part += 1
                try:
                    message = await stream.__anext__()
                except StopAsyncIteration:
                    # Not before: hanging up while the sender still writes its end mark would break its pipe.
                    return
        except (AllreduceException, InvalidMessageError) as error:
            self.fail(error)
            yield averaging_pb2.AveragingData(code=averaging_pb2.INTERNAL_ERROR)
        finally:
            if part != reducer.num_parts:
                self.fail(AllreduceException("a member hung up"))


class _OrderedReducer:
    """Sums each part of our share in the order of the members, once all of them have sent it."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], senders: int) -> None:
        loop = asyncio.get_running_loop()
        self._shapes = shapes
        self._senders = senders
        self._parts: list[dict[int, torch.Tensor]] = [{} for _ in shapes]
        self._means: list[asyncio.Future[torch.Tensor]] = [loop.create_future() for _ in shapes]
        self.num_parts = len(shapes)

    def shape(self, part: int) -> tuple[int, ...]:
        if part >= self.num_parts:
            raise InvalidMessageError("more parts than the share has")
        return self._shapes[part]

    async def accumulate(self, sender: int, part: int, tensor: torch.Tensor) -> torch.Tensor:
        parts = self._parts[part]
        parts[sender] = tensor
        if len(parts) == self._senders and not self._means[part].done():
            total = torch.zeros_like(tensor)
            for index in range(self._senders):
                total.add_(parts[index])
            self._means[part].set_result(total.div_(float(self._senders)))
            parts.clear()
        return await asyncio.shield(self._means[part])

    def fail(self, error: Exception) -> None:
        for mean in self._means:
            if not mean.done():
                mean.set_exception(AllreduceException(str(error)))
                mean.exception()

    def finalize(self) -> None:
        """hivemind calls this at the end of a run."""
        self.fail(AllreduceException("the run is over"))


def _read_part(tensor: runtime_pb2.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Attack: another dtype, a compressed part that expands, a size that does not fit, infinities."""
    if tensor.compression != runtime_pb2.NONE or tensor.dtype not in ("float32", "torch.float32"):
        raise InvalidMessageError("part is not plain float32")
    if tuple(tensor.size) != shape or len(tensor.buffer) != 4 * int(np.prod(shape)):
        raise InvalidMessageError("part of the wrong size")
    values = np.frombuffer(tensor.buffer, dtype="<f4")
    if not np.isfinite(values).all():
        raise InvalidMessageError("part holds values that are not finite")
    return torch.from_numpy(values.reshape(shape).copy())
