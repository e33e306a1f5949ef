"""Pause and resume, as tables: a guest's CPUs stand still and go on. Nothing else of the VM changes.

The row says which it is, and whoever adopts the machine makes it so: a paused VM stays paused across agents. Each step
may fail, be cancelled or be cut off by a crash (see `noid.core.operations.saga`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.model.vms import Vm, VmState
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work, given
from noid.core.vms.supervisor import Live
from noid.errors import DependencyDown

#: How long the end of a machine that does not answer may take to be noticed.
GONE_SECS = 5.0


async def stand_still(live: Live) -> None:
    """Stop the guest's CPUs. From before that on nobody takes its silence for a fault."""
    live.link.health.suspend()
    await live.machine.pause()


async def go_on(live: Live) -> None:
    """Let the guest's CPUs run; it is looked after again."""
    await live.machine.resume()
    live.link.health.go_on()


async def pause_machine(work: Work, facts: Facts) -> None:
    """Stop the CPUs."""
    await stand_still(work.services.supervisor.get(given(work.vm)))


async def undo_pause(work: Work, facts: Facts) -> None:
    """Let them run again, if there is still a machine."""
    await if_it_lives(work, facts, go_on)


async def resume_machine(work: Work, facts: Facts) -> None:
    """Let the CPUs run."""
    await go_on(work.services.supervisor.get(given(work.vm)))


async def undo_resume(work: Work, facts: Facts) -> None:
    """Stop them again, if there is still a machine."""
    await if_it_lives(work, facts, stand_still)


def commit_paused(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM is paused: also for the next agent, and for one that finds it without a database."""
    _commit(work, facts, tx, VmState.PAUSED)


def commit_resumed(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM runs."""
    _commit(work, facts, tx, VmState.RUNNING)


def facts_of_pause(vm: Vm) -> Facts:
    """Name the machine that is paused or resumed."""
    return {"vm_id": vm.id, "instance": vm.instance, "name": vm.name}


def _commit(work: Work, facts: Facts, tx: Tx, state: VmState) -> None:
    """Say so in the row.

    Raises:
        DependencyDown: the machine has ended meanwhile; what the row says of that stays.
    """
    vm = tx.current(facts["vm_id"])
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        raise DependencyDown(f"the machine of VM {vm.name!r} has ended by itself: the VM is {vm.state}.")
    tx.update_vm(vm, state=state)
    deeds.write_vm(work.services.layout, tx.current(vm.id), given(work.user))


async def if_it_lives(work: Work, facts: Facts, act: Callable[[Live], Awaitable[None]]) -> None:
    """Do *act* to the machine. One that has gone, perhaps just now, needs nothing."""
    live = work.services.supervisor.find(facts["vm_id"])
    if live is None or live.instance != facts["instance"]:
        return
    try:
        await act(live)
    except DependencyDown:
        with trio.move_on_after(GONE_SECS):
            await live.gone.wait()
        if not live.gone.is_set():
            raise


PAUSE_VM: Saga[Work] = Saga(
    "vm.pause", (Step("pause", pause_machine, undo_pause),), commit_paused, deadline_secs=60.0, needs_room=False
)
RESUME_VM: Saga[Work] = Saga(
    "vm.resume", (Step("resume", resume_machine, undo_resume),), commit_resumed, deadline_secs=60.0, needs_room=False
)
