"""Stopping, starting, rebooting, and guests that do it by themselves or do not answer: on simulated VMs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from noid.core.agent import Agent
from noid.core.model.users import User
from noid.core.model.vms import VmSpec, VmState
from noid.core.vms import endings, health
from noid.errors import Busy, Conflict, DeadlineExceeded, NotFound
from noid.testing.faults import Faults, fail, hang, kill_agent
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import said, simulated_agent

SOON_SECS = 20.0


async def eventually(holds: Callable[[], object]) -> None:
    """Return when *holds* does."""
    with trio.fail_after(SOON_SECS):
        while not holds():  # noqa: ASYNC110  # has no other way to tell
            await trio.sleep(0.02)


async def becomes(agent: Agent, user: User, name: str, *states: VmState) -> VmState:
    """Wait until a VM is in one of the states and nothing is done with it."""
    await eventually(lambda: (vm := agent.vm(user, name)).state in states and vm.busy is None)
    return agent.vm(user, name).state


async def make(agent: Agent, user: User, name: str = "web") -> str:
    await agent.create_vm(user, VmSpec(name=name, mem_mib=64))
    return name


async def test_what_was_written_is_there_after_a_stop_and_a_start_and_memory_is_not(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        before = agent.vm(user, "web")
        await said(agent, user, "web", "echo kept > /root/word; echo lost > /dev/shm/word")
        stopped = await agent.power.stop(user, "web", 10.0)
        assert stopped.vm is not None
        assert (stopped.how, stopped.vm.state, stopped.vm.process) == ("clean", VmState.STOPPED, None)
        assert marked_processes(data_dir) == {}
        with pytest.raises(Conflict, match=r"it is stopped\. Start it with `noid start web`"):
            await said(agent, user, "web", "true")
        started = await agent.power.start(user, "web")
        assert started.vm is not None
        assert started.vm.state is VmState.RUNNING
        assert (started.vm.id, started.vm.instance, started.vm.origin) == (before.id, before.instance, before.origin)
        assert started.vm.receipt is not None
        assert await said(agent, user, "web", "cat /root/word") == "kept"
        assert await said(agent, user, "web", "cat /dev/shm/word") == "cat: /dev/shm/word: No such file or directory"
        assert await said(agent, user, "web", "hostname") == "web"


async def test_stopping_the_stopped_and_starting_the_running_is_fine(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        process = agent.vm(user, "web").process
        assert (await agent.power.start(user, "web")).timings == {}
        assert agent.vm(user, "web").process == process
        await agent.power.stop(user, "web", 0.0)
        again = await agent.power.stop(user, "web", 10.0)
        assert again.how == "already stopped"
        with pytest.raises(Conflict, match="cannot reboot VM 'web': it is stopped"):
            await agent.power.reboot(user, "web", 1.0)
        with pytest.raises(NotFound):
            await agent.power.start(user, "other")


async def test_a_guest_that_ignores_it_is_killed_when_its_time_is_over(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await said(agent, user, "web", "echo 1 > /etc/stubborn")
        outcome = await agent.power.stop(user, "web", 0.5)
        assert outcome.how == "killed after 0.5 s"
        assert agent.vm(user, "web").ended == "stopped: killed after 0.5 s"
        assert marked_processes(data_dir) == {}


async def test_where_the_agent_is_silent_the_power_button_is_pressed(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("power_off", hang)
        outcome = await agent.power.stop(user, "web", 4.0)
        assert outcome.how == "clean"
        assert faults.calls["press_power_button"] == 1


async def test_a_dead_vm_boots_on_the_disk_it_has(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await said(agent, user, "web", "echo kept > /root/word; sync")
        process = agent.vm(user, "web").process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        await becomes(agent, user, "web", VmState.DEAD)
        assert (agent.vm(user, "web").ended or "").startswith("killed")
        await agent.power.start(user, "web")
        assert agent.vm(user, "web").ended is None
        assert await said(agent, user, "web", "cat /root/word") == "kept"


async def test_a_vm_that_was_started_is_checkpointed_cloned_and_restored_like_any_other(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await agent.power.reboot(user, "web", 5.0)
        await said(agent, user, "web", "echo disk > /root/word; echo memory > /dev/shm/word")
        taken = await agent.checkpoints.take(user, "web", None)
        assert taken.checkpoint is not None
        await agent.restore_vm(user, "web", taken.checkpoint.id, "copy")
        assert await said(agent, user, "copy", "cat /root/word; cat /dev/shm/word") == "disk\nmemory"
        await agent.power.reboot(user, "copy", 5.0)
        assert await said(agent, user, "copy", "cat /root/word; hostname") == "disk\ncopy"
        await agent.restore_vm(user, "web", taken.checkpoint.id, None)
        assert await said(agent, user, "web", "cat /dev/shm/word") == "memory"


async def test_a_guest_that_reboots_itself_comes_back(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        before = agent.vm(user, "web")
        await said(agent, user, "web", "echo kept > /root/word; sync")
        async with agent.guests.reach(user, "web") as guest:
            await guest.reboot()
        await eventually(lambda: agent.vm(user, "web").process != before.process)
        await becomes(agent, user, "web", VmState.RUNNING)
        assert agent.vm(user, "web").instance == before.instance
        assert await said(agent, user, "web", "cat /root/word") == "kept"


async def test_a_guest_that_does_nothing_but_reset_is_given_up(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings, "RESETS_MAX", 2)
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        for _ in range(3):
            before = agent.vm(user, "web").process
            async with agent.guests.reach(user, "web") as guest:
                await guest.reboot()
            await eventually(lambda before=before: agent.vm(user, "web").process != before)
            await becomes(agent, user, "web", VmState.RUNNING, VmState.DEAD)
        assert agent.vm(user, "web").state is VmState.DEAD
        assert agent.vm(user, "web").ended == "the guest has reset more than 2 times within 60 s"


async def test_a_reboot_that_fails_leaves_a_stopped_vm_that_can_be_started(data_dir: Path) -> None:
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("launch", fail(NotFound("no such program")))
        with pytest.raises(NotFound):
            await agent.power.reboot(user, "web", 5.0)
        assert agent.vm(user, "web").state is VmState.STOPPED
        await agent.power.start(user, "web")
        assert agent.vm(user, "web").state is VmState.RUNNING


async def test_a_reboot_without_its_image_stops_nothing(data_dir: Path) -> None:
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        process = agent.vm(user, "web").process
        agent.services.images.remove("default")
        with pytest.raises(NotFound):
            await agent.power.reboot(user, "web", 5.0)
        assert (agent.vm(user, "web").state, agent.vm(user, "web").process) == (VmState.RUNNING, process)
        await agent.power.stop(user, "web", 5.0)
        with pytest.raises(NotFound, match="its image 'default', which has its kernel, is not there any more"):
            await agent.power.start(user, "web")
        assert agent.vm(user, "web").state is VmState.STOPPED


async def test_exec_during_a_reboot_says_what_is_going_on(data_dir: Path) -> None:
    faults, go_on = Faults(), trio.Event()

    async def wait(_: int | None) -> None:
        await go_on.wait()

    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        faults.arm("launch", wait)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.power.reboot, user, "web", 5.0)
            await faults.reached("launch")
            with pytest.raises(Busy, match="busy with reboot"):
                await said(agent, user, "web", "true")
            go_on.set()
        assert await said(agent, user, "web", "echo well") == "well"


async def test_a_silent_guest_is_seen_and_refused_quickly_and_its_recovery_too(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PING_EVERY_SECS", 0.2)
    monkeypatch.setattr(health, "ANSWER_SECS", 0.4)
    async with simulated_agent(data_dir) as (agent, user):
        await make(agent, user)
        await make(agent, user, "other")
        assert agent.vm(user, "web").responding is True
        live = agent.services.supervisor.find(agent.vm(user, "web").id)
        assert live is not None
        await live.machine.pause()  # behind everybody's back
        await eventually(lambda: agent.vm(user, "web").responding is False)
        assert agent.vm(user, "web").unresponsive_since is not None
        with trio.fail_after(SOON_SECS), pytest.raises(DeadlineExceeded, match="has not answered since 20"):
            await said(agent, user, "web", "true")
        assert await said(agent, user, "other", "echo well") == "well"
        await live.machine.resume()
        await eventually(lambda: agent.vm(user, "web").responding is True)
        assert agent.vm(user, "web").unresponsive_since is None
        assert await said(agent, user, "web", "echo well") == "well"
        await live.machine.pause()
        assert (await agent.power.stop(user, "web", 5.0)).how == "clean"


async def test_a_guest_that_others_hear_from_is_not_asked(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PING_EVERY_SECS", 0.5)
    faults = Faults()
    async with simulated_agent(data_dir, faults) as (agent, user):
        await make(agent, user)
        pings = faults.calls["ping"]
        with trio.move_on_after(1.5):
            while True:
                await said(agent, user, "web", "true")
                await trio.sleep(0.05)
        assert faults.calls["ping"] == pings


def test_a_reboot_that_was_cut_off_is_finished_by_the_next_agent(data_dir: Path) -> None:
    async def prepare() -> None:
        async with simulated_agent(data_dir) as (agent, user):
            await make(agent, user)
            await said(agent, user, "web", "echo kept > /root/word; sync")

    async def be_killed_between_the_halves() -> None:
        faults = Faults()
        faults.arm("launch", kill_agent)
        async with simulated_agent(data_dir, faults) as (agent, user):
            await agent.power.reboot(user, "web", 5.0)

    async def look() -> None:
        async with simulated_agent(data_dir) as (agent, user):
            await becomes(agent, user, "web", VmState.RUNNING)
            assert await said(agent, user, "web", "cat /root/word") == "kept"

    trio.run(prepare)
    pid = os.fork()
    if pid == 0:
        try:
            trio.run(be_killed_between_the_halves)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    trio.run(look)
