"""Real swarms for tests: started once, in a trio thread that outlives single tests."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

import trio

from p2pflock.gossip.client import HivemindSwarm, SwarmConfig

TASK = hashlib.sha256(b"test task").digest()


class TrioThread:
    """Runs async functions of the test thread in one long-lived trio program."""

    def __enter__(self):
        started = threading.Event()
        self._thread = threading.Thread(target=lambda: trio.run(self._main, started))
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *exc):
        trio.from_thread.run_sync(self.nursery.cancel_scope.cancel, trio_token=self._token)
        self._thread.join()

    async def _main(self, started):
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.nursery:
            started.set()
            await trio.sleep_forever()

    def run(self, function, *args, seconds=60):
        async def bounded():
            with trio.fail_after(seconds):
                return await function(*args)

        return trio.from_thread.run(bounded, trio_token=self._token)

    def start_swarm(self, seed, initial_peers=(), **options):
        config = SwarmConfig(task=TASK, seed=bytes([seed]) * 32, initial_peers=initial_peers, **options)
        return self.run(HivemindSwarm.start, self.nursery, config, seconds=130)

    def start_together(self, seeds, initial_peers):
        """Several at once: most of a start is importing torch."""
        swarms = {}

        async def one(seed):
            config = SwarmConfig(task=TASK, seed=bytes([seed]) * 32, initial_peers=initial_peers)
            swarms[seed] = await HivemindSwarm.start(self.nursery, config)

        async def all_():
            async with trio.open_nursery() as nursery:
                for seed in seeds:
                    nursery.start_soon(one, seed)

        self.run(all_, seconds=130)
        return [swarms[seed] for seed in seeds]


def is_running(pid):
    with contextlib.suppress(OSError):
        # A killed process whose parent was killed too stays a zombie where init does not reap.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


async def until(condition, seconds=15):
    with trio.fail_after(seconds):
        while not await condition():
            await trio.sleep(0.05)


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
