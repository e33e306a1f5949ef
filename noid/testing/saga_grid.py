"""Every saga, broken at every step in every way: what `tests/core/test_saga_grid.py` runs and draws.

A `World` is an agent's data directory with a VM that counts, a checkpoint of it and nothing half done. A `Cell` is one
way to break one step. The operation runs in a forked process, so that a crash is a real ``kill -9`` of a real agent;
afterwards a fresh agent opens the directory and `World.check` asks for what must hold, always:

- the VM that was there before still runs, in the same process if nothing was to change, and answers;
- the checkpoint's files are as they were;
- rows, processes, directories, sockets and journal agree; nothing is half done;
- the operation works when it is simply tried again.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import trio

from noid.core import lifecycle
from noid.core.agent import Agent, open_agent
from noid.core.backends import Guest
from noid.core.layout import Layout
from noid.core.lifecycle import Work
from noid.core.model import ExecRequest, OutputChunk, VmSpec, VmState
from noid.core.saga import Facts, Saga, Step
from noid.core.store import open_store
from noid.errors import BackendError, NoidError, NotFound
from noid.testing.processes import marked_processes
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins

MEM_MIB = 64
CELL_SECS = 30.0

SAGAS: Mapping[str, str] = {
    "create": "CREATE_VM",
    "fork": "FORK_VM",
    "restore": "RESTORE_VM",
    "checkpoint": "CHECKPOINT_VM",
    "destroy": "DESTROY_VM",
}

#: How a step is broken. ``crashed in undo``: the last step fails, and the agent is killed right after this one's undo.
MODES = ("fails before", "fails after", "cancelled", "crashed before", "crashed after", "undo fails", "crashed in undo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One way to break one step of one saga. Step ``commit`` stands for what follows the transaction."""

    saga: str
    step: str
    mode: str

    def __str__(self) -> str:
        return f"{self.saga}-{self.step}-{self.mode.replace(' ', '_')}"


def table(saga: str) -> Saga[Work]:
    """Return the saga as the core runs it."""
    found: Saga[Work] = getattr(lifecycle, SAGAS[saga])
    return found


def cells() -> list[Cell]:
    """Return every cell that can be."""
    found = []
    for saga in SAGAS:
        for step in table(saga).steps:
            modes = [mode for mode in MODES if step.undo is not None or "undo" not in mode]
            found += [Cell(saga=saga, step=step.name, mode=mode) for mode in modes]
        found.append(Cell(saga=saga, step="commit", mode="crashed before"))
        found.append(Cell(saga=saga, step="commit", mode="crashed after"))
    return found


# --- breaking a saga ------------------------------------------------------------------------------------------------


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


def broken(saga: Saga[Work], cell: Cell) -> Saga[Work]:
    """Return *saga* with one step broken as *cell* says."""
    steps = [_broken_step(step, cell, last=step is saga.steps[-1]) for step in saga.steps]

    def commit(work: Work, facts: Facts, tx: Any) -> None:
        if cell.step == "commit" and cell.mode == "crashed before":
            _die()
        saga.commit(work, facts, tx)

    return dataclasses.replace(saga, steps=tuple(steps), commit=commit)


def _broken_step(step: Step[Work], cell: Cell, *, last: bool) -> Step[Work]:
    here, in_undo = step.name == cell.step, "undo" in cell.mode

    async def do(work: Work, facts: Facts) -> Mapping[str, Any] | None:
        if here and cell.mode == "fails before":
            raise BackendError(f"{cell}: before")
        if here and cell.mode == "crashed before":
            _die()
        added = await step.do(work, facts)
        if here and cell.mode == "crashed after":
            _die()
        if (here and cell.mode == "fails after") or (last and in_undo):
            raise BackendError(f"{cell}: after")
        if here and cell.mode == "cancelled":  # as at the end of a shutdown that waited long enough
            nursery = trio.lowlevel.current_task().parent_nursery
            assert nursery is not None
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()
        return added

    async def undo(work: Work, facts: Facts) -> None:
        assert step.undo is not None
        await step.undo(work, facts)
        if here and cell.mode == "undo fails":
            raise BackendError(f"{cell}: undo")
        if here and cell.mode == "crashed in undo":
            _die()

    return dataclasses.replace(step, do=do, undo=None if step.undo is None else undo)


# --- the world ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class World:
    """A data directory in a known state. *counts* is the last number the VM ``web`` was seen to have counted to."""

    data_dir: Path
    process: Any = None
    checkpoint: str = ""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counts: int = 0

    async def prepare(self) -> None:
        """Make ``web``, let it count, and take a checkpoint of it."""
        give_default_image(self.data_dir)
        async with self.agent() as agent:
            user = agent.local_user()
            await agent.create_vm(user, VmSpec(name="web", mem_mib=MEM_MIB))
            async with agent.guest(user, "web") as guest:
                await guest.start(ExecRequest(argv=("count", "/run/n")))
                self.counts = await _counted(guest, beyond=0)
            taken = await agent.checkpoint_vm(user, "web", "before")
            assert taken.checkpoint is not None
            self.checkpoint = taken.checkpoint.id
            self.files = self._hashes()
            self.process = agent.vm(user, "web").process

    def agent(self) -> contextlib.AbstractAsyncContextManager[Agent]:
        """Return a fresh agent of the directory."""
        return open_agent(simulated_config(self.data_dir), simulated_plugins())

    async def operate(self, agent: Agent, saga: str) -> None:
        """Carry out the operation."""
        user = agent.local_user()
        match saga:
            case "create":
                await agent.create_vm(user, VmSpec(name="new", mem_mib=MEM_MIB))
            case "fork":
                await agent.restore_vm(user, "web", self.checkpoint, "new")
            case "restore":
                await agent.restore_vm(user, "web", self.checkpoint, None)
            case "checkpoint":
                await agent.checkpoint_vm(user, "web", "another")
            case "destroy":
                await agent.destroy_vm(user, "victim")

    def run_broken(self, cell: Cell) -> str:
        """Run the operation, broken, in a process of its own; return how it ended: an error, ``done``, ``killed``."""
        reader, writer = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(parent, writer, lambda: self._broken_operation(cell))
        os.close(writer)
        with open(reader, encoding="utf-8") as told:  # noqa: PTH123  # a descriptor, not a path
            text = told.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}: {text}"
        if os.WEXITSTATUS(status):
            raise AssertionError(f"{cell}:\n{text}")
        return text

    async def _broken_operation(self, cell: Cell) -> str:
        """The child: break the saga, run it, and see to it that ``web`` was not disturbed under the same agent."""
        setattr(lifecycle, SAGAS[cell.saga], broken(table(cell.saga), cell))
        outcome = "cancelled"
        async with self.agent() as agent:
            user = agent.local_user()
            if cell.saga == "destroy":
                await agent.restore_vm(user, "web", self.checkpoint, "victim")
            try:
                await self.operate(agent, cell.saga)
                outcome = "done"
            except NoidError as error:
                outcome = type(error).__name__
            if (cell.step, cell.mode) == ("commit", "crashed after"):
                _die()
            if cell.mode != "cancelled":
                async with agent.guest(user, "web") as guest:
                    await _counted(guest, beyond=self.counts)
                if cell.saga != "destroy" and cell.mode != "undo fails":  # what these leave, the next start removes
                    self._agrees(agent)
        return outcome

    # --- what must hold -------------------------------------------------------------------------------------------

    async def check(self, cell: Cell, outcome: str) -> None:
        """Open a fresh agent and compare everything with everything; then try the operation again.

        Raises:
            AssertionError: says what does not hold.
        """
        happened = (cell.step, cell.mode) == ("commit", "crashed after")
        async with self.agent() as agent:
            user = agent.local_user()
            names = {vm.name for vm in agent.vms(user)}
            expected = {"web"}
            if cell.saga in ("create", "fork") and happened:
                expected |= {"new"}
            if cell.saga == "destroy" and "victim" in names:  # only forward: unless it was destroyed it can be, again
                expected |= {"victim"}
            assert names == expected, f"VMs are {names}, not {expected}, after {outcome}"
            web = agent.vm(user, "web")
            assert (web.state, web.busy) == (VmState.RUNNING, None), f"web is {web.state}, busy with {web.busy}"
            if cell.saga == "restore" and happened:
                assert web.process != self.process, "web was restored, but its process is the old one"
            else:
                assert web.process == self.process, "web's process is another one, although nothing was restored"
            async with agent.guest(user, "web") as guest:
                await _counted(guest, beyond=0 if happened else self.counts)
            self._agrees(agent)
            assert {key: self._hashes().get(key) for key in self.files} == self.files, "the checkpoint was changed"
            await self._again(agent, cell, happened=happened)
            self._agrees(agent)
            self.process = agent.vm(user, "web").process

    async def _again(self, agent: Agent, cell: Cell, *, happened: bool) -> None:
        """Do it again, now that nothing is broken, and tidy up."""
        user = agent.local_user()
        if happened and cell.saga in ("create", "fork"):
            await agent.destroy_vm(user, "new")
        if cell.saga == "destroy" and all(vm.name != "victim" for vm in agent.vms(user)):
            await agent.restore_vm(user, "web", self.checkpoint, "victim")
        await self.operate(agent, cell.saga)
        if cell.saga in ("create", "fork"):
            async with agent.guest(user, "new") as guest:
                await guest.ping()
            await agent.destroy_vm(user, "new")
        if cell.saga == "destroy":
            with contextlib.suppress(NotFound):
                agent.vm(user, "victim")
                raise AssertionError("the victim was destroyed and is still there")
        async with agent.guest(user, "web") as guest:
            self.counts = await _counted(guest, beyond=0)

    def _agrees(self, agent: Agent) -> None:
        """Compare rows, processes, directories and the journal."""
        user = agent.local_user()
        rows = agent.vms(user)
        running = {vm.process.pid for vm in rows if vm.process is not None}
        processes = marked_processes(self.data_dir)
        assert set(processes) == running, f"processes are {processes}, rows have {running}"
        layout, config = Layout(self.data_dir), simulated_config(self.data_dir)
        instances = {vm.instance for vm in rows}
        assert _names(layout.vms) == instances, "directories of VMs"
        assert _names(config.run_dir) - {"agent.sock"} == instances, "directories of sockets"
        assert _names(layout.scratch) == set(), "scratch directories"
        checkpoints = {c.id for c in agent.checkpoints(user, "web")}
        assert _names(layout.checkpoint(user.id, "x").parent) == checkpoints, "directories of checkpoints"
        assert self.checkpoint in checkpoints, "the checkpoint's row"
        with open_store(config.database) as store:
            assert store.open_operations() == [], "the journal"

    def _hashes(self) -> dict[str, str]:
        root = Layout(self.data_dir).users
        files = [path for path in root.glob(f"*/checkpoints/{self.checkpoint}/**/*") if path.is_file()]
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


async def _counted(guest: Guest, beyond: int) -> int:
    """Wait until the counter in the guest is beyond a number and return it."""
    with trio.fail_after(CELL_SECS):
        while True:
            process = await guest.start(ExecRequest(argv=("cat", "/run/n")))
            text = b""
            while isinstance(said := await process.receive(), OutputChunk):
                text += said.data
            await guest.release(process)
            if int(text or b"0") > beyond:
                return int(text)
            await guest.ping()


def _child(parent: int, writer: int, run: Callable[[], Awaitable[str]]) -> NoReturn:
    """The forked process: run, tell, and leave without any of pytest's clean-up."""
    status = 1
    try:
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with pytest
        if os.getppid() != parent:
            os._exit(status)
        with open(writer, "w", encoding="utf-8") as told:  # a descriptor, not a path
            try:
                told.write(trio.run(_within, run))
                status = 0
            except BaseException:  # noqa: BLE001, RUF100  # the parent raises it
                told.write(traceback.format_exc())
            told.flush()
        sys.stdout.flush()
    finally:
        os._exit(status)


async def _within(run: Callable[[], Awaitable[str]]) -> str:
    with trio.fail_after(CELL_SECS):
        return await run()
