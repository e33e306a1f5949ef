"""A checkpoint, as a table: prepare, pause and capture, build the image while the guest runs, publish."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from noid import hostfs
from noid.core.backends import FreezePlan
from noid.core.checkpoints import freezing
from noid.core.checkpoints import manifest as manifests
from noid.core.checkpoints.manifest import Manifest
from noid.core.database import deeds
from noid.core.database.store import Tx
from noid.core.ids import new_checkpoint_id
from noid.core.model.names import checked_label, checked_labels
from noid.core.model.storage import Checkpoint
from noid.core.model.times import now
from noid.core.model.vms import Vm, VmState
from noid.core.operations.saga import Facts, Saga, Step
from noid.core.operations.work import Work, given
from noid.core.vms.machines import GOLDEN


async def reserve_checkpoint(work: Work, facts: Facts) -> None:
    """See that it may be, and make the directory it is written into."""
    quotas, owner = work.services.quotas, given(work.user).id
    await quotas.check_bytes(owner)
    await work.services.store.write(lambda tx: quotas.reserve_checkpoint(tx, owner, facts["checkpoint_id"]))
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
    """The pause. The guest runs again when this returns or raises, unless it was paused before: then it stays so."""
    machine, plan, into = given(work.machine), given(work.freeze_plan), _partial(work, facts)
    resume = given(work.vm).state is not VmState.PAUSED
    try:
        work.frozen = await freezing.freeze(machine, work.services.storage, plan, into, resume=resume)
    finally:
        _let_go_of_guest(work)
    return {"pause_secs": work.frozen.pause_secs, "changed_bytes": work.frozen.capture.changed_bytes}


def _let_go_of_guest(work: Work) -> None:
    """If the capture has cut the connection to the guest, let nobody find out by using it: the next makes a new one."""
    live = work.services.supervisor.find(given(work.vm).id)
    if work.services.vmm.features.capture_cuts_channel and live is not None and live.machine is work.machine:
        live.link.drop()


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
        labels=facts["labels"],
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
        labels=checkpoint.labels,
        parent=checkpoint.parent,
        created_at=checkpoint.created_at,
        cpus=vm.cpus,
        mem_mib=vm.mem_mib,
        image=vm.image,
        image_digest=own.image_digest,
        kernel_release=own.kernel_release,
        network=vm.network,
        fingerprint=services.vmm.fingerprint(),
        exec=own.exec,
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


def facts_of_checkpoint(vm: Vm, label: str | None, labels: Mapping[str, str]) -> Facts:
    """Decide every name a checkpoint will use."""
    named = {"checkpoint_id": new_checkpoint_id(), "instance": vm.instance}
    return {**named, "label": checked_label(label), "labels": checked_labels(labels)}


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
