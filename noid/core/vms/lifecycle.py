"""How VMs come and go, as tables: create, fork, restore in place, destroy. Read each from top to bottom.

The steps' functions come before their tables; those that make a machine run are in `noid.core.vms.machines`. Each may
fail, be cancelled or be cut off by a crash at any await; its undo then makes its product go away, using nothing but
facts (see `noid.core.operations.saga`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import trio

from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.ids import new_id, new_instance
from noid.core.model.storage import Checkpoint
from noid.core.model.times import now
from noid.core.model.vms import Vm, VmState
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Warm, Work, given
from noid.core.vms import processes
from noid.core.vms.machines import (
    COLD,
    GOLDEN,
    WAKE,
    delete_disk,
    end_all,
    find_checkpoint,
    find_template,
    release_network,
    remove_directories,
)
from noid.errors import Conflict

# --- create and fork: a new VM ---------------------------------------------------------------------------------------


async def reserve_name(work: Work, facts: Facts) -> None:
    """Insert the row: from here the name is taken, and the VM counts."""
    spec = given(work.spec)
    vm = Vm(
        id=facts["vm_id"],
        owner=given(work.user).id,
        name=facts["name"],
        state=VmState.CREATING,
        generation=1,
        cpus=spec.cpus,
        mem_mib=spec.mem_mib,
        image=spec.image,
        instance=facts["instance"],
        labels=spec.labels,
        created_at=now(),
    )
    quotas = work.services.quotas
    await quotas.check_bytes(vm.owner)

    def insert(tx: Tx) -> None:
        tx.insert_vm(vm)
        quotas.reserve_vm(tx, vm)

    await work.services.store.write(insert)
    work.vm = vm


async def free_name(work: Work, facts: Facts) -> None:
    """Remove the row."""
    await work.services.store.write(lambda tx: tx.delete_vm(facts["vm_id"]))


def commit_machine(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM runs on its new machine, of the shape that has. What the row was before may have changed: it can die."""
    frozen = given(work.source).manifest
    vm = tx.current(facts["vm_id"])
    tx.update_vm(
        vm,
        state=VmState.RUNNING,
        cpus=frozen.cpus,
        mem_mib=frozen.mem_mib,
        image=vm.image if facts["origin"].startswith(GOLDEN) else frozen.image,
        instance=facts["instance"],
        process=given(work.machine).ref,
        lease=work.lease,
        network=work.lease.kind if work.lease else "none",
        origin=facts["origin"],
        receipt=work.receipt,
        labels=vm.labels if facts.get("labels") is None else facts["labels"],
    )
    if frozen.cpus > vm.cpus or frozen.mem_mib > vm.mem_mib:
        work.services.quotas.reshape_vm(tx, vm.owner)
    deeds.write_vm(work.services.layout, tx.current(vm.id), given(work.user))


def facts_of_new_vm(name: str, origin: str | None) -> Facts:
    """Decide every name a new VM's saga will use."""
    return {"vm_id": new_id(), "instance": new_instance(), "name": name, "origin": origin}


async def take_warm(work: Work, facts: Facts) -> dict[str, Any]:
    """Take over a machine that waits for just this, if there is one: all that is left to do then is to wake it."""
    return _taken(work, await work.take(given(work.spec)) if work.take is not None else None)


async def take_copy(work: Work, facts: Facts) -> dict[str, Any]:
    """Take over a copy of the checkpoint that stands ready, if there is one: it goes on, and is left to be woken."""
    return _taken(work, await work.take_copy(facts["origin"]) if work.take_copy is not None else None)


def _taken(work: Work, warm: Warm | None) -> dict[str, Any]:
    if warm is None:
        return {}
    mine = warm.work
    work.source, work.lease, work.volume = mine.source, mine.lease, mine.volume
    work.machine, work.link = mine.machine, mine.link
    return {"instance": warm.facts["instance"], "origin": warm.facts["origin"]}


def unless_warm(step: Step[Work]) -> Step[Work]:
    """Return *step* as it is where a machine may have been taken over, which has gone through it already."""

    async def do(work: Work, facts: Facts) -> Mapping[str, Any] | None:
        return None if work.machine is not None else await step.do(work, facts)

    return dataclasses.replace(step, do=do)


CREATE_VM: Saga[Work] = Saga(
    "vm.create",
    (
        Step("reserve", reserve_name, free_name),
        Step("take", take_warm, end_all),
        *map(unless_warm, (Step("template", find_template), *COLD)),
        WAKE,
    ),
    commit_machine,
    deadline_secs=900.0,
)

COPY: tuple[Step[Work], ...] = (
    Step("verify", find_checkpoint),
    Step("take", take_copy, end_all),
    *map(unless_warm, COLD),
    WAKE,
)

FORK_VM: Saga[Work] = Saga(
    "vm.fork",
    (Step("reserve", reserve_name, free_name), *COPY),
    commit_machine,
    deadline_secs=300.0,
)


# --- restore in place: a new machine beside the old one, then they change places -------------------------------------


def facts_of_restore(vm: Vm, origin: str, labels: Mapping[str, str] | None = None) -> Facts:
    """Decide every name an in-place restore will use. The VM keeps its id, so it keeps its machine-id too.

    *labels* None: it keeps those as well.
    """
    return {
        "vm_id": vm.id,
        "instance": new_instance(),
        "name": vm.name,
        "origin": origin,
        "old_instance": vm.instance,
        "labels": labels,
    }


RESTORE_VM: Saga[Work] = Saga("vm.restore", COPY, commit_machine, deadline_secs=300.0)


async def end_replaced(work: Work, old: Vm) -> None:
    """End what an in-place restore replaced. Nothing owns it any more: what fails here the next start sweeps."""
    services = work.services
    facts: Facts = {"instance": old.instance}
    await trio.to_thread.run_sync(processes.end_instance, services.config.data_dir, old.instance)
    await release_network(work, facts)
    await delete_disk(work, facts)
    await remove_directories(work, facts)


# --- destroy: only forward -------------------------------------------------------------------------------------------


async def mark_destroying(work: Work, facts: Facts) -> None:
    """Say so in the row. What fails later leaves it there, and destroying again goes on."""
    vm = given(work.vm)
    await work.services.store.write(lambda tx: tx.update_vm(tx.current(vm.id), state=VmState.DESTROYING))


async def release_machine(work: Work, facts: Facts) -> None:
    """End the machine, whether this agent holds it or not."""
    live = work.services.supervisor.release(facts["vm_id"])
    if live is not None:
        await live.machine.kill()
        await live.machine.aclose()
    await trio.to_thread.run_sync(processes.end_instance, work.services.config.data_dir, facts["instance"])


def commit_destroy(work: Work, facts: Facts, tx: Tx) -> None:
    """The VM is gone."""
    tx.delete_vm(facts["vm_id"])


def facts_of_destroy(vm: Vm) -> Facts:
    """Name what goes."""
    return {"vm_id": vm.id, "instance": vm.instance, "name": vm.name}


DESTROY_VM: Saga[Work] = Saga(
    "vm.destroy",
    (
        Step("mark", mark_destroying),
        Step("machine", release_machine),
        Step("lease", release_network),
        Step("disk", delete_disk),
        Step("directories", remove_directories),
    ),
    commit_destroy,
    deadline_secs=60.0,
    forward=True,
    needs_room=False,
)


def require_own_checkpoint(vm: Vm, checkpoint: Checkpoint) -> None:
    """Let an in-place restore pass only if the checkpoint is of that VM, or the one the VM was cloned from.

    Raises:
        Conflict: a wrong id must not silently replace one VM with another.
    """
    if checkpoint.vm_id != vm.id and checkpoint.id != vm.origin and checkpoint.vm_name != vm.name:
        raise Conflict(
            f"checkpoint {checkpoint.id} is of VM {checkpoint.vm_name!r}, not of {vm.name!r}. Restore it as a new VM "
            f"(`noid restore {checkpoint.vm_name} {checkpoint.id} --as NAME`), or destroy {vm.name!r} first."
        )
