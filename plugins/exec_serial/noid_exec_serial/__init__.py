"""Reaches into guests through a shell on their serial console: for roots that have no agent of noid's.

`script` is what is typed, `records` and `output` read what comes back, `line` listens, `process` is one command and
`guest` the row of them, `wake` what a shell can do for a clone's identity.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from noid.core.backends import AgentContext, BackendSpec, ConsolePort, ExecBackend, Guest, Machine
from noid.hookspecs import hookimpl
from noid_exec_serial.guest import NAME, connect

__all__ = ["Config", "SerialExec", "exec_backend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Nothing to configure."""


class SerialExec:
    """The exec backend: a guest is whatever shell answers on the machine's serial console."""

    name = NAME
    needs_agent = False

    def connect(self, machine: Machine, console: ConsolePort) -> AbstractAsyncContextManager[Guest]:
        """Attach to the shell; entering waits until one is at its prompt. See `noid_exec_serial.guest.connect`."""
        del machine
        return connect(console)


@asynccontextmanager
async def _open(config: Config, context: AgentContext) -> AsyncIterator[ExecBackend]:
    del config, context  # nothing to open: every connection belongs to its machine
    yield SerialExec()


@hookimpl
def exec_backend() -> BackendSpec[ExecBackend]:
    """Offer ``serial``."""
    return BackendSpec("serial", Config, _open)
