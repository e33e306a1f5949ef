"""What happens to a VM, as tables: create, fork, restore in place, checkpoint, destroy. Read each from top to bottom.

The steps' functions follow the tables. Each may fail, be cancelled or be cut off by a crash at any await; its undo
then makes its product go away, using nothing but facts (see `noid.core.saga`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import trio

from noid import hostfs
from noid.core import deeds, freezing, processes
from noid.core import manifest as manifests
from noid.core.backends import FreezePlan, Machine, RestorePlan
from noid.core.freezing import Frozen
from noid.core.identity import new_identity
from noid.core.ids import new_checkpoint_id, new_id, new_instance
from noid.core.manifest import Manifest
from noid.core.model import (
    Checkpoint,
    NetLease,
    Receipt,
    User,
    Vm,
    VmSpec,
    VmState,
    Volume,
    now,
)
from noid.core.saga import Facts, Saga, Step
from noid.core.services import Services
from noid.core.store import Tx
from noid.core.supervisor import GuestLink
from noid.core.templates import Source, Templates, verified
from noid.core.waiting import console_tail, until_it_ends
from noid.errors import Conflict, DeadlineExceeded, Incompatible, NoidError


@dataclass(slots=True, kw_only=True)
class Work:
    """One operation's live objects. Recovery starts from a fresh one: undo may rely on facts only."""

    services: Services
    templates: Templates
    user: User | None = None
    take: Callable[[VmSpec], Awaitable[Warm | None]] | None = None
    vm: Vm | None = None
    spec: VmSpec | None = None
    source: Source | None = None
    lease: NetLease | None = None
    volume: Volume | None = None
    machine: Machine | None = None
    link: GuestLink | None = None
    receipt: Receipt | None = None
    freeze_plan: FreezePlan | None = None
    frozen: Frozen | None = None
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """A woken machine that nobody has yet (`noid.core.pool`): the facts it was made with, and its live objects."""

    fingerprint: str
    facts: Facts
    work: Work


T = TypeVar("T")

#: How `Vm.origin` begins when it names a template and no checkpoint.
GOLDEN = "golden/"


def given(value: T | None) -> T:
    """Return what an earlier step has put there. A missing one is a step out of order, which is a bug."""
    if value is None:
        raise RuntimeError("a step ran before the one that provides what it needs")
    return value


# --- the machine that all three ways of getting a VM have in common --------------------------------------------------


async def find_template(work: Work, facts: Facts) -> dict[str, Any]:
    """Find or build the golden template of the shape."""
    work.source = await work.templates.get(given(work.spec))
    return {"origin": f"{GOLDEN}{work.source.manifest.id}"}


async def find_checkpoint(work: Work, facts: Facts) -> None:
    """Verify the checkpoint."""
    directory = work.services.layout.checkpoint(given(work.user).id, facts["origin"])
    work.source = await verified(work.services, directory)


async def make_directories(work: Work, facts: Facts) -> None:
    """Make the instance's directories."""
    with hostfs.os_errors("making the VM's directory"):
        for path in _directories(work, facts):
            path.mkdir(parents=True, mode=0o700)


async def remove_directories(work: Work, facts: Facts) -> None:
    """Remove the instance's directories, whatever they hold."""
    for path in _directories(work, facts):
        await trio.to_thread.run_sync(hostfs.remove_tree, path)


async def lease_network(work: Work, facts: Facts) -> None:
    """Reserve what the VM is connected to."""
    work.lease = await work.services.network.lease(facts["instance"])


async def release_network(work: Work, facts: Facts) -> None:
    """Give the lease back."""
    await work.services.network.release(facts["instance"])


async def clone_disk(work: Work, facts: Facts) -> None:
    """Make the VM's disk from the source's."""
    directory = _directory(work, facts)
    work.volume = await work.services.storage.clone(given(work.source).disk, directory)


async def delete_disk(work: Work, facts: Facts) -> None:
    """Remove the VM's disk, if there is one yet."""
    with contextlib.suppress(NoidError):  # no volume in there; whatever else is goes with the directory
        await work.services.storage.delete(work.services.storage.volume(_directory(work, facts)))


async def restore_machine(work: Work, facts: Facts) -> None:
    """Continue the source's memory in a new machine. The memory image is hard-linked, not copied.

    The source's manifest goes along: the VM's own checkpoints need it after the source was deleted.
    """
    services, directory, source = work.services, _directory(work, facts), given(work.source)
    frozen = source.manifest
    network = work.lease.kind if work.lease else "none"
    if network != frozen.network:
        raise Incompatible(
            f"checkpoint {frozen.id} cannot continue here: network was {frozen.network!r} when it was taken and "
            f"[backends] network gives {network!r} now. Set it back to restore this checkpoint."
        )
    with hostfs.os_errors("linking the memory image"):
        (directory / "memory").hardlink_to(source.directory / "memory")
        shutil.copyfile(source.directory / "manifest.json", directory / "manifest.json")
    work.machine = await services.vmm.restore(
        RestorePlan(
            instance=facts["instance"],
            directory=directory,
            run_dir=services.layout.run(facts["instance"]),
            data_dir=services.config.data_dir,
            cpus=frozen.cpus,
            mem_mib=frozen.mem_mib,
            volume=given(work.volume),
            lease=work.lease,
            memory=directory / "memory",
            state=source.directory / "state",
        )
    )


async def end_machine(work: Work, facts: Facts) -> None:
    """End the machine, found by its instance if this process never knew it."""
    if work.link is not None:
        work.link.drop()
    if work.machine is not None:
        await work.machine.kill()
        await work.machine.aclose()
    else:
        data_dir = work.services.config.data_dir
        await trio.to_thread.run_sync(processes.end_instance, data_dir, facts["instance"])


async def wake_guest(work: Work, facts: Facts) -> None:
    """Make the guest its own before any user byte: clock, randomness, names. Keeps the receipt."""
    services, directory, machine = work.services, _directory(work, facts), given(work.machine)
    work.link = work.link or services.supervisor.link(machine)
    identity = new_identity(facts["name"], facts["vm_id"], work.lease)
    secs = services.config.wake_timeout_secs
    try:
        with trio.fail_after(secs):
            async with until_it_ends(machine, directory), work.link.guest() as guest:
                work.receipt = await guest.wake(identity)
    except trio.TooSlowError as error:
        raise DeadlineExceeded(
            f"the guest of VM {facts['name']!r} did not answer within {secs:g} s.{console_tail(directory)} Try again "
            "on a less busy host, or raise wake_timeout_secs in server.toml."
        ) from error


def _directory(work: Work, facts: Facts) -> Path:
    return work.services.layout.vm(facts["instance"])


def _directories(work: Work, facts: Facts) -> tuple[Path, Path]:
    return _directory(work, facts), work.services.layout.run(facts["instance"])


COLD: tuple[Step[Work], ...] = (
    Step("directories", make_directories, remove_directories),
    Step("lease", lease_network, release_network),
    Step("disk", clone_disk, delete_disk),
    Step("restore", restore_machine, end_machine),
)
WAKE: Step[Work] = Step("wake", wake_guest)
MACHINE = (*COLD, WAKE)


async def end_all(work: Work, facts: Facts) -> None:
    """Undo every step of `MACHINE`."""
    for step in reversed(MACHINE):
        if step.undo is not None:
            await step.undo(work, facts)


# --- create and fork: a new VM ---------------------------------------------------------------------------------------


async def reserve_name(work: Work, facts: Facts) -> None:
    """Insert the row: from here the name is taken."""
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
        created_at=now(),
    )
    await work.services.store.write(lambda tx: tx.insert_vm(vm))
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
    )
    deeds.write_vm(work.services.layout, tx.current(vm.id), given(work.user))


def facts_of_new_vm(name: str, origin: str | None) -> Facts:
    """Decide every name a new VM's saga will use."""
    return {"vm_id": new_id(), "instance": new_instance(), "name": name, "origin": origin}


async def take_warm(work: Work, facts: Facts) -> dict[str, Any]:
    """Take over a machine that waits for just this, if there is one: all that is left to do then is to wake it."""
    warm = await work.take(given(work.spec)) if work.take is not None else None
    if warm is None:
        return {}
    mine = warm.work
    work.source, work.lease, work.volume = mine.source, mine.lease, mine.volume
    work.machine, work.link = mine.machine, mine.link
    return {"instance": warm.facts["instance"], "origin": warm.facts["origin"]}


def unless_warm(step: Step[Work]) -> Step[Work]:
    """Return *step* as it is in a create that may have taken over a machine, which has gone through it already."""

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

FORK_VM: Saga[Work] = Saga(
    "vm.fork",
    (Step("reserve", reserve_name, free_name), Step("verify", find_checkpoint), *MACHINE),
    commit_machine,
    deadline_secs=300.0,
)


# --- restore in place: a new machine beside the old one, then they change places -------------------------------------


def facts_of_restore(vm: Vm, origin: str) -> Facts:
    """Decide every name an in-place restore will use. The VM keeps its id, so it keeps its machine-id too."""
    return {
        "vm_id": vm.id,
        "instance": new_instance(),
        "name": vm.name,
        "origin": origin,
        "old_instance": vm.instance,
    }


RESTORE_VM: Saga[Work] = Saga(
    "vm.restore", (Step("verify", find_checkpoint), *MACHINE), commit_machine, deadline_secs=300.0
)


async def end_replaced(work: Work, old: Vm) -> None:
    """End what an in-place restore replaced. Nothing owns it any more: what fails here the next start sweeps."""
    services = work.services
    facts: Facts = {"instance": old.instance}
    await trio.to_thread.run_sync(processes.end_instance, services.config.data_dir, old.instance)
    await release_network(work, facts)
    await delete_disk(work, facts)
    await remove_directories(work, facts)


# --- checkpoint ------------------------------------------------------------------------------------------------------


async def reserve_checkpoint(work: Work, facts: Facts) -> None:
    """Make the directory it is written into."""
    await trio.to_thread.run_sync(deeds.write_user, work.services.layout, given(work.user))
    with hostfs.os_errors("making the checkpoint's directory"):
        (_partial(work, facts) / "disk").mkdir(parents=True, mode=0o700)


async def remove_partial(work: Work, facts: Facts) -> None:
    """Remove what there is of the checkpoint."""
    await trio.to_thread.run_sync(hostfs.remove_tree, _partial(work, facts))


async def prepare_freeze(work: Work, facts: Facts) -> None:
    """Do the slow part of the disk's freeze while the guest runs."""
    services, vm = work.services, given(work.vm)
    volume = services.storage.volume(services.layout.vm(vm.instance))
    work.freeze_plan = await services.storage.prepare_freeze(volume, _partial(work, facts) / "disk")


async def abandon_freeze(work: Work, facts: Facts) -> None:
    """Remove a prepared layer the machine does not use.

    Recovery has no plan any more: the layer, if there is one, is then what the volume has on top.
    """
    services, plan = work.services, work.freeze_plan
    if plan is None and work.vm is not None and work.machine is not None:
        volume = services.storage.volume(services.layout.vm(work.vm.instance))
        plan = FreezePlan(volume=volume, into=_partial(work, facts) / "disk", prepared=volume.path)
    if plan is not None:
        await services.storage.abandon_freeze(plan, work.machine)


async def capture_machine(work: Work, facts: Facts) -> dict[str, Any]:
    """The pause. The guest runs again when this returns or raises."""
    machine, plan, into = given(work.machine), given(work.freeze_plan), _partial(work, facts)
    work.frozen = await freezing.freeze(machine, work.services.storage, plan, into, resume=True)
    return {"pause_secs": work.frozen.pause_secs, "changed_bytes": work.frozen.capture.changed_bytes}


async def finish_image(work: Work, facts: Facts) -> None:
    """Build the memory image and write the manifest, while the guest runs."""
    vm, services = given(work.vm), work.services
    own = await trio.to_thread.run_sync(manifests.read, services.layout.vm(vm.instance))
    parent = None if vm.origin is None or vm.origin.startswith(GOLDEN) else vm.origin
    checkpoint = Checkpoint(
        id=facts["checkpoint_id"],
        owner=vm.owner,
        vm_id=vm.id,
        vm_name=vm.name,
        label=facts["label"],
        cpus=vm.cpus,
        mem_mib=vm.mem_mib,
        image=vm.image,
        parent=parent,
        created_at=now(),
    )
    draft = Manifest(
        id=checkpoint.id,
        vm_id=vm.id,
        vm_name=vm.name,
        label=checkpoint.label,
        parent=checkpoint.parent,
        created_at=checkpoint.created_at,
        cpus=vm.cpus,
        mem_mib=vm.mem_mib,
        image=vm.image,
        image_digest=own.image_digest,
        kernel_release=own.kernel_release,
        network=vm.network,
        fingerprint=services.vmm.fingerprint(),
    )
    await freezing.complete(given(work.frozen), _partial(work, facts), draft, own.files)
    work.checkpoint = checkpoint


async def publish_checkpoint(work: Work, facts: Facts) -> None:
    """Make it durable and give it its final name: from here it exists."""
    final = work.services.layout.checkpoint(given(work.user).id, facts["checkpoint_id"])
    with hostfs.os_errors("publishing the checkpoint"):
        await trio.to_thread.run_sync(hostfs.publish_directory, _partial(work, facts), final)


async def unpublish_checkpoint(work: Work, facts: Facts) -> None:
    """Take it back, at one instant: what follows is the removal of a part nobody takes for a checkpoint."""
    final = work.services.layout.checkpoint(given(work.user).id, facts["checkpoint_id"])
    with contextlib.suppress(FileNotFoundError):
        final.rename(_partial(work, facts))  # which undoing `reserve` removes


def commit_checkpoint(work: Work, facts: Facts, tx: Tx) -> None:
    """The checkpoint can be found."""
    tx.insert_checkpoint(given(work.checkpoint))


def facts_of_checkpoint(vm: Vm, label: str | None) -> Facts:
    """Decide every name a checkpoint will use."""
    return {"checkpoint_id": new_checkpoint_id(), "instance": vm.instance, "label": label}


def _partial(work: Work, facts: Facts) -> Path:
    return work.services.layout.partial(given(work.user).id, facts["checkpoint_id"])


CHECKPOINT_VM: Saga[Work] = Saga(
    "vm.checkpoint",
    (
        Step("reserve", reserve_checkpoint, remove_partial),
        Step("prepare", prepare_freeze, abandon_freeze),
        Step("capture", capture_machine),
        Step("finish", finish_image),
        Step("publish", publish_checkpoint, unpublish_checkpoint),
    ),
    commit_checkpoint,
    deadline_secs=300.0,
)


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
)

SAGAS: dict[str, Saga[Work]] = {s.kind: s for s in (CREATE_VM, FORK_VM, RESTORE_VM, CHECKPOINT_VM, DESTROY_VM)}


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
