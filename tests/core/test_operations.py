"""Operations: one at a time for each VM, and nobody who waits can harm them."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from noid.core.operations.running import Operations
from noid.errors import BackendError, Busy, DependencyDown


async def test_a_second_operation_is_told_which_one_holds_the_vm() -> None:
    async with trio.open_nursery() as nursery:
        operations = Operations(nursery)
        release = trio.Event()
        nursery.start_soon(operations.run, "checkpoint", "me", ("web",), release.wait)
        await trio.testing.wait_all_tasks_blocked()

        assert operations.holder("me", "web") == "checkpoint"
        with pytest.raises(Busy, match="VM 'web' is busy with checkpoint"):
            await operations.run("destroy", "me", ("web",), trio.lowlevel.checkpoint)
        await operations.run("create", "me", ("db",), trio.lowlevel.checkpoint)
        await operations.run("create", "you", ("web",), trio.lowlevel.checkpoint)

        release.set()
        await trio.testing.wait_all_tasks_blocked()
        assert operations.holder("me", "web") is None
        await operations.run("destroy", "me", ("web",), trio.lowlevel.checkpoint)


async def test_of_several_vms_none_is_held_when_one_is_busy() -> None:
    async with trio.open_nursery() as nursery:
        operations = Operations(nursery)
        release = trio.Event()
        nursery.start_soon(operations.run, "restore", "me", ("b",), release.wait)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Busy, match="'b'"):
            await operations.run("swap", "me", ("a", "b"), trio.lowlevel.checkpoint)
        assert operations.holder("me", "a") is None
        release.set()


async def test_a_caller_who_leaves_does_not_end_the_operation() -> None:
    finished = trio.Event()

    async def job() -> None:
        await trio.testing.wait_all_tasks_blocked()
        finished.set()

    async with trio.open_nursery() as nursery:
        operations = Operations(nursery)
        with trio.move_on_after(0):
            await operations.run("create", "me", ("web",), job)
        assert not finished.is_set()
        await finished.wait()


async def test_the_result_and_the_error_reach_the_caller_and_the_nursery_stays_whole() -> None:
    async def seven() -> int:
        return 7

    async def broken() -> int:
        raise BackendError("no")

    async with trio.open_nursery() as nursery:
        operations = Operations(nursery)
        assert await operations.run("create", "me", ("web",), seven) == 7
        with pytest.raises(BackendError, match="no"):
            await operations.run("create", "me", ("web",), broken)
        assert await operations.run("create", "me", ("web",), seven) == 7


async def test_draining_refuses_new_operations_and_waits_for_the_running_ones() -> None:
    async with trio.open_nursery() as nursery:
        operations = Operations(nursery)
        release = trio.Event()
        nursery.start_soon(operations.run, "checkpoint", "me", ("web",), release.wait)
        await trio.testing.wait_all_tasks_blocked()
        drained = trio.Event()

        async def drain() -> None:
            await operations.drain()
            drained.set()

        nursery.start_soon(drain)
        await trio.testing.wait_all_tasks_blocked()
        assert not drained.is_set()
        with pytest.raises(DependencyDown, match="stopping"):
            await operations.run("create", "me", ("db",), trio.lowlevel.checkpoint)
        release.set()
        await drained.wait()


@pytest.mark.parametrize("in_a_nursery", [False, True])
async def test_a_caller_hears_that_the_agent_stopped(in_a_nursery: bool) -> None:
    async def endless() -> None:
        if in_a_nursery:  # then the cancellation arrives as a group
            async with trio.open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                await trio.sleep_forever()
        await trio.sleep_forever()

    heard: list[str] = []

    async def caller(operations: Operations) -> None:
        try:
            await operations.run("create", "me", ("web",), endless)
        except DependencyDown as error:
            heard.append(str(error))

    async with trio.open_nursery() as callers, trio.open_nursery() as agent:
        callers.start_soon(caller, Operations(agent))
        await trio.testing.wait_all_tasks_blocked()
        agent.cancel_scope.cancel()
    assert len(heard) == 1
    assert "create was interrupted" in heard[0]
