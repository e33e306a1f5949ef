"""What the tests of the core share: an agent on simulated VMs, with faults on demand."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from noid.core.agent import Agent
from noid.core.layout import Layout
from noid.core.model.guest_processes import ProcessExit
from noid.core.model.processes import ExecRequest
from noid.core.model.users import User
from noid.core.model.vms import VmSpec
from noid.core.opening import open_agent
from noid.testing.faults import Faults
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

SHAPE: dict[str, Any] = {"cpus": 1, "mem_mib": 128}


class Rig:
    """One data directory whose agent can be opened again and again."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.layout = Layout(data_dir)
        self.faults = Faults()

    @contextlib.asynccontextmanager
    async def agent(self, *, plugin: dict[str, Any] | None = None, **fields: Any) -> AsyncIterator[Driven]:
        """Open the agent; *plugin* are options of the simulated VMM, *fields* of the configuration."""
        plugins = simulated_plugins(self.faults, **plugin or {})
        async with open_agent(simulated_config(self.data_dir, **fields), plugins) as agent:
            yield Driven(agent)

    def machines(self) -> int:
        """How many VMM processes there are."""
        return len(marked_processes(self.data_dir))

    def stray(self, *instances: str) -> list[str]:
        """What there is on disk beside the directories of *instances*: nothing but published things should be."""
        places = (self.layout.vms, self.layout.run("x").parent, self.layout.scratch)
        found = [p.name for place in places if place.is_dir() for p in place.iterdir() if p.is_dir()]
        return [name for name in found if name not in instances] + [
            str(p.relative_to(self.data_dir)) for p in self.data_dir.rglob("*.partial")
        ]


class Driven:
    """An agent and its local user, with the verbs tests speak."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.user: User = agent.local_user()

    async def create(self, name: str = "web", **fields: Any) -> None:
        await self.agent.create_vm(self.user, VmSpec(name=name, **SHAPE | fields))

    async def checkpoint(self, name: str = "web") -> str:
        outcome = await self.agent.checkpoints.take(self.user, name, None)
        assert outcome.checkpoint is not None
        return outcome.checkpoint.id

    async def restore(self, checkpoint: str, name: str = "web", new_name: str | None = None) -> None:
        await self.agent.restore_vm(self.user, name, checkpoint, new_name)

    async def destroy(self, name: str = "web") -> None:
        await self.agent.destroy_vm(self.user, name)

    async def sh(self, *argv: str, name: str = "web", stdin: bytes | None = None) -> str:
        """Run a command in the guest and return what it wrote; it must succeed."""
        async with self.agent.guests.reach(self.user, name) as guest:
            process = await guest.start(ExecRequest(argv=argv, user="root", stdin=stdin is not None))
            if stdin is not None:
                await process.send_stdin(stdin)
                await process.close_stdin()
            output = b""
            while not isinstance(event := await process.receive(), ProcessExit):
                output += event.data
            await guest.release(process)
            assert event.status == 0, (argv, event, output)
            return output.decode().strip()

    async def write(self, path: str, text: str, name: str = "web") -> None:
        await self.sh("tee", path, name=name, stdin=text.encode())

    def states(self) -> dict[str, str]:
        return {vm.name: str(vm.state) for vm in self.agent.vms(self.user)}


@pytest.fixture
def rig(data_dir: Path) -> Rig:
    give_default_image(data_dir)
    return Rig(data_dir)
