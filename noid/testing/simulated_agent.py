"""An agent on simulated VMs: everything but the VMM and the guest is the real thing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from noid.core.agent import Agent
from noid.core.config.settings import Backends, Config, PoolConfig
from noid.core.images import Images
from noid.core.layout import Layout
from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import ExecRequest
from noid.core.model.users import User
from noid.core.opening import open_agent
from noid.core.plugins import Plugins
from noid.testing.faults import Faults
from noid.testing.simulated_image import add_simulated_image
from noid.testing.simulated_vmm import SimulatedPlugin


def simulated_plugins(faults: Faults | None = None, **options: Any) -> Plugins:
    """Return the installed plugins and the simulated one; *options* are those of `SimulatedPlugin`.

    What makes real guests stays out: nothing here boots, so nothing has to have been compiled.
    """
    return Plugins(SimulatedPlugin(faults, **options), disabled=("exec_vsock", "vmm_qemu"))


def simulated_config(data_dir: Path, *, storage: str = "copy", **fields: Any) -> Config:
    """Return the configuration of an agent of *data_dir* on simulated VMs; *fields* are those of `Config`.

    No machine waits for the next create, so that the processes there are, are those that were asked for.
    """
    backends = Backends(vmm="simulated", storage=storage, exec=("simulated",), network="none", auth="token")
    defaults: dict[str, Any] = {
        "local": True,
        "backends": backends,
        "pool": PoolConfig(size=0),
        "wake_timeout_secs": 10.0,
    }
    return Config(data_dir=data_dir, **defaults | fields)


@asynccontextmanager
async def simulated_agent(data_dir: Path, faults: Faults | None = None) -> AsyncIterator[tuple[Agent, User]]:
    """Open the agent of *data_dir*, which gets an image if it has none; yield it and its local user."""
    if not (data_dir / "images").exists():
        give_default_image(data_dir)
    async with open_agent(simulated_config(data_dir), simulated_plugins(faults)) as agent:
        yield agent, agent.local_user()


async def said(agent: Agent, user: User, name: str, script: str) -> str:
    """Run *script* in the guest of *user*'s VM *name* and return what it has written, stripped."""
    async with agent.guests.reach(user, name) as guest:
        process = await guest.start(ExecRequest(argv=("sh", "-c", script)))
        text = b""
        while isinstance(heard := await process.receive(), OutputChunk):
            text += heard.data
        await guest.release(process)
    return text.decode().strip()


def give_default_image(data_dir: Path, *, cmdline: str = "") -> None:
    """Register an image named ``default`` in *data_dir*, before or while its agent runs. Blocks."""
    scratch = data_dir / "image-files"
    scratch.mkdir(parents=True, exist_ok=True)
    add_simulated_image(Images(Layout(data_dir).images, {}), scratch, cmdline=cmdline)
