"""Pausing and resuming: what stands still, what does not, and who else notices. On simulated VMs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from noid.core.agent import Agent
from noid.core.database import deeds
from noid.core.model.processes import ExecRequest
from noid.core.model.users import User
from noid.core.model.vms import VmSpec, VmState
from noid.core.vms import health
from noid.errors import BackendError, Busy, Conflict, DependencyDown, OperationCancelled
from noid.testing.faults import Faults, die, fail, hang
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import said, simulated_agent, simulated_config

SOON_SECS = 20.0


async def eventually(holds: Callable[[], object]) -> None:
    """Return when *holds* does."""
    with trio.fail_after(SOON_SECS):
        while not holds():  # noqa: ASYNC110  # has no other way to tell
            await trio.sleep(0.02)


async def make(agent: Agent, user: User, name: str = "web") -> None:
    """Make a VM that counts in /run/n."""
    await agent.create_vm(user, VmSpec(name=name, mem_mib=64))
    async with agent.guests.reach(user, name) as guest:
        await guest.start(ExecRequest(argv=("count", "/run/n")))


async def is_paused(agent: Agent, user: User, name: str = "web") -> bool:
    """Return what the machine itself says."""
    machine = agent.services.supervisor.get(agent.vm(user, name)).machine
    return bool((await machine.ask("status"))["paused"])  # type: ignore[attr-defined]  # the simulated one's


async def test_a_paused_vm_stands_still_and_goes_on_where_it_stood(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        before = agent.vm(user, "web")
        paused = await agent.power.pause(user, "web")
        assert paused.vm is not None
        assert (paused.vm.state, paused.vm.process, paused.vm.instance) == (
            VmState.PAUSED,
            before.process,
            before.instance,
        )
        assert paused.timings.keys() == {"pause"}
        assert await is_paused(agent, user)
        with pytest.raises(Conflict, match=r"cannot exec VM 'web': it is paused\. Resume it with `noid resume web`\."):
            await said(agent, user, "web", "true")
        with pytest.raises(Conflict, match="cannot start VM 'web': it is paused"):
            await agent.power.start(user, "web")
        resumed = await agent.power.resume(user, "web")
        assert resumed.vm is not None
        assert (resumed.vm.state, resumed.vm.process) == (VmState.RUNNING, before.process)
        first = int(await said(agent, user, "web", "cat /run/n"))
        assert first > 0
        with trio.fail_after(SOON_SECS):
            while int(await said(agent, user, "web", "cat /run/n")) <= first:
                pass


async def test_pausing_the_paused_and_resuming_the_running_is_fine_and_nothing_is_done(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        assert (await agent.power.resume(user, "web")).timings == {}
        await agent.power.pause(user, "web")
        calls, generation = dict(faults.calls), agent.vm(user, "web").generation
        again = await agent.power.pause(user, "web")
        assert again.vm is not None
        assert (again.timings, again.vm.generation, dict(faults.calls)) == ({}, generation, calls)
        await agent.power.stop(user, "web", 0.0)
        for verb in (agent.power.pause, agent.power.resume):
            with pytest.raises(Conflict, match=r"it is stopped\. Start it with `noid start web`"):
                await verb(user, "web")


async def test_it_stays_paused_when_the_agent_ends_and_another_comes(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        process = agent.vm(user, "web").process
        await agent.power.pause(user, "web")
    async with simulated_agent(data_dir) as (agent, user):
        vm = agent.vm(user, "web")
        assert (vm.state, vm.process, vm.responding) == (VmState.PAUSED, process, None)
        assert await is_paused(agent, user)
        await agent.power.resume(user, "web")
        assert int(await said(agent, user, "web", "cat /run/n")) > 0


async def test_one_that_runs_though_its_row_says_paused_is_paused_when_it_is_adopted(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        await agent.services.supervisor.get(agent.vm(user, "web")).machine.resume()  # a stop that began, say
    async with simulated_agent(data_dir) as (agent, user):
        assert agent.vm(user, "web").state is VmState.PAUSED
        assert await is_paused(agent, user)


async def test_it_is_paused_also_for_an_agent_that_finds_it_without_a_database(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        instance = agent.vm(user, "web").instance
    simulated_config(data_dir).database.rename(data_dir / "lost")
    async with simulated_agent(data_dir) as (agent, user):
        deed = deeds._read_vm(agent.services.layout.vm(instance))
        assert deed is not None
        (found,) = agent.services.store.all_vms()
        assert (found.state, deed[0].state) == (VmState.PAUSED, VmState.PAUSED)


async def test_nobody_takes_the_silence_of_a_paused_guest_for_a_fault(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PING_EVERY_SECS", 0.05)
    monkeypatch.setattr(health, "ANSWER_SECS", 0.1)
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        await eventually(lambda: faults.calls["ping"])
        await agent.power.pause(user, "web")
        pings = faults.calls["ping"]
        await trio.sleep(0.5)
        vm = agent.vm(user, "web")
        assert (vm.responding, vm.unresponsive_since) == (None, None)
        assert faults.calls["ping"] <= pings + 1  # one may have been on its way
        await agent.power.resume(user, "web")
        await eventually(lambda: agent.vm(user, "web").responding)


async def test_a_checkpoint_of_a_paused_vm_leaves_it_paused_and_wakes_running(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await said(agent, user, "web", "echo memory > /dev/shm/word")
        await agent.power.pause(user, "web")
        taken = await agent.checkpoints.take(user, "web", None)
        assert taken.checkpoint is not None
        assert agent.vm(user, "web").state is VmState.PAUSED
        assert await is_paused(agent, user)
        await agent.restore_vm(user, "web", taken.checkpoint.id, "copy")
        assert await said(agent, user, "copy", "cat /dev/shm/word") == "memory"
        in_place = await agent.restore_vm(user, "web", taken.checkpoint.id, None)
        assert in_place.vm is not None
        assert in_place.vm.state is VmState.RUNNING
        assert await said(agent, user, "web", "cat /dev/shm/word") == "memory"


async def test_a_checkpoint_that_fails_leaves_a_paused_vm_paused(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        faults.arm("capture", fail(BackendError("no")))
        with pytest.raises(BackendError):
            await agent.checkpoints.take(user, "web", None)
        assert await is_paused(agent, user)
        await agent.power.resume(user, "web")
        assert int(await said(agent, user, "web", "cat /run/n")) > 0


async def test_a_paused_vm_is_stopped_in_order_rebooted_and_destroyed(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        assert (await agent.power.stop(user, "web", 10.0)).how == "clean"
        await agent.power.start(user, "web")
        await agent.power.pause(user, "web")
        rebooted = await agent.power.reboot(user, "web", 10.0)
        assert (rebooted.how, rebooted.vm and rebooted.vm.state) == ("clean", VmState.RUNNING)
        await agent.power.pause(user, "web")
        await agent.destroy_vm(user, "web")
        assert marked_processes(data_dir) == {}


async def test_a_stop_that_is_cancelled_leaves_a_paused_vm_paused(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        faults.arm("power_off", hang)

        async def stop() -> None:
            with pytest.raises(OperationCancelled):
                await agent.power.stop(user, "web", 3000.0)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await faults.reached("power_off")
            assert not await is_paused(agent, user)  # it was let go, to hear that it shall end
            agent.operations.cancel(user, agent.operations.all(user, limit=1)[0].id)
        assert agent.vm(user, "web").state is VmState.PAUSED
        assert await is_paused(agent, user)
        await agent.power.resume(user, "web")
        assert int(await said(agent, user, "web", "cat /run/n")) > 0


async def test_a_pause_that_fails_leaves_the_vm_running(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("pause", fail(BackendError("no")), after=True)
        with pytest.raises(BackendError):
            await agent.power.pause(user, "web")
        assert agent.vm(user, "web").state is VmState.RUNNING
        assert not await is_paused(agent, user)
        assert int(await said(agent, user, "web", "cat /run/n")) > 0


async def test_a_machine_that_dies_of_its_pause_is_dead_and_the_journal_is_clean(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("pause", die)
        with pytest.raises(DependencyDown):
            await agent.power.pause(user, "web")
        await eventually(lambda: agent.vm(user, "web").state is VmState.DEAD)
        assert agent.services.store.open_operations() == []
        await agent.power.start(user, "web")


async def test_a_paused_vm_whose_machine_is_killed_is_dead(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await agent.power.pause(user, "web")
        process = agent.vm(user, "web").process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await eventually(lambda: agent.vm(user, "web").state is VmState.DEAD)


async def test_one_operation_at_a_time_also_while_it_is_paused(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        go_on = trio.Event()

        async def wait(_: int | None) -> None:
            await go_on.wait()

        faults.arm("pause", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.power.pause, user, "web")
            await faults.reached("pause")
            for verb in (agent.power.pause, agent.power.resume):
                with pytest.raises(Busy, match="busy with pause"):
                    await verb(user, "web")
            go_on.set()
        assert agent.vm(user, "web").state is VmState.PAUSED
