"""Child processes behind a framed pipe: how the trio process owns hivemind and torch.

Law: this file moves values between a parent and its child and decides who dies with whom; it knows nothing
of what is called.  A frame is a 4-byte big-endian length and canonical msgpack `[kind, id, name, value]`.
The configuration is the first frame, never an argument, so that no secret shows up in a process list.

Dying: the kernel kills the child when the parent dies (PR_SET_PDEATHSIG), and the child also leaves when its
standard input ends, which covers a parent that died before the signal was armed.

Python's stdout in the child is pointed at stderr, so that a library that prints cannot corrupt a frame.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import itertools
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import trio

from p2pflock import errors
from p2pflock.errors import FlockError, LocalProtocolError, StartupError, UnavailableError
from p2pflock.primitives import wire

MAX_FRAME_BYTES = 256 << 20
EVENT_QUEUE = 1024  # unsolicited frames kept for a slow reader; the oldest are dropped beyond that
GRACE_SECONDS = 3.0  # between closing the pipe and SIGKILL
_PR_SET_PDEATHSIG = 1
_ERRORS: dict[str, type[FlockError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, FlockError)
}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends (Linux; no-op elsewhere)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _frame(kind: str, call: int, name: str, value: object) -> bytes:
    body = wire.pack([kind, call, name, value])
    if len(body) > MAX_FRAME_BYTES:
        raise LocalProtocolError(f"frame of {len(body)} bytes, at most {MAX_FRAME_BYTES}")
    return struct.pack(">I", len(body)) + body


# --- the parent's side ------------------------------------------------------------------------------------
class Child:
    """One running child process.  Create with `start`; calls may run side by side."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._stdin, self._stdout, self._stderr = (
            _take_over(stream) for stream in (process.stdin, process.stdout, process.stderr)
        )
        self._name = name
        self._ids = itertools.count(1)
        self._waiting: dict[int, _Reply] = {}
        self._lock = trio.Lock()
        self._event_send, self._event_receive = trio.open_memory_channel[tuple[str, Any]](EVENT_QUEUE)
        self._ended = trio.Event()
        self._ready = trio.Event()
        self._silent = trio.Event()
        self._failure: FlockError | None = None
        self._last_lines: collections.deque[str] = collections.deque(maxlen=20)
        self.ready: Any = None
        self.dropped_events = 0

    @classmethod
    async def start(
        cls,
        nursery: trio.Nursery,
        module: str,
        config: Mapping[str, object],
        *,
        name: str,
        ready_seconds: float = 120.0,
        stderr_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """Run `python -m module`, hand it `config`, and wait for its ready frame.

        Raises:
            StartupError: it ended or stayed silent; the message names the cause.
            FlockError: whatever its set-up raised on purpose (a taken port, a missing file).
        """
        # Not trio's own open_process: it forks from a worker thread, and the kernel counts the end of that
        # thread, ten idle seconds later, as the death of the parent.
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        child = cls(process, name)
        nursery.start_soon(child._read_frames)
        nursery.start_soon(child._read_stderr, stderr_path)
        try:
            with trio.move_on_after(ready_seconds):
                await child._send(_frame("config", 0, "", dict(config)))
                await child._ready.wait()
        except BaseException:
            await child.aclose()
            raise
        if child._failure is None and child._ready.is_set():
            return child
        failure = child._failure
        await child.aclose()
        with trio.move_on_after(GRACE_SECONDS):
            await child._silent.wait()  # its last words may still be in the pipe
        cause = child._last_lines[-1] if child._last_lines else "no output"
        if failure is not None and not isinstance(failure, StartupError):
            raise failure
        reason = str(failure) if failure else f"not ready after {ready_seconds:.0f} s"
        raise StartupError(f"{name} did not start: {reason}; last words: {cause}", f"see the log of {name}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    async def wait_ended(self) -> None:
        """Returns once the child is gone, for whatever reason."""
        await self._ended.wait()

    def events(self) -> trio.MemoryReceiveChannel[tuple[str, Any]]:
        """Unsolicited frames as (name, value).  One reader."""
        return self._event_receive

    async def call(
        self, method: str, params: Mapping[str, object], *, deadline_seconds: float | None = None
    ) -> Any:
        """Raises what the child raised, UnavailableError when it is gone or the deadline passed."""
        if self._ended.is_set():
            raise UnavailableError(f"{self._name} is not running")
        call = next(self._ids)
        reply = self._waiting[call] = _Reply(method)
        try:
            with trio.move_on_after(float("inf") if deadline_seconds is None else deadline_seconds):
                await self._send(_frame("call", call, method, dict(params)))
                await reply.event.wait()
            if not reply.event.is_set():
                await self._cancel(call)
                raise UnavailableError(f"{self._name}: {method} took longer than {deadline_seconds} s")
        except trio.Cancelled:
            with trio.CancelScope(shield=True), trio.move_on_after(1.0):
                await self._cancel(call)
            raise
        finally:
            self._waiting.pop(call, None)
        if reply.error is not None:
            raise reply.error
        return reply.value

    async def hurry(self, method: str) -> None:
        """Ask the calls of `method` that are under way, or wait their turn, to come to an early end with a
        result.  Only a threaded child's handlers can (CancelToken.hurried)."""
        for call, reply in list(self._waiting.items()):
            if reply.method == method:
                with contextlib.suppress(UnavailableError):
                    await self._send(_frame("hurry", call, "", None))

    async def aclose(self) -> None:
        """Close the pipe, wait a moment, then kill.  Safe to call twice."""
        with trio.CancelScope(shield=True):
            await self._stdin.aclose()
            with trio.move_on_after(GRACE_SECONDS):
                await self._wait_exit()
            if self._process.poll() is None:
                self._process.kill()
                await self._wait_exit()

    async def _wait_exit(self) -> None:
        # The stubs of trio-typing, which py-libp2p brings along, are of an older trio.
        await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)  # type: ignore[call-arg]

    async def _cancel(self, call: int) -> None:
        with contextlib.suppress(UnavailableError):
            await self._send(_frame("cancel", call, "", None))

    async def _send(self, frame: bytes) -> None:
        # A frame cut in two by cancellation would desynchronise the pipe for good: finish it.
        async with self._lock:
            with trio.CancelScope(shield=True):
                try:
                    await self._stdin.send_all(frame)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise UnavailableError(f"{self._name} is not running") from error

    async def _read_frames(self) -> None:
        reader = _FrameReader(self._stdout)
        try:
            while (frame := await reader.next_frame()) is not None:
                self._dispatch(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except (FlockError, TypeError, ValueError) as error:
            # Foreign code runs in a child: what it does to its pipe must not take the parent along.
            self._last_lines.append(f"garbage on the pipe: {error}")
            self._process.kill()
        finally:
            self._fail(StartupError(f"{self._name} ended"))

    def _dispatch(self, frame: list[Any]) -> None:
        kind, call, name, value = frame
        if kind == "event":
            try:
                self._event_send.send_nowait((name, value))
            except trio.WouldBlock:
                with contextlib.suppress(trio.WouldBlock):
                    self._event_receive.receive_nowait()
                    self._event_send.send_nowait((name, value))
                self.dropped_events += 1
        elif kind == "ready":
            self.ready = value
            self._ready.set()
        elif kind == "error" and call == 0:
            self._failure = _rebuild(name, value)
            self._ready.set()
        elif reply := self._waiting.get(call):
            if kind == "error":
                reply.error = _rebuild(name, value)
            else:
                reply.value = value
            reply.event.set()

    def _fail(self, error: FlockError) -> None:
        self._ended.set()
        if not self._ready.is_set():
            self._failure = error
            self._ready.set()
        for reply in self._waiting.values():
            if not reply.event.is_set():
                reply.error = UnavailableError(f"{self._name} ended")
                reply.event.set()
        self._event_send.close()

    async def _read_stderr(self, path: Path | None) -> None:
        log = path.open("ab", buffering=0) if path else None
        partial = b""
        try:
            async for chunk in self._stderr:
                if log:
                    log.write(chunk)
                *lines, partial = (partial + chunk)[-4096:].split(b"\n")
                self._last_lines.extend(line.decode(errors="replace") for line in lines if line.strip())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            if partial.strip():
                self._last_lines.append(partial.decode(errors="replace"))
            self._silent.set()
            if log:
                log.close()


def _take_over(stream: IO[bytes] | None) -> trio.lowlevel.FdStream:
    assert stream is not None
    taken = trio.lowlevel.FdStream(os.dup(stream.fileno()))
    stream.close()
    return taken


class _Reply:
    __slots__ = ("error", "event", "method", "value")

    def __init__(self, method: str) -> None:
        self.method = method
        self.event = trio.Event()
        self.value: Any = None
        self.error: FlockError | None = None


class _FrameReader:
    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next_frame(self) -> list[Any] | None:
        head = await self._take(4)
        if head is None:
            return None
        (size,) = struct.unpack(">I", head)
        if size > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"frame of {size} bytes on a process pipe")
        body = await self._take(size)
        return None if body is None else _open(body)

    async def _take(self, count: int) -> bytes | None:
        while len(self._buffer) < count:
            chunk = await self._stream.receive_some(1 << 20)
            if not chunk:
                return None
            self._buffer += chunk
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


def _open(body: bytes) -> list[Any]:
    frame = wire.unpack(body, max_bytes=MAX_FRAME_BYTES)
    if not isinstance(frame, list) or len(frame) != 4:
        raise LocalProtocolError("malformed frame on a process pipe")
    return frame


def _rebuild(name: str, value: Any) -> FlockError:
    cls = _ERRORS.get(name)
    message, hint = value
    if cls is None:
        return LocalProtocolError(f"{name}: {message}", hint)
    return cls(message, hint)


def _describe(error: BaseException) -> tuple[str, list[str]]:
    if isinstance(error, FlockError):
        return type(error).__name__, [error.message, error.hint]
    return type(error).__name__, [str(error) or type(error).__name__, ""]


# --- the child's side -------------------------------------------------------------------------------------
Emit = Callable[[str, Any], None]


class CancelToken:
    """What the caller has said since; a long computation looks at it between steps."""

    __slots__ = ("cancelled", "hurried")

    def __init__(self) -> None:
        self.cancelled = False  # it gave up
        self.hurried = False  # it wants what there is by now


class Cancelled_(Exception):  # noqa: N801, N818 - trio and asyncio own the plain name
    """A handler noticed its token and stopped; nobody waits for the answer."""


class _Pipe:
    """Blocking frames on the original stdin and stdout; writes are whole and may come from any thread."""

    def __init__(self) -> None:
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb")
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self._lock = threading.Lock()

    def read(self) -> list[Any] | None:
        head = self._in.read(4)
        if len(head) < 4:
            return None
        (size,) = struct.unpack(">I", head)
        body = self._in.read(size)
        return _open(body) if len(body) == size else None

    def write(self, kind: str, call: int, name: str, value: object) -> None:
        frame = _frame(kind, call, name, value)
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._out.write(frame)
            self._out.flush()


def _open_pipe() -> tuple[_Pipe, dict[str, Any]]:
    die_with_parent()
    pipe = _Pipe()
    first = pipe.read()
    if first is None:
        os._exit(0)
    return pipe, first[3]


ThreadedHandler = Callable[[dict[str, Any], CancelToken], Any]


def serve_threaded(setup: Callable[[dict[str, Any], Emit], Mapping[str, ThreadedHandler]]) -> None:
    """Child main for heavy computation: calls run one after another in the main thread, while a reader
    thread turns cancel and hurry frames into tokens and ends the process when the parent goes away."""
    pipe, config = _open_pipe()
    tokens: dict[int, CancelToken] = {}
    work: queue.Queue[list[Any]] = queue.Queue()

    def read() -> None:
        while (frame := pipe.read()) is not None:
            if frame[0] in ("cancel", "hurry"):
                if token := tokens.get(frame[1]):
                    setattr(token, "cancelled" if frame[0] == "cancel" else "hurried", True)
            else:
                tokens[frame[1]] = CancelToken()
                work.put(frame)
        os._exit(0)

    threading.Thread(target=read, daemon=True, name="pipe").start()
    try:
        handlers = dict(setup(config, lambda name, value: pipe.write("event", 0, name, value)))
    except Exception as error:  # noqa: BLE001 - every cause must reach the parent by name
        pipe.write("error", 0, *_describe(error))
        return
    pipe.write("ready", 0, "", handlers.pop("ready_value", None))
    while True:
        _, call, name, params = work.get()
        try:
            if not tokens[call].cancelled:
                pipe.write("reply", call, "", handlers[name](params, tokens[call]))
        except Cancelled_:
            pass
        except Exception as error:  # noqa: BLE001
            if not isinstance(error, FlockError):
                sys.excepthook(type(error), error, error.__traceback__)
            pipe.write("error", call, *_describe(error))
        finally:
            del tokens[call]


AsyncHandler = Callable[[dict[str, Any]], Awaitable[Any]]


def serve_asyncio(setup: Callable[[dict[str, Any], Emit], Awaitable[Mapping[str, AsyncHandler]]]) -> None:
    """Child main for an asyncio library: each call is a task of its own, a cancel frame cancels it."""
    pipe, config = _open_pipe()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        frames: asyncio.Queue[list[Any]] = asyncio.Queue()
        tasks: dict[int, asyncio.Task[None]] = {}

        def read() -> None:
            while (frame := pipe.read()) is not None:
                loop.call_soon_threadsafe(frames.put_nowait, frame)
            os._exit(0)

        threading.Thread(target=read, daemon=True, name="pipe").start()
        try:
            handlers = dict(await setup(config, lambda name, value: pipe.write("event", 0, name, value)))
        except Exception as error:  # noqa: BLE001
            pipe.write("error", 0, *_describe(error))
            return
        pipe.write("ready", 0, "", handlers.pop("ready_value", None))

        async def answer(call: int, name: str, params: dict[str, Any]) -> None:
            try:
                pipe.write("reply", call, "", await handlers[name](params))
            except Exception as error:  # noqa: BLE001
                if not isinstance(error, FlockError):
                    sys.excepthook(type(error), error, error.__traceback__)
                pipe.write("error", call, *_describe(error))
            finally:
                tasks.pop(call, None)

        while True:
            kind, call, name, params = await frames.get()
            if kind == "cancel":
                if task := tasks.get(call):
                    task.cancel()
            elif kind == "call":
                tasks[call] = asyncio.create_task(answer(call, name, params))

    asyncio.run(main())
