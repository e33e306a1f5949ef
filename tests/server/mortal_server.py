"""A process for `test_keys`: a server on simulated VMs that kills itself, as ``kill -9`` does, where it is told.

Arguments: data directory; a call to the VMM (`noid.testing.faults.CALLS`) or ``CALL:NTH``, ``after KIND`` (as soon as
an operation of that kind is committed, before anybody is answered) or ``never``. Says ``ready`` when it accepts
connections on its unix socket.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import trio

from noid.core.backends import Event
from noid.core.opening import open_agent
from noid.core.plugins import Plugins
from noid.hookspecs import hookimpl
from noid.server.serve import serve_until
from noid.testing.faults import Faults, kill_agent
from noid.testing.simulated_agent import simulated_config
from noid.testing.simulated_vmm import SimulatedPlugin


class Killer:
    """A plugin that ends the agent when it hears of *kind*."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    @hookimpl
    def on_event(self, event: Event) -> None:
        if event.kind == self._kind:
            os.kill(os.getpid(), signal.SIGKILL)


async def main(data_dir: Path, where: str) -> None:
    """Serve until killed."""
    faults = Faults()
    plugins = [SimulatedPlugin(faults)]
    if where.startswith("after "):
        plugins.append(Killer(where.removeprefix("after ")))
    elif where != "never":
        call, _, nth = where.partition(":")
        faults.arm(call, kill_agent, nth=int(nth or 1))
    config = simulated_config(data_dir)
    async with open_agent(config, Plugins(*plugins, disabled=("exec_vsock", "vmm_qemu"))) as agent:
        await serve_until(trio.Event(), agent, config, ready=lambda: print("ready", flush=True))  # noqa: T201  # see above


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
