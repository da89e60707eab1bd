"""A child for the tests of p2pflock/processes.py; P2PFLOCK_TEST_CHILD says how it behaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
import sys
import time

from p2pflock import errors, processes


def hold_the_interpreter():
    """For ever, and no other Python thread runs meanwhile."""
    re.match(r"(a+)+$", "a" * 64 + "b")


def raise_named(name):
    raise getattr(errors, name)("what happened", "how to mend it")


def scribble():
    """What a library could do to descriptors that it does not know."""
    for path in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(path) > 2 and stat.S_ISFIFO(os.fstat(int(path)).st_mode):
                os.write(int(path), b"\xff" * 64)
    time.sleep(3600)


def shout(emit):
    print("noise on stdout" * 1000)
    os.write(1, b"\x00\x00\x00\x05noise")
    os.system("echo noise of a child; cat")  # and nothing of ours is left on stdin
    emit("shouted", None)


class Threaded:
    def __init__(self, config, emit):
        self.config, self.emit, self.marks = config, emit, 0

    def handlers(self):
        return {
            "ready_value": {"pid": os.getpid(), "config": self.config},
            "echo": lambda params, _: params["value"],
            "raise": lambda params, _: raise_named(params["name"]),
            "bug": lambda params, _: 1 // 0,
            "object": lambda params, _: {"value": object()},
            "mark": self.mark,
            "marks": lambda params, _: self.marks,
            "wait": self.wait,
            "emit": lambda params, _: [self.emit("count", number) for number in range(params["count"])][-1],
            "shout": lambda params, _: shout(self.emit),
            "scribble": lambda params, _: scribble(),
            "hang": lambda params, _: (self.emit("hanging", None), hold_the_interpreter()),
            "exit": lambda params, _: os._exit(params["code"]),
        }

    def mark(self, params, token):
        self.marks += 1

    def wait(self, params, token):
        self.emit("waiting", None)
        while not token.cancelled:
            time.sleep(0.005)
        self.emit("cancelled", None)
        raise processes.Cancelled_


async def asynchronous(config, emit):
    meeting = asyncio.Event()

    async def echo(params):
        return params["value"]

    async def first(params):
        await meeting.wait()
        return "first"

    async def second(params):
        meeting.set()
        return "second"

    async def wait(params):
        emit("waiting", None)
        try:
            await asyncio.sleep(3600)
        finally:
            emit("cancelled", None)

    async def fail(params):
        raise_named(params["name"])

    async def shout_(params):
        shout(emit)

    return {
        "ready_value": {"pid": os.getpid(), "config": config},
        "echo": echo,
        "first": first,
        "second": second,
        "wait": wait,
        "raise": fail,
        "shout": shout_,
    }


def fail_in_setup(config, emit):
    raise_named("MissingToolError")


def break_in_setup(config, emit):
    raise LookupError("nothing there")


def main(style):
    if style == "threaded":
        processes.serve_threaded(lambda config, emit: Threaded(config, emit).handlers())
    elif style == "asyncio":
        processes.serve_asyncio(asynchronous)
    elif style == "fail":
        processes.serve_threaded(fail_in_setup)
    elif style == "break":
        processes.serve_threaded(break_in_setup)
    elif style == "die":
        sys.stderr.write("some warning\nthe cause of death")
        sys.exit(3)
    elif style == "silent":
        sys.stdin.buffer.read()
    elif style.startswith("garbage:"):
        sys.stdin.buffer.read(4)
        sys.stdout.buffer.write(bytes.fromhex(style.removeprefix("garbage:")))
        sys.stdout.flush()
        time.sleep(3600)


if __name__ == "__main__":
    main(os.environ["P2PFLOCK_TEST_CHILD"])
