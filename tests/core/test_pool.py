"""What waits for the next create, and what stands ready for the next restore. On simulated VMs."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from noid.core.config.settings import PoolConfig
from noid.core.model.processes import ExecRequest
from noid.core.people.departures import remove_user
from noid.core.vms import pool
from noid.errors import NotFound
from noid.testing.processes import marked_processes
from noid.testing.vmm_rig import ticks_within

from .conftest import Driven, Rig

SOON_SECS = 20.0


async def eventually(holds: Callable[[], object]) -> None:
    """Return when *holds* does."""
    with trio.fail_after(SOON_SECS):
        while not holds():  # noqa: ASYNC110  # has no other way to tell
            await trio.sleep(0.02)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an agent be quiet at once."""
    monkeypatch.setattr(pool, "QUIET_SECS", 0.01)


@contextlib.asynccontextmanager
async def opened(rig: Rig, size: int = 1) -> AsyncIterator[Driven]:
    """Open an agent with a pool."""
    async with rig.agent(pool=PoolConfig(size=size)) as noid:
        yield noid


@contextlib.asynccontextmanager
async def counting(rig: Rig, size: int = 1) -> AsyncIterator[tuple[Driven, str]]:
    """Yield an agent with the VM web, which counts, a checkpoint of it, and a copy of that, which stands ready."""
    async with opened(rig, size) as noid:
        await noid.create()
        async with noid.agent.guests.reach(noid.user, "web") as guest:
            await guest.start(ExecRequest(argv=("count", "/run/n")))
        await noid.write("/root/which", "the first")
        checkpoint = await noid.checkpoint()
        await noid.restore(checkpoint, new_name="first")
        await eventually(lambda: noid.agent.ready_copies == size)
        yield noid, checkpoint


def instance(noid: Driven, name: str) -> str:
    return noid.agent.vm(noid.user, name).instance


async def last_timings(noid: Driven) -> dict[str, float]:
    return dict(noid.agent.operations.all(noid.user, limit=1)[0].timings)


async def test_a_create_takes_the_machine_that_waits_for_it(rig: Rig) -> None:
    async with opened(rig) as noid:
        await noid.create("one")
        await eventually(lambda: noid.agent.waiting_machines == 1)
        waiting = set(rig.stray(instance(noid, "one")))
        await noid.create("two")
        assert instance(noid, "two") in waiting
    async with opened(rig) as noid:
        assert rig.machines() == 2
        assert rig.stray(instance(noid, "one"), instance(noid, "two")) == []


async def test_a_restore_takes_the_copy_that_stands_ready_and_it_goes_on_where_the_checkpoint_is(rig: Rig) -> None:
    async with counting(rig) as (noid, checkpoint):
        ready = set(rig.stray(instance(noid, "web"), instance(noid, "first")))
        counted = int(await noid.sh("cat", "/run/n", name="first"))
        with trio.fail_after(SOON_SECS):
            while int(await noid.sh("cat", "/run/n", name="first")) < counted + 20:
                pass
        await noid.write("/root/which", "another")
        began = trio.current_time()

        await noid.restore(checkpoint, new_name="second")

        assert instance(noid, "second") in ready
        assert await noid.sh("cat", "/root/which", name="second") == "the first"
        assert await noid.sh("hostname", name="second") == "second"
        number = int(await noid.sh("cat", "/run/n", name="second"))
        assert number <= counted + ticks_within(trio.current_time() - began)  # it has stood still meanwhile
        timings = await last_timings(noid)
        assert timings["restore"] < timings["take"]
        await eventually(lambda: noid.agent.ready_copies == 1)


async def test_a_restore_in_place_takes_it_too(rig: Rig) -> None:
    async with counting(rig) as (noid, checkpoint):
        ready = set(rig.stray(instance(noid, "web"), instance(noid, "first")))
        await noid.restore(checkpoint)
        assert instance(noid, "web") in ready
        assert await noid.sh("cat", "/root/which") == "the first"


async def test_the_copy_of_another_checkpoint_is_not_taken_and_makes_room(rig: Rig) -> None:
    async with counting(rig) as (noid, _):
        await noid.write("/root/which", "the second")
        other = await noid.checkpoint()
        await noid.restore(other, new_name="second")
        assert await noid.sh("cat", "/root/which", name="second") == "the second"
        await eventually(lambda: rig.machines() == 5)  # three VMs, one that waits to be created, one copy
        await noid.restore(other, new_name="third")
        assert await noid.sh("cat", "/root/which", name="third") == "the second"


async def test_a_copy_goes_with_its_checkpoint(rig: Rig) -> None:
    async with counting(rig) as (noid, checkpoint):
        await noid.agent.checkpoints.delete(noid.user, noid.agent.checkpoints.all(noid.user)[0])
        assert noid.agent.ready_copies == 0
        assert rig.machines() == 3  # two VMs, and one that waits to be created
        with pytest.raises(NotFound):
            await noid.restore(checkpoint, new_name="second")


async def test_a_copy_whose_process_has_died_is_not_missed(rig: Rig) -> None:
    async with counting(rig) as (noid, checkpoint):
        known = {instance(noid, "web"), instance(noid, "first")}
        own = {vm.process.pid for vm in noid.agent.vms(noid.user) if vm.process is not None}
        for pid in marked_processes(rig.data_dir).keys() - own:
            os.kill(pid, signal.SIGKILL)
        await noid.restore(checkpoint, new_name="second")
        assert await noid.sh("cat", "/root/which", name="second") == "the first"
        assert instance(noid, "second") not in known


async def test_several_restores_at_once_share_what_stands_ready(rig: Rig) -> None:
    async with counting(rig, size=2) as (noid, checkpoint):
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(noid.restore, checkpoint, "web", f"copy-{number}")
        seen = {instance(noid, f"copy-{number}") for number in range(4)}
        assert len(seen) == 4
        for number in range(4):
            assert await noid.sh("hostname", name=f"copy-{number}") == f"copy-{number}"


async def test_without_room_to_spare_none_is_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_spare_disk_share", lambda _: pool.SPARE_DISK_SHARE)
    async with opened(rig) as noid:
        await noid.create()
        await noid.restore(await noid.checkpoint(), new_name="first")
        await trio.sleep(0.2)  # time enough for what must not happen
        assert (noid.agent.waiting_machines, noid.agent.ready_copies, rig.machines()) == (0, 0, 2)


async def test_the_end_of_the_agent_ends_what_waits(rig: Rig) -> None:
    async with counting(rig) as (noid, _):
        vms = [instance(noid, "web"), instance(noid, "first")]
    assert rig.machines() == 2
    assert rig.stray(*vms) == []


async def test_what_stood_ready_for_a_user_goes_with_the_user(rig: Rig) -> None:
    async with opened(rig) as noid:
        alice, _ = await noid.agent.users.add("alice")
        noid.user = alice
        await noid.create()
        await noid.restore(await noid.checkpoint(), new_name="first")
        await eventually(lambda: noid.agent.ready_copies == 1)
        await remove_user(noid.agent, "alice")
        assert noid.agent.ready_copies == 0
        assert rig.machines() == noid.agent.waiting_machines
