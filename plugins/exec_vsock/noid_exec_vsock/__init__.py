"""Reaches into guests through a small agent, on a virtio-serial port or AF_VSOCK: processes, identity, power.

The agent is a static C program (``guest/``) that is also the initramfs' init, so any root file system works as it is.
PROTOCOL.md describes what the two say to each other, `frames` encodes it, `guest` speaks it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from importlib import resources

from noid.core.backends import AgentContext, BackendSpec, ConsolePort, ExecBackend, Guest, Machine
from noid.errors import ConfigError
from noid.hookspecs import hookimpl
from noid_exec_vsock.guest import connect

__all__ = ["Config", "VsockExec", "exec_backend", "guest_binary", "initrd_files"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Nothing to configure."""


class VsockExec:
    """The exec backend: a guest is whoever answers on the machine's channel."""

    name = "vsock"
    needs_agent = True

    def connect(self, machine: Machine, console: ConsolePort) -> AbstractAsyncContextManager[Guest]:
        """Attach to the machine's agent; entering waits until it answers. See `noid_exec_vsock.guest.connect`."""
        del console  # the agent has a channel of its own
        return connect(machine.channel)


@asynccontextmanager
async def _open(config: Config, context: AgentContext) -> AsyncIterator[ExecBackend]:
    del config, context  # nothing to open: every connection belongs to its machine
    yield VsockExec()


@hookimpl
def exec_backend() -> BackendSpec[ExecBackend]:
    """Offer ``vsock``."""
    return BackendSpec("vsock", Config, _open)


@hookimpl
def initrd_files(architecture: str) -> dict[str, bytes]:
    """Put the agent into every guest as its first program."""
    return {"init": guest_binary(architecture)}


def guest_binary(architecture: str) -> bytes:
    """Return the agent for guests of *architecture* (as in ``uname -m``).

    Raises:
        ConfigError: this installation has none.
    """
    program = resources.files(__name__) / "guest" / "bin" / f"noid-agent-{architecture}"
    if not program.is_file():
        raise ConfigError(
            f"This installation of noid has no guest agent for {architecture!r}. Install noid from a wheel, or run "
            "`python scripts/hatch_build.py` in its checkout."
        )
    return program.read_bytes()
