"""The whole agent on Firecracker: the same code as on any other VMM, with templates, sessions, restarts and ends."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from noid.core.agent import Agent
from noid.core.config.settings import Backends, SandboxConfig
from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import ExecRequest
from noid.core.model.users import User
from noid.core.model.vms import VmSpec, VmState
from noid.core.opening import open_agent
from noid.testing.firecracker import SimulatedFirecracker
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import give_default_image, said, simulated_config, simulated_plugins

BOUND_SECS = 60.0


@contextlib.asynccontextmanager
async def opened(data_dir: Path, firecracker: SimulatedFirecracker) -> AsyncIterator[tuple[Agent, User]]:
    backends = Backends(vmm="firecracker", storage="layers", exec=("simulated",), network="none", auth="token")
    plugins = {"vmm_firecracker": {"binary": str(firecracker.program)}}
    # The simulated program is Python, which needs half of the host to be there.
    sandbox = SandboxConfig(mode="limits")
    config = simulated_config(data_dir, backends=backends, plugins=plugins, sandbox=sandbox)
    async with open_agent(config, simulated_plugins()) as agent:
        yield agent, agent.local_user()


async def test_a_vm_lives_its_life_on_firecracker(
    data_dir: Path, firecracker: SimulatedFirecracker, no_leaks: None
) -> None:
    give_default_image(data_dir)
    with trio.fail_after(BOUND_SECS):
        async with opened(data_dir, firecracker) as (agent, user):
            await agent.create_vm(user, VmSpec(name="web", cpus=1, mem_mib=128))
            await said(agent, user, "web", "echo then > /dev/shm/memory; echo then > /root/disk")
            first = (await agent.checkpoints.take(user, "web", "first")).checkpoint
            assert first is not None
            await said(agent, user, "web", "echo later > /dev/shm/memory; echo later > /root/disk")
            await agent.restore_vm(user, "web", first.id, "copy")
            process = agent.vm(user, "web").process
        async with opened(data_dir, firecracker) as (agent, user):
            assert agent.vm(user, "web").process == process
            assert await said(agent, user, "web", "cat /dev/shm/memory /root/disk") == "later\nlater"
            assert await said(agent, user, "copy", "cat /dev/shm/memory /root/disk; hostname") == "then\nthen\ncopy"
            second = (await agent.checkpoints.take(user, "web", "second")).checkpoint
            assert second is not None
            await agent.restore_vm(user, "web", first.id, None)
            assert await said(agent, user, "web", "cat /dev/shm/memory /root/disk; hostname") == "then\nthen\nweb"
            await agent.restore_vm(user, "web", second.id, None)
            assert await said(agent, user, "web", "cat /dev/shm/memory /root/disk") == "later\nlater"
            await agent.power.stop(user, "web", 20.0)
            stopped = agent.vm(user, "web")
            assert stopped.state is VmState.STOPPED
            assert stopped.ended == "stopped: clean"
            await agent.power.start(user, "web")
            assert await said(agent, user, "web", "cat /root/disk") == "later"
            for name in ("web", "copy"):
                await agent.destroy_vm(user, name)
    assert marked_processes(data_dir / "vms") == {}


async def test_a_checkpoint_cuts_the_guests_channel_and_the_next_question_finds_it_again(
    data_dir: Path, firecracker: SimulatedFirecracker, no_leaks: None
) -> None:
    give_default_image(data_dir)
    with trio.fail_after(BOUND_SECS):
        async with opened(data_dir, firecracker) as (agent, user):
            await agent.create_vm(user, VmSpec(name="web", cpus=1, mem_mib=128))
            async with agent.guests.reach(user, "web") as guest:
                process = await guest.start(ExecRequest(argv=("ticker",)))
                heard = await process.receive()
                assert isinstance(heard, OutputChunk)
            await agent.checkpoints.take(user, "web", None)
            async with agent.guests.reach(user, "web") as guest:
                again = await guest.attach(process.id, heard.offset + len(heard.data))
                more = await again.receive()
            assert isinstance(more, OutputChunk)
            assert more.offset == heard.offset + len(heard.data)
            await agent.destroy_vm(user, "web")
