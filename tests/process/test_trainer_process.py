"""The real learning process: torch in a child, through the same suite as the fake."""

from __future__ import annotations

import os
import signal

import pytest
import trio
import trio.testing

from p2pflock.errors import MissingToolError, SpecError, UnavailableError
from p2pflock.learning.client import TrainerProcess
from p2pflock.testing import conformance_trainer as conformance
from p2pflock.testing import tiny_task

TRUSTED = (tiny_task.MODULE,)


def run_with_two(main, *, averaging="gossip", state_dirs=(None, None)):
    async def body():
        spec = tiny_task.build_spec(averaging=averaging)
        async with trio.open_nursery() as nursery:
            trainers = [
                await TrainerProcess.start(nursery, spec, trusted_modules=TRUSTED, state_dir=state_dir)
                for state_dir in state_dirs
            ]
            try:
                for trainer in trainers:
                    await trainer.open()
                with trio.fail_after(120):
                    await main(*trainers)
            finally:
                for trainer in trainers:
                    await trainer.aclose()

    trio.run(body)


def test_conforms_reports_progress_and_dies(tmp_path):
    """One pair of processes for everything: torch takes seconds to import."""

    async def main(a, b):
        genesis = await a.export()
        for check in conformance.CHECKS:
            await conformance.run(check, a, b, genesis)
        # progress
        await a.load(genesis)
        await a.train(1, 0, 2, conformance.SEED)
        while True:
            name, value = await a.events().receive()
            if value["round"] == 1 and value["step"] == value["steps"]:
                break
        assert name == "progress"
        assert value["loss_micro"] > 0
        # state across a kill
        await b.load(genesis)
        steady = [await a.train(round_, 0, 2, conformance.SEED) for round_ in (1, 2)]
        await b.train(1, 0, 2, conformance.SEED)
        os.kill(b.pid, signal.SIGKILL)
        await b._child.wait_ended()
        with pytest.raises(UnavailableError):
            await b.export()
        async with trio.open_nursery() as nursery:
            heir = await TrainerProcess.start(
                nursery, tiny_task.build_spec(), trusted_modules=TRUSTED, state_dir=tmp_path / "b"
            )
            await heir.open()
            assert await heir.train(2, 0, 2, conformance.SEED) == steady[1]
            await heir.aclose()

    run_with_two(main, state_dirs=(None, tmp_path / "b"))


def test_finish_reaches_a_training_under_way_and_one_that_waits():
    """A hundred thousand steps would take minutes."""
    spec = tiny_task.build_spec(steps=100_000)

    async def main():
        async with trio.open_nursery() as nursery:
            trainer = await TrainerProcess.start(nursery, spec, trusted_modules=TRUSTED)
            await trainer.open()
            results = {}

            async def train(round_):
                results[round_] = await trainer.train(round_, 0, 2, conformance.SEED)

            with trio.fail_after(60):
                async with trio.open_nursery() as training:
                    training.start_soon(train, 1)
                    await trainer.events().receive()
                    training.start_soon(train, 2)
                    await trio.testing.wait_all_tasks_blocked()
                    await trainer.finish()
                assert 1 <= results[1].steps < 100_000
                assert results[2].steps == 1
                assert (await trainer.train(3, 0, 2, conformance.SEED, 7)).steps == 7
                planned = await trainer.train(3, 0, 2, conformance.SEED, 6)
                assert planned.samples == 6 * spec.local.batch_size
            await trainer.aclose()

    trio.run(main)


def test_a_device_that_is_not_there_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    async def main():
        async with trio.open_nursery() as nursery:
            trainer = await TrainerProcess.start(
                nursery, tiny_task.build_spec(), trusted_modules=TRUSTED, device="cuda"
            )
            with pytest.raises(MissingToolError, match="no CUDA device") as raised:
                await trainer.open()
            assert "--device" in raised.value.hint
            await trainer.aclose()

    trio.run(main)


def test_a_strangers_spec_cannot_choose_what_runs_here(tmp_path):
    async def main():
        async with trio.open_nursery() as nursery:
            trainer = await TrainerProcess.start(nursery, tiny_task.build_spec())
            with pytest.raises(SpecError, match="not trusted"):
                await trainer.open()
            await trainer.aclose()

    trio.run(main)
