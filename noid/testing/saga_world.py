"""What every broken operation is run on, and what must hold afterwards.

A `World` is an agent's data directory with a VM ``web`` that counts, a checkpoint of it and nothing half done. The
operation runs in a forked process, so that a crash is a real ``kill -9`` of a real agent; then a fresh agent opens the
directory, and `World.check` asks for what must hold, always:

- ``web`` still runs, in the same process unless it was to be replaced, answers, and counts on;
- the checkpoint's files are as they were;
- rows, processes, directories, sockets and journal agree; nothing is half done;
- the operation works when it is simply tried again.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import trio

from noid.core.agent import Agent
from noid.core.backends import Guest
from noid.core.checkpoints import manifest as manifests
from noid.core.database.listing import Wanted
from noid.core.database.store import open_store
from noid.core.layout import Layout
from noid.core.model.guest_processes import OutputChunk
from noid.core.model.processes import ExecRequest
from noid.core.model.storage import Checkpoint
from noid.core.model.vms import ProcessRef, VmSpec, VmState
from noid.core.opening import open_agent
from noid.errors import NoidError
from noid.testing.faults import Faults
from noid.testing.processes import marked_processes
from noid.testing.saga_grid import Cell, broken
from noid.testing.simulated_agent import give_default_image, simulated_config, simulated_plugins
from noid.testing.simulated_vmm import SimulatedMachine

MEM_MIB = 64
CELL_SECS = 30.0
GRACE_SECS = 5.0
POWER = ("stop", "start", "reboot", "pause", "resume")
#: What is done to another VM than ``web``, which is made for it.
VICTIMS = ("destroy", "rename", *POWER)
#: What is done to another checkpoint than the one that every world has.
OF_CHECKPOINTS = ("relabel", "discard")
SPARES = Wanted(labels=(("spare", None),))


@dataclass(slots=True)
class World:
    """A data directory in a known state. *counts* is the last number the VM ``web`` was seen to have counted to."""

    data_dir: Path
    process: ProcessRef | None = None
    checkpoint: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    counts: int = 0
    mem_mib: int = MEM_MIB

    async def prepare(self) -> None:
        """Make ``web``, let it count, and take a checkpoint of it."""
        give_default_image(self.data_dir)
        async with self.agent() as agent:
            user = agent.local_user()
            await agent.create_vm(user, VmSpec(name="web", mem_mib=MEM_MIB))
            async with agent.guests.reach(user, "web") as guest:
                await guest.start(ExecRequest(argv=("count", "/run/n")))
                self.counts = await _counted(guest, beyond=0)
            taken = await agent.checkpoints.take(user, "web", "before")
            assert taken.checkpoint is not None
            self.checkpoint = taken.checkpoint.id
            self.files = self._hashes()
            self.process = agent.vm(user, "web").process

    def agent(self, faults: Faults | None = None) -> contextlib.AbstractAsyncContextManager[Agent]:
        """Return a fresh agent of the directory."""
        return open_agent(simulated_config(self.data_dir), simulated_plugins(faults))

    async def operate(self, agent: Agent, saga: str) -> None:
        """Carry out the operation."""
        user = agent.local_user()
        match saga:
            case "create":
                await agent.create_vm(user, VmSpec(name="new", mem_mib=self.mem_mib))
            case "fork":
                await agent.restore_vm(user, "web", self.checkpoint, "new")
            case "restore":
                await agent.restore_vm(user, "web", self.checkpoint, None)
            case "checkpoint":
                await agent.checkpoints.take(user, "web", "another")
            case "destroy":
                await agent.destroy_vm(user, "victim")
            case "stop":
                await agent.power.stop(user, "victim", GRACE_SECS)
            case "start":
                await agent.power.start(user, "victim")
            case "reboot":
                await agent.power.reboot(user, "victim", GRACE_SECS)
            case "pause":
                await agent.power.pause(user, "victim")
            case "resume":
                await agent.power.resume(user, "victim")
            case "rename":
                await agent.change_vm(user, "victim", new_name="renamed", labels={"renamed": "yes"})
            case "relabel":
                await agent.checkpoints.change(user, _spare(agent), label="relabelled", labels={"relabelled": "yes"})
            case "discard":
                await agent.checkpoints.delete(user, _spare(agent))

    def run_broken(self, cell: Cell) -> str:
        """Run the operation, broken, in a process of its own; return how it ended: an error, ``done``, ``killed``."""
        if cell.is_call and cell.saga == "create":
            self.mem_mib += 1  # a shape that has no template yet
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
        """The child: run the broken saga, and see to it that ``web`` was not disturbed under the same agent."""
        outcome, faults = "cancelled", Faults()
        async with self.agent(faults) as agent:
            user = agent.local_user()
            if cell.saga in VICTIMS:
                await self._make_victim(agent, cell.saga)
            if cell.saga in OF_CHECKPOINTS:
                await agent.checkpoints.take(user, "web", "spare", {"spare": ""})
            with broken(cell, faults):
                try:
                    await self.operate(agent, cell.saga)
                    outcome = "done"
                except NoidError as error:
                    outcome = type(error).__name__
            if cell.is_call:
                assert faults.struck, f"the operation never came to {cell.place}"
            if cell.mode != "cancelled":
                async with agent.guests.reach(user, "web") as guest:
                    await _counted(guest, beyond=0 if (cell.saga, outcome) == ("restore", "done") else self.counts)
                if cell.saga != "destroy" and cell.mode != "undo fails":  # what these leave, the next start removes
                    self._agrees(agent)
        return outcome

    # --- what must hold -------------------------------------------------------------------------------------------

    async def check(self, cell: Cell, outcome: str) -> None:
        """Open a fresh agent and compare everything with everything; then try the operation again.

        Raises:
            AssertionError: says what does not hold.
        """
        happened = cell.after_commit or outcome == "done"
        async with self.agent() as agent:
            user = agent.local_user()
            names = {vm.name for vm in agent.vms(user)}
            expected = {"web"}
            if cell.saga in ("create", "fork") and happened:
                expected |= {"new"}
            if cell.saga == "destroy" and "victim" in names:  # only forward: unless it was destroyed it can be, again
                expected |= {"victim"}
            if cell.saga in POWER:
                expected |= {"victim"}
                await self._look_at_victim(agent, cell, happened=happened)
            if cell.saga == "rename":
                expected |= {"renamed" if happened else "victim"}
                assert _spare(agent).vm_name in expected, "the name of the checkpoint's VM"
                assert agent.vm(user, _spare(agent).vm_name).labels == ({"renamed": "yes"} if happened else {})
            if cell.saga == "relabel":
                assert (_spare(agent).label == "relabelled") is happened, f"the label is {_spare(agent).label}"
            if cell.saga == "discard":
                left = len(agent.checkpoints.all(user, SPARES))
                assert left == (0 if happened else 1), f"{left} are left of the checkpoint"
            assert names == expected, f"VMs are {names}, not {expected}, after {outcome}"
            web = agent.vm(user, "web")
            assert (web.state, web.busy) == (VmState.RUNNING, None), f"web is {web.state}, busy with {web.busy}"
            if cell.saga == "restore" and happened:
                assert web.process != self.process, "web was restored, but its process is the old one"
            else:
                assert web.process == self.process, "web's process is another one, although nothing was restored"
            async with agent.guests.reach(user, "web") as guest:
                await _counted(guest, beyond=0 if happened else self.counts)
            self._agrees(agent)
            assert {key: self._hashes().get(key) for key in self.files} == self.files, "the checkpoint was changed"
            await self._again(agent, cell, happened=happened)
            self._agrees(agent)
            self.process = agent.vm(user, "web").process

    async def _make_victim(self, agent: Agent, saga: str) -> None:
        """Make another VM for the operation, with something on its disk."""
        user = agent.local_user()
        await agent.restore_vm(user, "web", self.checkpoint, "victim")
        async with agent.guests.reach(user, "victim") as guest:
            await _said(guest, "echo kept > /root/word; sync")
        if saga == "start":
            await agent.power.stop(user, "victim", GRACE_SECS)
        if saga == "resume":
            await agent.power.pause(user, "victim")
        if saga == "rename":
            await agent.checkpoints.take(user, "victim", "spare", {"spare": ""})

    async def _look_at_victim(self, agent: Agent, cell: Cell, *, happened: bool) -> None:
        """See to it that the victim is what it may be, and says so; a reboot cut off by a crash is finished."""
        user = agent.local_user()
        with trio.fail_after(CELL_SECS):
            while True:
                victim = agent.vm(user, "victim")
                cut_off = cell.saga == "reboot" and cell.kills_agent and cell.mode != "killed in undo"
                finishing = cut_off and victim.state is not VmState.RUNNING
                if victim.busy is None and not finishing:
                    break
                await trio.sleep(0.01)  # the agent finishes it by itself and tells nobody
        other = VmState.PAUSED if cell.saga in ("pause", "resume") else VmState.STOPPED
        allowed = {VmState.RUNNING, other}
        if happened:
            allowed = {other} if cell.saga in ("stop", "pause") else {VmState.RUNNING}
        assert victim.state in allowed, f"the victim is {victim.state}"
        assert (victim.process is None) == (victim.state is VmState.STOPPED), f"{victim.state} with {victim.process}"
        if victim.process is not None:
            machine = agent.services.supervisor.get(victim).machine
            assert isinstance(machine, SimulatedMachine)
            assert (await machine.ask("status"))["paused"] is (victim.state is VmState.PAUSED), "its CPUs and its row"

    async def _finish_victim(self, agent: Agent, saga: str) -> None:
        """The operation has been tried again: the victim is what it should be, and has its disk."""
        user = agent.local_user()
        if saga == "stop":
            assert agent.vm(user, "victim").state is VmState.STOPPED
            await agent.power.start(user, "victim")
        if saga == "pause":
            assert agent.vm(user, "victim").state is VmState.PAUSED
            await agent.power.resume(user, "victim")
        async with agent.guests.reach(user, "victim") as guest:
            assert await _said(guest, "cat /root/word") == b"kept\n", "the victim's disk"
            assert await _said(guest, "hostname") == b"victim\n", "the victim's name"
        await agent.destroy_vm(user, "victim")

    async def _again(self, agent: Agent, cell: Cell, *, happened: bool) -> None:
        """Do it again, now that nothing is broken, and tidy up."""
        user = agent.local_user()
        if happened and cell.saga in ("create", "fork"):
            await agent.destroy_vm(user, "new")
        if cell.saga == "destroy" and all(vm.name != "victim" for vm in agent.vms(user)):
            await agent.restore_vm(user, "web", self.checkpoint, "victim")
        if happened and cell.saga == "rename":
            await agent.change_vm(user, "renamed", new_name="victim", labels={"renamed": None})
        if happened and cell.saga == "discard":
            await agent.checkpoints.take(user, "web", "spare", {"spare": ""})
        if cell.saga == "reboot" and agent.vm(user, "victim").state is VmState.STOPPED:
            await agent.power.start(user, "victim")
        await self.operate(agent, cell.saga)
        if cell.saga in POWER:
            await self._finish_victim(agent, cell.saga)
        if cell.saga in ("create", "fork"):
            async with agent.guests.reach(user, "new") as guest:
                await guest.ping()
            await agent.destroy_vm(user, "new")
        if cell.saga == "rename":
            await agent.destroy_vm(user, "renamed")
        if cell.saga == "discard":
            assert agent.checkpoints.all(user, SPARES) == [], "the checkpoint was deleted and is still there"
        elif cell.saga in ("rename", "relabel"):
            await agent.checkpoints.delete(user, _spare(agent))
        if cell.saga == "destroy":
            assert all(vm.name != "victim" for vm in agent.vms(user)), "the victim was destroyed and is still there"
        async with agent.guests.reach(user, "web") as guest:
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
        checkpoints = {c.id for c in agent.checkpoints.all(user)}
        assert _names(layout.checkpoint(user.id, "x").parent) == checkpoints, "directories of checkpoints"
        for row in agent.checkpoints.all(user):
            said = manifests.read(layout.checkpoint(user.id, row.id))
            assert (said.vm_name, said.label, said.labels) == (row.vm_name, row.label, row.labels), "manifest and row"
        assert self.checkpoint in checkpoints, "the checkpoint's row"
        assert not [name for name in _names(layout.golden) if "." in name], "half a template"
        with open_store(config.database) as store:
            assert store.open_operations() == [], "the journal"

    def _hashes(self) -> dict[str, str]:
        root = Layout(self.data_dir).users
        files = [path for path in root.glob(f"*/checkpoints/{self.checkpoint}/**/*") if path.is_file()]
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _spare(agent: Agent) -> Checkpoint:
    """Return the checkpoint that is there to be changed or deleted."""
    (spare,) = agent.checkpoints.all(agent.local_user(), SPARES)
    return spare


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


async def _said(guest: Guest, script: str) -> bytes:
    """Run a script in the guest and return what it wrote."""
    process = await guest.start(ExecRequest(argv=("sh", "-c", script)))
    text = b""
    while isinstance(said := await process.receive(), OutputChunk):
        text += said.data
    await guest.release(process)
    return text


async def _counted(guest: Guest, beyond: int) -> int:
    """Wait until the counter in the guest is beyond a number and return it."""
    with trio.fail_after(CELL_SECS):
        while True:
            text = await _said(guest, "cat /run/n")
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
            except BaseException:  # noqa: ASYNC103, BLE001, RUF100  # the parent raises it
                told.write(traceback.format_exc())
            told.flush()
        sys.stdout.flush()
    finally:
        os._exit(status)


async def _within(run: Callable[[], Awaitable[str]]) -> str:
    with trio.fail_after(CELL_SECS):
        return await run()
