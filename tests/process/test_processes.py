"""The framed pipe between a peer and its children, with real children: values, failures, and who dies with whom."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import trio
import trio.testing

from p2pflock import processes
from p2pflock.errors import (
    FlockError,
    InvalidMessageError,
    LocalProtocolError,
    MissingToolError,
    StartupError,
    UnavailableError,
)
from p2pflock.primitives import wire
from p2pflock.processes import EVENT_QUEUE, Child
from tests.process.swarm_kit import is_running

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.process.pipe_child"
SECRET = "correct horse battery"
STYLES = ("threaded", "asyncio")


def environment(style):
    return {"P2PFLOCK_TEST_CHILD": style, "PYTHONPATH": str(ROOT)}


@contextlib.asynccontextmanager
async def child(style, config=None, **options):
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            started = await Child.start(
                nursery, MODULE, config or {}, name="example", env=environment(style), **options
            )
            try:
                yield started
            finally:
                await started.aclose()
                assert not is_running(started.pid)
            nursery.cancel_scope.cancel()


def run(test):
    """Run an async test in trio, failures as they are and not in groups."""

    def body(*args, **kwargs):
        caught = []

        async def main():
            try:
                await test(*args, **kwargs)
            except BaseException as error:
                caught.append(error)

        trio.run(main)
        if caught:
            error = caught[0]
            while len(getattr(error, "exceptions", ())) == 1:  # Python 3.10 has no name for exception groups
                error = error.exceptions[0]
            raise error

    return body


async def start_failing(style, module=MODULE, **options):
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            await Child.start(nursery, module, {}, name="example", env=environment(style), **options)


def failure_of(style, **options):
    with pytest.raises(FlockError) as caught:
        run(start_failing)(style, **options)
    return caught.value


# --- values and errors ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("style", STYLES)
def test_values_travel_both_ways_and_secrets_are_no_arguments(style):
    value = {"list": [None, True, -(2**62), b"\x00\xff", "ü", {}], "nested": {"a": [1]}}

    @run
    async def body():
        async with child(style, {"password": SECRET, "value": value}) as it:
            assert it.ready == {"pid": it.pid, "config": {"password": SECRET, "value": value}}
            assert await it.call("echo", {"value": value}) == value
            for place in ("cmdline", "environ"):
                assert SECRET.encode() not in Path(f"/proc/{it.pid}/{place}").read_bytes()

    body()


@pytest.mark.parametrize("style", STYLES)
def test_fifty_megabytes_in_one_frame(style):
    blob = bytes(range(251)) * (50_000_000 // 251)

    @run
    async def body():
        async with child(style) as it:
            back = await it.call("echo", {"value": blob})
            assert hashlib.sha256(back).digest() == hashlib.sha256(blob).digest()

    body()


@pytest.mark.parametrize("style", STYLES)
def test_our_errors_keep_their_class_message_and_hint(style):
    @run
    async def body():
        async with child(style) as it:
            for kind in (InvalidMessageError, MissingToolError, UnavailableError):
                with pytest.raises(kind) as caught:
                    await it.call("raise", {"name": kind.__name__})
                assert type(caught.value) is kind
                assert (caught.value.message, caught.value.hint) == ("what happened", "how to mend it")

    body()


@run
async def test_a_bug_in_the_child_is_named_and_does_not_end_it():
    async with child("threaded") as it:
        with pytest.raises(LocalProtocolError, match="ZeroDivisionError"):
            await it.call("bug", {})
        with pytest.raises(LocalProtocolError, match="KeyError"):
            await it.call("no such method", {})
        with pytest.raises(FlockError):
            await it.call("object", {})  # a value that cannot travel
        assert await it.call("echo", {"value": 1}) == 1


def test_a_frame_that_is_too_large_is_refused_before_it_is_sent(monkeypatch):
    @run
    async def body():
        async with child("threaded") as it:
            monkeypatch.setattr(processes, "MAX_FRAME_BYTES", 1000)
            with pytest.raises(LocalProtocolError, match="at most 1000"):
                await it.call("echo", {"value": bytes(1000)})
            assert await it.call("echo", {"value": bytes(900)}) == bytes(900)

    body()


@pytest.mark.parametrize("style", STYLES)
def test_what_a_library_prints_does_not_reach_the_pipe(style, tmp_path):
    log = tmp_path / "child.log"

    @run
    async def body():
        async with child(style, stderr_path=log) as it:
            await it.call("shout", {})
            assert await it.call("echo", {"value": "still in step"}) == "still in step"
            assert await it.events().receive() == ("shouted", None)

    body()
    assert b"noise on stdout" in log.read_bytes()
    assert b"noise of a child" in log.read_bytes()


# --- side by side, cancelled, late ----------------------------------------------------------------------------
@run
async def test_calls_of_an_asyncio_child_run_side_by_side():
    async with child("asyncio") as it:
        results = []

        async def call(name):
            results.append(await it.call(name, {}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, "first")  # ends only once `second` has begun
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(call, "second")
        assert sorted(results) == ["first", "second"]


@pytest.mark.parametrize("style", STYLES)
def test_cancelling_a_call_stops_the_work_and_not_the_child(style):
    @run
    async def body():
        async with child(style) as it:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.call, "wait", {})
                assert await it.events().receive() == ("waiting", None)
                nursery.cancel_scope.cancel()
            assert await it.events().receive() == ("cancelled", None)
            assert await it.call("echo", {"value": 1}) == 1

    body()


@pytest.mark.parametrize("style", STYLES)
def test_a_deadline_is_unavailable_and_stops_the_work(style):
    @run
    async def body():
        async with child(style) as it:
            with pytest.raises(UnavailableError, match=r"example: wait took longer than 0\.2 s"):
                await it.call("wait", {}, deadline_seconds=0.2)
            assert await it.events().receive() == ("waiting", None)
            assert await it.events().receive() == ("cancelled", None)

    body()


@run
async def test_a_call_that_was_cancelled_in_the_queue_never_runs():
    async with child("threaded") as it:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.call, "wait", {})
            assert await it.events().receive() == ("waiting", None)
            with pytest.raises(UnavailableError):
                await it.call("mark", {}, deadline_seconds=0.1)  # behind the one that waits
            nursery.cancel_scope.cancel()
        await it.call("mark", {})
        assert await it.call("marks", {}) == 1


@run
async def test_events_are_bounded_the_newest_stay():
    extra = 500
    async with child("threaded") as it:
        await it.call("emit", {"count": EVENT_QUEUE + extra})
        assert it.dropped_events == extra
        assert it.events().statistics().current_buffer_used == EVENT_QUEUE
        assert await it.events().receive() == ("count", extra)


# --- failing to start -----------------------------------------------------------------------------------------
def test_an_error_of_ours_in_the_set_up_comes_out_as_it_is():
    error = failure_of("fail")
    assert (type(error), error.hint) == (MissingToolError, "how to mend it")


def test_a_foreign_error_in_the_set_up_is_named():
    error = failure_of("break")
    assert "LookupError" in error.message
    assert "nothing there" in error.message


def test_a_child_that_dies_at_once_has_last_words():
    error = failure_of("die")
    assert type(error) is StartupError
    assert "example did not start" in error.message
    assert error.message.endswith("the cause of death")


def test_a_module_that_is_not_there():
    assert "No module named" in failure_of("none", module="tests.process.nosuch").message


def test_a_silent_child_is_given_up_and_ended():
    error = failure_of("silent", ready_seconds=1.0)
    assert "not ready after 1 s" in error.message
    assert not [pid for pid in own_children() if is_running(pid)]


def own_children():
    found = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def frame(value):
    body = wire.pack(value)
    return len(body).to_bytes(4, "big") + body


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff" * 64,  # a frame of 4 GiB
        (5).to_bytes(4, "big") + b"\xc1\xc1\xc1\xc1\xc1",
        frame([1, 2]),
        frame("text"),
        frame(["error", 0, "StartupError", None]),
        frame(["reply", [], "", None]),
    ],
    ids=["huge", "no msgpack", "short", "no list", "bad error", "bad id"],
)
def test_garbage_on_the_pipe_ends_the_child_and_only_the_child(garbage):
    error = failure_of(f"garbage:{garbage.hex()}")
    assert type(error) is StartupError
    assert "garbage on the pipe" in error.message
    assert not [pid for pid in own_children() if is_running(pid)]


# --- dying ----------------------------------------------------------------------------------------------------
@run
async def test_whoever_waits_for_a_child_that_dies_is_told():
    async with child("threaded") as it:
        with pytest.raises(UnavailableError, match="example ended"):
            await it.call("exit", {"code": 1})
        await it.wait_ended()
        assert not it.alive
        with pytest.raises(UnavailableError, match="not running"):
            await it.call("echo", {"value": 1})
        await it.aclose()


@run
async def test_a_child_that_scribbles_on_its_pipe_is_ended():
    async with child("threaded") as it:
        with pytest.raises(UnavailableError, match="example ended"):
            await it.call("scribble", {})
        with trio.fail_after(10):
            while is_running(it.pid):
                await trio.sleep(0.02)


def test_a_child_that_does_not_leave_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.2)

    @run
    async def body():
        async with child("threaded") as it:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(it.call, "hang", {})
                assert await it.events().receive() == ("hanging", None)
                nursery.cancel_scope.cancel()
            await it.aclose()
            assert not is_running(it.pid)

    body()


def test_a_child_outlives_the_idle_threads_of_its_parent(monkeypatch):
    """The kernel takes the end of the thread that forked for the death of the parent, and trio's worker threads
    end after ten idle seconds: here at once, but after the child has asked for the signal."""
    cache = importlib.import_module("trio._core._thread_cache")
    monkeypatch.setattr(cache, "THREAD_CACHE", cache.ThreadCache())  # no threads of earlier tests
    earlier = set(threading.enumerate())

    def workers():
        return set(threading.enumerate()) - earlier

    @run
    async def body():
        async with child("threaded") as it:
            monkeypatch.setattr(cache, "IDLE_TIMEOUT", 0.01)
            wake = threading.Barrier(max(1, len(workers())))  # each worker gets one job, then waits anew
            async with trio.open_nursery() as nursery:
                for _ in range(wake.parties):
                    nursery.start_soon(trio.to_thread.run_sync, wake.wait)
            with trio.fail_after(15):
                while workers():
                    await trio.sleep(0.02)
            assert await it.call("echo", {"value": "alive"}) == "alive"
            assert it.alive

    body()


PARENT = """
import sys, trio
from p2pflock.processes import Child

async def main():
    async with trio.open_nursery() as nursery:
        child = await Child.start(nursery, sys.argv[1], {}, name="example")
        if sys.argv[2]:
            nursery.start_soon(child.call, sys.argv[2], {})
            await child.events().receive()
        print(child.pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize(
    ("style", "busy_with"),
    [("threaded", ""), ("threaded", "wait"), ("threaded", "hang"), ("asyncio", "wait")],
)
def test_a_child_dies_with_a_killed_parent_whatever_it_does(style, busy_with):
    """`hang` holds the interpreter lock, so that the end of its input goes unseen: only the kernel helps."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, MODULE, busy_with],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment(style)},
        cwd=ROOT,
    )
    try:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)
