"""Simulated guests with files: those of this host, by the real agent's own builtins. For tests of copying over HTTP."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio
from noid_exec_vsock import guest_binary
from noid_exec_vsock.guest import AgentGuest, connect

from noid.core.backends import BackendSpec, ConsolePort, ExecBackend, Guest, GuestConnection, Machine, Process
from noid.core.model.connections import ConnectRequest
from noid.core.model.files import FileTransfer
from noid.core.plugins import Plugins
from noid.hookspecs import hookimpl
from noid.testing.faults import Faults
from noid.testing.simulated_exec import SimulatedExec
from noid.testing.simulated_vmm import SimulatedConfig, SimulatedPlugin

PATIENCE_SECS = 20.0

AgentProcess = subprocess.Popen[bytes]


def agent_program(directory: Path) -> Path:
    """Write the guest agent's program for this host into *directory*. Blocks.

    Raises:
        DependencyDown: it was not built.
    """
    program = directory / "agent"
    program.write_bytes(guest_binary(os.uname().machine))
    program.chmod(0o755)
    return program


def plugins_with_files(faults: Faults, program: Path, agents: list[AgentProcess] | None = None) -> Plugins:
    """Return plugins whose guests have files. *agents* are those processes of *program* that run now."""
    running: list[AgentProcess] = [] if agents is None else agents
    return Plugins(_PluginWithFiles(faults, program, running), disabled=("exec_vsock", "vmm_qemu"))


def start_agent(program: Path, path: Path) -> AgentProcess:
    """Start an agent that listens on the unix socket *path*."""
    return subprocess.Popen([program, "--socket", path], stdin=subprocess.DEVNULL)


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition*, which other processes bring about."""
    while not condition():  # noqa: ASYNC110  # nothing tells
        await trio.sleep(0.005)


class _GuestWithFiles:
    """A simulated guest whose files are those of this host, by the agent's own builtins."""

    def __init__(self, simulated: Guest, native: AgentGuest) -> None:
        self._simulated = simulated
        self._native = native
        self._copies: set[int] = set()
        self.features = simulated.features | {"files"}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._simulated, name)

    async def transfer(self, request: FileTransfer) -> Process:
        process = await self._native.transfer(request)
        self._copies.add(process.id)
        return process

    async def connect(self, request: ConnectRequest) -> GuestConnection:
        """Connect to a port of this host."""
        return await self._native.connect(request)

    async def release(self, process: Process | int) -> None:
        number = process if isinstance(process, int) else process.id
        await (self._native if number in self._copies else self._simulated).release(process)


class _ExecWithFiles(SimulatedExec):
    """The simulated way into a guest, with an agent of this host beside each conversation."""

    def __init__(self, faults: Faults, program: Path, agents: list[AgentProcess]) -> None:
        super().__init__(faults)
        self._program = program
        self._agents = agents

    @contextlib.asynccontextmanager
    async def connect(self, machine: Machine, console: ConsolePort) -> AsyncIterator[Guest]:
        path = self._program.with_name(f"{os.urandom(4).hex()}.sock")
        agent = start_agent(self._program, path)
        self._agents.append(agent)
        try:
            with trio.fail_after(PATIENCE_SECS):
                await until(path.exists)
            async with super().connect(machine, console) as guest, connect(partial(_opened, path)) as native:
                yield cast("Guest", _GuestWithFiles(guest, native))  # the rest it has from the simulated one
        finally:
            self._agents.remove(agent)
            agent.kill()
            agent.wait()


async def _opened(path: Path) -> trio.abc.Stream:
    with trio.fail_after(PATIENCE_SECS):
        while True:
            try:
                return await trio.open_unix_socket(str(path))
            except ConnectionRefusedError:  # bound, and about to listen
                await trio.sleep(0.002)


class _PluginWithFiles(SimulatedPlugin):
    """The simulated plugin with that way in."""

    def __init__(self, faults: Faults, program: Path, agents: list[AgentProcess]) -> None:
        super().__init__(faults)
        self._exec_with_files = _ExecWithFiles(faults, program, agents)

    @hookimpl
    def exec_backend(self) -> BackendSpec[ExecBackend]:
        return BackendSpec("simulated", SimulatedConfig, self._open_with_files)

    @contextlib.asynccontextmanager
    async def _open_with_files(self, _config: SimulatedConfig, _context: Any) -> AsyncIterator[ExecBackend]:
        yield self._exec_with_files
