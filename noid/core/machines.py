"""The steps that make one machine run: directories, network, disk, memory, wake. Each with what undoes it.

Every saga that ends with a running machine is made of them. A step may fail, be cancelled or be cut off by a crash at
any await; its undo then makes its product go away, using nothing but facts (see `noid.core.saga`).
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import trio

from noid import hostfs
from noid.core import processes
from noid.core.backends import RestorePlan
from noid.core.identity import new_identity
from noid.core.saga import Facts, Step
from noid.core.templates import verified
from noid.core.waiting import console_tail, until_it_ends
from noid.core.work import Work, given
from noid.errors import DeadlineExceeded, Incompatible, NoidError

#: How `Vm.origin` begins when it names a template and no checkpoint.
GOLDEN = "golden/"


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
    work.link = work.link or services.supervisor.link(machine, directory)
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
