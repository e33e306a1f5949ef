"""The steps that make one machine run: directories, network, disk, memory, wake. Each with what undoes it.

Every saga that ends with a running machine is made of them. A step may fail, be cancelled or be cut off by a crash at
any await; its undo then makes its product go away, using nothing but facts (see `noid.core.operations.saga`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import trio

from noid import hostfs
from noid.core.backends import RestorePlan
from noid.core.checkpoints.templates import verified
from noid.core.guests.identity import judged, new_identity
from noid.core.model.vms import Identity, Receipt, WakeReason
from noid.core.operations.saga import Facts, Step
from noid.core.operations.work import Work, given
from noid.core.vms import processes
from noid.core.waiting import console_tail, until_it_ends
from noid.errors import DeadlineExceeded, Incompatible, NoidError, NotUnique

logger = logging.getLogger(__name__)

#: How `Vm.origin` begins when it names a template and no checkpoint.
GOLDEN = "golden/"


async def find_template(work: Work, facts: Facts) -> dict[str, Any]:
    """Find or build the golden template of the shape."""
    work.source = await work.templates.get(given(work.spec))
    return {"origin": f"{GOLDEN}{work.source.manifest.id}"}


async def find_checkpoint(work: Work, facts: Facts) -> None:
    """Verify the checkpoint, which must be there still: from here on it cannot be deleted before the end."""
    work.services.store.checkpoint(given(work.user).id, facts["origin"])
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
            paused=work.stands_still,
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
    """Make a guest that was restored its own before any user byte."""
    await wake_because(work, facts, _wake_reason(facts))


async def wake_because(work: Work, facts: Facts, reason: WakeReason) -> None:
    """Make the guest its own: clock, randomness, names, the image's hooks, which are told why. Keeps the receipt."""
    services, directory, machine = work.services, _directory(work, facts), given(work.machine)
    work.link = work.link or services.supervisor.link(machine, directory, given(work.source).manifest.exec)
    identity = new_identity(
        facts["name"],
        facts["vm_id"],
        work.lease,
        reason=reason,
        # A machine that waits for the next create is nobody's yet: hooks run when it has become somebody's.
        hook_timeout_secs=services.config.hook_timeout_secs if work.user is not None else 0.0,
        vm_generation_id=services.vmm.features.vm_generation_id,
    )
    secs = services.config.wake_timeout_secs + identity.hook_timeout_secs
    try:
        with trio.fail_after(secs):
            async with until_it_ends(machine, directory), work.link.guest() as guest:
                work.receipt = judged(await guest.wake(identity), identity)
                work.link.health.heard()
    except trio.TooSlowError as error:
        raise DeadlineExceeded(
            f"the guest of VM {facts['name']!r} did not answer within {secs:g} s.{console_tail(directory)} Try again "
            "on a less busy host, or raise wake_timeout_secs in server.toml."
        ) from error
    _judge(facts["name"], identity, work.receipt, strict=services.config.require_unique == "strict")


def _judge(name: str, identity: Identity, receipt: Receipt, *, strict: bool) -> None:
    """Say what a guest may still share with its twins: to whoever waits, if that is not allowed, else to the log."""
    if not receipt.lacking:
        return
    before = {
        WakeReason.RESTORE: "The VM runs on as it was.",
        WakeReason.BOOT: "The VM is stopped, its disk is as the boot has left it.",
    }.get(identity.reason, "No VM was made.")
    items = "; ".join(f"{i.name} {i.status}" + (f" ({i.detail})" if i.detail else "") for i in receipt.lacking)
    if strict:
        raise NotUnique(
            f"the guest of VM {name!r} was ended, because it is not its own in everything: {items}. {before} Mend that "
            'in the image or the checkpoint, or allow it with require_unique = "report" in server.toml.'
        )
    logger.warning("the guest of VM %s is not its own in everything: %s", name, items)


def _wake_reason(facts: Facts) -> WakeReason:
    if "old_instance" in facts:
        return WakeReason.RESTORE
    return WakeReason.CREATE if (facts.get("origin") or GOLDEN).startswith(GOLDEN) else WakeReason.CLONE


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
